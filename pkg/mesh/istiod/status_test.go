package istiod

import (
	"reflect"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/xds"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pkg/spiffe"
	istioxds "istio.io/istio/pkg/xds"
)

// syncz requests the status of all proxies from a generator.
func syncz(t *testing.T, g model.XdsResourceGenerator) model.Resources {
	t.Helper()
	asker := &model.Proxy{Metadata: &model.NodeMetadata{}, VerifiedIdentity: &spiffe.Identity{Namespace: "istio-system"}}
	resources, _, err := g.Generate(asker, &model.WatchedResource{TypeUrl: xds.TypeDebugSyncronization}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return resources
}

// connected returns istiod's server with a sidecar that has received its clusters.
func connected(t *testing.T) (*xds.DiscoveryServer, *model.Proxy) {
	t.Helper()
	server := &xds.DiscoveryServer{Env: model.NewEnvironment()}
	server.Generators = map[string]model.XdsResourceGenerator{statusKey: xds.NewStatusGen(server)}
	proxy := &model.Proxy{
		ID: "a.demo", Type: model.SidecarProxy, ConfigNamespace: "demo",
		Metadata:         &model.NodeMetadata{Namespace: "demo", ClusterID: "Kubernetes", IstioVersion: "1.31.0", ProxyConfig: &model.NodeMetaProxyConfig{}},
		WatchedResources: map[string]*model.WatchedResource{v3.ClusterType: {TypeUrl: v3.ClusterType, NonceSent: "1", NonceAcked: "1"}},
	}
	connection := &xds.Connection{Connection: istioxds.NewConnection("10.1.0.1", nil)}
	connection.SetID("a.demo-1")
	connection.MarkInitialized()
	of, err := fieldOf[*model.Proxy](reflect.ValueOf(connection).Elem(), "proxy")
	if err != nil {
		t.Fatal(err)
	}
	*of = proxy
	clients, err := fieldOf[map[string]*xds.Connection](reflect.ValueOf(server).Elem(), "adsClients")
	if err != nil {
		t.Fatal(err)
	}
	*clients = map[string]*xds.Connection{connection.ID(): connection}
	return server, proxy
}

// The status of the proxies is the same as Istio's.
func TestStatus(t *testing.T) {
	s, _ := connected(t)
	own := s.Generators[statusKey]
	want := syncz(t, own)
	if err := KeepStatusApart(s); err != nil {
		t.Fatal(err)
	}
	got := syncz(t, s.Generators[statusKey])
	if len(want) != 1 || len(got) != 1 || !proto.Equal(got[0], want[0]) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := KeepStatusApart(s); err == nil {
		t.Error("a generator that is not Istio's is accepted")
	}
}

// Pushes write to a proxy while its status is requested. With Istio's own handler, this test deadlocks within the first
// thousands of rounds, with a writer between two readers.
func TestStatusBesidePushes(t *testing.T) {
	s, proxy := connected(t)
	if err := KeepStatusApart(s); err != nil {
		t.Fatal(err)
	}
	own := s.Generators[statusKey]
	const rounds = 50_000
	ended := make(chan struct{})
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for range rounds {
				proxy.UpdateWatchedResource(v3.ClusterType, func(r *model.WatchedResource) *model.WatchedResource {
					next := *r
					return &next
				})
			}
		})
		all.Go(func() {
			for range rounds / 10 {
				syncz(t, own)
			}
		})
	}
	go func() {
		all.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Fatal("the status request and a push are deadlocked")
	}
}
