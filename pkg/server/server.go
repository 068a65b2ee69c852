// Package server is a Polymesh server: its components, and the order in which they start.
//
// It turns a checked configuration into the components of pkg/controlplane, pkg/node and pkg/mesh, and passes them to the node's
// process. `polymesh server` calls Run. The list of components is addComponents in components.go.
package server

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"k8s.io/component-base/metrics/legacyregistry"
	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/member"
	"polymesh.dev/polymesh/pkg/controlplane/overview"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/process"
	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/pkg/worker"
)

// Run runs a server until ctx ends.
func Run(ctx context.Context, cfg *config.Server) error {
	return process.Run(ctx, process.Options{
		Node: &cfg.Node, Kubeconfig: cfg.Kubeconfig,
		Build: func(ctx context.Context, p *process.Process, m *component.Manager) (component.Handle, error) {
			// Before anything in the data dir is read.
			if completed, err := snapshot.Recover(cfg.DataDir); err != nil {
				return component.Handle{}, err
			} else if completed {
				p.Log.Info("completed the restore of a snapshot, which was interrupted")
			}
			cfg, membership, err := joined(ctx, cfg, p)
			if err != nil {
				return component.Handle{}, fmt.Errorf("join the cluster: %w", err)
			}
			if membership != nil {
				// The backend is the cluster's, which the launcher did not know.
				if err := preflight.PodNetwork(cfg.FlannelBackend, cfg.FlannelPort, cfg.FlannelIface); err != nil {
					return component.Handle{}, err
				}
			}
			s, err := newServer(cfg, p, membership)
			if err != nil {
				return component.Handle{}, err
			}
			if cfg.Enabled(config.Observe) && !s.clusterObserves() {
				p.Log.Warn("this polymesh was built without " + observe.Program + ", so the cluster has no store of metrics, logs and traces")
			}
			p.Before = func(ctx context.Context) error {
				// What an earlier start has left running, with what it has stored.
				for _, left := range []struct {
					runs bool
					end  func(context.Context, layout.DataDir) error
				}{{s.observes(), observe.EndStore}, {s.collects(), observe.EndCollector}} {
					if left.runs {
						continue
					}
					if err := left.end(ctx, cfg.DataDir); err != nil {
						p.Log.Warn("a process of the store of metrics, logs and traces still runs", "err", err)
					}
				}
				return s.snapshots.BeforeStart(ctx, !cfg.Snapshots.Disabled, p.Log)
			}
			up := s.addComponents(m)
			s.describe(p.Status)
			return up, nil
		},
	})
}

// server is the input for building a server's components.
type server struct {
	*process.Process
	cfg        *config.Server
	membership *join.ServerMembership // nil if it has joined no other servers
	id         string                 // of the data dir; empty where servers do not find each other in the datastore
	renewal    *certificate.Renewal
	datastore  ownDatastore
	snapshots  *snapshot.Snapshots
	schedule   *snapshot.Component
}

// ownDatastore is a server's datastore, of which it saves snapshots.
type ownDatastore interface {
	datastore.Store
	snapshot.Source
}

// etcd returns this server's member of etcd; nil with another datastore.
func (s *server) etcd() *etcd.Etcd {
	local, _ := s.datastore.(*etcd.Etcd)
	return local
}

func newServer(cfg *config.Server, p *process.Process, membership *join.ServerMembership) (*server, error) {
	s := &server{Process: p, cfg: cfg, membership: membership, datastore: newDatastore(cfg, p, membership)}
	var err error
	if cfg.Datastore.Kind != config.SQLite {
		if s.id, err = bootstrap.EnsureID(cfg.DataDir.ServerID()); err != nil {
			return nil, err
		}
	}
	if s.snapshots, err = snapshot.Configured(cfg, s.Name, s.datastore); err != nil {
		return nil, err
	}
	s.renewal = certificate.NewRenewal(certificate.Options{
		Dir: cfg.DataDir.TLS(), NodeName: s.Name, NodeIP: s.IP, External: cfg.ExternalIP, SANs: s.sans(),
		ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain, Observe: s.observes(),
	}, s.writeKubeconfigs, s.Log)
	return s, nil
}

// describe adds the cluster to what `polymesh status` shows, and lets commands on this machine manage the members of etcd.
func (s *server) describe(socket *status.Server) {
	o := overview.Options{
		Node: s.Name, Version: kubernetes.Get().GitVersion, Kubeconfig: s.cfg.DataDir.Kubeconfig("polymesh"), Certificates: certificate.Store(s.cfg.DataDir.TLS()),
		Kind: s.cfg.Datastore.Kind, Datastore: s.datastore, Snapshots: s.snapshots, SnapshotFailure: s.schedule.Failure,
	}
	cluster := overview.New(o).Cluster
	socket.DescribeCluster(cluster)
	member.Serve(socket, s.etcd(), overview.Kind(o))
	found := &findings{kubeconfig: s.cfg.DataDir.Kubeconfig("polymesh"), overview: cluster}
	socket.DescribeWorkloads(found.workloads)
	if s.observes() {
		socket.Handle(metricsPath, &ownMetrics{from: legacyregistry.DefaultGatherer})
		socket.Handle(findingsPath, found)
	}
}

func (s *server) sans() []string {
	sans := append([]string{}, s.cfg.TLSSANs...)
	for _, a := range []netip.Addr{s.cfg.AdvertiseAddress, s.cfg.ExternalIP} {
		if a.IsValid() {
			sans = append(sans, a.String())
		}
	}
	return sans
}

func (s *server) writeKubeconfigs(store certificate.Store) error {
	node := controlplane.URL(s.cfg)
	if s.datastore.Endpoint().LeaderElect {
		node = worker.BalancerURL()
	}
	if err := controlplane.WriteKubeconfigs(s.cfg, store, node, s.observes()); err != nil {
		return err
	}
	if err := store.WritePortableKubeconfig(s.cfg.Kubeconfig, certificate.Admin, controlplane.URL(s.cfg), s.cfg.KubeconfigMode); err != nil || s.cfg.KubeconfigGroup < 0 {
		return err
	}
	return os.Chown(s.cfg.Kubeconfig, -1, s.cfg.KubeconfigGroup)
}
