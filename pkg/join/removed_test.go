package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	clientcertificate "k8s.io/client-go/util/certificate"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/layout"
)

func secret(data map[string]string) *corev1.Secret {
	s := &corev1.Secret{Data: map[string][]byte{}}
	for key, value := range data {
		s.Data[key] = []byte(value)
	}
	return s
}

func TestRecords(t *testing.T) {
	_, certs := cluster(t)
	cert := func(at time.Time) *x509.Certificate {
		c, err := x509.ParseCertificate(certified(t, certs, "system:node:worker", newKey(t), at))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	at := func(d time.Duration) string { return now.Add(d).Format(time.RFC3339Nano) }
	const always = 1000 * time.Hour
	for what, c := range map[string]struct {
		data        map[string]string
		free        bool
		voidedUntil time.Duration // of certificates, from now; all are void while no agent has the name
	}{
		"joined":                      {map[string]string{"time": at(0)}, false, -time.Hour},
		"registered":                  {map[string]string{"time": at(0), "node": "a"}, false, -time.Hour},
		"removed":                     {map[string]string{"time": at(0), "node": "a", "removed": at(time.Hour)}, true, always},
		"joined again":                {map[string]string{"time": at(2 * time.Hour), "removed": at(time.Hour)}, false, time.Hour},
		"registered again":            {map[string]string{"time": at(2 * time.Hour), "node": "b", "removed": at(time.Hour)}, false, time.Hour},
		"damaged":                     {map[string]string{"time": "yesterday", "removed": "yesterday"}, false, -time.Hour},
		"empty":                       {nil, false, -time.Hour},
		"a server":                    {map[string]string{"role": "server", "time": at(0), "node": "a"}, false, -time.Hour},
		"a server that was removed":   {map[string]string{"role": "server", "time": at(0), "node": "a", "left": at(time.Hour)}, true, -time.Hour},
		"a server after an agent":     {map[string]string{"role": "server", "time": at(2 * time.Hour), "removed": at(time.Hour)}, false, time.Hour},
		"removed, after an agent":     {map[string]string{"role": "server", "time": at(2 * time.Hour), "removed": at(time.Hour), "left": at(3 * time.Hour)}, true, time.Hour},
		"of a role that no one knows": {map[string]string{"role": "king", "time": at(0), "removed": at(time.Hour)}, true, always},
	} {
		r := readRecord(secret(c.data))
		if r.free() != c.free {
			t.Errorf("%s: the name is free: %t", what, r.free())
		}
		for _, made := range []time.Duration{0, time.Hour - time.Second, time.Hour, 2 * time.Hour} {
			if want := made < c.voidedUntil; r.void(cert(now.Add(made))) != want {
				t.Errorf("%s: a certificate of %s later is void: %t", what, made, !want)
			}
		}
	}
}

// A machine whose node was removed has the certificate and the key of before. They do not make it the node that has its name now.
func TestRemovedCertificateProvesNothing(t *testing.T) {
	view, certs := cluster(t)
	key := newKey(t)
	r := Request{
		NodeName: "worker", NodeIP: netip.MustParseAddr("192.0.2.2"), Version: view.Version, Now: now, ClientCSR: csr(t, key), ServingCSR: csr(t, newKey(t)),
		Certificate: certified(t, certs, "system:node:worker", key, now.Add(-time.Hour)),
	}
	if _, refused := Decide(r, view); refused != nil {
		t.Fatal(refused)
	}
	view.Record = readRecord(secret(map[string]string{"time": now.Add(-time.Minute).Format(time.RFC3339Nano), "removed": now.Add(-2 * time.Minute).Format(time.RFC3339Nano)}))
	if _, refused := Decide(r, view); refused == nil {
		t.Error("it takes the place of the node that has its name now")
	}
}

// client-go's store removes the link to the certificate in use before it makes the next one.
func TestInterruptedRenewal(t *testing.T) {
	_, certs := cluster(t)
	for how, crash := range map[string]func(dir string) error{
		"before the link is renamed": func(dir string) error {
			return os.Rename(filepath.Join(dir, "kubelet-client-current.pem"), filepath.Join(dir, "kubelet-client-updated.pem"))
		},
		"without a link": func(dir string) error { return os.Remove(filepath.Join(dir, "kubelet-client-current.pem")) },
		"with an empty newest file": func(dir string) error {
			newest := filepath.Join(dir, "kubelet-client-2999-01-01-00-00-00.pem")
			current := filepath.Join(dir, "kubelet-client-current.pem")
			if err := os.WriteFile(newest, nil, 0o600); err != nil {
				return err
			}
			if err := os.Remove(current); err != nil {
				return err
			}
			return os.Symlink(newest, current)
		},
	} {
		t.Run(how, func(t *testing.T) {
			dir := layout.DataDir(t.TempDir())
			key := newKey(t)
			text, err := keyutil.MarshalPrivateKeyToPEM(key)
			if err != nil {
				t.Fatal(err)
			}
			store, err := clientcertificate.NewFileStore("kubelet-client", dir.NodePKI(), dir.NodePKI(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			der := certified(t, certs, "system:node:worker", key, now)
			if _, err := store.Update(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), text); err != nil {
				t.Fatal(err)
			}
			ca, err := os.ReadFile(certs.Cert("server-ca"))
			if err != nil {
				t.Fatal(err)
			}
			f := files(dir)
			if err := os.WriteFile(f.ServerCA, ca, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := crash(dir.NodePKI()); err != nil {
				t.Fatal(err)
			}
			got, err := Machine{DataDir: dir, NodeName: "worker"}.membership(f, now)
			if err != nil || !got.valid || got.key == nil || !got.key.Equal(key) {
				t.Errorf("the node has its certificate: %t (%v)", got.valid, err)
			}
		})
	}
}

// While a server starts, it says so: 401 would mean that the node was removed, or that the token was revoked.
func TestStarting(t *testing.T) {
	_, certs := cluster(t)
	cert, err := x509.ParseCertificate(certified(t, certs, "system:node:worker", newKey(t), now))
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(Options{Log: slog.New(slog.DiscardHandler)})
	handler := s.Filter(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	answered := func(path string, peer *x509.Certificate) *httptest.ResponseRecorder {
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // it does not wait
		req := httptest.NewRequestWithContext(ctx, http.MethodGet, path, nil)
		req.TLS = &tls.ConnectionState{}
		if peer != nil {
			req.TLS.PeerCertificates = []*x509.Certificate{peer}
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, req)
		return w
	}
	for _, w := range []*httptest.ResponseRecorder{answered("/api/v1/nodes/worker", cert), answered(ClusterPath, cert), answered(AgentPath, nil), answered(ServerPath, nil)} {
		refusal := &Refusal{}
		if err := json.Unmarshal(w.Body.Bytes(), refusal); err != nil || w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || refusal.Message != "the server is starting: try again" {
			t.Errorf("%d, %v: %s", w.Code, w.Header(), w.Body)
		}
	}
	// Components of the server, and health checks.
	if w := answered("/readyz", nil); w.Code != http.StatusTeapot {
		t.Errorf("/readyz: %d", w.Code)
	}
	close(s.records.known)
	if w := answered(ClusterPath, cert); w.Code != http.StatusTeapot {
		t.Errorf("a server that has started: %d", w.Code)
	}
}

// A node chooses how long a server tries to reach it. It has one place, and none of the machines that join.
func TestAsking(t *testing.T) {
	var a asking
	if !a.begin("one") || a.begin("one") || !a.begin("other") {
		t.Error("one node has two places, or two have one")
	}
	a.end("one")
	if !a.begin("one") {
		t.Error("a node asks once only")
	}
	for i := range maxAsking {
		a.begin(fmt.Sprint(i))
	}
	if a.begin("more") || len(a.nodes) != maxAsking {
		t.Errorf("%d nodes are answered at a time", len(a.nodes))
	}
}
