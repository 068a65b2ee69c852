//go:build integration

package encryption_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd/etcdtest"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/layout"
)

// TestServer is not a test: each server of the others is this test binary, because a process can have one control plane.
func TestServer(t *testing.T) { controlplanetest.ServeProcess(t) }

// machine is a server of several, which may run.
type machine struct {
	t    *testing.T
	name string
	dir  layout.DataDir
	args []string
	stop func()

	client  *kubernetes.Clientset
	cluster encryption.Cluster
}

// start starts the server, and waits until it is ready.
func (m *machine) start() {
	m.t.Helper()
	kubeconfig, stop := controlplanetest.StartProcess(m.t, m.args...)
	m.stop, m.client = stop, controlplanetest.Client(m.t, kubeconfig)
	endpoint, err := datastore.ReadEndpoint(m.dir.DatastoreEndpoint())
	if err != nil {
		m.t.Fatal(err)
	}
	m.cluster = encryption.Cluster{
		Place:      encryption.Place{File: m.dir.EncryptionFile(), Datastore: endpoint, BootstrapKey: m.dir.BootstrapKey(), Reload: controlplanetest.KeyReload},
		Kubeconfig: kubeconfig,
	}
}

func (m *machine) status() *encryption.Status {
	m.t.Helper()
	s, err := m.cluster.Status(m.t.Context())
	if err != nil {
		m.t.Fatalf("status on %s: %v", m.name, err)
	}
	return s
}

// create creates a Secret with its name as the password.
func (m *machine) create(name string) {
	m.t.Helper()
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"password": name}}
	if _, err := m.client.CoreV1().Secrets(metav1.NamespaceDefault).Create(m.t.Context(), s, metav1.CreateOptions{}); err != nil {
		m.t.Fatalf("create Secret %s on %s: %v", name, m.name, err)
	}
}

// reads checks that the server reads the Secrets, from the datastore and not from its cache.
func (m *machine) reads(names ...string) {
	m.t.Helper()
	for _, name := range names {
		s, err := m.client.CoreV1().Secrets(metav1.NamespaceDefault).Get(m.t.Context(), name, metav1.GetOptions{})
		if err != nil || string(s.Data["password"]) != name {
			m.t.Errorf("server %s reads Secret %s: %v, %v", m.name, name, s.Data, err)
		}
	}
	list, err := m.client.CoreV1().Secrets(metav1.NamespaceDefault).List(m.t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != len(names) {
		m.t.Errorf("server %s lists %d Secrets, want %d: %v", m.name, len(list.Items), len(names), err)
	}
}

// Several servers get each change of the keys in steps, so that each reads what the others write: also a server that joins, is away
// or was removed meanwhile, and after an interruption.
func TestSeveralServers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	outside := etcdtest.Cluster(t, slog.New(slog.DiscardHandler), "outside")[0]
	endpoint := outside.Endpoint()
	var machines []*machine
	add := func(name string) *machine {
		t.Helper()
		m := &machine{t: t, name: name, dir: layout.DataDir(t.TempDir())}
		m.args = []string{"--data-dir", string(m.dir), "--node-name", name, "--advertise-address", fmt.Sprint("192.0.2.", len(machines)+11), "--datastore-endpoint", endpoint.Servers,
			"--datastore-cafile", endpoint.CA, "--datastore-certfile", endpoint.Cert, "--datastore-keyfile", endpoint.Key}
		if len(machines) > 0 { // what a server's token opens
			if err := os.MkdirAll(filepath.Dir(m.dir.BootstrapKey()), 0o700); err != nil {
				t.Fatal(err)
			}
			key, err := bootstrap.ReadKey(machines[0].dir.BootstrapKey())
			if err != nil {
				t.Fatal(err)
			}
			db, err := endpoint.Client()
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			b, err := bootstrap.Store{Client: db}.Read(ctx, key)
			if err == nil {
				err = errors.Join(bootstrap.WriteKey(m.dir.BootstrapKey(), key), certificate.Import(certificate.Store(m.dir.TLS()), b.Authorities))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		machines = append(machines, m)
		m.start()
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{layout.ServerLabel: "true"}}}
		if _, err := m.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return m
	}
	one := add("one")
	controlplanetest.Eventually(t, "the bundle", func() error { _, err := one.cluster.Status(ctx); return err })
	two := add("two")
	// current waits until all servers have the same keys, and returns the status.
	current := func(m *machine, servers int) *encryption.Status {
		t.Helper()
		var s *encryption.Status
		controlplanetest.Eventually(t, "all servers have the keys", func() error {
			if s = m.status(); len(s.Servers) != servers {
				return fmt.Errorf("%+v, want %d servers", s.Servers, servers)
			}
			for _, server := range s.Servers {
				if server.State != encryption.Current || server.Hash != s.Hash {
					return fmt.Errorf("%+v, want %s", s.Servers, s.Hash)
				}
			}
			return nil
		})
		return s
	}
	current(one, 2)

	two.create("plain")
	if err := one.cluster.Enable(ctx, encryption.Secretbox); err != nil {
		t.Fatal(err)
	}
	first := current(two, 2)
	if !first.Enabled || len(first.Keys) != 1 || first.Plain != 0 || first.Unfinished || first.Keys[0].Secrets == 0 {
		t.Fatalf("encrypted: %+v", first)
	}
	one.create("by-one")
	two.create("by-two")
	if s := one.status(); s.Plain != 0 {
		t.Errorf("a server writes unencrypted Secrets: %+v", s)
	}

	// Interrupted before the new key is used: all still write with the old one.
	waiting, cut := context.WithCancel(ctx)
	broken := one.cluster
	broken.Waiting = func(string) { cut() }
	if err := broken.Rotate(waiting, encryption.AESCBC); err == nil {
		t.Fatal("the rotation was not interrupted")
	}
	prepared := two.status()
	if !prepared.Unfinished || len(prepared.Keys) != 2 || !prepared.Keys[0].Active || prepared.Keys[0].Name != first.Keys[0].Name || !prepared.Keys[1].Next || prepared.Keys[1].Secrets != 0 {
		t.Fatalf("an interrupted rotation: %+v", prepared)
	}
	one.create("between")
	// A server that joins meanwhile has the right keys, and the change waits for it too.
	three := add("three")
	three.reads("plain", "by-one", "by-two", "between")
	if err := two.cluster.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	second := current(one, 3)
	if len(second.Keys) != 1 || second.Keys[0].Name != prepared.Keys[1].Name || second.Keys[0].Provider != encryption.AESCBC || second.Plain != 0 || second.Unfinished {
		t.Errorf("completed by another server: %+v", second)
	}
	three.create("by-three")
	all := []string{"plain", "by-one", "by-two", "between", "by-three"}
	for _, m := range machines {
		m.reads(all...)
	}

	// Nothing changes while a server is away.
	stale, err := os.ReadFile(three.dir.EncryptionFile())
	if err != nil {
		t.Fatal(err)
	}
	three.stop()
	if err := one.cluster.Rotate(ctx, ""); err == nil || !strings.Contains(err.Error(), "three is away: start it, or remove it with `polymesh node remove three`") {
		t.Errorf("a rotation without server three: %v", err)
	}
	if s := one.status(); s.Unfinished || len(s.Keys) != 1 || s.Keys[0].Name != second.Keys[0].Name {
		t.Errorf("after a rotation that was refused: %+v", s)
	}
	three.start()
	current(one, 3)

	// A server that is lost once all write with the new key does not keep the rotation from its end. It has the keys when it comes back, also
	// with an old file.
	rotating := one.cluster
	lost := false
	rotating.Progress = func(int, int) {
		if !lost {
			lost = true
			three.stop()
		}
	}
	if err := rotating.Rotate(ctx, ""); err != nil {
		t.Fatal(err)
	}
	one.create("without-three")
	all = append(all, "without-three")
	third := two.status()
	if len(third.Keys) != 1 || third.Keys[0].Name == second.Keys[0].Name || third.Unfinished {
		t.Errorf("a rotation that lost a server: %+v", third)
	}
	if err := os.WriteFile(three.dir.EncryptionFile(), stale, 0o600); err != nil {
		t.Fatal(err)
	}
	three.start()
	three.reads(all...)
	current(one, 3)

	// One that was removed does not count.
	three.stop()
	if err := one.client.CoreV1().Nodes().Delete(ctx, "three", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := two.cluster.Disable(ctx); err != nil {
		t.Fatal(err)
	}
	last := current(one, 2)
	if last.Enabled || len(last.Keys) != 0 || last.Plain == 0 || last.Unfinished {
		t.Errorf("decrypted: %+v", last)
	}
	for _, m := range machines[:2] {
		m.reads(all...)
	}
}
