package dialect_test

import (
	"fmt"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
)

func nodeOf(p *model.Proxy) *core.Node {
	return &core.Node{
		Id:       fmt.Sprintf("%s~%s~%s~%s.svc.cluster.local", p.Type, p.IPAddresses[0], p.ID, p.ConfigNamespace),
		Cluster:  p.Metadata.WorkloadName,
		Metadata: p.Metadata.ToStruct(),
	}
}

func sum(stats map[string]float64) (n float64) {
	for _, v := range stats {
		n += v
	}
	return n
}

// TestEnvoyAccepts lets the shipped Envoy fetch each scene's configuration from istiod with the dialect.
func TestEnvoyAccepts(t *testing.T) {
	envoyPath(t)
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			f, ads := newIstiod(t, s)
			wrap(t, f)
			want := generate(t, f, s.proxy)
			p := startEnvoy(t, nodeOf(s.proxy), ads, newAuthority(t).serveSDS(t, s.proxy.ConfigNamespace, s.proxy.Metadata.WorkloadName))
			waitFor(t, p, "full configuration", func() bool {
				got := p.stats(t, `^listener_manager.lds.update_success$|^cluster_manager.cds.update_success$|rds\..*config_reload$|update_rejected`)
				reloads := 0
				for name, v := range got {
					if strings.Contains(name, ".rds.") && strings.HasSuffix(name, "config_reload") && v > 0 {
						reloads++
					}
					if strings.HasSuffix(name, "update_rejected") && v > 0 {
						return true
					}
				}
				return got["listener_manager.lds.update_success"] > 0 && got["cluster_manager.cds.update_success"] > 0 &&
					reloads >= len(want[v3.RouteType])
			})
			if rejected := p.stats(t, `update_rejected$|listener_create_failure$`); sum(rejected) != 0 {
				t.Errorf("rejected: %v\n%s", rejected, p.log)
			}
			listeners := p.stats(t, `^listener_manager.total_listeners_(active|warming)$`)
			if got := int(sum(listeners)); got != len(want[v3.ListenerType]) {
				t.Errorf("%d listeners, want %d: %v\n%s", got, len(want[v3.ListenerType]), listeners, p.log)
			}
		})
	}
}

// TestEnvoyRejectsIstio is the counter-check: without the dialect, the same configuration is rejected.
func TestEnvoyRejectsIstio(t *testing.T) {
	s := scenes()[0]
	_, ads := newIstiod(t, s)
	p := startEnvoy(t, nodeOf(s.proxy), ads, newAuthority(t).serveSDS(t, s.proxy.ConfigNamespace, s.proxy.Metadata.WorkloadName))
	waitFor(t, p, "rejection", func() bool { return sum(p.stats(t, `lds.update_rejected$`)) > 0 })
}
