//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// Three servers, two agents, Istio, and all five services of the guide's app, deployed as docs/guide.md says: with sidecars and mutual TLS
// STRICT, on both agents. None of the requests through the gateway, without retries, is lost when a server or the other agent's process is
// lost, and none of those to a pod of an agent that runs when the other one is lost.
func TestMeshOnServers(t *testing.T) {
	long(t, "TestServers loses servers without the mesh, TestAgents has pods on several nodes, TestPolyglot the app on one")
	ownNodes(t, 5)
	env := append(exampleImages(t, "all"), "DATABASE_URL=postgresql://user:pass@postgres.external:5432/mydb")
	c := node.ClusterForTest(t)
	taint := []string{"--node-taint", "CriticalAddonsOnly=true:NoExecute"}
	first := c.AddForTest(t, node.Options{Args: append(taint, "--cluster-init", "--mesh-profile", "demo", "--disable", "metrics-server,local-storage")})
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
	deployFive(t, first, example(t), env)
	// The gateway's pods answer at the address of their own node.
	first.Kubectl(t, "patch", "service", "istio-ingressgateway", "-n", "istio-system", "-p", `{"spec":{"externalTrafficPolicy":"Local"}}`)
	var gateway, other *node.Node
	var gatewayName, otherName string
	first.Eventually(t, 2*time.Minute, func() (bool, string) {
		on := first.Kubectl(t, "get", "pods", "-n", "istio-system", "-l", "app=istio-ingressgateway", "-o", "jsonpath={.items[*].spec.nodeName}")
		addresses := first.Kubectl(t, "get", "service", "istio-ingressgateway", "-n", "istio-system", "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}")
		gateway, other, gatewayName, otherName = agents[0], agents[1], "node-4", "node-5"
		if !strings.Contains(on, gatewayName) {
			gateway, other, gatewayName, otherName = other, gateway, otherName, gatewayName
		}
		return on != "" && strings.Contains(addresses, gateway.Address()), fmt.Sprintf("the gateway is on %q, and has the addresses %q", on, addresses)
	})
	first.Apply(t, meshOnServers(busyboxImage(t, first), gatewayName))
	first.Kubectl(t, "rollout", "status", "deployment/echo", "-n", "e2e-mesh", "--timeout=3m")
	near := "http://" + gateway.Address() + "/"
	answer(t, first, near)
	withoutRetries(t, first)

	chain := func() (bool, string) {
		status, text, err := ask(first.HTTP(false), gateway, http.MethodGet, appHost, "/api/v1/chain", nil)
		return err == nil && status == http.StatusOK && strings.Count(text, `"service"`) == len(chainOrder), fmt.Sprintf("the chain answers %d %s (%v)", status, text, err)
	}
	first.Eventually(t, 2*time.Minute, chain)
	t.Run("across nodes", func(t *testing.T) {
		for _, link := range chainOrder {
			refusesPlainText(t, first, appNamespace, link.service, link.port)
		}
		// From the gateway's pod on one agent to the app's on the other.
		first.Eventually(t, time.Minute, func() (bool, string) {
			if ok, what := chain(); !ok {
				return false, what
			}
			pods, arrived := 0, 0.0
			for _, p := range listPods(t, first, appNamespace, "") {
				if p.Spec.NodeName != gatewayName {
					pods++
					arrived += requestsOf(t, first, &p, map[string]string{
						"reporter": "destination", "source_workload": "istio-ingressgateway", "connection_security_policy": "mutual_tls", "response_code": "200",
					})
				}
			}
			return arrived > 0, fmt.Sprintf("%d of the app's pods run on the other agent, and %v requests of the gateway have arrived there", pods, arrived)
		})
	})

	const enough = 10_000
	total := int64(0)
	lose := func(name string, do func(t *testing.T, l *load)) {
		t.Run(name, func(t *testing.T) {
			l := startLoad(t, gateway, chainTraffic)
			l.wait(100)
			do(t, l)
			l.wait(l.sent.Load() + 100)
			l.end()
			total += l.sent.Load()
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	ready := func(t *testing.T, n *node.Node) { n.WaitReady(t, 4*time.Minute) }
	lose("a server is killed", func(t *testing.T, _ *load) {
		if err := first.Kill(); err != nil {
			t.Fatal(err)
		}
		notReady(t, servers[1], "node-1")
		if err := first.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ready(t, first)
	})
	lose("a server without power", func(t *testing.T, _ *load) {
		if err := c.PowerOff(servers[1]); err != nil {
			t.Fatal(err)
		}
		notReady(t, first, "node-2")
		if err := c.PowerOn(t.Context(), servers[1]); err != nil {
			t.Fatal(err)
		}
		ready(t, servers[1])
	})
	lose("a partition", func(t *testing.T, _ *load) {
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
	lose("the other agent's process", func(t *testing.T, l *load) {
		if err := other.Kill(); err != nil {
			t.Fatal(err)
		}
		l.wait(max(l.sent.Load()+1000, enough-total)) // its pods continue
		if err := other.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ready(t, other)
	})
	t.Logf("%d requests to the guide's app in all", total)

	// The app's pods that are on that one are lost with it.
	t.Run("the other agent without power", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		answers := sendRequests(ctx, first, 5*time.Millisecond, near)
		if err := c.PowerOff(other); err != nil {
			t.Fatal(err)
		}
		notReady(t, first, otherName)
		if err := c.PowerOn(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		ready(t, other)
		cancel()
		answers.none(t, 1000)
		for _, link := range chainOrder {
			first.WaitRollout(t, appNamespace, "deployment/"+link.service)
		}
		first.Eventually(t, 2*time.Minute, chain)
	})
}

// chainTraffic is requests to all five services. It leaves a machine of two cores enough time to start a server.
var chainTraffic = traffic{60, func(number int64) (method, path, body, want string) {
	if number%10 == 9 {
		return http.MethodGet, fmt.Sprintf("/api/v1/chain?number=%d", number), "", chainOrder[len(chainOrder)-1].service
	}
	return guideRequest(number)
}}

// meshOnServers is a pod with a sidecar on a node, and the gateway's way to it, without retries.
func meshOnServers(image, on string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: e2e-mesh, labels: {istio-injection: enabled}}
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
  - retries: {attempts: 0}
    route: [{destination: {host: echo, port: {number: 8000}}}]
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: e2e-mesh}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 8000, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo, namespace: e2e-mesh}
spec:
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
      nodeSelector: {kubernetes.io/hostname: %[2]s}
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: %[1]s
        command: [sh, -c, "mkdir -p /tmp/w && echo ok >/tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w"]
        readinessProbe: {httpGet: {path: /, port: 8080}}
`, image, on)
}
