package dialect

import (
	"fmt"
	"regexp"
	"strings"

	mutation "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	celfilter "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	mutate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	tometadata "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tracing "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// This file is about tags of spans and formats of access logs that say who is at the other side. Istio's peer metadata
// filters leave that in the filter state, with a field for each value. Here it is one text, at a client in the metadata of
// the endpoint and at a server in the caller's certificate, so a field becomes a regular expression on that text.
//
// An expression (CEL) cannot see the certificate's text. Where a server's formats ask for the caller, two filters bring it
// into the request's metadata, by way of a header that no one else sees.

const (
	callerFilter = "polymesh.caller"
	callerHeader = "x-polymesh-caller"
	// callerKey is where the caller's workload stands in a request's metadata.
	callerKey = "caller"
	// anyPeer is in each format that asks for the other side: upstream_peer, downstream_peer.
	anyPeer = "stream_peer"
)

// peerFields are the places of the fields of Istio's object (WorkloadMetadataObject in Istio's proxy,
// extensions/common/metadata_object.h) in the text of a workload. Its type and the pod's name are not in the text.
var peerFields = map[string]int{
	"workload": 0, "namespace": 1, "service": 2, "revision": 3, "cluster": 4, "app": 5, "version": 6,
}

var (
	peerCommand = regexp.MustCompile(`%FILTER_STATE\((up|down)stream_peer(?:_obj)?:FIELD:([a-z]+)\)(:\d+)?%`)
	peerInCEL   = regexp.MustCompile(`\bfilter_state(?:\.(up|down)stream_peer|\[["'](up|down)stream_peer["']\])(?:\.([a-z]+)\b|\[["']([a-z]+)["']\])`)
	// callerAsked has no word boundaries: in an encoded message, a length or a tag can be a letter.
	callerAsked = regexp.MustCompile(`%FILTER_STATE\(downstream_peer(?:_obj)?:FIELD:[a-z]+\)|` +
		`filter_state(?:\.downstream_peer|\[["']downstream_peer["']\])(?:\.[a-z]|\[["'][a-z]+["']\])`)
	celCommand = regexp.MustCompile(`%CEL\(.*?\)(:\d+)?%`)
)

// partOf is the CEL expression for the n-th of the texts between semicolons, or nothing if that is the text without.
func partOf(source string, n int, without string) string {
	part := "([^;]*)"
	if without != "" {
		part = "(?:" + without + ";|" + part + ")"
	}
	return fmt.Sprintf(`re.extract(%s, "^(?:[^;]*;){%d}%s", "\\1")`, source, n, part)
}

// partOfWorkload is the CEL expression for the n-th value of a text that workload.Workload's String wrote. It has no value for a text with
// more or fewer of them, or with one that is no name: certificates that are still valid may be of an istiod that did not check.
func partOfWorkload(source string, n int) string {
	return fmt.Sprintf(`re.extract(%s, "^(?:[\\w.-]*;){%d}([\\w.-]*)(?:;[\\w.-]*){%d}$", "\\1")`, source, n, len(workload.Labels)-1-n)
}

// peerField is the CEL expression for a field of the other side, or "" where Istio has none either: a server's proxy
// knows who calls, a client's whom it calls.
func peerField(s *surroundings, stream, field string) string {
	place, ok := peerFields[field]
	if !ok || s.inbound != (stream == "down") {
		return ""
	}
	if s.inbound {
		return partOfWorkload(fmt.Sprintf("metadata.filter_metadata[%q].%s", ownMetadata, callerKey), place)
	}
	const metadata = "xds.upstream_host_metadata.filter_metadata"
	said := fmt.Sprintf("%s[%q].%s", metadata, istioMetadata, workloadKey)
	if place < peerFields["app"] {
		return partOf(said, place, "")
	}
	// As in workload.Workload's WithLabels.
	expected := partOf(said, peerFields["service"], "")
	if field == "version" {
		expected = partOf(said, peerFields["revision"], workload.Latest)
	}
	return fmt.Sprintf("(%q in %s ? %s : %s)", ownMetadata, metadata,
		partOf(fmt.Sprintf("%s[%q].%s", metadata, ownMetadata, labelsKey), place-peerFields["app"], ""), expected)
}

// peerExpression translates a CEL expression.
func peerExpression(s *surroundings, expression string) string {
	return peerInCEL.ReplaceAllStringFunc(expression, func(found string) string {
		m := peerInCEL.FindStringSubmatch(found)
		if field := peerField(s, m[1]+m[2], m[3]+m[4]); field != "" {
			return field
		}
		return found
	})
}

// peerFormat translates a format string.
func peerFormat(s *surroundings, format string) string {
	if !strings.Contains(format, anyPeer) {
		return format
	}
	format = peerCommand.ReplaceAllStringFunc(format, func(found string) string {
		m := peerCommand.FindStringSubmatch(found)
		if field := peerField(s, m[1], m[2]); field != "" {
			return "%CEL(" + field + ")" + m[3] + "%"
		}
		return found
	})
	return celCommand.ReplaceAllStringFunc(format, func(found string) string { return peerExpression(s, found) })
}

// replace translates a text in place and reports whether it changed.
func replace(s *surroundings, text *string, translate func(*surroundings, string) string) bool {
	before := *text
	*text = translate(s, before)
	return *text != before
}

func translateTag(s *surroundings, tag *tracing.CustomTag) (bool, error) {
	value, ok := tag.Type.(*tracing.CustomTag_Value)
	return ok && replace(s, &value.Value, peerFormat), nil
}

func translateFormat(s *surroundings, f *core.SubstitutionFormatString) (bool, error) {
	switch format := f.Format.(type) {
	case *core.SubstitutionFormatString_TextFormatSource:
		text, ok := format.TextFormatSource.GetSpecifier().(*core.DataSource_InlineString)
		return ok && replace(s, &text.InlineString, peerFormat), nil
	case *core.SubstitutionFormatString_JsonFormat:
		return replaceIn(s, structpb.NewStructValue(format.JsonFormat)), nil
	}
	return false, nil
}

// replaceIn translates the texts in a JSON format.
func replaceIn(s *surroundings, value *structpb.Value) bool {
	changed := false
	switch kind := value.GetKind().(type) {
	case *structpb.Value_StringValue:
		return replace(s, &kind.StringValue, peerFormat)
	case *structpb.Value_StructValue:
		for _, field := range kind.StructValue.GetFields() {
			changed = replaceIn(s, field) || changed
		}
	case *structpb.Value_ListValue:
		for _, item := range kind.ListValue.GetValues() {
			changed = replaceIn(s, item) || changed
		}
	}
	return changed
}

// translateAttribute is for what the logger for OpenTelemetry sends (opentelemetry.proto.common.v1.AnyValue).
func translateAttribute(s *surroundings, m proto.Message) (bool, error) {
	value := m.ProtoReflect()
	field := value.Descriptor().Fields().ByName("string_value")
	if field == nil || !value.Has(field) {
		return false, nil
	}
	text := value.Get(field).String()
	if !replace(s, &text, peerFormat) {
		return false, nil
	}
	value.Set(field, protoreflect.ValueOfString(text))
	return true, nil
}

// translateLogFilter is for the condition on which a request is logged.
func translateLogFilter(s *surroundings, f *celfilter.ExpressionFilter) (bool, error) {
	return replace(s, &f.Expression, peerExpression), nil
}

// asksForCaller reports whether a tag, a log or a metric of a server's HTTP connection manager names the caller. It looks at the
// encoded message: what asks can stand in a format, in a condition or in an expression, and a text that only looks like it costs no
// more than two filters.
func asksForCaller(s *surroundings, manager []byte) bool {
	return s.inbound && callerAsked.Match(manager)
}

// bringCaller makes the filter that moves the caller into the request's metadata, and adds to the one before it what makes
// the header.
func bringCaller(before *mutate.Mutations) *hcm.HttpFilter {
	before.RequestMutations = append(before.RequestMutations,
		// Without a certificate the header is not set, so a made-up one has to go first.
		&mutation.HeaderMutation{Action: &mutation.HeaderMutation_Remove{Remove: callerHeader}},
		&mutation.HeaderMutation{Action: &mutation.HeaderMutation_Append{Append: &core.HeaderValueOption{
			Header: &core.HeaderValue{Key: callerHeader, Value: "%DOWNSTREAM_PEER_OTHERNAME_SAN%"},
		}}},
	)
	packed := mustPack(&tometadata.Config{RequestRules: []*tometadata.Config_Rule{{
		Header:          callerHeader,
		OnHeaderPresent: &tometadata.Config_KeyValuePair{MetadataNamespace: ownMetadata, Key: callerKey},
		Remove:          true,
	}}})
	return &hcm.HttpFilter{Name: callerFilter, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed}}
}
