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

// Measure is the measurement of one version in a step.
type Measure struct {
	Requests int `json:"requests"`
	// ErrorRate is in percent.
	ErrorRate float64 `json:"errorRate"`
	// P99 is the 99th percentile of the durations, as the server's proxy measures them.
	P99 metav1.Duration `json:"p99"`
	// Timed is the number of requests in P99. It lags behind Requests: Envoy merges its histograms every few seconds.
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

// percent formats a rate with two digits.
func percent(rate float64) string {
	if rate >= 10 {
		return fmt.Sprintf("%.0f %%", rate)
	}
	return fmt.Sprintf("%.2g %%", rate)
}

// view is the counts of one side.
type view struct {
	requests, errors float64
	buckets          map[float64]float64 // requests by the upper bound of their duration in ms, cumulative
}

// rate returns the share of errors, from 0 to 1.
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

// failed reports whether a response is a failure of the server, by the rule of Istio's dashboards: 5xx, and for gRPC the
// equivalent statuses (UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS).
func failed(labels map[string]string) bool {
	if strings.HasPrefix(labels["response_code"], "5") {
		return true
	}
	return labels["request_protocol"] == "grpc" && slices.Contains([]string{"2", "4", "12", "13", "14", "15"}, labels["grpc_response_status"])
}

// reachedNoServer reports whether a proxy found no server for a request: none that is healthy (UH), none that accepts connections
// (UF), no such subset (NC).
func reachedNoServer(labels map[string]string) bool {
	for flag := range strings.SplitSeq(labels["response_flags"], ",") {
		if flag == "UH" || flag == "UF" || flag == "NC" {
			return true
		}
	}
	return false
}

// quantile is Prometheus' histogram_quantile: it assumes that values are distributed evenly within a bucket.
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

// claim is the counts of one caller's proxies.
type claim struct {
	to   map[string]*view // by Deployment
	lost float64          // requests that reached no pod at all
}

// requests returns the number of requests that a caller reports as sent.
func (c *claim) requests() float64 {
	sum := c.lost
	for _, v := range c.to {
		sum += v.requests
	}
	return sum
}

// meter measures the two versions from its creation: it adds up the increases of the counters of all proxies involved, those of the
// pods of both versions and of their callers. A proxy that restarts counts from zero.
type meter struct {
	client    kubernetes.Interface
	namespace string
	// stable and canary are the names of the Deployments, services those of their Services.
	stable, canary string
	services       []string

	timeout time.Duration // of reading one proxy

	known map[string]bool    // proxies that have been read before
	last  map[string]float64 // counters as they were read last, by pod and series
	// received is what the pods' own proxies report, by Deployment; callers is the number of these requests by caller. sent is what
	// the callers' proxies report: only they know of requests that did not arrive.
	received map[string]*view
	callers  map[workload]float64
	sent     map[workload]*claim
	// unread describes which proxies are missing in the last read, and why. It is empty if all were read.
	unread string
}

func newMeter(client kubernetes.Interface, s *State, services []string, timeout time.Duration) *meter {
	m := &meter{client: client, namespace: s.Namespace, stable: s.Name, canary: s.canary(), services: services, timeout: timeout,
		known: map[string]bool{}, last: map[string]float64{}, callers: map[workload]float64{}, received: map[string]*view{}, sent: map[workload]*claim{}}
	for _, name := range []string{m.stable, m.canary} {
		m.received[name] = &view{buckets: map[float64]float64{}}
	}
	return m
}

// workloadOf returns the name of a pod's workload, by Istio's rule: that of its controller, without the hash that a ReplicaSet
// appends to its Deployment's name.
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

// maxCounter is the highest value of a counter: a float64 counts exactly up to 2^53.
const maxCounter = 1 << 53

// add adds the counts of one proxy of a workload.
func (m *meter) add(of workload, proxy string, families map[string]*dto.MetricFamily) {
	// The counters of a proxy that is read for the first time include earlier requests. So those of a caller from before it was
	// found are left out, also the few of this step.
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
		// Each version's own pods are the servers. Requests that did not come through a Service of the mesh, such as those of a
		// Prometheus that scrapes the app, do not count.
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
		case metric == requestsMetric && m.forUs(labels) && reachedNoServer(labels):
			m.sent[of].lost += delta("", sample.GetCounter().GetValue())
		}
	}
}

// believed returns how much a caller's report counts, from 0 to 1. A caller controls its proxy, which may report anything. So it
// counts only for up to twice as many requests as the servers got from that caller, because only the caller knows of lost
// requests, and two more for those in progress. If the servers got no requests at all, the callers' reports are all there is.
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

// claimed returns what the callers report about a Deployment. Requests that reached no pod count as the canary's, because the stable
// version was healthy before.
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

// measure returns the measurement of a Deployment. If the two sides report different errors, the higher count is used: a response
// can be lost.
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

// certain reports whether so many requests of the canary have failed, or taken too long, that later ones cannot change the result.
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

// key returns the key of a series.
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

// enough reports whether a step has enough requests.
func (p *Plan) enough(canary Measure) bool {
	return canary.Requests >= p.MinRequests && (canary.Timed >= p.MinRequests || canary.ErrorRate > p.MaxErrorRate)
}

// judge returns which limit a measurement exceeds, empty for none.
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

// compared returns the value of the stable version.
func compared(stable Measure, value string) string {
	if stable.Requests == 0 {
		return ""
	}
	return " (stable: " + value + ")"
}
