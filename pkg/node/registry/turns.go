package registry

import (
	"context"
	"sync"
)

// turns limits how many requests of other nodes are answered at a time, all together and of one node, so that no node takes all turns.
type turns struct {
	all  chan struct{} // has a value for each request that is answered
	most int           // of one node

	mu    sync.Mutex
	nodes map[string]*line
}

// line is one node's turns.
type line struct {
	turns    chan struct{}
	requests int // that wait or are answered; guarded by turns.mu
}

func newTurns(all, most int) *turns {
	return &turns{all: make(chan struct{}, all), most: most, nodes: map[string]*line{}}
}

// take waits for a node's turn, at most waitForTurn. end is called after the answer, if ok.
func (t *turns) take(ctx context.Context, node string) (end func(), ok bool) {
	ctx, cancel := context.WithTimeout(ctx, waitForTurn)
	defer cancel()
	t.mu.Lock()
	own := t.nodes[node]
	if own == nil {
		own = &line{turns: make(chan struct{}, t.most)}
		t.nodes[node] = own
	}
	own.requests++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.requests--; own.requests == 0 {
			delete(t.nodes, node)
		}
	}
	select {
	case own.turns <- struct{}{}:
	case <-ctx.Done():
		leave()
		return nil, false
	}
	select {
	case t.all <- struct{}{}:
	case <-ctx.Done():
		<-own.turns
		leave()
		return nil, false
	}
	return func() {
		<-t.all
		<-own.turns
		leave()
	}, true
}
