package istiod

import (
	"fmt"
	"reflect"

	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/xds"
	istioxds "istio.io/istio/pkg/xds"
)

// statusKey is the key of istiod's generator for `istioctl proxy-status` and similar requests
// (istio.io/istio/pilot/pkg/bootstrap/discovery.go, InitGenerators).
const statusKey = "event"

// KeepStatusApart makes istiod answer `istioctl proxy-status` from copies of the proxies.
//
// Istio's own handler (istio.io/istio/pilot/pkg/xds/statusgen.go, debugSyncz) acquires a proxy's read lock twice, nested. If a
// push requests the write lock in between, it waits for the first read lock and blocks the second (sync.RWMutex). This is a
// deadlock: the proxy gets no configuration until istiod is restarted.
func KeepStatusApart(server *xds.DiscoveryServer) error {
	own, ok := server.Generators[statusKey].(*xds.StatusGen)
	if !ok {
		return fmt.Errorf("the generator for proxy status is a %T, not Istio's", server.Generators[statusKey])
	}
	if _, err := copyOf(server); err != nil {
		return err
	}
	server.Generators[statusKey] = &statusGenerator{own}
	return nil
}

type statusGenerator struct{ *xds.StatusGen }

// Generate implements model.XdsResourceGenerator.
func (g *statusGenerator) Generate(proxy *model.Proxy, w *model.WatchedResource, req *model.PushRequest) (model.Resources, model.XdsLogDetails, error) {
	status, err := g.apart(w)
	if err != nil {
		return nil, model.DefaultXdsLogDetails, err
	}
	return status.Generate(proxy, w, req)
}

// GenerateDeltas implements model.XdsDeltaResourceGenerator.
func (g *statusGenerator) GenerateDeltas(proxy *model.Proxy, req *model.PushRequest, w *model.WatchedResource) (
	model.Resources, model.DeletedResources, model.XdsLogDetails, bool, error,
) {
	status, err := g.apart(w)
	if err != nil {
		return nil, nil, model.DefaultXdsLogDetails, true, err
	}
	return status.GenerateDeltas(proxy, req, w)
}

// apart returns Istio's generator, working on copies of all proxies.
func (g *statusGenerator) apart(w *model.WatchedResource) (*xds.StatusGen, error) {
	if w.TypeUrl != xds.TypeDebugSyncronization {
		return g.StatusGen, nil
	}
	server, err := copyOf(g.Server)
	if err != nil {
		return nil, err
	}
	return &xds.StatusGen{Server: server}, nil
}

// copyOf returns a server with copies of another's proxies, as far as their status needs it. Each proxy's lock is acquired once, and
// the copies have their own locks.
func copyOf(server *xds.DiscoveryServer) (*xds.DiscoveryServer, error) {
	out := &xds.DiscoveryServer{Env: server.Env}
	clients, err := fieldOf[map[string]*xds.Connection](reflect.ValueOf(out).Elem(), "adsClients")
	if err != nil {
		return nil, err
	}
	*clients = map[string]*xds.Connection{}
	for _, connection := range server.Clients() {
		proxy := connection.Proxy()
		if proxy == nil {
			continue
		}
		watched := map[string]*model.WatchedResource{}
		for url, resource := range proxy.DeepCloneWatchedResources() {
			watched[url] = &resource
		}
		copied := &xds.Connection{Connection: istioxds.NewConnection(connection.Peer(), nil)}
		copied.SetID(connection.ID())
		copied.MarkInitialized()
		of, err := fieldOf[*model.Proxy](reflect.ValueOf(copied).Elem(), "proxy")
		if err != nil {
			return nil, err
		}
		// These are set before a connection counts as initialized, and never change.
		*of = &model.Proxy{
			ID: proxy.ID, Type: proxy.Type, ConfigNamespace: proxy.ConfigNamespace, Metadata: proxy.Metadata, WatchedResources: watched,
		}
		(*clients)[connection.ID()] = copied
	}
	return out, nil
}
