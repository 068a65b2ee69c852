package join

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
)

// serve starts a server with a certificate of the cluster, which asks for those of clients that the authority clients has certified.
func serve(t *testing.T, certs certificate.Store, clients string, handler http.HandlerFunc) string {
	t.Helper()
	known, err := os.ReadFile(certs.Cert(clients))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(known)
	s := httptest.NewUnstartedServer(handler)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{serving(t, certs, certificate.ServerCA, "server", "127.0.0.1")}, ClientAuth: tls.RequestClientCert, ClientCAs: pool}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

// member makes a data dir of the node "worker", with a certificate that was made at a time.
func member(t *testing.T, certs certificate.Store, at time.Time) layout.DataDir {
	t.Helper()
	m := Machine{DataDir: layout.DataDir(t.TempDir()), Server: "https://192.0.2.1:6443", NodeName: "worker"}
	client, serving := newKey(t), newKey(t)
	g := &Grant{ClientCertificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certified(t, certs, User("worker"), client, at)})}
	var err error
	g.ServingCertificate, err = certs.Sign(certificate.KubeletCA, certificate.Request{
		Public: serving.Public(), Subject: pkix.Name{CommonName: User("worker")}, Usage: x509.ExtKeyUsageServerAuth, Names: []string{"worker"},
	}, at)
	if err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]*[]byte{certificate.ServerCA: &g.ServerCA, certificate.ClientCA: &g.ClientCA} {
		if *to, err = os.ReadFile(certs.Cert(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.keep(files(m.DataDir), g, client, serving); err != nil {
		t.Fatal(err)
	}
	return m.DataDir
}

// A machine that has left before, or whose node was removed, finds that out. Nothing else is taken for it.
func TestLeaveAgain(t *testing.T) {
	certs, others := certificate.Store(t.TempDir()), certificate.Store(t.TempDir())
	for _, c := range []certificate.Store{certs, others} {
		if _, err := certificate.EnsureAuthorities(c, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	answers := func(status int, date time.Time) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != LeavePath || r.Method != http.MethodPost {
				t.Errorf("it asks %s %s", r.Method, r.URL)
			}
			if !date.IsZero() {
				w.Header().Set("Date", date.UTC().Format(http.TimeFormat))
			}
			w.WriteHeader(status)
			fmt.Fprint(w, `{"message": "because"}`)
		}
	}
	now := time.Now()
	valid, expired := member(t, certs, now), member(t, certs, now.Add(-certificate.NodeLife-time.Hour))
	own := func(status int, date time.Time) string {
		return serve(t, certs, certificate.ClientCA, answers(status, date))
	}
	for what, c := range map[string]struct {
		dir    layout.DataDir
		server string
		gone   bool
	}{
		"a void certificate":                             {valid, own(http.StatusUnauthorized, time.Time{}), true},
		"another machine has the name":                   {valid, own(http.StatusConflict, time.Time{}), true},
		"an expired certificate":                         {expired, own(http.StatusUnauthorized, time.Time{}), false},
		"expired by the server's clock":                  {valid, own(http.StatusUnauthorized, now.Add(certificate.NodeLife+time.Hour)), false},
		"not valid yet by the server's clock":            {valid, own(http.StatusUnauthorized, now.Add(-time.Hour)), false},
		"a server that is starting":                      {valid, own(http.StatusServiceUnavailable, time.Time{}), false},
		"a server that does not know the roles yet":      {valid, own(http.StatusForbidden, time.Time{}), false},
		"no such path":                                   {valid, own(http.StatusNotFound, time.Time{}), false},
		"a server that fails":                            {valid, own(http.StatusInternalServerError, time.Time{}), false},
		"a redirection":                                  {valid, own(http.StatusTemporaryRedirect, time.Time{}), false},
		"a server of another cluster":                    {valid, serve(t, others, certificate.ClientCA, answers(http.StatusUnauthorized, time.Time{})), false},
		"a server that knows another authority of nodes": {valid, serve(t, certs, certificate.KubeletCA, answers(http.StatusUnauthorized, time.Time{})), false},
		"no server":                                      {valid, "https://127.0.0.1:1", false},
	} {
		err := Leave(t.Context(), c.dir, c.server)
		var gone *GoneError
		if err == nil || errors.As(err, &gone) != c.gone {
			t.Errorf("%s: %v", what, err)
		}
	}
	sent := serve(t, certs, certificate.ClientCA, func(w http.ResponseWriter, r *http.Request) {
		if name, _, ok := claimedNode(r); !ok || name != "worker" {
			t.Errorf("it sends the certificate of %q", name)
		}
		fmt.Fprint(w, "{}")
	})
	if err := Leave(t.Context(), valid, sent); err != nil {
		t.Error(err)
	}
	if _, _, ok := Member(valid); !ok {
		t.Error("it is no member before it forgets")
	}
	for range 2 {
		if err := Forget(valid); err != nil {
			t.Error(err)
		}
	}
	if _, _, ok := Member(valid); ok {
		t.Error("it does not forget")
	}
}
