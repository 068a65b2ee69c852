//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const loadBalancerManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-lb}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: e2e-lb, labels: {app: server}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
`

func loadBalancer(name string, port int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: e2e-lb}
spec:
  type: LoadBalancer
  selector: {app: server}
  ports: [{port: %d, targetPort: 8080}]
`, name, port)
}

func TestLoadBalancer(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	t.Cleanup(func() { n.Delete(t, loadBalancerManifests) })
	n.Apply(t, loadBalancerManifests)
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/server", "-n", "e2e-lb", "--timeout=120s")

	n.Apply(t, loadBalancer("first", 8081))
	n.Eventually(t, 30*time.Second, func() (bool, string) {
		address := ingress(t, n, "first")
		return address == n.Address(), fmt.Sprintf("the service has %q", address)
	})
	n.Eventually(t, 30*time.Second, func() (bool, string) { return echoes(n, 8081) })

	for name, claim := range map[string]struct {
		port         int
		reason, says string
	}{
		"gateways-port": {80, "PortTaken", "istio-system/istio-ingressgateway"},
		"firsts-port":   {8081, "PortTaken", "e2e-lb/first"},
		"api-port":      {6443, "PortInUse", "kube-apiserver"},
		"ssh-port":      {22, "PortInUse", "SSH"},
		"kubelets-port": {10250, "PortInUse", "kubelet"},
	} {
		t.Run(name, func(t *testing.T) {
			n.Apply(t, loadBalancer(name, claim.port))
			n.Eventually(t, 30*time.Second, func() (bool, string) {
				events := n.Kubectl(t, "get", "events", "-n", "e2e-lb", "--field-selector", "involvedObject.name="+name+",reason="+claim.reason,
					"-o", "jsonpath={.items[*].message}")
				return strings.Contains(events, claim.says), fmt.Sprintf("no event %s that says %q: %q", claim.reason, claim.says, events)
			})
			if address := ingress(t, n, name); address != "" {
				t.Errorf("the service has %s", address)
			}
		})
	}
	// No one was disturbed by the claims.
	if ok, what := echoes(n, 8081); !ok {
		t.Error(what)
	}
	if status, _, err := ask(n.HTTP(false), n, http.MethodGet, appHost, "/api/v1/call-go", nil); err != nil || status != http.StatusOK {
		t.Errorf("the gateway on port 80: status %d, %v", status, err)
	}
	n.Kubectl(t, "delete", "service", "first", "-n", "e2e-lb")
	n.Eventually(t, 30*time.Second, func() (bool, string) {
		address := ingress(t, n, "firsts-port")
		return address == n.Address(), fmt.Sprintf("the port is free, but the service that waited for it has %q", address)
	})
	n.Eventually(t, 30*time.Second, func() (bool, string) { return echoes(n, 8081) })
}

func echoes(n *node.Node, port int) (bool, string) {
	resp, err := n.HTTP(false).Get(fmt.Sprintf("http://%s:%d/", n.Address(), port))
	if err != nil {
		return false, err.Error()
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK, fmt.Sprintf("port %d: %s", port, resp.Status)
}

func ingress(t *testing.T, n *node.Node, name string) string {
	t.Helper()
	service, err := n.Client(t).CoreV1().Services("e2e-lb").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range service.Status.LoadBalancer.Ingress {
		return in.IP
	}
	return ""
}
