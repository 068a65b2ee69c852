//go:build integration

package server

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/layout"
)

// What a server that finds the others in the datastore may do, by what a real API server has written there.
func admissibleServers(t *testing.T, kubeconfig string) {
	ctx := t.Context()
	dir := layout.DataDir(filepath.Dir(filepath.Dir(filepath.Dir(kubeconfig))))
	admin := controlplanetest.Client(t, kubeconfig)
	endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	client, err := endpoint.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	store := bootstrap.Store{Client: client, LeaseLife: 5 * time.Second}
	wantRefused := func(what string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}

	// A server that runs, of a version before: it has no id.
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "one", Labels: map[string]string{layout.ServerLabel: "true"}}}
	if _, err := admin.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := store.Record(ctx, "one", func(r *bootstrap.Server) { r.Version, r.Started = "v1.36.3+polymesh1", time.Now() }); err != nil {
		t.Fatal(err)
	}
	// One that is gone, and was started earlier, counts for nothing.
	if err := store.Record(ctx, "gone", func(r *bootstrap.Server) { r.Version, r.Started = "v1.34.1", time.Now().AddDate(-1, 0, 0) }); err != nil {
		t.Fatal(err)
	}
	// Until stop is called, its kubelet renews its Lease by a clock that is ahead.
	runs := func(ahead time.Duration) (stop func()) {
		t.Helper()
		leases := admin.CoordinationV1().Leases(corev1.NamespaceNodeLease)
		renew := func(ctx context.Context) error {
			now := metav1.NewMicroTime(time.Now().Add(ahead))
			l, err := leases.Get(ctx, "one", metav1.GetOptions{})
			if err != nil {
				_, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "one"}, Spec: coordinationv1.LeaseSpec{RenewTime: &now}}, metav1.CreateOptions{})
				return err
			}
			l.Spec.RenewTime = &now
			_, err = leases.Update(ctx, l, metav1.UpdateOptions{})
			return err
		}
		controlplanetest.Eventually(t, "the Lease is renewed", func() error { return renew(ctx) })
		renewing, cancel := context.WithCancel(ctx)
		var kubelet sync.WaitGroup
		kubelet.Go(func() {
			every := time.NewTicker(300 * time.Millisecond)
			defer every.Stop()
			for {
				select {
				case <-renewing.Done():
					return
				case <-every.C:
					if err := renew(renewing); err != nil && renewing.Err() == nil {
						t.Log(err)
					}
				}
			}
		})
		stop = sync.OnceFunc(func() { cancel(); kubelet.Wait() })
		t.Cleanup(stop)
		return stop
	}

	stop := runs(0)
	for i, version := range []string{"v1.36.3+polymesh1", "v1.36.9"} {
		if err := admissible(ctx, store, fmt.Sprint("new-", i), "A", version); err != nil {
			t.Errorf("a new server with %s: %v", version, err)
		}
	}
	for _, version := range []string{"v1.37.0", "v1.34.1"} {
		wantRefused("a server with "+version, admissible(ctx, store, "other-version", "A", version), "servers must have the same minor version")
	}
	// A clone of the machine, also of one whose server has an id.
	for range 2 {
		err := admissible(ctx, store, "one", "CLONE", "v1.36.3")
		var taken *bootstrap.TakenError
		if wantRefused("a clone", err, "another machine runs as server one of this cluster"); !errors.As(err, &taken) {
			t.Errorf("a clone: %T", err)
		}
		// An upgrade gives the data dir an id, while the Lease may be fresh.
		if err := store.Take(ctx, "one", "FIRST", true); err != nil {
			t.Fatal(err)
		}
	}
	// It was interrupted, and starts again.
	if err := errors.Join(admissible(ctx, store, "one", "FIRST", "v1.36.3"), store.Take(ctx, "one", "FIRST", true), store.Holds(ctx, "one", "FIRST")); err != nil {
		t.Error(err)
	}
	// Restored on another machine, while the first one runs.
	wantRefused("a copy of the data dir without its id", store.Take(ctx, "one", "COPY", true), "another machine runs as server one")
	stop()

	for _, off := range []time.Duration{10 * time.Minute, -10 * time.Minute} {
		stop := runs(off)
		wantRefused(fmt.Sprintf("a machine whose clock differs by %s", off), admissible(ctx, store, "late", "A", "v1.36.3"), "this machine's clock shows")
		stop()
	}
	// While no server runs, there is no clock to compare with. Nothing of it was recorded.
	if r, err := store.Server(ctx, "late"); err != nil || r.Name != "" {
		t.Errorf("%+v, %v", r, err)
	}
	if err := admissible(ctx, store, "late", "A", "v1.36.3"); err != nil {
		t.Error(err)
	}
	// The machine is set up again, or a snapshot restored on another one. If the former starts again, it is not the server any more.
	if err := admissible(ctx, store, "one", "SECOND", "v1.36.3"); err != nil {
		t.Error(err)
	}
	if err := store.Take(ctx, "one", "THIRD", true); err != nil {
		t.Error(err)
	}
	wantRefused("the former machine", store.Holds(ctx, "one", "FIRST"), "another machine runs as server one")
	if r, err := store.Server(ctx, "one"); err != nil || r.ID != "THIRD" || r.Version != "v1.36.3+polymesh1" {
		t.Errorf("%+v, %v", r, err)
	}
	// Of two clones that join at the same time, one waits for the other's node, which registers.
	registered := time.AfterFunc(time.Second, func() {
		_, err := admin.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "new-0"}}, metav1.CreateOptions{})
		if err != nil {
			t.Error(err)
		}
	})
	defer registered.Stop()
	wantRefused("the other clone", store.Take(ctx, "new-0", "B", false), "another machine runs as server new-0")
	// An agent's name stays refused.
	if _, err := admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	wantRefused("the name of an agent", admissible(ctx, store, "worker", "A", "v1.36.3"), "the cluster has a node worker already, which is no server")
	// A machine that is set up again may have a later version, as with an upgrade, if no other server is there.
	for _, name := range []string{"one", "gone"} {
		r, err := store.Server(ctx, name)
		if err := errors.Join(err, store.Forget(ctx, r)); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Record(ctx, "again", func(r *bootstrap.Server) { r.Version, r.Started = "v1.34.1", time.Now() }); err != nil {
		t.Fatal(err)
	}
	if err := admissible(ctx, store, "again", "A", "v1.36.3"); err != nil {
		t.Error(err)
	}
}
