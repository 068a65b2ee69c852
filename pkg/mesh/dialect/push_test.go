package dialect_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pilot/test/xds"
	"istio.io/istio/pilot/test/xdstest"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/util/sets"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// manyServices are services with two endpoints each.
func manyServices(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: s%[1]d, namespace: demo}
spec:
  hosts: [s%[1]d.example.com]
  addresses: [10.8.%[2]d.%[3]d]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints:
  - {address: 10.9.%[2]d.%[3]d, labels: {app: s%[1]d, version: v1, security.istio.io/tlsMode: istio}}
  - {address: 10.10.%[2]d.%[3]d, labels: {app: s%[1]d, version: v2, security.istio.io/tlsMode: istio}}
---`, i, i/250, i%250+1)
	}
	return b.String()
}

// BenchmarkPush makes and encodes everything that one sidecar gets in a full push, in a mesh of 1,000 services: "istiod" as
// Istio makes it, "dialect" translated; "cached" when nothing has changed since the last push, "changed" when all has.
func BenchmarkPush(b *testing.B) {
	for _, scope := range log.Scopes() {
		scope.SetOutputLevel(log.NoneLevel)
	}
	meshConfig := mesh.DefaultMeshConfig()
	f := xds.NewFakeDiscoveryServer(b, xds.FakeOptions{MeshConfig: meshConfig, ConfigString: manyServices(1000)})
	proxy := f.SetupProxy(proxyOf(model.SidecarProxy, "a", "demo", "10.1.0.1", map[string]string{"app": "a", "version": "v1"}))
	names := map[string][]string{
		v3.ClusterType: nil, v3.ListenerType: nil,
		v3.EndpointType: xdstest.ExtractEdsClusterNames(f.Clusters(proxy)),
		v3.RouteType:    xdstest.ExtractRoutesFromListeners(f.Listeners(proxy)),
	}
	plain := maps.Clone(f.Discovery.Generators)
	dialect.Wrap(f.Discovery.Generators, dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(f.Discovery.Env.EndpointIndex)))
	push := func(b *testing.B, generators map[string]model.XdsResourceGenerator) {
		size := 0
		for typ, resources := range names {
			out, _, err := generators[typ].Generate(proxy, &model.WatchedResource{TypeUrl: typ, ResourceNames: sets.New(resources...)},
				&model.PushRequest{Push: f.PushContext(), Forced: true, Start: time.Now()})
			if err != nil {
				b.Fatal(err)
			}
			// As istiod sends them (pilot/pkg/xds/delta.go, pushDeltaXds).
			response := &discovery.DeltaDiscoveryResponse{TypeUrl: typ, Resources: out}
			encoded, err := proto.Marshal(response)
			if err != nil {
				b.Fatal(err)
			}
			size += len(encoded)
		}
		if size == 0 {
			b.Fatal("nothing was generated")
		}
	}
	for _, cached := range []bool{true, false} {
		name := map[bool]string{true: "cached", false: "changed"}[cached]
		for _, who := range []struct {
			name       string
			generators map[string]model.XdsResourceGenerator
		}{{"istiod", plain}, {"dialect", f.Discovery.Generators}} {
			b.Run(name+"/"+who.name, func(b *testing.B) {
				for b.Loop() {
					if !cached {
						f.Discovery.Cache.ClearAll()
					}
					push(b, who.generators)
				}
			})
		}
	}
}
