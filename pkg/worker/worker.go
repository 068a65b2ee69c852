// Package worker is the part of a node that every server and every agent has: what runs pods, and connects them to those of other
// nodes.
//
// It builds the components of pkg/node from the node's own settings, those of its cluster, and its identity in it. pkg/server and
// pkg/agent call New, and put the components into their lists.
package worker

import (
	"net/netip"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/node/announce"
	"polymesh.dev/polymesh/pkg/node/apilb"
	"polymesh.dev/polymesh/pkg/node/external"
	"polymesh.dev/polymesh/pkg/node/netpol"
	"polymesh.dev/polymesh/pkg/node/network"
	"polymesh.dev/polymesh/pkg/node/registry"
	"polymesh.dev/polymesh/pkg/process"
)

// Options are what one node does not share with the others, and its cluster's settings.
type Options struct {
	Process  *process.Process
	Settings config.Node
	Cluster  join.Cluster
	Identity Identity
	// Server is the server by which the node joined, HOST:PORT; empty if there is none. Own is the API server of this node, under the
	// address that it advertises; invalid if there is none.
	Server string
	Own    netip.AddrPort
}

// Identity holds the files by which the node and its cluster know each other. They need not exist before the components start.
type Identity struct {
	// Kubelet is the kubeconfig of the node itself (system:node:NAME), Proxy that of kube-proxy.
	Kubelet, Proxy string
	// ServerCA is the authority of the API servers, ClientCA that of the cluster's clients.
	ServerCA, ClientCA string
	// Client is the node's certificate as a client, Serving the one of what listens here.
	Client, Serving Pair
	// RenewedHere is set if the kubelet renews both, in layout.DataDir.NodePKI.
	RenewedHere bool
	// KubeletCA returns the authority of the nodes' serving certificates, PEM.
	KubeletCA func() ([]byte, error)
}

// Pair names the PEM files of a certificate and its key, which may be one.
type Pair struct{ Cert, Key string }

// BalancerURL is where the node's parts reach an API server, on a node with api-balancer.
func BalancerURL() string { return "https://" + balancerAddress().String() }

func balancerAddress() netip.AddrPort { return layout.Loopback(layout.APIBalancerPort) }

// Components are a node's, not yet started.
type Components struct {
	// Balancer is only needed if the API server of this node is not the only one.
	Balancer   *apilb.Balancer
	Containerd component.Component
	Images     component.Component
	Registry   *registry.Registry
	// NetworkPolicy has to be ready before the kubelet starts: no pod starts before its policies are in force.
	NetworkPolicy component.Component
	// Kubelet waits itself for the images that every pod needs.
	Kubelet       component.Component
	Proxy         component.Component
	PoolAddresses component.Component
	PodNetwork    component.Component
	// ExternalAddress is nil if the node has none to announce.
	ExternalAddress component.Component

	// Nameservers are the name servers of pods.
	Nameservers *node.Nameservers
}

// New returns the components of a node.
func New(o Options) Components {
	machine := o.node()
	images := node.NewImages(machine)
	kubelet := node.NewKubelet(machine, images)
	pulls := o.registry()
	pulls.Await, pulls.EvictsBelow = images.Await, kubelet.EvictsBelow
	var announced component.Component
	if address, ok := external.Of(o.Settings, o.Process.IP); ok {
		announced = external.New(external.Options{Node: o.Process.Name, IP: o.Process.IP, External: address, Kubeconfig: o.Identity.Kubelet, Log: o.Process.Log})
	}
	return Components{
		ExternalAddress: announced,
		Balancer:        apilb.New(o.balancer()),
		Containerd:      node.NewContainerd(machine),
		Images:          images,
		Registry:        registry.New(pulls),
		NetworkPolicy:   netpol.New(o.policies()),
		Kubelet:         kubelet,
		Proxy:           node.NewProxy(machine),
		PoolAddresses:   announce.New(o.pool()),
		PodNetwork:      network.New(o.network()),
		Nameservers:     machine.Nameservers,
	}
}

// node returns the options of what runs pods.
func (o Options) node() node.Options {
	p, c := o.Process, o.Cluster
	identity := node.Identity{Kubelet: o.Identity.Kubelet, Proxy: o.Identity.Proxy, ClientCA: o.Identity.ClientCA}
	if !o.Identity.RenewedHere {
		identity.ServingCert, identity.ServingKey = o.Identity.Serving.Cert, o.Identity.Serving.Key
	}
	return node.Options{
		Settings: o.Settings, Name: p.Name, IP: p.IP,
		ClusterCIDR: c.ClusterCIDR, ClusterDNS: c.ClusterDNS, ClusterDomain: c.ClusterDomain, APIServiceIP: c.APIServiceIP,
		OwnNetwork: c.FlannelBackend != config.NoBackend, StorageDir: c.StorageDir, Identity: identity,
		Programs: p.Programs, Manifest: p.Manifest, Session: node.NewSession(o.Settings.DataDir), Marker: p.Marker, Lock: p.Lock,
		Nameservers: node.NewNameservers(o.Settings, p.Log), Log: p.Log,
	}
}

// network returns the options of the pod network.
func (o Options) network() network.Options {
	p, c := o.Process, o.Cluster
	return network.Options{
		Settings: o.Settings, Name: p.Name, IP: p.IP, ClusterCIDR: c.ClusterCIDR,
		Backend: c.FlannelBackend, Port: c.FlannelPort, External: c.FlannelExternalIP,
		Kubeconfig: o.Identity.Kubelet, Plugins: p.Programs.CNIDir(), Marker: p.Marker, Lock: p.Lock, Log: p.Log,
	}
}

// policies returns the options of what enforces NetworkPolicies.
func (o Options) policies() netpol.Options {
	return netpol.Options{
		Node: o.Process.Name, Kubeconfig: o.Identity.Kubelet, Network: o.Settings.DataDir.PodNetwork(),
		Disabled: o.Cluster.DisableNetworkPolicy, Log: o.Process.Log,
	}
}

// registry returns the options of what brings images to this machine, and serves its own to other nodes.
func (o Options) registry() registry.Options {
	dir, p, id := o.Settings.DataDir, o.Process, o.Identity
	return registry.Options{
		Node: p.Name, IP: p.IP, LocalPort: layout.RegistryPort, PeerPort: layout.RegistryPeerPort, External: o.Cluster.FlannelExternalIP,
		Socket: dir.ContainerdSocket(), HostsDir: dir.NodeRegistryDir(), UserHostsDir: dir.RegistryDir(), ContentDir: dir.Agent("containerd"),
		Registries: o.Settings.PrivateRegistry, DisableDefaultEndpoint: o.Settings.DisableDefaultEndpoint, Embedded: o.Cluster.EmbeddedRegistry,
		Kubeconfig: id.Kubelet, Log: p.Log,
		Identity: registry.Identity{
			ClientCert: id.Client.Cert, ClientKey: id.Client.Key, ServingCert: id.Serving.Cert, ServingKey: id.Serving.Key,
			ClientCA: id.ClientCA, ServingCA: id.KubeletCA,
		},
	}
}

// pool returns the options of what announces addresses of LoadBalancer services.
func (o Options) pool() announce.Options {
	return announce.Options{
		Node: o.Process.Name, Kubeconfig: o.Identity.Kubelet, Pool: o.Cluster.LoadBalancerPool, LinkAlias: o.Process.Marker.Alias(), Log: o.Process.Log,
	}
}

// balancer returns the options of what finds an API server that works: this node's own, and others' while it does not.
func (o Options) balancer() apilb.Options {
	return apilb.Options{
		Listen: balancerAddress(), Server: o.Server, Own: o.Own,
		CA: o.Identity.ServerCA, Cert: o.Identity.Client.Cert, Key: o.Identity.Client.Key, State: o.Settings.DataDir.APIServers(), Log: o.Process.Log,
	}
}
