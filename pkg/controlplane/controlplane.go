// Package controlplane runs kube-apiserver, kube-controller-manager and kube-scheduler inside this process, unmodified,
// through the Run functions that they export.
//
// Their cobra commands cannot be used: each installs a signal handler, and the second one panics. So the options are built,
// the command line is parsed into them, and Run gets our context. The server command builds the three components; if one
// ends by itself the process exits, because none can be started twice in one process. Where several servers share a datastore, the
// controller manager and the scheduler are child processes instead (Program).
package controlplane

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/layout"
)

// Options are shared by the three components.
type Options struct {
	Config *config.Server
	// Node is the name of this server's node.
	Node string
	// ServerID is the id of this server's data dir (bootstrap.EnsureID); empty where servers do not find each other in the datastore.
	ServerID string
	// NodeIP is the address that the API server advertises unless the configuration sets one.
	NodeIP       netip.Addr
	Certificates certificate.Store
	// Datastore is the API server's datastore endpoint.
	Datastore datastore.Endpoint
	// KeyReload is how often the API server checks the keys of Secrets; 0 for the default of encryption.Place.
	KeyReload time.Duration
	// Handlers are further paths of the API server, which authenticates and authorizes their callers (RBAC's nonResourceURLs). One that
	// ends in a slash has all paths below it, whose requests have no time limit.
	Handlers map[string]http.Handler
	// Authenticator is put around the API server's own; nil for none.
	Authenticator func(authenticator.Request) authenticator.Request
	// Observe is set if the cluster has a store of metrics, logs and traces, and roles for it.
	Observe bool
	// Filter is put around all handlers of the API server, before it authenticates; nil for none.
	Filter func(http.Handler) http.Handler
}

// Self is this server for the others.
func (o Options) Self() encryption.Self {
	self := encryption.Self{Name: o.Node, Address: o.NodeIP, Version: version.Get().GitVersion, ID: o.ServerID}
	if o.Config.AdvertiseAddress.IsValid() {
		self.Address = o.Config.AdvertiseAddress
	}
	return self
}

// Keys is where the keys of Secrets are.
func (o Options) Keys() encryption.Place {
	dir := o.Config.DataDir
	return encryption.Place{File: dir.EncryptionFile(), Datastore: o.Datastore, BootstrapKey: dir.BootstrapKey(), Reload: o.KeyReload}
}

// Provider is how Secrets are to be encrypted, empty for no change.
func (o Options) Provider() string {
	if o.Config.SecretsEncryption {
		return o.Config.EncryptionProvider
	}
	return ""
}

// URL returns the API server's address for components on this machine.
func URL(cfg *config.Server) string {
	address := netip.AddrPortFrom(cfg.BindAddress, uint16(cfg.HTTPSPort))
	if cfg.BindAddress.IsUnspecified() {
		address = layout.Loopback(cfg.HTTPSPort)
	}
	return "https://" + address.String()
}

// WriteKubeconfigs writes the data dir's kubeconfigs, readable only by root: one for each component with its own
// identity. The other parts of the server use "polymesh". node is the API server's address for the node's parts, which can use other
// servers' too. observe adds the store's, which is removed without it.
func WriteKubeconfigs(cfg *config.Server, certs certificate.Store, node string, observe bool) error {
	kubeconfigs := map[string]string{
		"polymesh":                certificate.Polymesh,
		"kube-controller-manager": certificate.ControllerManager,
		"kube-scheduler":          certificate.Scheduler,
		"kubelet":                 certificate.Kubelet,
		"kube-proxy":              certificate.KubeProxy,
		"image-policy":            certificate.ImagePolicy,
		"servicelb":               certificate.LoadBalancer,
	}
	if observe {
		kubeconfigs["observe"] = certificate.Observe
	} else if err := os.Remove(cfg.DataDir.Kubeconfig("observe")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the kubeconfig of the store: %w", err)
	}
	for name, cert := range kubeconfigs {
		url := URL(cfg)
		if cert == certificate.Kubelet || cert == certificate.KubeProxy {
			url = node
		}
		if err := certs.WriteKubeconfig(cfg.DataDir.Kubeconfig(name), cert, url); err != nil {
			return err
		}
	}
	return nil
}
