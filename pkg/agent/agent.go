// Package agent is a Polymesh agent, a node without a control plane: it joins its cluster and runs the components of pkg/worker.
//
// `polymesh agent` calls Run. What the node may do in the cluster, it does with the one certificate that it gets when it joins
// (pkg/join).
package agent

import (
	"context"
	"fmt"
	"strings"

	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/observe/route"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/process"
	"polymesh.dev/polymesh/pkg/worker"
)

// Run runs an agent until ctx ends.
func Run(ctx context.Context, cfg *config.Agent) error {
	return process.Run(ctx, process.Options{
		Node: &cfg.Node,
		Build: func(ctx context.Context, p *process.Process, m *component.Manager) (component.Handle, error) {
			membership, err := joined(ctx, cfg, p)
			if err != nil {
				return component.Handle{}, fmt.Errorf("join the cluster: %w", err)
			}
			if err := preflight.PodNetwork(membership.Cluster.FlannelBackend, membership.Cluster.FlannelPort, cfg.FlannelIface); err != nil {
				return component.Handle{}, err
			}
			files := membership.Files
			if err := certificate.WriteKubeconfig(cfg.DataDir.NodeKubeconfig(), worker.BalancerURL(), files.ServerCA, files.Client, files.Client); err != nil {
				return component.Handle{}, err
			}
			parts := worker.New(options(cfg, p, membership))
			p.Status.DescribeServers(parts.Balancer.Servers)
			return addComponents(m, parts, join.NewReachability(worker.BalancerURL(), files), collector(cfg, p, files)), nil
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

// options returns those of the node's components.
func options(cfg *config.Agent, p *process.Process, membership *join.Membership) worker.Options {
	kubeconfig, files := cfg.DataDir.NodeKubeconfig(), membership.Files
	return worker.Options{
		Process: p, Settings: cfg.Node, Cluster: membership.Cluster, Server: strings.TrimPrefix(cfg.Server, "https://"),
		Identity: worker.Identity{
			Kubelet: kubeconfig, Proxy: kubeconfig, ServerCA: files.ServerCA, ClientCA: files.ClientCA,
			Client: worker.Pair{Cert: files.Client, Key: files.Client}, Serving: worker.Pair{Cert: files.Serving, Key: files.Serving}, RenewedHere: true,
			KubeletCA: func() ([]byte, error) { return []byte(membership.Cluster.KubeletCA), nil },
		},
	}
}

// collector returns what sends to the store of the cluster, if it has one; nil if its program is not in the file.
func collector(cfg *config.Agent, p *process.Process, files join.Files) func(up <-chan struct{}) component.Component {
	if _, has := p.Manifest.Files["bin/"+observe.Program]; !has {
		return nil
	}
	return func(up <-chan struct{}) component.Component {
		return observe.New(observe.Options{
			DataDir: cfg.DataDir, Program: p.Programs.Bin(observe.Program), Node: p.Name, PodLogs: cfg.DataDir.PodLogs(),
			LogFiles: observe.LogFiles(cfg.DataDir, "agent"), Debug: cfg.Debug, Up: up, Log: p.Log,
			Collect: &route.Node{Server: worker.BalancerURL(), CA: files.ServerCA, Cert: files.Client, Key: files.Client},
		})
	}
}

// addComponents is the list of an agent's components and their dependencies. It returns the node's, whose readiness is reported to a
// service manager.
func addComponents(m *component.Manager, parts worker.Components, reachability component.Component, collect func(up <-chan struct{}) component.Component) (up component.Handle) {
	m.Add(parts.Balancer) // what uses it tries again until it works
	containerd := m.Add(parts.Containerd)
	m.Add(parts.Images, containerd)
	pulls := m.Add(parts.Registry, containerd)
	kubelet := m.Add(parts.Kubelet, containerd, pulls, m.Add(parts.NetworkPolicy))
	m.Add(reachability, kubelet)
	m.Add(parts.Proxy)
	m.Add(parts.PoolAddresses)
	if parts.ExternalAddress != nil {
		m.Add(parts.ExternalAddress)
	}
	up = m.Add(parts.PodNetwork)
	if collect != nil {
		m.Add(collect(up.Ready()))
	}
	return up
}
