package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// keepInterval is how often a keeper checks. Missing rules must be restored within 30 seconds, and kube-proxy takes
	// up to half of that to write its own.
	keepInterval = 10 * time.Second
	// keepFresh is how long the result of a check is reused: several callers may request it at once.
	keepFresh = time.Second
)

// part is something that the node has set up outside its own files, where other programs interfere: reloading a firewall
// removes all rules, a network manager removes an interface.
type part interface {
	// missing describes what is gone; empty if nothing is.
	missing(ctx context.Context) (string, error)
	// restore restores it.
	restore(ctx context.Context) error
}

// keeper checks parts repeatedly, and restores what is gone.
type keeper struct {
	parts []part
	log   *slog.Logger

	mu     sync.Mutex
	asked  time.Time
	answer error
	noted  string
}

// run keeps the parts until ctx ends. What is missing at first was not removed: it is created without a log entry.
func (k *keeper) run(ctx context.Context) {
	for first := true; ; first = false {
		k.pass(ctx, first)
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepInterval):
		}
	}
}

func (k *keeper) pass(ctx context.Context, first bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*keepInterval)
	defer cancel()
	for _, p := range k.parts {
		gone, err := p.missing(ctx)
		if err == nil && gone == "" {
			continue
		}
		if err == nil {
			if !first {
				k.log.Warn("another program has removed a part of the node's network, restoring it", "gone", gone)
			}
			if err = p.restore(ctx); err == nil && !first {
				k.log.Info("the part of the node's network is restored", "part", gone)
				k.note(time.Now().Format(time.DateTime) + ": put back what another program had removed: " + gone)
			}
		}
		if err != nil && ctx.Err() == nil {
			k.log.Error("restore the node's network", "part", gone, "err", err)
		}
	}
}

func (k *keeper) note(text string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noted, k.asked = text, time.Time{}
}

// last describes what was restored last; empty if nothing was.
func (k *keeper) last() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.noted
}

// check returns nil if nothing is missing.
func (k *keeper) check(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.asked) < keepFresh {
		return k.answer
	}
	k.answer = nil
	for _, p := range k.parts {
		gone, err := p.missing(ctx)
		if err != nil {
			k.answer = errors.Join(k.answer, err)
		} else if gone != "" {
			k.answer = errors.Join(k.answer, fmt.Errorf("%s: missing, will be restored within seconds", gone))
		}
	}
	k.asked = time.Now()
	return k.answer
}
