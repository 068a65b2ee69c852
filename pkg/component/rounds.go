package component

import (
	"context"
	"time"
)

// Wake is a signal that something has changed. Any number of calls until it is received are one.
type Wake chan struct{}

// NewWake returns a signal that was not given.
func NewWake() Wake { return make(Wake, 1) }

// Call gives the signal. It never blocks.
func (w Wake) Call() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// Rounds calls round after each signal, and at least once in each interval, until ctx ends. The first round waits for one of them. Without a
// wake, only the interval counts.
func Rounds(ctx context.Context, wake Wake, interval time.Duration, round func(context.Context)) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-ticker.C:
		}
		round(ctx)
	}
}
