package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Cluster is a set of machines on one network, together with the outside world. A node that New creates is a cluster of one. The
// flags of their servers determine the roles of the nodes.
type Cluster struct {
	// Name is the prefix of its nodes' names. Its network namespaces have the suffixes -switch and -out.
	Name string
	// Dir contains only the cluster's record; each node has its own folder.
	Dir string

	wires   namespace // with the bridge, and no address
	outside namespace

	mu    sync.Mutex
	nodes []*Node
	last  int // number of the node that was added last; no number is used twice
	// cuts are the pairs of partitioned nodes, the smaller number first.
	cuts map[[2]int]bool
}

// NewCluster creates a network without nodes.
func NewCluster() (*Cluster, error) {
	c := &Cluster{cuts: map[[2]int]bool{}}
	for c.Name == "" {
		id := make([]byte, 3)
		if _, err := rand.Read(id); err != nil {
			return nil, err
		}
		name := prefix + hex.EncodeToString(id)
		c.wires, c.outside, c.Dir = namespace(name+"-switch"), namespace(name+"-out"), filepath.Join(os.TempDir(), name)
		// Namespaces belong to the machine, also those of a program with another folder for temporary files.
		if c.wires.exists() || c.outside.exists() {
			continue
		}
		switch err := os.Mkdir(c.Dir, 0o711); {
		case errors.Is(err, fs.ErrExist):
			continue
		case err != nil:
			return nil, err
		}
		c.Name = name
	}
	// From now on, a later run finds and removes what this one leaves.
	if err := c.record().write(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(c.Dir))
	}
	// After this, the name is reserved for this cluster: others that draw the same one fail here, and change nothing.
	if err := ip("netns add " + string(c.wires)); err != nil {
		return nil, errors.Join(err, os.RemoveAll(c.Dir))
	}
	if err := c.connect(); err != nil {
		return nil, errors.Join(err, c.record().remove(context.Background()))
	}
	return c, nil
}

// ClusterForTest creates a network that is removed with the test, with its nodes.
func ClusterForTest(t testing.TB) *Cluster {
	t.Helper()
	c, err := NewCluster()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := c.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

// Add adds a machine with the next free address. If Options do not name it, its host name is node-1, node-2 and so on. Nothing runs
// on it yet.
func (c *Cluster) Add(o Options) (*Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o.Hostname == "" {
		o.Hostname = fmt.Sprintf("node-%d", c.last+1)
	}
	return c.add(o)
}

// AddForTest is Add, which must succeed. The node is explained when the test fails, and its server finds a
// prepared data dir (Options.FirstStart).
func (c *Cluster) AddForTest(t testing.TB, o Options) *Node {
	t.Helper()
	n, err := c.Add(o)
	if err != nil {
		t.Fatal(err)
	}
	n.prepares = true
	n.ExplainFailure(t)
	return n
}

// kubeletArgs are for a disk that is the machine's, and may be nearly full: images that a test has imported must not be collected, nor pods
// evicted, for that reason. The thresholds are no percentages, because one percent of a large disk is more than all tests need.
func kubeletArgs() []string {
	return []string{"image-gc-high-threshold=100", "eviction-hard=memory.available<100Mi,nodefs.available<100Mi,imagefs.available<100Mi"}
}

func (c *Cluster) add(o Options) (*Node, error) {
	program, err := Program()
	if err != nil {
		return nil, err
	}
	number := c.last + 1
	if number > maxNodes {
		return nil, fmt.Errorf("a cluster has %d addresses, and all are in use", maxNodes)
	}
	for _, arg := range kubeletArgs() {
		o.Args = append([]string{"--kubelet-arg=" + arg}, o.Args...)
	}
	name := fmt.Sprintf("%s-%d", c.Name, number)
	n := &Node{
		// The folder's name is short: the path of a socket has 107 characters.
		Name: name, Dir: filepath.Join(os.TempDir(), name), opts: o, program: cmp.Or(o.Program, program), tested: program,
		cluster: c, number: number, inside: namespace(name), outside: c.outside,
	}
	if err := os.Mkdir(n.Dir, 0o711); err != nil {
		return nil, err
	}
	c.last = max(c.last, number)
	if err := n.record().write(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(n.Dir))
	}
	err = n.plug()
	if err == nil {
		err = n.nameHost()
	}
	if err == nil && o.Disk != nil {
		err = o.Disk.mount(n.diskDir())
	}
	if err != nil {
		return nil, errors.Join(err, n.record().remove(context.Background()))
	}
	c.nodes = append(c.nodes, n)
	return n, nil
}

// Close removes the cluster with its nodes. Running servers are not stopped gracefully.
func (c *Cluster) Close(ctx context.Context) error {
	c.mu.Lock()
	nodes := slices.Clone(c.nodes)
	c.mu.Unlock()
	var failures []error
	for _, n := range nodes {
		failures = append(failures, n.remove(ctx))
	}
	if os.Getenv(keepEnv) == "" {
		failures = append(failures, c.record().remove(ctx))
	}
	return errors.Join(failures...)
}

// Partition drops all traffic between a node and each of the others, without a reset or an ICMP message. The outside world and the
// cluster's other nodes still reach all of them.
func (c *Cluster) Partition(a *Node, others ...*Node) error { return c.cut(true, a, others) }

// Heal undoes Partition for these nodes.
func (c *Cluster) Heal(a *Node, others ...*Node) error { return c.cut(false, a, others) }

func (c *Cluster) cut(on bool, a *Node, others []*Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range others {
		if a == b || a.cluster != c || b.cluster != c {
			return fmt.Errorf("%s and %s are not two nodes of the cluster %s", a.Name, b.Name, c.Name)
		}
		pair := [2]int{min(a.number, b.number), max(a.number, b.number)}
		if on {
			c.cuts[pair] = true
		} else {
			delete(c.cuts, pair)
		}
	}
	// The table is replaced as a whole. A drop in the bridge is silent: only an IP stack would respond.
	var rules strings.Builder
	rules.WriteString("table bridge partition\ndelete table bridge partition\ntable bridge partition {\n chain forward {\n  type filter hook forward priority 0; policy accept\n")
	for pair := range c.cuts {
		one, other := port(pair[0]), port(pair[1])
		fmt.Fprintf(&rules, "  iifname { %s, %s } oifname { %s, %s } drop\n", one, one+delayed, other, other+delayed)
		fmt.Fprintf(&rules, "  iifname { %s, %s } oifname { %s, %s } drop\n", other, other+delayed, one, one+delayed)
	}
	rules.WriteString(" }\n}\n")
	cmd := c.wires.command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("change the partitions of %s with nft (package nftables): %w: %s", c.Name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
