package server

import (
	"bytes"
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"google.golang.org/protobuf/proto"
)

// metricsPath is where the server's own metrics are, on the status socket.
const metricsPath = "GET /metrics"

// metricsAge is how old the response may be. Gathering costs a tenth of a second: all components of Kubernetes, in one process, have
// more than 30,000 series.
const metricsAge = 50 * time.Second

// kept are the metrics of the server that the store gets, with the labels that they keep: series that differ in others are added up.
func kept() map[string][]string {
	return map[string][]string{
		"apiserver_request_duration_seconds":  {"verb"},
		"apiserver_request_total":             {"verb", "code"},
		"apiserver_current_inflight_requests": {"request_kind"},
		"process_cpu_seconds_total":           nil,
		"process_resident_memory_bytes":       nil,
		"process_open_fds":                    nil,
		"go_goroutines":                       nil,
	}
}

// bounds are the buckets that are kept of a histogram of seconds. Kubernetes has 24, of which each verb would be as many series.
func bounds() []float64 { return []float64{0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 1, 2, 5, 10, 30, 60} }

// ownMetrics serves a few of the process's metrics.
type ownMetrics struct {
	from prometheus.Gatherer

	mu   sync.Mutex
	at   time.Time
	text []byte
}

// ServeHTTP implements http.Handler.
func (m *ownMetrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	text, err := m.gather()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	_, _ = w.Write(text)
}

func (m *ownMetrics) gather() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.text != nil && time.Since(m.at) < metricsAge {
		return m.text, nil
	}
	// What could be gathered is used: one component's error does not hide the others' metrics.
	families, err := m.from.Gather()
	if len(families) == 0 && err != nil {
		return nil, fmt.Errorf("gather the server's metrics: %w", err)
	}
	var text bytes.Buffer
	keep := kept()
	for _, f := range families {
		labels, ok := keep[f.GetName()]
		if !ok {
			continue
		}
		if _, err := expfmt.MetricFamilyToText(&text, merged(f, labels)); err != nil {
			return nil, fmt.Errorf("write the metric %s: %w", f.GetName(), err)
		}
	}
	m.at, m.text = time.Now(), text.Bytes()
	return m.text, nil
}

// merged returns a family with these labels alone.
func merged(f *dto.MetricFamily, labels []string) *dto.MetricFamily {
	sums := map[string]*dto.Metric{}
	var order []string
	for _, m := range f.Metric {
		next := &dto.Metric{}
		for _, l := range m.Label {
			if slices.Contains(labels, l.GetName()) {
				next.Label = append(next.Label, l)
			}
		}
		key := fmt.Sprintf("%q", next.Label)
		sum, ok := sums[key]
		if !ok {
			sum, order = next, append(order, key)
			sums[key] = sum
		}
		add(sum, m)
	}
	out := &dto.MetricFamily{Name: f.Name, Help: f.Help, Type: f.Type}
	for _, key := range order {
		out.Metric = append(out.Metric, sums[key])
	}
	return out
}

// add adds the value of a metric to a sum.
func add(sum, m *dto.Metric) {
	switch {
	case m.Counter != nil:
		sum.Counter = &dto.Counter{Value: proto.Float64(sum.GetCounter().GetValue() + m.Counter.GetValue())}
	case m.Gauge != nil:
		sum.Gauge = &dto.Gauge{Value: proto.Float64(sum.GetGauge().GetValue() + m.Gauge.GetValue())}
	case m.Histogram != nil:
		before := sum.GetHistogram()
		next := &dto.Histogram{
			SampleCount: proto.Uint64(before.GetSampleCount() + m.Histogram.GetSampleCount()),
			SampleSum:   proto.Float64(before.GetSampleSum() + m.Histogram.GetSampleSum()),
		}
		counts, keep := map[float64]uint64{}, bounds()
		for _, buckets := range [][]*dto.Bucket{before.GetBucket(), m.Histogram.Bucket} {
			for _, b := range buckets {
				if slices.Contains(keep, b.GetUpperBound()) {
					counts[b.GetUpperBound()] += b.GetCumulativeCount()
				}
			}
		}
		for bound, count := range counts {
			next.Bucket = append(next.Bucket, &dto.Bucket{UpperBound: proto.Float64(bound), CumulativeCount: proto.Uint64(count)})
		}
		slices.SortFunc(next.Bucket, func(a, b *dto.Bucket) int { return cmp.Compare(a.GetUpperBound(), b.GetUpperBound()) })
		sum.Histogram = next
	}
}
