package encryption

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"reflect"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// Place is where a server has the keys.
type Place struct {
	// File is the API server's encryption configuration.
	File string
	// Datastore has the Secrets and, if several servers can use it, the keys in what they share. File is a copy then.
	Datastore datastore.Endpoint
	// BootstrapKey is the file of the key that opens what they share.
	BootstrapKey string
	// Reload is how often the API server checks File, and a server what they share; 0 for the default.
	Reload time.Duration
}

// ReloadInterval is how often the API server checks the file.
func (p Place) ReloadInterval() time.Duration { return cmp.Or(p.Reload, reloadInterval) }

// Self is this server for the others.
type Self struct {
	// Name is its node's.
	Name string
	// Address is the one that its API server advertises.
	Address netip.Addr
	// Version is that of its Kubernetes.
	Version string
	// ID is that of its data dir, empty for none: see bootstrap.Store.Take.
	ID string
}

// several reports whether there can be several servers.
func (p Place) several() bool { return p.Datastore.LeaderElect }

// shared reads the keys in what the servers share. It is bootstrap.ErrNone if they share nothing yet.
func (p Place) shared(ctx context.Context, store bootstrap.Store) (keys, []byte, error) {
	key, err := bootstrap.ReadKey(p.BootstrapKey)
	if errors.Is(err, fs.ErrNotExist) {
		exists, err := store.Exists(ctx)
		if err == nil && exists {
			err = fmt.Errorf("the keys of Secrets are in what the servers share, and %s, which opens it, is missing: copy it from another server, or from a snapshot", p.BootstrapKey)
		} else if err == nil {
			err = bootstrap.ErrNone
		}
		return keys{}, nil, err
	}
	if err != nil {
		return keys{}, nil, err
	}
	b, err := store.Read(ctx, key)
	if err != nil {
		return keys{}, nil, err
	}
	k, err := parseShared(b)
	return k, b.Encryption, err
}

// parseShared reads the keys in what the servers share.
func parseShared(b bootstrap.Bundle) (keys, error) {
	k, err := parse(b.Encryption, "what the servers share")
	if err != nil {
		return k, err
	}
	if b.NextKey != "" && !slices.ContainsFunc(k.all, func(one key) bool { return one.name == b.NextKey }) {
		return k, fmt.Errorf("what the servers share names the key %s of Secrets, and does not have it: restore it from a snapshot", b.NextKey)
	}
	k.next = b.NextKey
	return k, nil
}

// errChanged means that another server has changed the keys meanwhile.
var errChanged = errors.New("the keys were changed by another server: see `polymesh secrets-encrypt status`")

// share replaces the keys in what the servers share.
func (p Place) share(ctx context.Context, store bootstrap.Store, before, after keys) error {
	key, err := bootstrap.ReadKey(p.BootstrapKey)
	if err != nil {
		return err
	}
	text, err := after.text()
	if err != nil {
		return err
	}
	return store.Change(ctx, key, func(b *bootstrap.Bundle) error {
		have, err := parseShared(*b)
		if err == nil && !reflect.DeepEqual(have, before) {
			err = errChanged
		}
		if err != nil {
			return err
		}
		b.Encryption, b.NextKey = text, after.next
		return nil
	})
}

// Ensure writes the file before the API server starts. Where servers share the keys, a server that has been away or joins gets them here,
// whatever has changed meanwhile, and its record is written first: who changes the keys waits for every server with a record.
//
// provider is how Secrets are to be encrypted, empty for no change. If keys are shared it only matters to the first server of a cluster;
// later the component makes the change, on all servers. A datastore that cannot be written is only logged if the server has a record.
func (p Place) Ensure(ctx context.Context, self Self, provider string) error {
	if !p.several() {
		return ensureFile(p.File, provider)
	}
	client, err := openStore(p.Datastore)
	if err != nil {
		return err
	}
	defer client.Close()
	store := bootstrap.Store{Client: client}
	if self.ID != "" {
		err = store.Take(ctx, self.Name, self.ID, true)
		if taken := new(bootstrap.TakenError); errors.As(err, &taken) {
			return err
		}
	}
	if err == nil {
		err = store.Record(ctx, self.Name, func(r *bootstrap.Server) {
			r.Address, r.Started, r.Registered, r.Version = self.Address, time.Now().UTC(), false, self.Version
		})
	}
	if err != nil {
		// Who changes the keys waits for this server by its last record, too. In a datastore that is full, only a running API server deletes.
		r, missing := store.Server(ctx, self.Name)
		if missing != nil || r.Name != self.Name || r.Address != self.Address || r.ID != "" && r.ID != self.ID {
			return err
		}
		klog.Warningf("the datastore cannot be written; the server starts with the record of its last start: %v", err)
	}
	if _, err = p.update(ctx, store, false); errors.Is(err, bootstrap.ErrNone) {
		return ensureFile(p.File, provider)
	}
	return err
}

// update copies the shared keys to the file, and returns the configuration. Keys that only the file has are shared first if they are needed:
// the version before this one changed them in the file, and when it shares an old file the others' new keys are gone from what is shared.
// running is set if the API server writes Secrets with the file's first key meanwhile.
func (p Place) update(ctx context.Context, store bootstrap.Store, running bool) ([]byte, error) {
	for {
		shared, text, err := p.shared(ctx, store)
		if err != nil {
			return nil, err
		}
		own, _, err := read(p.File)
		if err != nil {
			return nil, fmt.Errorf("%w; or move the file away, and the server gets the keys that the servers share", err)
		}
		all, err := p.withNeeded(ctx, store, shared, own, running)
		if err != nil {
			return nil, err
		}
		if reflect.DeepEqual(all, shared) {
			return text, write(p.File, text)
		}
		if err := p.share(ctx, store, shared, all); err != nil && !errors.Is(err, errChanged) {
			return nil, fmt.Errorf("share the keys of Secrets that only %s has: %w", p.File, err)
		}
	}
}

// withNeeded adds to the shared keys those of this server's own with which Secrets in the datastore are encrypted. If one is the key with
// which this server writes, it is the next key of all, unless another one is.
func (p Place) withNeeded(ctx context.Context, store bootstrap.Store, shared, own keys, running bool) (keys, error) {
	needed := map[key]bool{}
	for _, one := range own.all {
		if !slices.Contains(shared.all, one) {
			needed[one] = false
		}
	}
	if len(needed) == 0 {
		return shared, nil
	}
	err := eachSecret(ctx, store.Client, func(_ string, value []byte) {
		for one := range needed {
			if bytes.HasPrefix(value, []byte(prefix(one))) {
				needed[one] = true
			}
		}
	})
	if err != nil {
		return keys{}, err
	}
	all := shared
	for i, one := range own.all {
		active := own.encrypt && i == 0
		switch _, missing := needed[one]; {
		case !missing, !needed[one] && !(running && active):
		case slices.ContainsFunc(shared.all, func(other key) bool { return prefix(other) == prefix(one) }):
			return keys{}, fmt.Errorf("%s has another key %s of Secrets than the servers share, and Secrets use one of them: restore a snapshot, or move the file away if it is of another cluster", p.File, one.name)
		case active && shared.next == "":
			all = all.add(one)
		default:
			all.all = append(slices.Clone(all.all), one)
		}
	}
	return all, nil
}

// follow copies the shared keys to the file, and records what the API server has loaded.
func (p Place) follow(ctx context.Context, store bootstrap.Store, self Self, api kubernetes.Interface) error {
	text, err := p.update(ctx, store, true)
	if errors.Is(err, bootstrap.ErrNone) {
		return nil // they are about to be shared from the file
	}
	if err != nil {
		return err
	}
	r, err := store.Server(ctx, self.Name)
	if err != nil {
		return err
	}
	hash, registered := r.Loaded, r.Registered
	if hash != hashOf(text) {
		if hash, err = loaded(ctx, api); err != nil {
			return err
		}
	}
	if !registered {
		_, err := api.CoreV1().Nodes().Get(ctx, self.Name, metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("look for this server's node: %w", err)
		}
		registered = err == nil
	}
	return store.Record(ctx, self.Name, func(r *bootstrap.Server) {
		if r.Address, r.Loaded, r.Registered = self.Address, hash, registered; r.Started.IsZero() {
			r.Started = time.Now().UTC()
		}
	})
}

// openStore connects to what the servers share. The caller closes the client.
func openStore(e datastore.Endpoint) (*clientv3.Client, error) {
	client, err := e.Client()
	if err != nil {
		return nil, fmt.Errorf("connect to the datastore: %w", err)
	}
	return client, nil
}
