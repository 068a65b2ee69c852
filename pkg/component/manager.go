package component

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// State is where a component is in its lifecycle.
type State string

const (
	Waiting  State = "Waiting"
	Starting State = "Starting"
	Ready    State = "Ready"
	NotReady State = "NotReady"
	Failed   State = "Failed"
	Stopped  State = "Stopped"
)

// Status is what the manager knows of one component.
type Status struct {
	Name    string    `json:"name"`
	State   State     `json:"state"`
	Since   time.Time `json:"since"`
	Message string    `json:"message,omitempty"`
	Version string    `json:"version,omitempty"`
	PID     int       `json:"pid,omitempty"`
	// Separate says that the component is a process of its own, even while there is none.
	Separate bool `json:"-"`
}

const (
	startPoll = 50 * time.Millisecond
	watchPoll = 10 * time.Second
	stopGrace = 30 * time.Second
)

// Manager starts components when what they build on is ready, watches them, and stops them in reverse.
type Manager struct {
	log     *slog.Logger
	entries []*entry
	settled chan struct{}
}

type entry struct {
	Component
	after []*entry
	ready chan struct{} // closed when the component has been ready once

	mu     sync.Mutex
	status Status
}

// NewManager returns a manager without components.
func NewManager(log *slog.Logger) *Manager {
	return &Manager{log: log, settled: make(chan struct{})}
}

// Ready returns a channel that is closed once the component of this name has been ready.
func (m *Manager) Ready(name string) <-chan struct{} {
	i := slices.IndexFunc(m.entries, func(e *entry) bool { return e.Name() == name })
	if i < 0 {
		panic(fmt.Sprintf("component %s was not added", name))
	}
	return m.entries[i].ready
}

// Settled returns a channel that is closed once every component has been ready.
func (m *Manager) Settled() <-chan struct{} { return m.settled }

// Add appends a component that starts once those named in after are ready. They must have been added before it, which
// keeps the order free of cycles; an unknown name is a programming error and panics.
func (m *Manager) Add(c Component, after ...string) {
	e := &entry{Component: c, ready: make(chan struct{})}
	e.status = Status{Name: c.Name(), State: Waiting, Since: time.Now()}
	for _, name := range after {
		i := slices.IndexFunc(m.entries, func(o *entry) bool { return o.Name() == name })
		if i < 0 {
			panic(fmt.Sprintf("component %s is to start after %s, which was not added before it", c.Name(), name))
		}
		e.after = append(e.after, m.entries[i])
	}
	m.entries = append(m.entries, e)
}

// Run initializes and starts all components, and returns after ctx ends or a component fails; by then everything is
// stopped. The error is the failure, nil when ctx ended.
func (m *Manager) Run(ctx context.Context) error {
	begin := time.Now()
	for _, e := range m.entries {
		if err := e.Init(ctx); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}

	run, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Components get a context that outlives ctx, so that Stop, in reverse order, is what ends them: an API server
	// whose datastore has gone does not stop.
	live := context.WithoutCancel(ctx)

	var wg sync.WaitGroup
	for _, e := range m.entries {
		wg.Go(func() {
			if err := m.start(run, live, e); err != nil {
				cancel(fmt.Errorf("%s: %w", e.Name(), err))
			}
		})
	}
	go func() {
		for _, e := range m.entries {
			select {
			case <-e.ready:
			case <-run.Done():
				return
			}
		}
		close(m.settled)
		m.log.Info("all components are ready", "after", time.Since(begin).Round(time.Millisecond).String())
	}()

	<-run.Done()
	wg.Wait()
	m.stop()
	// What came first counts. The cause of ctx may be any error: a signal's says which one it was.
	if cause := context.Cause(run); cause != context.Cause(ctx) {
		return cause
	}
	return nil
}

// start brings one component up and watches it until run ends. It returns an error only when the node cannot go on.
func (m *Manager) start(run, live context.Context, e *entry) error {
	for _, dep := range e.after {
		select {
		case <-dep.ready:
		case <-run.Done():
			return nil
		}
	}
	if run.Err() != nil {
		return nil
	}
	log := m.log.With("component", e.Name())
	begin := time.Now()
	log.Info("starting")
	e.set(Starting, "")
	if err := e.Start(live); err != nil {
		e.set(Failed, err.Error())
		return err
	}
	var failed <-chan error
	if f, ok := e.Component.(Failing); ok {
		failed = f.Failed()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	once, well := false, false
	for {
		select {
		case <-run.Done():
			return nil
		case err := <-failed:
			if err == nil {
				err = errors.New("ended by itself")
			}
			e.set(Failed, err.Error())
			return err
		case <-timer.C:
		}
		err := e.check(run, once)
		switch {
		case err == nil && !once:
			once = true
			close(e.ready)
			log.Info("ready", "after", time.Since(begin).Round(time.Millisecond).String())
		case err == nil && !well:
			log.Info("ready again")
		case err != nil && well && run.Err() == nil:
			log.Warn("not ready", "err", err)
		}
		well = err == nil
		if once {
			timer.Reset(watchPoll)
		} else {
			timer.Reset(startPoll)
		}
	}
}

// check asks a component whether it is ready and notes the answer.
func (e *entry) check(ctx context.Context, once bool) error {
	ctx, cancel := context.WithTimeout(ctx, watchPoll)
	defer cancel()
	err := e.Ready(ctx)
	switch {
	case err == nil:
		e.set(Ready, "")
	case once:
		e.set(NotReady, err.Error())
	default:
		e.set(Starting, err.Error())
	}
	return err
}

func (m *Manager) stop() {
	for _, e := range slices.Backward(m.entries) {
		if s := e.snapshot().State; s == Waiting || s == Stopped {
			continue
		}
		m.log.Info("stopping", "component", e.Name())
		ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
		if err := e.Stop(ctx); err != nil {
			m.log.Error("stop failed", "component", e.Name(), "err", err)
		}
		cancel()
		e.set(Stopped, "")
	}
}

// set notes a state. Failed and Stopped are final: a check that was under way must not hide them.
func (e *entry) set(s State, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.status.State == Failed || e.status.State == Stopped {
		return
	}
	if e.status.State != s {
		e.status.Since = time.Now()
	}
	e.status.State, e.status.Message = s, message
}

func (e *entry) snapshot() Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status
}

// Status returns the state of every component, in the order in which they were added. Components that have been ready
// are asked again.
func (m *Manager) Status(ctx context.Context) []Status {
	out := make([]Status, len(m.entries))
	var wg sync.WaitGroup
	for i, e := range m.entries {
		wg.Go(func() {
			if s := e.snapshot().State; s == Ready || s == NotReady {
				e.check(ctx, true)
			}
			out[i] = e.snapshot()
			if n, ok := e.Component.(Noted); ok && out[i].State == Ready {
				out[i].Message = n.Note(ctx)
			}
			if v, ok := e.Component.(Versioned); ok {
				out[i].Version = v.Version()
			}
			if p, ok := e.Component.(Process); ok {
				out[i].PID, out[i].Separate = p.PID(), true
			}
		})
	}
	wg.Wait()
	return out
}
