package bootstrap_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
	"polymesh.dev/polymesh/pkg/token"
)

// openStore starts kine, which knows only some forms of requests.
func openStore(t *testing.T) bootstrap.Store {
	t.Helper()
	return bootstrap.Store{Client: datastoretest.Start(t, t.TempDir()).Client}
}

// What servers write at the same time is not lost, and no server that shares its settings sets the keys of Secrets back.
func TestStore(t *testing.T) {
	store, ctx := openStore(t), t.Context()
	key, err := bootstrap.EnsureKey(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Change(ctx, key, func(*bootstrap.Bundle) error { return nil }); !errors.Is(err, bootstrap.ErrNone) {
		t.Errorf("a change of nothing: %v", err)
	}
	first := bootstrap.Bundle{Encryption: []byte("1"), Settings: []string{"a=1"}, Datastore: bootstrap.Etcd}
	if err := store.Save(ctx, key, first); err != nil {
		t.Fatal(err)
	}
	if err := store.Change(ctx, key, func(b *bootstrap.Bundle) error { b.Encryption, b.NextKey = []byte("2"), "k"; return nil }); err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if err := store.Change(ctx, key, func(b *bootstrap.Bundle) error { b.NextKey = ""; return refused }); !errors.Is(err, refused) {
		t.Errorf("a change that is refused: %v", err)
	}
	first.Settings = []string{"a=2"}
	if err := store.Save(ctx, key, first); err != nil {
		t.Fatal(err)
	}
	want := bootstrap.Bundle{Encryption: []byte("2"), NextKey: "k", Settings: []string{"a=2"}, Datastore: bootstrap.Etcd}
	if got, err := store.Read(ctx, key); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 5 {
				err := store.Change(ctx, key, func(b *bootstrap.Bundle) error {
					b.Settings = append(slices.Clone(b.Settings), fmt.Sprintf("%d-%d", w, i))
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	if got, err := store.Read(ctx, key); err != nil || len(got.Settings) != 21 {
		t.Errorf("%+v, %v, want 21 settings", got, err)
	}
	other, err := bootstrap.EnsureKey(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Save(ctx, other, first); err == nil || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("with another cluster's key: %v", err)
	}

	made, err := token.New(strings.Repeat("0a", 32), token.Server)
	if err == nil {
		err = store.Allow(ctx, key, made)
	}
	if err != nil {
		t.Fatal(err)
	}
	started := time.Now().UTC().Truncate(time.Second)
	for _, name := range []string{"a", "b"} {
		for _, loaded := range []string{"", "x"} {
			err := store.Record(ctx, name, func(r *bootstrap.Server) {
				r.Address, r.Started, r.Loaded = netip.MustParseAddr("192.0.2.1"), started, loaded
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	old, err := store.Server(ctx, "a")
	if err != nil || old.Name != "a" || old.Loaded != "x" || !old.Started.Equal(started) {
		t.Errorf("%+v, %v", old, err)
	}
	if err := store.Record(ctx, "a", func(r *bootstrap.Server) { r.Loaded = "y" }); err != nil {
		t.Fatal(err)
	}
	if err := store.Forget(ctx, old); err != nil {
		t.Fatal(err)
	}
	servers, err := store.Servers(ctx)
	if err != nil || len(servers) != 2 || servers[0].Loaded != "y" || servers[1].Name != "b" {
		t.Fatalf("a record that was written meanwhile is removed: %+v, %v", servers, err)
	}
	if err := store.Forget(ctx, servers[1]); err != nil {
		t.Fatal(err)
	}
	if servers, err := store.Servers(ctx); err != nil || len(servers) != 1 || servers[0].Name != "a" {
		t.Errorf("%+v, %v", servers, err)
	}
	if none, err := store.Server(ctx, "b"); err != nil || none.Name != "" {
		t.Errorf("%+v, %v", none, err)
	}

	// Of servers that are no longer there only the tokens stay.
	if got, err := store.Client.Get(ctx, "/polymesh/bootstrap/", clientv3.WithPrefix()); err != nil || len(got.Kvs) != 3 {
		t.Errorf("%+v, %v, want the bundle, a token and a record", got, err)
	} else {
		for _, kv := range got.Kvs {
			if want := !strings.Contains(string(kv.Key), made.ID); bootstrap.IsShared(string(kv.Key)) != want {
				t.Errorf("%s: want %t", kv.Key, want)
			}
		}
	}
	if got, _, err := store.Open(ctx, made); err != nil || !slices.Equal(got.Encryption, want.Encryption) {
		t.Errorf("%+v, %v, want the keys %q", got, err, want.Encryption)
	}
}

// Of servers that start at the same time with an empty datastore, all know the same one as the first.
func TestFirst(t *testing.T) {
	store, ctx := openStore(t), t.Context()
	names := []string{"a", "b", "c", "d"}
	firsts := make([]bootstrap.First, len(names))
	var servers sync.WaitGroup
	for i, name := range names {
		servers.Go(func() {
			var err error
			if firsts[i], err = store.First(ctx, bootstrap.First{Name: name, ID: "of-" + name}); err != nil {
				t.Error(err)
			}
		})
	}
	servers.Wait()
	if !slices.Contains(names, firsts[0].Name) || firsts[0].ID != "of-"+firsts[0].Name || slices.ContainsFunc(firsts, func(first bootstrap.First) bool { return first != firsts[0] }) {
		t.Fatalf("they know %+v", firsts)
	}
	for _, name := range append(names, "e") {
		if first, err := store.First(ctx, bootstrap.First{Name: name}); err != nil || first != firsts[0] {
			t.Errorf("later %s knows %+v, %v, want %+v", name, first, err, firsts[0])
		}
	}
	// A version before has written the name alone.
	if _, err := store.Client.Put(ctx, "/polymesh/bootstrap/first", "null"); err != nil {
		t.Fatal(err)
	}
	if first, err := store.First(ctx, bootstrap.First{Name: "e", ID: "of-e"}); err != nil || first != (bootstrap.First{Name: "null"}) {
		t.Errorf("%+v, %v", first, err)
	}
}

// The id of a data dir stays, and a damaged one is not replaced: the server would no longer have its name.
func TestEnsureID(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server", "id")
	first, err := bootstrap.EnsureID(file)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := bootstrap.EnsureID(file); err != nil || again != first || first == "" {
		t.Errorf("%q, %v, want %q", again, err, first)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err := bootstrap.EnsureID(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("%q, %v", id, err)
	}
}
