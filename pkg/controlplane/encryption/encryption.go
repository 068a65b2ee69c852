// Package encryption keeps the cluster's Secrets encrypted in the datastore, with the API server's own encryption at rest.
//
// It owns <data-dir>/server/cred/encryption-config.json, which contains the keys and which the API server reloads when it
// changes, and the order of steps in which keys are added and removed: a new key is in the file before anything is encrypted
// with it, and an old one is removed once the datastore itself contains no Secret that uses it. Each step can be
// interrupted, and the next run continues.
//
// pkg/controlplane calls Ensure before the API server starts, pkg/command adds the component to the server and implements
// `polymesh secrets-encrypt`.
package encryption

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

const (
	// secretsPath is the prefix of Secrets in the datastore, followed by namespace and name.
	secretsPath = "/registry/secrets/"
	// probeName is a Secret in kube-system that shows which key the API server uses.
	probeName = "polymesh-encryption-probe"
	// reloadLimit is the time for the API server to reload the file, which it checks every ReloadInterval.
	reloadLimit = 2 * time.Minute
	// ReloadInterval is how often the API server checks the file. Upstream's default is a minute, and each step waits for it.
	ReloadInterval = 5 * time.Second
	pageSize       = 200
)

// Cluster is a running server, accessed from inside: only root on its machine can do this.
type Cluster struct {
	// File is the API server's encryption configuration.
	File string
	// Kubeconfig must allow reading and writing Secrets.
	Kubeconfig string
	// Datastore is the datastore with the Secrets.
	Datastore datastore.Endpoint
	// Before is called before keys are changed or Secrets are rewritten, to save a snapshot; may be nil. After an error nothing is changed.
	Before func(ctx context.Context) error
	// Progress is called while Secrets are rewritten; may be nil.
	Progress func(done, total int)
}

// Status is the state of encryption in the datastore.
type Status struct {
	// Enabled is set if Secrets are encrypted when written.
	Enabled bool  `json:"enabled"`
	Keys    []Key `json:"keys"`
	// Plain is the number of unencrypted Secrets.
	Plain int `json:"unencryptedSecrets"`
	// Unfinished is set if Secrets still have to be rewritten, or keys are no longer used.
	Unfinished bool `json:"unfinished"`
}

// Key describes one key, without the key itself.
type Key struct {
	Name     string `json:"name"`
	Provider string `json:"provider"`
	// Active is set if Secrets are written with it.
	Active bool `json:"active"`
	// Secrets is the number of Secrets that use it.
	Secrets int `json:"secrets"`
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
	store, err := c.Datastore.Client()
	if err != nil {
		unlock()
		return nil, nil, fmt.Errorf("connect to the datastore: %w", err)
	}
	return &connection{c, client, store}, func() { store.Close(); unlock() }, nil
}

// Status determines from the datastore which Secrets use which key.
func (c Cluster) Status(ctx context.Context) (*Status, error) {
	conn, done, err := c.connect(false)
	if err != nil {
		return nil, err
	}
	defer done()
	k, err := read(c.File)
	if err != nil {
		return nil, err
	}
	s := &Status{Enabled: k.encrypt, Keys: []Key{}}
	for i, one := range k.all {
		s.Keys = append(s.Keys, Key{Name: one.name, Provider: one.provider, Active: k.encrypt && i == 0})
	}
	other := 0
	err = conn.each(ctx, func(path string, value []byte) {
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
		err = fmt.Errorf("%d Secrets are encrypted with keys that are not in %s: restore it from a backup", other, c.File)
	}
	s.Unfinished = k.encrypt && (s.Plain > 0 || len(k.all) > 1) || !k.encrypt && len(k.all) > 0
	return s, err
}

// Enable turns encryption on, and rewrites existing Secrets.
func (c Cluster) Enable(ctx context.Context, provider string) error {
	return c.change(ctx, func(k *keys) error {
		if k.encrypt && k.all[0].provider != provider {
			return fmt.Errorf("the Secrets are encrypted with %s already: `polymesh secrets-encrypt rotate-keys --provider %s` changes that", k.all[0].provider, provider)
		}
		if !k.encrypt {
			k.encrypt = true
			k.all = append([]key{newKey(provider, time.Now())}, k.all...)
		}
		return nil
	})
}

// Disable turns encryption off, and rewrites existing Secrets.
func (c Cluster) Disable(ctx context.Context) error {
	return c.change(ctx, func(k *keys) error { k.encrypt = false; return nil })
}

// Rotate adds a new key, rewrites all Secrets with it, and removes the old one. An empty provider keeps that of the old key.
func (c Cluster) Rotate(ctx context.Context, provider string) error {
	return c.change(ctx, func(k *keys) error {
		if !k.encrypt {
			return errors.New("the Secrets are not encrypted: `polymesh secrets-encrypt enable` comes first")
		}
		if provider == "" {
			provider = k.all[0].provider
		}
		k.all = append([]key{newKey(provider, time.Now())}, k.all...)
		return nil
	})
}

// Finish rewrites the Secrets that are not written as configured, and removes unused keys.
func (c Cluster) Finish(ctx context.Context) error {
	return c.change(ctx, func(*keys) error { return nil })
}

// change writes the keys modified by edit, rewrites all Secrets, and removes the other keys.
func (c Cluster) change(ctx context.Context, edit func(*keys) error) error {
	conn, done, err := c.connect(true)
	if err != nil {
		return err
	}
	defer done()
	k, err := read(c.File)
	if err != nil {
		return err
	}
	before := k
	if err := edit(&k); err != nil {
		return err
	}
	keep := 0
	if k.encrypt {
		keep = 1
	}
	// Rewriting alone is safe on any server: all have the same key.
	if before.encrypt != k.encrypt || len(k.all) != len(before.all) || len(k.all) > keep {
		names, err := servers(ctx, conn.store, netip.Addr{})
		if err != nil {
			return err
		}
		if len(names) > 1 {
			return severalServers(names)
		}
	}
	if c.Before != nil {
		if err := c.Before(ctx); err != nil {
			return err
		}
	}
	if err := write(c.File, k); err != nil {
		return err
	}
	if err := conn.rewrite(ctx, k.written()); err != nil {
		return err
	}
	if len(k.all) == keep {
		return nil
	}
	k.all = k.all[:keep]
	return write(c.File, k)
}

// each calls f for every Secret with its value in the datastore.
func (c *connection) each(ctx context.Context, f func(path string, value []byte)) error {
	end := clientv3.GetPrefixRangeEnd(secretsPath)
	for from := secretsPath; ; {
		page, err := c.store.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize))
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
	if err := c.awaitReload(ctx, written); err != nil {
		return err
	}
	for before := -1; ; {
		var left []string
		total := 0
		err := c.each(ctx, func(path string, value []byte) {
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

// awaitReload waits until this server's API server writes with the prefix. It never goes back.
func (c *connection) awaitReload(ctx context.Context, written string) error {
	secrets := c.client.CoreV1().Secrets(metav1.NamespaceSystem)
	probe := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: probeName}}
	if _, err := secrets.Create(ctx, probe, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the Secret %s: %w", probeName, err)
	}
	defer func() {
		_ = secrets.Delete(context.WithoutCancel(ctx), probeName, metav1.DeleteOptions{})
	}()
	deadline := time.NewTimer(reloadLimit)
	defer deadline.Stop()
	for {
		// The value must differ each time, or nothing is written.
		patch, err := json.Marshal(map[string]any{"stringData": map[string]string{"at": time.Now().Format(time.RFC3339Nano)}})
		if err != nil {
			return err
		}
		if _, err := secrets.Patch(ctx, probeName, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "polymesh"}); err != nil {
			return fmt.Errorf("write the Secret %s: %w", probeName, err)
		}
		got, err := c.store.Get(ctx, secretsPath+metav1.NamespaceSystem+"/"+probeName)
		if err != nil {
			return fmt.Errorf("read the Secret %s in the datastore: %w", probeName, err)
		}
		if len(got.Kvs) == 1 && stored(got.Kvs[0].Value, written) {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-deadline.C:
			return fmt.Errorf("the API server does not use %s: is another encryption-provider-config set with --kube-apiserver-arg?", c.File)
		case <-time.After(ReloadInterval / 5):
		}
	}
}
