package tracestore

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// mesh makes traces as the proxies of four services that call each other do: eight spans, two for each call.
type mesh struct{ random *rand.Rand }

func (m mesh) trace(at time.Time) []Span {
	hex := func(digits int) string {
		return fmt.Sprintf("%016x%016x", m.random.Uint64(), m.random.Uint64())[:digits]
	}
	id, r := hex(32), hex(32)
	request := r[:8] + "-" + r[8:12] + "-" + r[12:16] + "-" + r[16:20] + "-" + r[20:]
	services := []string{"gateway", "fastapi-service", "go-service", "java-service", "node-service"}
	var spans []Span
	parent := ""
	took := time.Duration(20+m.random.ExpFloat64()*30) * time.Millisecond
	for i := range 4 {
		for side, of := range []string{services[i], services[i+1]} {
			at = at.Add(time.Duration(100+m.random.IntN(900)) * time.Microsecond)
			took -= took / 10
			took += time.Duration(m.random.IntN(1000))
			callee := services[i+1] + ".polyglot-services.svc.cluster.local"
			s := Span{
				TraceID: id, SpanID: hex(16), ParentID: parent, Service: of + ".polyglot-services", Name: callee + ":8080/*", Kind: []Kind{KindClient, KindServer}[side],
				Start: at, Duration: took,
				Attributes: []Attribute{
					str("component", "proxy"), str("node_id", "sidecar~10.42.0."+fmt.Sprint(10+i+side)+"~"+of+"-v1-7c9f5d8b6c-x2x4z.polyglot-services~polyglot-services.svc.cluster.local"),
					str("http.url", fmt.Sprintf("http://%s:8080/orders/%d", services[i+1], m.random.IntN(500))), str("http.method", "GET"),
					str("http.protocol", "HTTP/1.1"), str("http.status_code", []string{"200", "200", "200", "404"}[m.random.IntN(4)]), str("downstream_cluster", "-"), str("user_agent", "Go-http-client/1.1"),
					str("request_size", "0"), str("response_size", fmt.Sprint(200+m.random.IntN(900))), str("response_flags", "-"), str("peer.address", "10.42.0."+fmt.Sprint(9+i+side)),
					str("guid:x-request-id", request), str("upstream_cluster", []string{"outbound|8080||" + callee, "inbound|8080||"}[side]),
					str("upstream_cluster.name", []string{"outbound|8080||" + callee + ";", "inbound|8080||;"}[side]), str("istio.canonical_service", of), str("istio.canonical_revision", "v1"),
					str("istio.namespace", "polyglot-services"), str("istio.mesh_id", "cluster.local"), str("istio.cluster_id", "Kubernetes"),
				},
				Resource: []Attribute{str("telemetry.sdk.language", "cpp"), str("telemetry.sdk.name", "envoy"), str("telemetry.sdk.version", "8f2cb25a")},
				Scope:    Scope{Name: "envoy", Version: "1.40.0-dev"},
			}
			parent = s.SpanID
			spans = append(spans, s)
		}
	}
	return spans
}

// TestBytesOfASpan stores two minutes of 25 traces a second, and asks for them.
func TestBytesOfASpan(t *testing.T) {
	const seconds, perSecond = 120, 25
	dir := t.TempDir()
	s := openIn(t, dir)
	m := mesh{rand.New(rand.NewPCG(1, 2))}
	start := time.Now().Add(-seconds * time.Second)
	var last []Span
	for i := range seconds {
		var batch []Span
		for range perSecond {
			last = m.trace(start.Add(time.Duration(i) * time.Second))
			batch = append(batch, last...)
		}
		appendAll(t, s, batch...)
		if i%5 == 0 {
			s.rows.Flush()
		}
	}
	require.NoError(t, s.Close())
	s = openIn(t, dir)
	stats := s.Stats()
	bytes := stats.Bytes / stats.Rows
	t.Logf("%d spans in %d bytes: %d a span", stats.Rows, stats.Bytes, bytes)
	require.Less(t, bytes, int64(100))

	for name, ask := range map[string]func() error{
		"trace": func() error {
			got, err := s.Trace(t.Context(), last[0].TraceID)
			require.Len(t, got.Spans, 8)
			return err
		},
		"newest":  func() error { _, err := s.Find(t.Context(), Query{}); return err },
		"slowest": func() error { _, err := s.Find(t.Context(), Query{Slowest: true}); return err },
		"tag": func() error {
			_, err := s.Find(t.Context(), Query{Tags: map[string]string{"http.status_code": "404"}})
			return err
		},
		"none": func() error { _, err := s.Find(t.Context(), Query{Tags: map[string]string{"a": "b"}}); return err },
		"path": func() error { _, err := s.Find(t.Context(), Query{Path: "/orders/17"}); return err },
		"request": func() error {
			_, err := s.Find(t.Context(), Query{RequestID: last[0].Attributes[12].Value.Text})
			return err
		},
		"services": func() error { _, err := s.Services(t.Context(), time.Time{}, time.Time{}); return err },
		"operations": func() error {
			_, err := s.Operations(t.Context(), "go-service.polyglot-services", nil, time.Time{}, time.Time{})
			return err
		},
		"dependencies": func() error { _, err := s.Dependencies(t.Context(), time.Time{}, time.Time{}); return err },
	} {
		from := time.Now()
		require.NoError(t, ask())
		t.Logf("%s: %s", name, time.Since(from))
	}
}
