package encryption

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
)

// The API server accepts what is written, and it can be read again.
func TestKeys(t *testing.T) {
	now := time.Now()
	a, b, c := newKey(Secretbox, now), newKey(AESCBC, now), newKey(AESCBC, now)
	for name, k := range map[string]keys{
		"nothing":         {},
		"one key":         {encrypt: true, all: []key{a}},
		"a new key":       {encrypt: true, all: []key{b, c, a}},
		"being decrypted": {all: []key{a, b}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "cred", "encryption-config.json")
			if err := write(file, k); err != nil {
				t.Fatal(err)
			}
			for path, mode := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): 0o700} {
				if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v %v, want mode %o", path, info, err, mode)
				}
			}
			got, err := read(file)
			if err != nil || !reflect.DeepEqual(got, k) {
				t.Errorf("read %+v %v, want %+v", got, err, k)
			}
			if _, err := encryptionconfig.LoadEncryptionConfig(t.Context(), file, true, ""); err != nil {
				t.Errorf("the API server rejects it: %v", err)
			}
		})
	}
}

func TestEnsure(t *testing.T) {
	file := filepath.Join(t.TempDir(), "encryption-config.json")
	alone := func() ([]string, error) { return nil, nil }
	ensure := func(provider string) keys {
		t.Helper()
		if err := Ensure(file, provider, alone); err != nil {
			t.Fatal(err)
		}
		k, err := read(file)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	if k := ensure(""); k.encrypt || len(k.all) != 0 {
		t.Errorf("without the setting: %+v", k)
	}
	first := ensure(Secretbox)
	if !first.encrypt || len(first.all) != 1 || first.all[0].provider != Secretbox {
		t.Errorf("with it: %+v", first)
	}
	for _, provider := range []string{Secretbox, ""} {
		if k := ensure(provider); !reflect.DeepEqual(k, first) {
			t.Errorf("a start with %q changed the keys: %+v", provider, k)
		}
	}
	// With other servers, which would not have the new key.
	for what, others := range map[string]func() ([]string, error){
		"one server only": func() ([]string, error) { return []string{"node-2"}, nil },
		"no datastore":    func() ([]string, error) { return nil, errors.New("no datastore") },
	} {
		if err := Ensure(file, AESCBC, others); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("another provider: %v, want %s", err, what)
		}
		if err := Ensure(file, Secretbox, others); err != nil {
			t.Errorf("the same provider: %v", err)
		}
		if k, err := read(file); err != nil || !reflect.DeepEqual(k, first) {
			t.Errorf("the keys are %+v, %v", k, err)
		}
	}
	if k := ensure(AESCBC); !k.encrypt || len(k.all) != 2 || k.all[0].provider != AESCBC || k.all[1] != first.all[0] {
		t.Errorf("another provider: %+v", k)
	}
	for _, text := range []string{"{", "kind: EncryptionConfiguration\nresources: [{resources: [secrets], providers: [{kms: {name: x, endpoint: y}}]}]\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Ensure(file, Secretbox, alone); err == nil {
			t.Errorf("%s is replaced", text)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("%s became %s %v", text, got, err)
		}
	}
}
