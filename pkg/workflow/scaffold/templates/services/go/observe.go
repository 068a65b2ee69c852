package main

import (
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// passedOn are the headers of a request that a call made for it has to carry. The sidecars make the spans and write them
// into these headers; only the app knows which call belongs to which request.
var passedOn = []string{
	"traceparent", "tracestate", "x-request-id", "b3",
	"x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
}

func passTrace(from, to http.Header) {
	for _, name := range passedOn {
		if value := from.Get(name); value != "" {
			to.Set(name, value)
		}
	}
}

// traceOf is the trace in W3C's header or in B3's; empty without one.
func traceOf(header http.Header) (id, span string) {
	if parts := strings.Split(header.Get("traceparent"), "-"); len(parts) == 4 {
		return parts[1], parts[2]
	}
	return header.Get("x-b3-traceid"), header.Get("x-b3-spanid")
}

// logHandler writes JSON, with the fields that the services of all languages have.
func logHandler(w io.Writer) slog.Handler {
	return slog.NewJSONHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch a.Key {
		case slog.TimeKey:
			return slog.String("time", a.Value.Time().UTC().Format("2006-01-02T15:04:05.000Z"))
		case slog.LevelKey:
			return slog.String("level", strings.ToLower(a.Value.String()))
		case slog.MessageKey:
			a.Key = "message"
		}
		return a
	}}).WithAttrs([]slog.Attr{slog.String("service", serviceName)})
}

// observer counts and logs requests.
type observer struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newObserver() *observer {
	o := &observer{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "http_requests_total", Help: "Requests that were answered",
		}, []string{"method", "path", "status"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "http_request_duration_seconds", Help: "Time until the answer",
		}, []string{"method", "path"}),
	}
	o.registry.MustRegister(o.requests, o.duration, collectors.NewGoCollector())
	return o
}

func (o *observer) metrics() http.Handler {
	return promhttp.HandlerFor(o.registry, promhttp.HandlerOpts{})
}

// observe goes around a mux. The paths are those of its patterns: what clients make up would be metrics without end.
func (o *observer) observe(next *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		_, pattern := next.Handler(r)
		_, path, found := strings.Cut(pattern, " ")
		if !found {
			path = pattern
		}
		answer := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(answer, r)
		took := time.Since(start)

		o.requests.WithLabelValues(r.Method, path, strconv.Itoa(answer.status)).Inc()
		o.duration.WithLabelValues(r.Method, path).Observe(took.Seconds())
		id, span := traceOf(r.Header)
		slog.Info("request", "method", r.Method, "path", path, "status", answer.status,
			"duration_ms", float64(took.Microseconds())/1000, "trace_id", id, "span_id", span, "request_id", r.Header.Get("x-request-id"))
	})
}

// recorder remembers the status that a handler has written.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}
