package server

import (
	"net/netip"
	"path/filepath"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/addon"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/controlplane/imagepolicy"
	"polymesh.dev/polymesh/pkg/controlplane/loadbalancer"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/mesh/install"
	"polymesh.dev/polymesh/pkg/node"
)

// addComponents is the server: what it consists of, and what each part waits for.
func (s *server) addComponents(m *component.Manager) {
	certs := certificate.Store(s.cfg.ServerDir("tls"))
	db := datastore.New(datastore.Options{
		Dir: s.cfg.ServerDir("db"), Socket: config.DatastoreSocket(s.cfg.DataDir), Sync: s.cfg.DatastoreSync,
	})
	plane := controlplane.Options{Config: s.cfg, NodeIP: s.ip, Certificates: certs, EtcdEndpoint: db.Endpoint()}
	machine := node.Options{
		Config: s.cfg, Name: s.name, IP: s.ip, Certificates: certs,
		Programs: s.programs, Manifest: s.manifest, Session: node.NewSession(s.cfg), Marker: s.marker, Lock: s.lock,
		Nameservers: node.NewNameservers(s.cfg, s.log), Log: s.log,
	}
	kubeconfig := controlplane.Kubeconfig(s.cfg, "polymesh")

	m.Add(s.renewal)
	m.Add(db)
	m.Add(node.NewContainerd(machine))
	m.Add(node.NewImages(machine), "containerd")
	m.Add(controlplane.NewAPIServer(plane), "certificates", "datastore")
	// Where the user gives the API server another configuration, with a KMS say, Secrets are written with keys that are not ours.
	if !kubeflags.Sets(s.cfg.APIServerArgs, "encryption-provider-config") {
		m.Add(encryption.New(encryption.Cluster{
			File: config.EncryptionFile(s.cfg.DataDir), Kubeconfig: kubeconfig, Datastore: db.Endpoint(),
		}, s.log), "kube-apiserver")
	}
	m.Add(controlplane.NewControllerManager(plane), "kube-apiserver")
	m.Add(controlplane.NewScheduler(plane), "kube-apiserver")
	m.Add(node.NewKubelet(machine), "kube-apiserver", "images", "kube-controller-manager")
	m.Add(node.NewProxy(machine), "kube-apiserver")
	m.Add(node.NewNetwork(machine), "kube-apiserver", "kube-controller-manager")
	m.Add(imagepolicy.New(imagepolicy.Options{
		Keys: s.cfg.ImagePolicyKeys, Kubeconfig: controlplane.Kubeconfig(s.cfg, "image-policy"), Certificates: certs,
		Open: func() (imagepolicy.Node, error) {
			return imagestore.OpenSignatures(config.ContainerdSocket(s.cfg.DataDir))
		},
		RegistryDir: config.RegistryDir(s.cfg.DataDir), Log: s.log,
	}), "kube-apiserver", "images")
	for _, name := range []config.Addon{config.CoreDNS, config.MetricsServer, config.LocalStorage, config.NetworkPolicy} {
		m.Add(s.addon(name, kubeconfig, machine.Nameservers), "kube-apiserver")
	}
	if s.cfg.Enabled(config.ServiceLB) {
		m.Add(loadbalancer.New(loadbalancer.Options{
			Kubeconfig: controlplane.Kubeconfig(s.cfg, "servicelb"), NodeName: s.name, Addresses: s.addresses(), LinkAlias: s.marker.Alias(),
			Reserved: loadbalancer.ReservedPorts(s.cfg.HTTPSPort), Pool: s.cfg.LoadBalancerPool, Log: s.log,
		}), "kube-apiserver")
	}
	if s.cfg.Enabled(config.Istio) {
		m.Add(install.New(install.Options{
			Kubeconfig: kubeconfig, Profile: s.cfg.MeshProfile, ClusterDomain: s.cfg.ClusterDomain,
			GatewayAPI: s.programs.Path("manifests/gateway-api.yaml"), Log: s.log,
		}), "kube-apiserver")
	}
}

// addon is one of the add-ons; a disabled one is added too, to be removed where it was installed before.
func (s *server) addon(name config.Addon, kubeconfig string, names *node.Nameservers) component.Component {
	return addon.New(addon.Options{
		Name: name, Disabled: !s.cfg.Enabled(name), Kubeconfig: kubeconfig, Image: s.manifest.Image,
		ClusterDNS: s.cfg.ClusterDNS, ClusterDomain: s.cfg.ClusterDomain, Nameservers: names.Servers,
		NodeName: s.name, NodeAddress: s.ip, StorageDir: filepath.Join(s.cfg.DataDir, "storage"), Log: s.log,
	})
}

// addresses are those under which LoadBalancer services are reached, the outer one first.
func (s *server) addresses() []netip.Addr {
	if s.cfg.ExternalIP.IsValid() && s.cfg.ExternalIP != s.ip {
		return []netip.Addr{s.cfg.ExternalIP, s.ip}
	}
	return []netip.Addr{s.ip}
}
