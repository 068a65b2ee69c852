// Package etcdtest starts members of etcd inside a test's process, as those of servers on addresses of loopback. It is for tests that need a
// real cluster of etcd; only tests import it.
package etcdtest

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/layout"
)

// Server is a server whose member may run.
type Server struct {
	// Name is its node's.
	Name string
	// DataDir is its data dir, of which the member has its part.
	DataDir layout.DataDir
	*etcd.Etcd
	opts etcd.Options
}

// Cluster starts a member for each name. The first one's cluster is joined by the others.
func Cluster(t *testing.T, log *slog.Logger, names ...string) []*Server {
	t.Helper()
	var all []*Server
	var authorities *certificate.Authorities
	for i, name := range names {
		ip := netip.AddrFrom4([4]byte{127, 0, 2, byte(i + 1)})
		certs := certificate.Store(t.TempDir())
		if authorities != nil {
			exported, err := authorities.Export()
			if err != nil {
				t.Fatal(err)
			}
			if err := certificate.Import(certs, exported); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		if authorities, err = certificate.EnsureAuthorities(certs, time.Now()); err != nil {
			t.Fatal(err)
		}
		if _, err := authorities.Issue(certificate.Options{
			Dir: string(certs), NodeName: name, NodeIP: ip, ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now(),
		}); err != nil {
			t.Fatal(err)
		}
		dir := layout.DataDir(t.TempDir())
		s := &Server{Name: name, DataDir: dir, opts: etcd.Options{
			Dir: dir.Etcd(), Node: name, Certificates: certs, Client: free(t, ip), HTTP: free(t, ip), Peer: free(t, ip), Log: log.With("server", name),
		}}
		if i > 0 {
			s.join(t, all[0])
		} else {
			s.Start(t)
		}
		all = append(all, s)
	}
	return all
}

func free(t *testing.T, ip netip.Addr) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(ip, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// Start starts the member, also after Stop, and waits until it is ready.
func (s *Server) Start(t *testing.T) {
	t.Helper()
	s.begin(t)
	controlplanetest.Eventually(t, s.Name+" is ready", func() error { return s.Ready(t.Context()) })
}

func (s *Server) begin(t *testing.T) {
	t.Helper()
	e := etcd.New(s.opts)
	s.Etcd = e
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, e) })
}

// Certificates returns the server's certificates.
func (s *Server) Certificates() certificate.Store { return s.opts.Certificates }

// Halt stops the member.
func (s *Server) Halt(t *testing.T) {
	t.Helper()
	stop(t, s.Etcd)
}

func stop(t *testing.T, e *etcd.Etcd) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func (s *Server) join(t *testing.T, through *Server) {
	t.Helper()
	s.opts.Join = func(ctx context.Context, self etcd.Peer) (members []etcd.Peer, err error) {
		controlplanetest.Eventually(t, s.Name+" is added", func() error {
			_, members, err = through.AddLearner(ctx, s.Name, self)
			return err
		})
		return members, nil
	}
	s.begin(t)
	controlplanetest.Eventually(t, s.Name+" is ready", func() error { return s.Ready(t.Context()) })
}
