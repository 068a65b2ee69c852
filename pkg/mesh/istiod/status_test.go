package istiod

import (
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/xds"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	testxds "istio.io/istio/pilot/test/xds"
)

// syncz asks a generator for the status of all proxies.
func syncz(t *testing.T, g model.XdsResourceGenerator) model.Resources {
	t.Helper()
	asker := &model.Proxy{Metadata: &model.NodeMetadata{}}
	resources, _, err := g.Generate(asker, &model.WatchedResource{TypeUrl: xds.TypeDebugSyncronization}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return resources
}

// connected is an istiod with a sidecar that has its clusters.
func connected(t *testing.T) (*testxds.FakeDiscoveryServer, *model.Proxy) {
	t.Helper()
	s := testxds.NewFakeDiscoveryServer(t, testxds.FakeOptions{})
	ads := s.ConnectADS().WithType(v3.ClusterType).WithID("sidecar~10.1.0.1~a.demo~demo.svc.cluster.local").WithMetadata(model.NodeMetadata{
		Namespace: "demo", ProxyConfig: &model.NodeMetaProxyConfig{},
	})
	ads.RequestResponseAck(t, nil)
	for deadline := time.Now().Add(10 * time.Second); len(s.Discovery.Clients()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the sidecar is not connected")
		}
	}
	return s, s.Discovery.Clients()[0].Proxy()
}

// What is said of the proxies is what Istio says.
func TestStatus(t *testing.T) {
	s, _ := connected(t)
	own := s.Discovery.Generators[statusKey]
	want := syncz(t, own)
	if err := KeepStatusApart(s.Discovery); err != nil {
		t.Fatal(err)
	}
	got := syncz(t, s.Discovery.Generators[statusKey])
	if len(want) != 1 || len(got) != 1 || !proto.Equal(got[0], want[0]) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := KeepStatusApart(s.Discovery); err == nil {
		t.Error("a generator that is not Istio's is taken")
	}
}

// Pushes write to a proxy while its status is asked for. With Istio's own answer, this test does not end: it stands within the first
// thousands of rounds, with a writer between two readers.
func TestStatusBesidePushes(t *testing.T) {
	s, proxy := connected(t)
	if err := KeepStatusApart(s.Discovery); err != nil {
		t.Fatal(err)
	}
	own := s.Discovery.Generators[statusKey]
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
		t.Fatal("the status and a push wait for each other")
	}
}
