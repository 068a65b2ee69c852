// Package bootstrap is what a machine must have to become a further server of a cluster: the authorities with their keys, the keys of
// Secrets, and the settings on which all servers agree.
//
// The servers keep it in the datastore, beside the API server's objects, so that a server can also start where no other one runs. It is
// sealed by a random key, and that key again by each server's token (pkg/token): the datastore alone opens neither. A server answers a
// machine that joins with the same sealed texts. pkg/join seals and opens, and writes the key to <data-dir>/server/cred/bootstrap.key.
package bootstrap

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/token"
)

// Bundle is what all servers of a cluster share.
type Bundle struct {
	// Authorities are PEM files by name: certificate.Authorities.Export.
	Authorities map[string][]byte `json:"authorities"`
	// Encryption is the API server's encryption configuration, and NextKey the name of the key in it with which Secrets are written once
	// all servers can read it; empty for none. pkg/controlplane/encryption changes them.
	Encryption []byte `json:"encryption"`
	NextKey    string `json:"nextKey,omitempty"`
	// Token is the content of server/token.
	Token string `json:"token,omitempty"`
	// Settings are config.Server.Settings, as name=value.
	Settings []string `json:"settings"`
	// Datastore is where the cluster's state is.
	Datastore Datastore `json:"datastore"`
}

// Datastore is a kind of datastore that servers share.
type Datastore string

const (
	// Etcd has a member in each server.
	Etcd Datastore = "etcd"
	// External is outside of the servers.
	External Datastore = "external"
)

// Key seals a bundle.
type Key []byte

// keySize is the length of a key, in bytes: AES-256.
const keySize = 32

// Purposes bind a sealed text to what it is for.
const (
	bundlePurpose = "polymesh bootstrap bundle 1"
	keyPurpose    = "polymesh bootstrap key 1 "
)

// EnsureKey reads a server's key, and makes it if there is none.
func EnsureKey(file string) (Key, error) {
	key, err := ReadKey(file)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, keySize)
		_, _ = rand.Read(key)
		err = WriteKey(file, key)
	}
	return key, err
}

// ReadKey reads a server's key. The error is fs.ErrNotExist if there is none.
func ReadKey(file string) (Key, error) {
	key, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the key of what the servers share: %w", err)
	}
	if len(key) != keySize {
		return nil, fmt.Errorf("the key of what the servers share, %s, is damaged: restore it from a backup, or from another server", file)
	}
	return key, nil
}

// WriteKey writes the key of a server that joins.
func WriteKey(file string, key Key) error { return atomicfile.Write(file, key, 0o600) }

// Seal encrypts a bundle.
func (b Bundle) Seal(key Key) ([]byte, error) {
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	return seal(key, text, bundlePurpose)
}

// Open decrypts a bundle.
func Open(key Key, sealed []byte) (b Bundle, err error) {
	text, err := open(key, sealed, bundlePurpose)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		return Bundle{}, fmt.Errorf("open what the servers share: %w", err)
	}
	return b, nil
}

// OpenWith opens both, the key with the token and the bundle with the key.
func OpenWith(t token.Token, bundle, wrapped []byte) (Bundle, Key, error) {
	key, err := Unwrap(t, wrapped)
	if err != nil {
		return Bundle{}, nil, err
	}
	b, err := Open(key, bundle)
	return b, key, err
}

// Wrap seals the key for a token.
func (k Key) Wrap(t token.Token) ([]byte, error) {
	if t.Role() != token.Server {
		return nil, errors.New("the token is one for agents")
	}
	return seal(t.SealingKey(), k, keyPurpose+t.ID)
}

// Unwrap opens the key that was sealed for a token.
func Unwrap(t token.Token, wrapped []byte) (Key, error) {
	if t.Role() != token.Server {
		return nil, errors.New("the token is one for agents")
	}
	key, err := open(t.SealingKey(), wrapped, keyPurpose+t.ID)
	if err == nil && len(key) != keySize {
		err = errors.New("it is damaged")
	}
	if err != nil {
		return nil, fmt.Errorf("open the key of what the servers share with token %s: %w", t.ID, err)
	}
	return key, nil
}

func seal(key, text []byte, purpose string) ([]byte, error) {
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	return aead.Seal(nil, nil, text, []byte(purpose)), nil
}

func open(key, sealed []byte, purpose string) ([]byte, error) {
	aead, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	return aead.Open(nil, nil, sealed, []byte(purpose))
}

// newAEAD is AES-256-GCM, with the nonce in front of the sealed text.
func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
