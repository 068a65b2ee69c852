package rollout

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Measure is what was seen of one version in a step.
type Measure struct {
	Requests int `json:"requests"`
	// ErrorRate is in percent.
	ErrorRate float64 `json:"errorRate"`
	// P99 is the 99th percentile of the durations, as the server's proxy measures them.
	P99 metav1.Duration `json:"p99"`
	// Timed is how many requests it is taken from. Envoy adds durations up every few seconds, so it comes later.
	Timed int `json:"timed"`
}

func (m Measure) String() string {
	if m.Requests == 0 {
		return "no requests"
	}
	p99 := "-"
	if m.Timed > 0 {
		p99 = m.P99.Duration.String()
	}
	return fmt.Sprintf("%d requests, %s errors, p99 %s", m.Requests, percent(m.ErrorRate), p99)
}

// percent has two digits.
func percent(rate float64) string {
	if rate >= 10 {
		return fmt.Sprintf("%.0f %%", rate)
	}
	return fmt.Sprintf("%.2g %%", rate)
}

// view is what one side has counted.
type view struct {
	requests, errors float64
	buckets          map[float64]float64 // requests by the upper bound of their duration in ms, cumulative
}

// rate is the share of errors, from 0 to 1.
func (v *view) rate() float64 {
	if v.requests == 0 {
		return 0
	}
	return v.errors / v.requests
}

func (v *view) add(metric string, m *dto.Metric, delta func(part string, value float64) float64) {
	if metric == requestsMetric {
		n := delta("", m.GetCounter().GetValue())
		v.requests += n
		if failed(labelsOf(m)) {
			v.errors += n
		}
		return
	}
	for _, b := range m.GetHistogram().GetBucket() {
		v.buckets[b.GetUpperBound()] += delta(fmt.Sprint(b.GetUpperBound()), float64(b.GetCumulativeCount()))
	}
}

// failed reports whether an answer is the server's failure, as Istio's dashboards count: 5xx, and for gRPC the statuses
// that mean the same (UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS).
func failed(labels map[string]string) bool {
	if strings.HasPrefix(labels["response_code"], "5") {
		return true
	}
	return labels["request_protocol"] == "grpc" && slices.Contains([]string{"2", "4", "12", "13", "14", "15"}, labels["grpc_response_status"])
}

// reachedNobody reports whether a proxy found no server for a request: none that is healthy (UH), none that takes
// connections (UF), no such subset (NC).
func reachedNobody(labels map[string]string) bool {
	for flag := range strings.SplitSeq(labels["response_flags"], ",") {
		if flag == "UH" || flag == "UF" || flag == "NC" {
			return true
		}
	}
	return false
}

// quantile is Prometheus' histogram_quantile: within a bucket it takes the values as spread evenly.
func quantile(q float64, buckets map[float64]float64) float64 {
	bounds := slices.Sorted(maps.Keys(buckets))
	if len(bounds) == 0 || buckets[bounds[len(bounds)-1]] == 0 {
		return 0
	}
	rank := q * buckets[bounds[len(bounds)-1]]
	i, _ := slices.BinarySearchFunc(bounds, rank, func(bound, rank float64) int {
		if buckets[bound] < rank {
			return -1
		}
		return 1
	})
	switch {
	case i == len(bounds):
		i-- // rounding
		fallthrough
	case math.IsInf(bounds[i], 1):
		if i == 0 {
			return 0
		}
		return bounds[i-1]
	}
	low, below := 0.0, 0.0
	if i > 0 {
		low, below = bounds[i-1], buckets[bounds[i-1]]
	}
	return low + (bounds[i]-low)*(rank-below)/(buckets[bounds[i]]-below)
}

// workload is a source of requests.
type workload struct{ namespace, name string }

// claim is what one caller's proxies have counted.
type claim struct {
	to   map[string]*view // by Deployment
	lost float64          // requests that reached no pod at all
}

// requests are all that a caller reports as sent.
func (c *claim) requests() float64 {
	sum := c.lost
	for _, v := range c.to {
		sum += v.requests
	}
	return sum
}

// meter measures the two versions from when it was made: it adds up by how much the counters of all proxies that take part
// grow, those of the pods of both versions and of their callers. A proxy that restarts counts from zero.
type meter struct {
	client    kubernetes.Interface
	namespace string
	// stable and canary are the names of the Deployments, services those of their Services.
	stable, canary string
	services       []string

	known map[string]bool    // proxies that have been read before
	last  map[string]float64 // counters as they were read last, by pod and series
	// received is what the pods' own proxies report, by Deployment; callers is how many of these requests came from whom. sent is
	// what the callers' proxies report: only they know of requests that did not arrive.
	received map[string]*view
	callers  map[workload]float64
	sent     map[workload]*claim
	// unread is which proxies the last read is without, and why. It is empty when all were read.
	unread string
}

func newMeter(client kubernetes.Interface, s *State, services []string) *meter {
	m := &meter{client: client, namespace: s.Namespace, stable: s.Name, canary: s.canary(), services: services,
		known: map[string]bool{}, last: map[string]float64{}, callers: map[workload]float64{}, received: map[string]*view{}, sent: map[workload]*claim{}}
	for _, name := range []string{m.stable, m.canary} {
		m.received[name] = &view{buckets: map[float64]float64{}}
	}
	return m
}

// workloadOf is the name of a pod's workload, as Istio finds it: that of its controller, without the hash that a
// ReplicaSet has behind its Deployment's name.
func workloadOf(pod *corev1.Pod) string {
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return pod.Name
	}
	if hash := pod.Labels["pod-template-hash"]; owner.Kind == "ReplicaSet" && hash != "" {
		return strings.TrimSuffix(owner.Name, "-"+hash)
	}
	return owner.Name
}

// maxCounter is above what a counter can hold: a float64 counts exactly up to 2^53.
const maxCounter = 1 << 53

// add takes in what one proxy of a workload has counted.
func (m *meter) add(of workload, proxy string, families map[string]*dto.MetricFamily) {
	// A proxy that is read for the first time has counted before. A caller that has just been found has called before it was
	// found, so the little that it reports of this step is left out.
	known := m.known[proxy]
	m.known[proxy] = true
	for _, metric := range []string{requestsMetric, durationMetric} {
		for _, sample := range families[metric].GetMetric() {
			labels := labelsOf(sample)
			series := proxy + " " + metric + " " + key(labels)
			delta := func(part string, value float64) float64 {
				if !(value >= 0 && value <= maxCounter) { // NaN too
					return 0
				}
				before, counted := m.last[series+" "+part]
				m.last[series+" "+part] = value
				switch {
				case !known && !counted:
					return 0
				case value < before: // it has restarted
					return value
				}
				return value - before
			}
			m.sample(of, metric, labels, sample, delta)
		}
	}
}

func (m *meter) sample(of workload, metric string, labels map[string]string, sample *dto.Metric, delta func(string, float64) float64) {
	to, namespace := labels["destination_workload"], labels["destination_workload_namespace"]
	ours := namespace == m.namespace && (to == m.stable || to == m.canary)
	switch labels["reporter"] {
	case "destination":
		// Each side's own pods are the servers. What did not come through a Service of the mesh, such as a Prometheus that reads
		// the app's metrics, is not meant.
		if !ours || of != (workload{m.namespace, to}) || strings.HasSuffix(labels["destination_service_name"], "PassthroughCluster") {
			return
		}
		before := m.received[to].requests
		m.received[to].add(metric, sample, delta)
		from := workload{labels["source_workload_namespace"], labels["source_workload"]}
		if _, found := m.callers[from]; found || from.name != "" && from.name != "unknown" && len(m.callers) < maxCallers {
			m.callers[from] += m.received[to].requests - before
		}
	case "source":
		if m.sent[of] == nil {
			m.sent[of] = &claim{to: map[string]*view{m.stable: {buckets: map[float64]float64{}}, m.canary: {buckets: map[float64]float64{}}}}
		}
		switch {
		case ours:
			m.sent[of].to[to].add(metric, sample, delta)
		case metric == requestsMetric && m.forUs(labels) && reachedNobody(labels):
			m.sent[of].lost += delta("", sample.GetCounter().GetValue())
		}
	}
}

// believed is how much of what a caller reports counts, from 0 to 1. A caller's proxy is the caller's: it may report anything, but
// it counts only as far as the servers have heard from that caller: for twice as many requests, as those that were lost on
// the way are known to the caller only, and two more for those that are under way. Where the servers have heard nothing of
// anyone, the callers are all that there is.
func (m *meter) believed(caller workload) float64 {
	heard := 0.0
	for _, n := range m.callers {
		heard += n
	}
	reported := m.sent[caller].requests()
	if heard == 0 || reported == 0 {
		return 1
	}
	return min(1, (2*m.callers[caller]+2)/reported)
}

// claimed is what the callers report about a Deployment. Requests that reached no pod are the canary's, since the stable version
// was well before.
func (m *meter) claimed(deployment string) view {
	var sum view
	for caller, c := range m.sent {
		weight := m.believed(caller)
		requests, errors := c.to[deployment].requests, c.to[deployment].errors
		if deployment == m.canary {
			requests, errors = requests+c.lost, errors+c.lost
		}
		sum.requests += weight * requests
		sum.errors += weight * errors
	}
	return sum
}

// forUs reports whether a request was for a Service of the rollout.
func (m *meter) forUs(labels map[string]string) bool {
	return labels["destination_service_namespace"] == m.namespace && slices.Contains(m.services, labels["destination_service_name"])
}

// measure is what was seen of a Deployment. Where the two sides do not agree on the errors, the worse counts: an answer
// can be lost on the way.
func (m *meter) measure(deployment string) Measure {
	received, sent := m.received[deployment], m.claimed(deployment)
	p99 := time.Duration(quantile(0.99, received.buckets) * float64(time.Millisecond)).Round(100 * time.Microsecond)
	return Measure{
		Requests:  int(math.Round(max(received.requests, sent.requests))),
		ErrorRate: 100 * max(received.rate(), sent.rate()),
		P99:       metav1.Duration{Duration: p99},
		Timed:     int(math.Round(received.buckets[math.Inf(1)])),
	}
}

// certain reports whether so many requests of the canary have failed, or taken too long, that what comes cannot mend it.
func (m *meter) certain(p Plan) bool {
	received, sent := m.received[m.canary], m.claimed(m.canary)
	within := 0.0
	for upper, count := range received.buckets {
		if upper <= float64(p.MaxP99.Duration)/float64(time.Millisecond) {
			within = max(within, count)
		}
	}
	return max(received.errors, sent.errors) >= certain || received.buckets[math.Inf(1)]-within >= certain
}

func labelsOf(m *dto.Metric) map[string]string {
	labels := map[string]string{}
	for _, l := range m.GetLabel() {
		labels[l.GetName()] = l.GetValue()
	}
	return labels
}

// key names a series.
func key(labels map[string]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		fmt.Fprintf(&b, "%s=%q,", name, labels[name])
	}
	return b.String()
}

// certain is how many requests must have failed, or been too slow, before a step ends early: one that fails among the first
// twenty is 5 %, and may be the only one in a thousand.
const certain = 10

// enough reports whether a step has seen the requests that it needs.
func (p *Plan) enough(canary Measure) bool {
	return canary.Requests >= p.MinRequests && (canary.Timed >= p.MinRequests || canary.ErrorRate > p.MaxErrorRate)
}

// judge returns what of a measurement is out of bounds, empty for nothing.
func (p *Plan) judge(canary, stable Measure) string {
	switch {
	case canary.ErrorRate > p.MaxErrorRate:
		return fmt.Sprintf("error rate %s of %d requests, above --max-error-rate %v%s", percent(canary.ErrorRate), canary.Requests, p.MaxErrorRate,
			compared(stable, percent(stable.ErrorRate)))
	case canary.P99.Duration > p.MaxP99.Duration:
		return fmt.Sprintf("p99 %s of %d requests, above --max-p99 %s%s", canary.P99.Duration, canary.Timed, p.MaxP99.Duration,
			compared(stable, stable.P99.Duration.String()))
	}
	return ""
}

// compared is what the stable version had meanwhile.
func compared(stable Measure, value string) string {
	if stable.Requests == 0 {
		return ""
	}
	return " (stable: " + value + ")"
}
