package certificate

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	certutil "k8s.io/client-go/util/cert"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// authorityLife is the lifetime of an authority.
const authorityLife = 10 * 365 * 24 * time.Hour

// Names of the authorities; their files are <name>.crt and <name>.key.
const (
	ServerCA        = "server-ca"
	ClientCA        = "client-ca"
	RequestHeaderCA = "request-header-ca"
	// KubeletCA signs the kubelets' serving certificates. With ServerCA, a node could get a certificate for the API server's address.
	KubeletCA = "kubelet-ca"
	// EtcdCA signs the certificates of etcd's members and of their clients, the servers.
	EtcdCA = "etcd-ca"
)

func authorityNames() []string {
	return []string{ServerCA, ClientCA, RequestHeaderCA, KubeletCA, EtcdCA}
}

// Authorities is what all servers of a cluster share for signing: the certificate authorities, and the key for
// service-account tokens.
type Authorities struct {
	store  Store
	byName map[string]*tls.Certificate
}

// EnsureAuthorities reads the authorities of a store, and creates missing ones. An existing authority is never replaced: a
// damaged one is an error, and so is one that is not valid at the time now.
func EnsureAuthorities(store Store, now time.Time) (*Authorities, error) {
	if err := os.MkdirAll(string(store), 0o700); err != nil {
		return nil, fmt.Errorf("create the folder for certificates: %w", err)
	}
	if err := ensureKey(store.ServiceAccountKey()); err != nil {
		return nil, fmt.Errorf("service-account key: %w", err)
	}
	a := &Authorities{store, map[string]*tls.Certificate{}}
	for _, name := range authorityNames() {
		authority, err := ensureAuthority(store, name, now)
		if err != nil {
			return nil, fmt.Errorf("certificate authority %s: %w", name, err)
		}
		a.byName[name] = authority
	}
	return a, nil
}

// ParseAuthority reads a certificate in PEM form, the first if there are several.
func ParseAuthority(text []byte) (*x509.Certificate, error) {
	certs, err := certutil.ParseCertsPEM(text)
	if err != nil {
		return nil, err
	}
	return certs[0], nil
}

// exportedFiles returns the files that other servers of the cluster need, by their names in the store.
func exportedFiles() []string {
	var names []string
	for _, name := range authorityNames() {
		names = append(names, name+".crt", name+".key")
	}
	return append(names, filepath.Base(Store("").ServiceAccountKey()))
}

// Export returns the authorities with their keys, as PEM files by name. They are the cluster's identity: anyone who has
// them is its administrator.
func (a *Authorities) Export() (map[string][]byte, error) {
	exported := map[string][]byte{}
	for _, name := range exportedFiles() {
		text, err := os.ReadFile(filepath.Join(string(a.store), name))
		if err != nil {
			return nil, fmt.Errorf("export the cluster's authorities: %w", err)
		}
		exported[name] = text
	}
	return exported, nil
}

// Import writes exported authorities into an empty store. It rejects a set that is incomplete, or whose keys
// and certificates do not match, and a store that already has other authorities.
func Import(store Store, exported map[string][]byte) error {
	for _, name := range authorityNames() {
		pair, err := tls.X509KeyPair(exported[name+".crt"], exported[name+".key"])
		if err != nil {
			return fmt.Errorf("import the cluster's authorities: %s: %w", name, err)
		}
		if !pair.Leaf.IsCA {
			return fmt.Errorf("import the cluster's authorities: %s is not a certificate authority", name)
		}
	}
	if block, _ := pem.Decode(exported[filepath.Base(store.ServiceAccountKey())]); block == nil {
		return errors.New("import the cluster's authorities: the service-account key is missing")
	}
	for _, name := range exportedFiles() {
		have, err := os.ReadFile(filepath.Join(string(store), name))
		if err == nil && !bytes.Equal(have, exported[name]) {
			return fmt.Errorf("import the cluster's authorities: %s already has another %s: it belongs to another cluster", store, name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("import the cluster's authorities: %w", err)
		}
	}
	if err := os.MkdirAll(string(store), 0o700); err != nil {
		return fmt.Errorf("import the cluster's authorities: %w", err)
	}
	for _, name := range exportedFiles() {
		mode := os.FileMode(0o600)
		if filepath.Ext(name) == ".crt" {
			mode = 0o644
		}
		if err := atomicfile.Write(filepath.Join(string(store), name), exported[name], mode); err != nil {
			return fmt.Errorf("import the cluster's authorities: %w", err)
		}
	}
	return nil
}

// ensureAuthority reads an authority, or creates it if there is none. It never replaces one: a damaged authority is an error.
func ensureAuthority(store Store, name string, now time.Time) (*tls.Certificate, error) {
	// Create it only if the file certainly does not exist: a read error may be temporary.
	if _, err := os.Stat(store.Cert(name)); !errors.Is(err, fs.ErrNotExist) {
		pair, err := tls.LoadX509KeyPair(store.Cert(name), store.Key(name))
		if err != nil {
			return nil, fmt.Errorf("%w: restore it from a backup, or `polymesh reset` to start over", err)
		}
		if now.After(pair.Leaf.NotAfter) {
			return nil, fmt.Errorf("%s has expired on %s: if the clock is right, `polymesh reset` to start over", store.Cert(name), pair.Leaf.NotAfter.Format(time.DateOnly))
		}
		if now.Before(pair.Leaf.NotBefore) {
			return nil, fmt.Errorf("%s is valid from %s, but the clock shows %s: set the clock", store.Cert(name),
				pair.Leaf.NotBefore.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime))
		}
		return &pair, nil
	}
	// The key is written first: an interrupted start finds it again.
	if err := ensureKey(store.Key(name)); err != nil {
		return nil, err
	}
	key, err := readKey(store.Key(name))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: fmt.Sprintf("polymesh-%s@%d", name, now.Unix())},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	text, err := signed(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(store.Cert(name), text, 0o644); err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(store.Cert(name), store.Key(name))
	return &pair, err
}
