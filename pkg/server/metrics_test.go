package server

import (
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// The store gets few series, with the sums of those that differ in other labels.
func TestOwnMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "apiserver_request_total", Help: "Requests."}, []string{"verb", "code", "resource"})
	times := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "apiserver_request_duration_seconds", Help: "Times.", Buckets: []float64{0.1, 0.8, 1}}, []string{"verb", "resource"})
	other := prometheus.NewGauge(prometheus.GaugeOpts{Name: "etcd_something", Help: "Left out."})
	registry.MustRegister(requests, times, other)
	requests.WithLabelValues("GET", "200", "pods").Add(2)
	requests.WithLabelValues("GET", "200", "nodes").Add(3)
	requests.WithLabelValues("GET", "500", "nodes").Inc()
	times.WithLabelValues("GET", "pods").Observe(0.05)
	times.WithLabelValues("GET", "nodes").Observe(0.5)
	times.WithLabelValues("LIST", "nodes").Observe(5)
	m := &ownMetrics{from: registry}
	ask := func() string {
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Body.String()
	}
	want := `# HELP apiserver_request_duration_seconds Times.
# TYPE apiserver_request_duration_seconds histogram
apiserver_request_duration_seconds_bucket{verb="GET",le="0.1"} 1
apiserver_request_duration_seconds_bucket{verb="GET",le="1"} 2
apiserver_request_duration_seconds_bucket{verb="GET",le="+Inf"} 2
apiserver_request_duration_seconds_sum{verb="GET"} 0.55
apiserver_request_duration_seconds_count{verb="GET"} 2
apiserver_request_duration_seconds_bucket{verb="LIST",le="0.1"} 0
apiserver_request_duration_seconds_bucket{verb="LIST",le="1"} 0
apiserver_request_duration_seconds_bucket{verb="LIST",le="+Inf"} 1
apiserver_request_duration_seconds_sum{verb="LIST"} 5
apiserver_request_duration_seconds_count{verb="LIST"} 1
# HELP apiserver_request_total Requests.
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",verb="GET"} 5
apiserver_request_total{code="500",verb="GET"} 1
`
	if got := ask(); got != want {
		t.Errorf("got:\n%s", got)
	}
	// Gathering is not repeated for each request.
	requests.WithLabelValues("GET", "200", "pods").Inc()
	if got := ask(); got != want {
		t.Errorf("gathered again:\n%s", got)
	}
}
