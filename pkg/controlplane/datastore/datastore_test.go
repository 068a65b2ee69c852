package datastore

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"
	"github.com/sirupsen/logrus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/config"
)

func newDatastore(t *testing.T, sync config.DatastoreSync) *Datastore {
	t.Helper()
	dir := t.TempDir()
	return New(Options{
		Dir: filepath.Join(dir, "db"), Socket: filepath.Join(dir, "run", "kine.sock"), Sync: sync,
	})
}

func start(t *testing.T, d *Datastore) *clientv3.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := d.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	client, err := d.Endpoint().Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// put writes like the API server: in a transaction on the revision that it knows.
func put(t *testing.T, client *clientv3.Client, key, value string, revision int64) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	resp, err := client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpPut(key, value)).
		Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		t.Fatal(err)
	}
	if !resp.Succeeded {
		t.Fatalf("%s is not at revision %d", key, revision)
	}
	return resp.Header.Revision
}

// A commit is on disk before it is acknowledged: synchronous is FULL (2), not the driver's NORMAL (1), with which the log is
// only synced at checkpoints (https://www.sqlite.org/pragma.html#pragma_synchronous).
func TestSynchronous(t *testing.T) {
	for sync, want := range map[config.DatastoreSync]int{config.SyncFull: 2, config.SyncNormal: 1} {
		t.Run(string(sync), func(t *testing.T) {
			d := newDatastore(t, sync)
			start(t, d)
			db, err := sql.Open("sqlite3", d.driver().DataSourceName)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			var have int
			if err := db.QueryRowContext(t.Context(), "PRAGMA synchronous").Scan(&have); err != nil || have != want {
				t.Errorf("synchronous is %d (%v), want %d", have, err, want)
			}
			var mode string
			if err := db.QueryRowContext(t.Context(), "PRAGMA journal_mode").Scan(&mode); err != nil || mode != "wal" {
				t.Errorf("journal_mode is %q (%v), want wal", mode, err)
			}
		})
	}
}

// The database contains every Secret: it must be readable only by its owner, even if created by an older version.
func TestDatabaseIsPrivate(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	if err := os.MkdirAll(d.opts.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.file(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(d.file(), 0o644); err != nil {
		t.Fatal(err)
	}
	client := start(t, d)
	put(t, client, "/registry/secrets/a/b", "x", 0)
	if socket, err := os.Stat(d.opts.Socket); err != nil || socket.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", socket, err)
	}
	files, err := os.ReadDir(d.opts.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", f.Name(), info.Mode())
		}
	}
	if len(files) < 2 {
		t.Errorf("the database has %d files, want the database and its log", len(files))
	}
}

// compact compacts like the API server.
func compact(t *testing.T, client *clientv3.Client, revision int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := client.Compact(ctx, revision); err != nil {
		t.Fatal(err)
	}
}

// An old revision is dropped when the API server compacts, not after 1000 newer ones: an idle node creates so few that
// continue tokens would live for 40 minutes.
func TestCompactionOfAQuietDatastore(t *testing.T) {
	client := start(t, newDatastore(t, config.SyncFull))
	const key = "/registry/leases/a"
	revision, first := int64(0), int64(0)
	for i := range 3 * compactMinRetain {
		revision = put(t, client, key, fmt.Sprint(i), revision)
		if first == 0 {
			first = revision
		}
	}
	// A page of a list, as requested with a continue token.
	page := func(revision int64) error {
		_, err := client.Get(t.Context(), "/registry/leases/", clientv3.WithPrefix(), clientv3.WithRev(revision), clientv3.WithLimit(1))
		return err
	}
	if err := page(first); err != nil {
		t.Errorf("before the compaction: %v", err)
	}
	compact(t, client, first+10)
	if err := page(first); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("reading a compacted revision returned %v", err)
	}
	if err := page(first + 10); err != nil {
		t.Errorf("reading the compaction's revision: %v", err)
	}
	resp, err := client.Get(t.Context(), key)
	if err != nil || len(resp.Kvs) != 1 || resp.Kvs[0].ModRevision != revision {
		t.Errorf("the newest value is %v (%v), want revision %d", resp, err, revision)
	}
}

// The newest row is the datastore's revision. If it is a deletion, no compaction may remove it: the revision would decrease.
func TestCompactionKeepsTheNewestDeletion(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	client := start(t, d)
	first := put(t, client, "/registry/configmaps/a", "x", 0)
	revision := first
	for i := range 3 * compactMinRetain {
		revision = put(t, client, "/registry/configmaps/a", fmt.Sprint(i), revision)
	}
	resp, err := client.Txn(t.Context()).
		If(clientv3.Compare(clientv3.ModRevision("/registry/configmaps/a"), "=", revision)).
		Then(clientv3.OpDelete("/registry/configmaps/a")).
		Else(clientv3.OpGet("/registry/configmaps/a")).Commit()
	if err != nil || !resp.Succeeded {
		t.Fatalf("delete: %v", err)
	}
	deleted := resp.Header.Revision
	compact(t, client, deleted)
	if _, err := client.Get(t.Context(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(first)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("reading a compacted revision returned %v", err)
	}
	db, err := sql.Open("sqlite3", d.dsn())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	// The current revision after a restart (kine's generic driver: MAX(id)).
	var newest int64
	if err := db.QueryRowContext(t.Context(), "SELECT MAX(id) FROM kine").Scan(&newest); err != nil || newest < deleted {
		t.Errorf("after compaction the newest revision is %d (%v), want at least %d", newest, err, deleted)
	}
}

// A compaction that fails on a full disk returns an error instead of ending the process, and the next one works.
func TestCompactionOnAFullDisk(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	d.opts.Dir = filepath.Join(smallDisk(t, 32), "db")
	d.disk.dir = d.opts.Dir
	client := start(t, d)
	const key = "/registry/configmaps/default/large"
	first := put(t, client, key, "x", 0)
	revision := first
	for range 2 * compactMinRetain {
		revision = put(t, client, key, strings.Repeat("x", 60000), revision)
	}
	ballast := filepath.Join(filepath.Dir(d.opts.Dir), "ballast")
	fill(t, ballast, 64<<20)
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		key := fmt.Sprintf("/registry/configmaps/default/%d", i)
		_, err = client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "x")).Else(clientv3.OpGet(key)).Commit()
	}
	if _, err := client.Compact(t.Context(), revision); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a compaction on a full disk returned %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	compact(t, client, revision)
	if _, err := client.Get(t.Context(), key, clientv3.WithRev(first)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("reading a compacted revision returned %v", err)
	}
	put(t, client, key, "y", revision)
}

// The database of an older release can be opened and continued: its values, revisions, compactions, and leases.
func TestDatabaseOfAnOlderKine(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	if err := d.prepare(); err != nil {
		t.Fatal(err)
	}
	older, err := os.ReadFile(filepath.Join("testdata", "kine-0.14.12.sql"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite3", d.dsn())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), string(older)); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	client := start(t, d)
	const changed = "/registry/configmaps/default/changed"
	all, err := client.Get(t.Context(), "/registry/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	have := ""
	for _, kv := range all.Kvs {
		have += fmt.Sprintf("%s=%s created %d changed %d lease %d\n", kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Lease)
	}
	const want = changed + `=19 created 4 changed 23 lease 0
/registry/configmaps/default/kept=kept created 3 changed 3 lease 0
/registry/events/default/leased=x created 26 changed 26 lease 3600
/registry/health={"health":"true"} created 2 changed 2 lease 0
`
	if have != want || all.Header.Revision != 26 {
		t.Errorf("at revision %d, want 26:\n%s\nwant:\n%s", all.Header.Revision, have, want)
	}
	if got, err := client.Get(t.Context(), changed, clientv3.WithRev(20)); err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Value) != "16" {
		t.Errorf("at revision 20 it was %v, %v", got, err)
	}
	if _, err := client.Get(t.Context(), changed, clientv3.WithRev(10)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("reading a compacted revision returned %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events := client.Watch(ctx, "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(24))
	if revision := put(t, client, changed, "20", 23); revision != 27 {
		t.Errorf("the next write is revision %d, want 27", revision)
	}
	seen := ""
	for !strings.Contains(seen, "@27") && ctx.Err() == nil {
		for _, e := range (<-events).Events {
			seen += fmt.Sprintf("%s %s@%d ", e.Type, filepath.Base(string(e.Kv.Key)), e.Kv.ModRevision)
		}
	}
	if want := "PUT deleted@24 DELETE deleted@25 PUT changed@27 "; seen != want {
		t.Errorf("a watch from revision 24 saw %q, want %q", seen, want)
	}
}

// Space freed by compactions is returned to the disk at the next start.
func TestTheDatabaseShrinks(t *testing.T) {
	d := newDatastore(t, config.SyncNormal)
	client := start(t, d)
	const key = "/registry/configmaps/default/large"
	revision := put(t, client, key, "", 0)
	for range 20 + compactMinRetain {
		revision = put(t, client, key, strings.Repeat("x", 100<<10), revision)
	}
	put(t, client, "/registry/configmaps/default/small", "", 0)
	compact(t, client, revision)
	free := func() (pages int) {
		t.Helper()
		db, err := sql.Open("sqlite3", d.dsn())
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.QueryRowContext(t.Context(), "PRAGMA freelist_count").Scan(&pages); err != nil {
			t.Fatal(err)
		}
		return pages
	}
	if pages := free(); pages < 100 {
		t.Fatalf("compaction has freed %d pages, want hundreds", pages)
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := New(d.opts)
	client = start(t, again)
	if pages := free(); pages != 0 {
		t.Errorf("after a start %d pages are free, want none", pages)
	}
	got, err := client.Get(t.Context(), key)
	if err != nil || len(got.Kvs) != 1 || got.Kvs[0].ModRevision != revision {
		t.Errorf("the value is %v, %v", got, err)
	}
}

// Start returns when its context ends, although waiting for a locked database would take much longer.
func TestStartCanBeCancelled(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	if err := d.prepare(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite3", d.file()+"?_txlock=exclusive")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- d.Start(ctx) }()
	select {
	case err := <-result:
		t.Fatalf("the start did not wait for the lock: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("Start returned %v", err)
	}
}

// A damaged database is reported at once.
func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(file string) error{
		"cut off":           func(file string) error { return os.Truncate(file, 8192) },
		"no file of SQLite": func(file string) error { return os.WriteFile(file, bytes.Repeat([]byte("x"), 8192), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDatastore(t, config.SyncFull)
			if err := d.prepare(); err != nil {
				t.Fatal(err)
			}
			db, err := sql.Open("sqlite3", d.dsn())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.ExecContext(t.Context(), "CREATE TABLE t (x); INSERT INTO t VALUES (randomblob(100000))"); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			if err := damage(d.file()); err != nil {
				t.Fatal(err)
			}
			if err := d.Start(t.Context()); err == nil || !strings.Contains(err.Error(), d.file()+" is damaged: restore it from a backup") {
				t.Errorf("Start returned %v", err)
			}
		})
	}
}

// A failed write returns an error, and is logged without its data.
func TestWritesOnAFullDisk(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	d.opts.Dir = filepath.Join(smallDisk(t, 32), "db")
	d.disk.dir = d.opts.Dir
	client := start(t, d)
	const kept = "/registry/leases/kept"
	revision := put(t, client, kept, "x", 0)
	var log bytes.Buffer
	logrus.SetOutput(&log)
	defer logrus.SetOutput(os.Stderr)
	fill(t, filepath.Join(filepath.Dir(d.opts.Dir), "ballast"), 64<<20)
	var createErr error
	for i := 0; createErr == nil && i < 1000; i++ {
		key := fmt.Sprintf("/registry/secrets/a/%d", i)
		_, createErr = client.Txn(t.Context()).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, "password: "+strings.Repeat("hunter2", 10000))).
			Else(clientv3.OpGet(key)).Commit()
	}
	if !errors.Is(createErr, rpctypes.ErrNoSpace) {
		t.Errorf("a write on a full disk: %v", createErr)
	}
	// A failed update is not a conflict, which the API server would retry forever.
	resp, err := client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(kept), "=", revision)).
		Then(clientv3.OpPut(kept, strings.Repeat("x", 1000000))).Else(clientv3.OpGet(kept)).Commit()
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("an update on a full disk returned %v, error %v", resp, err)
	}
	// A real conflict is still reported as one.
	resp, err = client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(kept), "=", revision-1)).
		Then(clientv3.OpDelete(kept)).Else(clientv3.OpGet(kept)).Commit()
	if err != nil || resp.Succeeded {
		t.Errorf("a deletion of another revision returned %v, error %v", resp, err)
	}
	if !strings.Contains(log.String(), "error in txn: database or disk is full") || strings.Contains(log.String(), "hunter2") {
		t.Errorf("the log is %.300s", log.String())
	}
}
