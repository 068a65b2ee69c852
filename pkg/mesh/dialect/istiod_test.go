package dialect_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/pilot/pkg/features"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pilot/test/xds"
	"istio.io/istio/pilot/test/xdstest"
	"istio.io/istio/pkg/config/mesh"
	"istio.io/istio/pkg/test"
	"istio.io/istio/pkg/util/sets"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// scene is a mesh and one proxy in it. The resources come from Istio's real generators.
type scene struct {
	name    string
	configs []string
	proxy   *model.Proxy
	// objects is a file with additional Kubernetes objects.
	objects string
	// random is additional generated configuration.
	random []string
}

func proxyOf(typ model.NodeType, name, namespace, ip string, labels map[string]string) *model.Proxy {
	return &model.Proxy{
		Type: typ, ID: name + "." + namespace, ConfigNamespace: namespace, IPAddresses: []string{ip}, Labels: labels,
		Metadata: &model.NodeMetadata{
			IstioVersion: "1.31.0", Namespace: namespace, WorkloadName: name, Labels: labels, ClusterID: "Kubernetes",
			ServiceAccount: name,
		},
	}
}

func scenes() []scene {
	permissive, strict := slices.Clip([]string{"mesh.yaml"}), []string{"mesh.yaml", "strict.yaml"}
	a := func() *model.Proxy {
		return proxyOf(model.SidecarProxy, "a", "demo", "10.1.0.1", map[string]string{"app": "a", "version": "v1"})
	}
	b := func() *model.Proxy {
		return proxyOf(model.SidecarProxy, "b", "demo", "10.1.0.2", map[string]string{"app": "b", "version": "v1"})
	}
	hbone := b()
	hbone.Metadata.EnableHBONE = true
	return []scene{
		{name: "sidecar-client", configs: permissive, proxy: a()},
		{name: "sidecar-permissive", configs: permissive, proxy: b()},
		{name: "sidecar-strict", configs: append(strict, "peers.yaml"), proxy: b()},
		{name: "sidecar-hbone", configs: permissive, proxy: hbone},
		{name: "ingress", configs: permissive, proxy: proxyOf(model.Router, "ingress", "istio-system", "10.1.0.8",
			map[string]string{"app": "ingress", "istio": "ingressgateway"})},
		{name: "egress", configs: strict, proxy: proxyOf(model.Router, "egress", "istio-system", "10.1.0.9",
			map[string]string{"app": "egress", "istio": "egressgateway"})},
		{name: "sidecar-extensions", configs: append(permissive, "extensions.yaml"), proxy: b()},
		{name: "sidecar-telemetry", configs: append(permissive, "telemetry.yaml"), proxy: b()},
		{name: "ingress-telemetry", configs: append(permissive, "telemetry.yaml"), proxy: proxyOf(model.Router, "ingress", "istio-system", "10.1.0.8",
			map[string]string{"app": "ingress", "istio": "ingressgateway"})},
		{name: "gateway-api", configs: permissive, objects: "gateway-api.yaml",
			proxy: proxyOf(model.Router, "public-istio", "demo", "10.1.0.10", map[string]string{"gateway.networking.k8s.io/gateway-name": "public"})},
	}
}

// newIstiod starts istiod's discovery server with the scene's configuration, listening on a Unix socket.
func newIstiod(t testing.TB, s scene, extra ...string) (f *xds.FakeDiscoveryServer, socket string) {
	t.Helper()
	test.SetForTest(t, &features.EnableHBONESend, s.proxy.Metadata.EnableHBONE == true)
	test.SetForTest(t, &features.EnableSidecarHBONEListening, true)
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	configs := append(extra, s.random...)
	for _, name := range s.configs {
		configs = append(configs, read(name))
	}
	// Set by the charts (manifests/charts/istio-control/istio-discovery/files/profile-*.yaml), but not istiod's defaults.
	mc := mesh.DefaultMeshConfig()
	mc.DefaultProviders = &meshconfig.MeshConfig_DefaultProviders{Metrics: []string{"prometheus"}}
	mc.AccessLogFile = "/dev/stdout"
	mc.ExtensionProviders = append(mc.ExtensionProviders, &meshconfig.MeshConfig_ExtensionProvider{
		Name: "zipkin",
		Provider: &meshconfig.MeshConfig_ExtensionProvider_Zipkin{Zipkin: &meshconfig.MeshConfig_ExtensionProvider_ZipkinTracingProvider{
			Service: "zipkin.istio-system.svc.cluster.local", Port: 9411,
		}},
	})
	mc.ExtensionProviders = append(mc.ExtensionProviders, &meshconfig.MeshConfig_ExtensionProvider{
		Name: "peers",
		Provider: &meshconfig.MeshConfig_ExtensionProvider_EnvoyFileAccessLog{EnvoyFileAccessLog: &meshconfig.MeshConfig_ExtensionProvider_EnvoyFileAccessLogProvider{
			LogFormat: &meshconfig.MeshConfig_ExtensionProvider_EnvoyFileAccessLogProvider_LogFormat{
				LogFormat: &meshconfig.MeshConfig_ExtensionProvider_EnvoyFileAccessLogProvider_LogFormat_Text{
					Text: "%FILTER_STATE(downstream_peer_obj:FIELD:workload)% %FILTER_STATE(upstream_peer_obj:FIELD:workload)%\n",
				},
			},
		}},
	}, &meshconfig.MeshConfig_ExtensionProvider{
		Name: "otel",
		Provider: &meshconfig.MeshConfig_ExtensionProvider_EnvoyOtelAls{EnvoyOtelAls: &meshconfig.MeshConfig_ExtensionProvider_EnvoyOpenTelemetryLogProvider{
			Service: "zipkin.istio-system.svc.cluster.local", Port: 9411,
		}},
	})
	objects := read("services.yaml")
	if s.objects != "" {
		objects += "\n---\n" + read(s.objects)
	}
	socket = filepath.Join(socketDir(t), "ads")
	f = xds.NewFakeDiscoveryServer(t, xds.FakeOptions{
		MeshConfig:             mc,
		KubernetesObjectString: objects,
		ConfigString:           strings.Join(configs, "\n---\n"),
		ListenerBuilder:        func() (net.Listener, error) { return net.Listen("unix", socket) },
	})
	return f, socket
}

// wrap installs the dialect in an istiod.
func wrap(t testing.TB, f *xds.FakeDiscoveryServer) {
	t.Helper()
	translator := dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(f.Discovery.Env.EndpointIndex))
	if err := dialect.Wrap(f.Discovery, translator); err != nil {
		t.Fatal(err)
	}
}

// generate requests everything that an Envoy requests from istiod's generators, in Envoy's order.
func generate(t testing.TB, f *xds.FakeDiscoveryServer, proxy *model.Proxy) map[string]model.Resources {
	t.Helper()
	return generateAt(t, f, proxy, time.Time{})
}

// generateAt is generate for a push with a start time, without which istiod caches nothing.
func generateAt(t testing.TB, f *xds.FakeDiscoveryServer, proxy *model.Proxy, start time.Time) map[string]model.Resources {
	t.Helper()
	proxy = f.SetupProxy(proxy)
	out := map[string]model.Resources{}
	ask := func(typ string, names ...string) {
		res, _, err := f.Discovery.Generators[typ].Generate(proxy,
			&model.WatchedResource{TypeUrl: typ, ResourceNames: sets.New(names...)},
			&model.PushRequest{Push: f.PushContext(), Forced: true, Start: start})
		if err != nil {
			t.Fatalf("%s: %v", typ, err)
		}
		out[typ] = res
	}
	ask(v3.ClusterType)
	ask(v3.EndpointType, xdstest.ExtractEdsClusterNames(f.Clusters(proxy))...)
	ask(v3.ListenerType)
	ask(v3.RouteType, xdstest.ExtractRoutesFromListeners(f.Listeners(proxy))...)
	if extensions := extensionConfigs(t, out[v3.ListenerType]); len(extensions) > 0 {
		ask(v3.ExtensionConfigurationType, extensions...)
	}
	return out
}

// extensionConfigs returns the names that the HTTP filters of listeners request by ECDS.
func extensionConfigs(t testing.TB, listeners model.Resources) []string {
	t.Helper()
	names := sets.New[string]()
	for _, r := range listeners {
		l := &listener.Listener{}
		if err := r.Resource.UnmarshalTo(l); err != nil {
			t.Fatal(err)
		}
		for _, chain := range append(l.FilterChains, l.DefaultFilterChain) {
			for _, f := range chain.GetFilters() {
				m := &hcm.HttpConnectionManager{}
				if f.GetTypedConfig().MessageIs(m) && f.GetTypedConfig().UnmarshalTo(m) == nil {
					for _, filter := range m.HttpFilters {
						if filter.GetConfigDiscovery() != nil {
							names.Insert(filter.Name)
						}
					}
				}
			}
		}
	}
	return names.UnsortedList()
}

var generatedTypes = []string{v3.ListenerType, v3.ClusterType, v3.RouteType, v3.EndpointType, v3.ExtensionConfigurationType}

func byName(rs model.Resources) map[string]*discovery.Resource {
	out := map[string]*discovery.Resource{}
	for _, r := range rs {
		out[r.Name] = r
	}
	return out
}
