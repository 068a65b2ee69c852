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
	// Standby means ready to take over while another server does the work. See Elected.
	Standby  State = "Standby"
	NotReady State = "NotReady"
	Failed   State = "Failed"
	Stopped  State = "Stopped"
)

// Status is the manager's information about one component.
type Status struct {
	Name  string    `json:"name"`
	State State     `json:"state"`
	Since time.Time `json:"since"`
	// Message is what the component waits for or why it is not ready; if it is ready, its Summary.
	Message string `json:"message,omitempty"`
	// Notes are warnings of a ready component: see Noted.
	Notes   []string `json:"notes,omitempty"`
	Version string   `json:"version,omitempty"`
	PID     int      `json:"pid,omitempty"`
	// Separate is set if the component is a separate process, even while it is not running.
	Separate bool `json:"-"`
}

const (
	startPoll = 50 * time.Millisecond
	watchPoll = 10 * time.Second
	// checkTime is the time limit for a readiness check.
	checkTime = 10 * time.Second
	stopGrace = 30 * time.Second
)

// Manager starts components when their dependencies are ready, watches them, and stops them in reverse order.
type Manager struct {
	log     *slog.Logger
	checked func(context.Context) error
	entries []*entry
	settled chan struct{}
}

type entry struct {
	Component
	after []*entry
	ready chan struct{} // closed when the component has been ready once

	mu       sync.Mutex
	status   Status
	inStart  bool
	warnedOf bool
}

// NewManager returns a manager without components.
func NewManager(log *slog.Logger) *Manager {
	return &Manager{log: log, settled: make(chan struct{})}
}

// OnceChecked makes Run call f when all components have been initialized, before the first one starts: for changes to the
// machine that must not happen if the configuration is refused.
func (m *Manager) OnceChecked(f func(context.Context) error) { m.checked = f }

// Settled returns a channel that is closed once every component has been ready.
func (m *Manager) Settled() <-chan struct{} { return m.settled }

// Handle is a component that was added to a manager.
type Handle struct{ entry *entry }

// Ready returns a channel that is closed once the component has been ready.
func (h Handle) Ready() <-chan struct{} { return h.entry.ready }

// Add appends a component that starts once those in after, handles of the same manager, are ready. They must have been added
// before it, so there can be no cycles.
func (m *Manager) Add(c Component, after ...Handle) Handle {
	e := &entry{Component: c, ready: make(chan struct{})}
	e.status = Status{Name: c.Name(), State: Waiting, Since: time.Now()}
	for _, h := range after {
		e.after = append(e.after, h.entry)
	}
	m.entries = append(m.entries, e)
	return Handle{e}
}

// After returns the components that the component with this name waits for, in the order in which they were added.
func (m *Manager) After(name string) []string {
	var names []string
	for _, e := range m.entries {
		if e.Name() != name {
			continue
		}
		for _, dep := range e.after {
			names = append(names, dep.Name())
		}
	}
	return names
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
	if m.checked != nil {
		if err := m.checked(ctx); err != nil {
			return err
		}
	}

	// Running parts outlive run, so that they are ended by Stop, in reverse order: an API server whose datastore has gone
	// does not stop.
	run, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	var wg sync.WaitGroup
	for _, e := range m.entries {
		wg.Go(func() {
			if err := m.start(run, e); err != nil {
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
	started := make(chan struct{})
	go func() { wg.Wait(); close(started) }()
	select {
	case <-started:
	case <-time.After(stopGrace):
		// A Start that ignores its context ends with the process.
	}
	m.stop()
	// The first error counts. The cause of ctx may be any error, such as the name of the signal.
	if cause := context.Cause(run); cause != context.Cause(ctx) {
		return cause
	}
	return nil
}

// start starts one component and watches it until run ends. It returns an error only if the node cannot continue.
func (m *Manager) start(run context.Context, e *entry) error {
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
	e.starting(true)
	err := e.Start(run)
	e.starting(false)
	if err != nil && run.Err() != nil {
		log.Info("start given up", "err", err)
		return nil
	}
	if err != nil {
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
			m.outlive(run, e, err)
			return err
		case <-timer.C:
		}
		err := e.check(run, once)
		if run.Err() != nil {
			return nil
		}
		for _, warning := range e.warnings() {
			log.Warn(warning)
		}
		switch {
		case err == nil && !once:
			once = true
			close(e.ready)
			log.Info("ready", "after", time.Since(begin).Round(time.Millisecond).String())
		case err == nil && !well:
			log.Info("ready again")
		case err != nil && well:
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

// outlive logs a failure and keeps the other components running while they are useful.
func (m *Manager) outlive(run context.Context, e *entry, err error) {
	if p := (*Panic)(nil); errors.As(err, &p) {
		m.log.Error("panicked", "component", e.Name(), "panic", fmt.Sprint(p.Value), "stack", string(p.Stack))
	}
	o, ok := e.Component.(Outlived)
	if !ok {
		return
	}
	m.log.Error("failed; the server continues without it for a while and then ends, because only a fresh process can start it again",
		"component", e.Name(), "err", err, "ends after", o.OutlivedFor().String())
	select {
	case <-time.After(o.OutlivedFor()):
	case <-run.Done():
	}
}

// check runs a component's readiness check and records the result, unless ctx ended first: that is no statement about
// the component.
func (e *entry) check(ctx context.Context, once bool) error {
	limited, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	err := e.Ready(limited)
	if err != nil && errors.Is(limited.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("did not answer within %s: %w", checkTime, err)
	}
	switch {
	case ctx.Err() != nil:
	case err == nil:
		var notes []string
		if n, ok := e.Component.(Noted); ok {
			notes = n.Notes(limited)
		}
		message := ""
		if s, ok := e.Component.(Summarized); ok {
			message = s.Summary()
		}
		state := Ready
		if s, ok := e.Component.(standing); ok && s.standby() {
			state = Standby
		}
		e.set(state, message, notes...)
	case once:
		e.set(NotReady, err.Error())
	default:
		e.set(Starting, err.Error())
	}
	return err
}

// warnings returns the notes of a ready component that had none before.
func (e *entry) warnings() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.status.State != Ready {
		return nil
	}
	before := e.warnedOf
	e.warnedOf = len(e.status.Notes) > 0
	if before {
		return nil
	}
	return e.status.Notes
}

func (e *entry) starting(is bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inStart = is
}

func (m *Manager) stop() {
	for _, e := range slices.Backward(m.entries) {
		if s := e.snapshot().State; s == Waiting || s == Stopped {
			continue
		}
		if e.isStarting() {
			m.log.Error("did not give up starting", "component", e.Name())
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

// set records a state. Failed and Stopped are final: a check in progress must not overwrite them.
func (e *entry) set(s State, message string, notes ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.status.State == Failed || e.status.State == Stopped {
		return
	}
	if e.status.State != s {
		e.status.Since = time.Now()
	}
	e.status.State, e.status.Message, e.status.Notes = s, message, notes
}

func (e *entry) isStarting() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.inStart
}

func (e *entry) snapshot() Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status
}

// Status returns the state of every component, in the order in which they were added. Components that have been ready
// are checked again; if ctx ends first, the previous state is returned. A caller that gives up changes nothing: the check
// itself does not end with ctx.
func (m *Manager) Status(ctx context.Context) []Status {
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		var wg sync.WaitGroup
		for _, e := range m.entries {
			if s := e.snapshot().State; s == Ready || s == NotReady {
				wg.Go(func() { _ = e.check(context.WithoutCancel(ctx), true) })
			}
		}
		wg.Wait()
	}()
	select {
	case <-asked:
	case <-ctx.Done():
	}
	out := make([]Status, len(m.entries))
	for i, e := range m.entries {
		out[i] = e.snapshot()
		if v, ok := e.Component.(Versioned); ok {
			out[i].Version = v.Version()
		}
		if p, ok := e.Component.(Process); ok {
			out[i].PID, out[i].Separate = p.PID(), true
		}
	}
	return out
}
