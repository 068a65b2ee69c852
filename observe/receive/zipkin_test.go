package receive

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"polymesh.dev/polymesh/observe/tracestore"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func TestZipkinJSON(t *testing.T) {
	s := serve(t, nil)
	start := time.Now().UTC().Truncate(time.Microsecond)
	body := strings.NewReplacer("START", itoa(start.UnixMicro()), "EARLIER", itoa(start.UnixMicro()-1)).Replace(`[{"traceId":"b9c05b2a3a3e7b1c","parentId":"1","id":"a2","kind":"SERVER","name":"get /api","timestamp":START,"duration":"1500",
		"localEndpoint":{"serviceName":"backend","ipv4":"192.168.99.1","port":3306},"remoteEndpoint":{"serviceName":"frontend","ipv4":"172.19.0.2","port":58648},
		"annotations":[{"timestamp":START,"value":"wire send"}],"tags":{"http.method":"GET","error":"it broke","empty":"","otel.scope.name":"brave"},"shared":true,"debug":false},
		{"traceId":"b9c05b2a3a3e7b1c","id":"1","kind":"CLIENT","timestamp":EARLIER}]`)
	code, answer, _ := post(t, s.zipkin+"/api/v2/spans", "application/json", "", []byte(body))
	require.Equal(t, http.StatusAccepted, code, string(answer))
	require.Empty(t, answer)
	got, err := s.traces.Trace(t.Context(), "b9c05b2a3a3e7b1c")
	require.NoError(t, err)
	require.Len(t, got.Spans, 2)
	require.Equal(t, tracestore.Span{
		TraceID: "0000000000000000b9c05b2a3a3e7b1c", SpanID: "00000000000000a2", ParentID: "0000000000000001", Service: "backend", Name: "get /api", Kind: tracestore.KindServer,
		Start: start, Duration: 1500 * time.Microsecond, Status: tracestore.StatusError, StatusMessage: "it broke", Scope: tracestore.Scope{Name: "brave"}, Shared: true,
		Attributes: []tracestore.Attribute{
			attribute("empty", tracestore.String, ""), attribute("http.method", tracestore.String, "GET"), attribute("net.host.ip", tracestore.String, "192.168.99.1"), attribute("net.host.port", tracestore.Int, "3306"),
			attribute("net.peer.ip", tracestore.String, "172.19.0.2"), attribute("net.peer.port", tracestore.Int, "58648"), attribute("peer.service", tracestore.String, "frontend"),
		},
		Events: []tracestore.Event{{Time: start, Name: "wire send", Attributes: []tracestore.Attribute{}}},
	}, got.Spans[1])
	require.Equal(t, "unknown_service", got.Spans[0].Service)
}

func TestZipkinProto(t *testing.T) {
	s := serve(t, nil)
	start := time.Now().UTC().Truncate(time.Microsecond)
	bytes := func(b []byte, number protowire.Number, text []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), text)
	}
	number := func(b []byte, field protowire.Number, n uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), n)
	}
	fixed := func(b []byte, field protowire.Number, n uint64) []byte {
		return protowire.AppendFixed64(protowire.AppendTag(b, field, protowire.Fixed64Type), n)
	}
	var span []byte
	span = bytes(span, 1, traceID)
	span = bytes(span, 2, []byte{0, 0, 0, 0, 0, 0, 0, 9})
	span = bytes(span, 3, spanID)
	span = number(span, 4, 1)
	span = bytes(span, 5, []byte("get"))
	span = fixed(span, 6, uint64(start.UnixMicro()))
	span = number(span, 7, 12)
	span = bytes(span, 8, number(bytes(bytes(nil, 1, []byte("front")), 2, []byte{10, 0, 0, 1}), 4, 80))
	span = bytes(span, 9, bytes(nil, 3, make([]byte, 16)))
	span = bytes(span, 10, bytes(fixed(nil, 1, uint64(start.UnixMicro())), 2, []byte("sent")))
	span = bytes(span, 11, bytes(bytes(nil, 1, []byte("k")), 2, []byte("v")))
	span = number(span, 12, 1)
	code, answer, _ := post(t, s.zipkin+"/api/v2/spans", "application/x-protobuf", "", bytes(nil, 1, span))
	require.Equal(t, http.StatusAccepted, code, string(answer))
	s.wantSpan(t, tracestore.Span{
		TraceID: traceHex, SpanID: spanHex, ParentID: "0000000000000009", Service: "front", Name: "get", Kind: tracestore.KindClient, Start: start, Duration: 12 * time.Microsecond,
		Attributes: []tracestore.Attribute{attribute("k", tracestore.String, "v"), attribute("net.host.ip", tracestore.String, "10.0.0.1"), attribute("net.host.port", tracestore.Int, "80"), attribute("net.peer.ip", tracestore.String, "::")},
		Events:     []tracestore.Event{{Time: start, Name: "sent", Attributes: []tracestore.Attribute{}}},
	})
}

func TestWhatIsNotZipkins(t *testing.T) {
	s := serve(t, nil)
	for _, test := range []struct{ kind, body, message string }{
		{"application/json", `{"traceId":"1"}`, "reading Zipkin's spans"},
		{"application/json", `[{"traceId":"1","timestamp":"soon"}]`, "microseconds"},
		{"application/json", strings.Repeat("[", 100), "nested too deep"},
		{"application/json", "[" + strings.Repeat("{},", 1<<20) + "{}]", "too many elements"},
		{"application/x-protobuf", strings.Repeat("\x0a\x00", 2_000_000), "too many"},
		{"application/x-protobuf", "\x0a\x05x", ""},
		{"application/x-protobuf", "\x0b", ""},
	} {
		code, answer, _ := post(t, s.zipkin+"/api/v2/spans", test.kind, "", []byte(test.body))
		require.Equal(t, http.StatusBadRequest, code, test.body[:min(40, len(test.body))])
		require.Contains(t, string(answer), test.message)
	}
}
