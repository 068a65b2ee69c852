package receive

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math"
	"strconv"
	"time"

	collect "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"

	"polymesh.dev/polymesh/observe/tracestore"
)

const (
	serviceName = "service.name"
	noService   = "unknown_service"
)

// eachSpan calls each for all spans of a request.
func eachSpan(req *collect.ExportTraceServiceRequest, each func(tracestore.Span) error) error {
	for _, resource := range req.GetResourceSpans() {
		service, process := resourceAttributes(resource.GetResource().GetAttributes())
		for _, scoped := range resource.GetScopeSpans() {
			scope := tracestore.Scope{
				Name: scoped.GetScope().GetName(), Version: scoped.GetScope().GetVersion(), Attributes: attributes(scoped.GetScope().GetAttributes()),
			}
			for _, s := range scoped.GetSpans() {
				one := span(s)
				one.Service, one.Resource, one.Scope = service, process, scope
				if err := each(one); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// resourceAttributes separates the service's name from the attributes of a resource.
func resourceAttributes(in []*common.KeyValue) (string, []tracestore.Attribute) {
	service := noService
	rest := make([]*common.KeyValue, 0, len(in))
	for _, a := range in {
		if a.GetKey() != serviceName {
			rest = append(rest, a)
		} else if name := value(a.GetValue()).Text; name != "" {
			service = name
		}
	}
	return service, attributes(rest)
}

func span(s *trace.Span) tracestore.Span {
	start := moment(s.GetStartTimeUnixNano())
	out := tracestore.Span{
		TraceID: hex.EncodeToString(s.GetTraceId()), SpanID: hex.EncodeToString(s.GetSpanId()), ParentID: hex.EncodeToString(s.GetParentSpanId()),
		Name: s.GetName(), Kind: tracestore.Kind(min(max(s.GetKind(), 0), math.MaxUint8)), Start: start, TraceState: s.GetTraceState(), Flags: s.GetFlags(),
		Status: tracestore.Status(min(max(s.GetStatus().GetCode(), 0), math.MaxUint8)), StatusMessage: s.GetStatus().GetMessage(),
		Attributes: attributes(s.GetAttributes()),
	}
	if s.GetEndTimeUnixNano() > s.GetStartTimeUnixNano() {
		out.Duration = moment(s.GetEndTimeUnixNano()).Sub(start)
	}
	for _, e := range s.GetEvents() {
		at := start
		if e.GetTimeUnixNano() != 0 {
			at = moment(e.GetTimeUnixNano())
		}
		out.Events = append(out.Events, tracestore.Event{Time: at, Name: e.GetName(), Attributes: attributes(e.GetAttributes())})
	}
	for _, l := range s.GetLinks() {
		out.Links = append(out.Links, tracestore.Link{
			TraceID: hex.EncodeToString(l.GetTraceId()), SpanID: hex.EncodeToString(l.GetSpanId()), TraceState: l.GetTraceState(),
			Attributes: attributes(l.GetAttributes()),
		})
	}
	return out
}

// moment returns a time since 1970, bounded to valid times.
func moment(nanos uint64) time.Time { return time.Unix(0, int64(min(nanos, math.MaxInt64))) }

func attributes(in []*common.KeyValue) []tracestore.Attribute {
	out := make([]tracestore.Attribute, 0, len(in))
	for _, a := range in {
		out = append(out, tracestore.Attribute{Key: a.GetKey(), Value: value(a.GetValue())})
	}
	return out
}

func value(v *common.AnyValue) tracestore.Value {
	switch one := v.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return tracestore.Value{Type: tracestore.String, Text: one.StringValue}
	case *common.AnyValue_BoolValue:
		return tracestore.Value{Type: tracestore.Bool, Text: strconv.FormatBool(one.BoolValue)}
	case *common.AnyValue_IntValue:
		return tracestore.Value{Type: tracestore.Int, Text: strconv.FormatInt(one.IntValue, 10)}
	case *common.AnyValue_DoubleValue:
		return tracestore.Value{Type: tracestore.Float, Text: strconv.FormatFloat(one.DoubleValue, 'g', -1, 64)}
	case *common.AnyValue_BytesValue:
		return tracestore.Value{Type: tracestore.Bytes, Text: base64.StdEncoding.EncodeToString(one.BytesValue)}
	case *common.AnyValue_ArrayValue, *common.AnyValue_KvlistValue:
		text, err := json.Marshal(plain(v))
		if err != nil { // plain only returns values that JSON can encode
			return tracestore.Value{Type: tracestore.String}
		}
		return tracestore.Value{Type: tracestore.JSON, Text: string(text)}
	}
	return tracestore.Value{Type: tracestore.String}
}

// plain converts a value for JSON. guard has limited its depth.
func plain(v *common.AnyValue) any {
	switch one := v.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return one.StringValue
	case *common.AnyValue_BoolValue:
		return one.BoolValue
	case *common.AnyValue_IntValue:
		return one.IntValue
	case *common.AnyValue_DoubleValue:
		if math.IsNaN(one.DoubleValue) || math.IsInf(one.DoubleValue, 0) {
			return strconv.FormatFloat(one.DoubleValue, 'g', -1, 64)
		}
		return one.DoubleValue
	case *common.AnyValue_BytesValue:
		return base64.StdEncoding.EncodeToString(one.BytesValue)
	case *common.AnyValue_ArrayValue:
		list := make([]any, 0, len(one.ArrayValue.GetValues()))
		for _, e := range one.ArrayValue.GetValues() {
			list = append(list, plain(e))
		}
		return list
	case *common.AnyValue_KvlistValue:
		object := make(map[string]any, len(one.KvlistValue.GetValues()))
		for _, e := range one.KvlistValue.GetValues() {
			object[e.GetKey()] = plain(e.GetValue())
		}
		return object
	}
	return nil
}
