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
)

const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func get(s *service, path string, header http.Header) (int, string) {
	request := httptest.NewRequest(http.MethodGet, path, nil)
	for name, values := range header {
		request.Header[name] = values
	}
	response := httptest.NewRecorder()
	s.handler().ServeHTTP(response, request)
	return response.Code, strings.TrimSpace(response.Body.String())
}

func TestAnswers(t *testing.T) {
	s := &service{message: "hello"}
	for path, want := range map[string]string{
		"/service-name": `{"service":"service-name","message":"hello"}`,
		"/health":       `{"status":"healthy"}`,
		"/ready":        `{"status":"ready"}`,
	} {
		if status, text := get(s, path, nil); status != http.StatusOK || text != want {
			t.Errorf("%s: %d %s, want %s", path, status, text, want)
		}
	}
	if status, _ := get(s, "/nowhere", nil); status != http.StatusNotFound {
		t.Errorf("nowhere: %d", status)
	}
}

func TestAsksTheNext(t *testing.T) {
	var seen http.Header
	status := http.StatusOK
	next := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header
		w.WriteHeader(status)
		io.WriteString(w, `{"service":"next"}`)
	}))
	defer next.Close()
	s := &service{message: "hello", nextURL: next.URL, client: next.Client()}

	header := http.Header{"Cookie": {"secret"}}
	for _, name := range passedOn {
		header.Set(name, "of-"+name)
	}
	if code, text := get(s, "/service-name", header); code != http.StatusOK || text != `{"service":"service-name","message":"hello","next":{"service":"next"}}` {
		t.Errorf("%d %s", code, text)
	}
	for _, name := range passedOn {
		if seen.Get(name) != header.Get(name) {
			t.Errorf("%s is %q, want %q", name, seen.Get(name), header.Get(name))
		}
	}
	if seen.Get("cookie") != "" {
		t.Error("the cookie was passed on")
	}

	status = http.StatusServiceUnavailable
	if code, text := get(s, "/service-name", nil); code != http.StatusBadGateway || !strings.Contains(text, "503") {
		t.Errorf("%d %s", code, text)
	}
}

func TestMetricsAndLog(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(logHandler(&log)))
	defer slog.SetDefault(before)
	handler := (&service{}).handler()
	var metrics string
	for _, path := range []string{"/service-name", "/nowhere", "/health", "/metrics"} {
		request := httptest.NewRequest(http.MethodGet, path, nil)
		request.Header.Set("traceparent", traceparent)
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, request)
		metrics = response.Body.String()
	}
	for _, want := range []string{
		`http_requests_total{method="GET",path="/service-name",status="200"} 1`,
		`http_requests_total{method="GET",path="",status="404"} 1`,
		`http_request_duration_seconds_count{method="GET",path="/service-name"} 1`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("%s is not in %s", want, metrics)
		}
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 { // probes are not logged
		t.Fatalf("the log is %s", &log)
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &fields); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{
		"level": "info", "service": "service-name", "message": "request", "path": "/service-name", "status": 200.0,
		"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7",
	} {
		if fields[name] != want {
			t.Errorf("%s is %v, want %v", name, fields[name], want)
		}
	}
}

// A request that has begun when the service is told to stop is answered.
func TestShutdown(t *testing.T) {
	begun, finish := make(chan bool), make(chan bool)
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-finish
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

	var text []byte
	asked := make(chan error, 1)
	go func() {
		response, err := http.Get("http://" + address)
		for err != nil && ctx.Err() == nil && len(ended) == 0 { // not listening yet
			response, err = http.Get("http://" + address)
		}
		if err == nil {
			defer response.Body.Close()
			text, err = io.ReadAll(response.Body)
		}
		asked <- err
	}()
	select {
	case <-begun:
	case err := <-asked:
		t.Fatal(err)
	}
	stop()
	close(finish)
	if err := <-asked; err != nil || string(text) != "answered" {
		t.Errorf("%q %v", text, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
