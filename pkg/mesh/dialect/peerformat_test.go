package dialect_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	fileaccesslog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	celfilter "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	otellog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tracing "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
)

// TestPeerFormats: references to the peer are translated where the proxy can know it, everything else is left alone, and a
// server only extracts its caller where a format refers to it.
func TestPeerFormats(t *testing.T) {
	const (
		value   = `re.extract(xds.upstream_host_metadata.filter_metadata["istio"].workload, "^(?:[^;]*;)`
		apart   = `("polymesh" in xds.upstream_host_metadata.filter_metadata ? re.extract(xds.upstream_host_metadata.filter_metadata["polymesh"].labels, `
		called  = value + `{0}([^;]*)", "\\1")`
		caller  = `re.extract(metadata.filter_metadata["polymesh"].caller, "^(?:[\\w.-]*;){0}([\\w.-]*)(?:;[\\w.-]*){6}$", "\\1")`
		version = `re.extract(metadata.filter_metadata["polymesh"].caller, "^(?:[\\w.-]*;){6}([\\w.-]*)(?:;[\\w.-]*){0}$", "\\1")`
	)
	in, out := core.TrafficDirection_INBOUND, core.TrafficDirection_OUTBOUND
	for _, c := range []struct {
		direction  core.TrafficDirection
		from, want string
		asks       bool
	}{
		{in, "%FILTER_STATE(downstream_peer_obj:FIELD:workload)%", "%CEL(" + caller + ")%", true},
		{in, "a %FILTER_STATE(downstream_peer:FIELD:version):5% b %PROTOCOL%", "a %CEL(" + version + "):5% b %PROTOCOL%", true},
		{in, "%CEL(filter_state.downstream_peer.version == 'v1')%", "%CEL(" + version + " == 'v1')%", true},
		{in, `%CEL(filter_state["downstream_peer"]['version'])% %CEL(request.path)%`, "%CEL(" + version + ")% %CEL(request.path)%", true},
		{in, "%FILTER_STATE(upstream_peer_obj:FIELD:workload)%", "", false},
		{in, "%FILTER_STATE(downstream_peer)%", "", false},
		{in, "%CEL(request.headers['filter_state'])%", "", false},
		{out, "%FILTER_STATE(upstream_peer_obj:FIELD:workload)%", "%CEL(" + called + ")%", false},
		{out, "%CEL(filter_state.upstream_peer.workload)%", "%CEL(" + called + ")%", false},
		{out, "%FILTER_STATE(upstream_peer_obj:FIELD:app)%", "%CEL(" + apart + `"^(?:[^;]*;){0}([^;]*)", "\\1") : ` + value + `{2}([^;]*)", "\\1")))%`, false},
		{out, "%FILTER_STATE(upstream_peer_obj:FIELD:version)%", "%CEL(" + apart + `"^(?:[^;]*;){1}([^;]*)", "\\1") : ` + value + `{3}(?:latest;|([^;]*))", "\\1")))%`, false},
		{out, "%FILTER_STATE(downstream_peer_obj:FIELD:workload)%", "", false},
		{out, "%FILTER_STATE(upstream_peer_obj:FIELD:type)% %FILTER_STATE(upstream_peer_obj:FIELD:labels)%", "", false},
		{out, "%FILTER_STATE(my_upstream_peer:FIELD:workload)%", "", false},
	} {
		if c.want == "" {
			c.want = c.from
		}
		struc, err := structpb.NewStruct(map[string]any{"a": []any{map[string]any{"b": c.from}}})
		if err != nil {
			t.Fatal(err)
		}
		text := &core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_TextFormatSource{TextFormatSource: &core.DataSource{
			Specifier: &core.DataSource_InlineString{InlineString: c.from},
		}}}
		file := func(format *core.SubstitutionFormatString) *accesslog.AccessLog {
			return &accesslog.AccessLog{Name: "file", ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: toAny(t, &fileaccesslog.FileAccessLog{
				Path: "/dev/stdout", AccessLogFormat: &fileaccesslog.FileAccessLog_LogFormat{LogFormat: format},
			})}}
		}
		otlp := &otellog.OpenTelemetryAccessLogConfig{}
		body, err := json.Marshal(map[string]any{"body": map[string]any{"stringValue": c.from}})
		if err == nil {
			err = protojson.Unmarshal(body, otlp)
		}
		if err != nil {
			t.Fatal(err)
		}
		logs := []*accesslog.AccessLog{
			file(text), file(&core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_JsonFormat{JsonFormat: struc}}),
			{Name: "otlp", ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: toAny(t, otlp)}},
		}
		manager := &hcm.HttpConnectionManager{
			Tracing: &hcm.HttpConnectionManager_Tracing{CustomTags: []*tracing.CustomTag{
				{Tag: "t", Type: &tracing.CustomTag_Value{Value: c.from}},
				{Tag: "literal", Type: &tracing.CustomTag_Literal_{Literal: &tracing.CustomTag_Literal{Value: c.from}}},
			}},
			AccessLog:   logs,
			HttpFilters: []*hcm.HttpFilter{{Name: "router"}},
		}
		l := &listener.Listener{TrafficDirection: c.direction, FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, manager)},
		}}}}}
		m := &hcm.HttpConnectionManager{}
		firstFilter(t, toAny(t, l), m)
		have := []string{m.Tracing.CustomTags[0].GetValue()}
		for _, log := range m.AccessLog {
			if log.Name == "otlp" {
				if err := log.GetTypedConfig().UnmarshalTo(otlp); err != nil {
					t.Fatal(err)
				}
				have = append(have, otlp.Body.GetStringValue())
				continue
			}
			f := &fileaccesslog.FileAccessLog{}
			if err := log.GetTypedConfig().UnmarshalTo(f); err != nil {
				t.Fatal(err)
			}
			list := f.GetLogFormat().GetJsonFormat().GetFields()["a"].GetListValue().GetValues()
			if list == nil {
				have = append(have, f.GetLogFormat().GetTextFormatSource().GetInlineString())
			} else {
				have = append(have, list[0].GetStructValue().Fields["b"].GetStringValue())
			}
		}
		for i, where := range []string{"tag", "text", "JSON", "OTLP"} {
			if have[i] != c.want {
				t.Errorf("%s %s, %s:\n%s, want\n%s", c.direction, c.from, where, have[i], c.want)
			}
		}
		if literal := m.Tracing.CustomTags[1].GetLiteral().Value; literal != c.from {
			t.Errorf("the literal tag %s became %s", c.from, literal)
		}
		var names []string
		for _, f := range m.HttpFilters {
			names = append(names, f.Name)
		}
		if asks := strings.Contains(strings.Join(names, " "), "polymesh.caller"); asks != c.asks {
			t.Errorf("%s %s: the filters are %q", c.direction, c.from, names)
		}
	}
}

// TestLogConditionAsks: a log condition that refers to the caller makes it available, however long the condition is.
func TestLogConditionAsks(t *testing.T) {
	for n := range 120 {
		condition := &celfilter.ExpressionFilter{Expression: `filter_state.downstream_peer.workload == "` + strings.Repeat("c", n) + `"`}
		packed := &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_ExtensionFilter{ExtensionFilter: &accesslog.ExtensionFilter{
			Name: "cel", ConfigType: &accesslog.ExtensionFilter_TypedConfig{TypedConfig: toAny(t, condition)},
		}}}
		manager := &hcm.HttpConnectionManager{
			AccessLog: []*accesslog.AccessLog{{Name: "file", Filter: packed, ConfigType: &accesslog.AccessLog_TypedConfig{
				TypedConfig: toAny(t, &fileaccesslog.FileAccessLog{Path: "/dev/stdout"}),
			}}},
			HttpFilters: []*hcm.HttpFilter{{Name: "router"}},
		}
		l := &listener.Listener{TrafficDirection: core.TrafficDirection_INBOUND, FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, manager)},
		}}}}}
		m := &hcm.HttpConnectionManager{}
		firstFilter(t, toAny(t, l), m)
		if !slices.ContainsFunc(m.HttpFilters, func(f *hcm.HttpFilter) bool { return f.Name == "polymesh.caller" }) {
			t.Errorf("the caller is not available to a condition of %d characters", len(condition.Expression))
		}
	}
}
