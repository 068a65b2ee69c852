package dialect_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	logdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	fileaccesslog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"istio.io/api/envoy/extensions/stats"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pkg/monitoring/monitortest"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// planted is a type that no Envoy supports.
const planted = "polymesh.test.NotInAnyEnvoy"

func plantedAny() *anypb.Any { return &anypb.Any{TypeUrl: "type.googleapis.com/" + planted} }

func toAny(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// httpListener returns a listener with an HTTP connection manager and the given filters before the router.
func httpListener(t *testing.T, logs []*accesslog.AccessLog, filters ...*hcm.HttpFilter) *anypb.Any {
	t.Helper()
	filters = append(filters, &hcm.HttpFilter{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: toAny(t, &router.Router{})}})
	return toAny(t, &listener.Listener{Name: "l", FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
		Name: "hcm",
		ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, &hcm.HttpConnectionManager{
			StatPrefix: "x", HttpFilters: filters, AccessLog: logs,
		})},
	}}}}})
}

// firstFilter translates a listener, and decodes the first HTTP filter of the result.
func firstFilter(t *testing.T, in *anypb.Any, filter proto.Message) {
	t.Helper()
	got := dialect.NewTranslator(dialect.ShippedEnvoy(), nil).Resource(in)
	if got.Refused != nil {
		t.Fatal(got.Refused)
	}
	l := &listener.Listener{}
	if err := got.Resource.UnmarshalTo(l); err != nil {
		t.Fatal(err)
	}
	if err := l.FilterChains[0].Filters[0].GetTypedConfig().UnmarshalTo(filter); err != nil {
		t.Fatal(err)
	}
}

func typedStruct(t *testing.T, url string) *anypb.Any {
	return toAny(t, &udpa.TypedStruct{TypeUrl: url, Value: &structpb.Struct{}})
}

// TestPlantedUnknownType plants an unsupported type in extension positions of all kinds. Each is found, and none is
// dropped where that could weaken security.
func TestPlantedUnknownType(t *testing.T) {
	filter := func(a *anypb.Any, optional bool) *hcm.HttpFilter {
		return &hcm.HttpFilter{Name: "planted", IsOptional: optional, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: a}}
	}
	for _, c := range []struct {
		name    string
		in      *anypb.Any
		refused bool
	}{
		{"HTTP filter", httpListener(t, nil, filter(plantedAny(), false)), true},
		{"HTTP filter as TypedStruct", httpListener(t, nil, filter(typedStruct(t, "type.googleapis.com/"+planted), false)), true},
		{"optional HTTP filter", httpListener(t, nil, filter(plantedAny(), true)), false},
		{"access logger", httpListener(t, []*accesslog.AccessLog{{
			Name: "planted", ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: plantedAny()},
		}}), false},
		{"network filter", toAny(t, &listener.Listener{FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "planted", ConfigType: &listener.Filter_TypedConfig{TypedConfig: plantedAny()},
		}}}}}), true},
		{"transport socket", toAny(t, &cluster.Cluster{TransportSocket: &core.TransportSocket{
			Name: "planted", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: plantedAny()},
		}}), true},
		{"protocol options", toAny(t, &cluster.Cluster{TypedExtensionProtocolOptions: map[string]*anypb.Any{"planted": plantedAny()}}), true},
		{"ECDS", toAny(t, &core.TypedExtensionConfig{Name: "planted", TypedConfig: plantedAny()}), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := dialect.NewTranslator(dialect.ShippedEnvoy(), nil).Resource(c.in)
			if !slices.Contains(got.Unknown, planted) {
				t.Errorf("unknown types: %v", got.Unknown)
			}
			if c.refused != (got.Refused != nil) {
				t.Errorf("refused: %v", got.Refused)
			}
			if still := strings.Contains(string(got.Resource.Value), planted); still != c.refused {
				t.Errorf("the planted extension is in the result: %v", still)
			}
			if c.refused && got.Resource != c.in {
				t.Error("a refused resource was changed")
			}
		})
	}
}

// TestIdentity: a resource without private extensions is returned as the same object, and translation is idempotent.
func TestIdentity(t *testing.T) {
	tr := dialect.NewTranslator(dialect.ShippedEnvoy(), nil)
	plain := toAny(t, &listener.Listener{Name: "l", FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
		Name: "router", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, &router.Router{})},
	}}}}})
	if got := tr.Resource(plain); got.Resource != plain || got.Refused != nil || got.Unknown != nil {
		t.Errorf("a resource of upstream types only was changed: %+v", got)
	}
	for _, s := range scenes() {
		f, _ := newIstiod(t, s)
		before := generate(t, f, s.proxy)
		for typ, resources := range before {
			for _, r := range resources {
				copied := proto.Clone(r.Resource)
				once := tr.Resource(r.Resource)
				if once.Refused != nil || once.Unknown != nil {
					t.Errorf("%s %s: %v %v", s.name, r.Name, once.Unknown, once.Refused)
				}
				if !proto.Equal(copied, r.Resource) {
					t.Errorf("%s %s: the generated resource was modified", s.name, r.Name)
				}
				twice := tr.Resource(once.Resource)
				if !proto.Equal(once.Resource, twice.Resource) {
					t.Errorf("%s %s %s: translating twice is not translating once", s.name, typ, r.Name)
				}
			}
		}
	}
}

// TestEveryAnyIsSeen: after translation, no generated resource contains a type that Envoy does not support. The search is by
// bytes, so it does not depend on the walk.
func TestEveryAnyIsSeen(t *testing.T) {
	private := []string{
		"stats.PluginConfig", "istio.envoy.config", "io.istio.http.peer_metadata", "tcp.metadataexchange",
		"network_filters.peer_metadata", "istio.hashable_string",
	}
	for _, s := range scenes() {
		f, _ := newIstiod(t, s)
		seen := ""
		for _, resources := range generate(t, f, s.proxy) {
			for _, r := range resources {
				seen += string(r.Resource.Value)
			}
		}
		wrap(t, f)
		for typ, resources := range generate(t, f, s.proxy) {
			for _, r := range resources {
				for _, p := range private {
					if strings.Contains(string(r.Resource.Value), p) {
						t.Errorf("%s: %s %s still has %s", s.name, typ, r.Name, p)
					}
				}
			}
		}
		if !slices.ContainsFunc(private, func(p string) bool { return strings.Contains(seen, p) }) {
			t.Errorf("%s: Istio generated no private extension, so this test proves nothing", s.name)
		}
	}
}

// fixed is a generator with fixed output; fixedDelta also supports deltas.
type fixed struct {
	resources model.Resources
	err       error
}

func (f *fixed) Generate(*model.Proxy, *model.WatchedResource, *model.PushRequest) (model.Resources, model.XdsLogDetails, error) {
	return f.resources, model.XdsLogDetails{Incremental: true, AdditionalInfo: "info"}, f.err
}

type fixedDelta struct{ fixed }

func (f *fixedDelta) GenerateDeltas(*model.Proxy, *model.PushRequest, *model.WatchedResource) (
	model.Resources, model.DeletedResources, model.XdsLogDetails, bool, error,
) {
	return f.resources, model.DeletedResources{"gone"}, model.XdsLogDetails{AdditionalInfo: "info"}, true, f.err
}

func TestWrap(t *testing.T) {
	metrics := monitortest.New(t)
	failed := errors.New("failed")
	listenerWith := func(optional bool) *anypb.Any {
		return httpListener(t, nil, &hcm.HttpFilter{
			Name: "planted", IsOptional: optional, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: plantedAny()},
		})
	}
	made := &discovery.Resource{Name: "l", Version: "7", Resource: listenerWith(true)}
	f, _ := newIstiod(t, scenes()[0])
	gens := f.Discovery.Generators
	gens[v3.ListenerType] = &fixed{}
	gens[v3.ExtensionConfigurationType] = &fixedDelta{fixed{resources: model.Resources{made}}}
	secrets := gens[v3.SecretType]
	wrap(t, f)

	if res, details, err := gens[v3.ListenerType].Generate(nil, nil, nil); res != nil || err != nil || !details.Incremental {
		t.Errorf("nil became %v, %v, %v", res, details, err)
	}
	if _, ok := gens[v3.ListenerType].(model.XdsDeltaResourceGenerator); ok {
		t.Error("a generator without deltas supports them now")
	}
	d, ok := gens[v3.ExtensionConfigurationType].(model.XdsDeltaResourceGenerator)
	if !ok {
		t.Fatal("a generator with deltas lost them")
	}
	for range 2 {
		res, removed, details, used, err := d.GenerateDeltas(nil, nil, nil)
		if len(res) != 1 || res[0].Name != "l" || res[0].Version != "7" || strings.Contains(string(res[0].Resource.Value), planted) {
			t.Errorf("not translated: %v", res)
		}
		if !slices.Equal(removed, model.DeletedResources{"gone"}) || details.AdditionalInfo != "info" || !used || err != nil {
			t.Errorf("not passed through: %v %v %v %v", removed, details, used, err)
		}
	}
	if gens[v3.SecretType] != secrets {
		t.Error("the generator for secrets was wrapped")
	}

	f, _ = newIstiod(t, scenes()[0])
	gens = f.Discovery.Generators
	gens[v3.ListenerType] = &fixed{resources: model.Resources{{Name: "refused", Resource: listenerWith(false)}}}
	gens[v3.ExtensionConfigurationType] = &fixed{resources: model.Resources{}, err: failed}
	wrap(t, f)
	if res, _, err := gens[v3.ListenerType].Generate(nil, nil, nil); len(res) != 1 || err != nil {
		t.Errorf("a refused resource must be sent, for Envoy to reject: %v %v", res, err)
	}
	if res, _, err := gens[v3.ExtensionConfigurationType].Generate(nil, nil, nil); res == nil || len(res) != 0 || !errors.Is(err, failed) {
		t.Errorf("an empty list became %v, %v", res, err)
	}
	metrics.Assert("polymesh_dialect_refused_resources_total", map[string]string{"resource_type": "envoy.config.listener.v3.Listener"},
		monitortest.AtLeast(1))
	metrics.Assert("polymesh_dialect_unknown_types_total", map[string]string{"type": planted}, monitortest.AtLeast(1))

	gens[v3.EndpointType] = &fixed{}
	if err := dialect.Wrap(f.Discovery, dialect.NewTranslator(dialect.ShippedEnvoy(), nil)); err == nil {
		t.Error("a generator with an inaccessible cache was accepted")
	}
}

// TestTypedMetadataStays: Envoy ignores unsupported types in typed metadata, and so does the dialect.
func TestTypedMetadataStays(t *testing.T) {
	in := toAny(t, &cluster.Cluster{Name: "c", Metadata: &core.Metadata{TypedFilterMetadata: map[string]*anypb.Any{
		"planted": plantedAny(), "known": toAny(t, wrapperspb.String("x")),
	}}})
	got := dialect.NewTranslator(dialect.ShippedEnvoy(), nil).Resource(in)
	if got.Resource != in || got.Unknown != nil || got.Refused != nil {
		t.Errorf("%+v", got)
	}
}

// TestOwnIntervals: a tcp_proxy with its own flush interval keeps it, and its loggers keep logging at it.
func TestOwnIntervals(t *testing.T) {
	const own = 3 * time.Second
	in := toAny(t, &listener.Listener{FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{
		{Name: "stats", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, &stats.PluginConfig{})}},
		{Name: "tcp", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, &tcp.TcpProxy{
			AccessLogOptions: &tcp.TcpProxy_TcpAccessLogOptions{AccessLogFlushInterval: durationpb.New(own)},
			AccessLog: []*accesslog.AccessLog{{Name: "file", ConfigType: &accesslog.AccessLog_TypedConfig{
				TypedConfig: toAny(t, &fileaccesslog.FileAccessLog{Path: "/dev/stdout"}),
			}}},
		})}},
	}}}})
	proxy := &tcp.TcpProxy{}
	firstFilter(t, in, proxy)
	if every := proxy.AccessLogOptions.AccessLogFlushInterval.AsDuration(); every != own || !proxy.AccessLogOptions.FlushAccessLogOnConnected {
		t.Errorf("it logs every %s, and when connected: %v", every, proxy.AccessLogOptions.FlushAccessLogOnConnected)
	}
	if len(proxy.AccessLog) != 2 {
		t.Fatalf("%d loggers", len(proxy.AccessLog))
	}
	quiet := proxy.AccessLog[0].Filter.GetLogTypeFilter()
	if !quiet.GetExclude() || !slices.Equal(quiet.Types, []logdata.AccessLogType{logdata.AccessLogType_TcpUpstreamConnected}) {
		t.Errorf("its own logger has the filter %v", proxy.AccessLog[0].Filter)
	}
}
