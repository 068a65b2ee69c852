// Package join lets machines join a cluster as nodes: the paths of the API server with which they do, the decision, and the
// machine's side of it.
//
// A machine has a token (pkg/token) and the address of a server. In the first handshake it compares the server's authority with the
// token's hash; then it sends the names and keys that it wants certified, and gets its certificates and the cluster's settings, or one
// sentence that says why not. From then on the node's own certificate is its only identity. pkg/server adds the component
// "join" and its paths to the API server; pkg/agent calls Join. A machine that becomes a server gets, in place of certificates, what
// the servers share (pkg/bootstrap), which only a server's token opens; pkg/server calls JoinServers. The package owns, on servers,
// <data-dir>/server/node-token, token, cred/bootstrap.key and cluster.json and, on agents, the certificates in <data-dir>/agent/pki and
// <data-dir>/agent/cluster.json.
package join

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/config"
)

// Paths of the API server. Who may call them is decided by RBAC: see pkg/controlplane.
const (
	pathPrefix = "/polymesh/v1/"
	// AgentPath takes a Request and answers with a Grant, or with a Refusal.
	AgentPath = "/polymesh/v1/join/agent"
	// ClusterPath answers a node with the Cluster.
	ClusterPath = "/polymesh/v1/cluster"
	// ServerPath takes a Request of a machine that becomes a server, and answers with a ServerGrant, or with a Refusal.
	ServerPath = "/polymesh/v1/join/server"
	// MemberPath takes a MemberRequest of a server, and answers with the Members of etcd.
	MemberPath = "/polymesh/v1/join/member"
	// SharesPath answers a server with the Shares.
	SharesPath = "/polymesh/v1/shares"
	// LeavePath removes the object of the node that calls it.
	LeavePath = "/polymesh/v1/leave"
	// ReachPath answers a node with a Reach.
	ReachPath = "/polymesh/v1/reach"
)

// Request is what a machine sends.
type Request struct {
	NodeName string     `json:"nodeName"`
	NodeIP   netip.Addr `json:"nodeIP"`
	// ExternalIP is invalid for none.
	ExternalIP netip.Addr `json:"externalIP"`
	// Version is that of the machine's Kubernetes: v1.36.3.
	Version string `json:"version"`
	// Now is the machine's time.
	Now time.Time `json:"now"`
	// ClientCSR and ServingCSR are signing requests in DER form, which prove that the machine has the keys. Only their keys are used.
	// A machine that becomes a server sends none: it gets the authorities.
	ClientCSR  []byte `json:"clientCSR"`
	ServingCSR []byte `json:"servingCSR"`
	// Certificate is the node's own of before, in DER form, expired or not, for the key of ClientCSR. Empty if there is none.
	Certificate []byte `json:"certificate,omitempty"`
}

// Cluster is what a node has to know of its cluster.
type Cluster struct {
	ClusterCIDR   netip.Prefix `json:"clusterCIDR"`
	ServiceCIDR   netip.Prefix `json:"serviceCIDR"`
	ClusterDNS    netip.Addr   `json:"clusterDNS"`
	ClusterDomain string       `json:"clusterDomain"`
	APIServiceIP  netip.Addr   `json:"apiServiceIP"`
	// FlannelBackend, FlannelPort and FlannelExternalIP are those of config.Cluster.
	FlannelBackend    config.FlannelBackend `json:"flannelBackend"`
	FlannelPort       int                   `json:"flannelPort"`
	FlannelExternalIP bool                  `json:"flannelExternalIP,omitempty"`
	// DisableNetworkPolicy leaves NetworkPolicies to another program.
	DisableNetworkPolicy bool `json:"disableNetworkPolicy,omitempty"`
	// EmbeddedRegistry lets nodes give each other images of registries too.
	EmbeddedRegistry bool `json:"embeddedRegistry,omitempty"`
	// KubeletCA is the authority of the kubelets' serving certificates, PEM, by which nodes know each other. Servers add it to their answers.
	KubeletCA string `json:"kubeletCA,omitempty"`
	// StorageDir is the folder of local-path volumes on every node; empty if the cluster has none.
	StorageDir string `json:"storageDir,omitempty"`
	// LoadBalancerPool are the addresses of LoadBalancer services, of which a node may announce some.
	LoadBalancerPool []config.AddressRange `json:"loadBalancerPool,omitempty"`
}

// ClusterOf returns what a node has to know of a server's settings.
func ClusterOf(c *config.Server) Cluster {
	cluster := Cluster{
		ClusterCIDR: c.ClusterCIDR, ServiceCIDR: c.ServiceCIDR, ClusterDNS: c.ClusterDNS, ClusterDomain: c.ClusterDomain, APIServiceIP: c.APIServiceIP(),
		FlannelBackend: c.FlannelBackend, FlannelPort: c.FlannelPort, FlannelExternalIP: c.FlannelExternalIP,
		DisableNetworkPolicy: c.DisableNetworkPolicy, EmbeddedRegistry: c.EmbeddedRegistry, LoadBalancerPool: c.LoadBalancerPool,
	}
	if c.Enabled(config.LocalStorage) {
		cluster.StorageDir = c.DataDir.Storage()
	}
	return cluster
}

// check rejects what no server of ours sends.
func (c Cluster) check() error {
	if !slices.Contains(config.FlannelBackends(), c.FlannelBackend) {
		return fmt.Errorf("the cluster's nodes are connected by %q, which this version does not know: use the servers' version here", c.FlannelBackend)
	}
	if !c.ClusterCIDR.IsValid() || !c.ServiceCIDR.IsValid() || !c.ClusterDNS.IsValid() || !c.APIServiceIP.IsValid() || c.ClusterDomain == "" {
		return fmt.Errorf("the cluster's settings are incomplete: %+v", c)
	}
	for _, r := range c.LoadBalancerPool {
		if !r.From.Is4() || !r.To.Is4() || r.To.Less(r.From) {
			return fmt.Errorf("the cluster's pool of LoadBalancer addresses has the range %s-%s, which is none of IPv4 addresses", r.From, r.To)
		}
	}
	if c.StorageDir != "" && (!filepath.IsAbs(c.StorageDir) || filepath.Clean(c.StorageDir) != c.StorageDir || c.StorageDir == "/") {
		return fmt.Errorf("the cluster's folder of volumes, %q, is not an absolute path", c.StorageDir)
	}
	return nil
}

// Leaving is what a machine sends when it leaves.
type Leaving struct {
	// MachineID is that of /etc/machine-id, by which a machine that was replaced under its name does not remove the new one; empty if
	// there is none.
	MachineID string `json:"machineID,omitempty"`
}

// Grant is the answer to a machine that joins. Certificates and authorities are PEM.
type Grant struct {
	Cluster Cluster `json:"cluster"`
	// ServerCA verifies API servers, ClientCA the clients of the kubelet.
	ServerCA           []byte `json:"serverCA"`
	ClientCA           []byte `json:"clientCA"`
	ClientCertificate  []byte `json:"clientCertificate"`
	ServingCertificate []byte `json:"servingCertificate"`
}

// ServerGrant is the answer to a machine that becomes a server: what the servers share, and its key, both sealed (pkg/bootstrap).
type ServerGrant struct {
	Bundle []byte `json:"bundle"`
	Key    []byte `json:"key"`
}

// MemberRequest is of a server whose member of etcd is about to start for the first time.
type MemberRequest struct {
	NodeName string         `json:"nodeName"`
	Member   bootstrap.Peer `json:"member"`
}

// Members are what a new member of etcd must know of the others.
type Members struct {
	Members []bootstrap.Peer `json:"members"`
}

// Shares is the answer to a server that starts again: what the servers share, sealed by the key that it has.
type Shares struct {
	Bundle []byte `json:"bundle"`
}

// Refusal says in a sentence why a machine cannot join, and what to do.
type Refusal struct {
	// Status is the HTTP status.
	Status  int    `json:"-"`
	Message string `json:"message"`
	// at is the server's time, zero if it did not say.
	at time.Time
}

func (r *Refusal) Error() string { return r.Message }
