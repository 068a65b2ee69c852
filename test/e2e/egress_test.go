//go:build e2e

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// What is outside of the cluster, at node.OutsideHost. scenarios/outside/coredns.yaml configures the cluster's name server.
const (
	outsideWeb      = "www.outside.test"
	outsideDatabase = "db.outside.test"
)

// One world outside for all of them: a cluster's name server takes a minute to learn new names.
func TestEgress(t *testing.T) {
	n := app(t)
	learned := tellOutsideNames(t, n)
	ca := newAuthority(t)
	web := serveOutside(t, n, ca)
	learned(outsideDatabase)

	t.Run("outbound-registry-only", func(t *testing.T) { testRegistryOnly(t, ca) })
	t.Run("egress-https", func(t *testing.T) { testEgressHTTPS(t, ca, web) })
	t.Run("egress-postgres", func(t *testing.T) { testEgressPostgres(t, ca) })
}

// tellOutsideNames configures the names outside in the cluster's name server. It takes a minute to learn them: what it
// returns waits for one.
func tellOutsideNames(t *testing.T, n *node.Node) (learned func(host string)) {
	t.Helper()
	names := filepath.Join("scenarios", "outside", "coredns.yaml")
	// The kubelet brings a changed ConfigMap into a pod when it checks that pod again: once a minute, or at a change like this.
	look := func(annotation string) {
		n.Kubectl(t, "annotate", "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns", "--overwrite", annotation)
	}
	t.Cleanup(func() {
		n.Kubectl(t, "delete", "--ignore-not-found", "-f", names)
		look("e2e.polymesh.dev/look-")
	})
	n.Kubectl(t, "apply", "-f", names)
	look("e2e.polymesh.dev/look=" + t.Name())
	server := n.Kubectl(t, "get", "service", "kube-dns", "-n", "kube-system", "-o", "jsonpath={.spec.clusterIP}")
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return n.Dial(ctx, network, net.JoinHostPort(server, "53"))
	}}
	return func(host string) {
		t.Helper()
		n.Eventually(t, 4*time.Minute, func() (bool, string) {
			addresses, err := resolver.LookupHost(t.Context(), host+".")
			return slices.Equal(addresses, []string{node.OutsideHost}), fmt.Sprintf("the cluster's name server knows %s as %v, %v", host, addresses, err)
		})
	}
}

func testRegistryOnly(t *testing.T, ca *authority) {
	s := newOutsideScenario(t, "outbound-registry-only", ca)
	const plain, secure = "http://" + outsideWeb + "/", "https://" + outsideWeb + "/"
	// Without a setting, everything outside can be reached.
	s.wantStatus(http.StatusOK, outsideWeb, "client", plain)
	s.wantStatus(http.StatusOK, outsideWeb, "client", secure)

	s.apply("sidecar.yaml")
	s.wantStatus(http.StatusBadGateway, "", "client", plain)
	s.wantRefused("client", "get", secure)

	s.apply("service-entry.yaml")
	s.wantStatus(http.StatusOK, outsideWeb, "client", plain)
	s.wantStatus(http.StatusOK, outsideWeb, "client", secure)
}

func testEgressHTTPS(t *testing.T, ca *authority, web *outsideServer) {
	s := newOutsideScenario(t, "egress-https", ca)
	const url, cluster = "https://" + outsideWeb + "/", "outbound|443||" + outsideWeb
	begin := time.Now()
	s.apply("service-entry.yaml")
	s.wantStatus(http.StatusOK, outsideWeb, "client", url)
	s.apply("through-gateway.yaml")
	s.Eventually(t, time.Minute, func() (bool, string) {
		out, err := s.call("client", "get", url)
		return len(s.egressLog(cluster, begin)) > 0, fmt.Sprintf("the egress gateway passes nothing on; the call: %q %v", out, err)
	})

	// From now on every connection that arrives outside is one that the gateway passes on.
	const calls = 5
	begin = time.Now()
	arrived := web.connections.Load()
	for range calls {
		out, err := s.call("client", "get", url)
		var got outsideReply
		if err == nil {
			err = json.Unmarshal([]byte(out), &got)
		}
		// The pods' addresses are hidden behind the node's, so the address does not show who called.
		if want := (outsideReply{Host: outsideWeb, ServerName: outsideWeb, Caller: s.Address()}); err != nil || got != want {
			t.Errorf("the server outside reports %+v (%v), want %+v", got, err, want)
		}
	}
	if got := web.connections.Load() - arrived; got != calls {
		t.Errorf("%d connections have arrived outside, want %d", got, calls)
	}
	s.wantEgressLog(cluster, begin, calls, node.OutsideHost+":443", outsideWeb)
}

func testEgressPostgres(t *testing.T, ca *authority) {
	long(t, "TestExternalDatabase goes through the egress gateway too")
	s := newOutsideScenario(t, "egress-postgres", ca)
	db := startPostgres(t, s.Node, ca, outsideDatabase)
	url := func(host, settings string) string {
		return fmt.Sprintf("postgresql://app:%s@%s:5432/postgres?%s", db.password, host, settings)
	}
	query := func(url string) (string, error) {
		return s.call("client", "postgres", url, "SELECT current_user, ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
	}
	const cluster = "outbound|5432||" + outsideDatabase
	const verify = "sslmode=verify-full&sslrootcert=/outside/"
	begin := time.Now()
	s.apply("service-entry.yaml", "through-gateway.yaml")
	s.Eventually(t, time.Minute, func() (bool, string) {
		out, err := query(url(outsideDatabase, verify+"ca.crt"))
		return err == nil && len(s.egressLog(cluster, begin)) > 0, fmt.Sprintf("the egress gateway passes nothing on; the query: %q %v", out, err)
	})
	const queries = 3
	begin = time.Now()
	for range queries {
		if out, err := query(url(outsideDatabase, verify+"ca.crt")); err != nil || out != "app|t|TLSv1.3\n" {
			t.Errorf("the database answers %q, %v", out, err)
		}
	}
	s.wantEgressLog(cluster, begin, queries, node.OutsideHost+":5432")

	// It is the database itself that shows a certificate, and the client checks it: who signed it, and for which name.
	for _, c := range []struct{ url, want string }{
		{url(outsideDatabase, verify+"other.crt"), "certificate signed by unknown authority"},
		{url(node.OutsideHost, verify+"ca.crt"), "cannot validate certificate for " + node.OutsideHost},
		{url(outsideDatabase, "sslmode=disable"), "no encryption"},
	} {
		if out, err := query(c.url); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %q %v, want %q", c.url, out, err, c.want)
		}
	}
}

// newOutsideScenario is a scenario whose client trusts the authority, from a ConfigMap that is there before the client.
func newOutsideScenario(t *testing.T, name string, ca *authority) *scenario {
	t.Helper()
	manifest, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": []any{
		map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name, "labels": map[string]any{"istio-injection": "enabled"}}},
		map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "outside-ca", "namespace": name},
			"data": map[string]any{"ca.crt": ca.pem(), "other.crt": newAuthority(t).pem()}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	app(t).Apply(t, string(manifest))
	return newScenario(t, name)
}

// egressLog is what the egress gateway has logged about connections to one of its clusters that were made since then.
func (s *scenario) egressLog(cluster string, since time.Time) []string {
	s.t.Helper()
	return connectionLog(s.t, s.Node, "istio-system", "istio-egressgateway", cluster, since)
}

// connectionLog is what the proxy of a Deployment has logged about connections to one of its clusters that were made since
// then. It logs a connection at its end, within a second.
func connectionLog(t *testing.T, n *node.Node, namespace, deployment, cluster string, since time.Time) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(n.Kubectl(t, "logs", "-n", namespace, "deployment/"+deployment, "-c", "istio-proxy", "--tail=-1")) {
		// A line begins with the connection's start, [2026-01-02T15:04:05.678Z].
		text, _, _ := strings.Cut(strings.TrimPrefix(line, "["), "]")
		start, err := time.Parse(time.RFC3339, text)
		if err == nil && !start.Before(since.Truncate(time.Millisecond)) && strings.Contains(line, " "+cluster+" ") {
			found = append(found, line)
		}
	}
	return found
}

// wantEgressLog waits until the egress gateway has logged so many connections, each with these texts.
func (s *scenario) wantEgressLog(cluster string, since time.Time, count int, texts ...string) {
	s.t.Helper()
	var lines []string
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		lines = s.egressLog(cluster, since)
		return len(lines) >= count, fmt.Sprintf("the egress gateway has logged %d connections to %s, want %d", len(lines), cluster, count)
	})
	if len(lines) > count {
		s.t.Errorf("the egress gateway has logged %d connections to %s, want %d", len(lines), cluster, count)
	}
	for _, line := range lines {
		for _, text := range texts {
			if !strings.Contains(line, text) {
				s.t.Errorf("the egress gateway's log contains %q, want %q in it", line, text)
			}
		}
	}
}

// outsideReply is what the web server outside returns about a request.
type outsideReply struct {
	Host       string `json:"host"`
	ServerName string `json:"serverName"` // of the TLS handshake
	Caller     string `json:"caller"`
}

// outsideServer is a web server in the outside world.
type outsideServer struct {
	connections atomic.Int64 // that were made
}

// serveOutside serves HTTP and HTTPS as outsideWeb.
func serveOutside(t *testing.T, n *node.Node, ca *authority) *outsideServer {
	t.Helper()
	s := &outsideServer{}
	certificate, key := ca.issue(t, outsideWeb)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		received := outsideReply{Host: r.Host}
		received.Caller, _, _ = net.SplitHostPort(r.RemoteAddr)
		if r.TLS != nil {
			received.ServerName = r.TLS.ServerName
		}
		if err := json.NewEncoder(w).Encode(received); err != nil {
			t.Errorf("the server outside: %v", err)
		}
	})
	// A separate server for each port: one that has begun with plain HTTP does not get to know HTTP/2.
	serve := func(port string, how func(*http.Server, net.Listener) error) {
		listener, err := n.ListenOutside("tcp", net.JoinHostPort(node.OutsideHost, port))
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{
			Handler: handler, ReadHeaderTimeout: 10 * time.Second,
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
			ConnState: func(_ net.Conn, state http.ConnState) {
				if state == http.StateNew {
					s.connections.Add(1)
				}
			},
		}
		go func() { _ = how(server, listener) }() // until Close
		t.Cleanup(func() { _ = server.Close() })
	}
	serve("80", (*http.Server).Serve)
	serve("443", func(server *http.Server, listener net.Listener) error { return server.ServeTLS(listener, "", "") })
	return s
}

// authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	ca := &authority{key: newKey(t)}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "authority of " + t.Name()}, SerialNumber: big.NewInt(1),
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	var err error
	if ca.certificate, err = x509.ParseCertificate(sign(t, template, template, ca.key, ca.key)); err != nil {
		t.Fatal(err)
	}
	return ca
}

// pem is the authority's own certificate.
func (ca *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.certificate.Raw}))
}

// issue returns certificate and key of a server or client with these names, which may be addresses too, as PEM.
func (ca *authority) issue(t *testing.T, names ...string) (certificate, key []byte) {
	t.Helper()
	own := newKey(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, SerialNumber: big.NewInt(2),
		NotBefore: ca.certificate.NotBefore, NotAfter: ca.certificate.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	signed := sign(t, template, ca.certificate, own, ca.key)
	private, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t *testing.T, template, parent *x509.Certificate, subject, issuer *ecdsa.PrivateKey) []byte {
	t.Helper()
	signed, err := x509.CreateCertificate(rand.Reader, template, parent, subject.Public(), issuer)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}
