package component

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Leadership is the role of the one server in a cluster that runs components which must run only once.
type Leadership interface {
	// Watch calls term each time this server becomes the leader, sequentially, with a context that ends when it no longer
	// is. It returns when ctx ends.
	Watch(ctx context.Context, term func(context.Context))
}

// Elected runs a component only on the leader of the cluster. Components run once, so build creates a new one for each
// term. Without a leadership, because there is only one server, it returns the component itself.
//
// On other servers the state is Standby. A component that fails during its term is restarted, after a delay that doubles
// each time: a failure on the leader must not take the server down.
func Elected(leadership Leadership, build func() Component, log *slog.Logger) Component {
	first := build()
	if leadership == nil {
		return first
	}
	return &elected{name: first.Name(), current: first, leadership: leadership, build: build, log: log.With("component", first.Name())}
}

// standing is a component that may be ready without working.
type standing interface{ standby() bool }

type elected struct {
	Background // its end is the end of the term
	name       string
	leadership Leadership
	build      func() Component
	log        *slog.Logger

	mu      sync.Mutex
	current Component // the one of this term, or of the next one
	leading bool
	problem error // why the component of this term is not running; nil if it is
}

// Name implements Component.
func (e *elected) Name() string { return e.name }

// Init checks what the first term would start with.
func (e *elected) Init(ctx context.Context) error { return e.component().Init(ctx) }

// Start waits for terms in the background.
func (e *elected) Start(ctx context.Context) error {
	e.Go(ctx, func(ctx context.Context) { e.leadership.Watch(ctx, e.term) })
	return nil
}

// term runs the component while this server leads.
func (e *elected) term(ctx context.Context) {
	e.log.Info("this server is now the leader")
	pause := restartMin
	for ctx.Err() == nil {
		begin := time.Now()
		err := e.once(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(begin) > restartReset {
			pause = restartMin
		}
		e.set(true, err)
		e.log.Error("failed, restarting", "err", err, "pause", pause.String())
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, restartMax)
	}
	e.set(false, nil)
	e.log.Info("this server is no longer the leader")
}

// once runs one instance until it fails or ctx ends, and builds the next one.
func (e *elected) once(ctx context.Context) error {
	c := e.component()
	defer func() {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		if err := c.Stop(limited); err != nil {
			e.log.Error("stop", "err", err)
		}
		next := e.build()
		if err := next.Init(limited); err != nil {
			e.log.Error("build it for the next term", "err", err)
		}
		e.mu.Lock()
		e.current = next
		e.mu.Unlock()
	}()
	e.set(true, errors.New("starting"))
	if err := c.Start(ctx); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	e.set(true, nil)
	var failed <-chan error
	if f, ok := c.(Failing); ok {
		failed = f.Failed()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		if err == nil {
			err = errors.New("ended by itself")
		}
		return err
	}
}

func (e *elected) component() Component {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.current
}

func (e *elected) set(leading bool, problem error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leading, e.problem = leading, problem
}

func (e *elected) standby() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.leading
}

// Ready returns the component's state on the leader, and nil elsewhere.
func (e *elected) Ready(ctx context.Context) error {
	e.mu.Lock()
	leading, problem, c := e.leading, e.problem, e.current
	e.mu.Unlock()
	if !leading || problem != nil {
		return problem
	}
	return c.Ready(ctx)
}

// Notes implements Noted.
func (e *elected) Notes(ctx context.Context) []string {
	if n, ok := e.component().(Noted); ok && !e.standby() {
		return n.Notes(ctx)
	}
	return nil
}

// Version implements Versioned.
func (e *elected) Version() string {
	if v, ok := e.component().(Versioned); ok {
		return v.Version()
	}
	return ""
}
