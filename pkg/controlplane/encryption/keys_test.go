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

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"

	"polymesh.dev/polymesh/pkg/bootstrap"
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
			text, err := k.text()
			if err != nil {
				t.Fatal(err)
			}
			if err := write(file, text); err != nil {
				t.Fatal(err)
			}
			for path, mode := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): 0o700} {
				if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v %v, want mode %o", path, info, err, mode)
				}
			}
			got, _, err := read(file)
			if err != nil || !reflect.DeepEqual(got, k) {
				t.Errorf("read %+v %v, want %+v", got, err, k)
			}
			loaded, err := encryptionconfig.LoadEncryptionConfig(t.Context(), file, true, "")
			if err != nil {
				t.Fatalf("the API server rejects it: %v", err)
			}
			if loaded.EncryptionFileContentHash != hashOf(text) {
				t.Errorf("the API server reports it as %s, want %s", loaded.EncryptionFileContentHash, hashOf(text))
			}
		})
	}
}

// In each step of a change there are only two configurations, and what is written by one can be read by the other.
func TestSteps(t *testing.T) {
	now := time.Now()
	a, b := newKey(AESCBC, now), newKey(Secretbox, now)
	reads := func(k keys, prefixed string) bool {
		return prefixed == "" || slices.ContainsFunc(k.all, func(one key) bool { return prefix(one) == prefixed })
	}
	for name, steps := range map[string][]keys{
		"enable":  {{}, keys{}.add(a), keys{}.add(a).promote()},
		"rotate":  {{encrypt: true, all: []key{a}}, keys{encrypt: true, all: []key{a}}.add(b), keys{encrypt: true, all: []key{a}}.add(b).promote(), {encrypt: true, all: []key{b}}},
		"disable": {{encrypt: true, all: []key{a}}, {all: []key{a}}, {}},
	} {
		for i, k := range steps {
			if between := i > 0 && i < len(steps)-1; k.changing() != between {
				t.Errorf("%s, step %d: changing is %t", name, i, k.changing())
			}
			if i > 0 && (!reads(steps[i-1], k.written()) || !reads(k, steps[i-1].written())) {
				t.Errorf("%s, step %d: %+v and %+v do not read each other's Secrets", name, i, steps[i-1], k)
			}
		}
	}
}

func TestEnsureFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "encryption-config.json")
	ensure := func(provider string) keys {
		t.Helper()
		if err := ensureFile(file, provider); err != nil {
			t.Fatal(err)
		}
		k, _, err := read(file)
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
	if k := ensure(AESCBC); !k.encrypt || len(k.all) != 2 || k.all[0].provider != AESCBC || k.all[1] != first.all[0] {
		t.Errorf("another provider: %+v", k)
	}
	for _, text := range []string{"", "{", "kind: EncryptionConfiguration\nresources: [{resources: [secrets], providers: [{kms: {name: x, endpoint: y}}]}]\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := ensureFile(file, Secretbox); err == nil {
			t.Errorf("%q is replaced", text)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("%q became %q %v", text, got, err)
		}
	}
}

// A server is named with what is wrong with it, and one that was removed does not count.
func TestJudge(t *testing.T) {
	now := time.Now()
	record := func(name, address, loaded string, started time.Duration, registered bool) bootstrap.Server {
		return bootstrap.Server{Name: name, Address: netip.MustParseAddr(address), Started: now.Add(-started), Registered: registered, Loaded: loaded}
	}
	nodes := []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "a"}}, {ObjectMeta: metav1.ObjectMeta{Name: "b"}}, {ObjectMeta: metav1.ObjectMeta{Name: "off"}}, {ObjectMeta: metav1.ObjectMeta{Name: "old"}}}
	got, removed := judge([]bootstrap.Server{
		record("b", "192.0.2.2", "1", time.Hour, true), record("a", "192.0.2.1", "2", time.Hour, true), record("off", "192.0.2.3", "2", time.Hour, true),
		record("joins", "192.0.2.4", "", time.Minute, false), record("gone", "192.0.2.5", "2", time.Minute, true), record("never", "192.0.2.6", "", time.Hour, false),
		record("no-node", "192.0.2.7", "2", time.Hour, true),
		// A machine that was removed and set up again with another name. A server that has not registered is waited for.
		record("former", "192.0.2.8", "1", time.Hour, true), record("present", "192.0.2.8", "2", 2*time.Minute, true), record("joins-there", "192.0.2.8", "", 3*time.Minute, false),
	}, nodes, map[string]bool{"192.0.2.1": true, "192.0.2.2": true, "192.0.2.7": true, "192.0.2.8": true}, "2", now)
	want := []Server{{"a", Current, "2"}, {"b", Behind, "1"}, {"joins", Away, ""}, {"joins-there", Behind, ""}, {"no-node", Current, "2"}, {"off", Away, "2"}, {"old", Silent, ""}, {"present", Current, "2"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if len(removed) != 3 || removed[0].Name != "gone" || removed[1].Name != "never" || removed[2].Name != "former" {
		t.Errorf("removed: %+v", removed)
	}
	text := notCurrentError(got[1:]).Error()
	for _, want := range []string{"b has not loaded the keys yet", "joins is away: start it, or remove it with `polymesh node remove joins`", "old does not report"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s, want %s", text, want)
		}
	}
}
