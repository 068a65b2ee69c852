package servingcert

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/layout"
)

func TestDecide(t *testing.T) {
	node := func(name string, addresses ...string) corev1.Node {
		n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		for _, a := range addresses {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
		return n
	}
	// greedy has written addresses of others into its own object.
	nodes := []corev1.Node{node("server", "192.0.2.1"), node("worker", "192.0.2.2"), node("greedy", "192.0.2.3", "192.0.2.1", "10.43.0.1", "127.0.0.1"), node("young")}
	nodes[3].Status.Addresses = nil
	// Two nodes have joined with 192.0.2.7 after each other, and moved is back there.
	nodes = append(nodes, node("moved", "192.0.2.7"), node("heir", "192.0.2.7"))
	// before had joined with the address that a server has now, and claims it again.
	nodes = append(nodes, node("before", "192.0.2.8"), node("later", "192.0.2.8"))
	nodes[len(nodes)-1].Labels = map[string]string{layout.ServerLabel: "true"}
	joined := map[string]netip.Addr{}
	for name, address := range map[string]string{"server": "192.0.2.1", "worker": "192.0.2.2", "greedy": "192.0.2.3", "moved": "192.0.2.7", "heir": "192.0.2.7", "before": "192.0.2.8"} {
		joined[name] = netip.MustParseAddr(address)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	type request struct {
		user, cn string
		groups   []string
		o        []string
		dns      []string
		ips      []string
		uris     []*url.URL
		usages   []certificatesv1.KeyUsage
		text     []byte
	}
	own := func(name string, ips ...string) request {
		return request{
			user: "system:node:" + name, cn: "system:node:" + name, groups: []string{"system:nodes", "system:authenticated"}, o: []string{"system:nodes"},
			dns: []string{name}, ips: ips, usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth},
		}
	}
	with := func(change func(*request)) request {
		r := own("worker", "192.0.2.2")
		change(&r)
		return r
	}
	for what, c := range map[string]struct {
		request
		want string // of the denial, "approved", or empty for neither
	}{
		"a node's own":                               {own("worker", "192.0.2.2"), "approved"},
		"only its name":                              {own("worker"), "approved"},
		"a node without addresses yet":               {own("young", "192.0.2.9"), ""},
		"a node that is not there":                   {own("gone", "192.0.2.9"), ""},
		"another node's address":                     {own("worker", "192.0.2.2", "192.0.2.1"), "192.0.2.1 is not the node's address"},
		"a server's address, which the node claims":  {own("greedy", "192.0.2.1"), "192.0.2.1 is also the address of node server"},
		"its own address, which another node claims": {own("server", "192.0.2.1"), "approved"},
		"an address with which two nodes joined":     {own("heir", "192.0.2.7"), "192.0.2.7 is also the address of node moved"},
		"a server's address, with which it joined":   {own("before", "192.0.2.8"), "192.0.2.8 is also the address of node later"},
		"a service's address, which the node claims": {own("greedy", "10.43.0.1"), "10.43.0.1 is no address of a node"},
		"loopback, which the node claims":            {own("greedy", "127.0.0.1"), "127.0.0.1 is no address of a node"},
		"another name":                               {with(func(r *request) { r.dns = []string{"worker", "kubernetes"} }), `"kubernetes" is not the node's name`},
		"another node's certificate":                 {with(func(r *request) { r.cn = "system:node:server" }), "not for who requests it"},
		"a user":                                     {with(func(r *request) { r.user, r.cn = "worker", "system:node:worker" }), "only a node"},
		"a user who is called a node":                {with(func(r *request) { r.groups = []string{"system:authenticated"} }), "only a node"},
		"administrators' organization":               {with(func(r *request) { r.o = []string{"system:masters"} }), "not system:nodes"},
		"a URI":                                      {with(func(r *request) { r.uris = []*url.URL{{Scheme: "spiffe", Host: "x"}} }), "URI"},
		"client certificates":                        {with(func(r *request) { r.usages = append(r.usages, certificatesv1.UsageClientAuth) }), "usages"},
		"no PEM":                                     {with(func(r *request) { r.text = []byte("x") }), "no PEM"},
	} {
		template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: c.cn, Organization: c.o}, DNSNames: c.dns, URIs: c.uris}
		for _, ip := range c.ips {
			template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
		if err != nil {
			t.Fatal(err)
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
		if c.text != nil {
			text = c.text
		}
		got := decide(&certificatesv1.CertificateSigningRequest{
			Spec: certificatesv1.CertificateSigningRequestSpec{Username: c.user, Groups: c.groups, Request: text, Usages: c.usages},
		}, nodes, joined, netip.MustParsePrefix("10.43.0.0/16"))
		switch {
		case c.want == "" && got == nil:
		case c.want == "approved" && got != nil && got.Type == certificatesv1.CertificateApproved:
		case c.want != "" && got != nil && got.Type == certificatesv1.CertificateDenied && strings.Contains(got.Message, c.want):
		default:
			t.Errorf("%s: %+v, want %q", what, got, c.want)
		}
	}
}
