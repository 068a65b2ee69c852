package guard

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	trace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	spans "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

var request = (*trace.ExportTraceServiceRequest)(nil).ProtoReflect().Descriptor()

// nested is an AnyValue with so many arrays in each other, innermost first as protobuf needs their lengths.
func nested(levels int) []byte {
	var b []byte
	for range levels {
		array := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), b)
		b = protowire.AppendBytes(protowire.AppendTag(nil, 5, protowire.BytesType), array)
	}
	return b
}

func TestProto(t *testing.T) {
	good := &trace.ExportTraceServiceRequest{ResourceSpans: []*spans.ResourceSpans{{ScopeSpans: []*spans.ScopeSpans{{Spans: []*spans.Span{{
		Name: "x", TraceId: make([]byte, 16), StartTimeUnixNano: 1, Kind: 2,
		Attributes: []*common.KeyValue{{Key: "k", Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: "v"}}}},
	}}}}}}}
	b, err := proto.Marshal(good)
	require.NoError(t, err)
	memory, err := Proto(request, b, OTLP)
	require.NoError(t, err)
	require.Less(t, memory, 2000)
	// The request, 1 resource, 1 scope, 1 span, 1 attribute, 1 value.
	refusal := func(d protoreflect.MessageDescriptor, b []byte, l Limits) error { _, err := Proto(d, b, l); return err }
	require.NoError(t, refusal(request, b, Limits{Depth: 6, Memory: memory}))
	require.ErrorContains(t, refusal(request, b, Limits{Depth: 5, Memory: memory}), "too deep")
	require.ErrorContains(t, refusal(request, b, Limits{Depth: 6, Memory: memory - 1}), "too many elements")

	value := (*common.AnyValue)(nil).ProtoReflect().Descriptor()
	require.NoError(t, refusal(value, nested(20), OTLP))
	require.ErrorContains(t, refusal(value, nested(30), OTLP), "too deep")

	for name, bad := range map[string][]byte{
		"a group":         protowire.AppendTag(nil, 1, protowire.StartGroupType),
		"groups in other": bytes.Repeat(protowire.AppendTag(nil, 99, protowire.StartGroupType), 1<<20),
		"end of a group":  protowire.AppendTag(nil, 1, protowire.EndGroupType),
		"cut":             b[:len(b)-1],
		"no tag":          {0xff},
		"too long":        {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f},
		"empty messages":  bytes.Repeat([]byte{0x0a, 0}, 1<<20),
	} {
		require.ErrorIs(t, refusal(request, bad, OTLP), ErrRefused, name)
	}
	// What is unknown is not looked into: nobody decodes it.
	require.NoError(t, refusal(request, protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), nested(1000)), OTLP))
}

func TestJSON(t *testing.T) {
	limits := Limits{Depth: 3, Memory: 3*perObject + 7*perValue}
	for text, want := range map[string]string{
		`{"a":[1,2,{"b":"}]]],,,,,\"[["}]}`: "",
		`[[[]]]`:                            "",
		`[[[[]]]]`:                          "too deep",
		"[" + strings.Repeat("1,", 30):      "too many elements",
		`[{},{},{},{}]`:                     "too many elements",
		`"\\",[`:                            "",
	} {
		_, err := JSON([]byte(text), limits)
		if want == "" {
			require.NoError(t, err, text)
		} else {
			require.ErrorContains(t, err, want, text)
			require.ErrorIs(t, err, ErrRefused)
		}
	}
	_, err := JSON([]byte(strings.Repeat("[", 1<<20)), OTLP)
	require.ErrorIs(t, err, ErrRefused)
	for _, text := range []string{`"` + strings.Repeat("[", 1<<20), `"\`} {
		_, err = JSON([]byte(text), OTLP)
		require.NoError(t, err)
	}
}

func FuzzProto(f *testing.F) {
	f.Add(nested(20))
	f.Add(nested(60))
	f.Fuzz(func(t *testing.T, b []byte) {
		// What passes can be looked at by the decoder, whether it likes it or not.
		if _, err := Proto(request, b, OTLP); err == nil {
			_ = proto.Unmarshal(b, &trace.ExportTraceServiceRequest{})
		}
	})
}
