// Package node provides nodes for the end-to-end tests and the measurements: `polymesh server`, the shipped file, in a network
// namespace. One or more nodes are on a bridge in a separate namespace, together with the outside world in another one.
//
// It owns the namespaces, the folder of a node below the system's folder for temporary files, and their removal, also after a test
// that was killed. It does not know what is tested.
//
// A program calls Guard first, in TestMain or main. Then:
//
//	n := node.ForTest(t, node.Options{Args: []string{"--mesh-profile", "demo"}}) // removed with the test, explained when it fails
//	if err := n.Start(ctx); err != nil { ... }                                  // the server process
//	n.WaitReady(t, 2*time.Minute)                                               // every component is ready
//	n.Import(t, archive)                                                        // an image archive
//	n.Apply(t, yaml)
//	n.Kubectl(t, "get", "pods", "-A")                                           // fails the test when kubectl fails
//	out, err := n.KubectlErr("get", "pods")                                     // an expected failure
//	pods, err := n.Client(t).CoreV1().Pods("x").List(...)                       // client-go
//	n.HTTP(false).Get("http://" + n.Address() + "/")                            // from outside, each request on a new connection
//	n.Eventually(t, time.Minute, func() (bool, string) { ... })                 // what is still missing, until nothing is
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
//	s := c.AddForTest(t, node.Options{Joins: a, Serves: true})                  // a further server
//	c.PowerOff(b); c.PowerOn(ctx, b)                                            // no reset gets out; files stay
//
// Up and Down run `make up`'s and `make down`'s scripts on the node instead of Start and Reset.
//
// POLYMESH_BIN names the program, by default dist/polymesh of the repository. POLYMESH_E2E_KEEP=1 keeps the nodes for inspection;
// the next run removes them.
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

	"polymesh.dev/polymesh/pkg/layout"
)

// Options describe the machine of a node, and how its server is started.
type Options struct {
	// Joins makes the node an agent of this server's cluster. kubectl on it then uses the server's kubeconfig through the server.
	Joins *Node
	// Serves makes the node a further server of that cluster, in place of an agent. kubectl on it uses its own API server.
	Serves bool
	// Program is the polymesh file that runs on the node, by default the one under test. The data dir of another one is not prepared.
	Program string
	// Args are further flags of `polymesh server`, or `polymesh agent`; data dir, kubeconfig, server and token are set already.
	Args []string
	// Observe lets the server have the store of metrics, logs and traces. Without it, it is started with --disable observe, because most tests
	// do not look at what a store has, and each would pay for one. The node with the guide's app has it, as a user's. With a config file, set it
	// and let the file disable it: of a setting that is in both, the flag counts.
	Observe bool
	// Env are further environment variables of the server, KEY=value.
	Env []string
	// NoDefaultRoute creates a machine that only has a route to its own network.
	NoDefaultRoute bool
	// NoNameserver creates a machine without a name server in /etc/resolv.conf. Its server has a separate mount namespace for that, so
	// after a restart it does not see the mounts of the first one.
	NoNameserver bool
	// Umask is that of the shell that starts the server, "077"; empty for that of the tests.
	Umask string
	// Hostname is the machine's host name, which its server uses for its Kubernetes node. By default a node of a Cluster has its own,
	// and a single one has that of the machine on which the tests run.
	Hostname string
	// Limits limit the machine's resources.
	Limits Limits
	// Disk contains the data dir, by default the machine's own.
	Disk *Disk
	// FirstStart lets the server of a test's node start from nothing. By default, if there is no data dir, it finds one with the unpacked
	// programs and the shipped images, which saves most of the work of a first start.
	FirstStart bool
}

// Node is one machine.
type Node struct {
	// Name is also the name of the network namespace, below /run/netns.
	Name string
	// Dir holds all files of the node.
	Dir string

	opts    Options
	program string
	tested  string // the program under test, which removes what the node leaves
	cluster *Cluster
	single  bool // the cluster exists for this node only
	// prepares means that a test has created the node.
	prepares bool
	number   int // in the cluster, from 1
	inside   namespace
	outside  namespace
	server   *process
	delay    *relay // if its traffic is delayed
	off      *outage

	explained string // the test whose failure was explained last
}

// agentOf returns the server whose agent the node is; nil for a server.
func (n *Node) agentOf() *Node {
	if n.opts.Serves {
		return nil
	}
	return n.opts.Joins
}

// prefix is the prefix of all names that this package creates.
const prefix = "pm-e2e-"

// GOGC is in the environment of the servers of tests. A server keeps its memory small while it starts, for which it takes half as much CPU again, and
// in tests CPU is what is short. Benchmarks measure what users have.
const GOGC = "GOGC=300"

// keepEnv keeps the nodes.
const keepEnv = "POLYMESH_E2E_KEEP"

// New creates a machine alone on its network. Nothing runs on it yet.
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

// ForTest creates a machine that is removed with the test, and explained when the test fails. Its server finds a
// prepared data dir (Options.FirstStart).
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
	n.prepares = true
	n.ExplainFailure(t)
	return n
}

// Close removes the node with all that belongs to it. A running server is not stopped gracefully.
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
		return n.stopDelay() // it would end with this program
	}
	n.cluster.nodes = slices.DeleteFunc(n.cluster.nodes, func(other *Node) bool { return other == n })
	return errors.Join(n.stopDelay(), n.record().remove(ctx))
}

// hostname returns the file that represents the UTS namespace with the machine's name.
func (n *Node) hostname() string { return filepath.Join(n.Dir, "uts") }

// nameHost creates the UTS namespace with the machine's name. The folder's removal unmounts it.
func (n *Node) nameHost() error {
	if n.opts.Hostname == "" {
		return nil
	}
	if err := os.WriteFile(n.hostname(), nil, 0o600); err != nil {
		return err
	}
	return tool("unshare", "--uts="+n.hostname(), "hostname", n.opts.Hostname)
}

// namespaces returns nsenter and its flags for the node's namespaces. (`ip netns exec` would mount another /sys, without the
// cgroups.)
func (n *Node) namespaces() []string {
	args := []string{"nsenter", "--net=" + n.inside.path()}
	if n.opts.Hostname != "" {
		args = append(args, "--uts="+n.hostname())
	}
	return append(args, "--")
}

// DataDir returns the server's --data-dir. New and Add do not create it.
func (n *Node) DataDir() string {
	if n.opts.Disk != nil {
		return filepath.Join(n.diskDir(), "data")
	}
	return filepath.Join(n.Dir, "data")
}

// Layout returns the paths of the data dir, and what else depends on it.
func (n *Node) Layout() layout.DataDir { return layout.DataDir(n.DataDir()) }

// diskDir returns where the node's own disk is mounted.
func (n *Node) diskDir() string { return filepath.Join(n.Dir, "disk") }

// Kubeconfig returns the kubeconfig that the server writes.
func (n *Node) Kubeconfig() string { return filepath.Join(n.Dir, "polymesh.yaml") }

// Log returns the file with the server's output, of all its starts.
func (n *Node) Log() string { return filepath.Join(n.Dir, "server.log") }

// Top returns the repository's top folder.
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

// Replace lets the next start, and each command from now on, use another polymesh file, as an upgrade of the machine does.
func (n *Node) Replace(program string) { n.program = program }

// Program returns the file under test.
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
