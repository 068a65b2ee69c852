//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

const policyNamespace = "e2e-policy"

// NetworkPolicies are in force from a pod's first packet on, and the status shows them. That all kinds of rules work is shown by the
// tests next to the code, and by upstream's own (make conformance-network-policy).
func TestNetworkPolicy(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	const namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + policyNamespace + "}\n"
	t.Cleanup(func() { n.Delete(t, namespace) })
	n.Apply(t, namespace+`
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: `+policyNamespace+`, labels: {app: echo}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "`+echoImage+`", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
`)
	readyPod(t, n, policyNamespace, "echo")
	address := n.Kubectl(t, "get", "pod", "-n", policyNamespace, "echo", "-o", "jsonpath={.status.podIP}")
	n.Apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: echo, namespace: `+policyNamespace+`}
spec:
  podSelector: {matchLabels: {app: echo}}
  ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}], ports: [{port: 8080}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: locked, namespace: `+policyNamespace+`}
spec: {podSelector: {matchLabels: {locked: "yes"}}, policyTypes: [Egress]}
`)
	n.Eventually(t, time.Minute, func() (bool, string) {
		out, code := n.Status(t)
		const want = "2 NetworkPolicies are enforced, for 1 pod of this node"
		return code == 0 && strings.Contains(out, want), fmt.Sprintf("polymesh status: code %d, want %q in\n%s", code, want, out)
	})
	for _, c := range []struct{ name, labels, want string }{
		{"friend", "{role: friend}", "reached"},
		{"stranger", "{role: stranger}", "blocked"},
		{"locked", "{role: friend, locked: 'yes'}", "blocked"},
	} {
		t.Run(c.name, func(t *testing.T) { firstPacket(t, n, c.name, c.labels, address, c.want) })
	}
	// The probes of the kubelet come from the node, and are always allowed.
	readyPod(t, n, policyNamespace, "echo")
}

// firstPacket starts a pod that calls the address before it does anything else.
func firstPacket(t *testing.T, n *node.Node, name, labels, address, want string) {
	n.Apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: `+name+`, namespace: `+policyNamespace+`, labels: `+labels+`}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: caller
    image: "`+busyboxImage(t, n)+`"
    command: [sh, -c, "read a x </proc/uptime; r=blocked; wget -T 4 -q -O /dev/null http://`+address+`:8080/healthz 2>/dev/null && r=reached; read b x </proc/uptime; echo $r from $a to $b"]
`)
	n.Eventually(t, time.Minute, func() (bool, string) {
		phase := n.Kubectl(t, "get", "pod", "-n", policyNamespace, name, "-o", "jsonpath={.status.phase}")
		return phase == "Succeeded", fmt.Sprintf("pod %s is %s", name, phase)
	})
	got := strings.TrimSpace(n.Kubectl(t, "logs", "-n", policyNamespace, name))
	t.Log(got) // in seconds
	if !strings.HasPrefix(got, want+" ") {
		t.Errorf("the first call of pod %s is %q, want %s", name, got, want)
	}
}
