package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
)

// now is when the tests' machines join.
var now = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// cluster is a cluster with the nodes "server" and "worker".
func cluster(t *testing.T) (View, certificate.Store) {
	t.Helper()
	certs := certificate.Store(t.TempDir())
	if _, err := certificate.EnsureAuthorities(certs, now); err != nil {
		t.Fatal(err)
	}
	ca, err := authority(certs, certificate.ClientCA)
	if err != nil {
		t.Fatal(err)
	}
	v := View{Now: now, Version: "v1.36.3+polymesh1", ClientCA: ca, LastHeard: now.Add(-3 * time.Second), Cluster: Cluster{
		ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"),
	}}
	for name, address := range map[string]string{"server": "192.0.2.1", "worker": "192.0.2.2"} {
		v.Nodes = append(v.Nodes, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: address},
		}}})
	}
	return v, certs
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// renewal is a signing request as a kubelet makes it, which every node can read.
func renewal(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:worker", Organization: []string{"system:nodes"}}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// certified returns a client certificate of the cluster for a node and a key, in DER form.
func certified(t *testing.T, certs certificate.Store, user string, key *ecdsa.PrivateKey, at time.Time) []byte {
	t.Helper()
	text, err := certs.Sign(certificate.ClientCA, certificate.Request{
		Public: key.Public(), Subject: pkix.Name{CommonName: user, Organization: []string{"system:nodes"}}, Usage: x509.ExtKeyUsageClientAuth,
	}, at)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	return block.Bytes
}

func TestDecide(t *testing.T) {
	view, certs := cluster(t)
	other, others := cluster(t)
	_ = other
	key, strange := newKey(t), newKey(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	largeKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// Taking the name of a node that exists, with a certificate.
	as := func(user string, held *ecdsa.PrivateKey, from certificate.Store, at time.Time) func(*Request) {
		return func(r *Request) {
			r.NodeName, r.NodeIP, r.Certificate = "worker", netip.MustParseAddr("192.0.2.2"), certified(t, from, user, held, at)
		}
	}
	for what, c := range map[string]struct {
		change func(*Request)
		want   string // of the refusal; empty for none
	}{
		"a new machine":                       {func(*Request) {}, ""},
		"an older machine":                    {func(r *Request) { r.Version = "v1.33.1" }, ""},
		"another patch version":               {func(r *Request) { r.Version = "v1.36.9" }, ""},
		"a newer machine":                     {func(r *Request) { r.Version = "v1.37.0" }, "this machine has Kubernetes v1.37.0, the cluster v1.36.3+polymesh1, and a node must not be newer than the servers: upgrade the servers first"},
		"a much older machine":                {func(r *Request) { r.Version = "v1.32.9" }, "at most"},
		"another major version":               {func(r *Request) { r.Version = "v2.0.0" }, "must not be newer"},
		"no version":                          {func(r *Request) { r.Version = "latest" }, "cannot be read"},
		"a clock that is ahead":               {func(r *Request) { r.Now = now.Add(3 * time.Minute) }, "this machine's clock shows 2026-11-29 12:03:00, the server's 2026-11-29 12:00:00"},
		"a clock that is behind":              {func(r *Request) { r.Now = now.Add(-3 * time.Minute) }, "set the clocks"},
		"a clock that is nearly right":        {func(r *Request) { r.Now = now.Add(-time.Minute) }, ""},
		"a name that is none":                 {func(r *Request) { r.NodeName = "a/../b" }, "cannot be the name of a node"},
		"a name that is an address":           {func(r *Request) { r.NodeName = "192.0.2.2" }, "cannot be the name of a node"},
		"loopback as a name":                  {func(r *Request) { r.NodeName = "127.0.0.1" }, "cannot be the name of a node"},
		"a name that no label can have":       {func(r *Request) { r.NodeName = strings.Repeat("a", 64) }, "cannot be the name of a node"},
		"a kubelet's signing request":         {func(r *Request) { r.ClientCSR = renewal(t, key) }, "is not one for joining"},
		"an address with a zone":              {func(r *Request) { r.NodeIP = netip.MustParseAddr("2001:db8::5%x") }, "cannot be the address of a node"},
		"another curve":                       {func(r *Request) { r.ServingCSR = csr(t, largeKey) }, "another kind than ECDSA with P-256"},
		"no name":                             {func(r *Request) { r.NodeName = "" }, "cannot be the name of a node"},
		"the name of a node":                  {func(r *Request) { r.NodeName = "worker" }, "the cluster has a node worker already, at 192.0.2.2, which was last heard of 3s ago: give this machine another name with --node-name"},
		"the name of the server":              {func(r *Request) { r.NodeName = "server" }, "the cluster has a node server already"},
		"the node itself":                     {as("system:node:worker", key, certs, now.Add(-time.Hour)), ""},
		"the node itself after years":         {as("system:node:worker", key, certs, now.AddDate(-9, 0, 0)), ""},
		"the node's certificate without key":  {as("system:node:worker", strange, certs, now), "has a node worker already"},
		"another node's certificate":          {as("system:node:other", key, certs, now), "has a node worker already"},
		"an administrator's certificate":      {as("system:admin", key, certs, now), "has a node worker already"},
		"a certificate of another cluster":    {as("system:node:worker", key, others, now), "has a node worker already"},
		"a certificate that is none":          {func(r *Request) { r.NodeName, r.Certificate = "worker", []byte("x") }, "has a node worker already"},
		"the address of a node":               {func(r *Request) { r.NodeIP = netip.MustParseAddr("192.0.2.1") }, "node server has the address 192.0.2.1 already"},
		"the address of a node, mapped":       {func(r *Request) { r.NodeIP = netip.MustParseAddr("::ffff:192.0.2.1") }, "cannot be the address of a node"},
		"an external address of another node": {func(r *Request) { r.ExternalIP = netip.MustParseAddr("192.0.2.2") }, "node worker has the address 192.0.2.2 already"},
		"broadcast":                           {func(r *Request) { r.NodeIP = netip.MustParseAddr("255.255.255.255") }, "cannot be the address of a node"},
		"loopback":                            {func(r *Request) { r.NodeIP = netip.MustParseAddr("127.0.0.1") }, "cannot be the address of a node"},
		"an address of a service":             {func(r *Request) { r.NodeIP = netip.MustParseAddr("10.43.0.1") }, "cannot be the address of a node"},
		"an address of a pod":                 {func(r *Request) { r.NodeIP = netip.MustParseAddr("10.42.0.1") }, "cannot be the address of a node"},
		"no address":                          {func(r *Request) { r.NodeIP = netip.Addr{} }, "names no address"},
		"no signing request":                  {func(r *Request) { r.ClientCSR = nil }, "damaged"},
		"a signing request of another's key":  {func(r *Request) { r.ServingCSR = append(r.ServingCSR[:len(r.ServingCSR)-1:len(r.ServingCSR)-1], 0) }, "damaged"},
		"a key of another kind":               {func(r *Request) { r.ClientCSR = csr(t, rsaKey) }, "another kind than ECDSA"},
	} {
		serving := newKey(t)
		r := Request{
			NodeName: "new", NodeIP: netip.MustParseAddr("192.0.2.3"), Version: "v1.36.3+polymesh1", Now: now,
			ClientCSR: csr(t, key), ServingCSR: csr(t, serving),
		}
		c.change(&r)
		keys, refused := Decide(r, view)
		switch {
		case c.want == "" && refused != nil:
			t.Errorf("%s is refused: %s", what, refused.Message)
		case c.want == "" && (!keys.Client.Equal(key.Public()) || !keys.Serving.Equal(serving.Public())):
			t.Errorf("%s: other keys are certified", what)
		case c.want != "" && (refused == nil || !strings.Contains(refused.Message, c.want)):
			t.Errorf("%s: refused with %v, want %q", what, refused, c.want)
		case refused != nil && strings.Contains(refused.Message, "\n"):
			t.Errorf("%s: the refusal has several lines: %q", what, refused.Message)
		}
	}
}

// A folder of volumes that a server would never send is not created here.
func TestClusterCheck(t *testing.T) {
	c := Cluster{
		ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"), ClusterDNS: netip.MustParseAddr("10.43.0.10"),
		ClusterDomain: "cluster.local", APIServiceIP: netip.MustParseAddr("10.43.0.1"), FlannelBackend: config.FlannelBackends()[0],
	}
	for dir, ok := range map[string]bool{"": true, "/var/lib/polymesh/storage": true, "storage": false, "/": false, "/var/lib/../../etc": false, "/var/lib/": false} {
		c.StorageDir = dir
		if err := c.check(); (err == nil) != ok {
			t.Errorf("%q: %v", dir, err)
		}
	}
}
