//go:build integration

package controlplane_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
	"polymesh.dev/polymesh/pkg/porttest"
)

// On a full disk the API server refuses writes, the datastore is not ready and reports the reason, no acknowledged write is
// lost, and the control plane shuts down in order.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=128m", "polymesh-test", dir).CombinedOutput(); err != nil {
		t.Skipf("mounting is not possible on this machine: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	port := porttest.Loopback(t).Port()
	cfg, err := config.Parse([]string{"-c", "/dev/null", "-d", dir, "--bind-address", "127.0.0.1", "--https-listen-port", fmt.Sprint(port)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var log safeBuffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	ip := netip.MustParseAddr("192.0.2.1")
	db := datastore.New(datastore.Options{Dir: cfg.DataDir.Server("db"), Socket: datastoretest.Socket(t), Sync: cfg.DatastoreSync})
	m := component.NewManager(logger)
	certificates := m.Add(certificate.NewRenewal(certificate.Options{
		Dir: cfg.DataDir.Server("tls"), NodeName: "none", NodeIP: ip, ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain,
	}, func(s certificate.Store) error {
		return controlplane.WriteKubeconfigs(cfg, s, controlplane.URL(cfg), false)
	}, logger))
	store := m.Add(db)
	m.Add(controlplane.NewAPIServer(controlplane.Options{
		Config: cfg, NodeIP: ip, Certificates: certificate.Store(cfg.DataDir.Server("tls")), Datastore: db.Endpoint(),
	}), certificates, store)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	select {
	case <-m.Settled():
	case err := <-ended:
		t.Fatalf("the control plane has ended: %v", err)
	case <-time.After(2 * time.Minute):
		t.Fatalf("the control plane is not ready:\n%s", log.String())
	}

	rest, err := clientcmd.BuildConfigFromFlags("", cfg.DataDir.Kubeconfig("polymesh"))
	if err != nil {
		t.Fatal(err)
	}
	rest.QPS = -1
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		t.Fatal(err)
	}
	maps := client.CoreV1().ConfigMaps("default")
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = ballast.Write(make([]byte, 1<<20))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	// The database has free pages of its own for a few more writes.
	written := 0
	for ; written < 10000; written++ {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("m%d", written)}, Data: map[string]string{"value": strings.Repeat("x", 10000)}}
		if _, err = maps.Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "database space exceeded") {
		t.Errorf("after %d writes on a full disk: %v", written, err)
	}
	for _, s := range m.Status(t.Context()) {
		if s.Name == "datastore" && (s.State != component.NotReady || !strings.Contains(s.Message, "is full")) {
			t.Errorf("the datastore is %s: %s", s.State, s.Message)
		}
	}
	cancel()
	begin := time.Now()
	if err := <-ended; err != nil {
		t.Errorf("the control plane ended with %v", err)
	}
	t.Logf("stopped after %s, %d writes after the disk was full", time.Since(begin).Round(time.Millisecond), written)
	if strings.Contains(log.String(), "stop failed") {
		t.Errorf("a component did not stop in its time:\n%s", log.String())
	}
	if err := errors.Join(ballast.Close(), os.Remove(ballast.Name())); err != nil {
		t.Fatal(err)
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
