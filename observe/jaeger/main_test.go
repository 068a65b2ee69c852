package jaeger

import (
	"encoding/json"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
	"polymesh.dev/polymesh/observe/tracestore"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) { rowstoretest.Main(m) }

func open(t *testing.T) *tracestore.Store {
	t.Helper()
	store, err := tracestore.Open(tracestore.Options{Dir: t.TempDir(), Retention: 7 * 24 * time.Hour, MaxBytes: 1 << 30, SpansPerSecond: -1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// api is the HTTP API on a socket.
func api(t *testing.T, store *tracestore.Store) string {
	t.Helper()
	server := httptest.NewServer(New(Options{Store: store, Log: slog.New(slog.DiscardHandler)}))
	t.Cleanup(server.Close)
	return server.URL
}

// get asks, and reads the answer's JSON.
func get(t *testing.T, url string, into any) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	answer, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	if into != nil {
		require.Equal(t, "application/json", answer.Header.Get("Content-Type"))
		require.NoError(t, json.Unmarshal(text, into), string(text))
	}
	return answer.StatusCode
}

func attribute(key string, kind tracestore.ValueType, text string) tracestore.Attribute {
	return tracestore.Attribute{Key: key, Value: tracestore.Value{Type: kind, Text: text}}
}

// request is a trace of two services as stored spans, with a value of each type. The server's clock is behind.
func request(at time.Time) []tracestore.Span {
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	return []tracestore.Span{
		{
			TraceID: id, SpanID: "00f067aa0ba902b7", Service: "front.shop", Name: "GET /", Kind: tracestore.KindClient, Start: at, Duration: 5 * time.Millisecond,
			Resource: []tracestore.Attribute{attribute("host.name", tracestore.String, "node-1")}, Scope: tracestore.Scope{Name: "envoy", Version: "1.40"},
			Attributes: []tracestore.Attribute{
				attribute("bool", tracestore.Bool, "true"), attribute("bytes", tracestore.Bytes, "AAE="), attribute("double", tracestore.Float, "0.5"),
				attribute("http.status_code", tracestore.String, "503"), attribute("int", tracestore.Int, "7"), attribute("large", tracestore.Int, "9007199254740993"),
				attribute("list", tracestore.JSON, `["a",1,{"b":null}]`), attribute("nan", tracestore.Float, "NaN"),
			},
		},
		{
			TraceID: id, SpanID: "00f067aa0ba902b8", ParentID: "00f067aa0ba902b7", Service: "back.shop", Name: "GET /", Kind: tracestore.KindServer,
			Start: at.Add(-time.Millisecond), Duration: time.Millisecond, Status: tracestore.StatusError, StatusMessage: "broken", TraceState: "a=b", Flags: 257,
			Events: []tracestore.Event{{Time: at.Add(time.Microsecond), Name: "exception", Attributes: []tracestore.Attribute{attribute("exception.type", tracestore.String, "ValueError")}}},
			Links: []tracestore.Link{
				{TraceID: "00000000000000000000000000000abc", SpanID: "00f067aa0ba902b9"},
				{TraceID: id, SpanID: "00f067aa0ba902ba", Attributes: []tracestore.Attribute{attribute("opentracing.ref_type", tracestore.String, "child_of")}},
			},
		},
	}
}

func store(t *testing.T, s *tracestore.Store, spans ...tracestore.Span) {
	t.Helper()
	r, err := s.Append(spans)
	require.NoError(t, err)
	require.Equal(t, tracestore.Result{Stored: len(spans)}, r)
}
