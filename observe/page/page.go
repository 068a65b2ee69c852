// Package page is the one page of polymesh-observe: an API under /api/polymesh/v1 that joins what the stores recorded (metrics, logs, spans and
// snapshots of objects), and the files that a browser loads. It owns no data, changes nothing, and can answer for any recorded time, also when the
// cluster is gone. The program polymesh-observe serves it on its socket; who may reach that is decided by `polymesh dashboard`.
//
// The files are built by observe/web/build.mjs into the folder dist, which is embedded. Without a build, the page is a text that says how to make one.
package page

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/storage"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/tracestore"
)

// Logs is what the page reads of package logstore.
type Logs interface {
	// Select calls each for the selected entries in the order of time, until it returns false.
	Select(ctx context.Context, selector logstore.Selector, each func(logstore.Entry) bool) error
}

// Traces is what the page reads of package tracestore.
type Traces interface {
	// Trace returns tracestore.ErrNotFound if there is no such trace.
	Trace(ctx context.Context, id string) (tracestore.Trace, error)
	Find(ctx context.Context, query tracestore.Query) ([]tracestore.Trace, error)
	Services(ctx context.Context, start, end time.Time) ([]string, error)
}

// ClusterState is whether the cluster can be reached now.
type ClusterState struct {
	Name      string `json:"name"`
	Reachable bool   `json:"reachable"`
	// Since is when Reachable last changed, zero if that is not known.
	Since time.Time `json:"since,omitzero"`
	// Offline means that files are read and nothing is recorded. Since is the time of the last record then.
	Offline bool `json:"offline,omitempty"`
}

// Cluster knows whether the cluster can be reached.
type Cluster interface{ State() ClusterState }

// Options are the parts that the page reads. All are required but the handlers, Now and Log.
type Options struct {
	Engine    promql.QueryEngine
	Queryable storage.Queryable
	Logs      Logs
	Traces    Traces
	Cluster   Cluster
	// Prometheus serves Prometheus' API below /api/v1, and Loki Loki's below /loki. Only what reads is passed on.
	Prometheus, Loki http.Handler
	// Now is the time, time.Now if it is nil.
	Now func() time.Time
	Log *slog.Logger
}

// Limits of a request.
const (
	maxQueries = 8                // that are answered at a time
	queryTime  = 30 * time.Second // for one of them
)

// policy is the Content-Security-Policy of every response: scripts and styles are those of the page, and nothing else is loaded or sent.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

type server struct {
	Options
	slots  chan struct{}
	extent extentCache
}

// New returns the handler of the page.
func New(o Options) (http.Handler, error) {
	if o.Engine == nil || o.Queryable == nil || o.Logs == nil || o.Traces == nil || o.Cluster == nil {
		return nil, errors.New("the page needs the stores and the state of the cluster")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	files, err := newFiles()
	if err != nil {
		return nil, err
	}
	s := &server{Options: o, slots: make(chan struct{}, maxQueries)}
	mux := http.NewServeMux()
	for path, answer := range map[string]func(*http.Request) (any, error){
		"state":                        s.state,
		"extent":                       s.extentOf,
		"overview":                     s.overview,
		"graph":                        s.graph,
		"edge":                         s.edge,
		"request/{id}":                 s.request,
		"line":                         s.line,
		"traces":                       s.traces,
		"trace/{id}":                   s.trace,
		"workloads":                    s.workloads,
		"workloads/{namespace}/{name}": s.workload,
		"rollouts":                     s.rollouts,
		"rollouts/{namespace}/{name}":  s.rollout,
		"events":                       s.events,
		"nodes":                        s.nodes,
		"marks":                        s.marks,
	} {
		mux.Handle("GET /api/polymesh/v1/"+path, s.json(answer))
	}
	mux.HandleFunc("GET /api/", func(w http.ResponseWriter, _ *http.Request) {
		fail(w, http.StatusNotFound, "there is no such endpoint")
	})
	if o.Prometheus != nil {
		pass(mux, o.Prometheus, "/api/v1/", prometheusQueries)
	}
	if o.Loki != nil {
		pass(mux, o.Loki, "/loki/api/v1/", lokiQueries)
	}
	mux.Handle("GET /", files)
	return protect(mux), nil
}

// prometheusQueries and lokiQueries are the endpoints that read.
var (
	prometheusQueries = []string{
		"query", "query_range", "query_exemplars", "series", "labels", "label/{name}/values", "metadata", "format_query", "parse_query",
		"targets", "rules", "alerts", "status/buildinfo", "status/tsdb",
	}
	lokiQueries = []string{
		"query", "query_range", "series", "labels", "label/{name}/values", "index/stats", "index/volume", "index/volume_range", "format_query",
		"detected_labels", "detected_fields", "detected_field/{name}/values", "patterns", "tail", "status/buildinfo",
	}
)

// pass serves endpoints of another package's handler, so that what it offers besides (to write, to delete) is not on the page.
func pass(mux *http.ServeMux, to http.Handler, prefix string, paths []string) {
	for _, path := range paths {
		mux.Handle("GET "+prefix+path, to)
	}
}

// protect adds the headers of every response, and rejects what could change something.
func protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
		switch r.Method {
		case http.MethodGet, http.MethodHead:
			next.ServeHTTP(w, r)
		default:
			h.Set("Allow", "GET, HEAD")
			fail(w, http.StatusMethodNotAllowed, "the page only reads")
		}
	})
}

// statusError is an error with the status of the response.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return e.text }

// invalid is an error of the request.
func invalid(format string, args ...any) error {
	return &statusError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// missing is an error for something that was not recorded.
func missing(format string, args ...any) error {
	return &statusError{http.StatusNotFound, fmt.Sprintf(format, args...)}
}

// json serves what answer returns. A few are answered at a time, so that a page with many open views cannot exhaust the store's memory.
func (s *server) json(answer func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), queryTime)
		defer cancel()
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-ctx.Done():
			fail(w, http.StatusServiceUnavailable, "too many queries at a time: try again")
			return
		}
		result, err := answer(r.WithContext(ctx))
		if r.Context().Err() != nil {
			return // the browser has gone
		}
		if err != nil {
			status := http.StatusInternalServerError
			var known *statusError
			switch {
			case errors.As(err, &known):
				status = known.status
			case errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
				status = http.StatusServiceUnavailable
				err = fmt.Errorf("no answer within %s: choose a shorter time or fewer namespaces", queryTime)
			default:
				s.Log.Warn("the page could not answer", "path", r.URL.Path, "err", err)
			}
			fail(w, status, err.Error())
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		e := json.NewEncoder(w)
		e.SetEscapeHTML(true)
		if err := e.Encode(result); err != nil && r.Context().Err() == nil {
			s.Log.Debug("the answer was not sent", "path", r.URL.Path, "err", err)
		}
	})
}

// fail answers with an error as JSON.
func fail(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": strings.ToValidUTF8(text, "�")}) // the browser may have gone
}

// state says whether the cluster can be reached, and the store's time.
func (s *server) state(*http.Request) (any, error) {
	return struct {
		ClusterState
		Now int64 `json:"now"`
	}{s.Cluster.State(), s.Now().UnixMilli()}, nil
}
