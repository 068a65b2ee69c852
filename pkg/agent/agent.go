// Package agent is a Polymesh agent, a node without a control plane: it joins its cluster and runs the components of pkg/node.
//
// `polymesh agent` calls Run. What the node may do in the cluster, it does with the one certificate that it gets when it joins
// (pkg/join).
package agent

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/node/announce"
	"polymesh.dev/polymesh/pkg/node/apilb"
	"polymesh.dev/polymesh/pkg/node/netpol"
	"polymesh.dev/polymesh/pkg/node/network"
	"polymesh.dev/polymesh/pkg/node/registry"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/process"
)

// Run runs an agent until ctx ends.
func Run(ctx context.Context, cfg *config.Agent) error {
	return process.Run(ctx, process.Options{
		Node: &cfg.Node,
		Build: func(ctx context.Context, p *process.Process, m *component.Manager) (component.Handle, error) {
			member, err := joined(ctx, cfg, p)
			if err != nil {
				return component.Handle{}, fmt.Errorf("join the cluster: %w", err)
			}
			if err := preflight.PodNetwork(member.Cluster.FlannelBackend, member.Cluster.FlannelPort, cfg.FlannelIface); err != nil {
				return component.Handle{}, err
			}
			if err := certificate.WriteKubeconfig(cfg.DataDir.NodeKubeconfig(), "https://"+balancerAddress().String(), member.Files.ServerCA, member.Files.Client, member.Files.Client); err != nil {
				return component.Handle{}, err
			}
			lb := apilb.New(balancer(cfg, p, member))
			p.Status.DescribeServers(lb.Servers)
			return addComponents(m, parts{
				lb, machine(cfg, p, member), podNetwork(cfg, p, member), policies(cfg, p, member), images(cfg, p, member), announcements(cfg, p, member),
				join.NewReachability("https://"+balancerAddress().String(), member.Files),
			}), nil
		},
	})
}

func joined(ctx context.Context, cfg *config.Agent, p *process.Process) (*join.Membership, error) {
	p.Waiting("join", "joining the cluster of "+cfg.Server)
	return join.Join(ctx, join.Machine{
		DataDir: cfg.DataDir, Server: cfg.Server, Token: cfg.Token, NodeName: p.Name, NodeIP: p.IP, ExternalIP: cfg.ExternalIP, Version: kubernetes.Get().GitVersion, Log: p.Log,
		Waiting: func(why string) { p.Waiting("join", "waiting for "+cfg.Server+": "+why) },
	})
}

// machine returns the options shared by this machine's components.
func machine(cfg *config.Agent, p *process.Process, member *join.Membership) node.Options {
	kubeconfig := cfg.DataDir.NodeKubeconfig()
	return node.Options{
		Settings: cfg.Node, Name: p.Name, IP: p.IP,
		ClusterCIDR: member.Cluster.ClusterCIDR, ClusterDNS: member.Cluster.ClusterDNS, ClusterDomain: member.Cluster.ClusterDomain, APIServiceIP: member.Cluster.APIServiceIP,
		OwnNetwork: member.Cluster.FlannelBackend != config.NoBackend, StorageDir: member.Cluster.StorageDir,
		Identity: node.Identity{Kubelet: kubeconfig, Proxy: kubeconfig, ClientCA: member.Files.ClientCA},
		Programs: p.Programs, Manifest: p.Manifest, Session: node.NewSession(cfg.DataDir), Marker: p.Marker, Lock: p.Lock,
		Nameservers: node.NewNameservers(cfg.Node, p.Log), Log: p.Log,
	}
}

// podNetwork returns the options of this machine's pod network.
func podNetwork(cfg *config.Agent, p *process.Process, member *join.Membership) network.Options {
	c := member.Cluster
	return network.Options{
		Settings: cfg.Node, Name: p.Name, IP: p.IP, ClusterCIDR: c.ClusterCIDR,
		Backend: c.FlannelBackend, Port: c.FlannelPort, External: c.FlannelExternalIP,
		Kubeconfig: cfg.DataDir.NodeKubeconfig(), Plugins: p.Programs.CNIDir(), Marker: p.Marker, Lock: p.Lock, Log: p.Log,
	}
}

// policies returns the options of what enforces NetworkPolicies here.
func policies(cfg *config.Agent, p *process.Process, member *join.Membership) netpol.Options {
	return netpol.Options{
		Node: p.Name, Kubeconfig: cfg.DataDir.NodeKubeconfig(), Network: cfg.DataDir.PodNetwork(), Disabled: member.Cluster.DisableNetworkPolicy, Log: p.Log,
	}
}

// images returns the options of what brings images to this machine, and serves its own to other nodes.
func images(cfg *config.Agent, p *process.Process, member *join.Membership) registry.Options {
	dir, files := cfg.DataDir, member.Files
	return registry.Options{
		Node: p.Name, IP: p.IP, LocalPort: layout.RegistryPort, PeerPort: layout.RegistryPeerPort, External: member.Cluster.FlannelExternalIP,
		Socket: dir.ContainerdSocket(), HostsDir: dir.NodeRegistryDir(), UserHostsDir: dir.RegistryDir(), ContentDir: dir.Agent("containerd"),
		Registries: cfg.PrivateRegistry, DisableDefaultEndpoint: cfg.DisableDefaultEndpoint, Embedded: member.Cluster.EmbeddedRegistry,
		Kubeconfig: dir.NodeKubeconfig(), Log: p.Log,
		Identity: registry.Identity{
			ClientCert: files.Client, ClientKey: files.Client, ServingCert: files.Serving, ServingKey: files.Serving, ClientCA: files.ClientCA,
			ServingCA: func() ([]byte, error) { return []byte(member.Cluster.KubeletCA), nil },
		},
	}
}

// announcements returns the options of what announces addresses of LoadBalancer services here.
func announcements(cfg *config.Agent, p *process.Process, member *join.Membership) announce.Options {
	return announce.Options{
		Node: p.Name, Kubeconfig: cfg.DataDir.NodeKubeconfig(), Pool: member.Cluster.LoadBalancerPool, LinkAlias: p.Marker.Alias(), Log: p.Log,
	}
}

// balancerAddress is where the node's parts reach an API server.
func balancerAddress() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), layout.APIBalancerPort)
}

// balancer returns the options of what finds an API server that works.
func balancer(cfg *config.Agent, p *process.Process, member *join.Membership) apilb.Options {
	return apilb.Options{
		Listen: balancerAddress(), Server: strings.TrimPrefix(cfg.Server, "https://"),
		CA: member.Files.ServerCA, Cert: member.Files.Client, Key: member.Files.Client, State: cfg.DataDir.APIServers(), Log: p.Log,
	}
}

// parts are the options of an agent's components.
type parts struct {
	balancer     *apilb.Balancer
	machine      node.Options
	pods         network.Options
	policies     netpol.Options
	images       registry.Options
	pool         announce.Options
	reachability *join.Reachability
}

// addComponents is the list of an agent's components and their dependencies. It returns the node's, whose readiness is reported to a
// service manager.
func addComponents(m *component.Manager, p parts) (up component.Handle) {
	m.Add(p.balancer) // what uses it tries again until it works
	containerd := m.Add(node.NewContainerd(p.machine))
	images := node.NewImages(p.machine)
	m.Add(images, containerd)
	p.images.Await = images.Await
	pulls := m.Add(registry.New(p.images), containerd)
	// It waits itself for the images that every pod needs.
	kubelet := m.Add(node.NewKubelet(p.machine, images), containerd, pulls, m.Add(netpol.New(p.policies)))
	m.Add(p.reachability, kubelet)
	m.Add(node.NewProxy(p.machine))
	m.Add(announce.New(p.pool))
	return m.Add(network.New(p.pods))
}
