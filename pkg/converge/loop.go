// Package converge keeps objects in the cluster in the server's desired state: what is deleted or changed comes back.
//
// It owns the loop (Loop) and the memory of what was applied (Applied); pkg/ssa applies. Add-ons, the image policy and the mesh
// are built on it.
package converge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

const (
	// Interval is how often what nothing reports is checked.
	Interval = time.Minute
	// roundTimeout bounds one round: a request that is never answered must not end the convergence. A round is some dozens of
	// requests, and an API server that has just started answers within seconds.
	roundTimeout = 2 * time.Minute
	retryFirst   = 200 * time.Millisecond
	retryMax     = 10 * time.Second
)

// Later is an error for what is not as it should be and can wait for the next regular round.
type Later string

func (l Later) Error() string { return string(l) }

// Loop calls a function until it works, with growing pauses, and then once in each interval.
type Loop struct {
	log      *slog.Logger
	interval time.Duration
	sync     func(context.Context) error

	background component.Background

	mu    sync.Mutex
	state error
	again chan struct{}
}

// NewLoop returns a loop, not yet started. sync brings the cluster to the desired state. It is called forever, so it has to be
// cheap where there is nothing to do; its context ends when a round takes too long.
func NewLoop(log *slog.Logger, interval time.Duration, sync func(context.Context) error) *Loop {
	return &Loop{log: log, interval: interval, sync: sync, state: errors.New("not applied yet"), again: make(chan struct{}, 1)}
}

// Start runs the loop in the background, until Stop.
func (l *Loop) Start(ctx context.Context) {
	l.background.Go(ctx, l.run)
}

func (l *Loop) run(ctx context.Context) {
	pause := retryFirst
	for {
		err := l.round(ctx)
		if ctx.Err() != nil {
			return
		}
		l.mu.Lock()
		l.state = err
		l.mu.Unlock()
		wait := l.interval
		if err != nil && !errors.As(err, new(Later)) {
			l.log.Debug("not applied", "err", err, "again in", pause.String())
			wait, pause = pause, min(2*pause, retryMax)
		} else {
			pause = retryFirst
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-l.again:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// round calls sync once.
func (l *Loop) round(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	err := l.sync(ctx)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("not applied within %s: %w", roundTimeout, err)
	}
	return err
}

// Kick makes the next round start now, because something was found not to be as it should.
func (l *Loop) Kick() {
	select {
	case l.again <- struct{}{}:
	default:
	}
}

// Ready is the result of the last round.
func (l *Loop) Ready() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// Stop ends the loop and waits for a round that is under way. What was applied stays.
func (l *Loop) Stop(ctx context.Context) error { return l.background.Stop(ctx) }
