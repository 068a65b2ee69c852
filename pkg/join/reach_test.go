package join

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/porttest"
)

// A kubelet is reached as the API server reaches it: by a certificate of the kubelets' authority for the address.
// serving returns a certificate that an authority has signed for a server at an address.
func serving(t *testing.T, certs certificate.Store, authority, name, address string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	cert, err := certs.Sign(authority, certificate.Request{
		Public: key.Public(), Subject: pkix.Name{CommonName: name}, Usage: x509.ExtKeyUsageServerAuth, Addresses: []net.IP{net.ParseIP(address)},
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, text)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func TestReach(t *testing.T) {
	certs := certificate.Store(t.TempDir())
	if _, err := certificate.EnsureAuthorities(certs, time.Now()); err != nil {
		t.Fatal(err)
	}
	roots, err := kubeletRoots(certs)
	if err != nil {
		t.Fatal(err)
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	serve := func(authority, address string) uint16 {
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{serving(t, certs, authority, "system:node:worker", address)}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_ = conn.(*tls.Conn).HandshakeContext(t.Context())
				conn.Close()
			}
		}()
		return uint16(l.Addr().(*net.TCPAddr).Port)
	}
	if err := reach(t.Context(), roots, loopback, serve(certificate.KubeletCA, "127.0.0.1")); err != nil {
		t.Error(err)
	}
	var address x509.HostnameError
	if err := reach(t.Context(), roots, loopback, serve(certificate.KubeletCA, "192.0.2.9")); !errors.As(err, &address) {
		t.Errorf("another node answers: %v", err)
	}
	var authority x509.UnknownAuthorityError
	if err := reach(t.Context(), roots, loopback, serve(certificate.ServerCA, "127.0.0.1")); !errors.As(err, &authority) {
		t.Errorf("no kubelet answers: %v", err)
	}
	if err := reach(t.Context(), roots, loopback, porttest.Loopback(t).Port()); err == nil {
		t.Error("a closed port is reached")
	}
}

func TestUnreachableNote(t *testing.T) {
	refused := errors.New("connection refused")
	if note := unreachable(nil); note != "" {
		t.Errorf("without a problem: %q", note)
	}
	note := unreachable(map[string]error{"b": refused, "a": refused, "c": refused, "e": refused, "d": refused})
	if !strings.Contains(note, "the kubelet of a (connection refused), b (connection refused), c (connection refused), 2 more: ") || !strings.Contains(note, "TCP 10250") {
		t.Errorf("note is %q", note)
	}
}

// A node is tried at the address that the API server uses.
func TestReachAddress(t *testing.T) {
	n := &corev1.Node{Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeExternalIP, Address: "203.0.113.1"}, {Type: corev1.NodeHostName, Address: "node"},
	}}}
	for external, want := range map[bool]string{false: "192.0.2.1", true: "203.0.113.1"} {
		if got, ok := address(n, external); !ok || got.String() != want {
			t.Errorf("external %v: %s, %v, want %s", external, got, ok, want)
		}
	}
	n.Status.Addresses = n.Status.Addresses[:1]
	if got, ok := address(n, true); !ok || got.String() != "192.0.2.1" {
		t.Errorf("a node without an external address is tried at %s, %v", got, ok)
	}
}
