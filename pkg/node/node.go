// Package node runs what makes a machine a node: containerd with the shipped images, the kubelet, kube-proxy and the
// configuration of the pod network.
//
// It owns <data-dir>/agent, the run directory's containerd part and the node's cgroup. It knows nothing of a control plane
// beyond what Options has: pkg/server builds the components from values, and so can what runs a worker.
package node

import (
	"log/slog"
	"net/netip"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/payload"
)

// Options is what the components of a node share.
type Options struct {
	Settings config.Node
	// Name and IP are the node's in the cluster, whether they were given or found.
	Name string
	IP   netip.Addr

	// Of the cluster.
	ClusterCIDR   netip.Prefix
	ClusterDNS    netip.Addr
	ClusterDomain string
	APIServiceIP  netip.Addr

	Identity Identity
	// Programs is where the shipped programs lie, by a path that stays the same over upgrades: running shims call them.
	Programs payload.Dir
	// Manifest names the shipped images.
	Manifest *payload.Manifest
	// Session knows whether the node's files may have lost writes.
	Session *Session
	// Marker and Lock are the data dir's; what the node makes outside of it is marked by them.
	Marker *datadir.Marker
	Lock   *datadir.Lock
	// Nameservers are those for pods.
	Nameservers *Nameservers
	Log         *slog.Logger
}

// Identity holds the files by which the node's parts are known to the cluster, and know it. They need not exist before the
// components start.
type Identity struct {
	// Kubelet is the kubeconfig of the node itself (system:node:NAME), Proxy that of kube-proxy.
	Kubelet, Proxy string
	// Resync is a kubeconfig that may create, list and delete Services in kube-system: see serviceRules.
	Resync string
	// ClientCA is the authority by which the kubelet knows the API server; ServingCert and ServingKey are what it serves with.
	ClientCA, ServingCert, ServingKey string
}
