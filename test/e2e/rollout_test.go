//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/test/e2e/node"
)

// appContainer names the app's container of each service.
var appContainer = map[string]string{"fastapi-service": "fastapi", "go-service": "go"}

// Updates of both services and their undoing, under load and without retries, lose nothing. docs/guide.md names what was
// added to the guide's manifests for that.
func TestRollingUpdate(t *testing.T) {
	n := app(t)
	withoutRetries(t, n)
	t.Cleanup(func() { restoreServices(t, n) })

	// At least one update and its undoing come in this time, and with the larger number several.
	enough := int64(10_000)
	if testing.Short() {
		enough = 3000
	}
	l := startLoad(t, n, guideTraffic)
	l.wait(500)
	for l.sent.Load() < enough {
		t.Logf("update to 1.0.1, after %d requests", l.sent.Load())
		for service, name := range appContainer {
			n.Kubectl(t, "set", "image", "deployment/"+service, name+"=my-registry/"+service+":1.0.1", "-n", appNamespace)
		}
		waitVersion(t, n, "1.0.1")
		t.Logf("undo, after %d requests", l.sent.Load())
		for service := range appContainer {
			n.Kubectl(t, "rollout", "undo", "deployment/"+service, "-n", appNamespace)
		}
		waitVersion(t, n, "1.0.0")
	}
	l.end()
}

// waitVersion waits until both services have rolled out in this version, and until the pods that they had before, which
// end a while later, are gone.
func waitVersion(t *testing.T, n *node.Node, version string) {
	t.Helper()
	for service := range appContainer {
		n.WaitRollout(t, appNamespace, "deployment/"+service)
	}
	client := n.Client(t)
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		pods, err := client.CoreV1().Pods(appNamespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		count := map[string]int{}
		for _, p := range pods.Items {
			if why := node.NotReady(&p); why != "" {
				return false, why
			}
			for _, c := range p.Spec.Containers {
				count[c.Image]++
			}
		}
		fastapi, golang := count["my-registry/fastapi-service:"+version], count["my-registry/go-service:"+version]
		return fastapi == 2 && golang == 3 && len(pods.Items) == 5, fmt.Sprintf("the pods' images are %v, want version %s in 2 and 3", count, version)
	})
}

// restoreServices applies the example's Deployments again, which changes nothing after an undo.
func restoreServices(t *testing.T, n *node.Node) {
	t.Helper()
	k8s := filepath.Join(example(t), "k8s")
	for _, args := range [][]string{
		{"apply", "-n", appNamespace, "-f", filepath.Join(k8s, "fastapi"), "-f", filepath.Join(k8s, "go")},
		{"rollout", "status", "-n", appNamespace, "deployment/fastapi-service", "--timeout=180s"},
		{"rollout", "status", "-n", appNamespace, "deployment/go-service", "--timeout=180s"},
	} {
		if _, err := n.KubectlErr(args...); err != nil {
			t.Error(err)
		}
	}
}

// example is the folder of the guide's app.
func example(t *testing.T) string {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(top, "examples", "polyglot")
}

// appWithoutRetries is for the retries from each sidecar to its app, which no other API can disable: here they only retry status codes
// that do not occur.
const appWithoutRetries = `
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: e2e-no-retries, namespace: ` + appNamespace + `}
spec:
  configPatches:
  - applyTo: HTTP_ROUTE
    match: {context: SIDECAR_INBOUND}
    patch: {operation: MERGE, value: {route: {retry_policy: {retry_on: retriable-status-codes}}}}
`

// withoutRetries turns retries off on every route of the app, also those that are Istio's default, until the test ends, and waits until
// the proxies know.
func withoutRetries(t *testing.T, n *node.Node) {
	t.Helper()
	var routes struct{ Items []unstructured.Unstructured }
	if err := json.Unmarshal([]byte(n.Kubectl(t, "get", "virtualservices", "-n", appNamespace, "-o", "json")), &routes); err != nil || len(routes.Items) == 0 {
		t.Fatalf("the app has %d VirtualServices (%v)", len(routes.Items), err)
	}
	var before, during strings.Builder
	for _, service := range routes.Items {
		// What only the API server writes.
		for _, field := range []string{"resourceVersion", "uid", "creationTimestamp", "generation", "managedFields"} {
			unstructured.RemoveNestedField(service.Object, "metadata", field)
		}
		for _, out := range []*strings.Builder{&before, &during} {
			text, err := yaml.Marshal(service.Object)
			if err != nil {
				t.Fatal(err)
			}
			out.WriteString("---\n" + string(text))
			http, _, err := unstructured.NestedSlice(service.Object, "spec", "http")
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range http {
				r.(map[string]any)["retries"] = map[string]any{"attempts": int64(0)}
			}
			if err := unstructured.SetNestedSlice(service.Object, http, "spec", "http"); err != nil {
				t.Fatal(err)
			}
		}
	}
	own := "---" + appWithoutRetries
	services := strings.Fields(n.Kubectl(t, "get", "services", "-n", appNamespace, "-o", "jsonpath={.items[*].metadata.name}"))
	for _, name := range services {
		own += fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: e2e-no-retries-%[1]s, namespace: %[2]s}
spec:
  hosts: [%[1]s]
  http:
  - route:
    - destination: {host: %[1]s}
    retries: {attempts: 0}
`, name, appNamespace)
	}
	t.Cleanup(func() {
		n.Delete(t, own)
		n.Apply(t, before.String())
	})
	n.Apply(t, during.String()+own)

	waitNoRetries(t, n, "istio-system", "istio=ingressgateway", appHost)
	waitNoRetries(t, n, appNamespace, "", services...)
	for _, pod := range listPods(t, n, appNamespace, "") {
		n.Eventually(t, time.Minute, func() (bool, string) {
			out := n.Istioctl(t, "proxy-config", "listeners", pod.Name+"."+pod.Namespace, "--port", "15006", "-o", "json")
			return strings.Contains(out, `"retriable-status-codes"`) && !strings.Contains(out, `"reset-before-request"`), pod.Name + " still retries what it sends to its app"
		})
	}
}

// waitNoRetries waits until the proxies of these pods have routes for each of the hosts, and none of them retries.
func waitNoRetries(t *testing.T, n *node.Node, namespace, selector string, hosts ...string) {
	t.Helper()
	for _, pod := range listPods(t, n, namespace, selector) {
		n.Eventually(t, time.Minute, func() (bool, string) {
			var configs []struct {
				VirtualHosts []struct {
					Domains []string
					Routes  []struct{ Route struct{ RetryPolicy any } }
				}
			}
			out := n.Istioctl(t, "proxy-config", "routes", pod.Name+"."+namespace, "-o", "json")
			if err := json.Unmarshal([]byte(out), &configs); err != nil {
				return false, err.Error()
			}
			for _, host := range hosts {
				routes, retrying := 0, 0
				for _, c := range configs {
					for _, h := range c.VirtualHosts {
						if !slices.Contains(h.Domains, host) {
							continue
						}
						for _, r := range h.Routes {
							routes++
							if r.Route.RetryPolicy != nil {
								retrying++
							}
						}
					}
				}
				if routes == 0 || retrying > 0 {
					return false, fmt.Sprintf("%s has %d routes to %s, and %d of them retry", pod.Name, routes, host, retrying)
				}
			}
			return true, ""
		})
	}
}
