package controlplane

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/porttest"
)

// The API server's listener, as configured by its options, only accepts strong ciphers (CIS Kubernetes Benchmark, 1.2.29).
func TestAPIServerRefusesWeakCiphers(t *testing.T) {
	reserved := porttest.Loopback(t)
	address, port := reserved.String(), fmt.Sprint(reserved.Port())
	dir := t.TempDir()
	empty := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Parse([]string{"-c", empty, "-d", dir, "--bind-address", "127.0.0.1", "--https-listen-port", port}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("192.0.2.1")
	certs := certificate.Options{Dir: cfg.DataDir.Server("tls"), NodeName: "n", NodeIP: ip, ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain, Now: time.Now()}
	if _, err := certificate.Ensure(certs); err != nil {
		t.Fatal(err)
	}
	a := NewAPIServer(Options{Config: cfg, NodeIP: ip, Certificates: certificate.Store(certs.Dir), Datastore: datastore.Endpoint{Servers: "unix://" + filepath.Join(dir, "none.sock")}})
	options, err := a.parse()
	if err != nil {
		t.Fatal(err)
	}
	var serving *server.SecureServingInfo
	var loopback *rest.Config
	if err := options.SecureServing.ApplyTo(&serving, &loopback); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	stopped, _, err := serving.Serve(http.NotFoundHandler(), time.Second, stop)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(stop); <-stopped })

	for _, c := range []struct {
		version, cipher uint16
		want            bool
	}{
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA, false},
		{tls.VersionTLS11, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, true},
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, true},
		{tls.VersionTLS13, 0, true},
	} {
		client := &tls.Config{InsecureSkipVerify: true, MinVersion: c.version, MaxVersion: c.version} //nolint:gosec // only the handshake matters
		if c.cipher != 0 {
			client.CipherSuites = []uint16{c.cipher}
		}
		conn, err := tls.Dial("tcp", address, client)
		if err == nil {
			conn.Close()
		}
		if what := fmt.Sprintf("%s with %s", tls.VersionName(c.version), tls.CipherSuiteName(c.cipher)); (err == nil) != c.want {
			t.Errorf("%s: %v, want it accepted: %v", what, err, c.want)
		}
	}
}
