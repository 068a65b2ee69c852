// Package node gives the end-to-end tests and the measurements nodes of their own: `polymesh server`, the file that
// ships, in a network namespace. Nodes, one or several, are on a bridge in a namespace of its own, and so is the world outside,
// in a third kind of namespace.
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
// Several nodes that see each other are a cluster:
//
//	c := node.ClusterForTest(t)
//	a := c.AddForTest(t, node.Options{Args: []string{"--node-label", "zone=a"}}) // its host name is node-1
//	b := c.AddForTest(t, node.Options{Env: []string{"HTTPS_PROXY="}})
//	a.Dial(ctx, "tcp", b.Address()+":6443")
//	c.Partition(a, b); c.Heal(a, b)                                             // silently: no reset, no ICMP
//	c.Delay(b, 20*time.Millisecond)                                             // each way
//	w := c.AddForTest(t, node.Options{Joins: a})                                // an agent
//	c.PowerOff(b); c.PowerOn(ctx, b)                                            // no reset gets out; files stay
//
// Up and Down run `make up`'s and `make down`'s scripts on the node instead of Start and Reset.
//
// POLYMESH_BIN names the program, by default dist/polymesh of the repository. POLYMESH_E2E_KEEP=1 leaves the nodes for a
// look at them; the next run removes them.
package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// Options say what kind of machine a node is and how its server is started.
type Options struct {
	// Joins makes the node an agent of this server's cluster. kubectl on it then uses the server's kubeconfig through the server.
	Joins *Node
	// Args are further flags of `polymesh server`, or `polymesh agent`; data dir, kubeconfig, server and token are set already.
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
	// Hostname is the machine's name, which its server sees as the host's and takes for its Kubernetes node. By default a node of
	// a Cluster has one of its own, and a single one that of the machine which the tests run on.
	Hostname string
	// Limits make a small machine.
	Limits Limits
	// Disk is what the data dir lies on, by default the machine's own.
	Disk *Disk
}

// Node is one machine.
type Node struct {
	// Name is also the name of the network namespace, below /run/netns.
	Name string
	// Dir holds all files of the node.
	Dir string

	opts    Options
	program string
	cluster *Cluster
	single  bool // the cluster is there for this node only
	number  int  // in the cluster, from 1
	inside  namespace
	outside namespace
	server  *process
	delay   *relay // where its traffic is delayed
	off     *outage

	explained string // the test whose failure was explained last
}

// prefix starts the names of all that this package makes.
const prefix = "pm-e2e-"

// keepEnv leaves nodes where they are.
const keepEnv = "POLYMESH_E2E_KEEP"

// New makes a machine alone on its network. Nothing runs on it yet.
func New(o Options) (*Node, error) {
	c, err := NewCluster()
	if err != nil {
		return nil, err
	}
	n, err := c.add(o)
	if err != nil {
		return nil, errors.Join(err, c.record().remove(context.Background()))
	}
	n.single = true
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
	if n.single {
		return n.cluster.Close(ctx)
	}
	return n.remove(ctx)
}

func (n *Node) remove(ctx context.Context) error {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	if os.Getenv(keepEnv) != "" {
		enter := "--net=" + n.inside.path()
		if n.opts.Hostname != "" {
			enter += " --uts=" + n.hostname()
		}
		fmt.Fprintf(os.Stderr, "%s: node %s is kept: nsenter %s; export KUBECONFIG=%s POLYMESH_DATA_DIR=%s\n",
			keepEnv, n.Name, enter, n.Kubeconfig(), n.DataDir())
		return n.stopDelay() // which ends with this program
	}
	n.cluster.nodes = slices.DeleteFunc(n.cluster.nodes, func(other *Node) bool { return other == n })
	return errors.Join(n.stopDelay(), n.record().remove(ctx))
}

// hostname is the file that stands for the namespace with the machine's name.
func (n *Node) hostname() string { return filepath.Join(n.Dir, "uts") }

// nameHost makes the namespace with the machine's name. The folder's removal unmounts it.
func (n *Node) nameHost() error {
	if n.opts.Hostname == "" {
		return nil
	}
	if err := os.WriteFile(n.hostname(), nil, 0o600); err != nil {
		return err
	}
	return tool("unshare", "--uts="+n.hostname(), "hostname", n.opts.Hostname)
}

// namespaces are nsenter and its flags for the node's namespaces. (`ip netns exec` would mount another /sys, without the
// cgroups.)
func (n *Node) namespaces() []string {
	args := []string{"nsenter", "--net=" + n.inside.path()}
	if n.opts.Hostname != "" {
		args = append(args, "--uts="+n.hostname())
	}
	return append(args, "--")
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
