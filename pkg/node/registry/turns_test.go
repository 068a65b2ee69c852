package registry

import (
	"context"
	"testing"
	"testing/synctest"
)

// A node that takes as many turns as it can leaves some for others, and its own requests wait for its own ones.
func TestTurnsOfNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTurns(4, 2)
		take := func(node string) (end func(), ok bool) { return q.take(t.Context(), node) }
		var ends []func()
		for range 2 {
			end, ok := take("greedy")
			if !ok {
				t.Fatal("no turn although there are some")
			}
			ends = append(ends, end)
		}
		if _, ok := take("greedy"); ok {
			t.Error("a node has more turns than it may")
		}
		for range 2 {
			end, ok := take("other")
			if !ok {
				t.Fatal("another node gets no turn")
			}
			ends = append(ends, end)
		}
		if _, ok := take("third"); ok {
			t.Error("there are more turns than there may be")
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, ok := q.take(gone, "third"); ok {
			t.Error("a request that has ended gets a turn")
		}
		// One that waits gets the next one.
		got := make(chan func())
		go func() {
			end, _ := take("third")
			got <- end
		}()
		synctest.Wait()
		ends[0]()
		end := <-got
		if end == nil {
			t.Fatal("the one that waits gets no turn")
		}
		for _, end := range append(ends[1:], end) {
			end()
		}
		if len(q.all) > 0 || len(q.nodes) > 0 {
			t.Errorf("%d turns and %d nodes are left", len(q.all), len(q.nodes))
		}
	})
}
