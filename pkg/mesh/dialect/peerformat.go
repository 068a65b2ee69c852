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

// This file translates tracing tags and access log formats that identify the peer. Istio's peer metadata filters store it in the
// filter state, one field per value. Here it is one string, in the endpoint's metadata at a client and in the caller's
// certificate at a server, so each field becomes a regular expression on that string.
//
// CEL expressions cannot read that part of the certificate. Where a server's formats refer to the caller, two filters copy it
// into the request's metadata, through a header that neither side can see.

const (
	callerFilter = "polymesh.caller"
	callerHeader = "x-polymesh-caller"
	// callerKey is the key of the caller's workload in a request's metadata.
	callerKey = "caller"
	// anyPeer occurs in each format that refers to the peer: upstream_peer, downstream_peer.
	anyPeer = "stream_peer"
)

// peerFields maps the fields of Istio's object (WorkloadMetadataObject in Istio's proxy, extensions/common/metadata_object.h) to
// their positions in the workload string. The workload's type and the pod's name are not in it.
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

// partOf returns the CEL expression for the n-th semicolon-separated part, or no value if that part equals without.
func partOf(source string, n int, without string) string {
	part := "([^;]*)"
	if without != "" {
		part = "(?:" + without + ";|" + part + ")"
	}
	return fmt.Sprintf(`re.extract(%s, "^(?:[^;]*;){%d}%s", "\\1")`, source, n, part)
}

// partOfWorkload returns the CEL expression for the n-th part of a string written by workload.Workload's String. It has no value
// if the number of parts is wrong or one is not a name: certificates that are still valid may come from an istiod that did not check.
func partOfWorkload(source string, n int) string {
	return fmt.Sprintf(`re.extract(%s, "^(?:[\\w.-]*;){%d}([\\w.-]*)(?:;[\\w.-]*){%d}$", "\\1")`, source, n, len(workload.Labels)-1-n)
}

// peerField returns the CEL expression for a field of the peer, or "" where Istio has none either: a server's proxy only
// knows its caller, a client's only its destination.
func peerField(s *surroundings, stream, field string) string {
	place, ok := peerFields[field]
	if !ok || s.inbound != (stream == "down") {
		return ""
	}
	if s.inbound {
		return partOfWorkload(fmt.Sprintf("metadata.filter_metadata[%q].%s", ownMetadata, callerKey), place)
	}
	const metadata = "xds.upstream_host_metadata.filter_metadata"
	value := fmt.Sprintf("%s[%q].%s", metadata, istioMetadata, workloadKey)
	if place < peerFields["app"] {
		return partOf(value, place, "")
	}
	// Same defaults as workload.Workload's WithLabels.
	expected := partOf(value, peerFields["service"], "")
	if field == "version" {
		expected = partOf(value, peerFields["revision"], workload.Latest)
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

// replace translates a string in place and reports whether it changed.
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

// replaceIn translates the strings in a JSON format.
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

// translateAttribute translates attributes of the OpenTelemetry logger (opentelemetry.proto.common.v1.AnyValue).
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

// translateLogFilter translates the condition on which a request is logged.
func translateLogFilter(s *surroundings, f *celfilter.ExpressionFilter) (bool, error) {
	return replace(s, &f.Expression, peerExpression), nil
}

// asksForCaller reports whether a tag, log or metric of a server's HTTP connection manager refers to the caller. It searches the
// encoded message, because the reference can be in a format, a condition or an expression. A false positive only costs
// two filters.
func asksForCaller(s *surroundings, manager []byte) bool {
	return s.inbound && callerAsked.Match(manager)
}

// bringCaller returns the filter that moves the caller from a header into the request's metadata, and adds the mutations that
// set the header to the filter before it.
func bringCaller(before *mutate.Mutations) *hcm.HttpFilter {
	before.RequestMutations = append(before.RequestMutations,
		// Without a certificate the header is not set, so a forged one must be removed first.
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
