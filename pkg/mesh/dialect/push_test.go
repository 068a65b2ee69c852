package dialect_test

import (
	"fmt"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pilot/test/xds"
	"istio.io/istio/pilot/test/xdstest"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/config/schema/kind"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/util/sets"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// manyServices returns services with two endpoints each, and a route for the first one.
func manyServices(n int, protocol string) string {
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
  ports: [{number: 80, name: %[4]s, protocol: %[5]s}]
  endpoints:
  - {address: 10.9.%[2]d.%[3]d, labels: {app: s%[1]d, version: v1, security.istio.io/tlsMode: istio}}
  - {address: 10.10.%[2]d.%[3]d, labels: {app: s%[1]d, version: v2, security.istio.io/tlsMode: istio}}
---`, i, i/250, i%250+1, protocol, strings.ToUpper(protocol))
	}
	fmt.Fprintf(&b, `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: s0, namespace: demo}
spec:
  hosts: [s0.example.com]
  %s: [{route: [{destination: {host: s0.example.com}}]}]
`, protocol)
	return b.String()
}

// pushMesh is a mesh of 1,000 services and an istiod with ten connected proxies.
type pushMesh struct {
	*xds.FakeDiscoveryServer
	proxies []*model.Proxy
	// names are the resource names that a proxy requests, by type.
	names map[string][]string
}

func newPushMesh(b *testing.B, protocol string, dialect bool) *pushMesh {
	meshConfig := mesh.DefaultMeshConfig()
	meshConfig.DefaultProviders = &meshconfig.MeshConfig_DefaultProviders{Metrics: []string{"prometheus"}}
	f := xds.NewFakeDiscoveryServer(b, xds.FakeOptions{MeshConfig: meshConfig, ConfigString: manyServices(1000, protocol)})
	m := &pushMesh{FakeDiscoveryServer: f}
	for i := range 10 {
		name := fmt.Sprintf("a%d", i)
		m.proxies = append(m.proxies, f.SetupProxy(proxyOf(model.SidecarProxy, name, "demo", fmt.Sprintf("10.1.0.%d", i+1), map[string]string{"app": name, "version": "v1"})))
	}
	m.names = map[string][]string{
		v3.ClusterType: nil, v3.ListenerType: nil,
		v3.EndpointType: xdstest.ExtractEdsClusterNames(f.Clusters(m.proxies[0])),
		v3.RouteType:    xdstest.ExtractRoutesFromListeners(f.Listeners(m.proxies[0])),
	}
	if dialect {
		wrap(b, f)
	}
	return m
}

// order is the order of Envoy's requests.
var order = []string{v3.ClusterType, v3.EndpointType, v3.ListenerType, v3.RouteType}

// connect connects the first n proxies.
func (m *pushMesh) connect(b *testing.B, n int) *proxies {
	requests := make([][]*discovery.DeltaDiscoveryRequest, n)
	for i := range requests {
		for _, typ := range order {
			if names := m.names[typ]; len(names) > 0 || typ == v3.ClusterType || typ == v3.ListenerType {
				requests[i] = append(requests[i], &discovery.DeltaDiscoveryRequest{
					Node: nodeOf(m.proxies[i]), TypeUrl: typ, ResourceNamesSubscribe: names,
				})
			}
		}
	}
	return connectProxies(b, m.Discovery, requests)
}

// generate generates and encodes everything that one sidecar gets, as istiod does (pilot/pkg/xds/delta.go, pushDeltaXds).
func (m *pushMesh) generate(b *testing.B, proxy *model.Proxy) {
	size := 0
	for _, typ := range order {
		out, _, err := m.Discovery.Generators[typ].Generate(proxy, &model.WatchedResource{TypeUrl: typ, ResourceNames: sets.New(m.names[typ]...)},
			&model.PushRequest{Push: m.PushContext(), Forced: true, Start: time.Now()})
		if err != nil {
			b.Fatal(err)
		}
		encoded, err := proto.Marshal(&discovery.DeltaDiscoveryResponse{TypeUrl: typ, Resources: out})
		if err != nil {
			b.Fatal(err)
		}
		size += len(encoded)
	}
	if size == 0 {
		b.Fatal("nothing was generated")
	}
}

// asPolymesh applies the settings that Polymesh sets for istiod to this process.
func asPolymesh(b *testing.B) {
	for _, scope := range log.Scopes() {
		scope.SetOutputLevel(log.NoneLevel)
	}
	exchange := features.MetadataExchange
	b.Cleanup(func() { features.MetadataExchange = exchange })
	features.MetadataExchange = dialect.IstiodEnv()["PILOT_ENABLE_METADATA_EXCHANGE"] != "false"
}

// BenchmarkPush measures the cost of a push for an istiod with 1,000 services, with and without the dialect: the CPU time
// per proxy from the change to the last response, including the new push context, each proxy's sidecar scope, generation,
// translation, encoding, gRPC and TLS. The proxies run in a separate process. The two istiods alternate in one run, so
// that noise on the machine affects both, and the fastest turn of each counts. "http" uses HTTP services, which share
// listeners; "tcp" uses TCP services with a listener each. "route": the VirtualService of one service has changed; "all":
// everything may have changed, so istiod drops its cache. Both push to one sidecar; "ten" is "all" for ten.
func BenchmarkPush(b *testing.B) {
	asPolymesh(b)
	for _, protocol := range []string{"http", "tcp"} {
		for _, c := range []struct {
			name    string
			proxies int
			turn    int // pushes
			all     bool
		}{{"route", 1, 100, false}, {"all", 1, 25, true}, {"ten", 10, 8, true}} {
			b.Run(protocol+"/"+c.name, func(b *testing.B) {
				var istiods [2]func() time.Duration
				for i := range istiods {
					m := newPushMesh(b, protocol, i == 1)
					connected := m.connect(b, c.proxies)
					// Routes are not requested where there are none; a route change does not request endpoints.
					answers := len(order)
					if len(m.names[v3.RouteType]) == 0 {
						answers--
					}
					request := model.PushRequest{Reason: model.NewReasonStats(model.ConfigUpdate), Forced: c.all}
					if !c.all {
						answers--
						request.ConfigsUpdated = sets.New(model.ConfigKey{Kind: kind.VirtualService, Name: "s0", Namespace: "demo"})
					}
					istiods[i] = func() time.Duration {
						push := func() {
							changed := request
							m.Discovery.ConfigUpdate(&changed)
							connected.wait(b, answers*c.proxies)
						}
						push()
						runtime.GC()
						before := cpuTime(b)
						for range c.turn {
							push()
						}
						return (cpuTime(b) - before) / time.Duration(c.turn*c.proxies)
					}
				}
				compare(b, istiods)
			})
		}
	}
}

// BenchmarkGenerate measures the part of BenchmarkPush that involves the dialect: generating, translating and encoding one
// sidecar's resources. "cached": nothing has changed since the last push. "changed": istiod's cache is empty.
// "mesh" is "changed" for ten sidecars, which share istiod's cache.
func BenchmarkGenerate(b *testing.B) {
	asPolymesh(b)
	for _, protocol := range []string{"http", "tcp"} {
		var meshes [2]*pushMesh
		for i := range meshes {
			meshes[i] = newPushMesh(b, protocol, i == 1)
		}
		for _, c := range []struct {
			name          string
			changed       bool
			turn, proxies int
		}{{"cached", false, 150, 1}, {"changed", true, 25, 1}, {"mesh", true, 8, 10}} {
			b.Run(protocol+"/"+c.name, func(b *testing.B) {
				var istiods [2]func() time.Duration
				for i, m := range meshes {
					istiods[i] = func() time.Duration {
						m.generate(b, m.proxies[0])
						runtime.GC()
						before := cpuTime(b)
						for range c.turn {
							if c.changed {
								m.Discovery.Cache.ClearAll()
							}
							for _, proxy := range m.proxies[:c.proxies] {
								m.generate(b, proxy)
							}
						}
						return (cpuTime(b) - before) / time.Duration(c.turn*c.proxies)
					}
				}
				compare(b, istiods)
			})
		}
	}
}

// compare alternates between an istiod with and one without the dialect, and reports the fastest turn of each. A turn spans many
// garbage collections: one more or less, of the memory that both istiods hold, must not matter.
func compare(b *testing.B, turns [2]func() time.Duration) {
	var least [2]time.Duration
	for n := 0; b.Loop(); n++ {
		for i := range turns {
			i = (i + n) % 2
			if took := turns[i](); least[i] == 0 || took < least[i] {
				least[i] = took
			}
		}
	}
	b.ReportMetric(float64(least[0].Nanoseconds()), "istiod-cpu-ns/push")
	b.ReportMetric(float64(least[1].Nanoseconds()), "dialect-cpu-ns/push")
	b.ReportMetric(100*(float64(least[1])/float64(least[0])-1), "added-%")
	b.ReportMetric(0, "ns/op") // one turn of each: meaningless
}

// cpuTime is the CPU time of this process, including garbage collection.
func cpuTime(b *testing.B) time.Duration {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
