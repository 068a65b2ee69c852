package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func get(t *testing.T, url string, header http.Header) (int, string) {
	t.Helper()
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header = header
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

func TestGuide(t *testing.T) {
	server := httptest.NewServer(newHandler("", noop.NewTracerProvider()))
	defer server.Close()
	for _, path := range []string{"/health", "/ready"} {
		status, text := get(t, server.URL+path, nil)
		var answer HealthResponse
		if err := json.Unmarshal([]byte(text), &answer); err != nil || status != http.StatusOK || answer.Status != "healthy" || answer.Timestamp.IsZero() {
			t.Errorf("%s: %d %s %v", path, status, text, err)
		}
	}
	if status, text := get(t, server.URL+"/api/v1/gateway", nil); status != http.StatusOK || text != `{"message":"Request processed by Go Gateway","service":"go-service"}`+"\n" {
		t.Errorf("gateway: %d %s", status, text)
	}
	if status, _ := get(t, server.URL+"/nowhere", nil); status != http.StatusNotFound {
		t.Errorf("nowhere: %d", status)
	}
}

func TestChain(t *testing.T) {
	var seen http.Header
	next := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		io.WriteString(w, `{"chain":[{"service":"next","language":"x","work":"y","trace_id":"z"}]}`)
	}))
	defer next.Close()
	server := httptest.NewServer(newHandler(next.URL, noop.NewTracerProvider()))
	defer server.Close()

	header := http.Header{}
	for _, name := range passedOn {
		header.Set(name, "of-"+name)
	}
	header.Set("traceparent", traceparent)
	header.Set("cookie", "secret")
	status, text := get(t, server.URL+"/api/v1/chain", header)
	var answer chainResponse
	if err := json.Unmarshal([]byte(text), &answer); err != nil || status != http.StatusOK || len(answer.Chain) != 2 {
		t.Fatalf("%d %s %v", status, text, err)
	}
	if want := (link{"go-service", "Go", "gateway", "4bf92f3577b34da6a3ce929d0e0e4736"}); answer.Chain[0] != want || answer.Chain[1].Service != "next" {
		t.Errorf("the chain is %+v", answer.Chain)
	}
	for _, name := range passedOn {
		if seen.Get(name) != header.Get(name) {
			t.Errorf("%s is %q, want %q", name, seen.Get(name), header.Get(name))
		}
	}
	if seen.Get("cookie") != "" {
		t.Error("the cookie was passed on")
	}
}

// The app's span stands between the one that the sidecar sent and the one of the call.
func TestSpan(t *testing.T) {
	var seen http.Header
	next := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		io.WriteString(w, `{"chain":[]}`)
	}))
	defer next.Close()
	spans := tracetest.NewInMemoryExporter()
	tracing := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans), sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample())))
	handler := newHandler(next.URL, tracing)
	ask := func(traceparent string) {
		request := httptest.NewRequest(http.MethodGet, "/api/v1/chain", nil)
		request.Header.Set("traceparent", traceparent)
		handler.ServeHTTP(httptest.NewRecorder(), request)
	}

	ask(traceparent)
	if len(spans.GetSpans()) != 1 {
		t.Fatalf("%d spans", len(spans.GetSpans()))
	}
	span := spans.GetSpans()[0]
	if span.Name != "GET /api/v1/chain" || span.SpanKind != trace.SpanKindServer || span.Parent.SpanID().String() != "00f067aa0ba902b7" {
		t.Errorf("the span is %+v", span)
	}
	if want := "00-4bf92f3577b34da6a3ce929d0e0e4736-" + span.SpanContext.SpanID().String() + "-01"; seen.Get("traceparent") != want {
		t.Errorf("the call's traceparent is %s, want %s", seen.Get("traceparent"), want)
	}

	spans.Reset()
	for _, without := range []string{"", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"} {
		ask(without)
		if len(spans.GetSpans()) != 0 {
			t.Errorf("%q has the spans %+v", without, spans.GetSpans())
		}
	}
}

func TestBrokenChain(t *testing.T) {
	next := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "overloaded", http.StatusServiceUnavailable)
	}))
	defer next.Close()
	server := httptest.NewServer(newHandler(next.URL, noop.NewTracerProvider()))
	defer server.Close()
	if status, text := get(t, server.URL+"/api/v1/chain", nil); status != http.StatusBadGateway || !strings.Contains(text, "503 Service Unavailable: overloaded") {
		t.Errorf("%d %s", status, text)
	}
}

func TestMetricsAndLog(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(logHandler(&log)))
	defer slog.SetDefault(before)
	handler := newHandler("", noop.NewTracerProvider())
	for path, header := range map[string]string{"/api/v1/chain": traceparent, "/nowhere": "", "/health": ""} {
		request := httptest.NewRequest(http.MethodGet, path, nil)
		request.Header.Set("traceparent", header)
		handler.ServeHTTP(httptest.NewRecorder(), request)
	}
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{
		`http_requests_total{method="GET",path="/api/v1/chain",status="200"} 1`,
		`http_requests_total{method="GET",path="",status="404"} 1`,
		`http_request_duration_seconds_count{method="GET",path="/api/v1/chain"} 1`,
	} {
		if !strings.Contains(answer.Body.String(), want) {
			t.Errorf("%s is not in %s", want, answer.Body)
		}
	}
	found := false
	for line := range strings.Lines(log.String()) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if fields["path"] == "/health" {
			t.Error("a probe is logged")
		}
		found = found || fields["service"] == "go-service" && fields["level"] == "info" && fields["message"] == "request" &&
			fields["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736" && fields["span_id"] == "00f067aa0ba902b7"
	}
	if !found {
		t.Errorf("the log is %s", &log)
	}
}

// A request that has begun when the service is told to stop is answered.
func TestShutdown(t *testing.T) {
	begun, answer := make(chan bool), make(chan bool)
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-answer
		io.WriteString(w, "answered")
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, address, handler) }()
	type result struct {
		text string
		err  error
	}
	got := make(chan result, 1)
	go func() {
		var response *http.Response
		var err error
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			if response, err = http.Get("http://" + address); err == nil {
				break
			}
		}
		if err != nil {
			got <- result{err: err}
			return
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		got <- result{string(text), err}
	}()
	<-begun
	stop()
	close(answer)
	if r := <-got; r.err != nil || r.text != "answered" {
		t.Errorf("%q %v", r.text, r.err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
