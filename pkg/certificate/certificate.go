// Package certificate makes and renews what the control plane trusts: three certificate authorities, the certificates
// that they sign, the key for service-account tokens, and the kubeconfigs that refer to them.
//
// It owns <data-dir>/server/tls and <data-dir>/server/cred. The server calls Ensure at each start and the Renewal
// component calls it again while the server runs. The division in three authorities is the one that Kubernetes
// documents (https://kubernetes.io/docs/setup/best-practices/certificates/).
package certificate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	// renewBefore is how long before its end a certificate is made again; K3s uses 120 days.
	renewBefore = 120 * 24 * time.Hour
	// backdate allows for clocks that differ.
	backdate = time.Hour
)

// Names of the authorities; their files are <name>.crt and <name>.key.
const (
	ServerCA        = "server-ca"
	ClientCA        = "client-ca"
	RequestHeaderCA = "request-header-ca"
)

// Names of the certificates.
const (
	APIServer         = "serving-kube-apiserver"
	KubeletServing    = "serving-kubelet"
	Admin             = "client-admin"
	Polymesh          = "client-polymesh"
	ControllerManager = "client-kube-controller-manager"
	Scheduler         = "client-kube-scheduler"
	Kubelet           = "client-kubelet"
	KubeProxy         = "client-kube-proxy"
	ImagePolicy       = "client-image-policy"
	LoadBalancer      = "client-servicelb"
	APIServerKubelet  = "client-kube-apiserver-kubelet"
	FrontProxy        = "client-front-proxy"
)

// Users of client certificates whose rights are roles of ours (pkg/controlplane). They are in no group: what RBAC does not
// give them they may not do, and what it gives can be taken back, unlike the rights of system:masters.
const (
	ImagePolicyUser      = "system:polymesh:image-policy"
	LoadBalancerUser     = "system:polymesh:servicelb"
	APIServerKubeletUser = "kube-apiserver-kubelet-client" // kubeadm's name for it
)

// Options is what the certificates depend on.
type Options struct {
	Dir      string // for tls
	NodeName string
	NodeIP   netip.Addr
	// SANs are the further names and addresses of the API server, beside those that follow from the cluster.
	SANs          []string
	ServiceIP     netip.Addr // of the `kubernetes` service
	ClusterDomain string
	// Now is the time for which validity is judged.
	Now time.Time
}

// Store is the folder with the certificates.
type Store string

// Cert is the certificate's file.
func (s Store) Cert(name string) string { return filepath.Join(string(s), name+".crt") }

// Key is the private key's file.
func (s Store) Key(name string) string { return filepath.Join(string(s), name+".key") }

// ServiceAccountKey is the file of the key that signs service-account tokens.
func (s Store) ServiceAccountKey() string { return filepath.Join(string(s), "service-account.key") }

// leaf describes one certificate.
type leaf struct {
	name, authority string
	subject         pkix.Name
	usage           x509.ExtKeyUsage
	hosts           []string
}

// leaves lists all certificates with the identities that Kubernetes' RBAC bootstrap policy expects
// (plugin/pkg/auth/authorizer/rbac/bootstrappolicy), and those of our own roles.
func leaves(o Options) []leaf {
	client := func(name, user string, groups ...string) leaf {
		return leaf{name, ClientCA, pkix.Name{CommonName: user, Organization: groups}, x509.ExtKeyUsageClientAuth, nil}
	}
	api := []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + o.ClusterDomain,
		"localhost", "127.0.0.1", "::1", o.ServiceIP.String(), o.NodeName, o.NodeIP.String(),
	}
	return []leaf{
		{APIServer, ServerCA, pkix.Name{CommonName: "kube-apiserver"}, x509.ExtKeyUsageServerAuth, append(api, o.SANs...)},
		{KubeletServing, ServerCA, pkix.Name{CommonName: "system:node:" + o.NodeName, Organization: []string{"system:nodes"}},
			x509.ExtKeyUsageServerAuth, []string{o.NodeName, o.NodeIP.String(), "localhost", "127.0.0.1"}},
		client(Admin, "system:admin", "system:masters"),
		client(Polymesh, "system:polymesh", "system:masters"),
		client(ControllerManager, "system:kube-controller-manager"),
		client(Scheduler, "system:kube-scheduler"),
		client(Kubelet, "system:node:"+o.NodeName, "system:nodes"),
		client(KubeProxy, "system:kube-proxy"),
		client(ImagePolicy, ImagePolicyUser),
		client(LoadBalancer, LoadBalancerUser),
		client(APIServerKubelet, APIServerKubeletUser),
		{FrontProxy, RequestHeaderCA, pkix.Name{CommonName: "system:auth-proxy"}, x509.ExtKeyUsageClientAuth, nil},
	}
}

// Ensure makes what is missing and renews what nears its end or no longer fits (another address, another identity, another authority). It
// returns the names of the certificates that it wrote. An authority is never replaced: a damaged one is an error.
func Ensure(o Options) (written []string, err error) {
	store := Store(o.Dir)
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder for certificates: %w", err)
	}
	if err := ensureKey(store.ServiceAccountKey()); err != nil {
		return nil, fmt.Errorf("service-account key: %w", err)
	}
	authorities := map[string]*tls.Certificate{}
	for _, name := range []string{ServerCA, ClientCA, RequestHeaderCA} {
		if authorities[name], err = ensureAuthority(store, name, o.Now); err != nil {
			return written, fmt.Errorf("certificate authority %s: %w", name, err)
		}
	}
	for _, l := range leaves(o) {
		if fits(store, l, authorities[l.authority], o.Now) {
			continue
		}
		if err := issue(store, l, authorities[l.authority], o.Now); err != nil {
			return written, fmt.Errorf("certificate %s: %w", l.name, err)
		}
		written = append(written, l.name)
	}
	return written, nil
}

// fits reports whether the certificate on disk can stay.
func fits(store Store, l leaf, ca *tls.Certificate, now time.Time) bool {
	pair, err := tls.LoadX509KeyPair(store.Cert(l.name), store.Key(l.name))
	if err != nil {
		return false
	}
	c := pair.Leaf
	// The signature alone is not enough: a chain is built by the issuer's name.
	if !bytes.Equal(c.RawIssuer, ca.Leaf.RawSubject) || c.CheckSignatureFrom(ca.Leaf) != nil || now.Before(c.NotBefore) || now.Add(renewBefore).After(c.NotAfter) {
		return false
	}
	names, ips := split(l.hosts)
	return c.Subject.CommonName == l.subject.CommonName && slices.Equal(c.Subject.Organization, l.subject.Organization) &&
		slices.Equal(c.DNSNames, names) && slices.EqualFunc(c.IPAddresses, ips, net.IP.Equal)
}

func ensureAuthority(store Store, name string, now time.Time) (*tls.Certificate, error) {
	// Only a file that is certainly not there is made: what cannot be read now may be read tomorrow.
	if _, err := os.Stat(store.Cert(name)); !errors.Is(err, fs.ErrNotExist) {
		pair, err := tls.LoadX509KeyPair(store.Cert(name), store.Key(name))
		if err != nil {
			return nil, fmt.Errorf("%w: restore it from a backup, or `polymesh reset` to start over", err)
		}
		if now.After(pair.Leaf.NotAfter) {
			return nil, fmt.Errorf("%s has expired on %s: if the clock is right, `polymesh reset` to start over", store.Cert(name), pair.Leaf.NotAfter.Format(time.DateOnly))
		}
		if now.Before(pair.Leaf.NotBefore) {
			return nil, fmt.Errorf("%s is valid from %s on, and the clock says %s: set the clock", store.Cert(name),
				pair.Leaf.NotBefore.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime))
		}
		return &pair, nil
	}
	// The key is written first: a start that was cut off in between finds it again.
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
	if err := sign(store.Cert(name), template, template, key.Public(), key); err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(store.Cert(name), store.Key(name))
	return &pair, err
}

// issue signs a certificate with a new key. The old pair stays in use until both files are in place; a reader that meets
// them between the two renames tries again, as Kubernetes' reloading clients do.
func issue(store Store, l leaf, ca *tls.Certificate, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	names, ips := split(l.hosts)
	notAfter := now.Add(leafLife)
	if ca.Leaf.NotAfter.Before(notAfter) {
		notAfter = ca.Leaf.NotAfter
	}
	template := &x509.Certificate{
		Subject:     l.subject,
		NotBefore:   now.Add(-backdate),
		NotAfter:    notAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{l.usage},
		DNSNames:    names,
		IPAddresses: ips,
	}
	if err := writeKey(store.Key(l.name), key); err != nil {
		return err
	}
	return sign(store.Cert(l.name), template, ca.Leaf, key.Public(), ca.PrivateKey)
}

func sign(path string, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.PrivateKey) (err error) {
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// split sorts hosts into DNS names and addresses, each once, in a fixed order.
func split(hosts []string) (names []string, ips []net.IP) {
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			if !slices.ContainsFunc(ips, ip.Equal) {
				ips = append(ips, ip)
			}
		} else if h = strings.ToLower(h); !slices.Contains(names, h) {
			names = append(names, h)
		}
	}
	return names, ips
}

func ensureKey(path string) error {
	_, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return writeKey(path, key)
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM key", path)
	}
	return x509.ParseECPrivateKey(block.Bytes)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// MinVersion is the oldest version of TLS that the API server and the kubelet speak, as their flags take it.
const MinVersion = "VersionTLS12"

// CipherSuites are those that the API server and the kubelet take below TLS 1.3, as their flags take them: K3s's, which the
// CIS Kubernetes Benchmark asks for (1.2.29 and 4.2.12). Go's own list has ones with CBC and SHA-1 in it.
func CipherSuites() []string {
	return []string{
		"TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
		"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
	}
}
