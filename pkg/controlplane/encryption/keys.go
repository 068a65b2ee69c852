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

// The providers that need no other program.
const (
	Secretbox = "secretbox"
	AESCBC    = "aescbc"
)

// keySize is what both providers take, in bytes.
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

// keys is the configuration: what Secrets are written with, and what can be read.
type keys struct {
	// encrypt says that Secrets are written with the first key, and otherwise as they are.
	encrypt bool
	// all are the keys with which Secrets can be read.
	all []key
}

// written is how a value begins that is written with these keys; it is empty for one that is written as it is.
func (k keys) written() string {
	if !k.encrypt {
		return ""
	}
	return prefix(k.all[0])
}

// prefix is what the API server puts before a value (k8s.io/apiserver/pkg/server/options/encryptionconfig).
func prefix(k key) string { return "k8s:enc:" + k.provider + ":v1:" + k.name + ":" }

// configuration is the file as the API server reads it. Keys of one provider that follow each other share an entry.
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

// read reads the file. Without one, nothing is encrypted. A file that this package has not written is refused: a key that it
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

// write replaces the file, and returns when it will survive a power cut: what is written with a key that is lost is lost.
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

// Ensure makes the file that the API server reads. With a provider, Secrets are encrypted from now on, with a new key where
// there is none; what a server that did not have the setting has written is rewritten by the component. Without one the file
// stays as it is: an encryption that is on is not turned off by leaving a flag out.
func Ensure(file, provider string) error {
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
	}
	if err := write(file, k); err != nil {
		return fmt.Errorf("write the keys of Secrets: %w", err)
	}
	return nil
}
