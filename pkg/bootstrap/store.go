package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/token"
)

const (
	// bundlePath, firstPath, tokenPath with a token's id, and serverPath with a server's name, are keys of the datastore outside of the API
	// server's prefix: encryption of Secrets must not lock in the keys that it needs.
	bundlePath = "/polymesh/bootstrap/bundle"
	tokenPath  = "/polymesh/bootstrap/tokens/"
	serverPath = "/polymesh/bootstrap/servers/"
	firstPath  = "/polymesh/bootstrap/first"
	// requestTimeout is the time for a request to the datastore.
	requestTimeout = 10 * time.Second
)

// Store is the place in the datastore. Its writes have the forms that kine knows (pkg/server in github.com/k3s-io/kine).
type Store struct {
	Client *clientv3.Client
	// LeaseLife is how long Take and Ahead wait for a renewal of a Lease; 0 for the default.
	LeaseLife time.Duration
}

// ErrNone means that the datastore has nothing of the kind.
var ErrNone = errors.New("the datastore has none")

func (s Store) get(ctx context.Context, key string) (value []byte, revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	got, err := s.Client.Get(ctx, key)
	if err != nil || len(got.Kvs) == 0 {
		return nil, 0, err
	}
	return got.Kvs[0].Value, got.Kvs[0].ModRevision, nil
}

// put writes a key that has the revision, 0 for none. written is false if someone else was first.
func (s Store) put(ctx context.Context, key string, value []byte, revision int64) (written bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	txn := s.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, string(value)))
	if revision > 0 {
		txn = txn.Else(clientv3.OpGet(key))
	}
	done, err := txn.Commit()
	if err != nil {
		return false, err
	}
	return done.Succeeded, nil
}

// Save writes the bundle, where it differs from the one that is there. The keys of Secrets stay those that are there.
func (s Store) Save(ctx context.Context, key Key, b Bundle) error {
	return s.edit(ctx, key, func(before *Bundle) (Bundle, error) {
		if before != nil {
			b.Encryption, b.NextKey = before.Encryption, before.NextKey
		}
		return b, nil
	})
}

// Change edits the bundle that is there, ErrNone if there is none. An error of change leaves it. change is called again if another server
// has changed the bundle meanwhile.
func (s Store) Change(ctx context.Context, key Key, change func(*Bundle) error) error {
	return s.edit(ctx, key, func(before *Bundle) (Bundle, error) {
		if before == nil {
			return Bundle{}, ErrNone
		}
		b := *before
		err := change(&b)
		return b, err
	})
}

// edit replaces the bundle, nil if there is none.
func (s Store) edit(ctx context.Context, key Key, next func(before *Bundle) (Bundle, error)) error {
	for written := false; !written; {
		have, revision, err := s.get(ctx, bundlePath)
		if err != nil {
			return fmt.Errorf("read what the servers share: %w", err)
		}
		var before *Bundle
		if revision > 0 {
			b, err := Open(key, have)
			if err != nil {
				return fmt.Errorf("the datastore contains what the servers of another cluster share, or this server's key is another: %w", err)
			}
			before = &b
		}
		b, err := next(before)
		if err != nil {
			return err
		}
		if before != nil && reflect.DeepEqual(*before, b) {
			return nil
		}
		sealed, err := b.Seal(key)
		if err != nil {
			return err
		}
		if written, err = s.put(ctx, bundlePath, sealed, revision); err != nil {
			return fmt.Errorf("write what the servers share: %w", err)
		}
	}
	return nil
}

// Sealed returns the bundle and its key, both sealed, for a machine with the token of this id. It is ErrNone if there is none.
func (s Store) Sealed(ctx context.Context, id string) (bundle, key []byte, err error) {
	for path, to := range map[string]*[]byte{bundlePath: &bundle, tokenPath + id: &key} {
		value, revision, err := s.get(ctx, path)
		if err != nil {
			return nil, nil, fmt.Errorf("read what the servers share: %w", err)
		}
		if revision == 0 {
			return nil, nil, ErrNone
		}
		*to = value
	}
	return bundle, key, nil
}

// Bundle returns the sealed bundle. It is ErrNone if there is none.
func (s Store) Bundle(ctx context.Context) ([]byte, error) {
	sealed, revision, err := s.get(ctx, bundlePath)
	if err != nil {
		return nil, fmt.Errorf("read what the servers share: %w", err)
	}
	if revision == 0 {
		return nil, ErrNone
	}
	return sealed, nil
}

// Open returns the bundle and its key, for the holder of a token.
func (s Store) Open(ctx context.Context, t token.Token) (Bundle, Key, error) {
	bundle, wrapped, err := s.Sealed(ctx, t.ID)
	if err != nil {
		return Bundle{}, nil, err
	}
	return OpenWith(t, bundle, wrapped)
}

// Read returns the bundle for a server that has the key. It is ErrNone if there is none.
func (s Store) Read(ctx context.Context, key Key) (Bundle, error) {
	sealed, err := s.Bundle(ctx)
	if err != nil {
		return Bundle{}, err
	}
	return Open(key, sealed)
}

// Exists reports whether a cluster has a bundle here.
func (s Store) Exists(ctx context.Context) (bool, error) {
	_, revision, err := s.get(ctx, bundlePath)
	if err != nil {
		return false, fmt.Errorf("read what the servers share: %w", err)
	}
	return revision > 0, nil
}

// Allow lets the holder of a token open the bundle.
func (s Store) Allow(ctx context.Context, key Key, t token.Token) error {
	have, revision, err := s.get(ctx, tokenPath+t.ID)
	if err != nil {
		return fmt.Errorf("let token %s open what the servers share: %w", t.ID, err)
	}
	if revision > 0 {
		if same, err := Unwrap(t, have); err == nil && bytes.Equal(same, key) {
			return nil
		}
	}
	wrapped, err := key.Wrap(t)
	if err == nil {
		_, err = s.put(ctx, tokenPath+t.ID, wrapped, revision)
	}
	if err != nil {
		return fmt.Errorf("let token %s open what the servers share: %w", t.ID, err)
	}
	return nil
}

// Keep forgets the tokens that the cluster does not have any more: those that were revoked, or have expired. exist returns the ids of
// those that it has. It is called after the list is read: a token is in the cluster before it is here.
func (s Store) Keep(ctx context.Context, exist func(context.Context) (map[string]bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	tokens, err := s.Client.Get(ctx, tokenPath, clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("list the tokens of servers: %w", err)
	}
	have, err := exist(ctx)
	if err != nil {
		return err
	}
	for _, kv := range tokens.Kvs {
		key := string(kv.Key)
		id := strings.TrimPrefix(key, tokenPath)
		if have[id] {
			continue
		}
		if err := s.remove(ctx, key, kv.ModRevision); err != nil {
			return fmt.Errorf("forget token %s: %w", id, err)
		}
	}
	return nil
}

// remove removes a key that still has the revision.
func (s Store) remove(ctx context.Context, key string, revision int64) error {
	_, err := s.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
		Then(clientv3.OpDelete(key)).Else(clientv3.OpGet(key)).Commit()
	return err
}
