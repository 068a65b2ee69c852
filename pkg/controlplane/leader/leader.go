// Package leader elects the server of a cluster that runs components which must run only once: add-ons, the mesh, load balancer
// addresses.
//
// It owns one Lease in kube-system. A single server does not need it: pkg/server leaves it out if only one server
// can use the datastore. Components that run only on the leader are wrapped by component.Elected.
package leader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// Lease is the name of the Lease, in kube-system.
const Lease = "polymesh"

// Options of the election.
type Options struct {
	// Identity is this server's: unique in the cluster, even among restarts of the same server.
	Identity string
	// Kubeconfig must allow getting, creating and updating the Lease. It is read by Start.
	Kubeconfig string
	// Duration is how long other servers consider a server the leader after its last renewal of the Lease. The leader itself gives
	// up after two thirds of it. 0 means 15 s, as in Kubernetes' own components.
	Duration time.Duration
	Log      *slog.Logger
}

const defaultDuration = 15 * time.Second

// Leader is the component "leader".
type Leader struct {
	component.Background // its end gives the Lease up
	opts                 Options
	log                  *slog.Logger

	mu     sync.Mutex
	seen   bool            // a leader has been seen since the start
	term   context.Context // this server's current term; nil if it is not the leader
	gained chan struct{}   // closed when the next term begins
}

var (
	_ component.Component  = (*Leader)(nil)
	_ component.Leadership = (*Leader)(nil)
)

// New returns the component, not yet started.
func New(o Options) *Leader {
	if o.Duration == 0 {
		o.Duration = defaultDuration
	}
	l := &Leader{opts: o, gained: make(chan struct{})}
	l.log = o.Log.With("component", l.Name())
	return l
}

// Name implements component.Component.
func (*Leader) Name() string { return "leader" }

// Init implements component.Component.
func (*Leader) Init(context.Context) error { return nil }

// Start takes part in the election in the background.
func (l *Leader) Start(ctx context.Context) error {
	client, err := kubeconfig.Client(l.opts.Kubeconfig, nil)
	if err != nil {
		return err
	}
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Name: Lease, Namespace: metav1.NamespaceSystem}, Client: client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: l.opts.Identity},
		},
		LeaseDuration: l.opts.Duration, RenewDeadline: l.opts.Duration * 2 / 3, RetryPeriod: l.opts.Duration * 2 / 15,
		// Another server takes over immediately when this one stops.
		ReleaseOnCancel: true,
		Name:            Lease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: l.begin,
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.seen = true
				l.log.Info("the cluster has a leader", "leader", identity)
			},
		},
	})
	if err != nil {
		return fmt.Errorf("take part in the election: %w", err)
	}
	l.Go(ctx, func(ctx context.Context) {
		// Run returns when this server has lost the Lease: it stands for election again.
		for ctx.Err() == nil {
			elector.Run(ctx)
		}
	})
	return nil
}

// begin starts a term, which ends with ctx.
func (l *Leader) begin(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.term = ctx
	close(l.gained)
	l.gained = make(chan struct{})
}

// Watch implements component.Leadership.
func (l *Leader) Watch(ctx context.Context, term func(context.Context)) {
	for {
		l.mu.Lock()
		current, gained := l.term, l.gained
		l.mu.Unlock()
		if current != nil && current.Err() == nil {
			both, cancel := context.WithCancel(ctx)
			stop := context.AfterFunc(current, cancel)
			term(both)
			stop()
			cancel()
		}
		select {
		case <-ctx.Done():
			return
		case <-gained:
		}
	}
}

// Ready returns nil when the cluster has a leader, on any server.
func (l *Leader) Ready(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.seen {
		return errors.New("no leader has been elected yet")
	}
	return nil
}
