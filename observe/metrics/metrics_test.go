package metrics

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/api"
	promv1 "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

const patience = 60 * time.Second

// fast is the store's own configuration, at a pace for tests.
func fast(t *testing.T, o scrapeconfig.Options) *config.Config {
	t.Helper()
	o.Node, o.Interval = "node-1", time.Second
	c, err := scrapeconfig.Base(o)
	require.NoError(t, err)
	c.GlobalConfig.EvaluationInterval = model.Duration(time.Second)
	return c
}

// addJobs adds jobs of the store's own as Prometheus reads them. Those with other names than the store's are not guarded.
func addJobs(t *testing.T, c *config.Config, text string) *config.Config {
	t.Helper()
	more, err := config.Load("global: {scrape_interval: 1s, scrape_timeout: 1s}\n"+text, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	c.ScrapeConfigs = append(c.ScrapeConfigs, more.ScrapeConfigs...)
	return c
}

type store struct {
	*Metrics
	t   *testing.T
	url string
	api promv1.API
}

func open(t *testing.T, o Options) *store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "metrics")
	}
	if o.Retention == 0 {
		o.Retention, o.MaxBytes = 24*time.Hour, 1<<30
	}
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	m, err := Open(t.Context(), o)
	require.NoError(t, err)
	s := serve(t, m)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return s
}

// serve has the handlers on a real socket, asked by Prometheus' own client.
func serve(t *testing.T, m *Metrics) *store {
	t.Helper()
	server := httptest.NewServer(m.Handler())
	t.Cleanup(server.Close)
	client, err := api.NewClient(api.Config{Address: server.URL})
	require.NoError(t, err)
	return &store{Metrics: m, t: t, url: server.URL, api: promv1.NewAPI(client)}
}

// query is an instant query's result, "labels value" each.
func (s *store) query(expr string) []string {
	s.t.Helper()
	v, _, _, err := s.api.Query(s.t.Context(), expr, time.Now())
	require.NoError(s.t, err)
	var got []string
	for _, x := range v.(model.Vector) {
		got = append(got, fmt.Sprintf("%s %s", x.Metric, x.Value))
	}
	return got
}

func (s *store) eventually(what string, f func() bool) {
	s.t.Helper()
	require.Eventually(s.t, f, patience, 50*time.Millisecond, what)
}

// is waits until a query has one result with this value.
func (s *store) is(expr string, want float64) {
	s.t.Helper()
	var got []string
	defer func() {
		if s.t.Failed() {
			s.t.Logf("%s: %q, targets: %q", expr, got, s.targetErrors())
		}
	}()
	s.eventually(fmt.Sprintf("%s is not %g", expr, want), func() bool {
		got = s.query(expr)
		return len(got) == 1 && strings.HasSuffix(got[0], fmt.Sprintf(" %g", want))
	})
}

func (s *store) targetErrors() map[string]string {
	errs := map[string]string{}
	r, err := s.api.Targets(context.Background())
	if err != nil {
		return map[string]string{"": err.Error()}
	}
	for _, a := range r.Active {
		errs[a.ScrapePool+" "+a.ScrapeURL] = string(a.Health) + " " + a.LastError
	}
	return errs
}

// ownIP is an address of this machine that is not loopback: guarded jobs connect no other one of it.
func ownIP(t *testing.T) string {
	t.Helper()
	all, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no address but loopback")
	return ""
}

// target serves on an address.
func target(t *testing.T, ip string, h http.HandlerFunc) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	require.NoError(t, err)
	s := &http.Server{Handler: h}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return l.Addr().String()
}

func text(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprint(w, body)
	}
}

// What is in this process is scraped as any target is: "up", its labels, and the end of a series and of a target.
func TestSources(t *testing.T) {
	reg := prometheus.NewRegistry()
	temperature := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "node_temperature", Help: "x"}, []string{"job", "chip"})
	reg.MustRegister(temperature)
	temperature.WithLabelValues("mine", "a").Set(42)
	var failing atomic.Bool
	sources := map[string]prometheus.Gatherer{scrapeconfig.JobNode: prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		if failing.Load() {
			return nil, fmt.Errorf("no /proc")
		}
		return reg.Gather()
	})}
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobNode, scrapeconfig.JobSelf}}), Sources: sources})

	s.is(`up{job="node",instance="node-1",node="node-1"}`, 1)
	s.is(`node_temperature{job="node",instance="node-1",node="node-1",chip="a",exported_job="mine"}`, 42)
	temperature.Reset()
	s.eventually("a series that has ended remains", func() bool { return len(s.query("node_temperature")) == 0 })
	temperature.WithLabelValues("mine", "b").Set(1)
	s.is("node_temperature", 1)
	failing.Store(true)
	s.is(`up{job="node"}`, 0)
	require.Empty(t, s.query("node_temperature"))
	require.Contains(t, fmt.Sprint(s.targetErrors()), "500 Internal Server Error")
	failing.Store(false)
	s.is(`up{job="node"}`, 1)

	// The store's own numbers.
	s.is(`up{job="polymesh-observe"}`, 1)
	s.is(`polymesh_observe_series_refused_total`, 0)
	require.NotEmpty(t, s.query("prometheus_tsdb_head_series > 0"))
	require.Empty(t, s.query("prometheus_tsdb_head_series_created_total"))
	require.Positive(t, s.Numbers()["series"])
	require.EqualValues(t, 2, s.Numbers()["targets_up"])
	require.Empty(t, s.Problem())
}

// A program of this machine is scraped through its UNIX socket.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	server := &http.Server{Handler: text("apiserver_request_total 7\n")}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	s := open(t, Options{
		Base:    fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobServer}}),
		Sockets: map[string]string{scrapeconfig.JobServer: path},
	})
	s.is(`apiserver_request_total{job="polymesh-server",instance="node-1"}`, 7)
	require.NoError(t, server.Close())
	s.is(`up{job="polymesh-server"}`, 0)
}

// The limits of a target. The others go on.
func TestSampleLimit(t *testing.T) {
	var large strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&large, "large{i=\"%d\"} 1\n", i)
	}
	const job = "\n- {job_name: %s, static_configs: [{targets: [%q]}], sample_limit: 5000, label_value_length_limit: 1024, body_size_limit: 4MiB, scrape_fallback_protocol: PrometheusText0.0.4}"
	jobs := "scrape_configs:"
	for name, h := range map[string]http.HandlerFunc{
		"small": text("small 1\n"), "large": text(large.String()), "long": text("long{x=\"" + strings.Repeat("a", 2000) + "\"} 1\n"),
		"endless": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4")
			for r.Context().Err() == nil {
				if _, err := w.Write([]byte(strings.Repeat("endless 1\n", 10000))); err != nil {
					return
				}
			}
		},
	} {
		jobs += fmt.Sprintf(job, name, target(t, "127.0.0.1", h))
	}
	s := open(t, Options{Base: addJobs(t, fast(t, scrapeconfig.Options{}), strings.ReplaceAll(jobs, "scrape_fallback", "fallback_scrape"))})
	s.is("small", 1)
	s.is(`up{job="large"}`, 0)
	s.is(`up{job="long"}`, 0)
	s.is(`up{job="endless"}`, 0)
	s.is(`scrape_samples_post_metric_relabeling{job="large"}`, 100_000)
	errs := s.targetErrors()
	all := fmt.Sprint(errs)
	require.Contains(t, all, "sample limit exceeded")
	require.Contains(t, all, "label_value_length_limit exceeded")
	require.Contains(t, all, "body size limit exceeded")
	require.Empty(t, s.query("large"))
	require.Less(t, s.Numbers()["series"], int64(6000))
	s.is(`up{job="small"}`, 1)
}

// The limit of all: a target whose series are others each time fills nothing, and those that there are go on.
func TestSeriesLimit(t *testing.T) {
	ip := ownIP(t)
	var n atomic.Int64
	dir := filepath.Join(t.TempDir(), "metrics")
	jobs := fmt.Sprintf(
		"scrape_configs:\n- {job_name: istio-proxy, static_configs: [{targets: [%q]}]}\n- {job_name: pods, static_configs: [{targets: [%q]}]}\n",
		target(t, ip, text("steady{a=\"b\"} 1\n")),
		target(t, ip, func(w http.ResponseWriter, r *http.Request) {
			var b strings.Builder
			for range 200 {
				fmt.Fprintf(&b, "churn{i=\"%d\"} 1\n", n.Add(1))
			}
			text(b.String())(w, r)
		}))
	base := func() *config.Config {
		return addJobs(t, fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}}), jobs)
	}
	const most = 600
	s := open(t, Options{Dir: dir, Base: base(), MaxSeries: most})
	s.is(`steady`, 1)
	s.eventually("nothing is refused", func() bool { return s.Numbers()["series_refused"] > 0 })
	require.Contains(t, s.Problem(), "there are 600 series, the highest number")
	s.is(`up{job="pods"}`, 1)
	s.is(`sum(count_over_time(steady[2s]) > 0)`, 2)
	// The store's own series do not count as strangers'.
	require.LessOrEqual(t, s.Numbers()["series"], int64(most+200))
	s.is(`ALERTS{alertname="SeriesRefused",alertstate="firing"}`, 1)
	require.NoError(t, s.Close())

	// After a restart none is known to the scraper, and those that there are go on.
	s = open(t, Options{Dir: dir, Base: base(), MaxSeries: most})
	s.eventually("nothing is refused", func() bool { return s.Numbers()["series_refused"] > 0 })
	s.is(`steady`, 1)
	s.is(`sum(count_over_time(steady[2s]) > 0)`, 2)
	require.LessOrEqual(t, s.Numbers()["series"], int64(most+200))
}

// Series whose target has gone do not count for long, and can still be queried.
func TestGoneSeries(t *testing.T) {
	ip := ownIP(t)
	var n atomic.Int64
	jobs := fmt.Sprintf("scrape_configs:\n- {job_name: pods, static_configs: [{targets: [%q]}]}\n", target(t, ip, func(w http.ResponseWriter, r *http.Request) {
		b := strings.Builder{}
		b.WriteString("steady 1\n")
		if generation := n.Add(1); generation <= 10 {
			for i := range 50 {
				fmt.Fprintf(&b, "pod{generation=\"%d\",i=\"%d\"} 1\n", generation, i)
			}
		}
		text(b.String())(w, r)
	}))
	s := open(t, Options{Base: addJobs(t, fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}}), jobs), reload: time.Second})
	s.eventually("none has left the memory", func() bool {
		return n.Load() > 10 && s.db.Head().NumSeries() < 400 && s.db.Head().NumStaleSeries() < 100
	})
	require.Equal(t, []string{"{} 500"}, s.query(`count(max_over_time(pod[10m]))`))
	require.Equal(t, []string{"{} 1"}, s.query(`count(steady)`))
	require.Empty(t, s.Problem())
	require.WithinDuration(t, time.Now(), s.Newest(), time.Minute, "a block ends later than its samples")
}

// long is a series with n bytes of labels.
func long(i, n int) labels.Labels {
	b := labels.NewScratchBuilder(0)
	b.Add("__name__", "m")
	b.Add("i", fmt.Sprintf("%08d", i))
	for k := 0; n > 0; k++ {
		b.Add(fmt.Sprintf("l%02d", k), fmt.Sprintf("%08d", i)+strings.Repeat("x", min(n, 400)))
		n -= 400
	}
	b.Sort()
	return b.Labels()
}

// The limit of all labels: long ones fill no memory, neither now nor when they are read again at the start.
func TestLabelBytes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "metrics")
	const each = 1600
	write := func(s *store, to storage.AppendableV2, from, n, size int) {
		app := to.AppenderV2(t.Context())
		for i := from; i < from+n; i++ {
			_, err := app.Append(0, long(i, size), 0, time.Now().UnixMilli(), 1, nil, nil, storage.AOptions{})
			require.NoError(t, err)
		}
		require.NoError(t, app.Commit())
	}
	s := open(t, Options{Dir: dir})
	// One series.
	write(s, s.series.guests(), 0, 1, 4000)
	require.EqualValues(t, 1, s.Numbers()["series_refused"])
	require.Zero(t, s.Numbers()["series"])
	require.Empty(t, s.Problem())
	// All together.
	write(s, s.series.guests(), 0, 15_000, each)
	inMemory := s.series.labels.Load()
	require.GreaterOrEqual(t, inMemory, int64(maxAllLabelBytes))
	require.Less(t, inMemory, int64(maxAllLabelBytes+maxLabelBytes))
	require.Contains(t, s.Problem(), "the labels of all series have 16 MiB")
	series, refused := s.Numbers()["series"], s.Numbers()["series_refused"]
	require.EqualValues(t, 15_001, series+refused)
	// Who writes is told, those that there are go on, and the store's own still have a place.
	_, err := s.Appendable().AppenderV2(t.Context()).Append(0, long(20_000, 10), 0, time.Now().UnixMilli(), 1, nil, nil, storage.AOptions{})
	require.ErrorIs(t, err, storage.ErrOutOfBounds)
	write(s, s.series.guests(), 0, 10, each)
	write(s, s.series.own(), 30_000, 10, each)
	require.Equal(t, series+10, s.Numbers()["series"])
	require.Equal(t, refused+1, s.Numbers()["series_refused"])
	require.NoError(t, s.Close())

	s = open(t, Options{Dir: dir})
	require.Equal(t, series+10, s.Numbers()["series"])
	require.Greater(t, s.series.labels.Load(), inMemory)
	write(s, s.series.guests(), 40_000, 10, each)
	require.EqualValues(t, 10, s.Numbers()["series_refused"])
	require.Equal(t, series+10, s.Numbers()["series"])

	// What leaves the memory makes room.
	require.NoError(t, s.db.Head().Truncate(time.Now().Add(time.Hour).UnixMilli()))
	require.Zero(t, s.db.Head().NumSeries())
	require.Zero(t, s.series.labels.Load())
}

// After the clock was ahead, nothing is stored until that time, and the status says so.
func TestClockAhead(t *testing.T) {
	s := open(t, Options{})
	add := func(name string, at time.Time) error {
		app := s.series.own().AppenderV2(t.Context())
		_, err := app.Append(0, labels.FromStrings("__name__", name), 0, at.UnixMilli(), 1, nil, nil, storage.AOptions{})
		return errors.Join(err, app.Commit())
	}
	require.NoError(t, add("a", time.Now()))
	require.Empty(t, s.Problem())
	require.NoError(t, add("b", time.Now().Add(50*time.Minute)))
	require.Empty(t, s.Problem())
	future := time.Now().Add(90 * 24 * time.Hour)
	require.NoError(t, add("c", future))
	require.Contains(t, s.Problem(), "the newest sample is of "+future.UTC().Format(time.RFC3339))
	require.Contains(t, s.Problem(), s.opts.Dir)
}

// Users' jobs come and go, and the store's own targets do not notice.
func TestApplyKeepsTargets(t *testing.T) {
	ip := ownIP(t)
	user := target(t, ip, text("user 1\n"))
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}})})
	s.is(`up{job="polymesh-observe"}`, 1)
	before := s.targets.TargetsActive()[scrapeconfig.JobSelf][0]
	apply := func(text string) []Problem {
		ps, err := s.Apply(t.Context(), []UserConfig{{Namespace: "shop", Name: "c", Prometheus: []byte(text)}})
		require.NoError(t, err)
		return ps
	}
	job := fmt.Sprintf("- job_name: x\n  scrape_interval: 5s\n  static_configs: [{targets: [%q]}]\n", user)
	require.Empty(t, apply("scrape_configs:\n"+job))
	s.is(`user{job="shop/c/x"}`, 1)
	userTarget := s.targets.TargetsActive()["shop/c/x"][0]
	// Another job and a mistake leave the first alone.
	ps := apply("scrape_configs:\n" + job + "- {job_name: y, bearer_token_file: /etc/shadow}\n- {job_name: z, static_configs: [{targets: ['192.0.2.99:1']}]}\n")
	require.Len(t, ps, 1)
	require.Equal(t, Problem{"shop", "c", "y", "authorization.credentials_file is not allowed, as the file would be one of the machine's: write its content here, or use a Prometheus in a pod: the job is not used"}, ps[0])
	s.eventually("the third job has no target", func() bool { return len(s.targets.TargetsActive()["shop/c/z"]) == 1 })
	require.Same(t, userTarget, s.targets.TargetsActive()["shop/c/x"][0])
	ps, err := s.Apply(t.Context(), nil)
	require.NoError(t, err)
	require.Empty(t, ps)
	s.eventually("the job remains", func() bool { return s.targets.TargetsActive()["shop/c/x"] == nil })
	require.Same(t, before, s.targets.TargetsActive()[scrapeconfig.JobSelf][0])
	// The own target's series never ended: a marker of its end would have made a gap.
	s.is(`count_over_time(up{job="polymesh-observe"}[1m]) >= bool 2`, 1)
	require.Empty(t, s.query(`absent(up{job="polymesh-observe"})`))
}

// What a user's job cannot reach, however it is named: the target is down and says why.
func TestGuard(t *testing.T) {
	ip := ownIP(t)
	var asked atomic.Int64
	secret := target(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) { asked.Add(1); text("secret 1\n")(w, r) })
	_, port, err := net.SplitHostPort(secret)
	require.NoError(t, err)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	unixServer := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked.Add(1); text("secret 1\n")(w, r) })}
	go func() { _ = unixServer.Serve(l) }()
	defer unixServer.Close()
	redirect := target(t, ip, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+secret+"/metrics", http.StatusFound)
	})
	reserved := target(t, ip, func(w http.ResponseWriter, r *http.Request) { asked.Add(1); text("secret 1\n")(w, r) })
	_, reservedPort, err := net.SplitHostPort(reserved)
	require.NoError(t, err)
	var reservedNumber uint16
	_, err = fmt.Sscan(reservedPort, &reservedNumber)
	require.NoError(t, err)
	good := target(t, ip, text("good 1\n"))

	jobs := map[string]struct{ body, want string }{
		"relabelled": {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: '` + secret + `'}]`, "it is this machine's own"},
		"mapped":     {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: '[::ffff:127.0.0.1]:` + port + `'}]`, "it is this machine's own"},
		"zero":       {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: '0.0.0.0:` + port + `'}]`, "it is this machine's own"},
		"name":       {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: 'localhost:` + port + `'}]`, "it is this machine's own"},
		"metadata":   {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: '169.254.169.254'}]`, "it is link-local"},
		"process":    {`static_configs: [{targets: ['192.0.2.99:80']}], relabel_configs: [{target_label: __address__, replacement: 'polymesh-observe.polymesh.invalid:80'}]`, "polymesh.invalid"},
		"redirected": {`static_configs: [{targets: ['` + redirect + `']}]`, "it is this machine's own"},
		"reserved":   {`static_configs: [{targets: ['` + reserved + `']}]`, "is Kubernetes' own"},
		"socket":     {`static_configs: [{targets: ['192.0.2.99:80'], labels: {__unix_socket__: '` + socket + `'}}], scrape_timeout: 1s`, ""},
	}
	file := "scrape_configs:\n- {job_name: good, static_configs: [{targets: ['" + good + "']}], scrape_interval: 5s}\n"
	for name, j := range jobs {
		file += fmt.Sprintf("- {job_name: %s, scrape_interval: 5s, %s}\n", name, j.body)
	}
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Local: []string{scrapeconfig.JobSelf}}), ReservedPorts: []uint16{reservedNumber}})
	ps, err := s.Apply(t.Context(), []UserConfig{{Namespace: "shop", Name: "c", Prometheus: []byte(file)}})
	require.NoError(t, err)
	require.Empty(t, ps)
	s.is(`good{job="shop/c/good"}`, 1)
	for name, j := range jobs {
		var got string
		s.eventually(name+" was not asked", func() bool {
			r, err := s.api.Targets(t.Context())
			require.NoError(t, err)
			for _, a := range r.Active {
				if a.ScrapePool == "shop/c/"+name {
					got = a.LastError
				}
			}
			return got != ""
		})
		require.Contains(t, got, j.want, name)
	}
	require.Zero(t, asked.Load())
	require.Empty(t, s.query("secret"))

	// One of the store's own jobs reaches it.
	s = open(t, Options{Base: addJobs(t, fast(t, scrapeconfig.Options{}), "scrape_configs: [{job_name: own, static_configs: [{targets: ['"+secret+"']}]}]")})
	s.is("secret", 1)
}

// An answer of a few bytes that is much when it is decompressed ends at the limit for users' jobs.
func TestCompressedBody(t *testing.T) {
	var body bytes.Buffer
	w := gzip.NewWriter(&body)
	for range 5 << 10 {
		_, err := w.Write([]byte("# " + strings.Repeat("x", 1021) + "\n"))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	var asked atomic.Value
	address := target(t, ownIP(t), func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Header.Get("Accept-Encoding"))
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(body.Bytes())
	})
	s := open(t, Options{})
	_, err := s.Apply(t.Context(), []UserConfig{{Namespace: "shop", Name: "c", Prometheus: []byte("scrape_configs: [{job_name: x, scrape_interval: 5s, static_configs: [{targets: ['" + address + "']}]}]")}})
	require.NoError(t, err)
	s.is(`up{job="shop/c/x"}`, 0)
	require.Contains(t, fmt.Sprint(s.targetErrors()), "body size limit exceeded")
	require.Equal(t, "identity", asked.Load())
}

// Whoever cannot reach the folder, or finds another's, is told what to do.
func TestOpenFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err := Open(t.Context(), Options{Dir: file, Retention: time.Hour, Log: slog.New(slog.DiscardHandler)})
	require.ErrorContains(t, err, "open the metrics in "+file)
	s := open(t, Options{})
	_, err = Open(t.Context(), Options{Dir: s.opts.Dir, Retention: time.Hour, Log: slog.New(slog.DiscardHandler)})
	require.ErrorContains(t, err, "lock")
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
}
