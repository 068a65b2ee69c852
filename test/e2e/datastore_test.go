//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/test/e2e/node"
)

const withoutAddons = "disable: [istio, servicelb, metrics-server, local-storage, observe]\n"

// settings writes the config file of a node, which its next start reads.
func settings(t *testing.T, file, more string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(withoutAddons+more), 0o600); err != nil {
		t.Fatal(err)
	}
}

// datastoreIs checks the line of `polymesh status`.
func datastoreIs(t *testing.T, n *node.Node, version string) {
	t.Helper()
	report, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range report.Components {
		if c.Name == "datastore" && !strings.HasPrefix(c.Version, version) {
			t.Errorf("the datastore is %q, want %s", c.Version, version)
		}
	}
}

// A server on SQLite becomes the first of several by one flag: its state is in etcd then, clients that know an old revision list again, and the
// controller manager can end without the server. A snapshot of it is restored on an empty machine, and moved back to SQLite there.
func TestClusterInit(t *testing.T) {
	ownNodes(t, 2)
	file := filepath.Join(t.TempDir(), "config.yaml")
	settings(t, file, "")
	cluster := node.ClusterForTest(t)
	n := cluster.AddForTest(t, node.Options{Observe: true, Args: []string{"--config", file}})
	fresh := cluster.AddForTest(t, node.Options{Observe: true, Args: []string{"--config", file}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	datastoreIs(t, n, "kine")
	maps := n.Client(t).CoreV1().ConfigMaps("default")
	made, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "before"}, Data: map[string]string{"a": "b"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pods := podUIDs(t, n)
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	settings(t, file, "cluster-init: true\n")
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	datastoreIs(t, n, "etcd")
	maps = n.Client(t).CoreV1().ConfigMaps("default")
	if now, err := maps.Get(t.Context(), "before", metav1.GetOptions{}); err != nil || now.UID != made.UID || now.Data["a"] != "b" {
		t.Errorf("the ConfigMap is %v (%v)", now, err)
	}
	watch, err := maps.Watch(t.Context(), metav1.ListOptions{ResourceVersion: made.ResourceVersion})
	if err == nil {
		event := <-watch.ResultChan()
		err = apierrors.FromObject(event.Object)
		watch.Stop()
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("a watch from before: %v", err)
	}
	if now := podUIDs(t, n); !slices.Equal(now, pods) {
		t.Errorf("the pods were %q, and are %q", pods, now)
	}
	if _, err := os.Stat(filepath.Join(n.DataDir(), "server", "db", "state.db.migrated")); err != nil {
		t.Error(err)
	}

	server := n.PID()
	report, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range report.Components {
		if c.Name != "kube-controller-manager" && c.Name != "kube-scheduler" {
			continue
		}
		if c.PID == 0 || c.PID == server {
			t.Errorf("%s is in process %d", c.Name, c.PID)
			continue
		}
		if err := syscall.Kill(c.PID, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	n.WaitReady(t, time.Minute)
	if n.PID() != server {
		t.Error("the server has ended with its controllers")
	}
	if stdout, stderr, code := n.Polymesh(t, "secrets-encrypt", "status", "--data-dir", n.DataDir()); code != 0 {
		t.Errorf("secrets-encrypt status with etcd: exit code %d: %s%s", code, stdout, stderr)
	}

	// The flag is needed once.
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	settings(t, file, "")
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	datastoreIs(t, n, "etcd")

	out, printed, code := n.Polymesh(t, "snapshot", "save", "-o", "json")
	var info snapshot.Info
	if err := json.Unmarshal([]byte(out), &info); code != 0 || err != nil || info.Datastore != "etcd" {
		t.Fatalf("snapshot save ends with %d (%v): %s%s", code, err, out, printed)
	}
	later, err := n.Client(t).CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "later"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	snapshotFile := filepath.Join(t.TempDir(), info.File)
	text, err := os.ReadFile(info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(snapshotFile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cluster.PowerOff(n); err != nil {
		t.Fatal(err)
	}
	if out, printed, code = fresh.Polymesh(t, "snapshot", "restore", "--config", file, snapshotFile); code != 0 || !strings.Contains(out, "start the server") {
		t.Fatalf("snapshot restore ends with %d:\n%s%s", code, out, printed)
	}
	// The restored cluster has what was saved, in etcd and then in SQLite, and no revision that a client of the lost one knows.
	restored := func(version string) {
		t.Helper()
		if err := fresh.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		fresh.WaitReady(t, 4*time.Minute)
		datastoreIs(t, fresh, version)
		maps := fresh.Client(t).CoreV1().ConfigMaps("default")
		if now, err := maps.Get(t.Context(), "before", metav1.GetOptions{}); err != nil || now.UID != made.UID {
			t.Errorf("the ConfigMap is %v (%v)", now, err)
		}
		if _, err := maps.Get(t.Context(), "later", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("what came after the snapshot: %v", err)
		}
		watch, err := maps.Watch(t.Context(), metav1.ListOptions{ResourceVersion: later.ResourceVersion})
		if err == nil {
			event := <-watch.ResultChan()
			err = apierrors.FromObject(event.Object)
			watch.Stop()
		}
		if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
			t.Errorf("a watch from the lost revision %s: %v", later.ResourceVersion, err)
		}
	}
	restored("etcd")
	if _, printed, code := fresh.Polymesh(t, "datastore", "move", "--config", file, "--to", "sqlite", "--yes"); code != 1 || !strings.Contains(printed, "stop it first") {
		t.Errorf("a move under a running server ends with %d: %s", code, printed)
	}
	if err := fresh.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, printed, code := fresh.Polymesh(t, "datastore", "move", "--config", file, "--to", "sqlite", "--yes"); code != 0 {
		t.Fatalf("datastore move ends with %d:\n%s%s", code, out, printed)
	}
	restored("kine")
}

// The cluster's state is in PostgreSQL, which is stopped and started under the running server. The password is in a file.
func TestPostgresDatastore(t *testing.T) {
	ownNodes(t, 2)
	c := node.ClusterForTest(t)
	file, file2 := filepath.Join(t.TempDir(), "config.yaml"), filepath.Join(t.TempDir(), "config.yaml")
	n := c.AddForTest(t, node.Options{Observe: true, Args: []string{"--config", file}})
	ca := newAuthority(t)
	db := startPostgres(t, n, ca, node.OutsideHost)
	caFile, endpoint := filepath.Join(t.TempDir(), "ca.crt"), filepath.Join(t.TempDir(), "endpoint")
	for path, text := range map[string]string{caFile: ca.pem(), endpoint: fmt.Sprintf("postgres://app:%s@%s:5432/cluster\n", db.password, node.OutsideHost)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The servers begin with nothing in common but a secret.
	secret := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(secret, []byte("chosen-by-the-user-0123456789\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	settings(t, file, "datastore-endpoint-file: "+endpoint+"\ndatastore-cafile: "+caFile+"\ntoken-file: "+secret+"\n")
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	datastoreIs(t, n, "kine")
	var server int
	n.Kubectl(t, "create", "configmap", "before", "--from-literal=a=b")

	// A second server finds the cluster in the database, while the first one is down.
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := c.AddForTest(t, node.Options{Observe: true, Args: []string{"--config", file2}})
	if err := os.WriteFile(file2, []byte("datastore-endpoint-file: "+endpoint+"\ndatastore-cafile: "+caFile+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errOut, code := second.Polymesh(t, "server", "--config", file2, "--data-dir", second.DataDir(), "--write-kubeconfig", second.Kubeconfig()); code == 0 || !strings.Contains(errOut, "the datastore holds a cluster: to join its servers, give --token-file") {
		t.Errorf("a second server without a token ends with %d: %s", code, errOut)
	}
	if err := os.WriteFile(file2, []byte("datastore-endpoint-file: "+endpoint+"\ndatastore-cafile: "+caFile+"\ntoken-file: "+secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := second.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	second.WaitReady(t, 4*time.Minute)
	if got := second.Kubectl(t, "get", "configmap", "before", "-o", "jsonpath={.data.a}"); got != "b" {
		t.Errorf("on the second server, the ConfigMap has %q", got)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	n.Kubectl(t, "wait", "--for=condition=Ready", "node/node-1", "node/node-2", "--timeout=60s")
	server = n.PID()

	db.stop(t)
	n.Eventually(t, time.Minute, func() (bool, string) {
		report, err := n.Report(t.Context())
		if err != nil {
			return false, err.Error()
		}
		for _, c := range report.Components {
			if c.Name == "datastore" && strings.Contains(c.Message, "PostgreSQL at "+node.OutsideHost) {
				return true, ""
			}
		}
		return false, "polymesh status does not show that the database is away"
	})
	db.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := n.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if err := second.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	if got := n.Kubectl(t, "get", "configmap", "before", "-o", "jsonpath={.data.a}"); got != "b" {
		t.Errorf("the ConfigMap has %q", got)
	}
	if n.PID() != server {
		t.Error("the server did not survive the database's stop")
	}
	log, err := os.ReadFile(n.Log())
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(log), db.password) {
		t.Error("the password is in the server's log")
	}
}
