package metrics

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/grafana/regexp"
	"github.com/klauspost/compress/snappy"
	remoteapi "github.com/prometheus/client_golang/exp/api/remote"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/route"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/rules"
	"github.com/prometheus/prometheus/scrape"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/util/features"
	"github.com/prometheus/prometheus/util/notifications"
	v1 "github.com/prometheus/prometheus/web/api/v1"
	collectmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"

	"polymesh.dev/polymesh/observe/receive/guard"
	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

const (
	// maxRequest is the largest size of a request's parameters, and maxQuery of a single one.
	maxRequest = 64 << 10
	maxQuery   = 16 << 10
)

// handlers are the HTTP handlers.
type handlers struct{ read, write http.Handler }

// Handler serves Prometheus' HTTP API v1, its health checks and /metrics. Nothing can be written or deleted through it.
func (m *Metrics) Handler() http.Handler { return m.handlers.read }

// IngestHandler accepts samples: POST /v1/metrics (OpenTelemetry's, in protobuf), and POST /api/v1/write (Prometheus' remote write) if
// that is enabled.
func (m *Metrics) IngestHandler() http.Handler { return m.handlers.write }

func (m *Metrics) newHandlers() handlers {
	api := m.newAPI()
	router := route.New()
	api.Register(router)
	served := http.StripPrefix("/api/v1", router)

	read := http.NewServeMux()
	read.Handle("/api/v1/", readOnly(served))
	read.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	// The store is opened before it is served.
	for _, path := range []string{"/-/healthy", "/-/ready"} {
		read.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "Polymesh's store of metrics is ready.") })
	}
	write := http.NewServeMux()
	if m.series != nil {
		write.Handle("POST /v1/metrics", boundedOTLP(router))
	}
	if m.opts.RemoteWrite {
		write.Handle("POST /api/v1/write", boundedWrite(served))
	}
	return handlers{read: read, write: write}
}

// newAPI wraps a constructor that changes its parameters with each release of Prometheus.
func (m *Metrics) newAPI() *v1.API {
	view, version := apiView{m}, prometheusVersion()
	var writable storage.AppendableV2
	if m.series != nil {
		writable = m.series.writers()
	}
	return v1.NewAPI(
		checked{m.engine, m.parser},
		m.queryable,
		writable,
		view,
		func(context.Context) v1.ScrapePoolsRetriever { return view },
		func(context.Context) v1.TargetRetriever { return view },
		func(context.Context) v1.AlertmanagerRetriever { return view },
		view.config,
		view.flags(),
		v1.GlobalURLOptions{Host: externalURL.Host, Scheme: externalURL.Scheme, ListenAddress: externalURL.Host},
		func(h http.HandlerFunc) http.HandlerFunc { return h }, // ready: it is open
		view,
		m.opts.Dir,
		false, // admin API
		false, // search API
		0,     // its limit
		m.log.With("part", "api"),
		func(context.Context) v1.RulesRetriever { return view },
		0, 1, 0, // remote read, which readOnly refuses
		false,                    // agent
		regexp.MustCompile(`^$`), // no other origins
		view.runtime,
		&v1.PrometheusVersion{Version: version, GoVersion: runtime.Version()},
		func() []notifications.Notification { return []notifications.Notification{} },
		func() (<-chan notifications.Notification, func(), bool) { return nil, nil, false },
		m.registry,
		m.registry,
		nil, // the usual statistics of a query
		m.opts.RemoteWrite,
		remoteapi.MessageTypes{remoteapi.WriteV1MessageType, remoteapi.WriteV2MessageType},
		writable != nil, // OTLP
		false, false,    // OTLP's deltas
		lookback,
		false, // types and units as labels
		false, // metadata in the log
		nil,   // other codes of errors
		features.NewRegistry(),
		v1.OpenAPIOptions{ExternalURL: externalURL.String(), Version: version},
		m.parser,
		false, // cost of queries
		queryTimeout,
	)
}

// prometheusVersion is the version of Prometheus whose packages this is built from. Grafana, for example, shows it, and asks for what that version
// has.
func prometheusVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, m := range info.Deps {
		if m.Path == "github.com/prometheus/prometheus" {
			return release(m.Version)
		}
	}
	return ""
}

// release returns the release of a module's version: Prometheus 3.16.0 is the module's v0.316.0, as Go allows no 3 there without another path.
func release(module string) string {
	rest, ok := strings.CutPrefix(module, "v0.3")
	minor, patch, ok2 := strings.Cut(rest, ".")
	if n, err := strconv.Atoi(minor); ok && ok2 && err == nil && len(minor) == 2 {
		return fmt.Sprintf("3.%d.%s", n, patch)
	}
	return strings.TrimPrefix(module, "v")
}

// readOnly passes on requests that only read, with parameters of a bounded size.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/api/v1/")
		if path == "read" || path == "write" || strings.HasPrefix(path, "admin/") || strings.HasPrefix(path, "otlp/") {
			refuse(w, http.StatusForbidden, "nothing is written or deleted here, and remote read is not offered")
			return
		}
		if len(r.URL.RawQuery) > maxRequest {
			refuse(w, http.StatusRequestURITooLong, "the parameters have more than %d bytes", maxRequest)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
		if err := r.ParseForm(); err != nil {
			refuse(w, http.StatusBadRequest, "the parameters cannot be read: %s", err)
			return
		}
		for name, values := range r.Form {
			for _, v := range values {
				if len(v) > maxQuery {
					refuse(w, http.StatusBadRequest, "the parameter %.50q has more than %d bytes", name, maxQuery)
					return
				}
				if d := rulefiles.Depth(v); d > rulefiles.MaxDepth {
					refuse(w, http.StatusBadRequest, "the parameter %.50q is nested %d deep, at most %d are allowed", name, d, rulefiles.MaxDepth)
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}

// refuse answers as Prometheus' API does, so that its clients show why.
func refuse(w http.ResponseWriter, code int, format string, args ...any) {
	body, err := json.Marshal(v1.Response{Status: "error", ErrorType: "bad_data", Error: fmt.Sprintf(format, args...)})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(body)
}

const (
	// maxWrite is the largest compressed size of a write, and maxDecoded the largest decompressed size.
	maxWrite   = 2 << 20
	maxDecoded = 8 << 20
)

// boundedWrite bounds a write before it is decompressed. Prometheus' own bound is 32 MiB, a fifth of this process' memory limit.
func boundedWrite(next http.Handler) http.Handler {
	busy := make(chan struct{}, 2)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case busy <- struct{}{}:
			defer func() { <-busy }()
		case <-r.Context().Done():
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxWrite))
		if err != nil {
			http.Error(w, fmt.Sprintf("it has more than %d bytes, or ended early: send fewer samples at once", maxWrite), http.StatusRequestEntityTooLarge)
			return
		}
		if n, err := snappy.DecodedLen(body); err != nil || n > maxDecoded {
			http.Error(w, fmt.Sprintf("it is not compressed by Snappy, or has more than %d bytes: send fewer samples at once", maxDecoded), http.StatusRequestEntityTooLarge)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

// maxOTLP is the largest uncompressed size of an OpenTelemetry request.
const maxOTLP = 4 << 20

// boundedOTLP checks a message before Prometheus decodes it with a recursive decoder.
func boundedOTLP(router http.Handler) http.Handler {
	request := (*collectmetrics.ExportMetricsServiceRequest)(nil).ProtoReflect().Descriptor()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Content-Type") != "application/x-protobuf" || r.Header.Get("Content-Encoding") != "" {
			http.Error(w, "only protobuf that is not compressed is read here", http.StatusUnsupportedMediaType)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxOTLP))
		if err != nil {
			http.Error(w, fmt.Sprintf("it has more than %d bytes, or ended early: send fewer metrics at once", maxOTLP), http.StatusRequestEntityTooLarge)
			return
		}
		if _, err := guard.Proto(request, body, guard.OTLP); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		checked := r.Clone(r.Context())
		checked.URL.Path, checked.URL.RawPath = "/otlp/v1/metrics", ""
		checked.Body, checked.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		router.ServeHTTP(w, checked)
	})
}

// apiView adapts the store to the API. A store that was opened read-only has neither targets nor rules.
type apiView struct{ m *Metrics }

var errNone = errors.New("the store was opened from its files: nothing is scraped")

func (v apiView) ScrapePools() []string {
	if v.m.targets == nil {
		return nil
	}
	return v.m.targets.ScrapePools()
}

func (v apiView) TargetsActive() map[string][]*scrape.Target {
	if v.m.targets == nil {
		return nil
	}
	return v.m.targets.TargetsActive()
}

func (v apiView) TargetsDropped() map[string][]*scrape.Target {
	if v.m.targets == nil {
		return nil
	}
	return v.m.targets.TargetsDropped()
}

func (v apiView) TargetsDroppedCounts() map[string]int {
	if v.m.targets == nil {
		return nil
	}
	return v.m.targets.TargetsDroppedCounts()
}

func (v apiView) ScrapePoolConfig(job string) (*config.ScrapeConfig, error) {
	if v.m.targets == nil {
		return nil, errNone
	}
	return v.m.targets.ScrapePoolConfig(job)
}

func (v apiView) Alertmanagers() []*url.URL {
	if v.m.notifier == nil {
		return nil
	}
	return v.m.notifier.Alertmanagers()
}

func (v apiView) DroppedAlertmanagers() []*url.URL {
	if v.m.notifier == nil {
		return nil
	}
	return v.m.notifier.DroppedAlertmanagers()
}

func (v apiView) RuleGroups() []*rules.Group {
	if v.m.rules == nil {
		return nil
	}
	return v.m.rules.RuleGroups()
}

func (v apiView) AlertingRules() []*rules.AlertingRule {
	if v.m.rules == nil {
		return nil
	}
	return v.m.rules.AlertingRules()
}

func (v apiView) ExemplarQuerier(ctx context.Context) (storage.ExemplarQuerier, error) {
	return v.m.db.ExemplarQuerier(ctx)
}

func (v apiView) config() config.Config {
	c, _, _ := v.m.current.get()
	return *c
}

// flags are the flags of Prometheus' main program that clients read.
func (v apiView) flags() map[string]string {
	return map[string]string{
		"storage.tsdb.path":                v.m.opts.Dir,
		"storage.tsdb.retention.time":      model.Duration(v.m.opts.Retention).String(),
		"storage.tsdb.retention.size":      fmt.Sprintf("%dB", v.m.opts.MaxBytes),
		"query.lookback-delta":             model.Duration(lookback).String(),
		"query.max-samples":                fmt.Sprint(scrapeconfig.Scaled(int64(maxSamples), v.m.opts.MaxSeries)),
		"query.max-concurrency":            fmt.Sprint(maxQueries),
		"query.timeout":                    model.Duration(queryTimeout).String(),
		"web.enable-admin-api":             "false",
		"web.enable-remote-write-receiver": fmt.Sprint(v.m.opts.RemoteWrite),
	}
}

func (v apiView) runtime() (v1.RuntimeInfo, error) {
	_, at, err := v.m.current.get()
	host, _ := os.Hostname()
	return v1.RuntimeInfo{
		StartTime: v.m.born, ServerTime: time.Now().UTC(), Hostname: host, CWD: v.m.opts.Dir, ReloadConfigSuccess: err == nil, LastConfigTime: at,
		GoroutineCount: runtime.NumGoroutine(), GOMAXPROCS: runtime.GOMAXPROCS(0), GOMEMLIMIT: debug.SetMemoryLimit(-1), GOGC: os.Getenv("GOGC"), GODEBUG: os.Getenv("GODEBUG"),
		StorageRetention: fmt.Sprintf("%s or %dB", model.Duration(v.m.opts.Retention), v.m.opts.MaxBytes),
	}, nil
}

func (v apiView) Stats(by string, limit int) (*tsdb.Stats, error) {
	return v.m.db.Head().Stats(by, limit), nil
}

func (v apiView) WALReplayStatus() (tsdb.WALReplayStatus, error) {
	return v.m.dbStats.Head.WALReplayStatus.GetWALReplayStatus(), nil
}

func (v apiView) BlockMetas() ([]tsdb.BlockMeta, error) { return v.m.blocks(), nil }

// errReadOnly is for the admin API, which is disabled.
var errReadOnly = errors.New("metrics are not deleted by request")

func (apiView) CleanTombstones() error                                         { return errReadOnly }
func (apiView) Delete(context.Context, int64, int64, ...*labels.Matcher) error { return errReadOnly }
func (apiView) Snapshot(string, bool) error                                    { return errReadOnly }
