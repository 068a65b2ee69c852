// Package node runs the parts that make a machine a node: containerd with the shipped images, the kubelet and kube-proxy. The pod network
// is in pkg/node/network.
//
// It owns <data-dir>/agent, containerd's part of the run directory and the node's cgroup. It knows nothing about a control plane
// beyond Options: pkg/worker builds the components from plain values.
package node

import (
	"log/slog"
	"net/netip"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/payload"
)

// Options are shared by the components of a node.
type Options struct {
	Settings config.Node
	// Name and IP are the node's in the cluster, configured or detected.
	Name string
	IP   netip.Addr

	// Cluster-wide settings.
	ClusterCIDR   netip.Prefix
	ClusterDNS    netip.Addr
	ClusterDomain string
	APIServiceIP  netip.Addr
	// OwnNetwork is set if pkg/node/network provides the pod network. Otherwise the user installs one, in the usual places of CNI.
	OwnNetwork bool
	// StorageDir is the folder of local-path volumes, on all nodes; empty if there are none.
	StorageDir string

	Identity Identity
	// Programs is the folder of the shipped programs, a path that does not change in upgrades: running shims use it.
	Programs payload.Dir
	// Manifest lists the shipped images.
	Manifest *payload.Manifest
	// Session reports whether the node's files may have lost writes.
	Session *Session
	// Marker and Lock are the data dir's; the node's traces outside of it carry their mark.
	Marker *datadir.Marker
	Lock   *datadir.Lock
	// Nameservers are the name servers of pods.
	Nameservers *Nameservers
	Log         *slog.Logger
}

// Identity holds the files with which the node's parts authenticate to the cluster, and verify it. They need not exist before the
// components start.
type Identity struct {
	// Kubelet is the kubeconfig of the node itself (system:node:NAME), Proxy that of kube-proxy.
	Kubelet, Proxy string
	// ClientCA is the authority with which the kubelet verifies its clients; ServingCert and ServingKey are its serving certificate.
	// Without one the kubelet renews its certificates itself, in layout.DataDir.NodePKI.
	ClientCA, ServingCert, ServingKey string
}
