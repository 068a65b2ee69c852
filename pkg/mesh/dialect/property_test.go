package dialect_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	xdstype "github.com/cncf/xds/go/xds/type/v3"
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	logdata "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	celfilter "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	otellog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	statslog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httpstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	tracing "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	otlp "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// workloadOfNames matches Istio's value for an endpoint's workload if all its parts can be names.
var workloadOfNames = regexp.MustCompile(`^(([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?;){4}([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$`)

// differences are all permitted effects of a translation. Each removes its part from one message, before and after the
// translation; the rest must be equal. They work on decoded messages, independently of the dialect's code.
var differences = map[string]func(proto.Message){
	"clusters and endpoints have metadata of the dialect's": func(m proto.Message) {
		without := func(md **core.Metadata) {
			if *md == nil {
				return
			}
			delete((*md).FilterMetadata, "polymesh")
			if proto.Size(*md) == 0 {
				*md = nil
			}
		}
		switch m := m.(type) {
		case *cluster.Cluster:
			without(&m.Metadata)
		case *endpoint.LbEndpoint:
			without(&m.Metadata)
		}
	},
	"an endpoint's workload consists of names, or is removed": func(m proto.Message) {
		if m, ok := m.(*endpoint.LbEndpoint); ok {
			workload, ok := m.GetMetadata().GetFilterMetadata()["istio"].GetFields()["workload"].GetKind().(*structpb.Value_StringValue)
			if ok && !workloadOfNames.MatchString(workload.StringValue) {
				workload.StringValue = ""
			}
		}
	},
	"chains that ask for the mesh's certificates close connections of callers with several identities": func(m proto.Message) {
		if m, ok := m.(*listener.FilterChain); ok && len(m.Filters) > 0 && m.Filters[0].Name == "polymesh.identity" {
			m.Filters = m.Filters[1:]
		}
	},
	"TLS contexts do not offer the peer exchange": func(m proto.Message) {
		if m, ok := m.(*tls.CommonTlsContext); ok {
			m.AlpnProtocols = slices.DeleteFunc(m.AlpnProtocols, func(p string) bool { return p == "istio-peer-exchange" })
		}
	},
	"hashable strings have upstream's factory": func(m proto.Message) {
		if m, ok := m.(*setstate.FilterStateValue); ok && m.FactoryKey == "istio.hashable_string" {
			m.FactoryKey = "envoy.hashable_string"
		}
	},
	"the headers of the peer exchange are removed first": func(m proto.Message) {
		if m, ok := m.(*hcm.HttpConnectionManager); ok && len(m.HttpFilters) > 0 && m.HttpFilters[0].Name == "polymesh.peer_metadata" {
			m.HttpFilters = m.HttpFilters[1:]
		}
	},
	"metrics are loggers": func(m proto.Message) {
		metrics := func(l *accesslog.AccessLog) bool {
			config, connections := &statslog.Config{}, &otellog.OpenTelemetryAccessLogConfig{}
			return l.Name == "envoy.access_loggers.stats" && l.GetTypedConfig().MessageIs(config) &&
				l.GetTypedConfig().UnmarshalTo(config) == nil && strings.HasPrefix(config.StatsScope.GetSharingName(), "istio") ||
				l.Name == "istio.tcp" && l.GetTypedConfig().MessageIs(connections) &&
					l.GetTypedConfig().UnmarshalTo(connections) == nil && connections.HttpService.GetHttpUri().GetCluster() == "prometheus_stats"
		}
		switch m := m.(type) {
		case *hcm.HttpConnectionManager:
			m.AccessLog = slices.DeleteFunc(m.AccessLog, metrics)
		case *tcp.TcpProxy:
			m.AccessLog = slices.DeleteFunc(m.AccessLog, metrics)
		}
	},
	"tags and formats read the peer from another place": func(m proto.Message) {
		about := func(text string) bool {
			return strings.Contains(text, "stream_peer") || strings.Contains(text, `filter_metadata["polymesh"]`) ||
				strings.Contains(text, `upstream_host_metadata.filter_metadata["istio"].workload`)
		}
		level := func(text string) string {
			if !about(text) {
				return text
			}
			return formatCommand.ReplaceAllString(text, "%OTHER%")
		}
		switch m := m.(type) {
		case *hcm.HttpConnectionManager:
			m.HttpFilters = slices.DeleteFunc(m.HttpFilters, func(f *hcm.HttpFilter) bool { return f.Name == "polymesh.caller" })
		case *tracing.CustomTag:
			if value, ok := m.Type.(*tracing.CustomTag_Value); ok {
				value.Value = level(value.Value)
			}
		case *core.SubstitutionFormatString:
			if text, ok := m.GetTextFormatSource().GetSpecifier().(*core.DataSource_InlineString); ok {
				text.InlineString = level(text.InlineString)
			}
			levelTexts(m.GetJsonFormat().GetFields(), level)
		case *otlp.AnyValue:
			if value, ok := m.Value.(*otlp.AnyValue_StringValue); ok {
				value.StringValue = level(value.StringValue)
			}
		case *celfilter.ExpressionFilter:
			if about(m.Expression) {
				m.Expression = "about the peer"
			}
		}
	},
	"tcp_proxy logs also when connected and in between, and connects after the handshake": func(m proto.Message) {
		proxy, ok := m.(*tcp.TcpProxy)
		if !ok {
			return
		}
		if proxy.AccessLogOptions != nil {
			proxy.AccessLogOptions.FlushAccessLogOnConnected = false
			proxy.AccessLogOptions.AccessLogFlushInterval = nil // an existing interval stays: TestOwnIntervals
			if proto.Size(proxy.AccessLogOptions) == 0 {
				proxy.AccessLogOptions = nil
			}
		}
		if proxy.UpstreamConnectMode == tcp.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE {
			proxy.UpstreamConnectMode = tcp.UpstreamConnectMode_IMMEDIATE
		}
		if proxy.MaxEarlyDataBytes.GetValue() == 0 {
			proxy.MaxEarlyDataBytes = nil
		}
		quiet := func(f *accesslog.AccessLogFilter) bool {
			types := f.GetLogTypeFilter()
			return types.GetExclude() && len(types.Types) > 0 && !slices.ContainsFunc(types.Types, func(t logdata.AccessLogType) bool {
				return t != logdata.AccessLogType_TcpUpstreamConnected && t != logdata.AccessLogType_TcpPeriodic
			})
		}
		for _, l := range proxy.AccessLog {
			if both := l.Filter.GetAndFilter(); both != nil && len(both.Filters) == 2 && quiet(both.Filters[1]) {
				l.Filter = both.Filters[0]
			} else if quiet(l.Filter) {
				l.Filter = nil
			}
		}
	},
	"istio.alpn is set_filter_state": func(m proto.Message) {
		a, ok := m.(*anypb.Any)
		if !ok {
			return
		}
		state := &httpstate.Config{}
		if a.MessageIs(state) && a.UnmarshalTo(state) == nil && len(state.OnRequestHeaders) == 1 &&
			state.OnRequestHeaders[0].GetObjectKey() == "envoy.network.application_protocols" ||
			typeOf(a) == "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig" {
			a.TypeUrl, a.Value = "the ALPN of requests", nil
		}
	},
}

// formatCommand matches the commands in a format string.
var formatCommand = regexp.MustCompile(`%(?:FILTER_STATE|CEL)\(.*?\)(?::\d+)?%`)

func levelTexts(fields map[string]*structpb.Value, level func(string) string) {
	for _, v := range fields {
		switch kind := v.Kind.(type) {
		case *structpb.Value_StringValue:
			kind.StringValue = level(kind.StringValue)
		case *structpb.Value_StructValue:
			levelTexts(kind.StructValue.GetFields(), level)
		}
	}
}

// removedExtensions are the extensions that upstream Envoy lacks; the message that holds one is dropped.
var removedExtensions = []string{
	"stats.PluginConfig", "io.istio.http.peer_metadata.Config", "envoy.tcp.metadataexchange.config.MetadataExchange",
	"envoy.extensions.network_filters.peer_metadata.Config", "envoy.extensions.network_filters.peer_metadata.UpstreamConfig",
}

// typeOf is the type of an Any, or of the TypedStruct in it.
func typeOf(a *anypb.Any) string {
	url := a.TypeUrl
	if m, err := a.UnmarshalNew(); err == nil {
		switch m := m.(type) {
		case *udpa.TypedStruct:
			url = m.TypeUrl
		case *xdstype.TypedStruct:
			url = m.TypeUrl
		}
	}
	return url[strings.LastIndexByte(url, '/')+1:]
}

// leveller removes the permitted differences from a message and everything in it.
type leveller struct {
	known map[string]bool
	// malformed is set if an extension cannot be parsed: Envoy rejects it either way.
	malformed bool
}

func newLeveller() *leveller {
	known := map[string]bool{}
	for name := range dialect.ShippedEnvoy() {
		known[name] = true
	}
	// Extensions that Envoy finds by name.
	for _, name := range []string{
		"google.protobuf.Struct", "google.protobuf.StringValue", "google.protobuf.BoolValue", "google.protobuf.UInt32Value",
		"envoy.config.route.v3.FilterConfig", "envoy.config.core.v3.TypedExtensionConfig",
		"envoy.extensions.matching.actions.transform_stat.v3.TransformStat",
		"istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig",
	} {
		known[name] = true
	}
	return &leveller{known: known}
}

func (l *leveller) level(t testing.TB, a *anypb.Any) proto.Message {
	t.Helper()
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatalf("%s: %v", a.TypeUrl, err)
	}
	l.message(m.ProtoReflect())
	return m
}

// message reports whether the message is dropped with its extension.
func (l *leveller) message(m protoreflect.Message) (gone bool) {
	for _, take := range differences {
		take(m.Interface())
	}
	if m.Descriptor().FullName() == "envoy.config.core.v3.Metadata" {
		return false // plain data
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.Message() == nil || fd.IsMap() && fd.MapValue().Message() == nil:
		case fd.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, el protoreflect.Value) bool {
				if l.value(m, el.Message()) {
					v.Map().Clear(k)
				}
				return true
			})
			if v.Map().Len() == 0 {
				m.Clear(fd)
			}
		case fd.IsList():
			kept := 0
			for i := range v.List().Len() {
				if el := v.List().Get(i); !l.value(m, el.Message()) {
					v.List().Set(kept, el)
					kept++
				}
			}
			v.List().Truncate(kept)
		default:
			gone = l.value(m, v.Message()) || gone
		}
		return true
	})
	return gone
}

func (l *leveller) value(holder, m protoreflect.Message) (gone bool) {
	a, ok := m.Interface().(*anypb.Any)
	if !ok {
		return l.message(m)
	}
	a.ProtoReflect().SetUnknown(nil) // meaningless besides type and value
	name := typeOf(a)
	if slices.Contains(removedExtensions, name) {
		return true
	}
	if !l.known[name] {
		switch h := holder.Interface().(type) {
		case *accesslog.AccessLog:
			return true
		case *hcm.HttpFilter:
			return h.IsOptional
		case *route.FilterConfig:
			return h.IsOptional
		}
	}
	inner, err := a.UnmarshalNew()
	if err != nil {
		l.malformed = l.malformed || !errors.Is(err, protoregistry.NotFound)
		return false
	}
	// A translated TypedStruct is written as the message that it stands for.
	var structured *structpb.Struct
	switch ts := inner.(type) {
	case *udpa.TypedStruct:
		structured = ts.Value
	case *xdstype.TypedStruct:
		structured = ts.Value
	}
	if structured != nil {
		typ, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
		if err != nil {
			return false
		}
		js, err := protojson.Marshal(structured)
		if err != nil {
			return false
		}
		if inner = typ.New().Interface(); protojson.Unmarshal(js, inner) != nil {
			return false
		}
	}
	gone = l.message(inner.ProtoReflect())
	if packed, err := (proto.MarshalOptions{Deterministic: true}).Marshal(inner); err == nil {
		a.TypeUrl, a.Value = "type.googleapis.com/"+name, packed
	}
	differences["istio.alpn is set_filter_state"](a)
	return gone
}

// checkTranslation translates a resource and verifies that nothing but the permitted differences changed.
func checkTranslation(t testing.TB, tr *dialect.Translator, l *leveller, in *anypb.Any) dialect.Result {
	t.Helper()
	bytesBefore := bytes.Clone(in.Value)
	got := tr.Resource(in)
	if !bytes.Equal(bytesBefore, in.Value) {
		t.Error("the resource was written to")
	}
	if got.Refused != nil && got.Resource != in {
		t.Errorf("refused (%v) and changed", got.Refused)
	}
	if got.Resource == in {
		return got
	}
	l.malformed = false
	before, after := l.level(t, in), l.level(t, got.Resource)
	if l.malformed {
		return got
	}
	if !proto.Equal(before, after) {
		t.Errorf("an unexpected change:\nbefore: %s\nafter:  %s", prototext.Format(before), prototext.Format(after))
	}
	if again := tr.Resource(got.Resource); again.Refused != nil || !bytes.Equal(again.Resource.Value, got.Resource.Value) {
		t.Errorf("translating twice is not translating once: %v", again.Refused)
	}
	return got
}

// TestNothingElseChanges: resources that istiod generates for the scenes and for meshes of random services and policies, and
// resources of all kinds with random contents, change only as documented.
func TestNothingElseChanges(t *testing.T) {
	l := newLeveller()
	tr := dialect.NewTranslator(dialect.ShippedEnvoy(), nil)
	all := scenes()
	for seed := range uint64(3) {
		s := scenes()[seed]
		s.name, s.configs = fmt.Sprintf("random mesh %d", seed), nil
		s.random = randomMesh(rand.New(rand.NewPCG(seed, 0)))
		all = append(all, s)
	}
	for _, s := range all {
		t.Run(s.name, func(t *testing.T) {
			f, _ := newIstiod(t, s)
			changed := 0
			for typ, resources := range generate(t, f, s.proxy) {
				for _, r := range resources {
					got := checkTranslation(t, tr, l, r.Resource)
					if l.malformed {
						t.Errorf("%s %s cannot be parsed", typ, r.Name)
					}
					if got.Refused != nil {
						t.Errorf("%s %s: %v", typ, r.Name, got.Refused)
					}
					if got.Resource != r.Resource {
						changed++
					}
				}
			}
			if changed == 0 {
				t.Error("nothing was translated, so this test proves nothing")
			}
		})
	}
	for _, m := range []proto.Message{
		&listener.Listener{}, &cluster.Cluster{}, &route.RouteConfiguration{}, &endpoint.ClusterLoadAssignment{}, &core.TypedExtensionConfig{},
	} {
		name := m.ProtoReflect().Descriptor().Name()
		t.Run("random "+string(name), func(t *testing.T) {
			changed, refused := 0, 0
			const many = 200
			for seed := range uint64(many) {
				in := toAny(t, (&filler{rand.New(rand.NewPCG(seed, 1))}).fill(m))
				got := checkTranslation(t, tr, l, in)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
				if got.Refused != nil {
					refused++
				} else if got.Resource != in {
					changed++
				}
			}
			t.Logf("%d translated, %d refused, of %d", changed, refused, many)
			if changed == 0 {
				t.Error("nothing was translated, so this test proves nothing")
			}
		})
	}
}

// randomMesh returns a random configuration of services, destination rules and policies.
func randomMesh(r *rand.Rand) []string {
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	var configs []string
	for i := range 12 {
		configs = append(configs, fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: r%[1]d, namespace: demo}
spec:
  hosts: [r%[1]d.example.com]
  addresses: [10.7.0.%[2]d]
  location: %[3]s
  resolution: %[4]s
  ports: [{number: %[5]d, name: p, protocol: %[6]s}]
  endpoints: [{address: 10.7.1.%[2]d, labels: {app: r%[1]d, security.istio.io/tlsMode: %[7]s}}]
`, i, i+1, pick("MESH_INTERNAL", "MESH_EXTERNAL"), pick("STATIC", "DNS"), 1000+r.IntN(20),
			pick("HTTP", "HTTP2", "GRPC", "TCP", "TLS", "HTTPS", "MONGO", `""`), pick("istio", "disabled")))
		if r.IntN(2) == 0 {
			configs = append(configs, fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r%[1]d, namespace: demo}
spec:
  host: r%[1]d.example.com
  trafficPolicy:
    tls: {mode: %[2]s}
    loadBalancer: {simple: %[3]s}
`, i, pick("DISABLE", "SIMPLE", "ISTIO_MUTUAL"), pick("ROUND_ROBIN", "LEAST_REQUEST", "RANDOM")))
		}
	}
	return append(configs, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: random, namespace: demo}
spec: {mtls: {mode: %s}}
`, pick("STRICT", "PERMISSIVE", "DISABLE")))
}

// filler fills messages with random values.
type filler struct {
	*rand.Rand
}

func (f *filler) fill(like proto.Message) proto.Message {
	m := like.ProtoReflect().New()
	f.message(m, 6)
	return m.Interface()
}

func (f *filler) message(m protoreflect.Message, depth int) {
	if md, ok := m.Interface().(*core.Metadata); ok && f.IntN(3) > 0 {
		// As istiod describes clusters and endpoints.
		described, err := structpb.NewStruct(map[string]any{
			"workload": "a;demo;a;v1;Kubernetes", "services": []any{map[string]any{"host": "a.demo.svc", "namespace": "demo"}},
		})
		if err == nil {
			md.FilterMetadata = map[string]*structpb.Struct{"istio": described, "x": {}}
			return
		}
	}
	for i := range m.Descriptor().Fields().Len() {
		fd := m.Descriptor().Fields().Get(i)
		if f.IntN(5) > 2 || depth == 0 && fd.Message() != nil {
			continue
		}
		switch {
		case fd.IsMap():
			v := m.NewField(fd)
			k := f.scalar(fd.MapKey()).MapKey()
			if fd.MapValue().Message() != nil {
				el := v.Map().NewValue()
				f.value(m.Descriptor(), el.Message(), depth-1)
				v.Map().Set(k, el)
			} else {
				v.Map().Set(k, f.scalar(fd.MapValue()))
			}
			m.Set(fd, v)
		case fd.IsList():
			v := m.NewField(fd)
			for range 1 + f.IntN(3) {
				if fd.Message() != nil {
					el := v.List().NewElement()
					f.value(m.Descriptor(), el.Message(), depth-1)
					v.List().Append(el)
				} else {
					v.List().Append(f.scalar(fd))
				}
			}
			m.Set(fd, v)
		case fd.Message() != nil:
			v := m.NewField(fd)
			f.value(m.Descriptor(), v.Message(), depth-1)
			m.Set(fd, v)
		default:
			m.Set(fd, f.scalar(fd))
		}
	}
}

func (f *filler) value(holder protoreflect.MessageDescriptor, m protoreflect.Message, depth int) {
	a, ok := m.Interface().(*anypb.Any)
	if !ok {
		f.message(m, depth)
		return
	}
	// Usually a realistic value, sometimes any.
	names := map[protoreflect.FullName][]string{
		"envoy.config.listener.v3.Filter": {
			"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", "stats.PluginConfig",
			"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "envoy.tcp.metadataexchange.config.MetadataExchange",
		},
		"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter": {
			"istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig", "stats.PluginConfig", "io.istio.http.peer_metadata.Config",
			"envoy.extensions.filters.http.router.v3.Router", "envoy.extensions.filters.http.set_filter_state.v3.Config",
		},
		"envoy.config.core.v3.TransportSocket": {"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"},
	}[holder.FullName()]
	if len(names) == 0 || f.IntN(8) == 0 {
		names = []string{
			"envoy.extensions.filters.http.set_filter_state.v3.Config", "envoy.config.route.v3.FilterConfig",
			"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", "envoy.extensions.access_loggers.file.v3.FileAccessLog",
			"envoy.extensions.filters.http.composite.v3.Composite", "google.protobuf.StringValue",
		}
		if f.IntN(10) == 0 {
			names = []string{planted}
		}
	}
	name := names[f.IntN(len(names))]
	a.TypeUrl = "type.googleapis.com/" + name
	typ, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		return
	}
	inner := typ.New()
	f.message(inner, max(0, min(depth, 4)))
	if b, err := (proto.MarshalOptions{Deterministic: true}).Marshal(inner.Interface()); err == nil {
		a.Value = b
	}
}

func (f *filler) scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(f.IntN(2) == 0)
	case protoreflect.StringKind:
		texts := []string{"", "istio", "istio-peer-exchange", "istio.hashable_string", "services", "a;demo;a;v1;Kubernetes", "x", "type.googleapis.com/x"}
		return protoreflect.ValueOfString(texts[f.IntN(len(texts))])
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{byte(f.IntN(256))})
	case protoreflect.EnumKind:
		values := fd.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(f.IntN(values.Len())).Number())
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(f.Uint32()))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(f.Uint32())
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(f.Int64())
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(f.Uint64())
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(f.Float32())
	default:
		return protoreflect.ValueOfFloat64(f.Float64())
	}
}

// FuzzTranslate: arbitrary bytes never make the translation panic, and the result can be parsed and satisfies the checks above.
func FuzzTranslate(f *testing.F) {
	types := []string{
		"envoy.config.listener.v3.Listener", "envoy.config.cluster.v3.Cluster", "envoy.config.route.v3.RouteConfiguration",
		"envoy.config.endpoint.v3.ClusterLoadAssignment", "envoy.config.core.v3.TypedExtensionConfig",
	}
	for _, s := range scenes() {
		d, _ := newIstiod(f, s)
		for _, resources := range generate(f, d, s.proxy) {
			for _, r := range resources {
				f.Add(slices.Index(types, string(r.Resource.MessageName())), r.Resource.Value)
			}
		}
	}
	l := newLeveller()
	tr := dialect.NewTranslator(dialect.ShippedEnvoy(), nil)
	f.Fuzz(func(t *testing.T, typ int, value []byte) {
		if typ < 0 || typ >= len(types) {
			return
		}
		in := &anypb.Any{TypeUrl: "type.googleapis.com/" + types[typ], Value: value}
		if _, err := in.UnmarshalNew(); err != nil {
			tr.Resource(in) // must only not panic
			return
		}
		checkTranslation(t, tr, l, in)
	})
}
