// Package node gives the end-to-end tests and the measurements nodes of their own: `polymesh server`, the file that
// ships, in a network namespace, with a second namespace beside it for the world outside.
//
// It owns the namespaces, the folder of a node below the system's folder for temporary files, and their removal, also
// after a test that was killed. It knows nothing of what is tested.
//
// A program calls Guard first, in TestMain or main. Then:
//
//	n := node.ForTest(t, node.Options{Args: []string{"--mesh-profile", "demo"}}) // removed with the test, explained when it fails
//	if err := n.Start(ctx); err != nil { ... }                                  // the server process
//	n.WaitReady(t, 2*time.Minute)                                               // every component is ready
//	n.Import(t, archive)                                                        // an image archive
//	n.Apply(t, yaml)
//	n.Kubectl(t, "get", "pods", "-A")                                           // fails the test when kubectl fails
//	out, err := n.KubectlErr("get", "pods")                                     // a failure to look at
//	pods, err := n.Client(t).CoreV1().Pods("x").List(...)                       // client-go
//	n.HTTP(false).Get("http://" + n.Address() + "/")                            // from outside, each request on a new connection
//	n.Eventually(t, time.Minute, func() (bool, string) { ... })                 // what is still missing, until it is there
//	n.Stop(ctx); n.Kill(); n.Start(ctx); n.Reset(ctx)
//
// Up and Down run `make up`'s and `make down`'s scripts on the node instead of Start and Reset.
//
// POLYMESH_BIN names the program, by default dist/polymesh of the repository. POLYMESH_E2E_KEEP=1 leaves the nodes for a
// look at them; the next run removes them.
package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Options say what kind of machine a node is and how its server is started.
type Options struct {
	// Args are further flags of `polymesh server`; data dir and kubeconfig are set already.
	Args []string
	// Env are further environment variables of the server, KEY=value.
	Env []string
	// NoDefaultRoute makes a machine that knows its own network only.
	NoDefaultRoute bool
	// NoNameserver makes a machine whose /etc/resolv.conf names no one. Its server has a mount namespace of its own for
	// that, so that after a restart it does not see the mounts of the first one.
	NoNameserver bool
	// Umask is that of the shell which starts the server, "077"; empty for the tests' own.
	Umask string
	// Limits make a small machine.
	Limits Limits
	// Disk is what the data dir lies on, by default the machine's own.
	Disk *Disk
	// SameAs is a node whose address this one has: it is that machine after a power cut.
	SameAs *Node
}

// Node is one machine.
type Node struct {
	// Name is also the name of the network namespace, below /run/netns. That of the world outside has -out behind it.
	Name string
	// Dir holds all files of the node.
	Dir string

	opts    Options
	program string
	inside  namespace
	outside namespace
	server  *process
	subnet  byte

	explained string // the test whose failure was explained last
}

// prefix starts the names of all that this package makes.
const prefix = "pm-e2e-"

// New makes a machine. Nothing runs on it yet.
func New(o Options) (*Node, error) {
	program, err := Program()
	if err != nil {
		return nil, err
	}
	id := make([]byte, 3)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	// The disk is the machine's, and as full as others have left it: images that a test has imported must not be collected,
	// nor pods be evicted, for what is no matter of the node's.
	o.Args = append([]string{"--kubelet-arg=image-gc-high-threshold=100", "--kubelet-arg=eviction-hard=memory.available<100Mi,nodefs.available<1%,imagefs.available<1%"}, o.Args...)
	name := prefix + hex.EncodeToString(id)
	n := &Node{
		// The folder's name is short: the path of a socket has 107 characters.
		Name: name, Dir: filepath.Join(os.TempDir(), name), opts: o, program: program,
		inside: namespace(name), outside: namespace(name + "-out"), subnet: id[0],
	}
	if o.SameAs != nil {
		n.subnet = o.SameAs.subnet
	}
	if err := os.Mkdir(n.Dir, 0o711); err != nil {
		return nil, err
	}
	// From here on a later run finds and removes what this one leaves.
	if err := n.record().write(); err != nil {
		return nil, err
	}
	err = n.connect(n.subnet)
	if err == nil && o.Disk != nil {
		err = o.Disk.mount(n.diskDir())
	}
	if err != nil {
		return nil, errors.Join(err, n.record().remove(context.Background()))
	}
	return n, nil
}

// ForTest makes a machine that goes away with the test, and that explains itself when the test fails.
func ForTest(t testing.TB, o Options) *Node {
	t.Helper()
	n, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := n.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	n.ExplainFailure(t)
	return n
}

// Close removes the node with all that belongs to it. A server that runs is not asked first.
func (n *Node) Close(ctx context.Context) error {
	if os.Getenv("POLYMESH_E2E_KEEP") != "" {
		fmt.Fprintf(os.Stderr, "POLYMESH_E2E_KEEP: node %s is kept: nsenter --net=%s; export KUBECONFIG=%s POLYMESH_DATA_DIR=%s\n",
			n.Name, n.inside.path(), n.Kubeconfig(), n.DataDir())
		return nil
	}
	return n.record().remove(ctx)
}

// DataDir is the server's --data-dir. New does not make it.
func (n *Node) DataDir() string {
	if n.opts.Disk != nil {
		return filepath.Join(n.diskDir(), "data")
	}
	return filepath.Join(n.Dir, "data")
}

// diskDir is where a disk of the node's own is mounted.
func (n *Node) diskDir() string { return filepath.Join(n.Dir, "disk") }

// Kubeconfig is the file that the server writes.
func (n *Node) Kubeconfig() string { return filepath.Join(n.Dir, "polymesh.yaml") }

// Log is the file with the server's output, over all its starts.
func (n *Node) Log() string { return filepath.Join(n.Dir, "server.log") }

// stateDir is where build/up keeps its pid file.
func (n *Node) stateDir() string { return filepath.Join(n.Dir, "state") }

// Top is the repository's top folder.
func Top() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "build", "versions.mk")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("this is not inside Polymesh's repository")
		}
		dir = parent
	}
}

// Program is the file under test.
func Program() (string, error) {
	program := os.Getenv("POLYMESH_BIN")
	if program == "" {
		top, err := Top()
		if err != nil {
			return "", err
		}
		program = filepath.Join(top, "dist", "polymesh")
	}
	program, err := filepath.Abs(program)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("%w: run make first, or name the program in POLYMESH_BIN", err)
	}
	return program, nil
}
