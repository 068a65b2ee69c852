package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientcertificate "k8s.io/client-go/util/certificate"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
)

// Membership is what a node has from joining: its files, and the cluster's settings.
type Membership struct {
	Cluster Cluster
	Files   Files
}

// Files are the node's files, which the kubelet renews.
type Files struct{ ServerCA, ClientCA, Client, Serving string }

func files(dir layout.DataDir) Files {
	pki := func(name string) string { return filepath.Join(dir.NodePKI(), name) }
	return Files{ServerCA: pki("server-ca.crt"), ClientCA: pki("client-ca.crt"), Client: pki("kubelet-client-current.pem"), Serving: pki("kubelet-server-current.pem")}
}

// previous is what the machine has of an earlier time.
type previous struct {
	valid bool
	// ca is the cluster's authority, nil before the first time; certificate is the node's own, in DER form.
	ca          *x509.Certificate
	certificate []byte
	key         *ecdsa.PrivateKey
}

func (m Machine) membership(f Files, now time.Time) (previous, error) {
	var p previous
	text, err := os.ReadFile(f.ServerCA)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	if p.ca, err = certificate.ParseAuthority(text); err != nil {
		return p, fmt.Errorf("%s is damaged: %w: restore it, or `polymesh reset` to join again", f.ServerCA, err)
	}
	for _, file := range []string{f.Client, f.Serving} {
		if err := recoverPair(file); err != nil {
			return p, fmt.Errorf("recover the certificate %s: %w", file, err)
		}
	}
	pair, err := tls.LoadX509KeyPair(f.Client, f.Client)
	if err != nil {
		return p, nil // interrupted before it was there, or damaged: a new one is asked for
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || pair.Leaf.Subject.CommonName != User(m.NodeName) {
		if ok {
			m.Log.Warn("this machine was another node of the cluster, whose object stays: remove it with `polymesh node remove`", "node", pair.Leaf.Subject.CommonName)
		}
		return p, nil
	}
	p.certificate, p.key = pair.Certificate[0], key
	p.valid = now.Before(pair.Leaf.NotAfter)
	return p, nil
}

// recoverPair completes a renewal that a crash has interrupted. The store removes its link to the certificate in use before it makes the
// new one, and syncs neither.
func recoverPair(current string) error {
	prefix := strings.TrimSuffix(filepath.Base(current), "-current.pem")
	store, err := clientcertificate.NewFileStore(prefix, filepath.Dir(current), filepath.Dir(current), "", "") // finds a link that is only to be renamed
	if err != nil {
		return err
	}
	if _, err := tls.LoadX509KeyPair(current, current); err == nil {
		return nil
	}
	// Their names have the time.
	made, err := filepath.Glob(filepath.Join(filepath.Dir(current), prefix+"-[0-9]*.pem"))
	if err != nil {
		return err
	}
	for _, file := range slices.Backward(made) {
		if _, err := tls.LoadX509KeyPair(file, file); err != nil {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		cert, key := splitPair(text)
		_, err = store.Update(cert, key)
		return err
	}
	return nil
}

// splitPair separates the certificates of a file from their key.
func splitPair(text []byte) (certs, key []byte) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			certs = append(certs, pem.EncodeToMemory(block)...)
		} else {
			key = append(key, pem.EncodeToMemory(block)...)
		}
	}
	return certs, key
}

// key returns a key for joining, the same again after an interruption: the cluster keeps the name for it.
func (m Machine) key(name string, have *ecdsa.PrivateKey) (*ecdsa.PrivateKey, error) {
	path := m.keyFile(name)
	if have != nil {
		return have, os.RemoveAll(path)
	}
	if text, err := os.ReadFile(path); err == nil {
		if key, err := keyutil.ParsePrivateKeyPEM(text); err == nil {
			if key, ok := key.(*ecdsa.PrivateKey); ok {
				return key, nil
			}
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return nil, err
	}
	return key, atomicfile.Write(path, text, 0o600)
}

func (m Machine) keyFile(name string) string {
	return filepath.Join(m.DataDir.NodePKI(), "join-"+name+".key")
}

// keep writes what the cluster granted. The certificates go where the kubelet keeps those that it renews; the authority, without
// which there is no membership, is written last.
func (m Machine) keep(f Files, g *Grant, client, serving *ecdsa.PrivateKey) error {
	for _, pair := range []struct {
		store string
		cert  []byte
		key   *ecdsa.PrivateKey
	}{{"kubelet-client", g.ClientCertificate, client}, {"kubelet-server", g.ServingCertificate, serving}} {
		key, err := keyutil.MarshalPrivateKeyToPEM(pair.key)
		if err != nil {
			return err
		}
		store, err := clientcertificate.NewFileStore(pair.store, m.DataDir.NodePKI(), m.DataDir.NodePKI(), "", "")
		if err != nil {
			return err
		}
		if _, err := store.Update(pair.cert, key); err != nil {
			return fmt.Errorf("keep the node's certificate in %s: %w", pair.store, err)
		}
	}
	if err := m.write(g.Cluster); err != nil {
		return err
	}
	if err := atomicfile.Write(f.ClientCA, g.ClientCA, 0o644); err != nil {
		return err
	}
	if err := atomicfile.Write(f.ServerCA, g.ServerCA, 0o644); err != nil {
		return err
	}
	for _, name := range []string{"client", "serving"} {
		if err := os.RemoveAll(m.keyFile(name)); err != nil {
			return err
		}
	}
	return nil
}

// membership is the file with what an agent knows of its cluster.
type membership struct {
	NodeName string  `json:"nodeName"`
	Server   string  `json:"server"`
	Cluster  Cluster `json:"cluster"`
}

func (m Machine) write(c Cluster) error {
	text, err := json.MarshalIndent(membership{m.NodeName, m.Server, c}, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(m.DataDir.Membership(), append(text, '\n'), 0o600)
}

func readMembership(dir layout.DataDir) (*membership, error) {
	text, err := os.ReadFile(dir.Membership())
	if err != nil {
		return nil, err
	}
	var m membership
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("read %s: %w", dir.Membership(), err)
	}
	return &m, nil
}

// Member returns the name of the node that a machine is, and the server by which it joined. ok is false if it has not joined a cluster.
func Member(dir layout.DataDir) (node, server string, ok bool) {
	if _, err := os.Stat(files(dir).ServerCA); err != nil {
		return "", "", false
	}
	m, err := readMembership(dir)
	if err != nil {
		return "", "", false
	}
	return m.NodeName, m.Server, true
}
