package dialect

import (
	"fmt"
	"runtime"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// TestNoStaleTranslation: a resource never gets the translation of one that had its address before, and what is of no
// resource any more is forgotten.
func TestNoStaleTranslation(t *testing.T) {
	c := &shared{}
	const rounds, many = 20, 1000
	for round := range rounds {
		live := make([]*discovery.Resource, many)
		for i := range live {
			name := fmt.Sprintf("%d/%d", round, i)
			live[i] = &discovery.Resource{Name: name}
			for range 2 {
				got := c.translate(live[i], workload.Workload{}, func() *discovery.Resource { return &discovery.Resource{Name: name} })
				if got.Name != name {
					t.Fatalf("%s was given the translation of %s", name, got.Name)
				}
			}
		}
		runtime.KeepAlive(live)
		runtime.GC()
	}
	if n := len(c.translations); n >= rounds*many/2 {
		t.Errorf("%d translations are kept of %d resources that are gone", n, rounds*many)
	}
}
