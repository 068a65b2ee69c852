package encryption

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// retry is the delay after a failure before the Secrets are checked again.
const retry = 10 * time.Second

// followTimeout is the time for a request about this server's keys.
const followTimeout = 10 * time.Second

var _ component.Component = (*Component)(nil)

// Component is "secrets-encryption": it keeps this server's keys those that the servers share, and completes what a start with
// --secrets-encryption, or an interrupted command, has begun.
type Component struct {
	component.Background
	cluster  Cluster
	self     Self
	provider string
	log      *slog.Logger
	state    atomic.Pointer[error] // of the change
	keys     atomic.Pointer[error] // of this server's keys
}

// New returns the component, not yet started. provider is how Secrets are to be encrypted, empty for no change.
func New(c Cluster, self Self, provider string, log *slog.Logger) *Component {
	n := &Component{cluster: c, self: self, provider: provider, log: log.With("component", "secrets-encryption")}
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
	n.cluster.Waiting = func(why string) { n.set(errors.New(why)) }
	n.set(errors.New("not checked yet"))
	return n
}

func (c *Component) set(err error) { c.state.Store(&err) }

// Name implements component.Component.
func (*Component) Name() string { return "secrets-encryption" }

// Init implements component.Component. The API server has written the file.
func (*Component) Init(context.Context) error { return nil }

// Start follows the keys and checks the Secrets in the background.
func (c *Component) Start(ctx context.Context) error {
	if !c.cluster.several() {
		c.Go(ctx, c.complete)
		return nil
	}
	api, err := kubeconfig.Client(c.cluster.Kubeconfig, func(c *rest.Config) { c.Timeout = followTimeout })
	if err != nil {
		return err
	}
	client, err := openStore(c.cluster.Datastore)
	if err != nil {
		return err
	}
	c.Go(ctx, func(ctx context.Context) {
		defer client.Close()
		var completing sync.WaitGroup
		defer completing.Wait()
		completing.Go(func() { c.complete(ctx) })
		now := component.NewWake()
		now.Call()
		component.Rounds(ctx, now, c.cluster.ReloadInterval(), func(ctx context.Context) {
			err := c.cluster.follow(ctx, bootstrap.Store{Client: client}, c.self, api)
			if err != nil && ctx.Err() == nil {
				c.log.Debug("the keys of Secrets may not be those that the servers share", "err", err)
			}
			c.keys.Store(&err)
		})
	})
	return nil
}

// complete tries until a change that has begun is completed.
func (c *Component) complete(ctx context.Context) {
	for {
		err := c.finish(ctx)
		c.set(err)
		if err == nil {
			return
		}
		wait := retry
		if errors.Is(err, errNotShared) {
			wait = time.Second
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// finish begins the change that the provider needs, and rewrites Secrets if necessary.
func (c *Component) finish(ctx context.Context) error {
	status, err := c.cluster.Status(ctx)
	if err != nil {
		return err
	}
	switch provided := c.provider == "" || status.provider() == c.provider; {
	case !provided:
		err = c.cluster.Provide(ctx, c.provider)
	case status.Unfinished:
		err = c.cluster.Finish(ctx)
	default:
		return nil
	}
	if err == nil {
		c.log.Info("Secrets are rewritten", "encrypted", status.Enabled || c.provider != "")
	}
	return err
}

// Ready implements component.Component.
func (c *Component) Ready(context.Context) error {
	if err := c.keys.Load(); err != nil && *err != nil {
		return *err
	}
	return *c.state.Load()
}
