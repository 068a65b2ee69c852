package encryption

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

// retry is the delay after a failure before the Secrets are checked again.
const retry = 10 * time.Second

var _ component.Component = (*Component)(nil)

// Component is "secrets-encryption": it completes what a start with --secrets-encryption, or an interrupted command, has
// begun.
type Component struct {
	component.Background
	cluster Cluster
	log     *slog.Logger
	state   atomic.Pointer[error]
}

// New returns the component, not yet started.
func New(c Cluster, log *slog.Logger) *Component {
	n := &Component{cluster: c, log: log}
	if before := c.Before; before != nil {
		// Retries continue the same change.
		done := false
		n.cluster.Before = func(ctx context.Context) error {
			if done {
				return nil
			}
			err := before(ctx)
			done = err == nil
			return err
		}
	}
	n.cluster.Progress = func(done, total int) { n.set(fmt.Errorf("rewriting Secrets, %d of %d", done, total)) }
	n.set(errors.New("not checked yet"))
	return n
}

func (c *Component) set(err error) { c.state.Store(&err) }

// Name implements component.Component.
func (*Component) Name() string { return "secrets-encryption" }

// Init implements component.Component. The API server has written the file.
func (*Component) Init(context.Context) error { return nil }

// Start checks the Secrets in the background.
func (c *Component) Start(ctx context.Context) error {
	c.Go(ctx, func(ctx context.Context) {
		for {
			err := c.finish(ctx)
			c.set(err)
			if err == nil {
				return
			}
			select {
			case <-time.After(retry):
			case <-ctx.Done():
				return
			}
		}
	})
	return nil
}

// finish rewrites Secrets if necessary.
func (c *Component) finish(ctx context.Context) error {
	status, err := c.cluster.Status(ctx)
	if err != nil || !status.Unfinished {
		return err
	}
	if err := c.cluster.Finish(ctx); err != nil {
		return err
	}
	c.log.Info("Secrets are rewritten", "encrypted", status.Enabled)
	return nil
}

// Ready implements component.Component.
func (c *Component) Ready(context.Context) error { return *c.state.Load() }
