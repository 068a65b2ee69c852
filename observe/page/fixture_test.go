package page

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/loki"
	"polymesh.dev/polymesh/observe/metrics"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/scrapeconfig"
	"polymesh.dev/polymesh/observe/tracestore"
)

// A made-up afternoon of the five-language example, in the real stores: from noon to fixtureNow. See the list of what happens at story.
var (
	fixtureNow   = time.Date(2026, 3, 2, 14, 0, 0, 0, time.UTC)
	fixtureStart = fixtureNow.Add(-2 * time.Hour)
)

const (
	app     = "polyglot-services"
	scrape  = 15 * time.Second
	century = 100 * 365 * 24 * time.Hour
)

// What happens, and when.
var (
	deployed    = fixtureNow.Add(-80 * time.Minute) // go-service gets 1.4.0
	rolledOut   = fixtureNow.Add(-40 * time.Minute) // a rollout of java-service begins, and is rolled back
	rolledBack  = rolledOut.Add(7 * time.Minute)
	outOfMemory = fixtureNow.Add(-18 * time.Minute) // node-service is killed at its memory limit, and again nine minutes later
	failing     = fixtureNow.Add(-12 * time.Minute) // a pod of rust-service breaks
	waiting     = fixtureNow.Add(-8 * time.Minute)  // a pod finds no node
	canary      = fixtureNow.Add(-6 * time.Minute)  // a rollout of fastapi-service is under way
)

// stores are the real ones. The metrics are written first, and then opened as they are when no program records any more.
type stores struct {
	dir     string
	db      *tsdb.DB
	metrics *metrics.Metrics
	logs    *logstore.Store
	traces  *tracestore.Store
	now     time.Time
	state   ClusterState
}

func newStores(t testing.TB) *stores {
	t.Helper()
	dir := t.TempDir()
	o := tsdb.DefaultOptions()
	o.StripeSize = 512
	// All of it stays in the head.
	o.MinBlockDuration = (24 * time.Hour).Milliseconds()
	o.MaxBlockDuration = o.MinBlockDuration
	db, err := tsdb.Open(filepath.Join(dir, "metrics"), nil, nil, o, nil)
	require.NoError(t, err)
	logs, err := logstore.Open(logstore.Options{Store: rowstore.Options{Dir: filepath.Join(dir, "logs"), Retention: century}, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	traces, err := tracestore.Open(tracestore.Options{Dir: filepath.Join(dir, "traces"), Retention: century, SpansPerSecond: -1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, traces.Close())
		require.NoError(t, logs.Close())
	})
	return &stores{dir: dir, db: db, logs: logs, traces: traces, now: fixtureNow, state: ClusterState{Name: "demo", Reachable: true}}
}

func (s *stores) State() ClusterState { return s.state }

// page returns the handler over the stores. No metrics can be recorded after that.
func (s *stores) page(t testing.TB) http.Handler {
	t.Helper()
	require.NoError(t, s.db.Close())
	var err error
	s.metrics, err = metrics.OpenReadOnly(t.Context(), filepath.Join(s.dir, "metrics"), t.TempDir(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.metrics.Close()) })
	h, err := New(Options{
		Engine: s.metrics.Engine(), Queryable: s.metrics.Queryable(), Logs: s.logs, Traces: s.traces, Cluster: s, Now: func() time.Time { return s.now },
		Prometheus: s.metrics.Handler(), Loki: loki.New(loki.Options{Store: s.logs, Log: slog.New(slog.DiscardHandler)}), Log: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	return h
}

// series is a counter, if it has a rate, or has a value.
type series struct {
	labels labels.Labels
	rate   func(time.Time) float64 // per second
	value  func(time.Time) float64
	// from and until are when it exists, all the time if zero.
	from, until time.Time
	total       float64
}

func steady(rate float64) func(time.Time) float64 { return func(time.Time) float64 { return rate } }

// record appends all series from start to end.
func (s *stores) record(t testing.TB, all []*series, start, end time.Time) {
	t.Helper()
	for at := start; !at.After(end); at = at.Add(scrape) {
		a := s.db.Appender(context.Background())
		for _, x := range all {
			if !x.from.IsZero() && at.Before(x.from) || !x.until.IsZero() && at.Add(-scrape).After(x.until) {
				continue
			}
			var v float64
			if !x.until.IsZero() && at.After(x.until) {
				v = math.Float64frombits(value.StaleNaN) // as the scrapes write it for what a target no longer has
			} else if x.rate != nil {
				x.total += x.rate(at) * scrape.Seconds()
				v = x.total
			} else {
				v = x.value(at)
			}
			_, err := a.Append(0, x.labels, at.UnixMilli(), v)
			require.NoError(t, err)
		}
		require.NoError(t, a.Commit())
	}
}

// pairOfWorkloads is the traffic of one workload to another.
type pairOfWorkloads struct {
	fromNS, from, toNS, to, service string
	port                            int
	rate                            float64 // per second
	ms                              float64 // median
	tcp                             bool
	plain                           bool // without mutual TLS
	failing                         func(time.Time) float64
	flags                           string
	since, until                    time.Time
}

var story = []pairOfWorkloads{
	{fromNS: "istio-system", from: "istio-ingressgateway", toNS: app, to: "fastapi-service", service: "fastapi-service", port: 8000, rate: 12, ms: 24, failing: between(failing, 0.021), flags: "-"},
	{fromNS: "istio-system", from: "istio-ingressgateway", toNS: app, to: "fastapi-service-canary", service: "fastapi-service", port: 8000, rate: 3.9, ms: 22, since: canary},
	{fromNS: app, from: "fastapi-service", toNS: app, to: "go-service", service: "go-service", port: 8080, rate: 11, ms: 4},
	{fromNS: app, from: "fastapi-service", toNS: app, to: "java-service", service: "java-service", port: 8080, rate: 6, ms: 18, failing: between(failing, 0.05), flags: "-"},
	{fromNS: app, from: "java-service", toNS: app, to: "node-service", service: "node-service", port: 8080, rate: 6, ms: 9},
	{fromNS: app, from: "node-service", toNS: app, to: "rust-service", service: "rust-service", port: 8080, rate: 5.4, ms: 2.4, failing: between(failing, 0.12), flags: "UF,URX"},
	{fromNS: app, from: "java-service", toNS: "data", to: "postgres", service: "postgres", port: 5432, rate: 2, tcp: true},
	{fromNS: app, from: "go-service", toNS: "data", to: "redis", service: "redis", port: 6379, rate: 0.4, tcp: true},
	{toNS: app, to: "rust-service", service: "rust-service", port: 8080, rate: 0.3, ms: 2, plain: true},
	{fromNS: app, from: "fastapi-service", toNS: app, to: "java-service-canary", service: "java-service", port: 8080, rate: 2.4, ms: 29, since: rolledOut, until: rolledBack, failing: between(rolledOut, 0.034), flags: "-"},
}

func later(since, standard time.Time) time.Time {
	if since.IsZero() {
		return standard
	}
	return since
}

func between(from time.Time, share float64) func(time.Time) float64 {
	return func(at time.Time) float64 {
		if at.Before(from) {
			return 0
		}
		return share
	}
}

var bounds = []float64{0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 600000, 1800000, 3600000}

// below is the share of a log-normal distribution below a bound.
func below(bound, median float64) float64 {
	return 0.5 * (1 + math.Erf(math.Log(bound/median)/(0.7*math.Sqrt2)))
}

func workloadPod(name string) string {
	return name + "-7c9f6d5b8-" + suffix(name)
}

// suffix is what Kubernetes adds to a pod's name, the same in each run.
func suffix(name string) string {
	const letters = "bcdfghjklmnpqrstvwxz2456789"
	out := []byte{}
	h := uint32(2166136261)
	for range 5 {
		for _, c := range []byte(name) {
			h = (h ^ uint32(c)) * 16777619
		}
		out = append(out, letters[h%uint32(len(letters))])
		h += 7
	}
	return string(out)
}

// afternoon fills the stores with the story.
func (s *stores) afternoon(t testing.TB) {
	t.Helper()
	s.record(t, slices.Concat(meshSeries(story), clusterSeries()), fixtureStart, fixtureNow)
	require.NoError(t, s.logs.Append(objectEntries()))
	require.NoError(t, s.logs.Append(eventEntries()))
	require.NoError(t, s.logs.Append(findingEntries()))
	entries, spans := requests()
	for part := range slices.Chunk(entries, 1000) {
		require.NoError(t, s.logs.Append(part))
	}
	for part := range slices.Chunk(spans, 1000) {
		result, err := s.traces.Append(part)
		require.NoError(t, err)
		require.Equal(t, len(part), result.Stored, result.Reason)
	}
	s.logs.Flush()
}

// day is the afternoon's change of traffic.
func day(at time.Time) float64 {
	x := at.Sub(fixtureStart).Minutes()
	return 0.82 + 0.14*math.Sin(x/17) + 0.06*math.Sin(x/3.1)
}

func meshSeries(pairs []pairOfWorkloads) []*series {
	var all []*series
	pods := map[[2]string]bool{}
	target := func(ns, name string) []string {
		pod := workloadPod(name)
		return []string{"job", scrapeconfig.JobProxies, "namespace", ns, "pod", pod, "workload", name, "node", "node-1", "instance", pod + ":15020"}
	}
	for _, c := range pairs {
		for _, reporter := range []string{"source", "destination"} {
			ns, name := c.fromNS, c.from
			if reporter == "destination" {
				ns, name = c.toNS, c.to
			}
			if name == "" {
				continue // no sidecar there
			}
			if !pods[[2]string{ns, name}] {
				pods[[2]string{ns, name}] = true
				all = append(all, &series{labels: labels.FromStrings(append([]string{"__name__", "up"}, target(ns, name)...)...), value: steady(1), from: c.since, until: c.until})
			}
			policy := "mutual_tls"
			principals := []string{"spiffe://cluster.local/ns/" + c.fromNS + "/sa/" + c.from, "spiffe://cluster.local/ns/" + c.toNS + "/sa/" + c.to}
			if c.plain {
				policy, principals = "none", []string{"unknown", "unknown"}
			}
			if reporter == "source" {
				policy = "unknown"
			}
			of := func(metric string, more ...string) labels.Labels {
				from, fromNS := c.from, c.fromNS
				if from == "" {
					from, fromNS = "unknown", "unknown"
				}
				all := slices.Concat([]string{"__name__", metric}, target(ns, name), []string{
					"reporter", reporter, "source_workload", from, "source_workload_namespace", fromNS, "source_principal", principals[0],
					"destination_workload", c.to, "destination_workload_namespace", c.toNS, "destination_principal", principals[1],
					"destination_service", fmt.Sprintf("%s.%s.svc.cluster.local", c.service, c.toNS), "destination_service_name", c.service,
					"destination_service_namespace", c.toNS, "connection_security_policy", policy, "destination_version", "v1",
				}, more)
				b := labels.NewScratchBuilder(len(all) / 2)
				byName := map[string]string{}
				for i := 0; i < len(all); i += 2 {
					byName[all[i]] = all[i+1]
				}
				for name, value := range byName {
					b.Add(name, value)
				}
				b.Sort()
				return b.Labels()
			}
			add := func(l labels.Labels, rate func(time.Time) float64) {
				all = append(all, &series{labels: l, rate: rate, from: c.since, until: c.until})
			}
			rate := func(at time.Time) float64 { return c.rate * day(at) }
			if c.tcp {
				add(of("istio_tcp_connections_opened_total", "request_protocol", "tcp", "response_flags", "-"), func(at time.Time) float64 { return rate(at) / 10 })
				add(of("istio_tcp_sent_bytes_total", "request_protocol", "tcp", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * 9_200 })
				add(of("istio_tcp_received_bytes_total", "request_protocol", "tcp", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * 1_450 })
				continue
			}
			share := func(at time.Time) float64 {
				if c.failing == nil {
					return 0
				}
				return c.failing(at)
			}
			add(of("istio_requests_total", "request_protocol", "http", "response_code", "200", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * (0.99 - share(at)) })
			add(of("istio_requests_total", "request_protocol", "http", "response_code", "404", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * 0.01 })
			if c.failing != nil {
				l := of("istio_requests_total", "request_protocol", "http", "response_code", "503", "response_flags", c.flags)
				if c.flags != "-" {
					if reporter == "destination" {
						continue // they never arrived
					}
					l = of("istio_requests_total", "request_protocol", "http", "response_code", "503", "response_flags", c.flags,
						"destination_workload", "unknown", "destination_workload_namespace", "unknown", "destination_principal", "unknown")
				}
				all = append(all, &series{labels: l, rate: func(at time.Time) float64 { return rate(at) * share(at) }, from: later(c.since, failing), until: c.until})
			}
			for _, bound := range append(slices.Clone(bounds), math.Inf(1)) {
				le := strconv.FormatFloat(bound, 'f', -1, 64)
				if math.IsInf(bound, 1) {
					le = "+Inf"
				}
				add(of("istio_request_duration_milliseconds_bucket", "request_protocol", "http", "response_code", "200", "response_flags", "-", "le", le), func(at time.Time) float64 {
					median := c.ms
					if c.failing != nil && at.After(failing) {
						median *= 1.9
					}
					if math.IsInf(bound, 1) {
						return rate(at)
					}
					return rate(at) * below(bound, median)
				})
			}
			add(of("istio_request_bytes_sum", "request_protocol", "http", "response_code", "200", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * 640 })
			add(of("istio_response_bytes_sum", "request_protocol", "http", "response_code", "200", "response_flags", "-"), func(at time.Time) float64 { return rate(at) * 2_300 })
		}
	}
	return all
}

// fixtureWorkload is one of the cluster's workloads.
type fixtureWorkload struct {
	ns, name, kind, image string
	cpu, memory           float64 // of each pod
	limit                 float64 // of memory, bytes
	pods                  int
}

var fixtureWorkloads = []fixtureWorkload{
	{app, "fastapi-service", "Deployment", "polyglot/fastapi-service:1.2.0", 0.11, 96e6, 256 << 20, 2},
	{app, "fastapi-service-canary", "Deployment", "polyglot/fastapi-service:1.3.0", 0.06, 98e6, 256 << 20, 1},
	{app, "go-service", "Deployment", "polyglot/go-service:1.4.0", 0.02, 18e6, 64 << 20, 2},
	{app, "java-service", "Deployment", "polyglot/java-service:2.0.3", 0.16, 280e6, 512 << 20, 2},
	{app, "node-service", "Deployment", "polyglot/node-service:0.9.1", 0.05, 118e6, 128 << 20, 1},
	{app, "rust-service", "Deployment", "polyglot/rust-service:0.3.0", 0.01, 7e6, 32 << 20, 2},
	{app, "report", "Job", "polyglot/report:1.0.0", 0, 0, 0, 1},
	{"data", "postgres", "StatefulSet", "postgres:18.1", 0.03, 160e6, 512 << 20, 1},
	{"data", "redis", "StatefulSet", "redis:8.2", 0.01, 24e6, 64 << 20, 1},
	{"istio-system", "istio-ingressgateway", "Deployment", "polymesh/proxyv2:1.31.0", 0.05, 60e6, 1 << 30, 1},
	{"istio-system", "istiod", "Deployment", "polymesh/pilot:1.31.0", 0.02, 110e6, 0, 1},
	{"kube-system", "coredns", "Deployment", "polymesh/coredns:1.14.0", 0.01, 22e6, 170 << 20, 1},
}

func podsOf(w fixtureWorkload) []string {
	var names []string
	for i := range w.pods {
		if w.kind == "StatefulSet" {
			names = append(names, w.name+"-"+strconv.Itoa(i))
		} else if i == 0 {
			names = append(names, workloadPod(w.name))
		} else {
			names = append(names, w.name+"-7c9f6d5b8-"+suffix(w.name+strconv.Itoa(i)))
		}
	}
	return names
}

// clusterSeries are the metrics of nodes, objects and containers.
func clusterSeries() []*series {
	var all []*series
	add := func(x *series, name string, more ...string) {
		x.labels = labels.FromStrings(append([]string{"__name__", name}, more...)...)
		all = append(all, x)
	}
	state := []string{"job", scrapeconfig.JobState, "instance", "node-1"}
	for _, job := range []string{scrapeconfig.JobState, scrapeconfig.JobNode, scrapeconfig.JobKubelet, scrapeconfig.JobServer} {
		add(&series{value: steady(1)}, "up", "job", job, "instance", "node-1")
	}
	add(&series{value: steady(0)}, "up", "job", "default/prometheus-config/kubernetes-pods", "instance", "10.42.0.9:80")

	node := []string{"job", scrapeconfig.JobNode, "instance", "node-1", "node", "node-1"}
	busy := func(at time.Time) float64 {
		if at.After(fixtureNow.Add(-30 * time.Minute)) {
			return 0.74 + 0.03*math.Sin(at.Sub(fixtureStart).Minutes())
		}
		return 0.42 + 0.1*day(at)
	}
	for cpu := range 4 {
		id := strconv.Itoa(cpu)
		add(&series{rate: func(at time.Time) float64 { return 1 - busy(at) }}, "node_cpu_seconds_total", append([]string{"cpu", id, "mode", "idle"}, node...)...)
		add(&series{rate: busy}, "node_cpu_seconds_total", append([]string{"cpu", id, "mode", "user"}, node...)...)
	}
	add(&series{value: steady(8 << 30)}, "node_memory_MemTotal_bytes", node...)
	add(&series{value: func(at time.Time) float64 { return (3.1 - 0.4*day(at)) * (1 << 30) }}, "node_memory_MemAvailable_bytes", node...)
	add(&series{value: steady(38e9)}, "node_filesystem_size_bytes", append([]string{"mountpoint", "/"}, node...)...)
	add(&series{value: steady(21e9)}, "node_filesystem_avail_bytes", append([]string{"mountpoint", "/"}, node...)...)
	for _, bound := range []string{"0.05", "0.1", "0.5", "1", "5", "+Inf"} {
		add(&series{rate: func(at time.Time) float64 {
			return map[string]float64{"0.05": 18, "0.1": 19.2, "0.5": 19.9, "1": 20, "5": 20, "+Inf": 20}[bound] * day(at)
		}}, "apiserver_request_duration_seconds_bucket", "job", scrapeconfig.JobServer, "instance", "node-1", "verb", "GET", "le", bound)
	}
	for _, name := range []string{"node-1", "node-2"} {
		of := append([]string{"node", name}, state...)
		add(&series{value: steady(1)}, "kube_node_info", append([]string{"kubelet_version", "v1.36.3", "kernel_version", "6.1.0-37-amd64", "os_image", "Debian GNU/Linux 12", "internal_ip", "192.0.2." + name[5:]}, of...)...)
		add(&series{value: steady(4)}, "kube_node_status_capacity", append([]string{"resource", "cpu"}, of...)...)
		add(&series{value: steady(8 << 30)}, "kube_node_status_capacity", append([]string{"resource", "memory"}, of...)...)
		add(&series{value: steady(110)}, "kube_node_status_allocatable", append([]string{"resource", "pods"}, of...)...)
		add(&series{value: steady(0)}, "kube_node_spec_unschedulable", of...)
		for _, condition := range []string{"Ready", "MemoryPressure", "DiskPressure"} {
			v := 0.0
			if condition == "Ready" {
				v = 1
			}
			add(&series{value: steady(v)}, "kube_node_status_condition", append([]string{"condition", condition, "status", "true"}, of...)...)
		}
	}
	kubelet := []string{"job", scrapeconfig.JobKubelet, "instance", "node-2", "node", "node-2"}
	add(&series{rate: func(at time.Time) float64 { return 1.1 * day(at) }}, "node_cpu_usage_seconds_total", kubelet...)
	add(&series{value: func(at time.Time) float64 { return 3.4 * (1 << 30) * day(at) }}, "node_memory_working_set_bytes", kubelet...)
	for _, w := range fixtureWorkloads {
		for i, pod := range podsOf(w) {
			of := append([]string{"namespace", w.ns, "pod", pod}, state...)
			add(&series{value: steady(1)}, "kube_pod_info", append([]string{"node", "node-" + strconv.Itoa(1+i%2)}, of...)...)
			phase := map[bool]float64{true: 1}[w.name == "report"]
			add(&series{value: steady(phase), from: map[bool]time.Time{true: waiting}[w.name == "report"]}, "kube_pod_status_phase", append([]string{"phase", "Pending"}, of...)...)
			created := fixtureStart.Add(-5 * time.Hour)
			if w.name == "report" {
				created = waiting
			}
			add(&series{value: steady(float64(created.Unix())), from: map[bool]time.Time{true: waiting}[w.name == "report"]}, "kube_pod_created", of...)
			if w.limit > 0 {
				add(&series{value: steady(w.limit)}, "kube_pod_container_resource_limits", append([]string{"container", "app", "resource", "memory"}, of...)...)
				add(&series{value: steady(w.limit / 2)}, "kube_pod_container_resource_requests", append([]string{"container", "app", "resource", "memory"}, of...)...)
				add(&series{value: steady(0.5)}, "kube_pod_container_resource_limits", append([]string{"container", "app", "resource", "cpu"}, of...)...)
			}
			add(&series{value: func(at time.Time) float64 {
				if w.name != "node-service" {
					return 0
				}
				n := 0.0
				for _, killed := range []time.Time{outOfMemory, outOfMemory.Add(9 * time.Minute)} {
					if at.After(killed) {
						n++
					}
				}
				return n
			}}, "kube_pod_container_status_restarts_total", append([]string{"container", "app"}, of...)...)
			box := []string{"job", scrapeconfig.JobKubelet, "instance", "node-1", "node", "node-1", "namespace", w.ns, "pod", pod, "container", "app"}
			add(&series{rate: func(at time.Time) float64 { return w.cpu * day(at.Add(time.Duration(i)*7*time.Minute)) }}, "container_cpu_usage_seconds_total", box...)
			add(&series{value: func(at time.Time) float64 {
				if w.name == "node-service" {
					// It grows until it is killed.
					begin := fixtureStart
					for _, killed := range []time.Time{outOfMemory, outOfMemory.Add(9 * time.Minute)} {
						if at.After(killed) {
							begin = killed
						}
					}
					return min(60e6+at.Sub(begin).Minutes()*8e6, 133e6)
				}
				return w.memory * (0.9 + 0.1*day(at))
			}}, "container_memory_working_set_bytes", box...)
			if w.ns == app && w.kind == "Deployment" {
				// Kubernetes has a sidecar among the init containers.
				box[len(box)-1] = "istio-proxy"
				add(&series{rate: steady(0.01)}, "container_cpu_usage_seconds_total", box...)
				add(&series{value: steady(48e6)}, "container_memory_working_set_bytes", box...)
				add(&series{value: steady(1 << 30)}, "kube_pod_init_container_resource_limits", append([]string{"container", "istio-proxy", "resource", "memory"}, of...)...)
				add(&series{value: steady(128 << 20)}, "kube_pod_init_container_resource_requests", append([]string{"container", "istio-proxy", "resource", "memory"}, of...)...)
			}
		}
	}
	return all
}

func fields(pairs ...string) []logstore.Field {
	var list []logstore.Field
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, logstore.Field{Name: pairs[i], Value: pairs[i+1]})
	}
	return list
}

func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (w fixtureWorkload) state(at time.Time) document.Workload {
	pods := int32(w.pods)
	s := document.Workload{
		Kind: w.kind, Namespace: w.ns, Name: w.name, UID: "uid-" + w.name, Created: document.At(fixtureStart.Add(-30 * time.Hour)), Generation: 3, Revision: "3",
		Replicas: pods, Ready: pods, Updated: pods, Available: pods,
		Containers: []document.Container{{Name: "app", Image: w.image, Limits: map[string]string{"memory": strconv.Itoa(int(w.limit))}}},
	}
	image, hash, created := w.image, "7c9f6d5b8", fixtureStart.Add(-5*time.Hour)
	if w.name == "go-service" && at.Before(deployed) {
		image, hash, s.Revision = "polyglot/go-service:1.3.2", "5d8c7b6f9", "2"
		s.Containers[0].Image = image
	} else if w.name == "go-service" {
		created = deployed
	}
	for i, name := range podsOf(w) {
		if hash != "7c9f6d5b8" {
			name = w.name + "-" + hash + "-" + suffix(name+hash)
		}
		p := document.Pod{
			Name: name, UID: "uid-" + name, Node: "node-" + strconv.Itoa(1+i%2), IP: "10.42.0." + strconv.Itoa(10+i), Phase: "Running", Created: document.At(created), Started: document.At(created),
			Owner: w.name + "-" + hash, Template: hash, Revision: s.Revision, Ready: true,
			Containers: []document.State{{Name: "app", Image: image, Ready: true, State: "running", Since: document.At(created)}, {Name: "istio-proxy", Image: "polymesh/proxyv2:1.31.0", Ready: true, State: "running", Since: document.At(created)}},
		}
		box := &p.Containers[0]
		switch {
		case w.name == "node-service" && at.After(outOfMemory):
			killed := outOfMemory
			box.Restarts = 1
			if again := outOfMemory.Add(9 * time.Minute); at.After(again) {
				killed, box.Restarts = again, 2
			}
			box.Since, box.Last = document.At(killed.Add(2*time.Second)), &document.End{Reason: "OOMKilled", ExitCode: 137, Finished: document.At(killed)}
		case w.name == "rust-service" && i == 1 && at.After(failing):
			p.Ready, box.Ready, box.State, box.Reason, box.Restarts = false, false, "waiting", "CrashLoopBackOff", 6
			box.Message = "back-off 5m0s restarting failed container=app"
			box.Last = &document.End{Reason: "Error", ExitCode: 101, Finished: document.At(at.Add(-time.Minute))}
			s.Ready, s.Available = 1, 1
			s.Conditions = []document.Condition{{Type: "Available", Status: "False", Reason: "MinimumReplicasUnavailable", Message: "Deployment does not have minimum availability.", Since: document.At(failing)}}
		case w.name == "report":
			p.Phase, p.Node, p.IP, p.Ready, p.Created = "Pending", "", "", false, document.At(waiting)
			p.Message = "0/2 nodes are available: 2 Insufficient memory."
			p.Containers = nil
			s.Ready, s.Available = 0, 0
		}
		s.Pods = append(s.Pods, p)
	}
	return s
}

// objectEntries are the snapshots of workloads and rollouts.
func objectEntries() []logstore.Entry {
	var list []logstore.Entry
	for _, w := range fixtureWorkloads {
		for at := fixtureStart; !at.After(fixtureNow); at = at.Add(5 * time.Minute) {
			if w.name == "report" && at.Before(waiting) || w.name == "fastapi-service-canary" && at.Before(canary) {
				continue
			}
			list = append(list, logstore.Entry{
				Time: at.Add(-time.Second), Labels: fields("job", document.Objects, "namespace", w.ns, "workload", w.name), Metadata: fields("kind", w.kind), Line: asJSON(w.state(at)),
			})
		}
	}
	lasting := func(d time.Duration) metav1.Duration { return metav1.Duration{Duration: d} }
	measure := func(requests int, errors float64, p99 time.Duration) document.Measure {
		return document.Measure{Requests: requests, ErrorRate: errors, P99: lasting(p99 * time.Millisecond)}
	}
	state := func(at time.Time, r document.Rollout) {
		list = append(list, logstore.Entry{Time: at, Labels: fields("job", document.Rollouts, "namespace", r.Namespace, "workload", r.Name), Line: asJSON(r)})
	}
	plan := document.Plan{Steps: []int{10, 50, 100}, Interval: lasting(3 * time.Minute), MaxErrorRate: 1, MaxP99: lasting(500 * time.Millisecond), MinRequests: 20, Timeout: lasting(10 * time.Minute)}
	r := document.Rollout{Name: "java-service", Namespace: app, Container: "app", Image: "polyglot/java-service:2.1.0", Previous: "polyglot/java-service:2.0.3", Plan: plan, Started: document.At(rolledOut), Phase: "Starting", Step: -1}
	state(rolledOut, r)
	r.Phase, r.Step, r.Weight = "Running", 0, 10
	state(rolledOut.Add(20*time.Second), r)
	r.Step, r.Weight = 1, 50
	r.Done = []document.Step{{Weight: 10, Canary: measure(108, 0, 24), Stable: measure(970, 0, 23)}}
	state(rolledOut.Add(200*time.Second), r)
	r.Phase, r.Reason = "RollingBack", "at 50 %: error rate 3.4 % of 356 requests, above --max-error-rate 1 (stable: 0 %)"
	r.Done = append(r.Done, document.Step{Weight: 50, Canary: measure(356, 3.4, 41), Stable: measure(361, 0, 23)})
	state(rolledBack.Add(-20*time.Second), r)
	r.Phase, r.Weight, r.Ended, r.Final = "RolledBack", 0, document.At(rolledBack), r.Previous
	state(rolledBack, r)
	state(canary, document.Rollout{Name: "fastapi-service", Namespace: app, Container: "app", Image: "polyglot/fastapi-service:1.3.0", Previous: "polyglot/fastapi-service:1.2.0", Plan: plan, Started: document.At(canary), Phase: "Running", Step: 0, Weight: 25})
	slices.SortFunc(list, func(a, b logstore.Entry) int { return a.Time.Compare(b.Time) })
	return list
}

// findingEntries are what the server's diagnosis has found, each minute.
func findingEntries() []logstore.Entry {
	var list []logstore.Entry
	broken, unplaced := podsOf(fixtureWorkloads[5])[1], workloadPod("report")
	for at := fixtureStart; !at.After(fixtureNow); at = at.Add(findings.Every) {
		var s findings.Survey
		if at.After(failing) {
			s.Findings = append(s.Findings, findings.Finding{
				Reason: "Crash", Kind: "Deployment", Namespace: app, Name: "rust-service", Pod: broken, Container: "app", Since: failing, Ready: 1, Replicas: 2,
				Message: "ended with exit code 101 (6 restarts), its last output: thread 'main' panicked at src/main.rs:42", Advice: "its whole log: `kubectl logs " + broken + " -n " + app + " -c app --previous`",
			})
		}
		if at.After(waiting) {
			s.Findings = append(s.Findings, findings.Finding{
				Reason: "Pending", Kind: "Job", Namespace: app, Name: "report", Pod: unplaced, Since: waiting, Bad: true, Replicas: 1,
				Message: "0/2 nodes are available: 2 Insufficient memory", Advice: "no node has that much left: lower the requests, or add a node",
			})
		}
		list = append(list, s.Entries(at.Add(-time.Second))...)
	}
	return list
}

func eventEntries() []logstore.Entry {
	var list []logstore.Entry
	add := func(at time.Time, ns, workload, kind, name, reason, kindOf, text string) {
		source := "kubelet"
		if _, ours := markKinds[reason]; ours {
			source = document.Polymesh
		}
		list = append(list, logstore.Entry{
			Time: at, Labels: fields("job", document.Events, "namespace", ns, "workload", workload), Line: text,
			Metadata: fields("kind", kind, "name", name, "reason", reason, "type", kindOf, "count", "1", "source", source),
		})
	}
	add(deployed, app, "go-service", "Deployment", "go-service", "Deployed", "Normal", "app: polyglot/go-service:1.3.2 → polyglot/go-service:1.4.0")
	add(deployed.Add(time.Second), app, "go-service", "Deployment", "go-service", "ScalingReplicaSet", "Normal", "Scaled up replica set go-service-7c9f6d5b8 from 0 to 1")
	add(rolledOut, app, "java-service", "Deployment", "java-service", "RolloutStarted", "Normal", "polyglot/java-service:2.0.3 → polyglot/java-service:2.1.0 by 10, 50, 100 %")
	add(rolledOut.Add(20*time.Second), app, "java-service", "Deployment", "java-service", "RolloutStep", "Normal", "10 % of the requests go to the canary")
	add(rolledOut.Add(200*time.Second), app, "java-service", "Deployment", "java-service", "RolloutStep", "Normal", "50 % of the requests go to the canary")
	add(rolledBack, app, "java-service", "Deployment", "java-service", "RolloutEnded", "Warning", "rolled back: at 50 %: error rate 3.4 % of 356 requests, above --max-error-rate 1 (stable: 0 %)")
	for _, killed := range []time.Time{outOfMemory, outOfMemory.Add(9 * time.Minute)} {
		add(killed, app, "node-service", "Pod", workloadPod("node-service"), "OOMKilled", "Warning", "container app was killed at its memory limit of 128 MiB")
		add(killed.Add(2*time.Second), app, "node-service", "Pod", workloadPod("node-service"), "ContainerRestarted", "Warning", "container app was started again, for the last time it ended with exit code 137")
	}
	for i := range 6 {
		add(failing.Add(time.Duration(i*i)*20*time.Second), app, "rust-service", "Pod", podsOf(fixtureWorkloads[5])[1], "BackOff", "Warning", "Back-off restarting failed container app in pod "+podsOf(fixtureWorkloads[5])[1])
	}
	add(waiting, app, "report", "Pod", workloadPod("report"), "FailedScheduling", "Warning", "0/2 nodes are available: 2 Insufficient memory. preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod.")
	add(canary, app, "fastapi-service", "Deployment", "fastapi-service", "RolloutStarted", "Normal", "polyglot/fastapi-service:1.2.0 → polyglot/fastapi-service:1.3.0 by 10, 50, 100 %")
	add(canary.Add(30*time.Second), app, "fastapi-service", "Deployment", "fastapi-service", "RolloutStep", "Normal", "25 % of the requests go to the canary")
	// Anyone can write an event with such a reason, or such a text.
	add(fixtureNow.Add(-4*time.Minute), "data", "redis", "Pod", "redis-0", "Deployed", "Normal", "not by Polymesh")
	list[len(list)-1].Metadata[5].Value = "kubernetes"
	add(fixtureNow.Add(-3*time.Minute), "data", "redis", "Pod", "redis-0", "Unhealthy", "Warning", `Readiness probe failed: <img src=x onerror="document.title='owned'"> [click](javascript:alert(1))`)
	slices.SortFunc(list, func(a, b logstore.Entry) int { return a.Time.Compare(b.Time) })
	return list
}

// fixtureHop is a call within one request.
type fixtureHop struct {
	from, to, service string
	port              int
	path              string
	ms                float64
	children          []fixtureHop
}

var chain = fixtureHop{from: "istio-ingressgateway", to: "fastapi-service", service: "fastapi-service", port: 8000, path: "/orders", ms: 26, children: []fixtureHop{
	{from: "fastapi-service", to: "go-service", service: "go-service", port: 8080, path: "/stock", ms: 4},
	{from: "fastapi-service", to: "java-service", service: "java-service", port: 8080, path: "/price", ms: 17, children: []fixtureHop{
		{from: "java-service", to: "node-service", service: "node-service", port: 8080, path: "/rates", ms: 9, children: []fixtureHop{
			{from: "node-service", to: "rust-service", service: "rust-service", port: 8080, path: "/round", ms: 2.4},
		}},
	}},
}}

// firstRequest is the x-request-id of a request that has everything; untraced of one without spans.
const (
	firstRequest = "30450c11-359b-9e2d-9844-a7a456c25a09"
	untraced     = "7f1d2c3b-4a59-4e68-8776-95a4b3c2d1e0"
)

func requests() ([]logstore.Entry, []tracestore.Span) {
	r := rand.New(rand.NewPCG(1, 2))
	var entries []logstore.Entry
	var spans []tracestore.Span
	n := 0
	for at := fixtureNow.Add(-30 * time.Minute); at.Before(fixtureNow.Add(-time.Second)); at = at.Add(4*time.Second + time.Duration(r.IntN(900))*time.Millisecond) {
		id := fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", r.Uint32(), r.IntN(1<<16), r.IntN(1<<12), r.IntN(1<<12), r.Int64N(1<<48))
		traced := true
		switch n {
		case 40:
			id = firstRequest
		case 41:
			id, traced = untraced, false
		}
		n++
		q := &fixtureRequest{r: r, id: id, trace: fmt.Sprintf("%016x%016x", r.Uint64()|1, r.Uint64()), traced: traced, broken: at.After(failing) && r.Float64() < 0.12}
		q.call(chain, at, "", 1)
		entries = append(entries, q.entries...)
		spans = append(spans, q.spans...)
		if n%7 == 0 {
			entries = append(entries, logstore.Entry{
				Time: at.Add(time.Second), Labels: podLabels("java-service", "app"),
				Line: fmt.Sprintf("%s  WARN 1 --- [orders] [http-nio-8080-exec-3] d.p.orders.Prices : price list is %d minutes old", at.Format("2006-01-02T15:04:05.000Z07:00"), n),
			})
		}
	}
	slices.SortStableFunc(entries, func(a, b logstore.Entry) int { return a.Time.Compare(b.Time) })
	return entries, spans
}

type fixtureRequest struct {
	r       *rand.Rand
	id      string
	trace   string
	traced  bool
	broken  bool
	entries []logstore.Entry
	spans   []tracestore.Span
}

func podLabels(workload, container string) []logstore.Field {
	ns := app
	if workload == "istio-ingressgateway" {
		ns = "istio-system"
	}
	return fields("job", "pods", "namespace", ns, "workload", workload, "pod", workloadPod(workload), "container", container, "node", "node-1", "stream", "stdout")
}

func address(workload string) string {
	return fmt.Sprintf("10.42.0.%d", 20+len(workload)%9+int(workload[0])%7)
}

func (q *fixtureRequest) span(parent, workload, name, kind string, start time.Time, took time.Duration, failed bool, proxy bool, tags ...string) string {
	id := fmt.Sprintf("%016x", q.r.Uint64()|1)
	if !q.traced {
		return id
	}
	ns := app
	if workload == "istio-ingressgateway" {
		ns = "istio-system"
	}
	k, _ := tracestore.ParseKind(kind)
	s := tracestore.Span{TraceID: q.trace, SpanID: id, ParentID: parent, Service: workload + "." + ns, Name: name, Kind: k, Start: start, Duration: took}
	if failed {
		s.Status = tracestore.StatusError
	}
	text := func(v string) tracestore.Value { return tracestore.Value{Type: tracestore.String, Text: v} }
	if proxy {
		s.Attributes = []tracestore.Attribute{
			{Key: "component", Value: text("proxy")}, {Key: "guid:x-request-id", Value: text(q.id)},
			{Key: "node_id", Value: text(fmt.Sprintf("sidecar~%s~%s.%s~%s.svc.cluster.local", address(workload), workloadPod(workload), ns, ns))},
		}
	} else {
		s.Service = workload
		s.Resource = []tracestore.Attribute{{Key: "k8s.pod.name", Value: text(workloadPod(workload))}, {Key: "k8s.namespace.name", Value: text(ns)}}
	}
	for i := 0; i < len(tags); i += 2 {
		s.Attributes = append(s.Attributes, tracestore.Attribute{Key: tags[i], Value: text(tags[i+1])})
	}
	q.spans = append(q.spans, s)
	return id
}

// call adds the lines and spans of a call, and returns how long it took and its code.
func (q *fixtureRequest) call(h fixtureHop, start time.Time, parent string, port int) (time.Duration, int) {
	took := time.Duration(h.ms * (0.7 + 0.7*q.r.Float64()) * float64(time.Millisecond))
	arrives := start.Add(300 * time.Microsecond)
	host := fmt.Sprintf("%s.%s.svc.cluster.local", h.service, app)
	code, flags, details := 200, "-", "via_upstream"
	lost := q.broken && h.to == "rust-service"
	if lost {
		code, flags, details, took = 503, "UF,URX", "upstream_reset_before_response_started{connection_failure}", took+40*time.Millisecond
	}
	// The caller's span is made first, so that it comes before its children; its length is set at the end.
	client := q.span(parent, h.from, fmt.Sprintf("%s:%d/*", host, h.port), "client", start, took, false, true, "http.method", "GET", "http.url", "http://"+h.service+h.path, "upstream_cluster", "outbound|"+strconv.Itoa(h.port)+"||"+host)
	clientAt := len(q.spans) - 1
	local := 40000 + q.r.IntN(20000)
	if !lost {
		server := q.span(client, h.to, fmt.Sprintf("%s:%d/*", host, h.port), "server", arrives, took, false, true, "http.method", "GET", "http.url", "http://"+h.service+h.path)
		serverAt := len(q.spans) - 1
		own := q.span(server, h.to, "GET "+h.path, "internal", arrives.Add(200*time.Microsecond), took, false, false)
		ownAt := len(q.spans) - 1
		inner := arrives.Add(900 * time.Microsecond)
		for _, child := range h.children {
			needed, childCode := q.call(child, inner, own, 0)
			if childCode >= 500 {
				code = 503
				if h.to == "fastapi-service" {
					code = 502
				}
			}
			inner = inner.Add(needed + 300*time.Microsecond)
		}
		took = max(took, inner.Sub(arrives)+400*time.Microsecond)
		if q.traced {
			q.spans[serverAt].Duration, q.spans[ownAt].Duration = took, took-400*time.Microsecond
			if code >= 500 {
				q.spans[serverAt].Status, q.spans[ownAt].Status = tracestore.StatusError, tracestore.StatusError
			}
		}
		q.access(h.to, "inbound", arrives, took, code, "-", h, local, host, "via_upstream")
		level, msg := "INFO", "request"
		if code >= 500 {
			level, msg = "ERROR", "request failed"
		}
		spanID, traceID := own, q.trace
		if !q.traced {
			spanID, traceID = "", ""
		}
		q.entries = append(q.entries, logstore.Entry{Time: arrives.Add(took - 300*time.Microsecond), Labels: podLabels(h.to, "app"), Line: asJSON(map[string]any{
			"time": arrives.Format(time.RFC3339Nano), "level": level, "msg": msg, "method": "GET", "path": h.path, "status": code,
			"duration_ms": float64(took.Microseconds()) / 1000, "request_id": q.id, "trace_id": traceID, "span_id": spanID,
		})})
		took += 500 * time.Microsecond
	}
	if q.traced {
		q.spans[clientAt].Duration = took
		q.spans[clientAt].Attributes = append(q.spans[clientAt].Attributes, tracestore.Attribute{Key: "http.status_code", Value: tracestore.Value{Type: tracestore.String, Text: strconv.Itoa(code)}})
		if code >= 500 {
			q.spans[clientAt].Status = tracestore.StatusError
		}
	}
	q.access(h.from, "outbound", start, took, code, flags, h, local, host, details)
	return took, code
}

// access adds a line of a proxy's log in Istio's default format.
func (q *fixtureRequest) access(workload, direction string, start time.Time, took time.Duration, code int, flags string, h fixtureHop, local int, host, details string) {
	upstream, cluster := fmt.Sprintf("%s:%d", address(h.to), h.port), fmt.Sprintf("outbound|%d||%s", h.port, host)
	upstreamLocal, own, remote := fmt.Sprintf("%s:%d", address(h.from), local), fmt.Sprintf("10.43.7.1:%d", h.port), fmt.Sprintf("%s:%d", address(h.from), local-7)
	if direction == "inbound" {
		cluster, upstream, upstreamLocal = fmt.Sprintf("inbound|%d||", h.port), fmt.Sprintf("%s:%d", address(h.to), h.port), "127.0.0.6:41221"
		own, remote = fmt.Sprintf("%s:%d", address(h.to), h.port), fmt.Sprintf("%s:%d", address(h.from), local)
	}
	ms := (took + 500*time.Microsecond).Milliseconds()
	line := fmt.Sprintf(`[%s] "GET %s HTTP/1.1" %d %s %s - "-" 0 %d %d %d "-" "curl/8.14.1" "%s" "%s:%d" "%s" %s %s %s %s - default`,
		start.UTC().Format("2006-01-02T15:04:05.000Z"), h.path, code, flags, details, 190+q.r.IntN(400), ms, ms, q.id, h.service, h.port, upstream, cluster, upstreamLocal, own, remote)
	q.entries = append(q.entries, logstore.Entry{Time: start.Add(took + 30*time.Millisecond), Labels: podLabels(workload, "istio-proxy"), Line: line})
}
