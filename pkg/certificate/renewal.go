package certificate

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

// renewalInterval is how often a running server checks its certificates.
const renewalInterval = 12 * time.Hour

// Renewal is the component "certificates": it creates missing certificates at startup, and while the server runs renews each
// certificate before it expires. Kubernetes reloads renewed files by itself.
type Renewal struct {
	component.Background
	opts    Options
	publish func(Store) error
	log     *slog.Logger
	problem atomic.Pointer[error]
}

// NewRenewal returns the component. publish is called after certificates were written; it writes the kubeconfigs.
func NewRenewal(o Options, publish func(Store) error, log *slog.Logger) *Renewal {
	return &Renewal{opts: o, publish: publish, log: log.With("component", "certificates")}
}

// Ensure creates and renews what is due at the time now, and calls publish.
func (r *Renewal) Ensure(now time.Time) error {
	o := r.opts
	o.Now = now
	written, err := Ensure(o)
	if err != nil {
		return err
	}
	if len(written) > 0 {
		r.log.Info("certificates written", "names", written)
	}
	return r.publish(Store(o.Dir))
}

// Name implements component.Component.
func (r *Renewal) Name() string { return "certificates" }

// Init does nothing: Start creates the certificates.
func (r *Renewal) Init(context.Context) error { return nil }

// Start creates missing certificates, and starts periodic checks.
func (r *Renewal) Start(ctx context.Context) error {
	if err := r.Ensure(time.Now()); err != nil {
		return err
	}
	r.Go(ctx, func(ctx context.Context) {
		tick := time.NewTicker(renewalInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				err := r.Ensure(now)
				if err != nil {
					r.log.Error("renew certificates", "err", err)
				}
				r.problem.Store(&err)
			}
		}
	})
	return nil
}

// Ready returns the error of the last renewal, if any.
func (r *Renewal) Ready(context.Context) error {
	if err := r.problem.Load(); err != nil {
		return *err
	}
	return nil
}
