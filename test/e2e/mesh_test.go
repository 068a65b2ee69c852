//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// echoReply is what the echo image reports about a request.
type echoReply struct {
	Method  string
	Path    string
	Headers map[string][]string
	Body    string
	Version string
	Pod     string
	Attempt int
	Host    string
	// Called is the answer to /call's own call.
	Called json.RawMessage
}

func parseReply(text string) (echoReply, error) {
	var r echoReply
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return r, fmt.Errorf("the response is not from echo: %w: %q", err, text)
	}
	return r, nil
}

// clientCert returns the certificate header of a request, which the server's sidecar writes.
func (r echoReply) clientCert() string {
	for name, values := range r.Headers {
		if strings.EqualFold(name, "x-forwarded-client-cert") {
			return strings.Join(values, ",")
		}
	}
	return ""
}

// Two namespaces: in the first one pods get sidecars, in the second one they do not.
const meshManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-mesh, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: e2e-plain}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: server, namespace: e2e-mesh}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: client, namespace: e2e-mesh}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: e2e-mesh, labels: {app: server}}
spec:
  serviceAccountName: server
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: e2e-mesh, labels: {app: client}}
spec:
  serviceAccountName: client
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `"}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: e2e-plain, labels: {app: server}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `"}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: e2e-mesh}
spec:
  selector: {app: server}
  ports:
  - {name: http, port: 8080}
  - {name: grpc, port: 9090}
  - {name: tcp, port: 9000}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: e2e-plain}
spec:
  selector: {app: server}
  ports:
  - {name: http, port: 8080}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: e2e-mesh}
spec:
  hosts: [echo.example.com]
  gateways: [istio-system/main-gateway]
  http:
  - route:
    - destination: {host: server, port: {number: 8080}}
`

const permissive = `
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: permissive, namespace: e2e-mesh}
spec: {mtls: {mode: PERMISSIVE}}
`

// The app's manifests make mutual TLS STRICT for the whole mesh.
func TestStrict(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	t.Cleanup(func() { n.Delete(t, meshManifests) })
	n.Apply(t, meshManifests)
	for _, namespace := range []string{"e2e-mesh", "e2e-plain"} {
		n.Kubectl(t, "wait", "--for=condition=Ready", "pod", "--all", "-n", namespace, "--timeout=120s")
	}
	const (
		serverID  = "spiffe://cluster.local/ns/e2e-mesh/sa/server"
		clientID  = "spiffe://cluster.local/ns/e2e-mesh/sa/client"
		gatewayID = "spiffe://cluster.local/ns/istio-system/sa/istio-ingressgateway-service-account"
	)

	t.Run("HTTP with both identities", func(t *testing.T) {
		r := answered(t, n, "get", "-H", "X-Test: 1", "-d", "text", "-X", "PUT", "http://server:8080/a?b=c")
		if r.Method != "PUT" || r.Path != "/a?b=c" || r.Body != "text" || r.Pod != "server" {
			t.Errorf("the server got %+v", r)
		}
		wantIdentities(t, r, serverID, clientID)
	})
	t.Run("gRPC with both identities", func(t *testing.T) {
		r := answered(t, n, "grpc", "server:9090")
		if r.Method != "UnaryCall" || r.Pod != "server" {
			t.Errorf("the server got %+v", r)
		}
		wantIdentities(t, r, serverID, clientID)
	})
	t.Run("TCP", func(t *testing.T) {
		n.Eventually(t, time.Minute, func() (bool, string) {
			out, err := fromPod(n, "e2e-mesh", "tcp", "server:9000", "some text")
			return err == nil && strings.TrimSpace(out) == "some text", fmt.Sprintf("%q %v", out, err)
		})
	})
	t.Run("through the gateway, with its identity", func(t *testing.T) {
		var r echoReply
		n.Eventually(t, time.Minute, func() (bool, string) {
			status, text, err := ask(n.HTTP(false), n, http.MethodGet, "echo.example.com", "/from/outside", nil)
			if err == nil && status == http.StatusOK {
				r, err = parseReply(text)
			}
			return err == nil && status == http.StatusOK, fmt.Sprintf("status %d %s %v", status, text, err)
		})
		if r.Path != "/from/outside" {
			t.Errorf("the server got %+v", r)
		}
		wantIdentities(t, r, serverID, gatewayID)
	})
	t.Run("plain text is refused", func(t *testing.T) {
		// The caller's own network works: it reaches a server outside the mesh.
		if out, err := fromPod(n, "e2e-plain", "get", "http://server.e2e-plain:8080/"); err != nil {
			t.Fatalf("a call without any sidecar: %v: %s", err, out)
		}
		for _, call := range plainCalls() {
			if out, err := fromPod(n, "e2e-plain", call...); err == nil {
				t.Errorf("%v: answered %q", call, out)
			} else if !refused.MatchString(err.Error()) {
				t.Errorf("%v: failed, but was not refused: %v", call, err)
			}
		}
		// It is STRICT that refuses: without it the same calls are answered.
		t.Cleanup(func() { n.Delete(t, permissive) })
		n.Apply(t, permissive)
		for _, call := range plainCalls() {
			n.Eventually(t, time.Minute, func() (bool, string) {
				out, err := fromPod(n, "e2e-plain", call...)
				if r, _ := parseReply(out); err == nil && strings.Contains(r.clientCert(), "URI=spiffe") {
					return false, "a caller without a sidecar has an identity: " + out
				}
				return err == nil, fmt.Sprintf("%v, PERMISSIVE: %v", call, err)
			})
		}
	})
}

// refused is a connection that was made and that the server's side has closed without an answer.
var refused = regexp.MustCompile(`reset by peer|EOF|broken pipe`)

func plainCalls() [][]string {
	return [][]string{
		{"get", "http://server.e2e-mesh:8080/"},
		{"grpc", "server.e2e-mesh:9090"},
		{"tcp", "server.e2e-mesh:9000", "some text"},
	}
}

// fromPod calls with the echo image's client, from the pod "client" of the namespace.
func fromPod(n *node.Node, namespace string, args ...string) (string, error) {
	return n.Exec(namespace, "client", "echo", append([]string{"/echo"}, args...)...)
}

// answered waits for the answer to a call from inside the mesh: a proxy that has just started may not know the server yet.
func answered(t *testing.T, n *node.Node, args ...string) (r echoReply) {
	t.Helper()
	n.Eventually(t, time.Minute, func() (bool, string) {
		out, err := fromPod(n, "e2e-mesh", args...)
		if err == nil {
			r, err = parseReply(out)
		}
		return err == nil, fmt.Sprintf("%v: %v", args, err)
	})
	return r
}

// wantIdentities checks the header in which the server's sidecar names itself (By) and the caller (URI).
func wantIdentities(t *testing.T, r echoReply, by, uri string) {
	t.Helper()
	have := r.clientCert()
	parts := strings.Split(have[strings.LastIndex(have, ",")+1:], ";")
	found := map[string]string{}
	for _, p := range parts {
		key, value, _ := strings.Cut(p, "=")
		found[key] = value
	}
	if found["By"] != by || found["URI"] != uri {
		t.Errorf("x-forwarded-client-cert is %q, want By=%s and URI=%s", have, by, uri)
	}
}

// istioctl reads the proxies as it reads Istio's own.
func TestProxyStatus(t *testing.T) {
	n := app(t)
	n.Eventually(t, time.Minute, func() (bool, string) {
		out := n.Istioctl(t, "proxy-status", "-v", "1")
		lines := strings.Split(strings.TrimSpace(out), "\n")
		header := strings.Fields(lines[0])
		for _, want := range []string{"istio-ingressgateway", "istio-egressgateway", "fastapi-service", "go-service"} {
			if !strings.Contains(out, "\n"+want) {
				return false, "no proxy of " + want + ":\n" + out
			}
		}
		// CDS, LDS, EDS and RDS are there in every proxy with listeners and routes; a gateway without routes has no RDS.
		for _, line := range lines[1:] {
			if strings.Count(line, "SYNCED") < 3 || strings.Contains(line, "STALE") || strings.Contains(line, "ERROR") {
				return false, strings.Join(header, " ") + "\n" + line
			}
		}
		return true, ""
	})
}

func TestProfiles(t *testing.T) {
	n := app(t)
	list := n.Istioctl(t, "profile", "list")
	for _, want := range []string{"Istio configuration profiles:", "    default\n", "    demo\n", "    minimal\n", "    empty\n"} {
		if !strings.Contains(list, want) {
			t.Errorf("istioctl profile list shows no %q:\n%s", want, list)
		}
	}
	if dump := n.Istioctl(t, "profile", "dump", "demo"); !strings.Contains(dump, "istio-egressgateway") || !strings.Contains(dump, "kind: IstioOperator") {
		t.Errorf("istioctl profile dump demo shows:\n%s", dump)
	}
}
