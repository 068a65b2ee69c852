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
	// leaseTime is how long the lease of a driver that is gone holds; a driver renews it every renewTime and stops when it could
	// not for stopTime.
	leaseTime = 10 * time.Second
	stopTime  = 6 * time.Second
	renewTime = 2 * time.Second
)

// errDisplaced means that this process may not drive any more.
var errDisplaced = errors.New("the API server did not answer for a while, so another machine may go on with the rollout; this one has stopped")

// join takes part in the rollout until it ends: it drives when no other process does, and shows what happens meanwhile.
func join(ctx context.Context, o Options) (*Result, error) {
	if err := makeLease(ctx, o); err != nil {
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
	// The lease is given back after the driver has stopped, not when it is asked to stop.
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
				// One that stays behind is found by the next rollout, or goes with the Deployment.
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

// follow shows what the driver on another machine does, until this one leads or the rollout has ended.
func (d *driver) follow(ctx context.Context, leading <-chan struct{}) (*State, error) {
	var step *progress.Step
	var last *State
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-leading:
			if step != nil {
				step.Done("it has stopped, going on here")
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

// makeLease makes the Lease, so that a user who may not gets an error: the elector would only retry.
func makeLease(ctx context.Context, o Options) error {
	state, err := o.Cluster.Client.CoreV1().ConfigMaps(o.Namespace).Get(ctx, recordName(o.Name), metav1.GetOptions{})
	if err != nil {
		return err
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: state.Name, Namespace: state.Namespace, Labels: state.Labels, OwnerReferences: state.OwnerReferences}}
	_, err = o.Cluster.Client.CoordinationV1().Leases(o.Namespace).Create(ctx, lease, metav1.CreateOptions{FieldManager: fieldManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make the lease of the rollout: %w", err)
	}
	return nil
}

// identity names this process to others: the machine, the process on it, and something that no other has.
func identity() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s/%d-%s", host, os.Getpid(), utilrand.String(4))
}
