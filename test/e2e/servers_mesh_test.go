//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// Three servers, two agents, Istio, mutual TLS STRICT, and requests through the gateway to pods with sidecars on the other agent, without
// retries. None is lost when a server or the other agent's process is lost, and none of those to the pods of an agent that runs when the
// other one is lost.
func TestMeshOnServers(t *testing.T) {
	long(t, "TestServers loses servers without the mesh, TestAgents has pods on several nodes")
	ownNodes(t, 5)
	c := node.ClusterForTest(t)
	taint := []string{"--node-taint", "CriticalAddonsOnly=true:NoExecute"}
	first := c.AddForTest(t, node.Options{Args: append(taint, "--cluster-init", "--disable", "metrics-server,local-storage")})
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{first.Layout().ServerToken(), first.Layout().NodeToken()} {
		first.Eventually(t, 3*time.Minute, func() (bool, string) {
			_, err := os.Stat(file)
			return err == nil, fmt.Sprint(err)
		})
	}
	servers := []*node.Node{first}
	for range 2 {
		servers = append(servers, c.AddForTest(t, node.Options{Joins: first, Serves: true, Args: taint}))
	}
	agents := []*node.Node{c.AddForTest(t, node.Options{Joins: first}), c.AddForTest(t, node.Options{Joins: first})}
	for _, n := range append(servers[1:], agents...) {
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range append(servers, agents...) {
		n.WaitReady(t, 6*time.Minute)
	}
	first.Apply(t, meshOnServers(busyboxImage(t, first)))
	for _, name := range []string{"echo-node-4", "echo-node-5"} {
		first.Kubectl(t, "rollout", "status", "deployment/"+name, "-n", "e2e-mesh", "--timeout=3m")
	}
	// The gateway's pods answer at the address of their own node.
	first.Kubectl(t, "patch", "service", "istio-ingressgateway", "-n", "istio-system", "-p", `{"spec":{"externalTrafficPolicy":"Local"}}`)
	var gateway, other *node.Node
	first.Eventually(t, 2*time.Minute, func() (bool, string) {
		on := first.Kubectl(t, "get", "pods", "-n", "istio-system", "-l", "app=istio-ingressgateway", "-o", "jsonpath={.items[*].spec.nodeName}")
		addresses := first.Kubectl(t, "get", "service", "istio-ingressgateway", "-n", "istio-system", "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}")
		gateway, other = agents[0], agents[1]
		if !strings.Contains(on, "node-4") {
			gateway, other = other, gateway
		}
		return on != "" && strings.Contains(addresses, gateway.Address()), fmt.Sprintf("the gateway is on %q, and has the addresses %q", on, addresses)
	})
	near, far := "http://"+gateway.Address()+"/node-4", "http://"+gateway.Address()+"/node-5"
	if gateway == agents[1] {
		near, far = far, near
	}
	answer(t, first, near, far)

	total := 0
	lose := func(name string, urls []string, do func(t *testing.T, answers *stream)) {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			answers := sendRequests(ctx, first, 5*time.Millisecond, urls...)
			do(t, answers)
			cancel()
			answers.none(t, 100)
			total += answers.answered
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	both := []string{near, far}
	ready := func(t *testing.T, n *node.Node) { n.WaitReady(t, 4*time.Minute) }
	lose("a server is killed", both, func(t *testing.T, _ *stream) {
		if err := first.Kill(); err != nil {
			t.Fatal(err)
		}
		notReady(t, servers[1], "node-1")
		if err := first.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ready(t, first)
	})
	lose("a server without power", both, func(t *testing.T, _ *stream) {
		if err := c.PowerOff(servers[1]); err != nil {
			t.Fatal(err)
		}
		notReady(t, first, "node-2")
		if err := c.PowerOn(t.Context(), servers[1]); err != nil {
			t.Fatal(err)
		}
		ready(t, servers[1])
	})
	lose("a partition", both, func(t *testing.T, _ *stream) {
		others := []*node.Node{first, servers[1], agents[0], agents[1]}
		if err := c.Partition(servers[2], others...); err != nil {
			t.Fatal(err)
		}
		notReady(t, first, "node-3")
		if err := c.Heal(servers[2], others...); err != nil {
			t.Fatal(err)
		}
		ready(t, servers[2])
	})
	lose("the other agent's process", both, func(t *testing.T, answers *stream) {
		if err := other.Kill(); err != nil {
			t.Fatal(err)
		}
		answers.more(t, first, 1000) // its pods continue
		if err := other.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ready(t, other)
	})
	lose("the other agent without power", []string{near}, func(t *testing.T, _ *stream) {
		name := "node-5"
		if other == agents[0] {
			name = "node-4"
		}
		if err := c.PowerOff(other); err != nil {
			t.Fatal(err)
		}
		notReady(t, first, name)
		if err := c.PowerOn(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		ready(t, other)
	})
	if total < 10000 {
		t.Errorf("%d requests are fewer than 10,000", total)
	}
	t.Logf("%d requests in all", total)
}

// meshOnServers is a pod on each agent, with a sidecar, and the gateway's way to each, without retries.
func meshOnServers(image string) string {
	text := `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-mesh, labels: {istio-injection: enabled}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: echo, namespace: e2e-mesh}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: e2e-mesh}
spec:
  hosts: ["*"]
  gateways: [echo]
  http:
  - match: [{uri: {prefix: /node-4}}]
    retries: {attempts: 0}
    rewrite: {uri: /}
    route: [{destination: {host: echo-node-4, port: {number: 8000}}}]
  - match: [{uri: {prefix: /node-5}}]
    retries: {attempts: 0}
    rewrite: {uri: /}
    route: [{destination: {host: echo-node-5, port: {number: 8000}}}]
`
	for _, name := range []string{"node-4", "node-5"} {
		text += fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: echo-%[1]s, namespace: e2e-mesh}
spec:
  selector: {app: echo-%[1]s}
  ports: [{name: http, port: 8000, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo-%[1]s, namespace: e2e-mesh}
spec:
  selector: {matchLabels: {app: echo-%[1]s}}
  template:
    metadata: {labels: {app: echo-%[1]s}}
    spec:
      nodeSelector: {kubernetes.io/hostname: %[1]s}
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: %[2]s
        command: [sh, -c, "mkdir -p /tmp/w && echo ok >/tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w"]
        readinessProbe: {httpGet: {path: /, port: 8080}}
`, name, image)
	}
	return text
}
