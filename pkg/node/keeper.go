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
	// keepInterval is how often a keeper looks. Rules that are gone must be back within 30 seconds, and writing kube-proxy's
	// takes up to half of that.
	keepInterval = 10 * time.Second
	// keepFresh is how long an answer about what is missing serves: several callers may ask at once.
	keepFresh = time.Second
)

// part is something that the node has set up outside of its own files, where other programs come by: a firewall that is
// reloaded removes all rules, a network manager removes an interface.
type part interface {
	// missing names what is gone, empty where all is there.
	missing(ctx context.Context) (string, error)
	// restore puts it back.
	restore(ctx context.Context) error
}

// keeper looks at parts again and again, and puts back what is gone.
type keeper struct {
	parts []part
	log   *slog.Logger

	mu     sync.Mutex
	asked  time.Time
	answer error
	noted  string
}

// run keeps the parts until ctx ends. What is missing at first was not removed: it is made without a word.
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
				k.log.Warn("another program has removed a part of the node's network, putting it back", "gone", gone)
			}
			if err = p.restore(ctx); err == nil && !first {
				k.log.Info("the part of the node's network is back", "part", gone)
				k.note(time.Now().Format(time.DateTime) + ": put back what another program had removed: " + gone)
			}
		}
		if err != nil && ctx.Err() == nil {
			k.log.Error("keep the node's network", "part", gone, "err", err)
		}
	}
}

func (k *keeper) note(text string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noted, k.asked = text, time.Time{}
}

// last says what was put back last; empty if nothing was.
func (k *keeper) last() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.noted
}

// check is nil when nothing is missing.
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
			k.answer = errors.Join(k.answer, fmt.Errorf("%s: gone, is put back within seconds", gone))
		}
	}
	k.asked = time.Now()
	return k.answer
}
