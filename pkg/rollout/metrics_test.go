package rollout

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The values are those of Prometheus' histogram_quantile.
func TestQuantile(t *testing.T) {
	inf := math.Inf(1)
	for _, c := range []struct {
		buckets map[float64]float64
		q, want float64
	}{
		{map[float64]float64{1: 0, 5: 100, inf: 100}, 0.99, 4.96},
		{map[float64]float64{1: 50, 5: 100, inf: 100}, 0.5, 1},
		{map[float64]float64{1: 10, 5: 10, 10: 20, inf: 20}, 0.75, 7.5},
		{map[float64]float64{10: 98, 25: 98, inf: 100}, 0.99, 25}, // above every bound: the highest one
		{map[float64]float64{inf: 5}, 0.99, 0},
		{map[float64]float64{1: 0, inf: 0}, 0.99, 0},
		{nil, 0.99, 0},
	} {
		if got := quantile(c.q, c.buckets); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%v of %v is %v, want %v", c.q, c.buckets, got, c.want)
		}
	}
}

const (
	received = `reporter="destination",source_workload="client",source_workload_namespace="web",destination_workload=%q,destination_workload_namespace="shop",destination_service_name="api",destination_service_namespace="shop",request_protocol="http",response_code=%q,response_flags="-"`
	sent     = `reporter="source",source_workload="client",source_workload_namespace="web",destination_workload=%q,destination_workload_namespace="shop",destination_service_name="api",destination_service_namespace="shop",request_protocol="http",response_code=%q,response_flags="-"`
	nowhere  = `reporter="source",source_workload="client",source_workload_namespace="web",destination_workload="unknown",destination_workload_namespace="unknown",destination_service_name=%q,destination_service_namespace="shop",request_protocol="http",response_code="503",response_flags="UH"`
)

// exposed is what an agent shows.
type exposed struct {
	text strings.Builder
	said map[string]bool
}

// kind writes a metric's TYPE line, once.
func (e *exposed) kind(line string) {
	if !e.said[line] {
		e.said[line] = true
		e.text.WriteString("# TYPE " + line + "\n")
	}
}

func (e *exposed) requests(n int, labels string, args ...any) *exposed {
	e.kind("istio_requests_total counter")
	fmt.Fprintf(&e.text, "istio_requests_total{%s} %d\n", fmt.Sprintf(labels, args...), n)
	return e
}

// durations has fast ones within 5 ms and slow ones within 1 s.
func (e *exposed) durations(fast, slow int, labels string, args ...any) *exposed {
	l := fmt.Sprintf(labels, args...)
	e.kind("istio_request_duration_milliseconds histogram")
	for _, b := range []struct {
		le string
		n  int
	}{{"1", 0}, {"5", fast}, {"500", fast}, {"1000", fast + slow}, {"+Inf", fast + slow}} {
		fmt.Fprintf(&e.text, "istio_request_duration_milliseconds_bucket{%s,le=%q} %d\n", l, b.le, b.n)
	}
	fmt.Fprintf(&e.text, "istio_request_duration_milliseconds_sum{%s} 1\nistio_request_duration_milliseconds_count{%s} %d\n", l, l, fast+slow)
	return e
}

func scrape(t *testing.T, m *meter, proxy string, e *exposed) {
	t.Helper()
	families, err := parseMetrics([]byte("app_metric{ 1\nenvoy_server_live{} 1\n" + e.text.String()))
	if err != nil {
		t.Fatal(err)
	}
	m.add(proxy, families)
}

func shown() *exposed { return &exposed{said: map[string]bool{}} }

func plan() Plan {
	return Plan{Steps: []int{10, 50, 100}, Interval: metav1.Duration{Duration: time.Minute}, MaxErrorRate: 1, MaxP99: metav1.Duration{Duration: 500 * time.Millisecond},
		MinRequests: 20, Timeout: metav1.Duration{Duration: 10 * time.Minute}}
}

func TestMeasure(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"})
	// What was counted before does not count.
	scrape(t, m, "canary-1", shown().requests(1000, received, "api-canary", "500").durations(0, 1000, received, "api-canary", "500"))
	scrape(t, m, "stable-1", shown().requests(5000, received, "api", "200"))
	if !m.callers[workload{"web", "client"}] || len(m.callers) != 1 {
		t.Errorf("the callers are %v", m.callers)
	}
	m.first = false
	scrape(t, m, "canary-1", shown().requests(1000, received, "api-canary", "500").requests(99, received, "api-canary", "200").
		durations(0, 1000, received, "api-canary", "500").durations(99, 0, received, "api-canary", "200"))
	scrape(t, m, "stable-1", shown().requests(5900, received, "api", "200"))
	canary, stable := m.measure(m.canary), m.measure(m.stable)
	if canary.Requests != 99 || canary.ErrorRate != 0 || canary.Timed != 99 || canary.P99.Duration > 5*time.Millisecond || stable.Requests != 900 {
		t.Errorf("canary %+v, stable %+v", canary, stable)
	}
	if p := plan(); !p.enough(canary) || p.judge(canary, stable) != "" || m.certain(p) {
		t.Errorf("it is refused: %s", p.judge(canary, stable))
	}
	// The proxy starts anew: it counts from zero.
	scrape(t, m, "canary-1", shown().requests(1, received, "api-canary", "503"))
	if got := m.measure(m.canary); got.Requests != 100 || got.ErrorRate != 1 {
		t.Errorf("after a restart: %+v", got)
	}
	if p := plan(); p.judge(m.measure(m.canary), stable) != "" {
		t.Error("1 % is not above 1 %")
	}
	scrape(t, m, "canary-1", shown().requests(2, received, "api-canary", "503"))
	p := plan()
	const want = "error rate 2 % of 101 requests, above --max-error-rate 1 (stable: 0 %)"
	if got := p.judge(m.measure(m.canary), stable); got != want || m.certain(p) {
		t.Errorf("it says %q, certain %v, want %q", got, m.certain(p), want)
	}
	scrape(t, m, "canary-1", shown().requests(20, received, "api-canary", "503"))
	if !m.certain(p) {
		t.Error("twenty failures are not certain")
	}
}

func TestMeasureSlow(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"})
	m.first = false
	for _, n := range []int{0, 1} { // the first reading of a proxy is what the second is compared with
		scrape(t, m, "canary-1", shown().requests(200*n, received, "api-canary", "200").durations(180*n, 20*n, received, "api-canary", "200"))
	}
	p := plan()
	got := p.judge(m.measure(m.canary), Measure{Requests: 5, P99: metav1.Duration{Duration: 4 * time.Millisecond}})
	if want := "p99 950ms of 200 requests, above --max-p99 500ms (stable: 4ms)"; got != want || !m.certain(p) {
		t.Errorf("it says %q, certain %v", got, m.certain(p))
	}
}

// Only the callers know of requests that did not arrive.
func TestMeasureLost(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"})
	m.first = false
	for _, n := range []int{0, 1} {
		scrape(t, m, "canary-1", shown().requests(50*n, received, "api-canary", "200"))
		scrape(t, m, "client-1", shown().requests(50*n, sent, "api-canary", "200").requests(25*n, sent, "api-canary", "504").
			requests(25*n, nowhere, "api").requests(99*n, nowhere, "other").requests(1000*n, sent, "somebody", "500"))
	}
	if got := m.measure(m.canary); got.Requests != 100 || got.ErrorRate != 50 {
		t.Errorf("got %+v, want 50 %% of 100", got)
	}
	if got := m.measure(m.stable); got.Requests != 0 || got.String() != "no requests" {
		t.Errorf("stable %+v", got)
	}
	p := plan()
	if got := m.measure(m.canary); !p.enough(got) {
		t.Error("errors that are enough need no durations")
	}
}

func TestPercent(t *testing.T) {
	for rate, want := range map[float64]string{0: "0 %", 0.034: "0.034 %", 1.25: "1.2 %", 33.4: "33 %", 100: "100 %"} {
		if got := percent(rate); got != want {
			t.Errorf("%v is %q, want %q", rate, got, want)
		}
	}
}

func TestFailed(t *testing.T) {
	for _, c := range []struct {
		protocol, code, grpc string
		want                 bool
	}{{"http", "200", "", false}, {"http", "404", "", false}, {"http", "503", "", true}, {"http", "0", "", false},
		{"grpc", "200", "0", false}, {"grpc", "200", "5", false}, {"grpc", "200", "14", true}, {"grpc", "200", "13", true}, {"http", "200", "13", false}} {
		labels := map[string]string{"request_protocol": c.protocol, "response_code": c.code, "grpc_response_status": c.grpc}
		if got := failed(labels); got != c.want {
			t.Errorf("%v: %v", labels, got)
		}
	}
}

func TestWorkloadOf(t *testing.T) {
	yes := true
	owned := func(kind, name string, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: labels, OwnerReferences: []metav1.OwnerReference{{Kind: kind, Name: name, Controller: &yes}}}}
	}
	for want, pod := range map[string]*corev1.Pod{
		"api-canary": owned("ReplicaSet", "api-canary-5d4f", map[string]string{"pod-template-hash": "5d4f"}),
		"db":         owned("StatefulSet", "db", nil),
		"alone":      {ObjectMeta: metav1.ObjectMeta{Name: "alone"}},
	} {
		if got := workloadOf(pod); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// What the agent of a real proxy shows, as pkg/mesh/exposition has recorded it.
func TestRecorded(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "mesh", "exposition", "testdata", "istio.txt"))
	if err != nil {
		t.Fatal(err)
	}
	families, err := parseMetrics(text)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(families[requestsMetric].GetMetric()); n != 4 || len(families) != 1 {
		t.Errorf("%d samples, %d families", n, len(families))
	}
}

func TestPlan(t *testing.T) {
	p := plan()
	if p.Steps = []int{5, 50}; p.check() != nil || fmt.Sprint(p.Steps) != "[5 50 100]" {
		t.Errorf("the steps are %v", p.Steps)
	}
	for want, change := range map[string]func(*Plan){
		"names no step":             func(p *Plan) { p.Steps = nil },
		"each step is a percentage": func(p *Plan) { p.Steps = []int{10, 10} },
		"at most 100":               func(p *Plan) { p.Steps = []int{10, 110} },
		"above the one before":      func(p *Plan) { p.Steps = []int{0, 10} },
		"too short":                 func(p *Plan) { p.Interval.Duration = time.Millisecond },
		"not a percentage":          func(p *Plan) { p.MaxErrorRate = 101 },
		"not a duration":            func(p *Plan) { p.MaxP99.Duration = 0 },
		"at least 1":                func(p *Plan) { p.MinRequests = 0 },
		"shorter than --interval":   func(p *Plan) { p.Timeout.Duration = time.Second },
	} {
		p := plan()
		change(&p)
		if err := p.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}
