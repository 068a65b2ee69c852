// Package datastoretest runs kine on SQLite inside a test's process, as a server does. It is for tests that need a real datastore; only tests
// import it. Package etcdtest does the same for etcd.
package datastoretest

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// Server is a datastore that runs.
type Server struct {
	*datastore.Datastore
	// Client is connected to it.
	Client *clientv3.Client
	// Halt stops both. A second call does nothing.
	Halt func()
}

// Start starts a datastore in a folder, which may have one, until Halt or the end of the test.
func Start(t testing.TB, dir string) *Server {
	t.Helper()
	s := &Server{Datastore: datastore.New(datastore.Options{Dir: dir, Socket: Socket(t), Sync: config.SyncFull})}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.Halt = sync.OnceFunc(func() {
		if s.Client != nil {
			s.Client.Close()
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(s.Halt)
	var err error
	if s.Client, err = s.Endpoint().Client(); err != nil {
		t.Fatal(err)
	}
	return s
}

// Socket returns a path for a datastore's socket. It does not contain the test's name as t.TempDir does: the path of a socket has at most 107
// bytes (unix(7)), and a comma separates the endpoints of a datastore.
func Socket(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}
