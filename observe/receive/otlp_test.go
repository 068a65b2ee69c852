package receive

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	collectlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	collectmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collect "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	resource "go.opentelemetry.io/proto/otlp/resource/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/tracestore"
)

func text(s string) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: s}}
}

func kv(key string, v *common.AnyValue) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: v}
}

var (
	traceID = []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	spanID  = []byte{1, 2, 3, 4, 5, 6, 7, 8}
)

const (
	traceHex = "0102030405060708090a0b0c0d0e0f10"
	spanHex  = "0102030405060708"
)

// request has a span with a value of each type, and what the store should have of it.
func request(start time.Time) (*collect.ExportTraceServiceRequest, tracestore.Span) {
	at := uint64(start.UnixNano())
	list := &common.AnyValue{Value: &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: []*common.AnyValue{
		text("a"), {Value: &common.AnyValue_IntValue{IntValue: 1}}, {Value: &common.AnyValue_DoubleValue{DoubleValue: math.Inf(1)}}, {},
	}}}}
	object := &common.AnyValue{Value: &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: []*common.KeyValue{
		kv("k", &common.AnyValue{Value: &common.AnyValue_BytesValue{BytesValue: []byte{1}}}), kv("b", &common.AnyValue{Value: &common.AnyValue_BoolValue{BoolValue: true}}),
	}}}}
	req := &collect.ExportTraceServiceRequest{ResourceSpans: []*trace.ResourceSpans{{
		Resource: &resource.Resource{Attributes: []*common.KeyValue{kv("service.name", text("front.shop")), kv("host.name", text("node-1"))}},
		ScopeSpans: []*trace.ScopeSpans{{
			Scope: &common.InstrumentationScope{Name: "envoy", Version: "1.40", Attributes: []*common.KeyValue{kv("s", text("t"))}},
			Spans: []*trace.Span{{
				TraceId: traceID, SpanId: spanID, ParentSpanId: []byte{8, 7, 6, 5, 4, 3, 2, 1}, Name: "GET /", Kind: trace.Span_SPAN_KIND_CLIENT, TraceState: "a=b", Flags: 257,
				StartTimeUnixNano: at, EndTimeUnixNano: at + 5000, Status: &trace.Status{Code: trace.Status_STATUS_CODE_ERROR, Message: "broken"},
				Attributes: []*common.KeyValue{
					kv("bool", &common.AnyValue{Value: &common.AnyValue_BoolValue{BoolValue: true}}), kv("bytes", &common.AnyValue{Value: &common.AnyValue_BytesValue{BytesValue: []byte{0, 1}}}),
					kv("double", &common.AnyValue{Value: &common.AnyValue_DoubleValue{DoubleValue: 0.5}}), kv("empty", &common.AnyValue{}), kv("int", &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: -9e15}}),
					kv("list", list), kv("object", object), kv("text", text("x")),
				},
				Events: []*trace.Span_Event{{TimeUnixNano: at + 1000, Name: "e", Attributes: []*common.KeyValue{kv("m", text("n"))}}, {Name: "without time"}},
				Links:  []*trace.Span_Link{{TraceId: traceID, SpanId: spanID, TraceState: "c=d", Attributes: []*common.KeyValue{kv("l", text("k"))}}},
			}},
		}},
	}}}
	want := tracestore.Span{
		TraceID: traceHex, SpanID: spanHex, ParentID: "0807060504030201", Service: "front.shop", Name: "GET /", Kind: tracestore.KindClient,
		Start: start, Duration: 5000, Status: tracestore.StatusError, StatusMessage: "broken", TraceState: "a=b", Flags: 257,
		Attributes: []tracestore.Attribute{
			attribute("bool", tracestore.Bool, "true"), attribute("bytes", tracestore.Bytes, "AAE="), attribute("double", tracestore.Float, "0.5"), attribute("empty", tracestore.String, ""),
			attribute("int", tracestore.Int, "-9000000000000000"), attribute("list", tracestore.JSON, `["a",1,"+Inf",null]`), attribute("object", tracestore.JSON, `{"b":true,"k":"AQ=="}`),
			attribute("text", tracestore.String, "x"),
		},
		Resource: []tracestore.Attribute{attribute("host.name", tracestore.String, "node-1")}, Scope: tracestore.Scope{Name: "envoy", Version: "1.40", Attributes: []tracestore.Attribute{attribute("s", tracestore.String, "t")}},
		Events: []tracestore.Event{{Time: start.Add(1000), Name: "e", Attributes: []tracestore.Attribute{attribute("m", tracestore.String, "n")}}, {Time: start, Name: "without time", Attributes: []tracestore.Attribute{}}},
		Links:  []tracestore.Link{{TraceID: traceHex, SpanID: spanHex, TraceState: "c=d", Attributes: []tracestore.Attribute{attribute("l", tracestore.String, "k")}}},
	}
	return req, want
}

func (s *stack) wantSpan(t *testing.T, want tracestore.Span) {
	t.Helper()
	got, err := s.traces.Trace(t.Context(), want.TraceID)
	require.NoError(t, err)
	require.Equal(t, []tracestore.Span{want}, got.Spans)
}

func (s *stack) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	connection, err := grpc.NewClient(s.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = connection.Close() })
	return connection
}

func post(t *testing.T, url, kind, encoding string, body []byte) (int, []byte, http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	require.NoError(t, err)
	req.Header.Set("Content-Type", kind)
	if encoding != "" {
		req.Header.Set("Content-Encoding", encoding)
	}
	answer, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return answer.StatusCode, text, answer.Header
}

func TestTracesGRPC(t *testing.T) {
	s := serve(t, nil)
	req, want := request(time.Now().UTC())
	client := collect.NewTraceServiceClient(s.dial(t))
	answer, err := client.Export(t.Context(), req, grpc.UseCompressor("gzip"))
	require.NoError(t, err)
	require.Nil(t, answer.PartialSuccess)
	s.wantSpan(t, want)

	// Some of a request is no span: the rest is stored, and the client is told.
	req.ResourceSpans[0].ScopeSpans[0].Spans = append(req.ResourceSpans[0].ScopeSpans[0].Spans, &trace.Span{})
	answer, err = client.Export(t.Context(), req)
	require.NoError(t, err)
	require.EqualValues(t, 1, answer.GetPartialSuccess().GetRejectedSpans())
	require.Contains(t, answer.GetPartialSuccess().GetErrorMessage(), "trace id")

	_, err = client.Export(t.Context(), &collect.ExportTraceServiceRequest{})
	require.NoError(t, err)
	_, err = collectmetrics.NewMetricsServiceClient(s.dial(t)).Export(t.Context(), &collectmetrics.ExportMetricsServiceRequest{})
	require.Equal(t, codes.Unimplemented, status.Code(err))
}

func TestTracesHTTP(t *testing.T) {
	for encoding, pack := range map[string]func(io.Writer) io.WriteCloser{
		"": func(w io.Writer) io.WriteCloser {
			return struct {
				io.Writer
				io.Closer
			}{w, io.NopCloser(nil)}
		},
		"gzip":    func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		"deflate": func(w io.Writer) io.WriteCloser { return zlib.NewWriter(w) },
		"zstd":    func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z },
	} {
		t.Run(encoding, func(t *testing.T) {
			s := serve(t, nil)
			req, want := request(time.Now().UTC())
			raw, err := proto.Marshal(req)
			require.NoError(t, err)
			var packed bytes.Buffer
			w := pack(&packed)
			_, err = w.Write(raw)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			code, answer, header := post(t, s.http+"/v1/traces", "application/x-protobuf", encoding, packed.Bytes())
			require.Equal(t, http.StatusOK, code)
			require.Equal(t, "application/x-protobuf", header.Get("Content-Type"))
			require.Empty(t, answer)
			s.wantSpan(t, want)
		})
	}
}

// TestTracesJSON has the example of OpenTelemetry's specification, with ids in hexadecimal digits, numbers as texts and unknown fields.
func TestTracesJSON(t *testing.T) {
	s := serve(t, nil)
	start := time.Now().UTC()
	body := strings.NewReplacer("BEGIN", itoa(start.UnixNano()), "END", itoa(start.UnixNano()+1000)).Replace(`{"resourceSpans":[{"resource":{"attributes":[
		{"key":"service.name","value":{"stringValue":"my.service"}}]},"scopeSpans":[{"scope":{"name":"my.library","version":"1.0.0",
		"attributes":[{"key":"my.scope.attribute","value":{"stringValue":"some scope attribute"}}]},"spans":[{"traceId":"5B8EFFF798038103D269B633813FC60C","spanId":"EEE19B7EC3C1B174",
		"parentSpanId":"EEE19B7EC3C1B173","name":"I'm a server span","startTimeUnixNano":"BEGIN","endTimeUnixNano":END,"kind":2,"unknown":[{"a":1}],
		"attributes":[{"key":"my.span.attr","value":{"stringValue":"some value"}},{"key":"n","value":{"intValue":"7"}},{"key":"l","value":{"arrayValue":{"values":[{"doubleValue":0.5}]}}}]}]}]}]}`)
	code, answer, header := post(t, s.http+"/v1/traces", "application/json; charset=utf-8", "", []byte(body))
	require.Equal(t, http.StatusOK, code, string(answer))
	require.Equal(t, "application/json", header.Get("Content-Type"))
	require.JSONEq(t, `{}`, string(answer))
	s.wantSpan(t, tracestore.Span{
		TraceID: "5b8efff798038103d269b633813fc60c", SpanID: "eee19b7ec3c1b174", ParentID: "eee19b7ec3c1b173", Service: "my.service", Name: "I'm a server span",
		Kind: tracestore.KindServer, Start: start, Duration: 1000, Scope: tracestore.Scope{Name: "my.library", Version: "1.0.0", Attributes: []tracestore.Attribute{attribute("my.scope.attribute", tracestore.String, "some scope attribute")}},
		Attributes: []tracestore.Attribute{attribute("l", tracestore.JSON, "[0.5]"), attribute("my.span.attr", tracestore.String, "some value"), attribute("n", tracestore.Int, "7")},
	})

	code, answer, _ = post(t, s.http+"/v1/traces", "application/json", "", []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{}]}]}]}`))
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, string(answer), `"rejectedSpans":"1"`)
}

// deep is a request with a value so deep in lists that a decoder that recurses would have to remember all of it.
func deep(levels int) []byte {
	var value []byte
	field := func(number protowire.Number, b []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), b)
	}
	// Lengths come before what they measure, so this is written from its end.
	out := make([]byte, 0, levels*12)
	size := 0
	var parts [][]byte
	for range levels {
		list := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.BytesType), uint64(size))
		size += len(list)
		any := protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.BytesType), uint64(size))
		size += len(any)
		parts = append(parts, list, any)
	}
	for i := len(parts) - 1; i >= 0; i-- {
		out = append(out, parts[i]...)
	}
	value = out
	attribute := field(2, value)
	return field(1, field(2, field(2, field(9, attribute))))
}

func TestWhatIsRefused(t *testing.T) {
	s := serve(t, nil)
	req, _ := request(time.Now())
	good, err := proto.Marshal(req)
	require.NoError(t, err)
	zeros := func(n int) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(make([]byte, n))
		require.NoError(t, err)
		require.NoError(t, w.Close())
		return b.Bytes()
	}
	for name, test := range map[string]struct {
		kind, encoding string
		body           []byte
		code           int
		message        string
	}{
		"nested":                    {"application/x-protobuf", "", deep(300_000), 400, "nested too deep"},
		"empty messages":            {"application/x-protobuf", "", bytes.Repeat([]byte{0x0a, 0}, 2_000_000), 400, "too many elements"},
		"no protobuf":               {"application/x-protobuf", "", []byte("hello"), 400, ""},
		"cut":                       {"application/x-protobuf", "", good[:len(good)-3], 400, ""},
		"large":                     {"application/x-protobuf", "", make([]byte, MaxMessage+1), 413, "send it in parts"},
		"large when it is unpacked": {"application/x-protobuf", "gzip", zeros(100 << 20), 413, "send it in parts"},
		"no gzip":                   {"application/x-protobuf", "gzip", good, 400, "unpacking"},
		"no zstd":                   {"application/x-protobuf", "zstd", good, 400, ""},
		"unknown encoding":          {"application/x-protobuf", "br", good, 415, "content encoding"},
		"unknown type":              {"text/plain", "", good, 415, "content type"},
		"no type":                   {"", "", good, 415, "content type"},
		"nested JSON":               {"application/json", "", bytes.Repeat([]byte("["), 1<<20), 400, "nested too deep"},
		"nested JSON values":        {"application/json", "", []byte(strings.Repeat(`{"resourceSpans":[`, 100)), 400, "nested too deep"},
		"long JSON":                 {"application/json", "", []byte("[" + strings.Repeat("{},", 1<<20) + "{}]"), 400, "too many elements"},
		"no JSON":                   {"application/json", "", []byte("hello"), 400, ""},
		"bad id":                    {"application/json", "", []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"xyz"}]}]}]}`), 400, ""},
	} {
		t.Run(name, func(t *testing.T) {
			code, answer, _ := post(t, s.http+"/v1/traces", test.kind, test.encoding, test.body)
			require.Equal(t, test.code, code, string(answer))
			require.Contains(t, string(answer), test.message)
		})
	}
	code, _, _ := post(t, s.http+"/v1/metrics", "application/x-protobuf", "", nil)
	require.Equal(t, http.StatusNotFound, code)

	// The same by gRPC, past the client's own encoder.
	connection := s.dial(t)
	send := func(message []byte, options ...grpc.CallOption) error {
		var answer []byte
		return connection.Invoke(t.Context(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export", &message, &answer, append(options, grpc.ForceCodec(bytesCodec{}))...)
	}
	require.NoError(t, send(good))
	require.Equal(t, codes.InvalidArgument, status.Code(send(deep(300_000))))
	require.Equal(t, codes.InvalidArgument, status.Code(send(bytes.Repeat([]byte{0x0a, 0}, 2_000_000))))
	require.Equal(t, codes.InvalidArgument, status.Code(send([]byte("hello"))))
	require.Equal(t, codes.ResourceExhausted, status.Code(send(make([]byte, MaxMessage+1))))
	require.Equal(t, codes.ResourceExhausted, status.Code(send(make([]byte, 100<<20), grpc.UseCompressor("gzip"))))
	require.NoError(t, send(good))
}

// bytesCodec sends bytes as they are.
type bytesCodec struct{}

func (bytesCodec) Name() string                    { return "proto" }
func (bytesCodec) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(b []byte, v any) error { *v.(*[]byte) = b; return nil }

func TestStoreThatTakesNothing(t *testing.T) {
	full := errors.New("the disk is full")
	r := New(Options{
		Spans: func([]tracestore.Span) (tracestore.Result, error) { return tracestore.Result{}, full },
		Logs:  func([]logstore.Entry) error { return full },
		Log:   slog.New(slog.DiscardHandler),
	})
	req, _ := request(time.Now())
	url := serveHTTP(t, r.HTTP())
	message, err := proto.Marshal(req)
	require.NoError(t, err)
	code, answer, header := post(t, url+"/v1/traces", "application/x-protobuf", "", message)
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Equal(t, "5", header.Get("Retry-After"))
	require.Contains(t, string(answer), "spans cannot be stored now")
	code, _, _ = post(t, serveHTTP(t, r.Zipkin())+"/api/v2/spans", "application/json", "", []byte(`[{"traceId":"1","id":"2"}]`))
	require.Equal(t, http.StatusServiceUnavailable, code)
}

func TestRequestsWaitForASlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Options{Log: slog.New(slog.DiscardHandler)})
		for range readers - 1 {
			_, err := r.slot(t.Context())
			require.NoError(t, err)
		}
		release, err := r.slot(t.Context())
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = r.slot(ctx)
		require.Equal(t, codes.Canceled, status.Code(err))
		from := time.Now()
		_, err = r.slot(t.Context())
		require.Equal(t, codes.Unavailable, status.Code(err))
		require.Equal(t, patience, time.Since(from))
		time.AfterFunc(patience/2, release)
		_, err = r.slot(t.Context())
		require.NoError(t, err)
	})
}

// slowRequest is one of which the body comes through a pipe, until the deadline.
type slowRequest struct {
	*httptest.ResponseRecorder
	in   *io.PipeWriter
	stop *time.Timer
}

func (s *slowRequest) SetReadDeadline(at time.Time) error {
	if s.stop != nil {
		s.stop.Stop()
	}
	if !at.IsZero() {
		s.stop = time.AfterFunc(time.Until(at), func() { _ = s.in.CloseWithError(os.ErrDeadlineExceeded) })
	}
	return nil
}

// Clients that send nothing, or slowly, take no slot, and are left.
func TestSlowClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Options{Spans: func([]tracestore.Span) (tracestore.Result, error) { return tracestore.Result{}, nil }, Log: slog.New(slog.DiscardHandler)})
		answers := make(chan *slowRequest)
		begin := time.Now()
		const clients = 3 * readers
		for i := range clients {
			handler, path, kind := r.HTTP(), "/v1/traces", "application/x-protobuf"
			if i%2 == 0 {
				handler, path, kind = r.GRPC(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export", "application/grpc"
			}
			body, in := io.Pipe()
			req := httptest.NewRequest(http.MethodPost, path, body)
			req.ProtoMajor = 2
			req.Header.Set("Content-Type", kind)
			go func() {
				w := &slowRequest{ResponseRecorder: httptest.NewRecorder(), in: in}
				handler.ServeHTTP(w, req)
				answers <- w
			}()
			if i > readers {
				_, err := in.Write([]byte{0})
				require.NoError(t, err)
			}
		}
		synctest.Wait()
		require.Empty(t, r.slots)
		for range clients {
			w := <-answers
			if code := w.Header().Get("Grpc-Status"); code != "" {
				require.Equal(t, strconv.Itoa(int(codes.DeadlineExceeded)), code)
			} else {
				require.Equal(t, http.StatusServiceUnavailable, w.Code)
			}
		}
		require.Equal(t, readTime, time.Since(begin))
		require.True(t, r.arriving.TryAcquire(arriving), "it is given back")
	})
}

// Bytes that arrive have a room. What does not fit is to be sent again.
func TestBytesThatArrive(t *testing.T) {
	s := serve(t, nil)
	req, _ := request(time.Now())
	message, err := proto.Marshal(req)
	require.NoError(t, err)
	require.True(t, s.arriving.TryAcquire(arriving))
	code, answer, _ := post(t, s.http+"/v1/traces", "application/x-protobuf", "", message)
	require.Equal(t, http.StatusServiceUnavailable, code, string(answer))
	client := collect.NewTraceServiceClient(s.dial(t))
	_, err = client.Export(t.Context(), req)
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "too many requests")
	s.arriving.Release(arriving)
	_, err = client.Export(t.Context(), req)
	require.NoError(t, err)
	code, answer, _ = post(t, s.http+"/v1/traces", "application/x-protobuf", "", message)
	require.Equal(t, http.StatusOK, code, string(answer))
	require.True(t, s.arriving.TryAcquire(arriving), "it is given back")
}

func TestLogs(t *testing.T) {
	s := serve(t, nil)
	now := time.Now().UTC()
	req := &collectlogs.ExportLogsServiceRequest{ResourceLogs: []*logs.ResourceLogs{{
		Resource: &resource.Resource{Attributes: []*common.KeyValue{
			kv("service.name", text("api")), kv("k8s.namespace.name", text("shop")), kv("k8s.pod.name", text("api-1")), kv("host.name", text("node-1")),
		}},
		ScopeLogs: []*logs.ScopeLogs{{Scope: &common.InstrumentationScope{Name: "root"}, LogRecords: []*logs.LogRecord{{
			TimeUnixNano: uint64(now.UnixNano()), SeverityNumber: logs.SeverityNumber_SEVERITY_NUMBER_WARN2, Body: text("it is late"), TraceId: traceID, SpanId: spanID,
			Attributes: []*common.KeyValue{kv("http.route", text("/a")), kv("1st*", text("x"))},
		}, {SeverityText: "INFO", Body: &common.AnyValue{Value: &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: []*common.KeyValue{kv("a", text("b"))}}}}}}}},
	}}}
	many := &logs.LogRecord{Body: text("many")}
	for i := range 200 {
		many.Attributes = append(many.Attributes, kv("k"+itoa(int64(i)), text(strings.Repeat("v", 200))))
	}
	req.ResourceLogs[0].ScopeLogs[0].LogRecords = append(req.ResourceLogs[0].ScopeLogs[0].LogRecords, many)
	_, err := collectlogs.NewLogsServiceClient(s.dial(t)).Export(t.Context(), req)
	require.NoError(t, err)
	var got []logstore.Entry
	require.NoError(t, s.logs.Select(t.Context(), logstore.Selector{
		Matchers: []logstore.Matcher{{Name: "job", Value: Job}, {Name: "workload", Value: "api"}, {Name: "namespace", Value: "shop"}, {Name: "pod", Value: "api-1"}},
		Start:    now.Add(-time.Minute), End: now.Add(time.Minute), Limit: 10,
	}, func(e logstore.Entry) bool { got = append(got, e); return true }))
	require.Len(t, got, 3)
	require.Equal(t, "it is late", got[0].Line)
	require.Equal(t, now, got[0].Time)
	require.ElementsMatch(t, []rowstore.Field{
		{Name: "level", Value: "warn"}, {Name: "trace_id", Value: traceHex}, {Name: "span_id", Value: spanHex}, {Name: "http_route", Value: "/a"}, {Name: "_1st_", Value: "x"},
		{Name: "scope_name", Value: "root"}, {Name: "service_name", Value: "api"}, {Name: "k8s_namespace_name", Value: "shop"}, {Name: "k8s_pod_name", Value: "api-1"}, {Name: "host_name", Value: "node-1"},
	}, got[0].Metadata)
	lines := []string{got[1].Line, got[2].Line}
	require.ElementsMatch(t, []string{`{"a":"b"}`, "many"}, lines)
	for _, e := range got {
		if e.Line == "many" {
			require.Equal(t, "142", logstore.Value(e.Metadata, "attributes_left_off"))
		}
	}

	body, err := protojson.Marshal(req)
	require.NoError(t, err)
	// protojson writes ids in base64, which OTLP does not.
	code, answer, _ := post(t, s.http+"/v1/logs", "application/json", "", body)
	require.Equal(t, http.StatusBadRequest, code, string(answer))
}

func TestMetricsArePassedOn(t *testing.T) {
	var bodies [][]byte
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, _ := io.ReadAll(req.Body)
		bodies = append(bodies, b)
		if len(b) == 0 {
			http.Error(w, "nothing in it", http.StatusBadRequest)
		}
	}))
	req := &collectmetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metrics.ResourceMetrics{{ScopeMetrics: []*metrics.ScopeMetrics{{Metrics: []*metrics.Metric{{Name: "m"}}}}}}}
	message, err := proto.Marshal(req)
	require.NoError(t, err)
	client := collectmetrics.NewMetricsServiceClient(s.dial(t))
	_, err = client.Export(t.Context(), req)
	require.NoError(t, err)
	code, _, _ := post(t, s.http+"/v1/metrics", "application/x-protobuf", "", message)
	require.Equal(t, http.StatusOK, code)
	code, _, _ = post(t, s.http+"/v1/metrics", "application/json", "", []byte(`{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m"}]}]}]}`))
	require.Equal(t, http.StatusOK, code)
	require.Len(t, bodies, 3)
	require.Equal(t, message, bodies[0])
	require.Equal(t, message, bodies[1])
	fromJSON := &collectmetrics.ExportMetricsServiceRequest{}
	require.NoError(t, proto.Unmarshal(bodies[2], fromJSON))
	require.Equal(t, "m", fromJSON.GetResourceMetrics()[0].GetScopeMetrics()[0].GetMetrics()[0].GetName())
	_, err = client.Export(t.Context(), &collectmetrics.ExportMetricsServiceRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	require.ErrorContains(t, err, "nothing in it")
}
