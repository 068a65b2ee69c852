package page

import (
	"fmt"
	"net/http"
	"testing"
	"time"
)

// BenchmarkServices measures what a view costs the store from the request to the answer, with the series of so many services, each of which calls
// two others. None of them is on disk yet, as in the last two hours of a cluster.
func BenchmarkServices(b *testing.B) {
	for _, services := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			name := func(i int) (namespace, name string) {
				i %= services
				return fmt.Sprintf("team-%d", i/25), fmt.Sprintf("service-%d", i)
			}
			var calls []pairOfWorkloads
			for i := range services {
				for _, other := range []int{i*7 + 1, i*3 + 2} {
					c := pairOfWorkloads{port: 8080, rate: 2, ms: 5}
					c.fromNS, c.from = name(i)
					c.toNS, c.to = name(other)
					c.service = c.to
					calls = append(calls, c)
				}
			}
			s := newStores(b)
			all := meshSeries(calls)
			s.record(b, all, fixtureNow.Add(-20*time.Minute), fixtureNow)
			h := s.page(b)
			for _, view := range []string{"graph", "overview", "workloads", "nodes"} {
				b.Run(view, func(b *testing.B) {
					b.ReportMetric(float64(len(all)), "series")
					for b.Loop() {
						if w := do(h, http.MethodGet, "/api/polymesh/v1/"+view+"?window=15m"); w.Code != http.StatusOK {
							b.Fatal(w.Code, w.Body)
						}
					}
				})
			}
		})
	}
}
