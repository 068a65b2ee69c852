// Package keeper puts back what other programs change on the machine: reloading a firewall removes all packet filter rules, a network
// manager removes an interface, a hardening script resets a kernel setting.
//
// It owns the loop and what is reported about it; a Part knows how to check and restore one thing. The pod network and kube-proxy
// run one keeper each.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// Interval is how often a keeper checks. Missing rules must be restored within 30 seconds, and kube-proxy takes
	// up to half of that to write its own.
	Interval = 10 * time.Second
	// pause is the least time between two passes, so that a burst of kernel's reports causes few.
	pause = 100 * time.Millisecond
	// fresh is how long the result of a check is reused: several callers may request it at once.
	fresh = time.Second
)

// Part is something that the node has set up outside its own files, where other programs interfere.
type Part interface {
	// Missing describes what is gone; empty if nothing is.
	Missing(ctx context.Context) (string, error)
	// Restore restores it.
	Restore(ctx context.Context) error
}

// Changing is a Part whose desired state changes while it runs.
type Changing interface {
	Part
	// Settle applies what has changed since it last worked; nothing if nothing has. It precedes every check, so that a part that
	// was never there does not count as removed by another program.
	Settle(ctx context.Context) error
}

// Keeper checks parts repeatedly, and restores what is gone.
type Keeper struct {
	parts []Part
	log   *slog.Logger
	kick  chan struct{}

	mu     sync.Mutex
	asked  time.Time
	answer error
	noted  string
	// failed are the parts that could not be settled or restored, by their position.
	failed map[int]error
}

// New returns a keeper, not yet running.
func New(log *slog.Logger) *Keeper {
	return &Keeper{log: log, kick: make(chan struct{}, 1), failed: map[int]error{}}
}

// Add adds parts, in the order in which they are checked. It must precede Run.
func (k *Keeper) Add(parts ...Part) { k.parts = append(k.parts, parts...) }

// Kick requests a pass now, for example because the kernel has reported a change.
func (k *Keeper) Kick() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Run keeps the parts until ctx ends. What is missing at first was not removed: it is created without a log entry.
func (k *Keeper) Run(ctx context.Context) {
	for first := true; ; first = false {
		k.pass(ctx, first)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		select {
		case <-ctx.Done():
			return
		case <-k.kick:
		case <-time.After(Interval - pause):
		}
	}
}

func (k *Keeper) pass(ctx context.Context, first bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*Interval)
	defer cancel()
	for i, p := range k.parts {
		err := k.keep(ctx, p, first)
		if ctx.Err() != nil {
			return
		}
		// A failure is logged once, not on every pass.
		if last := k.outcome(i, err); err != nil && (last == nil || last.Error() != err.Error()) {
			k.log.Error("restore the node's network", "err", err)
		}
	}
}

// outcome notes whether a part could be kept, and returns what was noted before.
func (k *Keeper) outcome(part int, err error) (last error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	last = k.failed[part]
	k.failed[part] = err
	if (err == nil) != (last == nil) {
		k.asked = time.Time{}
	}
	return last
}

func (k *Keeper) keep(ctx context.Context, p Part, first bool) error {
	if c, ok := p.(Changing); ok {
		if err := c.Settle(ctx); err != nil {
			return err
		}
	}
	gone, err := p.Missing(ctx)
	if err != nil || gone == "" {
		return err
	}
	if !first {
		k.log.Warn("another program has removed a part of the node's network, restoring it", "gone", gone)
	}
	if err := p.Restore(ctx); err != nil {
		return err
	}
	if !first {
		k.log.Info("the part of the node's network is restored", "part", gone)
		k.note(time.Now().Format(time.DateTime) + ": put back what another program had removed: " + gone)
	}
	return nil
}

func (k *Keeper) note(text string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noted, k.asked = text, time.Time{}
}

// Last describes what was restored last; empty if nothing was.
func (k *Keeper) Last() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.noted
}

// Check returns nil if nothing is missing.
func (k *Keeper) Check(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.asked) < fresh {
		return k.answer
	}
	k.answer = nil
	for i, p := range k.parts {
		gone, err := p.Missing(ctx)
		failure := k.failed[i]
		switch {
		case err != nil:
			k.answer = errors.Join(k.answer, err)
		case gone != "" && failure != nil:
			k.answer = errors.Join(k.answer, fmt.Errorf("%s: missing: %w", gone, failure))
		case gone != "":
			k.answer = errors.Join(k.answer, fmt.Errorf("%s: missing, will be restored within seconds", gone))
		case failure != nil:
			k.answer = errors.Join(k.answer, failure)
		}
	}
	k.asked = time.Now()
	return k.answer
}
