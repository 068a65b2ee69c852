package metrics

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	promv1 "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"
	collectmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	otlpcommon "go.opentelemetry.io/proto/otlp/common/v1"
	otlpmetrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	otlpresource "go.opentelemetry.io/proto/otlp/resource/v1"
	"go.yaml.in/yaml/v2"
	"google.golang.org/protobuf/proto"

	"polymesh.dev/polymesh/observe/privilege"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

func (s *store) get(path string) (int, string) {
	s.t.Helper()
	r, err := http.Get(s.url + path)
	require.NoError(s.t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	require.NoError(s.t, err)
	return r.StatusCode, string(body)
}

func (s *store) post(path, contentType string, body []byte) (int, string) {
	s.t.Helper()
	r, err := http.Post(s.url+path, contentType, bytes.NewReader(body))
	require.NoError(s.t, err)
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	require.NoError(s.t, err)
	return r.StatusCode, string(text)
}

const form = "application/x-www-form-urlencoded"

// Prometheus' own client, over a real socket.
func TestAPI(t *testing.T) {
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}}), Retention: 7 * 24 * time.Hour, MaxBytes: 1 << 30})
	s.is(`up`, 1)
	ctx := t.Context()
	now := time.Now()

	v, _, _, err := s.api.QueryRange(ctx, "up", promv1.Range{Start: now.Add(-time.Minute), End: now, Step: 15 * time.Second})
	require.NoError(t, err)
	require.Len(t, v, 1)
	names, _, _, err := s.api.LabelValues(ctx, "__name__", nil, now.Add(-time.Hour), now)
	require.NoError(t, err)
	require.Contains(t, names, model.LabelValue("up"))
	series, _, _, err := s.api.Series(ctx, []string{"up"}, now.Add(-time.Hour), now)
	require.NoError(t, err)
	require.Equal(t, []model.LabelSet{{"__name__": "up", "instance": "node-1", "job": "polymesh-observe"}}, series)
	labels, _, _, err := s.api.LabelNames(ctx, nil, now.Add(-time.Hour), now)
	require.NoError(t, err)
	require.Contains(t, labels, model.LabelName("instance"))
	rules, err := s.api.Rules(ctx, nil)
	require.NoError(t, err)
	require.Equal(t, "extend", rules.Groups[0].Name)
	_, err = s.api.Alerts(ctx)
	require.NoError(t, err)
	targets, err := s.api.Targets(ctx)
	require.NoError(t, err)
	require.Len(t, targets.Active, 1)
	meta, err := s.api.Metadata(ctx, "go_goroutines", "")
	require.NoError(t, err)
	require.NotEmpty(t, meta)
	_, err = s.api.TargetsMetadata(ctx, "", "go_goroutines", "")
	require.NoError(t, err)
	_, err = s.api.QueryExemplars(ctx, "up", now.Add(-time.Hour), now)
	require.NoError(t, err)
	_, err = s.api.AlertManagers(ctx)
	require.NoError(t, err)
	info, err := s.api.Buildinfo(ctx)
	require.NoError(t, err)
	require.NotEmpty(t, info.GoVersion)
	require.Equal(t, prometheusVersion(), info.Version) // a test has no list of modules: see TestRelease
	c, err := s.api.Config(ctx)
	require.NoError(t, err)
	require.Contains(t, c.YAML, "job_name: polymesh-observe")
	flags, err := s.api.Flags(ctx)
	require.NoError(t, err)
	require.Equal(t, "1w", flags["storage.tsdb.retention.time"])
	run, err := s.api.Runtimeinfo(ctx)
	require.NoError(t, err)
	require.Equal(t, "1w or 1073741824B", run.StorageRetention)
	require.True(t, run.ReloadConfigSuccess)
	stat, err := s.api.TSDB(ctx)
	require.NoError(t, err)
	require.Positive(t, stat.HeadStats.NumSeries)
	_, err = s.api.WalReplay(ctx)
	require.NoError(t, err)

	for _, path := range []string{
		"/-/ready", "/-/healthy", "/metrics", "/api/v1/status/tsdb/blocks", "/api/v1/scrape_pools", "/api/v1/features", "/api/v1/notifications", "/api/v1/format_query?query=up",
		"/api/v1/targets/relabel_steps?scrapePool=polymesh-observe&labels={}", "/api/v1/openapi.yaml",
	} {
		code, body := s.get(path)
		require.Equal(t, http.StatusOK, code, "%s: %s", path, body)
	}
	code, _ := s.get("/api/v1/notifications/live")
	require.Equal(t, http.StatusNoContent, code)
	code, _ = s.get("/api/v1/none")
	require.Equal(t, http.StatusNotFound, code)
}

// Nothing is written or deleted through the API, and what it is asked is bounded.
func TestAPIRefuses(t *testing.T) {
	s := open(t, Options{RemoteWrite: true})
	for _, path := range []string{"write", "read", "otlp/v1/metrics", "admin/tsdb/delete_series?match[]=up", "admin/tsdb/clean_tombstones", "admin/tsdb/snapshot"} {
		code, body := s.post("/api/v1/"+path, "application/x-protobuf", nil)
		require.Equal(t, http.StatusForbidden, code, "%s: %s", path, body)
	}
	for what, c := range map[string]struct {
		code int
		ask  func() (int, string)
	}{
		"a long query": {400, func() (int, string) {
			return s.post("/api/v1/query", form, []byte("query="+strings.Repeat("x", maxQuery+1)))
		}},
		"a large body": {400, func() (int, string) { return s.post("/api/v1/query", form, bytes.Repeat([]byte("a=b&"), maxRequest)) }},
		"a long URL":   {414, func() (int, string) { return s.get("/api/v1/query?query=" + strings.Repeat("x", maxRequest)) }},
		"no query":     {400, func() (int, string) { return s.get("/api/v1/query?query=up{") }},
		"many points":  {400, func() (int, string) { return s.get("/api/v1/query_range?query=1&start=0&end=1000000000&step=1") }},
		"many samples": {422, func() (int, string) {
			return s.get("/api/v1/query?query=" + url.QueryEscape("count_over_time(vector(1)[20d:1s])"))
		}},
		"deep parentheses": {400, func() (int, string) {
			return s.post("/api/v1/query", form, []byte("query="+strings.Repeat("(", 8000)+"1"+strings.Repeat(")", 8000)))
		}},
		"deep signs": {200, func() (int, string) {
			return s.post("/api/v1/query", form, []byte("query="+strings.Repeat("-", 16000)+"1"))
		}},
		"deep subqueries": {400, func() (int, string) {
			return s.post("/api/v1/query", form, []byte("query="+url.QueryEscape(strings.Repeat("max_over_time(", 600)+"vector(1)"+strings.Repeat("[1d:1m])", 600))))
		}},
		"repeated labels": {400, func() (int, string) {
			q := `label_replace(vector(1),"a","` + strings.Repeat("x", 4000) + `","","")`
			for range 2 {
				q = `label_join(` + q + `,"a",""` + strings.Repeat(`,"a"`, 300) + `)`
			}
			return s.post("/api/v1/query", form, []byte(url.Values{"query": {q}}.Encode()))
		}},
		"subqueries of many points": {400, func() (int, string) {
			now := time.Now().Unix()
			return s.post("/api/v1/query_range", form, []byte(url.Values{
				"query": {"quantile_over_time(0.5, vector(1)[2d:1s])"}, "start": {fmt.Sprint(now - 11000)}, "end": {fmt.Sprint(now)}, "step": {"1"},
			}.Encode()))
		}},
		"a regexp's repeat": {400, func() (int, string) {
			return s.get("/api/v1/query?query=" + url.QueryEscape(`up{a=~"(a{1000}){1000}"}`))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			code, body := c.ask()
			require.Equal(t, c.code, code, "%.300s", body)
			require.Equal(t, c.code != 200, strings.Contains(body, `"status":"error"`), "%.300s", body)
			require.Less(t, len(body), 64<<10)
		})
	}
	// Another page's script may not read it.
	r, err := http.NewRequest(http.MethodGet, s.url+"/api/v1/query?query=1", nil)
	require.NoError(t, err)
	r.Header.Set("Origin", "http://elsewhere.example")
	got, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	require.NoError(t, got.Body.Close())
	require.Empty(t, got.Header.Get("Access-Control-Allow-Origin"))
}

// What a query makes of labels is bounded by the series that it reads, not only by how it is written.
func TestMadeLabels(t *testing.T) {
	s := open(t, Options{})
	app := s.Appendable().AppenderV2(t.Context())
	for i := range 2000 {
		ls := labels.FromStrings("__name__", "m", "i", fmt.Sprint(i), "a", strings.Repeat("x", 1000))
		_, err := app.Append(0, ls, 0, time.Now().UnixMilli(), 1, nil, nil, storage.AOptions{})
		require.NoError(t, err)
	}
	require.NoError(t, app.Commit())
	ask := func(selector, replacement string) (int, string) {
		return s.get("/api/v1/query?query=" + url.QueryEscape(fmt.Sprintf(`count(label_replace(%s, "b", %q, "a", "(.*)"))`, selector, replacement)))
	}
	code, body := ask("m", "$1$1")
	require.Equal(t, http.StatusOK, code, body)
	require.Contains(t, body, `"2000"`)
	code, body = ask("m", strings.Repeat("$1", 60))
	require.Equal(t, http.StatusUnprocessableEntity, code, body)
	require.Contains(t, body, "select fewer series")
	code, body = ask(`m{i=~"1."}`, strings.Repeat("$1", 60))
	require.Equal(t, http.StatusOK, code, body)
}

// Pods' queries do not take those of the privileged.
func TestPlaces(t *testing.T) {
	s := open(t, Options{})
	blocked := make(chan struct{})
	var busy sync.WaitGroup
	began := make(chan struct{}, maxQueries)
	for range maxQueries {
		q, err := s.engine.NewInstantQuery(t.Context(), storage.QueryableFunc(func(int64, int64) (storage.Querier, error) {
			began <- struct{}{}
			<-blocked
			return nil, errNone
		}), nil, "up", time.Now())
		require.NoError(t, err)
		busy.Go(func() { q.Exec(context.Background()) })
	}
	for range maxQueries {
		<-began
	}
	ctx := privilege.With(t.Context())
	q, err := s.Engine().NewInstantQuery(ctx, s.Queryable(), nil, "vector(1)", time.Now())
	require.NoError(t, err)
	require.NoError(t, q.Exec(ctx).Err)
	close(blocked)
	busy.Wait()
}

func writeRequest(t *testing.T, series ...prompb.TimeSeries) []byte {
	t.Helper()
	b, err := (&prompb.WriteRequest{Timeseries: series}).Marshal()
	require.NoError(t, err)
	return snappy.Encode(nil, b)
}

func sample(name, value string, at time.Time) prompb.TimeSeries {
	return prompb.TimeSeries{
		Labels:  []prompb.Label{{Name: "__name__", Value: name}, {Name: "a", Value: value}},
		Samples: []prompb.Sample{{Value: 1, Timestamp: at.UnixMilli()}},
	}
}

func TestRemoteWrite(t *testing.T) {
	off := open(t, Options{})
	w := httptest.NewRecorder()
	off.IngestHandler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/api/v1/write", nil))
	require.Equal(t, http.StatusNotFound, w.Code)

	s := open(t, Options{RemoteWrite: true, MaxSeries: 50})
	server := httptest.NewServer(s.IngestHandler())
	defer server.Close()
	in := &store{t: t, url: server.URL}
	now := time.Now()
	code, body := in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, sample("sent", "b", now)))
	require.Equal(t, http.StatusNoContent, code, body)
	s.is(`sent{a="b"}`, 1)
	// A little late is not too late.
	code, body = in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, sample("sent", "b", now.Add(-time.Minute))))
	require.Equal(t, http.StatusNoContent, code, body)
	require.Equal(t, []string{`{a="b"} 2`}, s.query("count_over_time(sent[5m])"))

	// Nobody else's samples are those of the store's jobs.
	forged := sample("istio_requests_total", "b", now)
	forged.Labels = append(forged.Labels, prompb.Label{Name: "job", Value: "istio-proxy"})
	code, body = in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, forged))
	require.Equal(t, http.StatusBadRequest, code)
	require.Contains(t, body, `the job "istio-proxy" is one of the store's own`)

	// Errors that no client repeats forever.
	var many []prompb.TimeSeries
	for i := range 100 {
		many = append(many, sample("many", fmt.Sprint(i), now))
	}
	code, body = in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, many...))
	require.Equal(t, http.StatusBadRequest, code)
	require.Contains(t, body, "highest number of series (50)")
	code, _ = in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, sample("future", "b", now.Add(time.Hour))))
	require.Equal(t, http.StatusBadRequest, code)
	code, _ = in.post("/api/v1/write", "application/x-protobuf", writeRequest(t, sample("long", strings.Repeat("a", 20000), now)))
	require.Equal(t, http.StatusBadRequest, code)
	code, body = in.post("/api/v1/write", "application/x-protobuf", bytes.Repeat([]byte("x"), maxWrite+1))
	require.Equal(t, http.StatusRequestEntityTooLarge, code, body)
	code, body = in.post("/api/v1/write", "application/x-protobuf", snappy.Encode(nil, make([]byte, maxDecoded+1)))
	require.Equal(t, http.StatusRequestEntityTooLarge, code, body)
	code, body = in.post("/api/v1/write", "application/x-protobuf", []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0})
	require.Equal(t, http.StatusRequestEntityTooLarge, code, body)
	code, _ = in.get("/api/v1/query?query=1")
	require.Equal(t, http.StatusNotFound, code)
}

// gauge is a message as OpenTelemetry's libraries send it.
func gauge(t *testing.T, service string, attributes *otlpcommon.AnyValue) []byte {
	t.Helper()
	text := func(s string) *otlpcommon.AnyValue {
		return &otlpcommon.AnyValue{Value: &otlpcommon.AnyValue_StringValue{StringValue: s}}
	}
	point := &otlpmetrics.NumberDataPoint{TimeUnixNano: uint64(time.Now().UnixNano()), Value: &otlpmetrics.NumberDataPoint_AsDouble{AsDouble: 5}, Attributes: []*otlpcommon.KeyValue{{Key: "a", Value: attributes}}}
	message, err := proto.Marshal(&collectmetrics.ExportMetricsServiceRequest{ResourceMetrics: []*otlpmetrics.ResourceMetrics{{
		Resource:     &otlpresource.Resource{Attributes: []*otlpcommon.KeyValue{{Key: "service.name", Value: text(service)}}},
		ScopeMetrics: []*otlpmetrics.ScopeMetrics{{Metrics: []*otlpmetrics.Metric{{Name: "queue.length", Data: &otlpmetrics.Metric_Gauge{Gauge: &otlpmetrics.Gauge{DataPoints: []*otlpmetrics.NumberDataPoint{point}}}}}}},
	}}})
	require.NoError(t, err)
	return message
}

func TestOTLP(t *testing.T) {
	s := open(t, Options{})
	server := httptest.NewServer(s.IngestHandler())
	defer server.Close()
	in := &store{t: t, url: server.URL}
	const protobuf = "application/x-protobuf"
	value := &otlpcommon.AnyValue{Value: &otlpcommon.AnyValue_StringValue{StringValue: "b"}}
	code, body := in.post("/v1/metrics", protobuf, gauge(t, "cart", value))
	require.Equal(t, http.StatusOK, code, body)
	s.is(`queue_length{job="cart",a="b"}`, 5)

	code, body = in.post("/v1/metrics", protobuf, gauge(t, "istio-proxy", value))
	require.Equal(t, http.StatusBadRequest, code)
	require.Contains(t, body, "one of the store's own")
	for range 1000 {
		value = &otlpcommon.AnyValue{Value: &otlpcommon.AnyValue_ArrayValue{ArrayValue: &otlpcommon.ArrayValue{Values: []*otlpcommon.AnyValue{value}}}}
	}
	code, body = in.post("/v1/metrics", protobuf, gauge(t, "cart", value))
	require.Equal(t, http.StatusBadRequest, code)
	require.Contains(t, body, "nested too deep")
	code, _ = in.post("/v1/metrics", "application/json", []byte("{}"))
	require.Equal(t, http.StatusUnsupportedMediaType, code)
	code, _ = in.post("/v1/metrics", protobuf, make([]byte, maxOTLP+1))
	require.Equal(t, http.StatusRequestEntityTooLarge, code)
	code, _ = in.post("/v1/metrics", protobuf, []byte("x"))
	require.Equal(t, http.StatusBadRequest, code)
}

// A rule of a user's, a default one, and an Alertmanager that gets both. One on this machine's own addresses gets nothing.
func TestRules(t *testing.T) {
	ip := ownIP(t)
	alerts := make(chan []map[string]any, 100)
	manager := target(t, ip, func(w http.ResponseWriter, r *http.Request) {
		var got []map[string]any
		if r.URL.Path == "/am/api/v2/alerts" && json.NewDecoder(r.Body).Decode(&got) == nil {
			select {
			case alerts <- got:
			default:
			}
		}
	})
	own := target(t, "127.0.0.1", func(http.ResponseWriter, *http.Request) { t.Error("an Alertmanager on a forbidden address was asked") })
	state := target(t, "127.0.0.1", text("kube_pod_status_reason{namespace=\"shop\",reason=\"Evicted\"} 2\n"))
	s := open(t, Options{Base: addJobs(t, fast(t, scrapeconfig.Options{}), "scrape_configs: [{job_name: kube-state, static_configs: [{targets: ["+state+"]}]}]")})
	users := []UserConfig{{
		Namespace: "shop", Name: "rules",
		Prometheus: []byte("alerting:\n  alertmanagers:\n  - {path_prefix: /am, static_configs: [{targets: ['" + manager + "']}]}\n" +
			"  - {static_configs: [{targets: ['192.0.2.99:1']}], relabel_configs: [{target_label: __address__, replacement: '" + own + "'}]}\n"),
		Rules: map[string][]byte{
			"a.yaml": []byte("groups: [{name: a, rules: [{record: 'namespace:evicted:sum', expr: 'sum by (namespace) (kube_pod_status_reason)'}, {alert: Mine, expr: 'namespace:evicted:sum == 2', annotations: {text: '{{ $labels.namespace }} {{ $value }}'}}]}]"),
			"b.yaml": []byte("groups: [{name: b, rules: [{alert: Broken, expr: 'up{'}]}]"),
		},
	}}
	ps, err := s.Apply(t.Context(), users)
	require.NoError(t, err)
	require.Len(t, ps, 1)
	require.Equal(t, "b.yaml", ps[0].Where)

	s.is(`namespace:evicted:sum{namespace="shop"}`, 2)
	s.is(`ALERTS{alertname="PodsEvicted",alertstate="firing",namespace="shop",trigger="evicted"}`, 1)
	s.is(`ALERTS{alertname="Mine",alertstate="firing"}`, 1)
	want := map[string]bool{"PodsEvicted": true, "Mine": true}
	deadline := time.After(patience)
	for len(want) > 0 {
		select {
		case got := <-alerts:
			for _, a := range got {
				delete(want, fmt.Sprint(a["labels"].(map[string]any)["alertname"]))
			}
		case <-deadline:
			t.Fatalf("alerts were not sent: %v", want)
		}
	}
	found, err := s.api.AlertManagers(t.Context())
	require.NoError(t, err)
	require.Len(t, found.Active, 2)

	// The same again disturbs no alert.
	since := func() (active []time.Time) {
		for _, r := range s.rules.AlertingRules() {
			for _, a := range r.ActiveAlerts() {
				if r.Name() == "Mine" {
					active = append(active, a.ActiveAt)
				}
			}
		}
		return active
	}
	before := since()
	require.Len(t, before, 1)
	_, err = s.Apply(t.Context(), users)
	require.NoError(t, err)
	require.Equal(t, before, since())
	_, err = s.Apply(t.Context(), nil)
	require.NoError(t, err)
	s.eventually("the user's rule remains", func() bool { return len(s.query(`ALERTS{alertname="Mine"}`)) == 0 })
	s.is(`ALERTS{alertname="PodsEvicted"}`, 1)
}

// promtool is Prometheus' own program: go build -o <a folder of PATH>/promtool github.com/prometheus/prometheus/cmd/promtool.
func promtool(t *testing.T, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not in PATH")
	}
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	require.NoError(t, err, "promtool %s: %s", strings.Join(args, " "), out)
	return string(out)
}

func TestPromtool(t *testing.T) {
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}})})
	s.is("up", 1)
	require.Contains(t, promtool(t, "query", "instant", s.url, "up"), `up{instance="node-1", job="polymesh-observe"} => 1`)
	require.Contains(t, promtool(t, "query", "range", s.url, "up"), "1 @[")
	require.Contains(t, promtool(t, "query", "series", "--match=up", s.url), "polymesh-observe")
	require.Contains(t, promtool(t, "query", "labels", s.url, "job"), "polymesh-observe")
	require.Contains(t, promtool(t, "check", "ready", "--url="+s.url), "SUCCESS")
	require.Contains(t, promtool(t, "check", "healthy", "--url="+s.url), "SUCCESS")

	// The store's configuration and rules, as files.
	dir := t.TempDir()
	all, err := scrapeconfig.Base(scrapeconfig.Options{Node: "n", Kubeconfig: "/k", Kubelets: scrapeconfig.TLSFiles{CA: "/a", Cert: "/b", Key: "/c"}, Local: scrapeconfig.Local()})
	require.NoError(t, err)
	file := filepath.Join(dir, "prometheus.yml")
	jobs, err := yaml.Marshal(map[string]any{"scrape_configs": all.ScrapeConfigs})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, jobs, 0o600))
	require.Contains(t, promtool(t, "check", "config", "--syntax-only", file), "SUCCESS")
	require.Contains(t, promtool(t, "check", "rules", "../rulefiles/default.yaml"), "SUCCESS: 14 rules found")
}
func TestRelease(t *testing.T) {
	for module, want := range map[string]string{"v0.316.0": "3.16.0", "v0.308.1": "3.8.1", "v0.316.0-rc.1": "3.16.0-rc.1", "v3.20.0": "3.20.0", "(devel)": "(devel)", "": ""} {
		require.Equal(t, want, release(module), module)
	}
}
