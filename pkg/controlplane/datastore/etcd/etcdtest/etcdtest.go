// Package etcdtest starts members of etcd inside a test's process, as those of servers on addresses of loopback. It is for tests that need a
// real cluster of etcd; only tests import it.
package etcdtest

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/certificate/certificatetest"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/porttest"
)

// Server is a server whose member may run.
type Server struct {
	// Name is its node's.
	Name string
	// DataDir is its data dir, of which the member has its part.
	DataDir layout.DataDir
	// Options are those of the member at its next start.
	Options etcd.Options
	*etcd.Etcd
}

// New returns a server whose member does not run, on free ports of an address.
func New(t *testing.T, name string, ip netip.Addr, dir layout.DataDir, certs certificate.Store, log *slog.Logger) *Server {
	t.Helper()
	return &Server{Name: name, DataDir: dir, Options: etcd.Options{
		Dir: dir.Etcd(), Node: name, Certificates: certs,
		Client: porttest.Reserve(t, ip), HTTP: porttest.Reserve(t, ip), Peer: porttest.Reserve(t, ip), Log: log,
	}}
}

// Cluster starts a member for each name. The first one's cluster is joined by the others.
func Cluster(t *testing.T, log *slog.Logger, names ...string) []*Server {
	t.Helper()
	var all []*Server
	for _, c := range certificatetest.Servers(t, 2, names...) {
		s := New(t, c.Name, c.IP, layout.DataDir(t.TempDir()), c.Certificates, log.With("server", c.Name))
		if len(all) > 0 {
			s.Join(t, all[0])
		} else {
			s.Start(t)
		}
		all = append(all, s)
	}
	return all
}

// Start starts the member, also after Halt, and waits until it is ready.
func (s *Server) Start(t *testing.T) {
	t.Helper()
	s.Begin(t)
	s.WaitReady(t)
}

// Begin starts the member, which is halted at the end of the test.
func (s *Server) Begin(t *testing.T) {
	t.Helper()
	e := etcd.New(s.Options)
	s.Etcd = e
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { halt(t, e) })
}

// WaitReady waits until the member is ready.
func (s *Server) WaitReady(t *testing.T) {
	t.Helper()
	controlplanetest.Eventually(t, s.Name+" is ready", func() error { return s.Ready(t.Context()) })
}

// Certificates returns the server's certificates.
func (s *Server) Certificates() certificate.Store { return s.Options.Certificates }

// Halt stops the member.
func (s *Server) Halt(t *testing.T) {
	t.Helper()
	halt(t, s.Etcd)
}

func halt(t *testing.T, e *etcd.Etcd) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// Join starts the member as one more of another one's cluster, and waits until it is ready.
func (s *Server) Join(t *testing.T, through *Server) {
	t.Helper()
	s.Options.Join = func(ctx context.Context, self etcd.Peer) (members []etcd.Peer, err error) {
		controlplanetest.Eventually(t, s.Name+" is added", func() error {
			_, members, err = through.AddLearner(ctx, s.Name, self)
			return err
		})
		return members, nil
	}
	s.Start(t)
}
