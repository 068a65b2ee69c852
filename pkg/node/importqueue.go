package node

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// importQueue is the order in which images are imported: those that something waits for come first.
type importQueue struct {
	mu      sync.Mutex
	pending map[string]chan struct{} // closed when the image is there; of those that are not
	queued  []string                 // of pending, those whose import has not begun
	failed  error
}

// newImportQueue returns a queue in which all images are missing until keep says which are.
func newImportQueue(refs []string) *importQueue {
	q := &importQueue{pending: map[string]chan struct{}{}, queued: slices.Clone(refs)}
	for _, ref := range refs {
		q.pending[ref] = make(chan struct{})
	}
	return q
}

// keep removes all images from the queue but those that are missing.
func (q *importQueue) keep(missing []string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for ref := range q.pending {
		if !slices.Contains(missing, ref) {
			q.done(ref)
		}
	}
}

// next takes an image from the queue; it is empty if there is none.
func (q *importQueue) next() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queued) == 0 {
		return ""
	}
	ref := q.queued[0]
	q.queued = q.queued[1:]
	return ref
}

// imported reports that an image is there.
func (q *importQueue) imported(ref string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.done(ref)
}

func (q *importQueue) done(ref string) {
	q.queued = slices.DeleteFunc(q.queued, func(r string) bool { return r == ref })
	if done, ok := q.pending[ref]; ok {
		delete(q.pending, ref)
		close(done)
	}
}

// fail ends all waiting: the images that are missing will not come.
func (q *importQueue) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.failed = err
	for ref := range q.pending {
		q.done(ref)
	}
}

// left is the number of images that are missing.
func (q *importQueue) left() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.pending)
}

// await waits for an image, and moves it to the front of the queue. With a name by digest, which is in no list of names, it waits for all.
func (q *importQueue) await(ctx context.Context, ref string) error {
	for _, done := range q.ask(ref) {
		select {
		case <-done:
		case <-ctx.Done():
			return fmt.Errorf("wait for the import of %s: %w", ref, ctx.Err())
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failed != nil {
		return fmt.Errorf("wait for the import of %s: %w", ref, q.failed)
	}
	return nil
}

func (q *importQueue) ask(ref string) (wait []chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if done, ok := q.pending[ref]; ok {
		if at := slices.Index(q.queued, ref); at >= 0 {
			q.queued = slices.Insert(slices.Delete(q.queued, at, at+1), 0, ref)
		}
		return []chan struct{}{done}
	}
	if strings.Contains(ref, "@") {
		for _, done := range q.pending {
			wait = append(wait, done)
		}
	}
	return wait
}
