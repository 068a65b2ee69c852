//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A NetworkPolicy does nothing yet. Whoever makes one is told so by kubectl and by a deploy, and the administrator by the status.
func TestNetworkPolicyIsNotEnforced(t *testing.T) {
	n := app(t)
	const namespace = "e2e-policy"
	const policy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`
	const warning, note = "this NetworkPolicy is stored and not enforced", "1 NetworkPolicy is stored and not enforced"
	dir := filepath.Join(t.TempDir(), "policies")
	if err := os.MkdirAll(filepath.Join(dir, "k8s"), 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"polymesh.yaml":      "apiVersion: polymesh.dev/v1\nkind: Project\nname: policies\nnamespace: " + namespace + "\n",
		"k8s/namespace.yaml": "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + namespace + "}\n",
		"k8s/policy.yaml":    policy,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { n.Polymesh(t, "undeploy", "--delete-namespace", dir) })
	out, said, code := n.Polymesh(t, "deploy", dir)
	if code != 0 || !strings.Contains(out+said, "k8s/policy.yaml:2: warning: ") || !strings.Contains(out+said, warning) {
		t.Errorf("polymesh deploy says nothing of it: code %d, %s%s", code, out, said)
	}
	_, said, code = n.Polymesh(t, "kubectl", "label", "networkpolicy", "deny-all", "-n", namespace, "a=b")
	if code != 0 || !strings.Contains(said, "Warning: ") || !strings.Contains(said, warning) {
		t.Errorf("kubectl says nothing of it: code %d, %s", code, said)
	}
	n.Eventually(t, time.Minute, func() (bool, string) {
		out, code := n.Status(t)
		return code == 0 && strings.Contains(out, note), fmt.Sprintf("polymesh status: code %d, want %q in\n%s", code, note, out)
	})
}
