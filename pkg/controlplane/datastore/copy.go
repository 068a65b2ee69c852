package datastore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// CopyName is the name of the database's copy that Save writes, and Prepare and Revision read.
const CopyName = "state.db"

// Kind implements snapshot.Source.
func (d *Datastore) Kind() string { return "sqlite" }

// Save implements snapshot.Source: it writes a copy of the database into the folder dir, as CopyName with mode 0600, and returns its revision. The copy contains
// every write that was acknowledged before the call, is complete in one file, and has passed SQLite's own check. The
// database is only read: a server can use it meanwhile, and need not run.
func (d *Datastore) Save(ctx context.Context, dir string) (revision int64, err error) {
	if _, err := os.Stat(d.file()); err != nil {
		return 0, fmt.Errorf("copy the database: %w", err)
	}
	target := filepath.Join(dir, CopyName)
	// SQLite accepts an empty file, and would create a world-readable one.
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, fmt.Errorf("copy the database: %w", err)
	}
	if err := f.Close(); err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(target)
		}
	}()
	db, err := openFile(d.file(), "ro")
	if err != nil {
		return 0, err
	}
	defer db.Close()
	// One transaction: the state of one moment (https://www.sqlite.org/lang_vacuum.html#vacuuminto).
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", target); err != nil {
		return 0, fmt.Errorf("copy the database %s: %w", d.file(), err)
	}
	if revision, err = checked(ctx, target); err != nil {
		return 0, fmt.Errorf("copy the database %s: the copy is damaged: %w", d.file(), err)
	}
	return revision, syncFile(target)
}

// Revision returns the newest revision of the database in the folder dir. It neither changes the database, nor waits for a
// server that uses it.
func Revision(ctx context.Context, dir string) (int64, error) {
	file := filepath.Join(dir, CopyName)
	if _, err := os.Stat(file); err != nil {
		return 0, err
	}
	db, err := openFile(file, "ro")
	if err != nil {
		return 0, err
	}
	defer db.Close()
	return newest(ctx, db)
}

// Prepare turns a copy in the folder dir into the database of a restored cluster, and returns its new current revision, which is
// above floor. Clients may have seen any revision up to floor. These revisions have no meaning now, so they are
// compacted: a watch or a list that continues from one of them fails, and the client lists the current state, as
// after etcdutl's `snapshot restore --bump-revision --mark-compacted`.
func Prepare(ctx context.Context, dir string, floor int64) (revision int64, err error) {
	file := filepath.Join(dir, CopyName)
	if revision, err = checked(ctx, file); err != nil {
		return 0, fmt.Errorf("the database in the snapshot is damaged: %w", err)
	}
	db, err := openFile(file, "rw")
	if err != nil {
		return 0, err
	}
	defer db.Close()
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = tx.Rollback() }()
	bumped := max(revision, floor) + 1
	for _, step := range []struct {
		sql  string
		args []any
	}{
		// kine compacts from the compact revision on (CompactSQL in its pkg/drivers/sqlite), so what is older goes now.
		{`DELETE FROM kine WHERE id IN (
			SELECT prev_revision FROM kine WHERE name != 'compact_rev_key' AND prev_revision != 0
			UNION ALL SELECT id FROM kine WHERE deleted != 0)`, nil},
		{`UPDATE kine SET prev_revision = ? WHERE name = 'compact_rev_key'`, []any{bumped}},
		// kine's current revision is the newest row's, and the next one is higher (AUTOINCREMENT). The row is one that kine itself
		// writes where a revision is missing, and hides (Fill and IsFill in its pkg/drivers/generic).
		{`INSERT INTO kine (id, name, created, deleted, create_revision, prev_revision, lease, value, old_value)
			VALUES (?, ?, 0, 1, 0, 0, 0, NULL, NULL)`, []any{bumped, fmt.Sprintf("gap-%d", bumped)}},
	} {
		if _, err := tx.ExecContext(ctx, step.sql, step.args...); err != nil {
			return 0, fmt.Errorf("continue the database's revisions: %w", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return 0, fmt.Errorf("continue the database's revisions: %w", err)
	}
	return bumped, errors.Join(db.Close(), syncFile(file))
}

// openFile opens a database that the component may have open as well.
func openFile(file, mode string) (*sql.DB, error) {
	db, err := sql.Open("sqlite3", "file:"+(&url.URL{Path: file}).EscapedPath()+"?mode="+mode+"&_busy_timeout=30000&_txlock=immediate&_sync=FULL")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// checked checks a whole copy, and returns its newest revision.
func checked(ctx context.Context, file string) (revision int64, err error) {
	db, err := openFile(file, "ro")
	if err != nil {
		return 0, err
	}
	defer db.Close()
	result := ""
	// The first of its rows is enough for a message.
	if err := db.QueryRowContext(ctx, "PRAGMA integrity_check(1)").Scan(&result); err != nil {
		return 0, err
	}
	if result != "ok" {
		return 0, fmt.Errorf("integrity_check: %.200s", result)
	}
	return newest(ctx, db)
}

func newest(ctx context.Context, db *sql.DB) (revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	// Also of a database that kine has not opened yet: then it has no such table.
	if err := db.QueryRowContext(ctx, "SELECT coalesce(max(id), 0) FROM kine").Scan(&revision); err != nil {
		return 0, fmt.Errorf("read the newest revision: %w", err)
	}
	return revision, nil
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
