// Package loki implements the HTTP API of Grafana Loki, for Grafana's data source, Loki's clients and agents.
//
// It only owns the API: the encoding of requests and answers, and the labels that a client may push. Queries are evaluated by
// package logql, lines are stored by logstore. There are no tenants: the header X-Scope-OrgID is ignored. There is no
// authentication: the socket is protected.
//
// A pushed stream cannot imitate one of the platform's. It always has the label source="push"; the labels for where the platform
// found a line (namespace, pod, container, node, workload, stream, source) become pushed_namespace and so on, as does a job that is one of the
// platform's (pods, events …). A stream without a job gets job="push".
package loki

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"runtime"
	"strings"

	"golang.org/x/sync/semaphore"

	"polymesh.dev/polymesh/observe/logql"
	"polymesh.dev/polymesh/observe/logstore"
)

// Options of the API.
type Options struct {
	Store *logstore.Store
	// OTLP takes log records at /v1/logs, as OpenTelemetry's exporters send them. Nil if there is no receiver.
	OTLP http.Handler
	// ReadOnly disables the endpoints that store lines.
	ReadOnly bool
	// Limits on queries, the defaults where zero.
	Limits logql.Limits
	Log    *slog.Logger
}

// apiVersion is the version of Loki whose API is implemented. Clients choose their requests by it.
const apiVersion = "3.5.0"

// Loki is the API.
type Loki struct {
	http.Handler
	opts   Options
	engine *logql.Engine
	// Tails start with few old lines.
	histories *logql.Engine
	looking   *semaphore.Weighted
	// Limits of all pushes together.
	rate                *rate
	arriving, unpacking *semaphore.Weighted
}

// New makes the API.
func New(opts Options) *Loki {
	short := opts.Limits
	short.ResultBytes, short.Time = maxBatchBytes, historyTime
	l := &Loki{
		opts: opts, engine: logql.New(opts.Store, opts.Limits, opts.Log), histories: logql.New(opts.Store, short, opts.Log), looking: semaphore.NewWeighted(histories),
		rate:     newRate(pushBytesPerSecond, pushBurst),
		arriving: semaphore.NewWeighted(arriving), unpacking: semaphore.NewWeighted(unpacking),
	}
	mux := http.NewServeMux()
	for path, answer := range map[string]func(*request) (any, error){
		"query":                        l.query,
		"query_range":                  l.queryRange,
		"labels":                       l.labels,
		"label":                        l.labels,
		"label/{name}/values":          l.labelValues,
		"series":                       l.series,
		"index/stats":                  l.indexStats,
		"index/volume":                 l.volume,
		"index/volume_range":           l.volumeRange,
		"detected_labels":              l.detectedLabels,
		"detected_fields":              l.detectedFields,
		"detected_field/{name}/values": l.detectedValues,
		"patterns":                     l.patterns,
		"format_query":                 l.formatQuery,
		"status/buildinfo":             l.buildInfo,
	} {
		handler := l.answer(answer)
		mux.Handle("GET /loki/api/v1/"+path, handler)
		mux.Handle("POST /loki/api/v1/"+path, handler)
	}
	mux.HandleFunc("GET /loki/api/v1/tail", l.tail)
	if !opts.ReadOnly {
		mux.HandleFunc("POST /loki/api/v1/push", l.push)
		mux.HandleFunc("POST /otlp/v1/logs", l.otlp)
	}
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ready\n")) })
	l.Handler = mux
	return l
}

// otlp passes log records to the receiver.
func (l *Loki) otlp(w http.ResponseWriter, r *http.Request) {
	if l.opts.OTLP == nil {
		http.Error(w, "no OTLP receiver runs here", http.StatusNotFound)
		return
	}
	passed := r.Clone(r.Context())
	passed.URL = &url.URL{Path: "/v1/logs", RawQuery: r.URL.RawQuery}
	passed.RequestURI = passed.URL.RequestURI()
	l.opts.OTLP.ServeHTTP(w, passed)
}

// maxForm is how many bytes a request in a form may have.
const maxForm = 256 << 10

// answer serves an endpoint. Errors are texts, as Loki's clients show them to people.
func (l *Loki) answer(answer func(*request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		if err := r.ParseForm(); err != nil {
			http.Error(w, "reading the request's form: "+err.Error(), http.StatusBadRequest)
			return
		}
		result, err := answer(newRequest(r))
		if err != nil {
			l.fail(w, r, err)
			return
		}
		body, err := json.Marshal(result)
		if err != nil {
			l.fail(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=UTF-8")
		_, _ = w.Write(body) // the client is gone if it fails
	})
}

// clientGone is Loki's status for a client that has closed the connection.
const clientGone = 499

func (l *Loki) fail(w http.ResponseWriter, r *http.Request, err error) {
	status := http.StatusInternalServerError
	var invalid *invalidError
	switch {
	case errors.As(err, &invalid), logql.Refused(err):
		status = http.StatusBadRequest
	case r.Context().Err() != nil:
		status = clientGone
	default:
		l.opts.Log.Error("cannot answer a question about logs", "path", r.URL.Path, "err", err)
	}
	http.Error(w, err.Error(), status)
}

func (l *Loki) buildInfo(*request) (any, error) {
	return map[string]string{
		"version": apiVersion, "revision": "polymesh", "branch": "", "buildUser": "", "buildDate": "", "goVersion": runtime.Version(),
	}, nil
}

// formatQuery writes a query as this package understands it.
func (l *Loki) formatQuery(r *request) (any, error) {
	expr, err := logql.Parse(r.form.Get("query"))
	if err != nil {
		return map[string]string{"status": "invalid-query", "error": err.Error()}, nil
	}
	return map[string]any{"status": "success", "data": expr.String()}, nil
}

// categorized reports whether the client requests the origin of each label.
func categorized(h http.Header) bool {
	for _, flag := range strings.Split(strings.Join(h.Values("X-Loki-Response-Encoding-Flags"), ","), ",") {
		if strings.TrimSpace(flag) == categorizeLabels {
			return true
		}
	}
	return false
}

const categorizeLabels = "categorize-labels"
