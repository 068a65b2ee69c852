package join

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	utilversion "k8s.io/apimachinery/pkg/util/version"

	"polymesh.dev/polymesh/pkg/config"
)

// MaxSkew is how far a machine's clock may be off: certificates begin an hour before they are made, but logs, leases and
// traces of a cluster are compared by time.
const MaxSkew = 2 * time.Minute

// OlderMinors is how many minor versions a kubelet may be older than the API server
// (https://kubernetes.io/releases/version-skew-policy/#kubelet).
const OlderMinors = 3

// View is what a server knows when a machine wants to join.
type View struct {
	Now time.Time
	// Version is the API server's.
	Version  string
	Cluster  Cluster
	ClientCA *x509.Certificate
	// Nodes are those of the cluster; LastHeard is when the one of the machine's name has renewed its lease.
	Nodes     []corev1.Node
	LastHeard time.Time
	// Record is that of the machine's name, nil if there is none.
	Record *machineRecord
}

// Keys are the keys of a Request whose possession is proven.
type Keys struct{ Client, Serving *ecdsa.PublicKey }

// Decide returns the keys to certify, or why the machine cannot join.
func Decide(r Request, v View) (Keys, *Refusal) {
	if refused := skew(r.Version, v.Version); refused != nil {
		return Keys{}, refused
	}
	if refused := clockAndName(r, v); refused != nil {
		return Keys{}, refused
	}
	keys, refused := proven(r)
	if refused != nil {
		return Keys{}, refused
	}
	if refused := addresses(r, v); refused != nil {
		return Keys{}, refused
	}
	for _, n := range v.Nodes {
		if n.Name == r.NodeName && !own(r, v, keys) {
			return Keys{}, taken(&n, v)
		}
	}
	return keys, nil
}

// DecideServer returns why a machine cannot become a server; nil if it can. Whether its name is free is for its record.
func DecideServer(r Request, v View) *Refusal {
	if refused := serverSkew(r.Version, v.Version); refused != nil {
		return refused
	}
	if refused := clockAndName(r, v); refused != nil {
		return refused
	}
	if refused := addresses(r, v); refused != nil {
		return refused
	}
	for _, n := range v.Nodes {
		if n.Name == r.NodeName {
			return taken(&n, v)
		}
	}
	return nil
}

// ServerVersion returns why a machine with this version of Kubernetes cannot become a server; nil if it can.
func ServerVersion(machine, cluster string) error {
	if refused := serverSkew(machine, cluster); refused != nil {
		return refused
	}
	return nil
}

// Clock returns why a machine whose clock shows this time cannot join; nil if it can.
func Clock(machine, cluster time.Time) error {
	if refused := clock(machine, cluster); refused != nil {
		return refused
	}
	return nil
}

func clock(machine, cluster time.Time) *Refusal {
	if machine.Sub(cluster).Abs() > MaxSkew {
		return refuse(http.StatusConflict, "this machine's clock shows %s, the server's %s: set the clocks, for example with chrony or systemd-timesyncd",
			machine.UTC().Format(time.DateTime), cluster.UTC().Format(time.DateTime))
	}
	return nil
}

func clockAndName(r Request, v View) *Refusal {
	if refused := clock(r.Now, v.Now); refused != nil {
		return refused
	}
	// A node's name is also in its certificate, and in a label.
	if !config.ValidNodeName(r.NodeName) || len(r.NodeName) > validation.LabelValueMaxLength || net.ParseIP(r.NodeName) != nil {
		return refuse(http.StatusBadRequest, "%.100q cannot be the name of a node: set one with --node-name", r.NodeName)
	}
	return nil
}

func refuse(status int, format string, args ...any) *Refusal {
	return &Refusal{Status: status, Message: fmt.Sprintf(format, args...)}
}

func versions(machine, cluster string) (m, c *utilversion.Version, refused *Refusal) {
	c, err := utilversion.ParseSemantic(cluster)
	if err != nil {
		return nil, nil, refuse(http.StatusInternalServerError, "the server's own version %q cannot be read: %v", cluster, err)
	}
	if m, err = utilversion.ParseSemantic(machine); err != nil {
		return nil, nil, refuse(http.StatusBadRequest, "this machine's version %.50q cannot be read", machine)
	}
	return m, c, nil
}

// serverSkew: API servers may be one minor version apart while they are upgraded. A new one has no reason to be another than the rest
// (https://kubernetes.io/releases/version-skew-policy/#kube-apiserver).
func serverSkew(machine, cluster string) *Refusal {
	m, c, refused := versions(machine, cluster)
	if refused == nil && (m.Major() != c.Major() || m.Minor() != c.Minor()) {
		return refuse(http.StatusConflict, "this machine has Kubernetes %s, the cluster %s, and servers must have the same minor version: use the cluster's version here, and upgrade all servers afterwards", machine, cluster)
	}
	return refused
}

func skew(machine, cluster string) *Refusal {
	m, c, refused := versions(machine, cluster)
	if refused != nil {
		return refused
	}
	switch {
	case m.Major() != c.Major() || m.Minor() > c.Minor():
		return refuse(http.StatusConflict, "this machine has Kubernetes %s, the cluster %s, and a node must not be newer than the servers: upgrade the servers first, or use the cluster's version here", machine, cluster)
	case m.Minor()+OlderMinors < c.Minor():
		return refuse(http.StatusConflict, "this machine has Kubernetes %s, the cluster %s, and a node may be %d minor versions older at most: use the cluster's version here", machine, cluster, OlderMinors)
	}
	return nil
}

// proven checks the signing requests' signatures.
func proven(r Request) (Keys, *Refusal) {
	var keys Keys
	for _, k := range []struct {
		der []byte
		to  **ecdsa.PublicKey
	}{{r.ClientCSR, &keys.Client}, {r.ServingCSR, &keys.Serving}} {
		csr, err := x509.ParseCertificateRequest(k.der)
		if err != nil {
			return Keys{}, refuse(http.StatusBadRequest, "a signing request of this machine is damaged: %v", err)
		}
		// Before the signature: that of a huge RSA key would take a second.
		key, ok := csr.PublicKey.(*ecdsa.PublicKey)
		if !ok || key.Curve != elliptic.P256() {
			return Keys{}, refuse(http.StatusBadRequest, "a signing request of this machine has a key of another kind than ECDSA with P-256")
		}
		if err := csr.CheckSignature(); err != nil {
			return Keys{}, refuse(http.StatusBadRequest, "a signing request of this machine is damaged: %v", err)
		}
		// Nodes can read the requests with which others' kubelets renew their certificates. Those have a subject.
		if len(csr.Subject.Names) > 0 {
			return Keys{}, refuse(http.StatusBadRequest, "a signing request of this machine is not one for joining")
		}
		*k.to = key
	}
	return keys, nil
}

// addresses rejects those that a node's serving certificate must not have, because they are another node's or the cluster's.
func addresses(r Request, v View) *Refusal {
	for i, a := range []netip.Addr{r.NodeIP, r.ExternalIP} {
		if !a.IsValid() {
			continue
		}
		flag := []string{"--node-ip", "--node-external-ip"}[i]
		if a != a.Unmap() || a.Zone() != "" || !a.IsGlobalUnicast() || v.Cluster.ServiceCIDR.Contains(a) || v.Cluster.ClusterCIDR.Contains(a) {
			return refuse(http.StatusBadRequest, "%s cannot be the address of a node: set the machine's own with %s", a, flag)
		}
		for _, n := range v.Nodes {
			if n.Name == r.NodeName {
				continue
			}
			for _, have := range n.Status.Addresses {
				if b, err := netip.ParseAddr(have.Address); err == nil && b.Unmap() == a {
					return refuse(http.StatusConflict, "node %s has the address %s already: set another with %s, or remove that node with `polymesh node remove %s`, if it no longer exists", n.Name, a, flag, n.Name)
				}
			}
		}
	}
	if !r.NodeIP.IsValid() {
		return refuse(http.StatusBadRequest, "the request names no address of the node")
	}
	return nil
}

// own reports whether a machine proves by a certificate of before that it is the node. The certificate may have expired: a
// machine that was off for a long time has the same key. That of a node which was removed proves nothing.
func own(r Request, v View, keys Keys) bool {
	ca := v.ClientCA
	cert, err := x509.ParseCertificate(r.Certificate)
	if err != nil || v.Record != nil && v.Record.void(cert) {
		return false
	}
	return keys.Client.Equal(cert.PublicKey) && cert.Subject.CommonName == User(r.NodeName) &&
		bytes.Equal(cert.RawIssuer, ca.RawSubject) && cert.CheckSignatureFrom(ca) == nil
}

// User is the name of a node's identity.
func User(node string) string { return "system:node:" + node }

// taken names the node that has the name.
func taken(n *corev1.Node, v View) *Refusal {
	where := ""
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			where = ", at " + a.Address
		}
	}
	heard := "has not reported yet"
	if !v.LastHeard.IsZero() {
		heard = "was last heard of " + v.Now.Sub(v.LastHeard).Round(time.Second).String() + " ago"
	}
	return refuse(http.StatusConflict, "the cluster has a node %s already%s, which %s: give this machine another name with --node-name, or, if that node no longer exists, remove it with `polymesh node remove %s` on a server", n.Name, where, heard, n.Name)
}
