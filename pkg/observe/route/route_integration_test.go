//go:build integration

package route_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/dashboard"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe/route"
)

// Nodes send, and users look, by a real API server, and by one of a server without the store, which passes on.
func TestRoute(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	store := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%s %s node=%s user=%s for=%s body=%d", r.Method, r.URL, r.Header.Get("X-Polymesh-Node"), r.Header.Get("X-Polymesh-User"), r.Header.Get("X-Polymesh-For"), len(body))
	})}
	go func() { _ = store.Serve(l) }()
	defer store.Close()

	// The port is known when the control plane runs.
	var with atomic.Pointer[route.Route]
	kubeconfig := controlplanetest.StartWith(t, log, map[string]http.Handler{
		layout.ObserveIngestPath: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { with.Load().Ingest().ServeHTTP(w, r) }),
		dashboard.Path:           dashboard.Gateway(socket, log),
	})
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	address, err := netip.ParseAddrPort(strings.TrimPrefix(rest.Host, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	certs := certificate.Store(filepath.Join(filepath.Dir(filepath.Dir(kubeconfig)), "tls"))
	options := route.Options{
		Server: "server-1", Address: address, Socket: socket, Kubeconfig: kubeconfig,
		CA: certs.Cert(certificate.ServerCA), Cert: certs.Cert(certificate.Polymesh), Key: certs.Key(certificate.Polymesh), Log: log,
	}
	start := func(o route.Options) *route.Route {
		r := route.New(o)
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return r
	}
	with.Store(start(options))
	other := options
	other.Server, other.Socket = "server-2", ""
	without := start(other)
	// The other server's API server: who calls is in the certificate, as there.
	second := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		subject := r.TLS.PeerCertificates[0].Subject
		r = r.WithContext(request.WithUser(r.Context(), &user.DefaultInfo{Name: subject.CommonName, Groups: subject.Organization}))
		if r.URL.Path == layout.ObserveIngestPath {
			without.Ingest().ServeHTTP(w, r)
			return
		}
		dashboard.Elsewhere(without.Pass).ServeHTTP(w, r)
	}))
	pair, err := tls.LoadX509KeyPair(certs.Cert(certificate.APIServer), certs.Key(certificate.APIServer))
	if err != nil {
		t.Fatal(err)
	}
	pool := func(name string) *x509.CertPool {
		text, err := os.ReadFile(certs.Cert(name))
		if err != nil {
			t.Fatal(err)
		}
		p := x509.NewCertPool()
		p.AppendCertsFromPEM(text)
		return p
	}
	second.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool(certificate.ClientCA)}
	second.StartTLS()
	defer second.Close()

	// identity is a certificate of the cluster's.
	identity := func(name string, organization ...string) string {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := certs.Sign(certificate.ClientCA, certificate.Request{Public: &key.PublicKey, Subject: pkix.Name{CommonName: name, Organization: organization}, Usage: x509.ExtKeyUsageClientAuth}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "pair.pem")
		if err := os.WriteFile(file, append(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	send := func(file, server, method, path, body string, headers ...string) (int, string) {
		t.Helper()
		pair, err := tls.LoadX509KeyPair(file, file)
		if err != nil {
			t.Fatal(err)
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool(certificate.ServerCA), Certificates: []tls.Certificate{pair}}}}
		r, err := http.NewRequest(method, server+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			r.Header.Set(name, value)
		}
		resp, err := client.Do(r)
		if err != nil && len(body) > 4<<20 {
			return http.StatusRequestEntityTooLarge, err.Error() // the connection is closed before all is sent
		}
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	first, node := rest.Host, identity("system:node:n2", "system:nodes")
	controlplanetest.Eventually(t, "both servers know the store", func() error {
		for _, server := range []string{first, second.URL} {
			if code, text := send(node, server, http.MethodGet, layout.ObserveIngestPath, ""); code != http.StatusOK {
				return fmt.Errorf("%s: %d %s", server, code, text)
			}
		}
		return nil
	})
	const got = "POST /api/polymesh/v1/ingest node=n2 user= for= body=3"
	forged := []string{"X-Polymesh-Node: n3", "X-Polymesh-For: system:node:n3", "X-Polymesh-User: root"}
	for _, server := range []string{first, second.URL} {
		if code, text := send(node, server, http.MethodPost, layout.ObserveIngestPath+"?node=n3", "abc", forged...); code != http.StatusOK || text != got {
			t.Errorf("%s: %d %s", server, code, text)
		}
		if code, _ := send(node, server, http.MethodPost, layout.ObserveIngestPath, strings.Repeat("x", 4<<20+1)); code != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: too much: %d", server, code)
		}
		// Those that are no nodes, by name or by group.
		for name, group := range map[string]string{"system:node:n4": "system:others", "alice": "system:nodes", "system:admin": "system:masters"} {
			if code, text := send(identity(name, group), server, http.MethodPost, layout.ObserveIngestPath, "x", forged...); code != http.StatusForbidden {
				t.Errorf("%s: %s of %s: %d %s", server, name, group, code, text)
			}
		}
		// A node may not look.
		if server == first {
			if code, _ := send(node, server, http.MethodGet, dashboard.Path, ""); code != http.StatusForbidden {
				t.Errorf("%s: a node looks: %d", server, code)
			}
		}
		// Who looks at it is known to the store, whichever server was asked.
		if code, text := send(identity("system:admin", "system:masters"), server, http.MethodGet, dashboard.Path+"api/x?q=1", "", forged...); code != http.StatusOK || text != "GET /api/x?q=1 node= user=system%3Aadmin for= body=0" {
			t.Errorf("%s: %d %s", server, code, text)
		}
		if code, _ := send(identity("system:admin", "system:masters"), server, http.MethodPost, dashboard.Path+"api/polymesh/v1/ingest", "x"); code != http.StatusMethodNotAllowed {
			t.Errorf("%s: writing by the path for looking: %d", server, code)
		}
		name, err := route.Ask(t.Context(), route.Node{Server: server, CA: certs.Cert(certificate.ServerCA), Cert: node, Key: node})
		if err != nil || name != "server-1" {
			t.Errorf("%s: %q, %v", server, name, err)
		}
	}
	// The other server passes on with its own identity: a node's request does not become more by it.
	if code, text := send(node, first, http.MethodPost, layout.ObserveIngestPath, "abc", "X-Polymesh-For: system:node:n3", "Impersonate-User: system:polymesh"); code == http.StatusOK {
		t.Errorf("a node impersonates: %s", text)
	}

	// The store is away, and there is none.
	store.Close()
	for _, server := range []string{first, second.URL} {
		if code, text := send(node, server, http.MethodPost, layout.ObserveIngestPath, "x"); code != http.StatusServiceUnavailable {
			t.Errorf("%s: without the store: %d %s", server, code, text)
		}
	}
	none := other
	none.Server = "server-1"
	gone := start(none)
	controlplanetest.Eventually(t, "the record is removed", func() error {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, layout.ObserveIngestPath, nil)
		gone.Ingest().ServeHTTP(w, r.WithContext(request.WithUser(r.Context(), &user.DefaultInfo{Name: "system:node:n2", Groups: []string{"system:nodes"}})))
		if w.Code != http.StatusNotFound {
			return fmt.Errorf("%d %s", w.Code, w.Body)
		}
		return nil
	})
	// As a cluster without one answers: nodes have no permission.
	alice := identity("alice")
	if _, err := route.Ask(t.Context(), route.Node{Server: first, CA: certs.Cert(certificate.ServerCA), Cert: alice, Key: alice}); !errors.Is(err, route.ErrNone) {
		t.Errorf("a user asks: %v", err)
	}
}
