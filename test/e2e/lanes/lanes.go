// Package lanes runs the end-to-end tests in lanes beside each other: either waits more than it works. It owns the order in
// which the tests run and what is known of their durations; it knows nothing of what they test.
//
// The list of tests comes from the test program, and what each one needs from the test itself: its first statement says
// whether it shares the node with the guide's app or makes nodes of its own. Each lane is one process of the test program,
// which asks for its next test when it has finished one (Next), so that no lane is idle while tests are left. The longest ones
// come first. At the end, the tests that have run are compared with the list.
//
// command test/e2e/run is its caller on the one side, TestMain of package e2e on the other.
package lanes

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// Test is one test of the program, with what it needs.
type Test struct {
	Name string `json:"name"`
	// Nodes is how many nodes of its own the test makes. A test that has none uses the node with the guide's app, which is
	// its lane's.
	Nodes int `json:"nodes,omitempty"`
	// Shared says that the test uses that node.
	Shared bool `json:"shared,omitempty"`
}

// Costs of which nothing is known yet.
const (
	defaultDuration = time.Minute
	// bringUp is what a further shared node costs: two cores need this long for the app and its images.
	bringUp = 100 * time.Second
)

// SharedNode is the state of a lane's node with the guide's app.
type SharedNode string

// The states of a lane's shared node.
const (
	NoNode     SharedNode = ""       // it has not been needed yet
	NodeUp     SharedNode = "up"     // tests can use it
	NodeBroken SharedNode = "broken" // it did not come up
)

// queue hands the tests out.
type queue struct {
	mu      sync.Mutex
	changed *sync.Cond
	lanes   int
	// left are the tests that no lane has taken yet, the longest first.
	left  []Test
	known map[string]time.Duration
	// running is what each lane has taken last, up the lanes with a shared node.
	running map[int]Test
	up      map[int]bool
	// sharers is how many lanes begin with the tests that share a node.
	sharers int
	closed  bool
}

func newQueue(tests []Test, known map[string]time.Duration, lanes int) *queue {
	q := &queue{lanes: lanes, left: slices.Clone(tests), known: known, running: map[int]Test{}, up: map[int]bool{}}
	q.changed = sync.NewCond(&q.mu)
	var shared, all time.Duration
	for _, t := range tests {
		all += q.duration(t)
		if t.Shared {
			shared += q.duration(t)
		}
	}
	if all > 0 {
		q.sharers = max(1, min(lanes-1, int(math.Round(float64(lanes)*float64(shared)/float64(all)))))
	}
	// Of two that are as long, the order of the sources stays.
	slices.SortStableFunc(q.left, func(a, b Test) int { return cmp.Compare(q.duration(b), q.duration(a)) })
	return q
}

func (q *queue) duration(t Test) time.Duration {
	if d, ok := q.known[t.Name]; ok {
		return d
	}
	return defaultDuration
}

// weight is how many lanes' share of the machine a test takes.
func (q *queue) weight(t Test) int { return min(max(t.Nodes, 1), q.lanes) }

// next returns the lane's next test, and marks the one before as finished. It waits where a test is left for which there is no
// room yet, and returns false when nothing is left for this lane.
func (q *queue) next(lane int, state SharedNode) (Test, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.running, lane)
	q.up[lane] = state == NodeUp
	q.changed.Broadcast()
	for !q.closed {
		i, wait := q.choose(lane, state)
		if i >= 0 {
			t := q.left[i]
			q.left = slices.Delete(q.left, i, i+1)
			q.running[lane] = t
			q.up[lane] = t.Shared || q.up[lane]
			return t, true
		}
		if !wait {
			return Test{}, false
		}
		q.changed.Wait()
	}
	return Test{}, false
}

// choose finds the place of a test for the lane, -1 if there is none now; wait says that there may be one later. Some lanes
// begin with the tests that share a node, the others with those that do not, and a further shared node is made only when enough
// is left for it.
func (q *queue) choose(lane int, state SharedNode) (place int, wait bool) {
	used := 0
	for _, t := range q.running {
		used += q.weight(t)
	}
	own, shared := -1, -1
	var sharedLeft time.Duration
	for i, t := range q.left {
		if t.Shared {
			sharedLeft += q.duration(t)
		}
		switch {
		case used+q.weight(t) > q.lanes:
			wait = wait || !t.Shared
		case t.Shared && shared < 0:
			shared = i
		case !t.Shared && own < 0:
			own = i
		}
	}
	nodes := 0
	for other, up := range q.up {
		if up && other != lane {
			nodes++
		}
	}
	if state == NodeBroken || state == NoNode && sharedLeft <= time.Duration(nodes)*bringUp {
		shared = -1
	}
	if shared < 0 || own >= 0 && lane >= q.sharers {
		return own, wait
	}
	return shared, wait
}

// rest returns the tests that no lane has taken.
func (q *queue) rest() []Test {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.left)
}

// close ends the wait of all lanes.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.changed.Broadcast()
}

// String is a line of the list of tests.
func (t Test) String() string {
	switch {
	case t.Shared:
		return t.Name + "  shares a node"
	case t.Nodes == 0:
		return t.Name + "  no node"
	case t.Nodes == 1:
		return t.Name + "  a node of its own"
	default:
		return fmt.Sprintf("%s  %d nodes of its own", t.Name, t.Nodes)
	}
}
