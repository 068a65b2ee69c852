package ingest

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/wire"
)

const (
	// maxNodes bounds the nodes that are remembered. A node is forgotten after this time.
	maxNodes  = 1000
	forgotten = 30 * 24 * time.Hour
	// maxGenerations bounds the remembered runs of a node's collector: a push of an earlier run may still arrive.
	maxGenerations = 8
	// silence is how long a node may send nothing, and lateness how old its data may be, before it is a problem.
	silence, lateness = 2 * time.Minute, time.Minute
	// shown is for how long a loss or a rejection is reported.
	shown = time.Hour
	// maxShown is how many nodes a problem names.
	maxShown = 3
)

// node is the state of a node that pushes.
type node struct {
	name        string
	busy        bool
	barred      time.Time // until when its pushes are refused
	budget      budget
	generations []*generation // the most recently used is last
	streams     distinct
	series      distinct
	unknown     map[string]time.Time // UIDs of unknown pods, and since when they are unknown
	// The last time when a rejection was logged, when something was rejected, and when the node reported a loss.
	told, rejected, dropped time.Time
	status                  NodeStatus
}

// generation is the progress of one run of a node's collector.
type generation struct {
	id       string
	position uint64 // the last chunk that is stored
	durable  uint64 // the last one that is on disk and saved
	since    time.Time
	chunks   int  // in this run of the store
	torn     bool // a part of the next chunk may be stored
}

// NodeStatus is the part of the status about a node.
type NodeStatus struct {
	Name string `json:"name"`
	// Pushed is when it last sent something; Behind is the age of the oldest data that it had not sent then, in seconds.
	Pushed time.Time `json:"pushed"`
	Behind float64   `json:"behind"`
	// Lines and Samples were stored. Rejected ones were not; Reason is the latest reason. Repeated lines were already stored. Dropped are the lines and
	// samples that the node has dropped itself. All count from the start of this run of the store, or of the node's collector.
	Lines    int64  `json:"lines"`
	Samples  int64  `json:"samples"`
	Rejected int64  `json:"rejected"`
	Reason   string `json:"reason,omitempty"`
	Repeated int64  `json:"repeated"`
	Dropped  int64  `json:"dropped"`
}

// validName reports whether a text is the name of a node (https://kubernetes.io/docs/concepts/overview/working-with-objects/names/).
func validName(name string) bool {
	return name != "" && len(name) <= 253 && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	})
}

// begin returns a node for a push. A node may only have one push at a time.
func (in *Ingest) begin(name string) (*node, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n := in.nodes[name]
	if n == nil {
		if len(in.nodes) >= maxNodes && !in.forget() {
			return nil, &refusal{http.StatusServiceUnavailable, fmt.Sprintf("%d nodes send to this store already", maxNodes), time.Minute}
		}
		n = newNode(name)
		in.nodes[name] = n
	}
	if wait := time.Until(n.barred); wait > 0 {
		return nil, &refusal{http.StatusTooManyRequests, "this node's last push did not arrive in time", wait}
	}
	if n.busy {
		return nil, &refusal{http.StatusTooManyRequests, "this node sends already", 2 * time.Second}
	}
	n.busy = true
	return n, nil
}

func newNode(name string) *node {
	return &node{name: name, unknown: map[string]time.Time{}, status: NodeStatus{Name: name}}
}

// forget makes room for a node.
func (in *Ingest) forget() bool {
	before := len(in.nodes)
	maps.DeleteFunc(in.nodes, func(_ string, n *node) bool { return !n.busy && time.Since(n.status.Pushed) > forgotten })
	return len(in.nodes) < before
}

// bar refuses a node's pushes for some time: a push that arrives slowly keeps others waiting.
func (in *Ingest) bar(n *node) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n.barred = time.Now().Add(barTime)
}

func (in *Ingest) end(n *node) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n.busy = false
}

// generation returns the run of the node's collector that has sent a push.
func (in *Ingest) generation(n *node, h wire.Header) *generation {
	in.mu.Lock()
	defer in.mu.Unlock()
	now := time.Now()
	i := slices.IndexFunc(n.generations, func(g *generation) bool { return g.id == h.Generation })
	var g *generation
	if i < 0 {
		g = &generation{id: h.Generation, since: now}
	} else {
		g = n.generations[i]
		n.generations = slices.Delete(n.generations, i, i+1)
	}
	n.generations = append(n.generations, g)
	if more := len(n.generations) - maxGenerations; more > 0 {
		n.generations = slices.Delete(n.generations, 0, more)
	}
	if h.Dropped > n.status.Dropped {
		n.dropped = now
	}
	n.status.Pushed, n.status.Behind, n.status.Dropped = now, max(0, float64(h.Behind)/1000), max(0, h.Dropped)
	in.dirty = true
	return g
}

func (in *Ingest) positions(g *generation) (position, durable uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return g.position, g.durable
}

// stored records that a chunk is stored.
func (in *Ingest) stored(n *node, g *generation, number uint64, count func(*NodeStatus)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	g.position, g.torn = number, false
	g.chunks++
	in.dirty = true
	count(&n.status)
}

// torn records that only some lines of a chunk could be stored: the chunk comes again.
func (in *Ingest) torn(g *generation) {
	in.mu.Lock()
	defer in.mu.Unlock()
	g.torn = true
}

// mayBeStored reports whether lines of a chunk may already be stored: in the first chunks of a collector, which repeats what the previous run had
// not saved, and in the first ones of this run of the store, because the last run may have been killed before it saved its state.
func (in *Ingest) mayBeStored(g *generation, now time.Time) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return g.torn || g.chunks < recognisedChunks || now.Sub(g.since) < recognised
}

// Nodes returns the status of all nodes, sorted by name.
func (in *Ingest) Nodes() []NodeStatus {
	in.mu.Lock()
	defer in.mu.Unlock()
	var all []NodeStatus
	for _, name := range slices.Sorted(maps.Keys(in.nodes)) {
		all = append(all, in.nodes[name].status)
	}
	return all
}

// Numbers returns how many nodes have sent something lately, and how much was stored since New.
func (in *Ingest) Numbers() map[string]int64 {
	numbers := map[string]int64{"nodes": 0, "rejected": 0, "stored": 0}
	for _, s := range in.Nodes() {
		if time.Since(s.Pushed) < silence {
			numbers["nodes"]++
		}
		numbers["rejected"] += s.Rejected
		numbers["stored"] += s.Lines + s.Samples
	}
	return numbers
}

// Problem names the nodes that are behind. A node that has been silent for a day counts as removed.
func (in *Ingest) Problem() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	var all []string
	for _, name := range slices.Sorted(maps.Keys(in.nodes)) {
		if problem := in.problemOf(in.nodes[name]); problem != "" {
			all = append(all, problem)
		}
	}
	if in.failed != "" {
		all = append(all, in.failed)
	}
	if more := len(all) - maxShown; more > 0 {
		all = append(all[:maxShown], fmt.Sprintf("%d more", more))
	}
	return strings.Join(all, "; ")
}

func (in *Ingest) problemOf(n *node) string {
	s := n.status
	switch quiet := time.Since(s.Pushed); {
	case quiet > 24*time.Hour:
	case quiet > silence && time.Since(in.began) > silence:
		return fmt.Sprintf("node %s has sent nothing for %s", s.Name, quiet.Round(time.Second))
	case s.Behind > lateness.Seconds():
		return fmt.Sprintf("node %s is %s behind", s.Name, time.Duration(s.Behind*float64(time.Second)).Round(time.Second))
	case time.Since(n.dropped) < shown:
		return fmt.Sprintf("node %s has dropped %d lines and samples", s.Name, s.Dropped)
	case time.Since(n.rejected) < shown:
		return fmt.Sprintf("%d lines and samples of node %s were rejected: %s", s.Rejected, s.Name, s.Reason)
	}
	return ""
}

// state is what is saved, by node.
type state struct {
	Nodes map[string]savedNode `json:"nodes"`
}

type savedNode struct {
	Pushed      time.Time         `json:"pushed"`
	Generations []savedGeneration `json:"generations"`
}

type savedGeneration struct {
	ID       string `json:"id"`
	Position uint64 `json:"position"`
}

// load returns the nodes of an earlier run.
func (in *Ingest) load() (map[string]*node, error) {
	nodes := map[string]*node{}
	st, _, err := in.checkpoint.Load()
	if err != nil {
		return nodes, err
	}
	for name, saved := range st.Nodes {
		if time.Since(saved.Pushed) > forgotten {
			continue
		}
		n := newNode(name)
		n.status.Pushed = saved.Pushed
		for _, g := range saved.Generations {
			n.generations = append(n.generations, &generation{id: g.ID, position: g.Position, durable: g.Position, since: in.began})
		}
		nodes[name] = n
	}
	return nodes, nil
}

// save saves how far each node's lines are stored.
func (in *Ingest) save() {
	written, err := in.checkpoint.Save(in.changed)
	in.mu.Lock()
	defer in.mu.Unlock()
	if err != nil {
		in.failed = fmt.Sprintf("how far other nodes' logs are stored cannot be noted: %v", err)
		return
	}
	if written == nil {
		return
	}
	in.failed = ""
	for name, s := range written.Nodes {
		n := in.nodes[name]
		if n == nil {
			continue
		}
		for _, saved := range s.Generations {
			if i := slices.IndexFunc(n.generations, func(g *generation) bool { return g.id == saved.ID }); i >= 0 {
				n.generations[i].durable = saved.Position
			}
		}
	}
}

// changed returns the state, nil if it has not changed.
func (in *Ingest) changed() *state {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.dirty {
		return nil
	}
	st := &state{Nodes: map[string]savedNode{}}
	for name, n := range in.nodes {
		s := savedNode{Pushed: n.status.Pushed}
		for _, g := range n.generations {
			s.Generations = append(s.Generations, savedGeneration{g.id, g.position})
		}
		st.Nodes[name] = s
	}
	in.dirty = false
	return st
}

// budget is how much of a node's records is stored. A node has one push at a time (begin), whose chunks are stored one after the other, so nothing
// else takes from it between wait and take.
type budget struct {
	left float64
	last time.Time
}

// wait returns how long the node has to wait for the next chunk. A chunk may cost more than is left, because its cost is only known afterwards: the
// budget is then overdrawn by at most the cost of one chunk, which package wire and recall bound.
func (b *budget) wait(now time.Time) time.Duration {
	const full = 10 * bytesPerSecond
	if b.last.IsZero() {
		b.left = full
	}
	b.left = min(full, b.left+now.Sub(b.last).Seconds()*bytesPerSecond)
	b.last = now
	if b.left > 0 {
		return 0
	}
	return time.Duration((1 - b.left) / bytesPerSecond * float64(time.Second))
}

func (b *budget) take(cost int) { b.left -= float64(cost) }

// distinct bounds the number of different hashes in a period.
type distinct struct {
	period int64
	seen   map[uint64]struct{}
}

// admit reports whether a hash is one of the first ones of the period.
func (d *distinct) admit(key uint64, period int64, most int) bool {
	if d.seen == nil || period > d.period {
		d.period, d.seen = period, map[uint64]struct{}{}
	}
	if _, ok := d.seen[key]; ok {
		return true
	}
	if len(d.seen) >= most {
		return false
	}
	d.seen[key] = struct{}{}
	return true
}
