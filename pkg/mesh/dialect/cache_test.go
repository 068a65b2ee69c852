package dialect_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	v3 "istio.io/istio/pilot/pkg/xds/v3"

	"polymesh.dev/polymesh/pkg/mesh/dialect"
)

// TestCachedPush: pushes served from istiod's cache, for several proxies at once, equal the translation of a fresh generation,
// and are the cached objects themselves.
func TestCachedPush(t *testing.T) {
	s := scenes()[0]
	plain, _ := newIstiod(t, s)
	f, _ := newIstiod(t, s)
	wrap(t, f)
	translator := dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(plain.Discovery.Env.EndpointIndex))
	want := map[string]*discovery.Resource{}
	for typ, resources := range generate(t, plain, s.proxy) {
		for _, r := range resources {
			r.Resource = translator.Resource(r.Resource).Resource
			want[typ+r.Name] = r
		}
	}
	first := generateAt(t, f, s.proxy, time.Now())
	var pushes sync.WaitGroup
	for i := range 4 {
		pushes.Go(func() {
			proxy := scenes()[0].proxy
			proxy.ID = fmt.Sprintf("a%d.demo", i)
			kept := 0
			for typ, resources := range generateAt(t, f, proxy, time.Now()) {
				before := byName(first[typ])
				for _, r := range resources {
					if !proto.Equal(r, want[typ+r.Name]) {
						t.Errorf("%s %s is not the translation of what istiod makes", typ, r.Name)
					}
					if r == before[r.Name] {
						kept++
					}
				}
			}
			if kept == 0 {
				t.Error("nothing was cached")
			}
		})
	}
	pushes.Wait()
	if len(want) == 0 || len(first[v3.ClusterType]) == 0 {
		t.Fatal("nothing was generated")
	}
}
