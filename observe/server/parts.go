package server

import (
	"log/slog"
	"net/http"
	"strings"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/datadir"
	"polymesh.dev/polymesh/observe/ingest"
	"polymesh.dev/polymesh/observe/jaeger"
	"polymesh.dev/polymesh/observe/privilege"
)

// parts holds the parts of the store, and the slots of their handlers on the sockets.
type parts struct {
	o      *config.Options
	dir    *datadir.Dir
	budget datadir.Budget
	log    *slog.Logger

	metrics, written, logs, traces, page, otlp, zipkin, thrift, ingest slot

	stores stores
	// temp is the folder for copies that reading requires. It is empty for a store that records.
	temp string
}

func newParts(o *config.Options, dir *datadir.Dir, budget datadir.Budget, log *slog.Logger) *parts {
	p := &parts{o: o, dir: dir, budget: budget, log: log}
	p.metrics.name, p.written.name, p.logs.name, p.traces.name, p.page.name = "metrics", "metrics", "logs", "traces", "the page"
	p.otlp.name, p.zipkin.name, p.thrift.name, p.ingest.name = "traces", "traces", "traces", "other nodes"
	return p
}

// rootHandler serves everything, on the socket for root.
func (p *parts) rootHandler(f *front, status http.Handler) http.Handler {
	mux := http.NewServeMux()
	p.metricsRoutes(mux)
	p.logRoutes(mux)
	p.traceRoutes(mux)
	if !p.o.ReadOnly {
		mux.Handle("/v1/", &p.otlp)
		mux.Handle("/api/v2/spans", &p.zipkin)
		mux.Handle("POST /api/traces", &p.thrift) // with GET, it is Jaeger's query
		mux.Handle(ingest.Path, &p.ingest)
	}
	mux.Handle("/", &p.page)
	limited := f.limited(audited(asker, p.log, mux))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.WithContext(privilege.With(r.Context()))
		// It must answer when nothing else does.
		if r.URL.Path == StatusPath {
			status.ServeHTTP(w, r)
			return
		}
		limited.ServeHTTP(w, r)
	})
}

func (p *parts) metricsRoutes(mux *http.ServeMux) {
	for _, path := range []string{"/api/v1/", "/-/ready", "/-/healthy"} {
		mux.Handle(path, &p.metrics)
	}
	if p.o.RemoteWrite {
		mux.Handle("POST /api/v1/write", &p.written)
	}
}

// pageRoutes serves the page and the APIs that it uses.
func (p *parts) pageRoutes(mux *http.ServeMux, view string) {
	mux.Handle("/{$}", http.RedirectHandler(view, http.StatusFound))
	mux.Handle("/", &p.page)
}

// metricsOrView serves two things with the same path: browsers get the page's view of metrics, scrapers the store's own metrics.
func (p *parts) metricsOrView(w http.ResponseWriter, r *http.Request) {
	w.Header().Add("Vary", "Accept")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		p.page.ServeHTTP(w, r)
		return
	}
	p.metrics.ServeHTTP(w, r)
}

func (p *parts) logRoutes(mux *http.ServeMux) {
	for _, path := range []string{"/loki/", "/otlp/", "/ready"} {
		mux.Handle(path, &p.logs)
	}
}

func (p *parts) traceRoutes(mux *http.ServeMux) {
	// Istio's sample has Jaeger below /jaeger, and Kiali's settings that go with it.
	for _, path := range []string{"/api/services", "/api/services/", "/api/operations", "/api/traces", "/api/traces/", "/api/dependencies", "/api/v3/", "/jaeger/api/"} {
		mux.Handle(path, &p.traces)
	}
}

// clusterEndpoints returns the sockets for pods. Those for programs only have their own API, so that access to one port does not give access to others.
// Those that `istioctl dashboard` opens have the page, too.
func (p *parts) clusterEndpoints(dir string, f *front) []endpoint {
	var endpoints []endpoint
	add := func(name string, s answerer) {
		endpoints = append(endpoints, endpoint{clusterSocket(dir, name), 0o660, ClusterGID, s})
	}
	web := func(name string, routes func(*http.ServeMux)) {
		mux := http.NewServeMux()
		routes(mux)
		add(name, newHTTP(f.limited(sameOrigin(audited(anyPod, p.log, mux))), p.log))
	}
	// Spans may come from browsers: apps' pages have exporters.
	spans := func(name, path string, s *slot) {
		mux := http.NewServeMux()
		mux.Handle(path, s)
		add(name, newHTTP(f.limited(mux), p.log))
	}
	web("prometheus", func(mux *http.ServeMux) {
		p.metricsRoutes(mux)
		mux.HandleFunc("/metrics", p.metricsOrView)
		p.pageRoutes(mux, "/metrics")
	})
	web("loki", p.logRoutes)
	web("jaeger-query", func(mux *http.ServeMux) {
		p.traceRoutes(mux)
		p.pageRoutes(mux, "/traces")
	})
	spans("otlp-http", "/v1/", &p.otlp)
	add("otlp-grpc", newHTTP2(p.stores.receiver.GRPC(), p.log))
	add("jaeger-grpc", remote{jaeger.GRPC(jaeger.Options{Store: p.stores.traces, Log: p.log})})
	spans("zipkin", "/api/v2/spans", &p.zipkin)
	spans("jaeger-thrift", "/api/traces", &p.thrift)
	web("kiali", func(mux *http.ServeMux) {
		mux.Handle("/", &p.page)
		// Where `istioctl dashboard kiali` goes.
		mux.Handle("/kiali", http.RedirectHandler("/graph", http.StatusFound))
		mux.Handle("/kiali/", http.RedirectHandler("/graph", http.StatusFound))
	})
	return endpoints
}
