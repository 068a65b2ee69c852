// Package controlplane runs kube-apiserver, kube-controller-manager and kube-scheduler inside this process, unmodified,
// through the Run functions that they export.
//
// Their cobra commands cannot be used: each installs a signal handler, and the second one panics. So the options are built,
// the command line is parsed into them, and Run gets our context. The server command builds the three components; each
// is fatal when it ends by itself, because none can be started twice in one process.
package controlplane

import (
	"net"
	"net/netip"
	"strconv"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
)

// Options is what the three components share.
type Options struct {
	Config *config.Server
	// NodeIP is the address that the API server announces unless the configuration names one.
	NodeIP       netip.Addr
	Certificates certificate.Store
	// EtcdEndpoint is the datastore's, as --etcd-servers takes it.
	EtcdEndpoint string
}

// URL is the API server's address for components on this machine.
func URL(cfg *config.Server) string {
	host := "127.0.0.1"
	if !cfg.BindAddress.IsUnspecified() {
		host = cfg.BindAddress.String()
	}
	return "https://" + net.JoinHostPort(host, strconv.Itoa(cfg.HTTPSPort))
}

// Kubeconfig is the file with which the component of this name reaches the API server.
func Kubeconfig(cfg *config.Server, name string) string {
	return cfg.ServerDir("cred", name+".kubeconfig")
}
