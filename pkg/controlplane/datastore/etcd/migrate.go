package etcd

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	_ "github.com/mattn/go-sqlite3" // the driver, also used by kine
	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
)

const (
	// migrateTimeout is the time for the whole migration; it takes seconds.
	migrateTimeout = 10 * time.Minute
	// batchKeys and batchBytes bound one transaction, below etcd's limits of 128 operations and 1.5 MB.
	batchKeys, batchBytes = 100, 1 << 20
	// revisionGap is how far the first revision in etcd is above the last one in SQLite.
	revisionGap = 1000
	// Migrated is added to the name of the SQLite database that was moved to etcd.
	Migrated = ".migrated"
)

// migrate moves the cluster's state from a SQLite database of kine's, which no process uses, to a member that has no data yet. It may be
// interrupted at any moment, and then begins again: the member's data gets its name when it is complete.
//
// Revisions continue above those of SQLite, and all earlier ones count as compacted. So a client that knows a revision lists its objects
// again, as after any compaction. K3s's begin again at 1, which stops each client that knows a higher one until it is restarted.
func (e *Etcd) migrate(ctx context.Context) error {
	if e.opts.SQLite == "" {
		return nil
	}
	if _, err := os.Stat(e.opts.SQLite); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	exists, err := Exists(e.opts.Dir)
	if err != nil {
		return err
	}
	if exists {
		// A migration ended here, before the last step.
		return e.retire()
	}
	if e.opts.Join != nil {
		return fmt.Errorf("this server has a cluster of its own in %s, and cannot join another one with it", e.opts.SQLite)
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	work := e.opts.Dir + ".new"
	if err := os.RemoveAll(work); err != nil {
		return fmt.Errorf("remove what an interrupted migration has left: %w", err)
	}
	if err := atomicfile.MkdirAll(work, 0o700); err != nil {
		return err
	}
	revision, keys, err := e.copy(ctx, filepath.Join(work, "copy"), filepath.Join(work, "snapshot"))
	if err != nil {
		return err
	}
	restored := filepath.Join(work, "restored")
	if err := e.restore(filepath.Join(work, "snapshot"), restored, revision+revisionGap); err != nil {
		return err
	}
	if err := atomicfile.Rename(filepath.Join(restored, "member"), filepath.Join(e.opts.Dir, "member")); err != nil {
		return err
	}
	if err := e.retire(); err != nil {
		return err
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	e.log.Info("the datastore has moved from SQLite to etcd", "keys", keys, "revision", revision, "old", e.opts.SQLite+Migrated, "after", time.Since(begin).Round(time.Millisecond).String())
	return nil
}

// retire gives the SQLite database, whose content etcd has, another name. Its log is part of it, and is closed first.
func (e *Etcd) retire() error {
	db, err := openSQLite(e.opts.SQLite)
	if err != nil {
		return err
	}
	_, err = db.Exec("PRAGMA wal_checkpoint(TRUNCATE)")
	if err = errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("close %s: %w", e.opts.SQLite, err)
	}
	// They are empty, and must not be taken for those of a later database of this name.
	wal, err := os.Stat(e.opts.SQLite + "-wal")
	if err == nil && wal.Size() > 0 {
		return fmt.Errorf("%s has a log of %d bytes after it was closed: another process uses it", e.opts.SQLite, wal.Size())
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Remove(e.opts.SQLite + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return atomicfile.Rename(e.opts.SQLite, e.opts.SQLite+Migrated)
}

func openSQLite(file string) (*sql.DB, error) {
	db, err := sql.Open("sqlite3", file+"?_journal=WAL&_busy_timeout=30000")
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// copy writes the newest value of each key into a new member in dir, and a snapshot of that into file. It returns the last revision.
func (e *Etcd) copy(ctx context.Context, dir, file string) (revision int64, keys int, err error) {
	o, err := e.offline(ctx, dir, false)
	if err != nil {
		return 0, 0, err
	}
	defer o.close()
	if revision, keys, err = copyRows(ctx, e.opts.SQLite, o.client); err != nil {
		return 0, 0, fmt.Errorf("copy %s into etcd: %w", e.opts.SQLite, err)
	}
	count, err := o.client.Get(ctx, "/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err == nil && count.Count != int64(keys) {
		err = fmt.Errorf("%d keys were written, and %d are there", keys, count.Count)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("check the copy of %s: %w", e.opts.SQLite, err)
	}
	return revision, keys, o.save(file)
}

// current are the rows of kine's table that are the present state (its pkg/drivers/generic): the newest of each key, unless that
// is its deletion. Rows of kine's own have names without a slash.
const current = `SELECT name, value, lease FROM kine JOIN (SELECT MAX(id) AS id FROM kine GROUP BY name) USING (id)
	WHERE deleted = 0 AND name LIKE '/%' ORDER BY id`

// copyRows writes them to etcd, except what servers shared when the cluster had several before: this server shares what it has now.
func copyRows(ctx context.Context, file string, client *clientv3.Client) (revision int64, keys int, err error) {
	db, err := openSQLite(file)
	if err != nil {
		return 0, 0, err
	}
	defer db.Close()
	if err := db.QueryRowContext(ctx, "SELECT COALESCE(MAX(id), 0) FROM kine").Scan(&revision); err != nil {
		return 0, 0, err
	}
	rows, err := db.QueryContext(ctx, current)
	if err != nil {
		return 0, 0, err
	}
	defer rows.Close()
	var batch []clientv3.Op
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		_, err := client.Txn(ctx).Then(batch...).Commit()
		batch, size = batch[:0], 0
		return err
	}
	// kine keeps the seconds that a key lives since its last write; etcd has leases, which begin now.
	leases := map[int64]clientv3.LeaseID{}
	for rows.Next() {
		var name string
		var value []byte
		var seconds int64
		if err := rows.Scan(&name, &value, &seconds); err != nil {
			return 0, 0, err
		}
		if bootstrap.IsShared(name) {
			continue
		}
		if size+len(value) > batchBytes || len(batch) == batchKeys {
			if err := flush(); err != nil {
				return 0, 0, err
			}
		}
		var options []clientv3.OpOption
		if seconds > 0 {
			if leases[seconds] == 0 {
				lease, err := client.Grant(ctx, seconds)
				if err != nil {
					return 0, 0, err
				}
				leases[seconds] = lease.ID
			}
			options = append(options, clientv3.WithLease(leases[seconds]))
		}
		batch = append(batch, clientv3.OpPut(name, string(value), options...))
		size += len(name) + len(value)
		keys++
	}
	if err := errors.Join(rows.Err(), flush()); err != nil {
		return 0, 0, err
	}
	return revision, keys, nil
}
