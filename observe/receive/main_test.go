package receive

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
	"polymesh.dev/polymesh/observe/tracestore"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }

// stack is a receiver with real stores, served on real sockets.
type stack struct {
	*Receiver
	traces *tracestore.Store
	logs   *logstore.Store
	// addresses
	grpc, http, zipkin, jaeger string
}

func serve(t *testing.T, metrics http.Handler) *stack {
	t.Helper()
	s := &stack{}
	var err error
	s.traces, err = tracestore.Open(tracestore.Options{Dir: t.TempDir(), Retention: 7 * 24 * time.Hour, MaxBytes: 1 << 30, SpansPerSecond: -1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.traces.Close() })
	s.logs = logstoretest.Open(t, rowstore.Options{Dir: t.TempDir(), Retention: 7 * 24 * time.Hour, MaxBytes: 1 << 30})
	s.Receiver = New(Options{Spans: s.traces.Append, Logs: s.logs.Append, Metrics: metrics, Log: slog.New(slog.DiscardHandler)})
	s.http, s.zipkin, s.jaeger = serveHTTP(t, s.HTTP()), serveHTTP(t, s.Zipkin()), serveHTTP(t, s.Jaeger())
	server := httptest.NewUnstartedServer(s.GRPC())
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	s.grpc = server.Listener.Addr().String()
	return s
}

func serveHTTP(t *testing.T, h http.Handler) string {
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

func attribute(key string, kind tracestore.ValueType, text string) tracestore.Attribute {
	return tracestore.Attribute{Key: key, Value: tracestore.Value{Type: kind, Text: text}}
}
