//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// istioctl looks into the mesh and into a proxy as it does with Istio's own.
func TestIstioctl(t *testing.T) {
	n := app(t)
	t.Run("precheck", func(t *testing.T) {
		out, errOut, code := n.Polymesh(t, "istioctl", "x", "precheck")
		if code != 0 || !strings.Contains(out+errOut, "No issues found when checking the cluster") {
			t.Errorf("istioctl x precheck, exit code %d: %s%s", code, out, errOut)
		}
	})
	t.Run("proxy-config", func(t *testing.T) {
		const service = "go-service." + appNamespace + ".svc.cluster.local"
		backends := len(listPods(t, n, appNamespace, "app=go-service"))
		for _, look := range []struct {
			args  []string
			want  []string // all in one line
			lines int      // how many lines have it, 0 for at least one
		}{
			{[]string{"clusters", "--fqdn", service, "--subset", "v1"}, []string{service, "8080", "v1", "outbound", "EDS"}, 1},
			{[]string{"listeners", "--port", "8000"}, []string{"0.0.0.0", "8000"}, 0},
			{[]string{"routes", "--name", "8080"}, []string{service + ":8080", "/*"}, 1},
			{[]string{"endpoints", "--cluster", "outbound|8080||" + service}, []string{":8080", "HEALTHY", "OK"}, backends},
			{[]string{"secret"}, []string{"default", "Cert Chain", "ACTIVE", "true"}, 1},
			{[]string{"secret"}, []string{"ROOTCA", "CA", "ACTIVE", "true"}, 1},
		} {
			args := append([]string{"proxy-config", look.args[0], "deployment/fastapi-service", "-n", appNamespace}, look.args[1:]...)
			n.Eventually(t, time.Minute, func() (bool, string) {
				out := n.Istioctl(t, args...)
				found := 0
				for line := range strings.Lines(out) {
					if containsAll(line, look.want) {
						found++
					}
				}
				return found > 0 && (look.lines == 0 || found == look.lines), fmt.Sprintf("istioctl %v shows %d lines with %q, want %d:\n%s", args, found, look.want, look.lines, out)
			})
		}
	})
	t.Run("analyze", func(t *testing.T) { testAnalyze(t, n) })
	t.Run("dashboard", func(t *testing.T) { testDashboard(t, n) })
}

func containsAll(text string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(text, part) {
			return false
		}
	}
	return true
}

// Neither the gateway nor the destination of this one is there.
const mistakenRoute = `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: e2e-mistake, namespace: ` + appNamespace + `}
spec:
  hosts: [mistake.example.com]
  gateways: [nowhere]
  http:
  - route:
    - destination: {host: nobody}
`

func testAnalyze(t *testing.T, n *node.Node) {
	analyze := func() (string, int) {
		out, errOut, code := n.Polymesh(t, "istioctl", "analyze", "-n", appNamespace)
		return out + errOut, code
	}
	if printed, code := analyze(); code != 0 || !strings.Contains(printed, "No validation issues found") {
		t.Errorf("istioctl analyze of the guide's app, exit code %d: %s", code, printed)
	}
	t.Cleanup(func() { n.Delete(t, mistakenRoute) })
	n.Apply(t, mistakenRoute)
	printed, code := analyze()
	for _, want := range []string{
		`Error [IST0101] (VirtualService ` + appNamespace + `/e2e-mistake) Referenced gateway not found: "nowhere"`,
		`Error [IST0101] (VirtualService ` + appNamespace + `/e2e-mistake) Referenced host not found: "nobody"`,
	} {
		if code == 0 || !strings.Contains(printed, want) {
			t.Errorf("istioctl analyze, exit code %d, does not print %q: %s", code, want, printed)
		}
	}
}

func testDashboard(t *testing.T, n *node.Node) {
	ctx, cancel := context.WithCancel(t.Context())
	cmd := n.PolymeshCommand(ctx, "istioctl", "dashboard", "envoy", "deployment/fastapi-service", "-n", appNamespace, "--browser=false")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // killed
	}()
	printed := bufio.NewReader(out)
	line, err := printed.ReadString('\n')
	port, ok := strings.CutPrefix(strings.TrimSpace(line), "http://localhost:")
	if err != nil || !ok {
		t.Fatalf("istioctl dashboard envoy prints %q (%v)", line, err)
	}
	url := "http://127.0.0.1:" + port // the client resolves no names
	go func() { _, _ = io.Copy(io.Discard, printed) }()
	for path, want := range map[string]string{
		"/":            "<title>Envoy Admin</title>",
		"/server_info": `"state": "LIVE"`,
		"/clusters":    "outbound|8080||go-service",
	} {
		response, err := n.HTTPInside(false).Get(url + path)
		if err != nil {
			t.Error(err)
			continue
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != http.StatusOK || !strings.Contains(string(text), want) {
			t.Errorf("%s%s: %s, without %q (%v)", url, path, response.Status, want, err)
		}
	}
}

// The proxies continue without istiod, and follow the one that comes after it.
func TestControlPlaneGoes(t *testing.T) {
	n := app(t)
	// With istiod goes what it has counted so far.
	if err := noRejects(t.Context(), n); err != nil {
		t.Error(err)
	}
	withoutRetries(t, n)
	l := startLoad(t, n, guideTraffic)
	l.wait(300)
	for _, gone := range []struct {
		how  string
		args []string
	}{
		{"killed", []string{"delete", "pod", "-n", "istio-system", "-l", "app=istiod", "--force", "--grace-period=0"}},
		{"restarted", []string{"rollout", "restart", "deployment/istiod", "-n", "istio-system"}},
	} {
		t.Run(gone.how, func(t *testing.T) {
			before := istiod(t, n)
			n.Kubectl(t, gone.args...)
			n.WaitRollout(t, "istio-system", "deployment/istiod")
			after := istiod(t, n)
			if after == before {
				t.Fatalf("%s is still there", before)
			}
			newRouteArrives(t, n, gone.how+".example.com")
			waitServedBy(t, n, after)
			l.wait(l.sent.Load() + 500)
		})
	}
	l.end()
}

// istiod is the name of the one pod of istiod that runs and is to stay.
func istiod(t *testing.T, n *node.Node) (name string) {
	t.Helper()
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		var names []string
		for _, p := range listPods(t, n, "istio-system", "app=istiod") {
			if p.DeletionTimestamp == nil && node.NotReady(&p) == "" {
				names = append(names, p.Name)
			}
		}
		name = strings.Join(names, " ")
		return len(names) == 1, fmt.Sprintf("the pods of istiod are %q, want one", names)
	})
	return name
}

// newRouteArrives makes a route of the ingress gateway that was not there before, and waits until the gateway has it.
func newRouteArrives(t *testing.T, n *node.Node, host string) {
	t.Helper()
	manifest := `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: "` + host + `", namespace: ` + appNamespace + `}
spec:
  hosts: ["` + host + `"]
  gateways: [istio-system/main-gateway]
  http:
  - directResponse: {status: 200, body: {string: "this is ` + host + `"}}
`
	file := filepath.Join(t.TempDir(), "route.yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Delete(t, manifest) })
	// The API server calls istiod to validate it, and may still call the one that is gone.
	n.Eventually(t, time.Minute, func() (bool, string) {
		_, err := n.KubectlErr("apply", "-f", file)
		return err == nil, fmt.Sprint(err)
	})
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		status, text, err := ask(n.HTTP(false), n, http.MethodGet, host, "/", nil)
		return err == nil && status == http.StatusOK && text == "this is "+host, fmt.Sprintf("the new route: status %d %s %v", status, text, err)
	})
}

// waitServedBy waits until every proxy of the app and of the gateways is connected to this pod of istiod and in step with it.
func waitServedBy(t *testing.T, n *node.Node, istiod string) {
	t.Helper()
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		out, errOut, code := n.Polymesh(t, "istioctl", "proxy-status", "-v", "1")
		if code != 0 {
			return false, errOut
		}
		status := map[string]string{}
		for line := range strings.Lines(out) {
			name, rest, _ := strings.Cut(line, " ")
			status[name] = rest
		}
		for _, p := range append(listPods(t, n, appNamespace, ""), listPods(t, n, "istio-system", "istio in (ingressgateway, egressgateway)")...) {
			line := status[p.Name+"."+p.Namespace]
			if strings.Count(line, "SYNCED") < 3 || strings.Contains(line, "STALE") || strings.Contains(line, "ERROR") || !strings.Contains(line, " "+istiod+" ") {
				return false, fmt.Sprintf("%s is not in step with %s:\n%s", p.Name, istiod, out)
			}
		}
		return true, ""
	})
}

// Certificates are replaced long before they end, while requests come over STRICT mutual TLS, and the new ones are used.
func TestCertificateRotation(t *testing.T) {
	const lifetime = time.Minute // SECRET_TTL
	s := newScenario(t, "certificate-rotation")
	s.wantStatus(http.StatusOK, "", "client", myService)
	sent, end := s.load(myService)
	workloads := []string{"client", "server"}
	last := map[string]*x509.Certificate{}
	for _, workload := range workloads {
		c, err := s.certificate(workload)
		if err != nil {
			t.Fatal(err)
		}
		if left := time.Until(c.NotAfter); left > lifetime {
			t.Fatalf("the certificate of %s is valid for another %s, want %s at most", workload, left, lifetime)
		}
		last[workload] = c
	}
	// After so many, the first ones have ended.
	const changes = 5
	for range changes {
		for _, workload := range workloads {
			s.Eventually(t, 2*lifetime, func() (bool, string) {
				c, err := s.certificate(workload)
				if err != nil {
					return false, err.Error()
				}
				if c.SerialNumber.Cmp(last[workload].SerialNumber) == 0 {
					return false, fmt.Sprintf("%s still has the certificate of %s", workload, c.NotBefore)
				}
				last[workload] = c
				return true, ""
			})
		}
	}
	s.Eventually(t, time.Minute, func() (bool, string) {
		c, err := s.certificate("client")
		if err != nil {
			return false, err.Error()
		}
		out, err := s.call("client", "get", myService)
		if err != nil {
			return false, err.Error()
		}
		r, err := parseReply(out)
		return err == nil && strings.Contains(r.clientCert(), fmt.Sprintf(";Hash=%x;", sha256.Sum256(c.Raw))),
			fmt.Sprintf("the server has the certificate header %q of the caller, want the hash of the one with the serial number %x; %v", r.clientCert(), c.SerialNumber, err)
	})
	end()
	wantNoFailure(t, fmt.Sprintf("%d certificates of each followed one another", changes+1), sent)
}

// certificate is the one with which a Deployment's Envoy works.
func (s *scenario) certificate(deployment string) (*x509.Certificate, error) {
	chain, _, err := s.secrets(deployment)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(chain)
	if block == nil {
		return nil, fmt.Errorf("the certificate of %s is not PEM: %s", deployment, chain)
	}
	return x509.ParseCertificate(block.Bytes)
}

// A second control plane serves the namespaces that ask for it, by its name or by a tag, and goes without a trace. The
// first one and what it serves stay as they are.
func TestRevisions(t *testing.T) {
	n := app(t)
	first := istiod(t, n)
	before := webhooks(t, n)
	pods := podNames(t, n)
	t.Cleanup(func() {
		// The test itself ends with this, when it comes so far.
		if n.Kubectl(t, "get", "deployment", "istiod-canary", "-n", "istio-system", "--ignore-not-found", "-o", "name") != "" {
			n.Istioctl(t, "uninstall", "--revision", "canary", "-y")
		}
		n.Kubectl(t, "wait", "--for=delete", "pod", "-n", "istio-system", "-l", "app=istiod,istio.io/rev=canary", "--timeout=120s")
		// What uninstall leaves: the records of who led.
		n.Kubectl(t, "delete", "lease", "-n", "istio-system", "--ignore-not-found", "istio-gateway-deployment-canary", "istio-gateway-status-leader-canary")
	})
	n.Istioctl(t, "install", "--set", "revision=canary", "--set", "profile=minimal", "-y")
	t.Cleanup(func() {
		if strings.Contains(n.Istioctl(t, "tag", "list"), "prod") {
			n.Istioctl(t, "tag", "remove", "prod", "-y")
		}
	})
	n.Istioctl(t, "tag", "set", "prod", "--revision", "canary")
	s := newScenario(t, "revisions")
	s.WaitRollout(t, "revisions-tag", "deployment/server")

	// A control plane reports its own proxies only.
	served := func(namespace, revision, by string) {
		t.Helper()
		n.Eventually(t, 3*time.Minute, func() (bool, string) {
			out, errOut, code := n.Polymesh(t, "istioctl", "proxy-status", "-n", namespace, "--revision", revision)
			found := 0
			for line := range strings.Lines(out) {
				// The second control plane's pods are called istiod-canary-…
				if strings.HasPrefix(line, "server-") && strings.Contains(line, "."+namespace+" ") {
					found++
					if !strings.Contains(line, " "+by) {
						return false, fmt.Sprintf("want %s served by %s:\n%s", namespace, by, out)
					}
				}
			}
			return code == 0 && found == 1, fmt.Sprintf("%d proxies in %s, want one:\n%s%s", found, namespace, out, errOut)
		})
	}
	served("revisions", "canary", "istiod-canary-")
	served("revisions-tag", "canary", "istiod-canary-")
	waitServedBy(t, n, first)
	// Both planes sign with the same authority: the mesh is one, and STRICT.
	s.wantCaller("server", "spiffe://cluster.local/ns/revisions/sa/default", "get", "http://server.revisions-tag/")
	s.wantStatus(http.StatusOK, "", "server", "http://go-service."+appNamespace+":8080/health")

	n.Istioctl(t, "tag", "set", "prod", "--revision", "default", "--overwrite")
	n.Kubectl(t, "rollout", "restart", "deployment/server", "-n", "revisions-tag")
	n.WaitRollout(t, "revisions-tag", "deployment/server")
	served("revisions-tag", "default", first)
	served("revisions", "canary", "istiod-canary-")
	s.wantCaller("server", "spiffe://cluster.local/ns/revisions/sa/default", "get", "http://server.revisions-tag/")

	s.delete(workloads)
	n.Istioctl(t, "tag", "remove", "prod", "-y")
	n.Istioctl(t, "uninstall", "--revision", "canary", "-y")
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		left := n.Kubectl(t, "get", "deployments,pods,services,configmaps", "-n", "istio-system", "-l", "istio.io/rev=canary", "-o", "name")
		return left == "", "the second control plane leaves " + left
	})
	if after := webhooks(t, n); after != before {
		t.Errorf("the webhooks are\n%s\nand were before\n%s", after, before)
	}
	if after := podNames(t, n); after != pods {
		t.Errorf("the pods of the app and of istio-system are\n%s\nand were before\n%s", after, pods)
	}
	waitServedBy(t, n, first)
	newRouteArrives(t, n, "after-canary.example.com")
	if printed, code := n.Status(t); code != 0 {
		t.Errorf("polymesh status, exit code %d: %s", code, printed)
	}
}

// webhooks are the names of all that istiod has in the API server's way.
func webhooks(t *testing.T, n *node.Node) string {
	t.Helper()
	return n.Kubectl(t, "get", "mutatingwebhookconfigurations,validatingwebhookconfigurations", "-o", "name")
}

// podNames are the pods of the mesh that the app's manifests and the server have made.
func podNames(t *testing.T, n *node.Node) string {
	t.Helper()
	return n.Kubectl(t, "get", "pods", "-n", "istio-system", "-o", "name") + n.Kubectl(t, "get", "pods", "-n", appNamespace, "-o", "name")
}
