package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"
)

// Component is one part of the store: the metrics, a tailer, a receiver.
type Component struct {
	// Name is the name in the log and in the status.
	Name string
	// After are the components that must run before this one is started.
	After []string
	// Start starts it. It is called again, after a pause, when it has failed; ctx is only for the start. A component that others use has
	// no Run: the others keep using what the first start has created.
	Start func(ctx context.Context) (Running, error)
}

// Running is a started component. Each field may be nil.
type Running struct {
	// Run is its work. It ends with its context. Any other end is a failure, after which the component is started again.
	Run func(ctx context.Context) error
	// Stop writes to disk what is only in memory, and closes it.
	Stop func(ctx context.Context) error
	// Problem returns why it does not do all of its work, empty if it does. It must be cheap.
	Problem func() string
	// Numbers are shown in the status. It must be cheap.
	Numbers func() map[string]int64
}

// State is the state of a component.
type State string

// The states of components.
const (
	Waiting  State = "Waiting"
	Starting State = "Starting"
	Ready    State = "Ready"
	Failed   State = "Failed"
	Stopped  State = "Stopped"
)

// ComponentStatus is what is known about one component.
type ComponentStatus struct {
	Name  string    `json:"name"`
	State State     `json:"state"`
	Since time.Time `json:"since"`
	// Message is why it does not work, or not completely.
	Message string `json:"message,omitempty"`
	// Restarts is how often it was started after the first time.
	Restarts int              `json:"restarts,omitempty"`
	Numbers  map[string]int64 `json:"numbers,omitempty"`
}

const (
	pauseMin = time.Second
	pauseMax = time.Minute
	// pauseReset is how long a component must have worked for the pause to be reset.
	pauseReset = 2 * time.Minute
	// stopLimit is the time for one component to stop.
	stopLimit = 20 * time.Second
)

// lifecycle starts components in order, starts those again that fail, and stops them in the reverse order.
type lifecycle struct {
	log     *slog.Logger
	entries []*entry
}

type entry struct {
	Component
	after   []*entry
	started chan struct{} // closed when it works for the first time
	first   chan error    // how the first start has ended

	mu      sync.Mutex
	status  ComponentStatus
	running *Running      // nil while it does not work
	done    chan struct{} // closed when its goroutine has ended
}

// newLifecycle returns an error if a component waits for one that does not precede it.
func newLifecycle(log *slog.Logger, components []Component) (*lifecycle, error) {
	l := &lifecycle{log: log}
	for _, c := range components {
		e := &entry{Component: c, started: make(chan struct{}), first: make(chan error, 1), done: make(chan struct{})}
		e.status = ComponentStatus{Name: c.Name, State: Waiting, Since: time.Now()}
		for _, name := range c.After {
			i := slices.IndexFunc(l.entries, func(e *entry) bool { return e.Name == name })
			if i < 0 {
				return nil, fmt.Errorf("%s waits for %s, which is not before it", c.Name, name)
			}
			e.after = append(e.after, l.entries[i])
		}
		l.entries = append(l.entries, e)
	}
	return l, nil
}

// run runs the components until ctx ends and then idle is closed, and returns when all are stopped.
func (l *lifecycle) run(ctx context.Context, idle <-chan struct{}) {
	// Each component has its own context, ended in reverse order: receivers end before stores.
	cancels := make([]context.CancelFunc, len(l.entries))
	for i, e := range l.entries {
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		cancels[i] = cancel
		go func() {
			defer close(e.done)
			l.keep(own, e)
		}()
	}
	<-ctx.Done()
	<-idle
	for i, e := range slices.Backward(l.entries) {
		cancels[i]()
		<-e.done
	}
}

// opened waits until each component has started, and returns the first failure.
func (l *lifecycle) opened(ctx context.Context) error {
	for _, e := range l.entries {
		select {
		case err := <-e.first:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// keep starts a component, and again each time that it fails, until ctx ends.
func (l *lifecycle) keep(ctx context.Context, e *entry) {
	log := l.log.With("component", e.Name)
	defer e.set(Stopped, "")
	for _, dep := range e.after {
		select {
		case <-dep.started:
		case <-ctx.Done():
			return
		}
	}
	pause := pauseMin
	for attempt := 0; ctx.Err() == nil; attempt++ {
		begin := time.Now()
		e.starts(attempt)
		err := l.once(ctx, e, log)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > pauseReset {
			pause = pauseMin
		}
		e.set(Failed, err.Error())
		log.Error("failed, starting it again", "err", err, "pause", pause.String())
		if p := (*panicError)(nil); errors.As(err, &p) {
			log.Error("panicked", "stack", string(p.stack))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, pauseMax)
	}
}

// once runs a component until it fails or ctx ends, and stops it.
func (l *lifecycle) once(ctx context.Context, e *entry, log *slog.Logger) error {
	begin := time.Now()
	running, err := start(ctx, e.Component)
	select {
	case e.first <- err:
	default: // it is not the first start
	}
	if err != nil {
		return err
	}
	e.works(&running)
	log.Info("works", "after", time.Since(begin).Round(time.Millisecond).String())
	if running.Run == nil {
		<-ctx.Done()
	} else if err = guarded(func() error { return running.Run(ctx) }); err == nil {
		err = errors.New("ended by itself")
	}
	e.ends()
	if running.Stop == nil {
		return err
	}
	log.Info("stopping")
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	if stop := guarded(func() error { return running.Stop(limited) }); stop != nil {
		log.Error("stop failed", "err", stop)
		err = errors.Join(err, fmt.Errorf("stop: %w", stop))
	}
	return err
}

func start(ctx context.Context, c Component) (running Running, err error) {
	err = guarded(func() (err error) { running, err = c.Start(ctx); return err })
	return running, err
}

// panicError is the value of a panic, with where it happened.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panicked: %v", e.value) }

// guarded returns a panic as an error: a bug in one part must not end the others. A panic in a goroutine that the
// part has started itself still ends the process, which its supervisor starts again.
func guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &panicError{p, debug.Stack()}
		}
	}()
	return f()
}

func (e *entry) starts(attempt int) {
	e.set(Starting, "")
	e.mu.Lock()
	defer e.mu.Unlock()
	e.status.Restarts = attempt
}

func (e *entry) works(r *Running) {
	e.set(Ready, "")
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running = r
	select {
	case <-e.started:
	default:
		close(e.started)
	}
}

func (e *entry) ends() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running = nil
}

func (e *entry) set(s State, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.status.State != s {
		e.status.Since = time.Now()
	}
	e.status.State, e.status.Message = s, message
}

// state returns what is known about a component now.
func (e *entry) state() ComponentStatus {
	e.mu.Lock()
	s, running := e.status, e.running
	e.mu.Unlock()
	if running == nil {
		return s
	}
	// Without the lock: these are the component's own functions.
	if running.Problem != nil {
		s.Message = running.Problem()
	}
	if running.Numbers != nil {
		s.Numbers = running.Numbers()
	}
	return s
}

// status returns the components in their order.
func (l *lifecycle) status() []ComponentStatus {
	all := make([]ComponentStatus, len(l.entries))
	for i, e := range l.entries {
		all[i] = e.state()
	}
	return all
}
