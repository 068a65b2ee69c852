package server

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
)

// Of two servers that start with the same empty datastore, one begins the cluster, and the other waits until it can join.
func TestAwaitFirst(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	store := bootstrap.Store{Client: datastoretest.Start(t, filepath.Join(dir, "db")).Client}
	one, two := bootstrap.First{Name: "one", ID: "A"}, bootstrap.First{Name: "two", ID: "B"}
	never := func(why string) { t.Error("the first server waits: ", why) }
	for range 2 { // also after an interruption
		if exists, err := awaitFirst(ctx, store, one, never); err != nil || exists {
			t.Fatalf("the first server: %t, %v", exists, err)
		}
	}
	clone := bootstrap.First{Name: "one", ID: "C"}
	if exists, err := awaitFirst(ctx, store, clone, never); err == nil || !strings.Contains(err.Error(), "another machine with the name one of this server begins the cluster") {
		t.Errorf("a clone of the first server: %t, %v", exists, err)
	}
	canceled, cancel := context.WithCancel(ctx)
	if exists, err := awaitFirst(canceled, store, two, func(string) { cancel() }); err == nil {
		t.Errorf("before the first one shares its keys: %t", exists)
	}
	key, err := bootstrap.EnsureKey(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	waited := 0
	exists, err := awaitFirst(ctx, store, two, func(why string) {
		waited++
		if !strings.Contains(why, "server one begins") {
			t.Errorf("%s, which does not name the first server", why)
		}
		if err := store.Save(ctx, key, bootstrap.Bundle{Datastore: bootstrap.External}); err != nil {
			t.Error(err)
		}
	})
	if err != nil || !exists || waited != 1 {
		t.Errorf("the other server: %t, %v; it waited %d times", exists, err, waited)
	}
	if exists, err := awaitFirst(ctx, store, clone, never); err != nil || !exists {
		t.Errorf("the first server's machine, set up again: %t, %v", exists, err)
	}
}
