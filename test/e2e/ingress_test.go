//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"strconv"
	"testing"
	"time"
)

const ingressNamespace = "e2e-ingress"

// The IngressClass is as Istio's documentation has it; Istio installs none.
const ingressManifests = `
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {name: istio}
spec: {controller: istio.io/ingress-controller}
---
apiVersion: v1
kind: Namespace
metadata: {name: ` + ingressNamespace + `, labels: {istio-injection: enabled}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: ` + ingressNamespace + `}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: ` + ingressNamespace + `}
spec: {selector: {app: shop}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop, namespace: ` + ingressNamespace + `}
spec:
  ingressClassName: istio
  rules:
  - host: shop.test
    http:
      paths:
      - {path: /cart, pathType: Prefix, backend: {service: {name: shop, port: {number: 80}}}}
`

func TestIngress(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	t.Cleanup(func() { n.Delete(t, ingressManifests) })
	n.Apply(t, ingressManifests)
	n.WaitRollout(t, ingressNamespace, "deployment/shop")
	client := n.HTTP(false)
	n.Eventually(t, time.Minute, func() (bool, string) {
		status, text, err := ask(client, n, http.MethodGet, "shop.test", "/cart/1", nil)
		if err != nil || status != http.StatusOK {
			return false, fmt.Sprintf("status %d %s, %v", status, text, err)
		}
		r, err := parseReply(text)
		return err == nil && r.Path == "/cart/1", fmt.Sprintf("%+v %v", r, err)
	})
	// What the Ingress does not name is not there, and the app's own routes stay.
	for target, want := range map[[2]string]int{
		{"shop.test", "/other"}:        http.StatusNotFound,
		{"unknown.test", "/cart/1"}:    http.StatusNotFound,
		{appHost, "/api/v1/gateway"}:   http.StatusOK,
		{"shop.test", "/cart?a=b"}:     http.StatusOK,
		{"shop.test", "/cartography"}:  http.StatusNotFound,
		{"shop.test:80", "/cart/with"}: http.StatusOK,
	} {
		if status, text, err := ask(client, n, http.MethodGet, target[0], target[1], nil); err != nil || status != want {
			t.Errorf("http://%s%s: status %d %s %v, want %d", target[0], target[1], status, text, err, want)
		}
	}
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		address := n.Kubectl(t, "get", "ingress", "shop", "-n", ingressNamespace, "-o", "jsonpath={.status.loadBalancer.ingress[0].ip}")
		return address == n.Address(), fmt.Sprintf("kubectl get ingress shows the address %q, want the gateway's, %s", address, n.Address())
	})
}

func TestNodePort(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	const manifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-nodeport}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: e2e-nodeport, labels: {app: server}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: e2e-nodeport}
spec: {type: NodePort, selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
`
	t.Cleanup(func() { n.Delete(t, manifests) })
	n.Apply(t, manifests)
	readyPod(t, n, "e2e-nodeport", "server")
	text := n.Kubectl(t, "get", "service", "server", "-n", "e2e-nodeport", "-o", "jsonpath={.spec.ports[0].nodePort}")
	port, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("the Service has the node port %q", text)
	}
	n.Eventually(t, time.Minute, func() (bool, string) { return echoes(n, port) })
}
