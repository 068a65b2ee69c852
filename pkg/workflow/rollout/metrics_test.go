package rollout

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
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
	families, err := parseMetrics(strings.NewReader("app_metric{ 1\nenvoy_server_live{} 1\n"+e.text.String()), "shop")
	if err != nil {
		t.Fatal(err)
	}
	of := workload{"shop", "api"}
	if name, _, _ := strings.Cut(proxy, "-"); name == "canary" {
		of.name = "api-canary"
	} else if name != "stable" {
		of = workload{"web", name}
	}
	m.add(of, proxy, families)
}

func shown() *exposed { return &exposed{said: map[string]bool{}} }

func plan() Plan {
	return Plan{Steps: []int{10, 50, 100}, Interval: metav1.Duration{Duration: time.Minute}, MaxErrorRate: 1, MaxP99: metav1.Duration{Duration: 500 * time.Millisecond},
		MinRequests: 20, Timeout: metav1.Duration{Duration: 10 * time.Minute}}
}

func TestMeasure(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"}, readTimeout)
	// What was counted before does not count.
	scrape(t, m, "canary-1", shown().requests(1000, received, "api-canary", "500").durations(0, 1000, received, "api-canary", "500"))
	scrape(t, m, "stable-1", shown().requests(5000, received, "api", "200"))
	if _, found := m.callers[workload{"web", "client"}]; !found || len(m.callers) != 1 {
		t.Errorf("the callers are %v", m.callers)
	}
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
	// The proxy starts again: it counts from zero.
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
	m := newMeter(nil, state(), []string{"api"}, readTimeout)
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
	m := newMeter(nil, state(), []string{"api"}, readTimeout)
	for _, n := range []int{0, 1} {
		scrape(t, m, "canary-1", shown().requests(50*n, received, "api-canary", "200"))
		scrape(t, m, "client-1", shown().requests(50*n, sent, "api-canary", "200").requests(25*n, sent, "api-canary", "504").
			requests(25*n, nowhere, "api").requests(99*n, nowhere, "other").requests(1000*n, sent, "stranger", "500"))
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
	text, err := os.Open(filepath.Join("..", "..", "mesh", "exposition", "testdata", "istio.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	families, err := parseMetrics(text, "demo")
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
		"has no step":               func(p *Plan) { p.Steps = nil },
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

// A caller's word counts as far as the servers have heard from it.
func TestBelieved(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"}, readTimeout)
	other := strings.ReplaceAll(received, `source_workload="client"`, `source_workload="liar"`)
	for _, n := range []int{0, 1} {
		scrape(t, m, "canary-1", shown().requests(1000*n, received, "api-canary", "200").durations(1000*n, 0, received, "api-canary", "200").requests(n, other, "api-canary", "200"))
		scrape(t, m, "client-1", shown().requests(1000*n, sent, "api-canary", "200"))
		scrape(t, m, "liar-1", shown().requests(1000000*n, sent, "api-canary", "503").requests(1000000*n, nowhere, "api").
			requests(1000000*n, received, "api-canary", "503").requests(1000000*n, received, "api", "503"))
	}
	p := plan()
	got := m.measure(m.canary)
	if why := p.judge(got, m.measure(m.stable)); why != "" || m.certain(p) || got.Requests > 1010 {
		t.Errorf("one caller has the canary rolled back: %s, %+v", why, got)
	}
	// Nor does it hide that others are refused, or makes a step end for which there have been no requests.
	m = newMeter(nil, state(), []string{"api"}, readTimeout)
	for _, n := range []int{0, 1} {
		scrape(t, m, "canary-1", shown().requests(5*n, received, "api-canary", "503").requests(n, other, "api-canary", "200"))
		scrape(t, m, "liar-1", shown().requests(1000000*n, sent, "api-canary", "200").durations(1000000*n, 0, sent, "api-canary", "200"))
	}
	if got := m.measure(m.canary); p.enough(got) || got.ErrorRate < 80 {
		t.Errorf("%+v", got)
	}
}

func TestCounters(t *testing.T) {
	m := newMeter(nil, state(), []string{"api"}, readTimeout)
	scrape(t, m, "canary-1", shown().requests(0, received, "api-canary", "200"))
	for _, value := range []string{"NaN", "+Inf", "-Inf", "-5", "1e300"} {
		e := shown()
		e.kind("istio_requests_total counter")
		fmt.Fprintf(&e.text, "istio_requests_total{%s} %s\n", fmt.Sprintf(received, "api-canary", "200"), value)
		scrape(t, m, "canary-1", e)
	}
	if got := m.measure(m.canary); got.Requests != 0 || got.ErrorRate != 0 {
		t.Errorf("%+v", got)
	}
}

// What a pod answers may be of any length and form. The app's own metrics may be too: the agent shows them as they are.
func TestParseMetrics(t *testing.T) {
	ours := fmt.Sprintf("# TYPE istio_requests_total counter\nistio_requests_total{"+received+"} 1", "api", "200")
	long := strings.Repeat("x", 3*maxLine)
	families, err := parseMetrics(strings.NewReader("app{x=\""+long+"\"} 1\r\n\x00garbage {\n"+ours), "shop")
	if err != nil || len(families[requestsMetric].GetMetric()) != 1 {
		t.Errorf("%v, %v", families, err)
	}
	if families, err := parseMetrics(strings.NewReader(ours), "other"); err != nil || len(families[requestsMetric].GetMetric()) != 0 {
		t.Errorf("another namespace's: %v, %v", families, err)
	}
	for text, want := range map[string]string{
		ours + "\nistio_requests_total{x=\"" + long:                                               "a line of more than",
		ours + "\nistio_requests_total{namespace=\"shop\"":                                        "cannot be read",
		strings.Repeat("istio_requests_total{namespace=\"shop\"} 1\n", maxKept/40):                "about this rollout",
		strings.Repeat(strings.Repeat("x", 1<<20)+"\n", maxText>>20) + strings.Repeat("x", 1<<20): "its metrics have more than",
	} {
		if _, err := parseMetrics(strings.NewReader(text), "shop"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func FuzzParseMetrics(f *testing.F) {
	f.Add([]byte(fmt.Sprintf("# TYPE istio_requests_total counter\nistio_requests_total{"+received+"} 1\n", "api-canary", "200")))
	f.Add([]byte("istio_request_duration_milliseconds_bucket{namespace=\"shop\",le=\"+Inf\"} NaN\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		families, err := parseMetrics(bytes.NewReader(text), "shop")
		if err != nil {
			return
		}
		m := newMeter(nil, state(), []string{"api"}, readTimeout)
		m.add(workload{"shop", "api-canary"}, "canary-1", families)
		m.add(workload{"shop", "api-canary"}, "canary-1", families)
		if got := m.measure(m.canary); got.Requests < 0 || !(got.ErrorRate >= 0 && got.ErrorRate <= 100) {
			t.Errorf("%+v", got)
		}
	})
}

func FuzzParseState(f *testing.F) {
	text, err := json.Marshal(state())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"plan":{"steps":[]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseState(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: recordName("api"), Namespace: "shop"}, Data: map[string]string{stateKey: string(text)}})
		if err == nil && (s.Name != "api" || len(s.Plan.Steps) == 0 || s.Phase == Running && s.Step < 0) {
			t.Errorf("%+v", s)
		}
	})
}

// A reason is cut between two characters: half of one would be longer once it is JSON, too long to be read again.
func TestLongReason(t *testing.T) {
	s := state()
	s.Phase, s.Reason = RollingBack, "xx"+strings.Repeat("€", maxReason)
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: recordName(s.Name), Namespace: s.Namespace}}
	if err := s.write(m); err != nil {
		t.Fatal(err)
	}
	if read, err := parseState(m); err != nil || !strings.HasPrefix(s.Reason, read.Reason) {
		t.Errorf("%v, %v", read, err)
	}
}

// A change that a context's end has broken off is not done.
func TestOnConflict(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	conflict := apierrors.NewConflict(schema.GroupResource{Resource: "configmaps"}, "x", errors.New("changed"))
	tries := 0
	if err := onConflict(ctx, func() error {
		if tries++; tries < 3 {
			return conflict
		}
		return nil
	}); err != nil || tries != 3 {
		t.Errorf("%d tries: %v", tries, err)
	}
	if err := onConflict(ctx, func() error { return conflict }); !apierrors.IsConflict(err) {
		t.Errorf("always a conflict: %v", err)
	}
	cancel()
	if err := onConflict(ctx, func() error { return fmt.Errorf("get: %w", ctx.Err()) }); !errors.Is(err, context.Canceled) {
		t.Errorf("the context has ended: %v", err)
	}
}
