package logstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

const (
	// maxTails is how many tails there may be at a time.
	maxTails = 32
	// tailBytes is how much one tail may buffer for a slow reader.
	tailBytes = 2 << 20
)

// Tail returns every new line that the selector's matchers and filters select; times, limit and order are
// ignored. The channel is closed when the context ends or the store closes. A slow reader misses lines; dropped returns how many so far.
func (s *Store) Tail(ctx context.Context, sel Selector) (entries <-chan Entry, dropped func() int, err error) {
	c, err := compile(sel)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	out := make(chan Entry)
	t := &tail{match: c.match, cancel: cancel, more: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tails == nil {
		cancel()
		return nil, nil, errors.New("tailing logs: the store is closed")
	}
	if len(s.tails) >= maxTails {
		cancel()
		return nil, nil, fmt.Errorf("%d live tails run already, close one", maxTails)
	}
	s.tails[t] = struct{}{}
	go func() {
		defer close(out)
		t.send(ctx, out)
		s.mu.Lock()
		delete(s.tails, t)
		s.mu.Unlock()
		cancel()
	}()
	return out, t.droppedCount, nil
}

// toTails passes entries to the tails that select them.
func (s *Store) toTails(entries []Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.tails {
		for i := range entries {
			if t.match(&entries[i]) {
				t.add(entries[i])
			}
		}
	}
}

// tail is one reader of lines as they come.
type tail struct {
	match  func(*Entry) bool
	cancel context.CancelFunc
	more   chan struct{}

	mu      sync.Mutex
	waiting []Entry
	bytes   int
	dropped int
}

func (t *tail) add(e Entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bytes+e.size() > tailBytes {
		t.dropped++
		return
	}
	t.waiting = append(t.waiting, e)
	t.bytes += e.size()
	select {
	case t.more <- struct{}{}:
	default:
	}
}

func (t *tail) droppedCount() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dropped
}

// send passes entries on until the context ends.
func (t *tail) send(ctx context.Context, out chan<- Entry) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.more:
		}
		t.mu.Lock()
		batch := t.waiting
		t.waiting = nil
		t.mu.Unlock()
		for _, e := range batch {
			select {
			case <-ctx.Done():
				return
			case out <- e:
			}
			t.mu.Lock()
			t.bytes -= e.size()
			t.mu.Unlock()
		}
	}
}
