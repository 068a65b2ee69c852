//go:build integration

package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
)

// saved saves a server's datastore, and returns the folder with the copy and its revision.
func (s *server) saved(t *testing.T) (dir string, revision int64) {
	t.Helper()
	dir = t.TempDir()
	revision, err := s.Save(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != CopyName {
		t.Fatalf("in the folder are %v, %v", entries, err)
	}
	if info, err := os.Stat(filepath.Join(dir, CopyName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the copy is %v, %v", info, err)
	}
	return dir, revision
}

// restored starts the copy in dir as the only member of a new cluster, on a server with a name of its own.
func restored(t *testing.T, dir string, floor int64) (s *server, revision int64) {
	t.Helper()
	revision, err := Prepare(dir, floor, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s = servers(t, "other")[0]
	s.opts.Dir = filepath.Join(dir, Folder)
	s.start(t)
	s.ready(t)
	return s, revision
}

func (s *server) missing(t *testing.T, key string) {
	t.Helper()
	got, err := s.client(t).Get(t.Context(), key)
	if err != nil || len(got.Kvs) != 0 {
		t.Errorf("%s has %v of %s (%v)", s.name, got, key, err)
	}
}

// A member is saved while it runs and while it is stopped, and restored on another server, above all revisions that a client knows.
func TestSaveAndRestore(t *testing.T) {
	s := servers(t, "a")[0]
	s.start(t)
	s.ready(t)
	s.put(t, "/registry/a")
	dir, revision := s.saved(t)
	s.put(t, "/registry/b")
	got, err := s.client(t).Get(t.Context(), "/registry/b")
	if err != nil {
		t.Fatal(err)
	}
	known := got.Header.Revision
	if revision >= known || revision < known-1 {
		t.Errorf("the revision of the snapshot is %d, and of the write after it %d", revision, known)
	}
	stop(t, s.Etcd)
	before := contents(t, s.opts.Dir)
	stopped, last := s.saved(t)
	if after := contents(t, s.opts.Dir); after != before {
		t.Errorf("a stopped member has changed:\n%s\n%s", before, after)
	}
	if last < known {
		t.Errorf("the stopped member is saved at revision %d, and has %d", last, known)
	}
	if nodes, err := s.Nodes(stopped); err != nil || !slices.Equal(nodes, []string{"a"}) {
		t.Errorf("nodes: %q, %v", nodes, err)
	}

	r, next := restored(t, dir, 5000)
	r.has(t, "/registry/a")
	r.missing(t, "/registry/b")
	client := r.client(t)
	list, err := client.Get(t.Context(), "/registry/a")
	if err != nil || next <= 5000 || list.Header.Revision < next {
		t.Errorf("it continues at %d, want %d (%v)", list.Header.Revision, next, err)
	}
	watch := client.Watch(t.Context(), "/registry/", clientv3.WithPrefix(), clientv3.WithRev(known))
	if w := <-watch; !errors.Is(w.Err(), rpctypes.ErrCompacted) {
		t.Errorf("a watch from before: %v", w.Err())
	}
	eventually(t, "the member has the name and address of its server", func() error {
		m, ok := r.members(t)["other"]
		if !ok || m.URL != "https://"+r.opts.Peer.String() {
			return fmt.Errorf("%+v", r.members(t))
		}
		return nil
	})
	// Another one can join it.
	r2, _ := restored(t, stopped, 0)
	r2.has(t, "/registry/a", "/registry/b")
}

// contents describes the files of a folder.
func contents(t *testing.T, dir string) (text string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		text += fmt.Sprintln(path, info.Size(), info.ModTime())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A damaged snapshot is found.
func TestDamagedSnapshot(t *testing.T) {
	s := servers(t, "a")[0]
	s.start(t)
	s.ready(t)
	dir, _ := s.saved(t)
	file := filepath.Join(dir, CopyName)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	for what, c := range map[string]struct {
		text []byte
		want string
	}{
		"cut off": {whole[:len(whole)-4096], "checksum"}, "another bit": {flipped, "its checksum is wrong"}, "empty": {nil, "no snapshot"}, "no checksum": {whole[:len(whole)-32], "no snapshot"},
	} {
		if err := os.WriteFile(file, c.text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Prepare(dir, 0, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A follower's snapshot has what was acknowledged before, a member without a majority has none while it runs, and the last writes when
// it is stopped. Three members are restored to one.
func TestSaveOfThreeMembers(t *testing.T) {
	t.Parallel()
	all := servers(t, "a", "b", "c")
	a, b, c := all[0], all[1], all[2]
	a.start(t)
	a.ready(t)
	b.join(t, a)
	c.join(t, a)
	leader, followers := a, []*server{b, c}
	for i, s := range all {
		if a.members(t)[s.name].Leader {
			leader, followers = s, slices.Delete(slices.Clone(all), i, i+1)
		}
	}
	for i := range 20 {
		key := fmt.Sprintf("/registry/%d", i)
		if _, err := leader.client(t).Put(t.Context(), key, key); err != nil {
			t.Fatal(err)
		}
		if i%5 != 0 {
			continue
		}
		dir := t.TempDir()
		if _, err := followers[i%2].Save(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		if nodes, err := followers[i%2].Nodes(dir); err != nil || !slices.Equal(nodes, []string{"a", "b", "c"}) {
			t.Errorf("nodes: %q, %v", nodes, err)
		}
		if values := keysOf(t, filepath.Join(dir, CopyName)); !slices.Contains(values, key) {
			t.Errorf("the follower's snapshot has no %s: %q", key, values)
		}
	}
	// Both others go without a word: the last write was acknowledged by the survivor and one of them.
	survivor := followers[0]
	stop(t, followers[1].Etcd)
	survivor.put(t, "/registry/last")
	stop(t, leader.Etcd)
	eventually(t, "no majority", func() error {
		if survivor.Ready(t.Context()) == nil {
			return errors.New("it is ready")
		}
		return nil
	})
	if _, err := survivor.Save(t.Context(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "no majority") {
		t.Errorf("without a majority: %v", err)
	}
	stop(t, survivor.Etcd)
	dir, _ := survivor.saved(t)
	if nodes, err := survivor.Nodes(dir); err != nil || !slices.Equal(nodes, []string{"a", "b", "c"}) {
		t.Errorf("nodes: %q, %v", nodes, err)
	}
	// A member that starts without a majority can be stopped.
	survivor.start(t)
	stop(t, survivor.Etcd)
	r, _ := restored(t, dir, 0)
	r.has(t, "/registry/0", "/registry/19", "/registry/last")
	if members := r.members(t); len(members) != 1 {
		t.Errorf("the members are %+v", members)
	}
	r.put(t, "/registry/after")
}

// keysOf lists the keys of a snapshot.
func keysOf(t *testing.T, file string) (keys []string) {
	t.Helper()
	e := New(Options{Log: slog.New(slog.DiscardHandler)})
	dir := filepath.Join(t.TempDir(), "member")
	if err := e.restore(file, dir, 0); err != nil {
		t.Fatal(err)
	}
	o, err := e.offline(t.Context(), dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	all, err := o.client.Get(t.Context(), "/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range all.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return keys
}

// What is in etcd is in SQLite afterwards, above all revisions, with the leases.
func TestToSQLite(t *testing.T) {
	s := servers(t, "a")[0]
	s.start(t)
	s.ready(t)
	c := s.client(t)
	lease, err := c.Grant(t.Context(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("x", 300<<10)
	for i := range 1200 {
		if _, err := c.Put(t.Context(), fmt.Sprintf("/registry/a/%04d", i), fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	for key, value := range map[string]string{"/registry/large": large, "/registry/empty": "", "/polymesh/cluster": "id", "compact_rev_key": "1", "/registry/gone": "x"} {
		if _, err := c.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Put(t.Context(), "/registry/events/a", "event", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	last, err := c.Delete(t.Context(), "/registry/gone")
	if err != nil {
		t.Fatal(err)
	}
	dir, _ := s.saved(t)
	stop(t, s.Etcd)
	revision, err := ToSQLite(t.Context(), dir, datastoretest.Socket(t), 0, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != datastore.CopyName {
		t.Errorf("in the folder are %v, %v", entries, err)
	}
	client := datastoretest.Start(t, dir).Client
	all, err := client.Get(t.Context(), "/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]string{}
	for _, kv := range all.Kvs {
		if string(kv.Key) == "/registry/health" {
			continue // kine's own
		}
		have[string(kv.Key)] = string(kv.Value)
		if kv.ModRevision <= last.Header.Revision {
			t.Errorf("%s is at revision %d, which a client may know: %d", kv.Key, kv.ModRevision, last.Header.Revision)
		}
		if leased := kv.Lease != 0; leased != (string(kv.Key) == "/registry/events/a") {
			t.Errorf("%s has lease %d", kv.Key, kv.Lease)
		}
	}
	if _, ok := have["/registry/empty"]; len(have) != 1200+4 || !ok || have["/registry/large"] != large || have["/registry/a/0999"] != "999" || have["/polymesh/cluster"] != "id" {
		t.Errorf("%d keys", len(have))
	}
	if all.Header.Revision < revision {
		t.Errorf("the revision is %d, want %d", all.Header.Revision, revision)
	}
	watching, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if w := <-client.Watch(watching, "/registry/", clientv3.WithPrefix(), clientv3.WithRev(last.Header.Revision)); !errors.Is(w.Err(), rpctypes.ErrCompacted) {
		t.Errorf("a watch from before: %v", w.Err())
	}
}

// A member that does not vote yet may not have all data: it is not saved, neither running nor stopped.
func TestSaveOfALearner(t *testing.T) {
	all := servers(t, "a", "b")
	a, b := all[0], all[1]
	a.promote = time.Hour
	a.start(t)
	a.ready(t)
	b.opts.Join = func(ctx context.Context, self Peer) (members []Peer, err error) {
		eventually(t, "b is added", func() error {
			_, members, err = a.AddLearner(ctx, "b", self)
			return err
		})
		return members, nil
	}
	b.start(t)
	eventually(t, "b knows that it is a learner", func() error {
		if err := b.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "receives the cluster's data") {
			return fmt.Errorf("it is %v", err)
		}
		return nil
	})
	if _, err := b.Save(t.Context(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "still receiving the cluster's data") {
		t.Errorf("a running learner: %v", err)
	}
	stop(t, b.Etcd)
	if _, err := b.Save(t.Context(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "has not received all of the cluster's data") {
		t.Errorf("a stopped learner: %v", err)
	}
}
