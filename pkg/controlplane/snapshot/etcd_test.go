//go:build integration

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd/etcdtest"
	"polymesh.dev/polymesh/pkg/datadir"
)

// etcdMachine is a machine whose datastore is etcd, on an address of its own.
type etcdMachine struct {
	machine
	member *etcdtest.Server
}

// newEtcdMachine returns a machine with an empty data dir, or with the certificates of a cluster's first machine.
func newEtcdMachine(t *testing.T, node string, number byte, first *etcdMachine) *etcdMachine {
	t.Helper()
	m := &etcdMachine{machine: newMachine(t, node)}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	m.member = etcdtest.New(t, node, netip.AddrFrom4([4]byte{127, 0, 2, number}), m.dir, certificate.Store(m.dir.TLS()), log)
	m.member.Options.SQLite = m.dir.Server("db", datastore.CopyName)
	m.o.Datastore = etcd.New(m.member.Options)
	if first != nil {
		if _, err := datadir.Claim(m.dir); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(m.dir.TLS(), os.DirFS(first.dir.TLS())); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// newEtcdCluster is newEtcdMachine with certificates, and nothing in its datastore.
func newEtcdCluster(t *testing.T, node string, number byte) *etcdMachine {
	t.Helper()
	m := newEtcdMachine(t, node, number, nil)
	if _, err := datadir.Claim(m.dir); err != nil {
		t.Fatal(err)
	}
	m.certificates(t)
	m.write(t, "a token", m.dir.Server("token"))
	m.write(t, `{"keys":"of Secrets"}`, m.dir.EncryptionFile())
	return m
}

// certificates issues what a server issues when it starts.
func (m *etcdMachine) certificates(t *testing.T) {
	t.Helper()
	if _, err := certificate.Ensure(certificate.Options{Dir: m.dir.TLS(), NodeName: m.member.Name, NodeIP: m.member.Options.Peer.Addr(), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
}

// start starts the member, as a server does.
func (m *etcdMachine) start(t *testing.T) {
	t.Helper()
	m.certificates(t)
	m.member.Start(t)
}

// joins makes the machine a member of another one's cluster.
func (m *etcdMachine) joins(t *testing.T, first *etcdMachine) {
	t.Helper()
	m.certificates(t)
	m.member.Join(t, first.member)
}

func (m *etcdMachine) put(t *testing.T, key, value string) int64 {
	t.Helper()
	client, err := m.member.Endpoint().Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	var revision int64
	controlplanetest.Eventually(t, "a write on "+m.member.Name, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		put, err := client.Put(ctx, prefix+key, value)
		if err == nil {
			revision = put.Header.Revision
		}
		return err
	})
	return revision
}

func (m *etcdMachine) values(t *testing.T) (string, int64) {
	t.Helper()
	client, err := m.member.Endpoint().Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	return valuesOf(t, client)
}

// A cluster with etcd is saved while its server runs, and restored on an empty machine and on its own.
func TestEtcdRestore(t *testing.T) {
	t.Parallel()
	m := newEtcdCluster(t, "n1", 1)
	m.start(t)
	m.put(t, "a", "1")
	info := m.save(t, OnDemand)
	if info.Datastore != "etcd" || info.Revision == 0 {
		t.Errorf("the snapshot is %+v", info)
	}
	last := m.put(t, "b", "2")
	lock, err := datadir.Acquire(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(context.Context) (*Restored, error){"reset": m.Reset, "move": m.MoveToSQLite} {
		if _, err := change(t.Context()); err == nil || !strings.Contains(err.Error(), "a server is running on ") {
			t.Errorf("a %s under a running server: %v", what, err)
		}
	}
	lock.Release()
	m.member.Halt(t)

	fresh := newEtcdMachine(t, "n2", 2, nil)
	r, err := fresh.Restore(t.Context(), info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if r.Aside != "" || len(r.Others) != 0 || r.Next <= last {
		t.Errorf("restored: %+v", r)
	}
	fresh.start(t)
	if values, revision := fresh.values(t); values != "a=1 " || revision < r.Next {
		t.Errorf("the values are %q at revision %d, want %d", values, revision, r.Next)
	}
	if text, err := os.ReadFile(fresh.dir.Server("token")); err != nil || string(text) != "a token" {
		t.Errorf("the token is %q, %v", text, err)
	}

	r, err = m.Restore(t.Context(), info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if r.Saved == nil || r.Saved.Datastore != "etcd" || r.Saved.Name != BeforeRestore || r.Aside == "" {
		t.Errorf("restored: %+v", r)
	}
	m.start(t)
	if values, revision := m.values(t); values != "a=1 " || revision <= last {
		t.Errorf("the values are %q at revision %d", values, revision)
	}
	m.member.Halt(t)
	// What was there before is in the snapshot of it, also the last write.
	if _, err := m.Restore(t.Context(), r.Saved.Path); err != nil {
		t.Fatal(err)
	}
	m.start(t)
	if values, _ := m.values(t); values != "a=1 b=2 " {
		t.Errorf("the values are %q", values)
	}
}

// Snapshots of one kind are restored where the other kind was: the server has the snapshot's kind then.
func TestRestoreOfAnotherKind(t *testing.T) {
	t.Parallel()
	m := newCluster(t, "n1")
	inSQLite := m.save(t, OnDemand)
	last := m.put(t, "later", "2")
	// The state moves to etcd, after a snapshot of it.
	e := newEtcdMachine(t, "n1", 1, nil)
	e.machine = m
	e.member.Options.Dir, e.member.Options.SQLite, e.member.Options.Certificates = m.dir.Etcd(), m.dir.Server("db", datastore.CopyName), certificate.Store(m.dir.TLS())
	m.o.Datastore = etcd.New(e.member.Options)
	if err := m.BeforeStart(t.Context(), true, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if all, err := m.List(t.Context()); err != nil || !slices.ContainsFunc(all, func(i Info) bool { return i.Name == BeforeDatastoreMove && i.Datastore == "sqlite" }) {
		t.Errorf("before the move: %+v, %v", all, err)
	}
	e.start(t)
	if values, revision := e.values(t); values != "a=1 later=2 " || revision <= last {
		t.Errorf("the values in etcd are %q at revision %d", values, revision)
	}
	inEtcd := m.save(t, "in-etcd")
	e.member.Halt(t)

	if _, err := m.Restore(t.Context(), inSQLite.Path); err != nil {
		t.Fatal(err)
	}
	if exists, err := etcd.Exists(m.dir.Etcd()); exists || err != nil {
		t.Errorf("etcd's data are there: %v, %v", exists, err)
	}
	values, revision := m.values(t)
	if values != "a=1 " || revision <= inEtcd.Revision {
		t.Errorf("the values in SQLite are %q at revision %d, and were at %d", values, revision, inEtcd.Revision)
	}
	m.o.Datastore = datastore.New(datastore.Options{Dir: m.dir.Server("db")})
	if _, err := m.Restore(t.Context(), inEtcd.Path); err != nil {
		t.Fatal(err)
	}
	e.start(t)
	if values, again := e.values(t); values != "a=1 later=2 " || again <= revision {
		t.Errorf("the values in etcd are %q at revision %d, and were at %d", values, again, revision)
	}
}

// Of three servers two are lost for good. The last one becomes a cluster of its own, with all that was acknowledged, once.
func TestReset(t *testing.T) {
	t.Parallel()
	a := newEtcdCluster(t, "a", 1)
	a.start(t)
	b, c := newEtcdMachine(t, "b", 2, a), newEtcdMachine(t, "c", 3, a)
	b.joins(t, a)
	c.joins(t, a)
	a.put(t, "first", "1")
	// While the others run, they are the cluster.
	before := a.save(t, "before")
	a.member.Halt(t)
	for what, try := range map[string]func() (*Restored, error){
		"reset":    func() (*Restored, error) { return a.Reset(t.Context()) },
		"reset to": func() (*Restored, error) { return a.ResetTo(t.Context(), before.Path) },
		"restore":  func() (*Restored, error) { return a.Restore(t.Context(), before.Path) },
	} {
		_, err := try()
		var running *etcd.RunningError
		if !errors.As(err, &running) || len(running.Answering) != 2 || running.Voters != 3 || !strings.Contains(err.Error(), "2 of 3 members of etcd answer, which is a majority: b (https://127.0.2.2:") {
			t.Errorf("%s next to a majority: %v", what, err)
		}
	}
	a.start(t)
	c.member.Halt(t)
	last := b.put(t, "last", "2")
	b.member.Halt(t)
	if _, err := a.Save(t.Context(), OnDemand); err == nil || !strings.Contains(err.Error(), "no majority") {
		t.Errorf("a snapshot without a majority: %v", err)
	}
	a.member.Halt(t)
	if _, err := a.MoveToSQLite(t.Context()); err == nil || !strings.Contains(err.Error(), "etcd has 3 members (a, b, c)") {
		t.Errorf("the move of one of three: %v", err)
	}
	token := a.dir.Server("token")
	r, err := a.Reset(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.Others, []string{"b", "c"}) || r.Saved == nil || r.Saved.Name != BeforeClusterReset || !strings.Contains(r.Aside, BeforeClusterReset) {
		t.Errorf("reset: others %q, aside %s, saved %+v", r.Others, r.Aside, r.Saved)
	}
	if _, err := os.Stat(token); err != nil {
		t.Error(err)
	}
	for what, again := range map[string]func() (*Restored, error){
		"reset":   func() (*Restored, error) { return a.Reset(t.Context()) },
		"restore": func() (*Restored, error) { return a.ResetTo(t.Context(), r.Saved.Path) },
	} {
		if _, err := again(); err == nil || !strings.Contains(err.Error(), "was reset already") {
			t.Errorf("a second %s: %v", what, err)
		}
	}
	if err := a.BeforeStart(t.Context(), false, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	a.start(t)
	if values, revision := a.values(t); values != "first=1 last=2 " || revision <= last {
		t.Errorf("the values are %q at revision %d, and were at %d", values, revision, last)
	}
	members, err := a.member.Members(t.Context())
	if err != nil || len(members) != 1 || members[0].Node() != "a" {
		t.Errorf("the members are %+v, %v", members, err)
	}
	// A lost server comes back with its old data: it does not get into the new cluster.
	b.member.Options.Join = nil
	b.certificates(t)
	b.member.Begin(t)
	a.put(t, "after", "3")
	controlplanetest.Eventually(t, "a former member with its old data shows why it is not ready", func() error {
		if err := b.member.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "belong to another cluster") {
			return fmt.Errorf("it is %v", err)
		}
		return nil
	})
	// With empty ones it joins again. Its data name three members, and the one that it can ask knows that the cluster has one.
	b.member.Halt(t)
	var running *etcd.RunningError
	if _, err := b.Reset(t.Context()); !errors.As(err, &running) || len(running.Answering) != 1 || running.Voters != 1 || running.Answering[0].Node() != "a" {
		t.Errorf("a reset of a server that the cluster has left behind: %v", err)
	}
	if err := os.RemoveAll(b.member.Options.Dir); err != nil {
		t.Fatal(err)
	}
	b.joins(t, a)
	if values, _ := b.values(t); values != "after=3 first=1 last=2 " {
		t.Errorf("the values on b are %q", values)
	}
	a.member.Halt(t)
	// After a normal start it can be reset once more.
	if _, err := a.Reset(t.Context()); err != nil {
		t.Error(err)
	}
}

// The only server moves to SQLite, and an interrupted move is completed.
func TestMoveToSQLite(t *testing.T) {
	t.Parallel()
	e := newEtcdCluster(t, "n1", 1)
	e.start(t)
	for i := range 30 {
		e.put(t, fmt.Sprintf("key-%02d", i), fmt.Sprint(i))
	}
	_, last := e.values(t)
	e.member.Halt(t)
	before := files(t, e.dir.Server())
	r, err := e.MoveToSQLite(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r.Saved == nil || r.Saved.Name != BeforeDatastoreMove || r.Saved.Datastore != "etcd" {
		t.Errorf("moved: saved %+v", r.Saved)
	}
	if exists, err := etcd.Exists(filepath.Join(r.Aside, "db", etcd.Folder)); !exists || err != nil {
		t.Errorf("etcd's data are not aside: %v", err)
	}
	values, revision := e.machine.values(t)
	if strings.Count(values, "=") != 30 || !strings.Contains(values, "key-29=29 ") || revision <= last || revision < r.Next {
		t.Errorf("the values are %q at revision %d, and were at %d", values, revision, last)
	}
	if after := files(t, e.dir.Server()); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("the certificates have changed: %v, %v", before, after)
	}
	if _, err := e.MoveToSQLite(t.Context()); err == nil || !strings.Contains(err.Error(), "no member of etcd") {
		t.Errorf("a second move: %v", err)
	}
	if _, err := e.Reset(t.Context()); err == nil || !strings.Contains(err.Error(), "no member of etcd") {
		t.Errorf("a reset of SQLite: %v", err)
	}
	for _, name := range []string{stagingName, planName} {
		if _, err := os.Stat(e.dir.Server(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
}
