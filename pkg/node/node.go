// Package node runs what makes a machine a node: containerd with the shipped images, the kubelet, kube-proxy and the
// configuration of the pod network.
//
// It owns <data-dir>/agent, the run directory's containerd part and the node's cgroup. The server command builds the
// components; a worker will use the same ones.
package node

import (
	"log/slog"
	"net/netip"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/payload"
)

// Options is what the components of a node share.
type Options struct {
	Config       *config.Server
	Name         string
	IP           netip.Addr
	Certificates certificate.Store
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
