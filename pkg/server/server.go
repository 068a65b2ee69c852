// Package server is a Polymesh server: its components, and the order in which they start.
//
// It turns a checked configuration into the components of pkg/controlplane, pkg/node and pkg/mesh, and passes them to the node's
// process. `polymesh server` calls Run. The list of components is addComponents in components.go.
package server

import (
	"context"
	"net/netip"
	"os"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/process"
)

// Run runs a server until ctx ends.
func Run(ctx context.Context, cfg *config.Server) error {
	return process.Run(ctx, process.Options{
		Node: &cfg.Node, Kubeconfig: cfg.Kubeconfig,
		Build: func(_ context.Context, p *process.Process, m *component.Manager) (component.Handle, error) {
			s, err := newServer(cfg, p)
			if err != nil {
				return component.Handle{}, err
			}
			p.Before = func(ctx context.Context) error { return s.snapshots.BeforeStart(ctx, !cfg.Snapshots.Disabled, p.Log) }
			return s.addComponents(m), nil
		},
	})
}

// server is the input for building a server's components.
type server struct {
	*process.Process
	cfg       *config.Server
	renewal   *certificate.Renewal
	datastore own
	snapshots *snapshot.Snapshots
}

// own is a server's datastore, of which it saves snapshots.
type own interface {
	datastore.Store
	snapshot.Source
}

func newServer(cfg *config.Server, p *process.Process) (*server, error) {
	s := &server{Process: p, cfg: cfg}
	s.datastore = s.newDatastore()
	var err error
	if s.snapshots, err = snapshot.Configured(cfg, s.Name, s.datastore); err != nil {
		return nil, err
	}
	s.renewal = certificate.NewRenewal(certificate.Options{
		Dir: cfg.DataDir.TLS(), NodeName: s.Name, NodeIP: s.IP, SANs: s.sans(),
		ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain,
	}, s.writeKubeconfigs, s.Log)
	return s, nil
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
	if err := controlplane.WriteKubeconfigs(s.cfg, store); err != nil {
		return err
	}
	if err := store.WritePortableKubeconfig(s.cfg.Kubeconfig, certificate.Admin, controlplane.URL(s.cfg), s.cfg.KubeconfigMode); err != nil || s.cfg.KubeconfigGroup < 0 {
		return err
	}
	return os.Chown(s.cfg.Kubeconfig, -1, s.cfg.KubeconfigGroup)
}
