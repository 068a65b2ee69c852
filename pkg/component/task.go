package component

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
)

// Task is the running part of a component that is a blocking function in this process, such as Kubernetes' exported Run
// functions. Embed it for Stop and Failed, and call Go from Start.
type Task struct {
	background Background
	failed     chan error
}

// NewTask returns a task that has not started.
func NewTask() Task {
	return Task{failed: make(chan error, 1)}
}

// Go calls run in the background, with a context that Stop ends. If run returns before that, the task has failed, as it has
// if run panics; the other components are then stopped in order.
func (t *Task) Go(start context.Context, run func(context.Context) error) {
	t.background.Go(start, func(ctx context.Context) {
		defer func() {
			if p := recover(); p != nil {
				t.failed <- &Panic{Value: p, Stack: debug.Stack()}
			}
		}()
		err := run(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		t.failed <- err
	})
}

// Panic is the error of a task that panicked.
type Panic struct {
	Value any
	Stack []byte
}

// Error contains advice for the user. The stack is for the log.
func (p *Panic) Error() string {
	return fmt.Sprintf("panicked: %s: start the server again; if that ends the same way, the log has the stack for a bug report", strings.Join(strings.Fields(fmt.Sprint(p.Value)), " "))
}

// Failed yields the error if run ends by itself.
func (t *Task) Failed() <-chan error { return t.failed }

// Stop ends run and waits for it, until ctx ends.
func (t *Task) Stop(ctx context.Context) error { return t.background.Stop(ctx) }
