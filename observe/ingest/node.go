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
	// maxNodes bounds the nodes that are remembered, forgotten is when one is not any more.
	maxNodes  = 1000
	forgotten = 30 * 24 * time.Hour
	// maxGenerations bounds the runs of its collector that are remembered of a node: a push of an earlier one may still be on its way.
	maxGenerations = 8
	// silence is how long a node may send nothing, and lateness how old may be what it sends, before that is a problem.
	silence, lateness = 2 * time.Minute, time.Minute
	// shown is for how long a loss or a rejection is one.
	shown = time.Hour
	// maxShown is how many nodes a problem names.
	maxShown = 3
)

// node is what is known of a node that pushes.
type node struct {
	name        string
	busy        bool
	budget      budget
	generations []*generation // the one that was used last is last
	streams     distinct
	series      distinct
	unknown     map[string]time.Time // UIDs of pods that are not known, and since when they are asked for
	// told is when a rejection was logged, rejected when something was, and dropped when the node has reported a loss.
	told, rejected, dropped time.Time
	status                  NodeStatus
}

// generation is how far one run of a node's collector is.
type generation struct {
	id       string
	position uint64 // the last chunk that is stored
	durable  uint64 // the last one that is on disk, and remembered
	since    time.Time
	chunks   int  // in this run of the store
	torn     bool // a part of the next chunk may be stored
}

// NodeStatus is what the status shows of a node.
type NodeStatus struct {
	Name string `json:"name"`
	// Pushed is when it has last sent something; Behind is how old the oldest was that it had not sent then, in seconds.
	Pushed time.Time `json:"pushed"`
	Behind float64   `json:"behind"`
	// Lines and Samples were stored, Rejected ones were not, for Reason and others, and Repeated lines were stored already. Dropped are the lines and
	// samples that the node has dropped itself. All are since this run of the store, or the node's collector, has begun.
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

// begin returns a node, which pushes once at a time.
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

func (in *Ingest) end(n *node) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n.busy = false
}

// generation returns the run of the node's collector that a push is of.
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

// stored notes that a chunk is stored.
func (in *Ingest) stored(n *node, g *generation, number uint64, count func(*NodeStatus)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	g.position, g.torn = number, false
	g.chunks++
	in.dirty = true
	count(&n.status)
}

// torn notes that some lines of a chunk are stored and others could not be: it comes again.
func (in *Ingest) torn(g *generation) {
	in.mu.Lock()
	defer in.mu.Unlock()
	g.torn = true
}

// mayBeStored reports whether lines of a chunk may be stored already: the first ones of a collector, which has read again what the one before had
// not noted, and the first ones that this store gets, which may have been killed between them and their note.
func (in *Ingest) mayBeStored(g *generation, now time.Time) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return g.torn || g.chunks < recognisedChunks || now.Sub(g.since) < recognised
}

// Nodes returns what is known of all nodes, by name.
func (in *Ingest) Nodes() []NodeStatus {
	in.mu.Lock()
	defer in.mu.Unlock()
	var all []NodeStatus
	for _, name := range slices.Sorted(maps.Keys(in.nodes)) {
		all = append(all, in.nodes[name].status)
	}
	return all
}

// Numbers says how many nodes have sent something lately, and what was stored of all since New.
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

// Problem names the nodes that are behind. A node that has been silent for a day is away.
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

// state is what is remembered on disk, by node.
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

// save remembers how far each node is.
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

// budget is how much of a node's records is stored.
type budget struct {
	left float64
	last time.Time
}

// wait is how long the node has to wait for the next chunk, 0 for not at all. A chunk may cost more than is left: what it costs is known afterwards.
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

// distinct bounds how many different hashes there are in a period.
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
