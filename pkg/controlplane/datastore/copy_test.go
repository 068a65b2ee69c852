package datastore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/config"
)

// A copy that is created during writes contains every write that was acknowledged before, and no half of one.
func TestSaveWhileWritesGoOn(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	client := start(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	var writers errgroup.Group
	acknowledged := make(chan int64, 1)
	for writer := range 4 {
		writers.Go(func() error {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("/registry/configmaps/w%d/%d", writer, i)
				resp, err := client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, strings.Repeat("x", 1000))).Commit()
				if err != nil {
					return err
				}
				select {
				case <-acknowledged:
				default:
				}
				select {
				case acknowledged <- resp.Header.Revision:
				default:
				}
			}
			return nil
		})
	}
	for range 5 {
		before := <-acknowledged
		dir := t.TempDir()
		revision, err := d.Save(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if revision < before {
			t.Errorf("revision %d was acknowledged before, and the copy has %d", before, revision)
		}
		info, err := os.Stat(filepath.Join(dir, CopyName))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the copy is %v, %v", info, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("the folder contains %v, %v", entries, err)
		}
		copied := New(Options{Dir: dir, Socket: filepath.Join(dir, "kine.sock"), Sync: config.SyncFull})
		all, err := start(t, copied).Get(t.Context(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		// kine writes two rows of its own at first, and each writer's create is one revision.
		if err != nil || all.Count != revision-2 {
			t.Errorf("at revision %d the copy has %d keys, %v", revision, all.Count, err)
		}
	}
	cancel()
	if err := writers.Wait(); err != nil {
		t.Fatal(err)
	}
}

// The server that has the database need not run, and a damaged database is not saved as if it were whole.
func TestSaveOfAStoppedServer(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	client := start(t, d)
	revision := put(t, client, "/registry/configmaps/a/b", strings.Repeat("x", 1<<20), 0)
	for i := range 20 {
		put(t, client, fmt.Sprintf("/registry/configmaps/a/%d", i), strings.Repeat("x", 10000), 0)
		revision++
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if have, err := d.Save(t.Context(), t.TempDir()); err != nil || have != revision {
		t.Errorf("saved revision %d, %v, want %d", have, err, revision)
	}
	if have, err := Revision(t.Context(), d.opts.Dir); err != nil || have != revision {
		t.Errorf("the revision is %d, %v, want %d", have, err, revision)
	}
	// The last connection that can write moves the log into the file.
	db, err := openFile(d.file(), "rw")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), "PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(d.file(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for offset := int64(3 * 4096); offset < 100*4096; offset += 4096 {
		if _, err := file.WriteAt([]byte(strings.Repeat("\xff", 100)), offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := d.Save(t.Context(), dir); err == nil {
		t.Error("a damaged database was saved")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := New(Options{Dir: t.TempDir()}).Save(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a database: %v", err)
	}
}

// A restored database continues above every revision that a client can have seen, and rejects these, so that clients list the
// current state.
func TestPrepare(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	client := start(t, d)
	kept := put(t, client, "/registry/configmaps/a/kept", "1", 0)
	kept = put(t, client, "/registry/configmaps/a/kept", "2", kept)
	gone := put(t, client, "/registry/configmaps/a/gone", "1", 0)
	if _, err := client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision("/registry/configmaps/a/gone"), "=", gone)).
		Then(clientv3.OpDelete("/registry/configmaps/a/gone")).Else(clientv3.OpGet("/registry/configmaps/a/gone")).Commit(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	saved, err := d.Save(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	// The life after the snapshot, which is lost.
	seen := put(t, client, "/registry/configmaps/a/later", "1", 0)
	const floor = 1_000_000
	next, err := Prepare(t.Context(), dir, floor)
	if err != nil || next <= floor {
		t.Fatalf("revision %d, %v", next, err)
	}
	restored := New(Options{Dir: dir, Socket: filepath.Join(dir, "kine.sock"), Sync: config.SyncFull})
	client = start(t, restored)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	all, err := client.Get(ctx, "/registry/configmaps/", clientv3.WithPrefix())
	if err != nil || len(all.Kvs) != 1 || string(all.Kvs[0].Value) != "2" || all.Kvs[0].ModRevision != kept || all.Header.Revision != next {
		t.Fatalf("restored: %v, %v", all, err)
	}
	for _, revision := range []int64{1, kept, saved, seen, seen + 1, floor} {
		if _, err := client.Get(ctx, "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(revision)); !errors.Is(err, rpctypes.ErrCompacted) {
			t.Errorf("a list at revision %d: %v", revision, err)
		}
		event := <-client.Watch(ctx, "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(revision))
		if event.CompactRevision == 0 || !errors.Is(event.Err(), rpctypes.ErrCompacted) {
			t.Errorf("a watch from revision %d: %+v", revision, event)
		}
	}
	// A watch from the present state sees what follows.
	events := client.Watch(ctx, "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(all.Header.Revision+1), clientv3.WithCreatedNotify())
	if created := <-events; created.Err() != nil {
		t.Fatal(created.Err())
	}
	changed := put(t, client, "/registry/configmaps/a/kept", "3", kept)
	created := put(t, client, "/registry/configmaps/a/gone", "again", 0)
	if changed != next+1 || created != next+2 {
		t.Errorf("the next revisions are %d and %d, want those after %d", changed, created, next)
	}
	seenEvents := ""
	for strings.Count(seenEvents, " ") < 2 && ctx.Err() == nil {
		for _, e := range (<-events).Events {
			seenEvents += fmt.Sprintf("%s@%d ", filepath.Base(string(e.Kv.Key)), e.Kv.ModRevision-next)
		}
	}
	if seenEvents != "kept@1 gone@2 " {
		t.Errorf("the watch saw %q", seenEvents)
	}
	// The database can be compacted, and restored once more.
	revision := created
	for i := range 3 * compactMinRetain {
		revision = put(t, client, "/registry/configmaps/a/gone", fmt.Sprint(i), revision)
	}
	compact(t, client, revision)
	if _, err := client.Get(ctx, "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithRev(changed)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("a list at a compacted revision: %v", err)
	}
	again := t.TempDir()
	if _, err := restored.Save(ctx, again); err != nil {
		t.Fatal(err)
	}
	if twice, err := Prepare(ctx, again, 0); err != nil || twice != revision+1 {
		t.Errorf("restored again at %d, %v, want after %d", twice, err, revision)
	}
}
