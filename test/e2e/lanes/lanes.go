// Package lanes runs the end-to-end tests in parallel lanes, because each test waits more than it works. It owns the order in which
// the tests run and their recorded durations; it does not know what they test.
//
// The list of tests comes from the test program, and what each one needs from the test itself: its first statement declares whether
// it shares the node with the guide's app or creates its own nodes. Each lane is one process of the test program, which requests its
// next test when it has finished one (Next), so that no lane is idle while tests are left for it. The longest ones come first. At
// the end, the tests that have run are compared with the list.
//
// The command test/e2e/run calls Run, and TestMain of package e2e calls Next.
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
	// Nodes is how many of its own nodes the test runs at a time.
	Nodes int `json:"nodes,omitempty"`
	// Shared means that the test uses its lane's node with the guide's app.
	Shared bool `json:"shared,omitempty"`
}

// Durations that are not recorded.
const (
	defaultDuration = time.Minute
	// bringUp is how long two cores need for another shared node, with the app and its images.
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

// queue hands out the tests.
type queue struct {
	mu      sync.Mutex
	changed *sync.Cond
	lanes   int
	// left are the tests that no lane has taken yet, the longest first.
	left  []Test
	known map[string]time.Duration
	// running is the test that each lane runs; up are the lanes with a shared node.
	running map[int]Test
	up      map[int]bool
	// gone are the lanes that have ended.
	gone map[int]bool
	// sharers is how many lanes start with the tests that share a node.
	sharers int
	closed  bool
}

func newQueue(tests []Test, known map[string]time.Duration, lanes int) *queue {
	q := &queue{lanes: lanes, left: slices.Clone(tests), known: known, running: map[int]Test{}, up: map[int]bool{}, gone: map[int]bool{}}
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
	// Tests of the same duration stay in the order of the sources.
	slices.SortStableFunc(q.left, func(a, b Test) int { return cmp.Compare(q.duration(b), q.duration(a)) })
	return q
}

func (q *queue) duration(t Test) time.Duration {
	if d, ok := q.known[t.Name]; ok {
		return d
	}
	return defaultDuration
}

// fits reports whether the machine has room for a test beside those that run. A cluster of three nodes or more waits for elections and
// replication most of the time, so a test with one node runs beside it, but no test with another cluster. The lock is held.
func (q *queue) fits(t Test) bool {
	for _, other := range q.running {
		if min(t.Nodes, other.Nodes) > 1 && max(t.Nodes, other.Nodes) > 2 {
			return false
		}
	}
	return true
}

// next returns the lane's next test, and marks the one before as finished. It waits while tests are left that may become the
// lane's, and returns false when none is.
func (q *queue) next(lane int, state SharedNode) (Test, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.finished(lane, state)
	for !q.closed && !q.gone[lane] {
		t, ok, wait := q.take(lane, state)
		if ok || !wait {
			return t, ok
		}
		q.changed.Wait()
	}
	return Test{}, false
}

// finished records that a lane's test has ended, and what has become of its shared node. The lock is held.
func (q *queue) finished(lane int, state SharedNode) {
	delete(q.running, lane)
	q.up[lane] = state == NodeUp
	q.changed.Broadcast()
}

// take hands a test to a lane if there is one for it now; wait reports that there may be one later. The lock is held.
func (q *queue) take(lane int, state SharedNode) (t Test, ok, wait bool) {
	i, wait := q.choose(lane, state)
	if i < 0 {
		return Test{}, false, wait
	}
	t = q.left[i]
	q.left = slices.Delete(q.left, i, i+1)
	q.running[lane] = t
	q.up[lane] = t.Shared || q.up[lane]
	return t, true, false
}

// choose returns the index of the lane's next test in left, -1 if there is none now; wait reports that there may be one later,
// because there is no room for it, or because another lane with a shared node may not get to it. Some lanes begin with the tests that
// share a node, the others with those that do not. Another shared node is brought up only when enough is left for it.
func (q *queue) choose(lane int, state SharedNode) (index int, wait bool) {
	nodes := 0
	for other, up := range q.up {
		if up && other != lane {
			nodes++
		}
	}
	var sharedLeft time.Duration
	for _, t := range q.left {
		if t.Shared {
			sharedLeft += q.duration(t)
		}
	}
	leaveShared := state == NoNode && nodes > 0 && sharedLeft <= time.Duration(nodes)*bringUp
	own, shared := -1, -1
	for i, t := range q.left {
		switch {
		case t.Shared && state == NodeBroken:
		case t.Shared && leaveShared, !q.fits(t):
			wait = true
		case t.Shared && shared < 0:
			shared = i
		case !t.Shared && own < 0:
			own = i
		}
	}
	if shared < 0 || own >= 0 && lane >= q.sharers {
		return own, wait
	}
	return shared, wait
}

// leave records that a lane has ended and takes no more tests, whatever it was doing: no other lane waits for it.
func (q *queue) leave(lane int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gone[lane] = true
	q.finished(lane, NoNode)
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

// String returns a line of the list of tests.
func (t Test) String() string {
	switch {
	case t.Shared:
		return t.Name + "  shares a node"
	case t.Nodes == 0:
		return t.Name + "  no node"
	case t.Nodes == 1:
		return t.Name + "  its own node"
	default:
		return fmt.Sprintf("%s  %d own nodes", t.Name, t.Nodes)
	}
}
