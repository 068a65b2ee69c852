// Package datastore runs the cluster's datastore: kine, which serves etcd's API from SQLite, inside this process.
//
// It owns <data-dir>/server/db and the socket on which the API server reaches it. What it has acknowledged is on disk,
// unless the server's administrator asked for Sync NORMAL.
package datastore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/drivers/sqlite"
	_ "github.com/mattn/go-sqlite3" // the driver, also kine's
	"github.com/sirupsen/logrus"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// Options say where a datastore lies and how careful it is.
type Options struct {
	// Dir holds the database.
	Dir string
	// Socket is the UNIX socket on which it listens.
	Socket string
	// Sync is when a write is on disk.
	Sync config.DatastoreSync
}

// Datastore is the component "datastore".
type Datastore struct {
	opts   Options
	disk   disk
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

// New returns a datastore that is not open yet.
func New(o Options) *Datastore {
	return &Datastore{opts: o, disk: disk{dir: o.Dir}}
}

// Endpoint implements Store. Only this server reaches its SQLite, so there is no one to elect a leader among.
func (d *Datastore) Endpoint() Endpoint { return Endpoint{Servers: "unix://" + d.opts.Socket} }

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

// Init does nothing: the database is opened by Start.
func (d *Datastore) Init(context.Context) error { return nil }

// compactMinRetain is how many revisions a compaction leaves, however old they are. kine's own 1000 are 40 minutes on a quiet
// node. It is not 0, because kine takes the newest row for the newest revision, and that row may be a deletion.
const compactMinRetain = 10

func (d *Datastore) file() string { return filepath.Join(d.opts.Dir, "state.db") }

// dsn is the database's name for mattn's driver. WAL with synchronous FULL syncs the log at each commit; NORMAL does so at
// checkpoints only (https://www.sqlite.org/pragma.html#pragma_synchronous). The other settings are kine's own default.
func (d *Datastore) dsn() string {
	return d.file() + "?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate&_sync=" + strings.ToUpper(string(d.opts.Sync))
}

// driver is the configuration of kine's driver. What is not said elsewhere is kine's own default (pkg/app/app.go). There is no
// CompactInterval: the API server compacts, as it does etcd, every 5 minutes to the revision of 5 minutes before
// (k8s.io/apiserver/pkg/storage/etcd3/compact.go). A continue token of 5 to 10 minutes expires.
func (d *Datastore) driver() *drivers.Config {
	return &drivers.Config{
		DataSourceName:   d.dsn(),
		CompactTimeout:   5 * time.Second,
		CompactMinRetain: compactMinRetain,
		CompactBatchSize: 1000,
		PollBatchSize:    500,
	}
}

// Start opens the database and listens.
func (d *Datastore) Start(ctx context.Context) error {
	if err := d.prepare(); err != nil {
		return err
	}
	// kine says each compaction and slow query in its own format; only what goes wrong is worth a line.
	logrus.SetLevel(logrus.WarnLevel)
	logrus.AddHook(withoutValues{})
	logrus.AddHook(withoutExit{})
	live, cancel := component.Running(ctx)
	d.cancel = cancel
	opened := make(chan error, 1)
	go func() {
		// kine tries for five minutes to open a database that is damaged.
		err := d.readable(live)
		if err == nil {
			err = d.listen(live)
		}
		opened <- err
	}()
	var err error
	select {
	case err = <-opened:
	case <-ctx.Done():
		// A locked database is waited for, up to the busy timeout; the process does not end later because of it.
		return fmt.Errorf("open the database in %s: %w", d.opts.Dir, context.Cause(ctx))
	}
	if err != nil {
		if strings.Contains(err.Error(), "malformed") || strings.Contains(err.Error(), "not a database") {
			return fmt.Errorf("%s is damaged: restore it from a backup, or remove everything with `polymesh reset`: %w", d.file(), err)
		}
		return fmt.Errorf("open the database in %s: %w", d.opts.Dir, err)
	}
	return nil
}

// listen opens the database and serves it on the socket until ctx ends. It does what kine's endpoint.Listen does, which
// would link every driver that kine has, with NATS, PostgreSQL and S3.
func (d *Datastore) listen(ctx context.Context) (err error) {
	// The database outlives ctx: it is closed after the last request.
	open, closeDatabase := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			closeDatabase()
		}
	}()
	// This gives the pages that compactions have freed back to the disk, too: kine runs VACUUM at each start.
	_, backend, err := sqlite.New(open, &d.wait, d.driver())
	if err != nil {
		return err
	}
	if err := backend.Start(open); err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", d.opts.Socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(d.opts.Socket, 0o600); err != nil {
		return errors.Join(err, listener.Close())
	}
	serving := d.server(backend)
	d.wait.Go(func() {
		if err := serving.Serve(listener); err != nil {
			logrus.Errorf("serve %s: %v", d.opts.Socket, err)
		}
	})
	d.wait.Go(func() {
		<-ctx.Done()
		// Watches do not end by themselves.
		timer := time.AfterFunc(stopTimeout, serving.Stop)
		defer timer.Stop()
		serving.GracefulStop()
		closeDatabase()
	})
	return nil
}

// readable reads the database's schema.
func (d *Datastore) readable(ctx context.Context) error {
	db, err := sql.Open("sqlite3", d.dsn())
	if err != nil {
		return err
	}
	defer db.Close()
	var tables int
	return db.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master").Scan(&tables)
}

// withoutValues keeps what is stored out of the log. kine logs a write that failed with all that was to be written, Secrets
// too ("error in txn %s: %v" in its pkg/server/kv.go).
type withoutValues struct{}

// Levels implements logrus.Hook.
func (withoutValues) Levels() []logrus.Level { return logrus.AllLevels }

// Fire implements logrus.Hook.
func (withoutValues) Fire(e *logrus.Entry) error {
	for _, request := range []string{"txn", "put"} {
		if strings.HasPrefix(e.Message, "error in "+request+" ") {
			// The error follows the request's last separator, or one that is further on.
			e.Message = "error in " + request + e.Message[strings.LastIndex(e.Message, ": "):]
		}
	}
	return nil
}

// prepare makes the folders and the database's file, which SQLite would make readable for everyone. The files beside it
// (-wal, -shm) get its mode (findCreateFileMode in SQLite's os_unix.c).
func (d *Datastore) prepare() error {
	if err := atomicfile.MkdirAll(d.opts.Dir, 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(d.opts.Socket), 0o711); err != nil {
		return err
	}
	if err := os.Remove(d.opts.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the socket of an earlier run: %w", err)
	}
	f, err := os.OpenFile(d.file(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Chmod(d.file()+suffix, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("keep the database to this user: %w", err)
		}
	}
	// The name of a new database must outlive what is acknowledged in it.
	return atomicfile.SyncDir(d.opts.Dir)
}

// Ready is nil when the socket answers and the disk takes writes.
func (d *Datastore) Ready(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", d.opts.Socket)
	if err != nil {
		return err
	}
	if err := conn.Close(); err != nil {
		return err
	}
	return d.disk.check(time.Now())
}

// Note implements component.Noted: the disk is nearly full.
func (d *Datastore) Note(context.Context) string { return d.disk.warning() }

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
