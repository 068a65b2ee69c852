//go:build integration

package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/certificate/certificatetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
	"polymesh.dev/polymesh/pkg/porttest"
)

// server is a server of a cluster, on an address of its own.
type server struct {
	name string
	opts Options
	// stall is how long a learner may make no progress; 0 for the default.
	stall time.Duration
	// promote is how often it tries to promote learners; 0 for the default.
	promote time.Duration
	*Etcd
}

// servers returns servers of one cluster, none of which runs.
func servers(t *testing.T, names ...string) []*server {
	t.Helper()
	var all []*server
	for _, c := range certificatetest.Servers(t, 1, names...) {
		all = append(all, &server{name: c.Name, opts: Options{
			Dir: t.TempDir(), Node: c.Name, Certificates: c.Certificates, Client: porttest.Reserve(t, c.IP),
			HTTP: porttest.Reserve(t, c.IP), Peer: porttest.Reserve(t, c.IP), Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		}})
	}
	return all
}

// start starts the server's member, after a stop on the same data.
func (s *server) start(t *testing.T) {
	t.Helper()
	e := New(s.opts)
	if s.stall > 0 {
		e.stall = s.stall
	}
	if s.promote > 0 {
		e.promote = s.promote
	}
	s.Etcd = e
	if err := e.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, e) })
}

func stop(t *testing.T, e *Etcd) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, what string, done func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func (s *server) ready(t *testing.T) {
	t.Helper()
	eventually(t, s.name+" is ready", func() error { return s.Ready(t.Context()) })
}

// join adds a server to the cluster of another one, as a join does.
func (s *server) join(t *testing.T, through *server) uint64 {
	t.Helper()
	var id uint64
	s.opts.Join = func(ctx context.Context, self Peer) (members []Peer, err error) {
		eventually(t, s.name+" is added", func() error {
			id, members, err = through.AddLearner(ctx, s.name, self)
			return err
		})
		return members, nil
	}
	s.start(t)
	s.ready(t)
	return id
}

func (s *server) client(t *testing.T) *clientv3.Client {
	t.Helper()
	c, err := s.Endpoint().Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (s *server) put(t *testing.T, key string) {
	t.Helper()
	c := s.client(t)
	eventually(t, "a write through "+s.name, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := c.Put(ctx, key, key)
		return err
	})
}

func (s *server) has(t *testing.T, keys ...string) {
	t.Helper()
	c := s.client(t)
	for _, key := range keys {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		got, err := c.Get(ctx, key)
		cancel()
		if err != nil || len(got.Kvs) != 1 {
			t.Errorf("%s has %v of %s (%v)", s.name, got, key, err)
		}
	}
}

func (s *server) members(t *testing.T) map[string]Member {
	t.Helper()
	list, err := s.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byNode := map[string]Member{}
	for _, m := range list {
		byNode[m.Node()] = m
	}
	return byNode
}

// One member works, keeps its data over a restart, and accepts no one without a certificate of its authority.
func TestOneMember(t *testing.T) {
	t.Parallel()
	s := servers(t, "node-1")[0]
	if exists, err := Exists(s.opts.Dir); exists || err != nil {
		t.Fatal(exists, err)
	}
	s.start(t)
	s.ready(t)
	s.put(t, "a")
	if exists, err := Exists(s.opts.Dir); !exists || err != nil {
		t.Error(exists, err)
	}
	m := s.members(t)["node-1"]
	if !strings.HasPrefix(m.Name, "node-1-") || !m.Leader || m.Learner || m.Problem != "" || m.Version == "" {
		t.Errorf("%+v", m)
	}
	if err := s.Remove(t.Context(), m.ID); err == nil || !strings.Contains(err.Error(), "the only member") {
		t.Errorf("removing the only member: %v", err)
	}
	other := servers(t, "node-1")[0]
	endpoint := s.Endpoint()
	endpoint.Cert, endpoint.Key = other.opts.Certificates.Cert(certificate.EtcdClient), other.opts.Certificates.Key(certificate.EtcdClient)
	for what, config := range map[string]func(){"a certificate of another authority": func() {}, "none": func() { endpoint.Cert, endpoint.Key = "", "" }} {
		config()
		c, err := endpoint.Client()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		if _, err := c.Get(ctx, "a"); err == nil {
			t.Errorf("with %s: the key is read", what)
		}
		cancel()
		c.Close()
	}
	stop(t, s.Etcd)
	s.opts.Peer = porttest.Reserve(t, netip.AddrFrom4([4]byte{127, 0, 1, 9}))
	s.start(t)
	s.ready(t)
	s.has(t, "a")
	eventually(t, "the member has its new address", func() error {
		if m := s.members(t)["node-1"]; m.URL != "https://"+s.opts.Peer.String() {
			return fmt.Errorf("it is %s", m.URL)
		}
		return nil
	})
	s.opts.Node = "node-2"
	if err := New(s.opts).Start(t.Context()); err == nil || !strings.Contains(err.Error(), `this node is "node-2"`) {
		t.Errorf("with another name: %v", err)
	}
}

// Three members: joined one after the other, one lost, quorum lost and back, one removed.
func TestThreeMembers(t *testing.T) {
	t.Parallel()
	all := servers(t, "a", "b", "c")
	a, b, c := all[0], all[1], all[2]
	a.start(t)
	a.ready(t)
	a.put(t, "first")
	b.join(t, a)
	c.join(t, b)
	c.has(t, "first")
	for _, s := range all {
		eventually(t, s.name+" sees that all are well", func() error {
			for node, m := range s.members(t) {
				if m.Learner || m.Problem != "" {
					return fmt.Errorf("%s is %+v", node, m)
				}
			}
			return nil
		})
	}
	var taken *NameTakenError
	if _, _, err := a.AddLearner(t.Context(), "b", Peer{Name: "b-x", URL: "https://127.0.9.9:1"}); !errors.As(err, &taken) {
		t.Errorf("a second b: %v", err)
	}

	// One of three is away: the others work, and neither of them may be removed.
	stop(t, c.Etcd)
	b.put(t, "second")
	eventually(t, "a knows that c does not answer", func() error {
		if m := a.members(t)["c"]; m.Problem == "" {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	if err := a.Remove(t.Context(), a.members(t)["b"].ID); err == nil || !strings.Contains(err.Error(), "no majority") || !strings.Contains(err.Error(), "c (") {
		t.Errorf("removing one of two that answer: %v", err)
	}
	c.start(t)
	c.ready(t)
	c.has(t, "first", "second")

	// Two of three are away: it reports that, and works again when they are back.
	stop(t, b.Etcd)
	stop(t, c.Etcd)
	eventually(t, "a has no majority", func() error {
		if err := a.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "etcd has no leader: a majority of its 3 members must run") {
			return fmt.Errorf("it is %v", err)
		}
		return nil
	})
	if len(a.members(t)) != 3 {
		t.Error("without a majority the members are not listed")
	}
	b.start(t)
	a.ready(t)
	c.start(t)
	c.ready(t)
	c.has(t, "first", "second")

	// A removed member ends, and explains why. It does not start again on its data.
	removed := a.members(t)["b"]
	eventually(t, "b is removed", func() error { return a.Remove(t.Context(), removed.ID) })
	select {
	case err := <-b.Failed():
		if !strings.Contains(err.Error(), "this server was removed from the cluster") {
			t.Errorf("the removed member ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the removed member continues")
	}
	stop(t, b.Etcd)
	if err := New(b.opts).Start(t.Context()); err == nil || !strings.Contains(err.Error(), "this server was removed from the cluster") {
		t.Errorf("the removed member starts: %v", err)
	}
	a.put(t, "third")
	c.has(t, "first", "second", "third")
	if len(a.members(t)) != 2 {
		t.Errorf("%+v", a.members(t))
	}

	// The leader is removed by the other one, which takes over first.
	leader, other := a, c
	if a.members(t)["c"].Leader {
		leader, other = c, a
	}
	eventually(t, "the leader is removed", func() error { return other.Remove(t.Context(), other.members(t)[leader.name].ID) })
	other.ready(t)
	other.has(t, "first", "second", "third")
	other.put(t, "fourth")
}

// A member that was away when it was removed learns it from the others before it is ready: it ends with the reason, and its data are put aside
// for a new join.
func TestRemovedWhileAway(t *testing.T) {
	all := servers(t, "a", "b", "c")
	a, b, c := all[0], all[1], all[2]
	a.start(t)
	a.ready(t)
	b.join(t, a)
	c.join(t, b)
	stop(t, c.Etcd)
	eventually(t, "c is removed", func() error { return a.Remove(t.Context(), a.members(t)["c"].ID) })
	c.start(t)
	select {
	case err := <-c.Failed():
		if !errors.Is(err, errRemoved) {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it continues")
	}
	stop(t, c.Etcd)
	if err := New(c.opts).Start(t.Context()); !errors.Is(err, errRemoved) {
		t.Errorf("it starts again: %v", err)
	}
	if aside, err := SetAside(c.opts.Dir, time.Now()); err != nil || aside == "" {
		t.Errorf("its data are put aside as %q, %v", aside, err)
	}
	c.join(t, a)
	if len(a.members(t)) != 3 {
		t.Errorf("%+v", a.members(t))
	}
}

// A database at its quota accepts writes again after a restart, if it can be made smaller.
func TestQuota(t *testing.T) {
	s := servers(t, "a")[0]
	s.opts.Args.Quota = 8 << 20
	s.start(t)
	s.ready(t)
	c := s.client(t)
	value := strings.Repeat("x", 256<<10)
	eventually(t, "the quota is reached", func() error {
		if _, err := c.Put(t.Context(), "large", value); err == nil {
			return errors.New("not yet")
		}
		return nil
	})
	stop(t, s.Etcd)
	s.start(t)
	s.ready(t)
	eventually(t, "writes work again", func() error {
		_, err := s.client(t).Put(t.Context(), "large", "x")
		return err
	})
}

// What is in SQLite is in etcd afterwards, with its revisions below and its leases kept, and an interrupted migration begins again.
func TestMigration(t *testing.T) {
	s := servers(t, "a")[0]
	dir := t.TempDir()
	s.opts.SQLite = filepath.Join(dir, "state.db")
	old := datastoretest.Start(t, dir)
	c := old.Client
	create := func(key, value string, options ...clientv3.OpOption) int64 {
		t.Helper()
		r, err := c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, value, options...)).Commit()
		if err != nil || !r.Succeeded {
			t.Fatal(r, err)
		}
		return r.Header.Revision
	}
	large := strings.Repeat("x", 300<<10)
	var last int64
	for i := range 250 {
		create(fmt.Sprintf("/registry/a/%03d", i), fmt.Sprint(i))
	}
	for i := range 5 {
		create(fmt.Sprintf("/registry/large/%d", i), large)
	}
	lease, err := c.Grant(t.Context(), 3600)
	if err != nil {
		t.Fatal(err)
	}
	create("/registry/events/a", "event", clientv3.WithLease(lease.ID))
	gone := create("/registry/gone", "")
	r, err := c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision("/registry/gone"), "=", gone)).Then(clientv3.OpDelete("/registry/gone")).
		Else(clientv3.OpGet("/registry/gone")).Commit()
	if err != nil || !r.Succeeded {
		t.Fatal(r, err)
	}
	// What servers shared that the cluster had before is left behind, and their tokens stay.
	for _, key := range []string{"bundle", "servers/a", "tokens/0123456789"} {
		create("/polymesh/bootstrap/"+key, key)
	}
	last = create("/registry/last", "")
	old.Halt()
	// What an interrupted one has left.
	if err := os.MkdirAll(filepath.Join(s.opts.Dir+".new", "copy"), 0o700); err != nil {
		t.Fatal(err)
	}

	s.start(t)
	s.ready(t)
	etcd := s.client(t)
	list, err := etcd.Get(t.Context(), "/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]string{}
	for _, kv := range list.Kvs {
		have[string(kv.Key)] = string(kv.Value)
		if leased := kv.Lease != 0; leased != (string(kv.Key) == "/registry/events/a") {
			t.Errorf("%s has lease %d", kv.Key, kv.Lease)
		}
	}
	// With kine's own /registry/health.
	if len(have) != 259 || have["/polymesh/bootstrap/tokens/0123456789"] == "" || have["/registry/a/249"] != "249" || have["/registry/large/4"] != large {
		t.Errorf("%d keys", len(have))
	}
	if list.Header.Revision <= last {
		t.Errorf("the revision is %d, and was %d", list.Header.Revision, last)
	}
	watch := etcd.Watch(t.Context(), "/registry/", clientv3.WithPrefix(), clientv3.WithRev(last))
	if w := <-watch; !errors.Is(w.Err(), rpctypes.ErrCompacted) {
		t.Errorf("a watch from before: %v", w.Err())
	}
	for path, want := range map[string]bool{s.opts.SQLite: false, s.opts.SQLite + Migrated: true, s.opts.SQLite + "-wal": false, s.opts.Dir + ".new": false} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s is there: %v", path, err == nil)
		}
	}
	s.put(t, "/registry/after")
	stop(t, s.Etcd)
	s.start(t)
	s.ready(t)
	s.has(t, "/registry/after", "/registry/last")
}

// A join that fails because no other member answers is no member yet: the next start joins again, and does not begin a cluster of its own.
func TestFailedJoin(t *testing.T) {
	b := servers(t, "b")[0]
	calls := 0
	b.opts.Join = func(_ context.Context, self Peer) ([]Peer, error) {
		calls++
		return []Peer{{Name: "a-00000000", URL: "https://127.0.1.9:1"}, self}, nil
	}
	for range 2 {
		e := New(b.opts)
		if err := e.Start(t.Context()); err == nil {
			stop(t, e)
			t.Fatal("a member starts without the cluster that it joins")
		}
		if exists, err := Exists(b.opts.Dir); exists || err != nil {
			t.Errorf("there is a member, %v", err)
		}
	}
	if calls != 2 {
		t.Errorf("it has joined %d times, want 2", calls)
	}
}
