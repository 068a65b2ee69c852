package receive

import (
	"bytes"
	"encoding/binary"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/apache/thrift/lib/go/thrift"
	"github.com/jaegertracing/jaeger-idl/thrift-gen/jaeger"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/receive/guard"
	"polymesh.dev/polymesh/observe/tracestore"
)

const thriftType = "application/x-thrift"

// thriftBytes is a struct in Thrift's binary encoding.
func thriftBytes(t *testing.T, s thrift.TStruct) []byte {
	t.Helper()
	b, err := thrift.NewTSerializer().Write(t.Context(), s)
	require.NoError(t, err)
	return b
}

func TestJaegerThrift(t *testing.T) {
	s := serve(t, nil)
	start := time.Now().UTC().Truncate(time.Microsecond)
	text, yes, number, ratio := func(s string) *string { return &s }, true, int64(503), 0.25
	batch := &jaeger.Batch{
		Process: &jaeger.Process{ServiceName: "backend", Tags: []*jaeger.Tag{{Key: "hostname", VStr: text("node-1")}}},
		Spans: []*jaeger.Span{{
			TraceIdHigh: 0x0102030405060708, TraceIdLow: 0x090a0b0c0d0e0f10, SpanId: 0x0102030405060708, ParentSpanId: 9, OperationName: "GET /orders", Flags: 3,
			StartTime: start.UnixMicro(), Duration: 1500,
			References: []*jaeger.SpanRef{
				{RefType: jaeger.SpanRefType_CHILD_OF, TraceIdHigh: 0x0102030405060708, TraceIdLow: 0x090a0b0c0d0e0f10, SpanId: 9},
				{RefType: jaeger.SpanRefType_FOLLOWS_FROM, TraceIdLow: 7, SpanId: -1},
			},
			Tags: []*jaeger.Tag{
				{Key: "span.kind", VStr: text("server")}, {Key: "error", VType: jaeger.TagType_BOOL, VBool: &yes}, {Key: "http.status_code", VType: jaeger.TagType_LONG, VLong: &number},
				{Key: "ratio", VType: jaeger.TagType_DOUBLE, VDouble: &ratio}, {Key: "raw", VType: jaeger.TagType_BINARY, VBinary: []byte{0, 1}}, {Key: "empty", VStr: text("")},
				{Key: "otel.status_description", VStr: text("it broke")},
			},
			Logs: []*jaeger.Log{{Timestamp: start.UnixMicro() + 1, Fields: []*jaeger.Tag{{Key: "event", VStr: text("retried")}, {Key: "attempt", VType: jaeger.TagType_LONG, VLong: &number}}}},
		}},
	}
	code, answer, _ := post(t, s.jaeger+"/api/traces?format=jaeger.thrift", thriftType, "", thriftBytes(t, batch))
	require.Equal(t, http.StatusAccepted, code, string(answer))
	require.Empty(t, answer)
	s.wantSpan(t, tracestore.Span{
		TraceID: traceHex, SpanID: spanHex, ParentID: "0000000000000009", Service: "backend", Name: "GET /orders", Kind: tracestore.KindServer, Flags: 1,
		Start: start, Duration: 1500 * time.Microsecond, Status: tracestore.StatusError, StatusMessage: "it broke",
		Resource: []tracestore.Attribute{attribute("hostname", tracestore.String, "node-1")},
		Attributes: []tracestore.Attribute{
			attribute("empty", tracestore.String, ""), attribute("http.status_code", tracestore.Int, "503"), attribute("ratio", tracestore.Float, "0.25"), attribute("raw", tracestore.Bytes, "AAE="),
		},
		Events: []tracestore.Event{{Time: start.Add(time.Microsecond), Name: "retried", Attributes: []tracestore.Attribute{attribute("attempt", tracestore.Int, "503")}}},
		Links: []tracestore.Link{{TraceID: strings.Repeat("0", 31) + "7", SpanID: "ffffffffffffffff", Attributes: []tracestore.Attribute{
			attribute("opentracing.ref_type", tracestore.String, "follows_from"),
		}}},
	})
}

// A tag or a list says what it likes of its length, its type and its depth.
func TestWhatIsNotJaegers(t *testing.T) {
	s := serve(t, nil)
	good := thriftBytes(t, &jaeger.Batch{Process: &jaeger.Process{ServiceName: "a"}, Spans: []*jaeger.Span{{TraceIdLow: 1, SpanId: 1, StartTime: time.Now().UnixMicro()}}})
	field := func(kind byte, rest ...byte) []byte { return append([]byte{kind, 0, 2}, rest...) }
	number := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	deep := bytes.Repeat([]byte{12, 0, 2}, 100)
	lists := bytes.Repeat(append([]byte{15}, number(1)...), 100)
	for what, message := range map[string][]byte{
		"nothing":                 {},
		"half of a batch":         good[:len(good)/2],
		"a batch without spans":   thriftBytes(t, &jaeger.Process{ServiceName: "a"}),
		"structs in structs":      deep,
		"lists in lists":          append(field(15), lists...),
		"a long list":             field(15, append([]byte{12}, number(4_000_000)...)...),
		"a list without end":      field(15, append([]byte{12}, number(1<<32-1)...)...),
		"a long text":             field(11, number(1<<31-1)...),
		"a map of what is not":    field(13, append([]byte{11, 1}, number(1)...)...),
		"an unknown type":         field(99),
		"many structs":            append(field(15, append([]byte{12}, number(3_000_000)...)...), make([]byte, 3_000_001)...),
		"a list of long lists":    append(field(15, append([]byte{15}, number(2)...)...), append([]byte{3}, number(4_000_000)...)...),
		"a field of another type": {11, 0, 2, 0, 0, 0, 1, 'a', 0},
	} {
		code, answer, _ := post(t, s.jaeger+"/api/traces", thriftType, "", message)
		require.Equal(t, http.StatusBadRequest, code, "%s: %s", what, answer)
		require.NotEmpty(t, answer, what)
	}
	code, _, _ := post(t, s.jaeger+"/api/traces", "application/json", "", good)
	require.Equal(t, http.StatusUnsupportedMediaType, code)
	code, _, _ = post(t, s.jaeger+"/api/traces", thriftType, "", make([]byte, MaxMessage+1))
	require.Equal(t, http.StatusRequestEntityTooLarge, code)
	code, answer, _ := post(t, s.jaeger+"/api/traces", "application/vnd.apache.thrift.binary", "", good)
	require.Equal(t, http.StatusAccepted, code, string(answer))
}

// FuzzJaegerThrift looks for messages that the guard lets pass and for which the decoder makes more room than there is in them.
func FuzzJaegerThrift(f *testing.F) {
	f.Add([]byte{12, 0, 1, 11, 0, 1, 0, 0, 0, 1, 'a', 0, 15, 0, 2, 12, 0, 0, 0, 0, 0})
	f.Add(append([]byte{15, 0, 2, 12, 0x00, 0x3f, 0xff, 0xff}, make([]byte, 100)...))
	f.Fuzz(func(t *testing.T, message []byte) {
		if _, err := guard.Thrift(message, guard.OTLP); err != nil {
			return
		}
		batch, err := jaegerBatch(t.Context(), message)
		if err != nil {
			return
		}
		require.LessOrEqual(t, cap(batch.Spans), len(message))
		for _, one := range batch.Spans {
			fromJaeger(one)
		}
	})
}
