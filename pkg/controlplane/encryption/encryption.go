// Package encryption keeps the cluster's Secrets encrypted in the datastore, with the API server's own encryption at rest.
//
// It owns <data-dir>/server/cred/encryption-config.json, which contains the keys and which the API server reloads when it
// changes, and the order of steps in which keys are added and removed: every API server can read a new key before one writes with it, and
// an old one is removed once all write with the new one and the datastore itself contains no Secret that uses it. Each step can be
// interrupted, and the next run continues.
//
// Where several servers can use the datastore, the keys are in what they share (pkg/bootstrap), sealed, and the file of each is a copy, which
// the component keeps. A server records there which configuration its API server has loaded, by the hash that the API server reports.
//
// pkg/controlplane calls Ensure before the API server starts, pkg/server adds the component to the server, and pkg/command implements
// `polymesh secrets-encrypt`.
package encryption

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

const (
	// secretsPath is the prefix of Secrets in the datastore, followed by namespace and name.
	secretsPath = "/registry/secrets/"
	// reloadLimit is the time for the API servers to reload the file.
	reloadLimit = 2 * time.Minute
	// reloadInterval is the default of Place.Reload. Upstream's is a minute, and each step waits for it.
	reloadInterval = 5 * time.Second
	// pageSize is the number of Secrets in one request to the datastore, and pageTimeout its time.
	pageSize    = 200
	pageTimeout = 30 * time.Second
)

// Cluster is a running server, accessed from inside: only root on its machine can do this.
type Cluster struct {
	Place
	// Kubeconfig must allow reading and writing Secrets, and reading nodes and the API server's metrics.
	Kubeconfig string
	// Before is called before keys are changed or Secrets are rewritten, to save a snapshot; may be nil. After an error nothing is changed.
	Before func(ctx context.Context) error
	// Progress is called while Secrets are rewritten; may be nil.
	Progress func(done, total int)
	// Waiting is called with why a change waits; may be nil.
	Waiting func(why string)
}

// Status is the state of encryption in the datastore.
type Status struct {
	// Enabled is set if Secrets are encrypted when written.
	Enabled bool  `json:"enabled"`
	Keys    []Key `json:"keys"`
	// Plain is the number of unencrypted Secrets.
	Plain int `json:"unencryptedSecrets"`
	// Unfinished is set if Secrets still have to be rewritten, or keys are not used yet or no longer.
	Unfinished bool `json:"unfinished"`
	// Hash is that of the present configuration, as in Server.
	Hash string `json:"hash"`
	// Servers are all servers, where there can be several.
	Servers []Server `json:"servers,omitempty"`
}

// Key describes one key, without the key itself.
type Key struct {
	Name     string `json:"name"`
	Provider string `json:"provider"`
	// Active is set if Secrets are written with it.
	Active bool `json:"active"`
	// Next is set if Secrets are written with it once every server can read it.
	Next bool `json:"next,omitempty"`
	// Secrets is the number of Secrets that use it.
	Secrets int `json:"secrets"`
}

// provider is how Secrets are written; empty if unencrypted.
func (s *Status) provider() string {
	for _, k := range s.Keys {
		if k.Active {
			return k.Provider
		}
	}
	return ""
}

// connection is a Cluster with its clients.
type connection struct {
	Cluster
	client kubernetes.Interface
	store  *clientv3.Client
}

// connect creates the clients. exclusive blocks other changes of the keys until the connection is closed.
func (c Cluster) connect(exclusive bool) (*connection, func(), error) {
	client, err := kubeconfig.Client(c.Kubeconfig, func(config *rest.Config) { config.QPS, config.Burst = 100, 200 })
	if err != nil {
		return nil, nil, err
	}
	unlock := func() {}
	if exclusive {
		lock, err := os.OpenFile(filepath.Join(filepath.Dir(c.File), ".encryption.lock"), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			return nil, nil, errors.New("the Secrets are being rewritten already: see `polymesh secrets-encrypt status`")
		}
		unlock = func() { lock.Close() }
	}
	store, err := openStore(c.Datastore)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return &connection{c, client, store}, func() { store.Close(); unlock() }, nil
}

func (c *connection) shares() bootstrap.Store { return bootstrap.Store{Client: c.store} }

// load reads the present keys.
func (c *connection) load(ctx context.Context) (keys, []byte, error) {
	if !c.several() {
		return read(c.File)
	}
	k, text, err := c.shared(ctx, c.shares())
	if errors.Is(err, bootstrap.ErrNone) {
		err = errNotShared
	}
	return k, text, err
}

var errNotShared = errors.New("the servers do not share the keys of Secrets yet: this server is starting, try again")

// save replaces the keys. A new one is the first at once where no other server has to read it.
func (c *connection) save(ctx context.Context, before, after keys) error {
	if c.several() {
		return c.share(ctx, c.shares(), before, after)
	}
	text, err := after.promote().text()
	if err != nil {
		return err
	}
	return write(c.File, text)
}

// Status determines from the datastore which Secrets use which key.
func (c Cluster) Status(ctx context.Context) (*Status, error) {
	conn, done, err := c.connect(false)
	if err != nil {
		return nil, err
	}
	defer done()
	k, text, err := conn.load(ctx)
	if err != nil {
		return nil, err
	}
	s := &Status{Enabled: k.encrypt, Keys: []Key{}, Hash: hashOf(text)}
	for i, one := range k.all {
		s.Keys = append(s.Keys, Key{Name: one.name, Provider: one.provider, Active: k.encrypt && i == 0, Next: one.name == k.next})
	}
	if c.several() {
		if s.Servers, _, err = conn.servers(ctx, s.Hash); err != nil {
			return nil, err
		}
	}
	other := 0
	err = eachSecret(ctx, conn.store, func(path string, value []byte) {
		for i, one := range k.all {
			if bytes.HasPrefix(value, []byte(prefix(one))) {
				s.Keys[i].Secrets++
				return
			}
		}
		if bytes.HasPrefix(value, []byte("k8s:enc:")) {
			other++
			return
		}
		s.Plain++
	})
	if err == nil && other > 0 {
		where := c.File + ": restore it from a backup"
		if c.several() {
			where = "what the servers share: restore a snapshot"
		}
		err = fmt.Errorf("%d Secrets are encrypted with keys that are not in %s", other, where)
	}
	s.Unfinished = k.changing() || k.encrypt && s.Plain > 0
	return s, err
}

// Enable turns encryption on, and rewrites existing Secrets.
func (c Cluster) Enable(ctx context.Context, provider string) error {
	return c.change(ctx, func(k keys) (keys, error) {
		switch k.provider() {
		case provider:
			return k, nil
		case "":
			return k.add(newKey(provider, time.Now())), nil
		}
		return k, fmt.Errorf("the Secrets are encrypted with %s already: `polymesh secrets-encrypt rotate-keys --provider %s` changes that", k.provider(), provider)
	})
}

// Disable turns encryption off, and rewrites existing Secrets. Every server can read unencrypted ones.
func (c Cluster) Disable(ctx context.Context) error {
	return c.change(ctx, func(k keys) (keys, error) { k.encrypt = false; return k, nil })
}

// Rotate adds a new key, rewrites all Secrets with it, and removes the old one. An empty provider keeps that of the old key.
func (c Cluster) Rotate(ctx context.Context, provider string) error {
	return c.change(ctx, func(k keys) (keys, error) {
		if !k.encrypt {
			return k, errors.New("the Secrets are not encrypted: `polymesh secrets-encrypt enable` comes first")
		}
		return k.add(newKey(cmp.Or(provider, k.provider()), time.Now())), nil
	})
}

// Provide encrypts Secrets with a provider, whatever they are written with.
func (c Cluster) Provide(ctx context.Context, provider string) error {
	return c.change(ctx, func(k keys) (keys, error) {
		if k.provider() == provider {
			return k, nil
		}
		return k.add(newKey(provider, time.Now())), nil
	})
}

// Finish completes a change that has begun, and rewrites the Secrets that are not written as configured.
func (c Cluster) Finish(ctx context.Context) error {
	return c.change(ctx, func(k keys) (keys, error) { return k, nil })
}

// change completes the change before, if it was interrupted, and then makes the one that edit does.
func (c Cluster) change(ctx context.Context, edit func(keys) (keys, error)) error {
	conn, done, err := c.connect(true)
	if err != nil {
		return err
	}
	defer done()
	before, text, err := conn.load(ctx)
	if err != nil {
		return err
	}
	if !before.changing() {
		if _, err := edit(before); err != nil {
			return err
		}
	}
	if err := conn.await(ctx, text, false); err != nil {
		return err
	}
	if c.Before != nil {
		if err := c.Before(ctx); err != nil {
			return err
		}
	}
	if before.changing() {
		if err := conn.finish(ctx); err != nil {
			return err
		}
		if before, _, err = conn.load(ctx); err != nil {
			return err
		}
	}
	after, err := edit(before)
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(after, before) {
		if err := conn.save(ctx, before, after); err != nil {
			return err
		}
	}
	return conn.finish(ctx)
}

// finish takes a change from the step in which it is to its end. In each step all API servers have loaded the keys before the next
// begins, so they are never more than one step apart: next to those that write with a key there are only such that can read it.
//
//	[old], next: none      all read and write with old
//	[old new], next: new   all can read new
//	[new old], next: none  all write with new; the Secrets are rewritten
//	[new], next: none
func (c *connection) finish(ctx context.Context) error {
	for {
		k, text, err := c.load(ctx)
		if err != nil {
			return err
		}
		if err := c.await(ctx, text, true); err != nil {
			return fmt.Errorf("%w; `polymesh secrets-encrypt reencrypt` continues", err)
		}
		if k.next != "" {
			err = c.save(ctx, k, k.promote())
		} else if err = c.rewrite(ctx, k.written()); err == nil {
			if !k.changing() {
				return nil
			}
			last := k
			last.all = k.all[:k.kept()]
			if err = c.save(ctx, k, last); err == nil {
				return nil
			}
		}
		// Another server may complete the same change.
		if err != nil && !errors.Is(err, errChanged) {
			return err
		}
	}
}

// eachSecret calls f for every Secret with its value in the datastore.
func eachSecret(ctx context.Context, store *clientv3.Client, f func(path string, value []byte)) error {
	end := clientv3.GetPrefixRangeEnd(secretsPath)
	get := func(from string) (*clientv3.GetResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, pageTimeout)
		defer cancel()
		return store.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize))
	}
	for from := secretsPath; ; {
		page, err := get(from)
		if err != nil {
			return fmt.Errorf("read the Secrets in the datastore: %w", err)
		}
		for _, kv := range page.Kvs {
			f(string(kv.Key), kv.Value)
		}
		if !page.More || len(page.Kvs) == 0 {
			return nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}

// stored reports whether a value is written as configured: with a prefix, or unencrypted.
func stored(value []byte, written string) bool {
	if written == "" {
		return !bytes.HasPrefix(value, []byte("k8s:enc:"))
	}
	return bytes.HasPrefix(value, []byte(written))
}

// rewrite makes the API server write every Secret again until all have the prefix in the datastore.
func (c *connection) rewrite(ctx context.Context, written string) error {
	for before := -1; ; {
		var left []string
		total := 0
		err := eachSecret(ctx, c.store, func(path string, value []byte) {
			total++
			if !stored(value, written) {
				left = append(left, path)
			}
		})
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		// Secrets written by others meanwhile use the new key, so each round leaves fewer.
		if before >= 0 && len(left) >= before {
			return fmt.Errorf("the API server does not rewrite %d Secrets, %s among them: run `polymesh secrets-encrypt reencrypt` again", len(left), strings.TrimPrefix(left[0], secretsPath))
		}
		before = len(left)
		for i, path := range left {
			if c.Progress != nil {
				c.Progress(total-len(left)+i, total)
			}
			namespace, name, ok := strings.Cut(strings.TrimPrefix(path, secretsPath), "/")
			if !ok {
				return fmt.Errorf("%s in the datastore is not the path of a Secret", path)
			}
			// An empty patch: the API server rewrites an object that is stored with another key than the first (stale, in
			// GuaranteedUpdate of k8s.io/apiserver/pkg/storage/etcd3).
			_, err := c.client.CoreV1().Secrets(namespace).Patch(ctx, name, types.MergePatchType, []byte("{}"), metav1.PatchOptions{FieldManager: "polymesh"})
			if err != nil && !apierrors.IsNotFound(err) {
				return fmt.Errorf("rewrite Secret %s/%s: %w", namespace, name, err)
			}
		}
	}
}
