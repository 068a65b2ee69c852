package datastore

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/config"
)

// All watches of a client share one stream, and kine sends each watch's events from its own goroutine. None may stall
// while others receive large events, for example when CRDs are created.
func TestWatchesOnOneStream(t *testing.T) {
	const watches, rounds = 24, 12
	client := start(t, newDatastore(t, config.SyncNormal))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	large := strings.Repeat("x", 300<<10)
	var events [watches]clientv3.WatchChan
	for i := range watches {
		events[i] = client.Watch(ctx, fmt.Sprintf("/watch/%02d/", i), clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		if created := <-events[i]; created.Err() != nil || !created.Created {
			t.Fatal(created.Err())
		}
	}
	for round := range rounds {
		var g errgroup.Group
		for i := range watches {
			value := "small"
			if i%4 == 0 {
				value = large
			}
			g.Go(func() error {
				key := fmt.Sprintf("/watch/%02d/%d", i, round)
				_, err := client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, value)).Commit()
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		for i := range watches {
			seen := false
			for !seen {
				select {
				case got := <-events[i]:
					if got.Err() != nil {
						t.Fatal(got.Err())
					}
					for _, e := range got.Events {
						seen = seen || string(e.Kv.Key) == fmt.Sprintf("/watch/%02d/%d", i, round)
					}
				case <-ctx.Done():
					t.Fatalf("round %d: watch %d stands still", round, i)
				}
			}
		}
	}
}

// A read after an acknowledged write returns its revision or a later one, even with concurrent writes.
func TestRevisionsNeverGoBack(t *testing.T) {
	client := start(t, newDatastore(t, config.SyncNormal))
	g, ctx := errgroup.WithContext(t.Context())
	for writer := range 16 {
		g.Go(func() error {
			key, revision := fmt.Sprintf("/writer/%d", writer), int64(0)
			for range 100 {
				written, err := client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, "x")).Else(clientv3.OpGet(key)).Commit()
				if err != nil {
					return err
				}
				if !written.Succeeded {
					return fmt.Errorf("%s is not at revision %d", key, revision)
				}
				revision = written.Header.Revision
				read, err := client.Get(ctx, "/nothing/", clientv3.WithPrefix(), clientv3.WithLimit(1))
				if err != nil {
					return err
				}
				if read.Header.Revision < revision {
					return fmt.Errorf("written at revision %d, read at revision %d", revision, read.Header.Revision)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}
