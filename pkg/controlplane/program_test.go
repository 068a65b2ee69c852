//go:build integration

package controlplane_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// TestMain makes the test's own program what `polymesh kube-scheduler` is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && controlplane.IsProgram(os.Args[1]) {
		os.Exit(controlplane.RunProgram(os.Args[1], os.Args[2:]))
	}
	os.Exit(m.Run())
}

// With several servers, the controller manager and the scheduler are processes that elect a leader. One that ends is started again, and one
// that is stopped gives its lease up.
func TestPrograms(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	kubeconfig := controlplanetest.Start(t, log, "--data-dir", dir)
	client := controlplanetest.Client(t, kubeconfig)
	empty := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A process that was killed holds its lease for so long: by default fifteen seconds.
	args := []string{"-c", empty, "--data-dir", dir}
	for _, lease := range []string{"leader-elect-lease-duration=6s", "leader-elect-renew-deadline=4s"} {
		args = append(args, "--kube-controller-manager-arg", lease, "--kube-scheduler-arg", lease)
	}
	cfg, err := config.Parse(args, nil)
	if err != nil {
		t.Fatal(err)
	}
	o := controlplane.Options{Config: cfg, NodeIP: netip.MustParseAddr("192.0.2.1"), Certificates: certificate.Store(cfg.DataDir.TLS()), Datastore: datastore.Endpoint{LeaderElect: true}}
	for _, c := range []component.Component{
		controlplane.Separate(o, controlplane.NewControllerManager(o), log), controlplane.Separate(o, controlplane.NewScheduler(o), log),
	} {
		t.Run(c.Name(), func(t *testing.T) {
			t.Parallel()
			holder := func() (string, error) {
				lease, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(t.Context(), c.Name(), metav1.GetOptions{})
				if err != nil || lease.Spec.HolderIdentity == nil {
					return "", err
				}
				return *lease.Spec.HolderIdentity, nil
			}
			if err := c.Init(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := c.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			stop := func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if err := c.Stop(ctx); err != nil {
					t.Error(err)
				}
			}
			t.Cleanup(stop)
			controlplanetest.Eventually(t, "it is ready", func() error { return c.Ready(t.Context()) })
			controlplanetest.Eventually(t, "it leads", func() error {
				if who, err := holder(); err != nil || who == "" {
					return fmt.Errorf("the holder is %q: %w", who, err)
				}
				return nil
			})
			pid := c.(component.Process).PID()
			if pid == 0 || pid == os.Getpid() {
				t.Fatalf("its process is %d", pid)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			controlplanetest.Eventually(t, "it is started again", func() error {
				if again := c.(component.Process).PID(); again == 0 || again == pid {
					return errors.New("not yet")
				}
				return c.Ready(t.Context())
			})
			controlplanetest.Eventually(t, "it leads again", func() error {
				lease, err := client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(t.Context(), c.Name(), metav1.GetOptions{})
				if err == nil && (lease.Spec.LeaseTransitions == nil || *lease.Spec.LeaseTransitions == 0) {
					err = errors.New("not yet")
				}
				// client-go gives up a lease with the version that it has read last, which fails during a renewal. The first renewal
				// follows the acquisition immediately, and the next one two seconds later.
				if err == nil && !lease.Spec.RenewTime.After(lease.Spec.AcquireTime.Time) {
					err = errors.New("not renewed yet")
				}
				return err
			})
			stop()
			if who, err := holder(); err != nil || who != "" {
				t.Errorf("after the stop %q holds the lease (%v)", who, err)
			}
			if err := c.Ready(t.Context()); err == nil {
				t.Error("it is ready after the stop")
			}
		})
	}
}
