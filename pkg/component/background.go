package component

import (
	"context"
	"fmt"
)

// Background is the work of a component that Start leaves running, and that Stop ends and waits for. Embed it. The zero value
// has not begun; it begins once.
type Background struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// Go calls work in the background, with a context that Stop ends. start is the context of Start.
func (b *Background) Go(start context.Context, work func(context.Context)) {
	ctx, cancel := Running(start)
	b.cancel, b.done = cancel, make(chan struct{})
	go func() {
		defer close(b.done)
		work(ctx)
	}()
}

// Stop ends the work and waits for it, until ctx ends.
func (b *Background) Stop(ctx context.Context) error {
	if b.cancel == nil {
		return nil
	}
	b.cancel()
	select {
	case <-b.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("still running: %w", ctx.Err())
	}
}
