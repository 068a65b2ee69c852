//go:build e2e

package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/test/e2e/node"
)

// earlierArgs are those of the server whose data dir is in testdata/datadir-v1.tar.xz: the version whose kubelets had a
// certificate of the server's CA, and which labelled nodes itself. The archive has polymesh.json, server/db, server/tls
// and server/cred after testdata/datadir-v1.yaml was applied, without what a start unpacks and imports again.
func earlierArgs() []string {
	return []string{"--node-name", "earlier", "--disable", "istio", "--disable", "servicelb", "--secrets-encryption"}
}

// A data dir that an earlier version has left still works: its objects, its encrypted Secrets, its authorities and identities, and
// what has changed since is put in place.
func TestDataDirOfAnEarlierVersion(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{Args: earlierArgs()})
	archive, err := filepath.Abs("testdata/datadir-v1.tar.xz")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.DataDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tar", "-C", n.DataDir(), "-xJf", archive).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	authority := fileOf(t, n.Layout().TLS(), certificate.ServerCA+".crt")
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	if now := fileOf(t, n.Layout().TLS(), certificate.ServerCA+".crt"); now != authority {
		t.Error("the cluster's authority is another one")
	}
	client := n.Client(t)
	secret, err := client.CoreV1().Secrets("earlier").Get(t.Context(), "password", metav1.GetOptions{})
	if err != nil || string(secret.Data["password"]) != "correct horse" {
		t.Errorf("the Secret is %q (%v)", secret.Data, err)
	}
	n.WaitRollout(t, "earlier", "deployment/web")
	pods, err := client.CoreV1().Pods("earlier").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	running := false
	for _, p := range pods.Items {
		running = running || p.Status.Phase == corev1.PodRunning && p.Status.StartTime.After(secret.CreationTimestamp.Time)
	}
	if !running {
		t.Errorf("no pod of the Deployment runs: %v", pods.Items)
	}
	earlier, err := client.CoreV1().Nodes().Get(t.Context(), "earlier", metav1.GetOptions{})
	if err != nil || !earlier.CreationTimestamp.Before(&pods.Items[0].CreationTimestamp) || earlier.Labels["node-role.kubernetes.io/control-plane"] != "true" {
		t.Errorf("the node is %+v (%v)", earlier.ObjectMeta, err)
	}

	// The kubelet now has a certificate of its own CA, and the API server and metrics-server know that.
	block, _ := pem.Decode([]byte(fileOf(t, n.Layout().TLS(), certificate.KubeletServing+".crt")))
	if block == nil {
		t.Fatal("the kubelet has no certificate")
	}
	serving, err := x509.ParseCertificate(block.Bytes)
	if err != nil || !strings.Contains(serving.Issuer.CommonName, certificate.KubeletCA) {
		t.Errorf("the kubelet's certificate is from %q (%v)", serving.Issuer, err)
	}
	if out, err := n.KubectlErr("logs", "-n", "kube-system", "deployment/coredns", "--tail=1"); err != nil || out == "" {
		t.Errorf("kubectl logs: %v: %s", err, out)
	}
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		out, err := n.KubectlErr("top", "node", "earlier", "--no-headers")
		return err == nil && strings.Contains(out, "earlier"), out
	})
}

func fileOf(t *testing.T, dir, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
