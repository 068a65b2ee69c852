// Package certificatetest makes servers of one cluster for tests: a name, an address of loopback, and certificates of the same authorities.
// It is for tests of what servers say to each other; only tests import it.
package certificatetest

import (
	"net/netip"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
)

// Server is what a server is known by.
type Server struct {
	// Name is its node's.
	Name string
	// IP is its own.
	IP netip.Addr
	// Certificates are its certificates, with the authorities.
	Certificates certificate.Store
}

// Servers returns the servers of a cluster, on addresses of a network of loopback, 127.0.x.0/24. The first one's authorities are the cluster's.
func Servers(t testing.TB, network byte, names ...string) []Server {
	t.Helper()
	var all []Server
	var authorities map[string][]byte
	for i, name := range names {
		s := Server{Name: name, IP: netip.AddrFrom4([4]byte{127, 0, network, byte(i + 1)}), Certificates: certificate.Store(t.TempDir())}
		if authorities != nil {
			if err := certificate.Import(s.Certificates, authorities); err != nil {
				t.Fatal(err)
			}
		}
		own, err := certificate.EnsureAuthorities(s.Certificates, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := own.Issue(certificate.Options{
			Dir: string(s.Certificates), NodeName: name, NodeIP: s.IP, ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now(),
		}); err != nil {
			t.Fatal(err)
		}
		if authorities == nil {
			if authorities, err = own.Export(); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, s)
	}
	return all
}
