// Package datastore is the cluster's datastore, which serves etcd's API to the API server: kine in this process, from SQLite or from an
// SQL database outside (sql.go), or an etcd outside (external.go). A Store is the component, an Endpoint what its clients need.
//
// It owns <data-dir>/server/db and the socket for the API server. Acknowledged writes are on disk, unless the server's
// administrator has set Sync to NORMAL, or has set up an external datastore to do otherwise.
package datastore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/drivers/sqlite"
	kine "github.com/k3s-io/kine/pkg/server"
	_ "github.com/mattn/go-sqlite3" // the driver, also used by kine

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// Options are the location and the durability of a datastore.
type Options struct {
	// Dir contains the database.
	Dir string
	// Socket is the Unix socket to listen on.
	Socket string
	// Sync is the point at which a write is on disk.
	Sync config.DatastoreSync
}

// Datastore is the component "datastore".
type Datastore struct {
	opts Options
	disk disk
	kine kineServer
}

// New returns a datastore that is not yet open.
func New(o Options) *Datastore {
	d := &Datastore{opts: o, disk: disk{dir: o.Dir}}
	d.kine = kineServer{socket: o.Socket, open: d.open, writable: func() error { return d.disk.check(time.Now()) }}
	return d
}

// Endpoint implements Store. Only this server can access its SQLite, so no leader election is needed.
func (d *Datastore) Endpoint() Endpoint { return Endpoint{Servers: "unix://" + d.opts.Socket} }

// Name implements component.Component.
func (d *Datastore) Name() string { return "datastore" }

// Version is kine's version.
func (d *Datastore) Version() string { return kineVersion() }

// Init does nothing: the database is opened by Start.
func (d *Datastore) Init(context.Context) error { return nil }

// compactMinRetain is the number of revisions that a compaction keeps, whatever their age. kine's default of 1000 is 40 minutes on an
// idle node. It is not 0, because kine takes the newest row for the newest revision, and that row may be a deletion.
const compactMinRetain = 10

func (d *Datastore) file() string { return filepath.Join(d.opts.Dir, "state.db") }

// dsn returns the database's name for mattn's driver. WAL with synchronous FULL syncs the log at each commit; NORMAL only syncs at
// checkpoints (https://www.sqlite.org/pragma.html#pragma_synchronous). The other settings are kine's defaults.
func (d *Datastore) dsn() string {
	return d.file() + "?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate&_sync=" + strings.ToUpper(string(d.opts.Sync))
}

// driver returns the configuration of kine's driver.
func (d *Datastore) driver() *drivers.Config { return kineConfig(d.dsn()) }

// kineConfig returns the configuration of one of kine's drivers. Settings that are not set here or elsewhere have kine's defaults (pkg/app/app.go).
// CompactInterval is not set: the API server compacts, as with etcd, every 5 minutes to the revision of 5 minutes ago
// (k8s.io/apiserver/pkg/storage/etcd3/compact.go). Continue tokens expire after 5 to 10 minutes.
func kineConfig(dsn string) *drivers.Config {
	return &drivers.Config{
		DataSourceName:   dsn,
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
	live := d.kine.live(ctx)
	opened := make(chan error, 1)
	go func() {
		// kine retries opening a damaged database for five minutes.
		err := d.readable(live)
		if err == nil {
			err = d.kine.listen(live)
		}
		opened <- err
	}()
	var err error
	select {
	case err = <-opened:
	case <-ctx.Done():
		// Opening waits for a locked database, up to the busy timeout; that must not delay the end of the process.
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

// open opens the database. It also returns pages freed by compactions to the disk: kine runs VACUUM at each start.
func (d *Datastore) open(ctx context.Context, wait *sync.WaitGroup) (kine.Backend, error) {
	_, backend, err := sqlite.New(ctx, wait, d.driver())
	return backend, err
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

// prepare creates the folders and the database file, which SQLite would create world-readable. The files next to it
// (-wal, -shm) get the same mode (findCreateFileMode in SQLite's os_unix.c).
func (d *Datastore) prepare() error {
	if err := atomicfile.MkdirAll(d.opts.Dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(d.file(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("create the database: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Chmod(d.file()+suffix, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("restrict access to the database: %w", err)
		}
	}
	// Sync the directory: the new file must survive a power failure, like the writes acknowledged in it.
	return atomicfile.SyncDir(d.opts.Dir)
}

// Ready returns nil if the socket responds and the disk accepts writes.
func (d *Datastore) Ready(ctx context.Context) error {
	if err := d.kine.answers(ctx); err != nil {
		return err
	}
	return d.disk.check(time.Now())
}

// Notes implements component.Noted: the disk is nearly full.
func (d *Datastore) Notes(context.Context) []string {
	note := d.disk.warning()
	return component.Present(&note)
}

// Stop closes the database.
func (d *Datastore) Stop(ctx context.Context) error { return d.kine.stop(ctx) }
