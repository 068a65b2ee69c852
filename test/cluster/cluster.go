// Package cluster gives integration tests a control plane without nodes: datastore, API server, controllers and scheduler of
// this program, in the test's own process.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/datastore"
)

// Start returns an administrator's kubeconfig of a new cluster, which ends with the test.
func Start(t testing.TB, log *slog.Logger) (kubeconfig string) {
	t.Helper()
	dir := t.TempDir()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	flags := config.ServerFlags()
	if err := flags.Parse([]string{"--data-dir", dir, "--bind-address", "127.0.0.1", "--https-listen-port", fmt.Sprint(port), "--write-kubeconfig", filepath.Join(dir, "kubeconfig")}); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Server(nil)
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("192.0.2.1")
	renewal := certificate.NewRenewal(certificate.Options{Dir: cfg.ServerDir("tls"), NodeName: "none", NodeIP: ip, ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain},
		func(s certificate.Store) error {
			return errors.Join(
				s.WriteKubeconfig(controlplane.Kubeconfig(cfg, "polymesh"), certificate.Polymesh, controlplane.URL(cfg)),
				s.WriteKubeconfig(controlplane.Kubeconfig(cfg, "kube-controller-manager"), certificate.ControllerManager, controlplane.URL(cfg)),
				s.WriteKubeconfig(controlplane.Kubeconfig(cfg, "kube-scheduler"), certificate.Scheduler, controlplane.URL(cfg)))
		}, log)
	if err := renewal.Ensure(time.Now()); err != nil {
		t.Fatal(err)
	}
	db := datastore.New(cfg.ServerDir("db"), filepath.Join(dir, "kine.sock"))
	plane := controlplane.Options{Config: cfg, NodeIP: ip, Certificates: certificate.Store(cfg.ServerDir("tls")), EtcdEndpoint: db.Endpoint()}
	m := component.NewManager(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	m.Add(db)
	m.Add(controlplane.NewAPIServer(plane), "datastore")
	m.Add(controlplane.NewControllerManager(plane), "kube-apiserver")
	m.Add(controlplane.NewScheduler(plane), "kube-apiserver")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-m.Settled():
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	case <-time.After(time.Minute):
		t.Fatal("no control plane after a minute")
	}
	return controlplane.Kubeconfig(cfg, "polymesh")
}
