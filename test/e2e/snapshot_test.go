//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/test/e2e/node"
)

const snapshotManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-snapshot}
---
apiVersion: v1
kind: Secret
metadata: {name: password, namespace: e2e-snapshot}
stringData: {password: hunter2}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: e2e-snapshot}
spec:
  replicas: 2
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: "` + echoImage + `"
        env: [{name: PASSWORD, valueFrom: {secretKeyRef: {name: password, key: password}}}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

// A machine with a cluster is lost. One file and one command bring the cluster to an empty machine with another name: the workload runs
// there, and encrypted Secrets can be read.
func TestSnapshot(t *testing.T) {
	ownNodes(t, 1) // the second one starts after the first one has lost its power
	args := []string{"--disable", "istio,metrics-server", "--secrets-encryption"}
	c := node.ClusterForTest(t)
	lost := c.AddForTest(t, node.Options{Args: args})
	fresh := c.AddForTest(t, node.Options{Args: args})
	if err := lost.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	lost.WaitReady(t, 3*time.Minute)
	importEcho(t, lost)
	lost.Apply(t, snapshotManifests)
	lost.WaitRollout(t, "e2e-snapshot", "deployment/server")

	passphrase := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(passphrase, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, printed, code := lost.Polymesh(t, "snapshot", "save", "--passphrase-file", passphrase, "-o", "json")
	var info snapshot.Info
	if err := json.Unmarshal([]byte(out), &info); code != 0 || err != nil || !info.Encrypted || info.Node != "node-1" {
		t.Fatalf("snapshot save ends with %d (%v): %s%s", code, err, out, printed)
	}
	if out, _, code := lost.Polymesh(t, "snapshot", "ls"); code != 0 || !strings.Contains(out, info.File) {
		t.Errorf("snapshot ls ends with %d:\n%s", code, out)
	}
	// While the server runs, nothing is restored.
	if _, printed, code := lost.Polymesh(t, "snapshot", "restore", "--yes", "--passphrase-file", passphrase, info.File); code != 1 || !strings.Contains(printed, "stop it first") {
		t.Errorf("a restore under a running server ends with %d: %s", code, printed)
	}
	file := filepath.Join(t.TempDir(), info.File)
	text, err := os.ReadFile(info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	lost.Kubectl(t, "create", "configmap", "later", "-n", "e2e-snapshot")
	if err := c.PowerOff(lost); err != nil {
		t.Fatal(err)
	}

	if _, printed, code := fresh.Polymesh(t, "snapshot", "restore", file); code != 1 || !strings.Contains(printed, "it is encrypted") {
		t.Errorf("without the passphrase it ends with %d: %s", code, printed)
	}
	if _, err := os.Stat(fresh.DataDir()); !os.IsNotExist(err) {
		t.Errorf("a refused restore has made a data dir: %v", err)
	}
	out, printed, code = fresh.Polymesh(t, "snapshot", "restore", "--passphrase-file", passphrase, file)
	if code != 0 || !strings.Contains(out, "PersistentVolumes") || !strings.Contains(out, "start the server") {
		t.Fatalf("snapshot restore ends with %d:\n%s%s", code, out, printed)
	}
	if err := fresh.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fresh.WaitReady(t, 4*time.Minute)
	importEcho(t, fresh)
	client := fresh.Client
	fresh.Eventually(t, 4*time.Minute, func() (bool, string) {
		d, err := client(t).AppsV1().Deployments("e2e-snapshot").Get(t.Context(), "server", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		pods, err := client(t).CoreV1().Pods("e2e-snapshot").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, p := range pods.Items {
			if why := node.NotReady(&p); why != "" || p.Spec.NodeName != "node-2" {
				return false, p.Name + " on " + p.Spec.NodeName + ": " + why
			}
		}
		return d.Status.ReadyReplicas == 2 && len(pods.Items) == 2, "the Deployment is not ready"
	})
	secret, err := client(t).CoreV1().Secrets("e2e-snapshot").Get(t.Context(), "password", metav1.GetOptions{})
	if err != nil || string(secret.Data["password"]) != "hunter2" {
		t.Errorf("the Secret is %v, %v", secret, err)
	}
	if _, err := client(t).CoreV1().ConfigMaps("e2e-snapshot").Get(t.Context(), "later", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("what came after the snapshot: %v", err)
	}
	if nodes := strings.TrimSpace(fresh.Kubectl(t, "get", "nodes", "-o", "name")); nodes != "node/node-2" {
		t.Errorf("the nodes are %q, want node/node-2", nodes)
	}
	fresh.WaitReady(t, 2*time.Minute)
}
