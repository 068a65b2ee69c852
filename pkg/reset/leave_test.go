package reset

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
)

// signed returns a certificate and its key, as PEM.
func signed(t *testing.T, certs certificate.Store, authority, user string, usage x509.ExtKeyUsage) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err = certs.Sign(authority, certificate.Request{
		Public: private.Public(), Subject: pkix.Name{CommonName: user, Organization: []string{"system:nodes"}}, Usage: usage, Addresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if key, err = keyutil.MarshalPrivateKeyToPEM(private); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// An agent's reset that was interrupted after it had left, or that runs after its node was removed, does not wait for the cluster.
func TestAnAgentThatHasLeft(t *testing.T) {
	certs := certificate.Store(t.TempDir())
	if _, err := certificate.EnsureAuthorities(certs, time.Now()); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(certs.Cert(certificate.ServerCA))
	if err != nil {
		t.Fatal(err)
	}
	status := http.StatusOK
	asked := 0
	cert, key := signed(t, certs, certificate.ServerCA, "server", x509.ExtKeyUsageServerAuth)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		w.WriteHeader(status)
		fmt.Fprint(w, `{"message": "because"}`)
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	for answer, c := range map[int]struct {
		left bool
		says string
	}{
		http.StatusOK: {true, ""}, http.StatusUnauthorized: {true, "its node was removed before"}, http.StatusConflict: {true, "because"},
		http.StatusServiceUnavailable: {false, ""}, http.StatusForbidden: {false, ""},
	} {
		t.Run(http.StatusText(answer), func(t *testing.T) {
			dir := layout.DataDir(filepath.Join(t.TempDir(), "data-dir"))
			marker, err := datadir.Claim(dir)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir.Run()) })
			text, err := json.Marshal(map[string]string{"nodeName": "worker", "server": server.URL})
			if err != nil {
				t.Fatal(err)
			}
			write(t, string(text), dir.Membership())
			write(t, string(ca), dir.NodePKI(), "server-ca.crt")
			cert, key := signed(t, certs, certificate.ClientCA, "system:node:worker", x509.ExtKeyUsageClientAuth)
			write(t, string(cert)+string(key), dir.NodePKI(), "kubelet-client-current.pem")
			status, asked = answer, 0
			var out strings.Builder
			p := &Plan{DataDir: dir, marker: marker}
			err = p.leave(t.Context(), &out)
			var still *stillMemberError
			if (err == nil) != c.left || (err != nil) != errors.As(err, &still) || !strings.Contains(out.String(), c.says) || asked != 1 {
				t.Errorf("%v, asked %d times, says %q", err, asked, out.String())
			}
			if _, _, member := join.Member(dir); member == c.left {
				t.Errorf("it is a member: %t", member)
			}
			if !c.left {
				return
			}
			// A later step was interrupted, and has removed the certificate.
			if err := os.Remove(filepath.Join(dir.NodePKI(), "kubelet-client-current.pem")); err != nil {
				t.Fatal(err)
			}
			if err := p.leave(t.Context(), &out); err != nil || asked != 1 {
				t.Errorf("a second time: %v, asked %d times", err, asked)
			}
			if !exists(dir.Membership()) {
				t.Error("a server could start in the data dir of an agent")
			}
		})
	}
}
