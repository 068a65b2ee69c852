package dialect_test

import (
	"fmt"
	"maps"
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
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/util/sets"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// manyServices are services with two endpoints each.
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
	return b.String()
}

// BenchmarkPush makes and encodes everything that one sidecar gets in a full push, in a mesh of 1,000 services: as Istio
// makes it, and translated. Both take turns in one run, with the settings that Polymesh gives istiod, so that a noisy machine
// is noisy for both. It reports the CPU time of a push, of the quickest turn of each: "cached" when nothing has changed since
// the last push, "changed" when istiod and the dialect know nothing of what they made before; "http" with HTTP services,
// which share listeners, and "tcp" with TCP services, each of which has a listener of its own. "mesh" is "changed" for ten
// sidecars, which share what istiod caches.
func BenchmarkPush(b *testing.B) {
	for _, scope := range log.Scopes() {
		scope.SetOutputLevel(log.NoneLevel)
	}
	exchange := features.MetadataExchange
	b.Cleanup(func() { features.MetadataExchange = exchange })
	features.MetadataExchange = dialect.IstiodEnv()["PILOT_ENABLE_METADATA_EXCHANGE"] != "false"
	meshConfig := mesh.DefaultMeshConfig()
	meshConfig.DefaultProviders = &meshconfig.MeshConfig_DefaultProviders{Metrics: []string{"prometheus"}}
	for _, protocol := range []string{"http", "tcp"} {
		f := xds.NewFakeDiscoveryServer(b, xds.FakeOptions{MeshConfig: meshConfig, ConfigString: manyServices(1000, protocol)})
		proxies := make([]*model.Proxy, 10)
		for i := range proxies {
			name := fmt.Sprintf("a%d", i)
			proxies[i] = f.SetupProxy(proxyOf(model.SidecarProxy, name, "demo", fmt.Sprintf("10.1.0.%d", i+1), map[string]string{"app": name, "version": "v1"}))
		}
		proxy := proxies[0]
		names := map[string][]string{
			v3.ClusterType: nil, v3.ListenerType: nil,
			v3.EndpointType: xdstest.ExtractEdsClusterNames(f.Clusters(proxy)),
			v3.RouteType:    xdstest.ExtractRoutesFromListeners(f.Listeners(proxy)),
		}
		istiod := maps.Clone(f.Discovery.Generators)
		translated := func() map[string]model.XdsResourceGenerator {
			generators := maps.Clone(istiod)
			dialect.Wrap(generators, dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(f.Discovery.Env.EndpointIndex)))
			return generators
		}
		push := func(proxy *model.Proxy, generators map[string]model.XdsResourceGenerator) {
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
		for _, c := range []struct {
			name    string
			changed bool
			turns   int
			proxies []*model.Proxy
		}{{"cached", false, 50, proxies[:1]}, {"changed", true, 10, proxies[:1]}, {"mesh", true, 3, proxies}} {
			b.Run(protocol+"/"+c.name, func(b *testing.B) {
				// A turn is long enough to pay for its own garbage.
				turn := func(generators func() map[string]model.XdsResourceGenerator) time.Duration {
					made := make([]map[string]model.XdsResourceGenerator, c.turns)
					for i := range made {
						if made[i] = made[0]; c.changed || i == 0 {
							made[i] = generators()
						}
					}
					push(proxy, made[0])
					runtime.GC()
					before := cpuTime(b)
					for _, g := range made {
						if c.changed {
							f.Discovery.Cache.ClearAll()
						}
						for _, p := range c.proxies {
							push(p, g)
						}
					}
					return (cpuTime(b) - before) / time.Duration(c.turns*len(c.proxies))
				}
				least := map[string]time.Duration{}
				for b.Loop() {
					for who, generators := range map[string]func() map[string]model.XdsResourceGenerator{
						"istiod": func() map[string]model.XdsResourceGenerator { return istiod }, "dialect": translated,
					} {
						if took := turn(generators); least[who] == 0 || took < least[who] {
							least[who] = took
						}
					}
				}
				b.ReportMetric(float64(least["istiod"].Nanoseconds()), "istiod-cpu-ns/push")
				b.ReportMetric(float64(least["dialect"].Nanoseconds()), "dialect-cpu-ns/push")
				b.ReportMetric(100*(float64(least["dialect"])/float64(least["istiod"])-1), "added-%")
				b.ReportMetric(0, "ns/op") // a turn of each; says nothing
			})
		}
	}
}

// cpuTime is what this process has used of all processors, its garbage collection too.
func cpuTime(b *testing.B) time.Duration {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
