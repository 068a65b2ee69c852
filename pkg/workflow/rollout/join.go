package rollout

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilrand "k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/progress"
)

const (
	// leaseTime is how long the lease of a driver that is gone is valid; a driver renews it every renewTime, and stops if it could
	// not for stopTime.
	leaseTime = 10 * time.Second
	stopTime  = 6 * time.Second
	renewTime = 2 * time.Second
)

// errDisplaced means that this process may no longer drive.
var errDisplaced = errors.New("the API server did not respond for a while, so another machine may continue the rollout; this one has stopped")

// join follows the rollout until it ends: it drives it if no other process does, and shows what happens otherwise.
func join(ctx context.Context, o Options) (*Result, error) {
	if err := createLease(ctx, o); err != nil {
		return nil, err
	}
	d := &driver{Options: o}
	driving, displaced := context.WithCancelCause(ctx)
	defer displaced(nil)
	leading, ended := make(chan struct{}), make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{LeaseMeta: metav1.ObjectMeta{Name: recordName(o.Name), Namespace: o.Namespace},
			Client: o.Cluster.Client.CoordinationV1(), LockConfig: resourcelock.ResourceLockConfig{Identity: identity()}},
		LeaseDuration: leaseTime, RenewDeadline: stopTime, RetryPeriod: renewTime, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(lease context.Context) {
				close(leading)
				defer context.AfterFunc(lease, func() { displaced(errDisplaced) })()
				ended <- d.run(driving)
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return nil, err
	}
	// The lease is released after the driver has stopped, not when it is requested to stop.
	held, release := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.Discard()))
	released := make(chan struct{})
	go func() {
		defer close(released)
		elector.Run(held)
	}()
	defer func() {
		release()
		<-released
		select {
		case <-leading:
			if d.state != nil && d.state.Phase.Ended() {
				// One that is left is used by the next rollout, or removed with the Deployment.
				_ = o.Cluster.Client.CoordinationV1().Leases(o.Namespace).Delete(context.WithoutCancel(ctx), recordName(o.Name), metav1.DeleteOptions{})
			}
		default:
		}
	}()
	state, err := d.follow(ctx, leading)
	select {
	case <-leading:
		err = <-ended
		return &Result{State: d.state, Findings: d.findings}, err
	default:
		return &Result{State: state}, err
	}
}

// follow shows what the driver on another machine does, until this one drives or the rollout has ended.
func (d *driver) follow(ctx context.Context, leading <-chan struct{}) (*State, error) {
	var step *progress.Step
	var last *State
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-leading:
			if step != nil {
				step.Done("it has stopped, continuing here")
			}
			return nil, nil
		case <-ctx.Done():
			if step != nil {
				step.Fail()
			}
			return last, context.Cause(ctx)
		case <-tick.C:
		}
		state, err := Get(ctx, d.Cluster, d.Namespace, d.Name)
		if err != nil {
			if ctx.Err() != nil {
				continue
			}
			return last, err
		}
		last = state
		if state.Phase.Ended() {
			if step != nil {
				step.Done("%s", state.Outcome())
			}
			return state, nil
		}
		if state.Driver == "" {
			continue
		}
		if step == nil {
			step = d.Steps.Start("%s drives the rollout of %s", state.Driver, d.Name)
		}
		step.Note("%s at %d %%", state.Phase, state.Weight)
	}
}

// createLease creates the Lease, so that a user without permission gets an error: the elector would only retry.
func createLease(ctx context.Context, o Options) error {
	state, err := o.Cluster.Client.CoreV1().ConfigMaps(o.Namespace).Get(ctx, recordName(o.Name), metav1.GetOptions{})
	if err != nil {
		return err
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: state.Name, Namespace: state.Namespace, Labels: state.Labels, OwnerReferences: state.OwnerReferences}}
	_, err = o.Cluster.Client.CoordinationV1().Leases(o.Namespace).Create(ctx, lease, metav1.CreateOptions{FieldManager: fieldManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the lease of the rollout: %w", err)
	}
	return nil
}

// identity returns a unique name of this process: the machine, the process, and a random suffix.
func identity() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s/%d-%s", host, os.Getpid(), utilrand.String(4))
}
