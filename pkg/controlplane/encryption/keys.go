package encryption

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiserver "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// The providers that need no external program.
const (
	Secretbox = "secretbox"
	AESCBC    = "aescbc"
)

// keySize is the key size of both providers, in bytes.
const keySize = 32

// key is one key of the API server's configuration.
type key struct {
	provider string
	name     string
	secret   string // base64
}

func newKey(provider string, now time.Time) key {
	secret, suffix := make([]byte, keySize), make([]byte, 4)
	rand.Read(secret) // never fails (crypto/rand)
	rand.Read(suffix)
	return key{provider, now.UTC().Format("20060102") + "-" + hex.EncodeToString(suffix), base64.StdEncoding.EncodeToString(secret)}
}

// keys is the configuration: how Secrets are written, and which keys can read them.
type keys struct {
	// encrypt is set if Secrets are written with the first key; otherwise they are written unencrypted.
	encrypt bool
	// all are the keys that can read Secrets.
	all []key
	// next is the name of the key with which Secrets are written once every server can read it; empty for none.
	next string
}

// add adds a key that no server has yet.
func (k keys) add(one key) keys {
	k.all, k.next = append(slices.Clone(k.all), one), one.name
	return k
}

// promote makes the next key the first.
func (k keys) promote() keys {
	i := slices.IndexFunc(k.all, func(one key) bool { return one.name == k.next })
	if i < 0 {
		return k
	}
	one := k.all[i]
	return keys{encrypt: true, all: append([]key{one}, slices.Delete(slices.Clone(k.all), i, i+1)...)}
}

// kept is how many of the keys stay when all Secrets are written with the first, or unencrypted.
func (k keys) kept() int {
	if k.encrypt {
		return 1
	}
	return 0
}

// changing reports whether a change has begun that has not ended.
func (k keys) changing() bool { return k.next != "" || len(k.all) > k.kept() }

// written returns the prefix of values written with this configuration; empty if unencrypted.
func (k keys) written() string {
	if !k.encrypt {
		return ""
	}
	return prefix(k.all[0])
}

// prefix is the API server's prefix for a value (k8s.io/apiserver/pkg/server/options/encryptionconfig).
func prefix(k key) string { return "k8s:enc:" + k.provider + ":v1:" + k.name + ":" }

// provider is how Secrets are written; empty if unencrypted.
func (k keys) provider() string {
	if !k.encrypt {
		return ""
	}
	return k.all[0].provider
}

// configuration returns the file's contents for the API server. Consecutive keys of one provider share an entry.
func (k keys) configuration() *apiserver.EncryptionConfiguration {
	var providers []apiserver.ProviderConfiguration
	identity := apiserver.ProviderConfiguration{Identity: &apiserver.IdentityConfiguration{}}
	if !k.encrypt {
		providers = append(providers, identity)
	}
	for i, one := range k.all {
		if i == 0 || k.all[i-1].provider != one.provider {
			entry := apiserver.ProviderConfiguration{}
			if one.provider == AESCBC {
				entry.AESCBC = &apiserver.AESConfiguration{}
			} else {
				entry.Secretbox = &apiserver.SecretboxConfiguration{}
			}
			providers = append(providers, entry)
		}
		entry, item := providers[len(providers)-1], apiserver.Key{Name: one.name, Secret: one.secret}
		if one.provider == AESCBC {
			entry.AESCBC.Keys = append(entry.AESCBC.Keys, item)
		} else {
			entry.Secretbox.Keys = append(entry.Secretbox.Keys, item)
		}
	}
	if k.encrypt {
		providers = append(providers, identity)
	}
	return &apiserver.EncryptionConfiguration{
		TypeMeta:  metav1.TypeMeta{APIVersion: "apiserver.config.k8s.io/v1", Kind: "EncryptionConfiguration"},
		Resources: []apiserver.ResourceConfiguration{{Resources: []string{"secrets"}, Providers: providers}},
	}
}

// read reads the file. If it does not exist, nothing is encrypted.
func read(file string) (keys, []byte, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return keys{}, nil, nil
	}
	if err != nil {
		return keys{}, nil, err
	}
	k, err := parse(text, file)
	return k, text, err
}

// parse reads a configuration, which is in a place. One that this package has not written is rejected: a key that it does not understand
// must not be lost.
func parse(text []byte, place string) (keys, error) {
	var c apiserver.EncryptionConfiguration
	if err := yaml.UnmarshalStrict(text, &c); err != nil {
		return keys{}, fmt.Errorf("%s: %w", place, err)
	}
	refuse := func(why string) (keys, error) {
		return keys{}, fmt.Errorf("%s %s: restore it from a backup", place, why)
	}
	if len(c.Resources) == 0 {
		return refuse("names no resources, or is empty")
	}
	if len(c.Resources) != 1 || !slices.Equal(c.Resources[0].Resources, []string{"secrets"}) {
		return refuse("is not about Secrets alone")
	}
	var k keys
	for i, p := range c.Resources[0].Providers {
		switch {
		case p.Identity != nil:
			k.encrypt = i > 0
		case p.AESCBC != nil:
			for _, one := range p.AESCBC.Keys {
				k.all = append(k.all, key{AESCBC, one.Name, one.Secret})
			}
		case p.Secretbox != nil:
			for _, one := range p.Secretbox.Keys {
				k.all = append(k.all, key{Secretbox, one.Name, one.Secret})
			}
		default:
			return refuse("has a provider that Polymesh does not use")
		}
	}
	if k.encrypt && len(k.all) == 0 {
		return refuse("has no key")
	}
	return k, nil
}

// text is the configuration as the file and what the servers share contain it.
func (k keys) text() ([]byte, error) {
	text, err := json.MarshalIndent(k.configuration(), "", "  ")
	return append(text, '\n'), err
}

// hashOf is the hash by which the API server names a configuration that it has loaded (computeEncryptionConfigHash in
// k8s.io/apiserver/pkg/server/options/encryptionconfig).
func hashOf(text []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(text)) }

// write replaces the file, and returns when it is durable: data encrypted with a lost key is lost.
func write(file string, text []byte) error {
	if have, err := os.ReadFile(file); err == nil && bytes.Equal(have, text) {
		return nil
	}
	err := os.MkdirAll(filepath.Dir(file), 0o700)
	if err == nil {
		err = atomicfile.Write(file, text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write the keys of Secrets: %w", err)
	}
	return nil
}

// ensureFile writes the file of a server that shares no keys. With a provider, Secrets are encrypted from now on, with a new key if there is
// none; the component rewrites Secrets written before. Without a provider, the file is unchanged: removing the flag does not turn
// encryption off.
func ensureFile(file, provider string) error {
	k, text, err := read(file)
	switch {
	case err != nil:
		return err
	case provider != "" && provider != k.provider():
		k = k.add(newKey(provider, time.Now())).promote()
	case text != nil:
		return nil
	}
	if text, err = k.text(); err != nil {
		return err
	}
	return write(file, text)
}
