//go:build integration

package leader

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// work counts the servers that do the leader's work at the same time.
type work struct {
	on     *atomic.Int32
	most   *atomic.Int32
	active atomic.Bool
}

func (w *work) Name() string               { return "work" }
func (w *work) Init(context.Context) error { return nil }
func (w *work) Start(context.Context) error {
	w.most.Store(max(w.most.Load(), w.on.Add(1)))
	w.active.Store(true)
	return nil
}
func (w *work) Ready(context.Context) error { return nil }
func (w *work) Stop(context.Context) error {
	if w.active.Swap(false) {
		w.on.Add(-1)
	}
	return nil
}

// Of two servers one works. The other takes over at once when the first stops, and when the first has lost the Lease.
func TestOneWorks(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	kubeconfig := controlplanetest.Start(t, log)
	client := controlplanetest.Client(t, kubeconfig)
	var on, most atomic.Int32
	type server struct {
		leader *Leader
		work   component.Component
		m      *component.Manager
		stop   context.CancelFunc
		done   chan error
	}
	start := func(identity string) *server {
		s := &server{leader: New(Options{Identity: identity, Kubeconfig: kubeconfig, Duration: 3 * time.Second, Log: log}), done: make(chan error, 1)}
		s.m = component.NewManager(log)
		s.work = component.Elected(s.leader, func() component.Component { return &work{on: &on, most: &most} }, log)
		s.m.Add(s.work, s.m.Add(s.leader))
		ctx, cancel := context.WithCancel(context.Background())
		s.stop = cancel
		go func() { s.done <- s.m.Run(ctx) }()
		t.Cleanup(cancel)
		return s
	}
	holder := func(want string) {
		t.Helper()
		controlplanetest.Eventually(t, "the Lease is held by "+want, func() error {
			lease, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(t.Context(), Lease, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if h := lease.Spec.HolderIdentity; h == nil || *h != want || on.Load() != 1 {
				return errors.New("not yet")
			}
			return nil
		})
	}
	one := start("one")
	holder("one")
	two := start("two")
	<-two.m.Settled() // a server that is not the leader is up too
	one.stop()
	if err := <-one.done; err != nil {
		t.Fatal(err)
	}
	holder("two")

	// Another process takes the Lease, as happens when this one could not renew it in time.
	patch := []byte(`{"spec":{"holderIdentity":"three","leaseDurationSeconds":3}}`)
	if _, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Patch(t.Context(), Lease, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the one that has lost the Lease stops", func() error {
		if n := on.Load(); n != 0 {
			return errors.New("still leading")
		}
		return nil
	})
	holder("two") // three's Lease is not renewed
	two.stop()
	if err := <-two.done; err != nil {
		t.Fatal(err)
	}
	if n := most.Load(); n != 1 {
		t.Errorf("%d worked at the same time", n)
	}
}
