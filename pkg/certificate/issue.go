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
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

const (
	leafLife = 365 * 24 * time.Hour
	// renewBefore is how long before its expiry a certificate is renewed; K3s uses 120 days.
	renewBefore = 120 * 24 * time.Hour
	// backdate allows for clock differences.
	backdate = time.Hour
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
	Observe           = "client-observe"
	APIServerKubelet  = "client-kube-apiserver-kubelet"
	FrontProxy        = "client-front-proxy"
	EtcdServing       = "serving-etcd"
	EtcdClient        = "client-etcd"
)

// Users of client certificates whose permissions are our own roles (pkg/controlplane). They are in no group: they can only do
// what RBAC grants them, and that can be revoked, unlike the permissions of system:masters.
const (
	ImagePolicyUser      = "system:polymesh:image-policy"
	LoadBalancerUser     = "system:polymesh:servicelb"
	ObserveUser          = "system:polymesh:observe"
	APIServerKubeletUser = "kube-apiserver-kubelet-client" // kubeadm's name
)

// Options are the inputs for the certificates.
type Options struct {
	Dir      string // for tls
	NodeName string
	NodeIP   netip.Addr
	// External is the node's external address, at which its kubelet may be reached; invalid for none.
	External netip.Addr
	// SANs are additional names and addresses of the API server, besides those that follow from the cluster.
	SANs          []string
	ServiceIP     netip.Addr // of the `kubernetes` service
	ClusterDomain string
	// Observe adds the identity of the store of metrics, logs and traces, which is removed without it.
	Observe bool
	// Now is the time at which validity is judged.
	Now time.Time
}

// leaf describes one certificate.
type leaf struct {
	name, authority string
	subject         pkix.Name
	usage           x509.ExtKeyUsage
	hosts           []string
	// chain adds the authority to the certificate's file, so that the server sends it: a machine that joins compares it with
	// its token.
	chain bool
}

// leaves returns all certificates, with the identities that Kubernetes' RBAC bootstrap policy expects
// (plugin/pkg/auth/authorizer/rbac/bootstrappolicy), and those of our own roles.
func leaves(o Options) []leaf {
	client := func(name, user string, groups ...string) leaf {
		return leaf{name, ClientCA, pkix.Name{CommonName: user, Organization: groups}, x509.ExtKeyUsageClientAuth, nil, false}
	}
	api := []string{
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + o.ClusterDomain,
		"localhost", "127.0.0.1", "::1", o.ServiceIP.String(), o.NodeName, o.NodeIP.String(),
	}
	kubelet := []string{o.NodeName, o.NodeIP.String(), "localhost", "127.0.0.1"}
	if o.External.IsValid() {
		kubelet = append(kubelet, o.External.String())
	}
	all := []leaf{
		{APIServer, ServerCA, pkix.Name{CommonName: "kube-apiserver"}, x509.ExtKeyUsageServerAuth, append(api, o.SANs...), true},
		{KubeletServing, KubeletCA, pkix.Name{CommonName: "system:node:" + o.NodeName, Organization: []string{"system:nodes"}},
			x509.ExtKeyUsageServerAuth, kubelet, false},
		client(Admin, "system:admin", "system:masters"),
		client(Polymesh, "system:polymesh", "system:masters"),
		client(ControllerManager, "system:kube-controller-manager"),
		client(Scheduler, "system:kube-scheduler"),
		client(Kubelet, "system:node:"+o.NodeName, "system:nodes"),
		client(KubeProxy, "system:kube-proxy"),
		client(ImagePolicy, ImagePolicyUser),
		client(LoadBalancer, LoadBalancerUser),
		client(APIServerKubelet, APIServerKubeletUser),
		{FrontProxy, RequestHeaderCA, pkix.Name{CommonName: "system:auth-proxy"}, x509.ExtKeyUsageClientAuth, nil, false},
		{EtcdServing, EtcdCA, pkix.Name{CommonName: "etcd"}, x509.ExtKeyUsageServerAuth, []string{o.NodeName, o.NodeIP.String(), "localhost", "127.0.0.1"}, false},
		{EtcdClient, EtcdCA, pkix.Name{CommonName: "etcd-client"}, x509.ExtKeyUsageClientAuth, nil, false},
	}
	if o.Observe {
		all = append(all, client(Observe, ObserveUser))
	}
	return all
}

// Ensure creates missing authorities and certificates of a server, and renews certificates: see Issue.
func Ensure(o Options) (written []string, err error) {
	authorities, err := EnsureAuthorities(Store(o.Dir), o.Now)
	if err != nil {
		return nil, err
	}
	return authorities.Issue(o)
}

// Issue signs those of a server's certificates that are missing, about to expire, or outdated (another address,
// another identity, another authority). It returns the names of those that it wrote.
func (a *Authorities) Issue(o Options) (written []string, err error) {
	for _, l := range leaves(o) {
		if fits(a.store, l, a.byName[l.authority], o.Now) {
			continue
		}
		if err := issue(a.store, l, a.byName[l.authority], o.Now); err != nil {
			return written, fmt.Errorf("certificate %s: %w", l.name, err)
		}
		written = append(written, l.name)
	}
	if o.Observe {
		return written, nil
	}
	for _, path := range []string{a.store.Key(Observe), a.store.Cert(Observe)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return written, fmt.Errorf("remove the certificate %s: %w", Observe, err)
		}
	}
	return written, nil
}

// fits reports whether the certificate on disk can be kept.
func fits(store Store, l leaf, ca *tls.Certificate, now time.Time) bool {
	pair, err := tls.LoadX509KeyPair(store.Cert(l.name), store.Key(l.name))
	if err != nil {
		return false
	}
	if (len(pair.Certificate) > 1) != l.chain || l.chain && !bytes.Equal(pair.Certificate[1], ca.Leaf.Raw) {
		return false
	}
	c := pair.Leaf
	// The signature alone is not enough: chains are built by the issuer's name.
	if !bytes.Equal(c.RawIssuer, ca.Leaf.RawSubject) || c.CheckSignatureFrom(ca.Leaf) != nil || now.Before(c.NotBefore) || now.Add(renewBefore).After(c.NotAfter) {
		return false
	}
	names, ips := split(l.hosts)
	return c.Subject.CommonName == l.subject.CommonName && slices.Equal(c.Subject.Organization, l.subject.Organization) &&
		slices.Equal(c.DNSNames, names) && slices.EqualFunc(c.IPAddresses, ips, net.IP.Equal)
}

// issue signs a certificate with a new key. The old pair stays in use until both files are in place; a reader that sees
// a mismatch between the two renames retries, as Kubernetes' reloading clients do.
func issue(store Store, l leaf, ca *tls.Certificate, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	names, ips := split(l.hosts)
	t := template(l.subject, l.usage, names, ips, ca.Leaf, now)
	if l.name == Kubelet {
		// As for other nodes: whether it is older than the removal of a node of that name is seen by this time (pkg/join).
		t.NotBefore = now.Add(-NodeBackdate)
	}
	text, err := signed(t, ca.Leaf, key.Public(), ca.PrivateKey)
	if err != nil {
		return err
	}
	if l.chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Leaf.Raw})...)
	}
	if err := writeKey(store.Key(l.name), key); err != nil {
		return err
	}
	return atomicfile.Write(store.Cert(l.name), text, 0o644)
}

// Request is what a node asks to be certified.
type Request struct {
	Public  crypto.PublicKey
	Subject pkix.Name
	Usage   x509.ExtKeyUsage
	// Names and Addresses are those that it serves on. They are apart, so that a name never becomes an address.
	Names     []string
	Addresses []net.IP
}

// The kubelet's certificates, from those of joining on: those that the controller manager signs for it have the same times.
const (
	// NodeLife is short, because what a node that was removed has had ends no earlier by itself.
	NodeLife = 30 * 24 * time.Hour
	// NodeBackdate is upstream's (Backdate in pkg/controller/certificates/signer), so that a certificate says when it was made.
	NodeBackdate = 5 * time.Minute
)

// Sign signs a node's certificate with one of the store's authorities, for NodeLife, and returns it as PEM. The caller has checked
// that the requester may have it.
func (s Store) Sign(authority string, r Request, now time.Time) ([]byte, error) {
	ca, err := tls.LoadX509KeyPair(s.Cert(authority), s.Key(authority))
	if err != nil {
		return nil, fmt.Errorf("certificate authority %s: %w", authority, err)
	}
	t := template(r.Subject, r.Usage, r.Names, r.Addresses, ca.Leaf, now)
	t.NotBefore = now.Add(-NodeBackdate)
	if end := now.Add(NodeLife); end.Before(t.NotAfter) {
		t.NotAfter = end
	}
	return signed(t, ca.Leaf, r.Public, ca.PrivateKey)
}

// template returns a leaf certificate that is not valid longer than its authority.
func template(subject pkix.Name, usage x509.ExtKeyUsage, names []string, ips []net.IP, ca *x509.Certificate, now time.Time) *x509.Certificate {
	notAfter := now.Add(leafLife)
	if ca.NotAfter.Before(notAfter) {
		notAfter = ca.NotAfter
	}
	return &x509.Certificate{
		Subject:     subject,
		NotBefore:   now.Add(-backdate),
		NotAfter:    notAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
		DNSNames:    names,
		IPAddresses: ips,
	}
}

// signed returns the certificate as PEM.
func signed(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.PrivateKey) (text []byte, err error) {
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// split separates hosts into DNS names and addresses, without duplicates, in a fixed order.
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
		return nil, fmt.Errorf("%s does not contain a PEM key", path)
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
