package encryption

import (
	"crypto/rand"
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
}

// written returns the prefix of values written with this configuration; empty if unencrypted.
func (k keys) written() string {
	if !k.encrypt {
		return ""
	}
	return prefix(k.all[0])
}

// prefix is the API server's prefix for a value (k8s.io/apiserver/pkg/server/options/encryptionconfig).
func prefix(k key) string { return "k8s:enc:" + k.provider + ":v1:" + k.name + ":" }

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

// read reads the file. If it does not exist, nothing is encrypted. A file that this package has not written is rejected: a key that it
// does not understand must not be lost.
func read(file string) (keys, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return keys{}, nil
	}
	if err != nil {
		return keys{}, err
	}
	var c apiserver.EncryptionConfiguration
	if err := yaml.UnmarshalStrict(text, &c); err != nil {
		return keys{}, fmt.Errorf("%s: %w", file, err)
	}
	refuse := func(why string) (keys, error) {
		return keys{}, fmt.Errorf("%s %s: restore it from a backup", file, why)
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

// write replaces the file, and returns when it is durable: data encrypted with a lost key is lost.
func write(file string, k keys) error {
	text, err := json.MarshalIndent(k.configuration(), "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return atomicfile.Write(file, append(text, '\n'), 0o600)
}

// Ensure writes the file that the API server reads. With a provider, Secrets are encrypted from now on, with a new key if
// there is none; the component rewrites Secrets written before. Without a provider, the file is unchanged: removing the
// flag does not turn encryption off.
//
// others returns the cluster's other servers. While there are any, keys do not change: a server that joins has gotten the file.
func Ensure(file, provider string, others func() ([]string, error)) error {
	k, err := read(file)
	if err != nil {
		return err
	}
	switch {
	case provider != "" && !k.encrypt:
		k.encrypt = true
		if len(k.all) == 0 || k.all[0].provider != provider {
			k.all = append([]key{newKey(provider, time.Now())}, k.all...)
		}
	case provider != "" && k.all[0].provider != provider:
		k.all = append([]key{newKey(provider, time.Now())}, k.all...)
	default:
		if _, err := os.Stat(file); err == nil {
			return nil
		}
		others = nil // a file without a key
	}
	if others != nil {
		names, err := others()
		if err != nil {
			return err
		}
		if len(names) > 0 {
			return severalServers(append([]string{"this one"}, names...))
		}
	}
	if err := write(file, k); err != nil {
		return fmt.Errorf("write the keys of Secrets: %w", err)
	}
	return nil
}
