package encryption

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
)

// No key with which Secrets are encrypted is lost where what the servers share does not have it: after an upgrade from a version that
// changed the keys in the file, after a restore of its snapshot, and where a server of it has written what is shared.
func TestKeysOnlyInTheFile(t *testing.T) {
	now := time.Now()
	a, b, c := newKey(Secretbox, now), newKey(Secretbox, now), newKey(AESCBC, now)
	other := key{a.provider, a.name, b.secret}
	encrypted := func(all ...key) keys { return keys{encrypt: true, all: all} }
	for name, tt := range map[string]struct {
		shared, file keys
		secrets      []key // one Secret each
		running      bool
		want         keys
		fails        string
	}{
		"rotated in the file":            {encrypted(a), encrypted(b), []key{b}, false, encrypted(a).add(b), ""},
		"half of the file rotated":       {encrypted(a), encrypted(b, a), []key{a, b}, false, encrypted(a).add(b), ""},
		"enabled in the file":            {keys{}, encrypted(a), []key{a}, false, keys{}.add(a), ""},
		"being disabled in the file":     {encrypted(b), keys{all: []key{a}}, []key{a}, false, encrypted(b, a), ""},
		"while another key is next":      {encrypted(a).add(c), encrypted(b), []key{a, b}, false, keys{encrypt: true, all: []key{a, c, b}, next: c.name}, ""},
		"no Secret uses the old key":     {encrypted(b), encrypted(a), []key{b}, false, encrypted(b), ""},
		"the same keys":                  {encrypted(b, a), encrypted(a), []key{a, b}, false, encrypted(b, a), ""},
		"a server writes with it":        {encrypted(a), encrypted(b, a), nil, true, encrypted(a).add(b), ""},
		"a server no longer writes with": {encrypted(b), encrypted(b, a), []key{b}, true, encrypted(b), ""},
		"another key with the same name": {encrypted(a), encrypted(other), []key{a}, false, keys{}, "another key " + a.name},
		"another name without Secrets":   {encrypted(a), encrypted(c), nil, false, encrypted(a), ""},
		"shared keys of a new data dir":  {encrypted(a), keys{}, []key{a}, false, encrypted(a), ""},
		"an interrupted shared rotation": {encrypted(a).add(b), encrypted(a), []key{a}, true, encrypted(a).add(b), ""},
	} {
		t.Run(name, func(t *testing.T) {
			p, store, bundleKey := newPlace(t)
			ctx := t.Context()
			text, err := tt.shared.text()
			if err == nil {
				err = store.Save(ctx, bundleKey, bootstrap.Bundle{Encryption: text, NextKey: tt.shared.next, Datastore: bootstrap.External})
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(tt.file, keys{}) {
				if text, err = tt.file.text(); err == nil {
					err = write(p.File, text)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			before, _, err := read(p.File)
			if err != nil {
				t.Fatal(err)
			}
			for i, one := range tt.secrets {
				path := secretsPath + "default/" + string(rune('a'+i))
				create := store.Client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(path), "=", 0)).Then(clientv3.OpPut(path, prefix(one)+"sealed"))
				if done, err := create.Commit(); err != nil || !done.Succeeded {
					t.Fatal(done, err)
				}
			}
			if tt.running {
				_, err = p.update(ctx, store, true)
			} else {
				err = p.Ensure(ctx, Self{Name: "one", Address: netip.MustParseAddr("192.0.2.1")}, "")
			}
			got, _, readErr := read(p.File)
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Errorf("%v, want %s", err, tt.fails)
				}
				if readErr != nil || !reflect.DeepEqual(got, before) {
					t.Errorf("the file has become %+v, %v", got, readErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			shared, _, err := p.shared(ctx, store)
			if err != nil || !reflect.DeepEqual(shared, tt.want) {
				t.Errorf("shared are %+v, %v, want %+v", shared, err, tt.want)
			}
			if readErr != nil || !slices.Equal(got.all, tt.want.all) || got.encrypt != tt.want.encrypt {
				t.Errorf("the file has %+v, %v, want %+v", got, readErr, tt.want)
			}
		})
	}
	t.Run("a file that is not understood", func(t *testing.T) {
		p, store, bundleKey := newPlace(t)
		text, err := encrypted(a).text()
		if err == nil {
			err = store.Save(t.Context(), bundleKey, bootstrap.Bundle{Encryption: text, Datastore: bootstrap.External})
		}
		if err == nil {
			err = write(p.File, []byte("{"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.update(t.Context(), store, false); err == nil || !strings.Contains(err.Error(), "move the file away") {
			t.Errorf("%v", err)
		}
		if got, err := os.ReadFile(p.File); err != nil || string(got) != "{" {
			t.Errorf("it became %q, %v", got, err)
		}
	})
}

// newPlace returns the place of one of several servers, on kine, with what they share and its key.
func newPlace(t *testing.T) (Place, bootstrap.Store, bootstrap.Key) {
	t.Helper()
	dir := t.TempDir()
	d := datastoretest.Start(t, filepath.Join(dir, "db"))
	p := Place{File: filepath.Join(dir, "cred", "encryption-config.json"), Datastore: d.Endpoint(), BootstrapKey: filepath.Join(dir, "bootstrap.key")}
	p.Datastore.LeaderElect = true
	bundleKey, err := bootstrap.EnsureKey(p.BootstrapKey)
	if err != nil {
		t.Fatal(err)
	}
	return p, bootstrap.Store{Client: d.Client}, bundleKey
}
