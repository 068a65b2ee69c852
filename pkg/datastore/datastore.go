// Package datastore runs the cluster's datastore: kine, which serves etcd's API from SQLite, inside this process.
//
// It owns <data-dir>/server/db and the socket on which the API server reaches it.
package datastore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/endpoint"
	"github.com/sirupsen/logrus"
)

// Datastore is the component "datastore".
type Datastore struct {
	dir    string
	socket string
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

// New returns a datastore with its files in dir that will listen on a UNIX socket.
func New(dir, socket string) *Datastore {
	return &Datastore{dir: dir, socket: socket}
}

// Endpoint is the value for the API server's --etcd-servers.
func (d *Datastore) Endpoint() string { return "unix://" + d.socket }

// Name implements component.Component.
func (d *Datastore) Name() string { return "datastore" }

// Version is kine's.
func (d *Datastore) Version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "github.com/k3s-io/kine" {
				return "kine " + dep.Version
			}
		}
	}
	return "kine"
}

// Init makes the folder.
func (d *Datastore) Init(context.Context) error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	return os.MkdirAll(filepath.Dir(d.socket), 0o711)
}

// Start opens the database and listens.
func (d *Datastore) Start(ctx context.Context) error {
	if err := os.Remove(d.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the socket of an earlier run: %w", err)
	}
	// kine says each compaction and slow query in its own format; only what goes wrong is worth a line.
	logrus.SetLevel(logrus.WarnLevel)
	ctx, d.cancel = context.WithCancel(ctx)
	// kine's own default for SQLite: what is acknowledged survives the end of the process. What survives a power cut is
	// whole but may lack the last moments, as with K3s.
	dsn := filepath.Join(d.dir, "state.db") + "?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate"
	_, err := endpoint.Listen(ctx, endpoint.Config{
		WaitGroup:             &d.wait,
		Listener:              d.Endpoint(),
		Endpoint:              "sqlite://" + dsn,
		NotifyInterval:        5 * time.Second,
		EmulatedETCDVersion:   "3.6.8",
		CompactInterval:       5 * time.Minute,
		CompactIntervalJitter: 0,
		CompactTimeout:        5 * time.Second,
		CompactMinRetain:      1000,
		CompactBatchSize:      1000,
		PollBatchSize:         500,
	})
	if err != nil {
		if strings.Contains(err.Error(), "malformed") || strings.Contains(err.Error(), "not a database") {
			return fmt.Errorf("%s is damaged: restore it from a backup, or `polymesh reset` to start anew: %w", filepath.Join(d.dir, "state.db"), err)
		}
		return fmt.Errorf("open the database in %s: %w", d.dir, err)
	}
	return nil
}

// Ready is nil when the socket answers.
func (d *Datastore) Ready(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", d.socket)
	if err != nil {
		return err
	}
	return conn.Close()
}

// Stop closes the database.
func (d *Datastore) Stop(ctx context.Context) error {
	if d.cancel == nil {
		return nil
	}
	d.cancel()
	done := make(chan struct{})
	go func() { d.wait.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("still closing: %w", ctx.Err())
	}
}
