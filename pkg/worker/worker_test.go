package worker

import (
	"log/slog"
	"net/netip"
	"reflect"
	"testing"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/process"
)

// Each option of a component has a value if the node, its cluster and its identity have all of theirs: none was forgotten here.
func TestEveryOptionIsSet(t *testing.T) {
	o := Options{
		Process: &process.Process{
			Name: "n1", IP: netip.MustParseAddr("192.0.2.1"), Programs: payload.Dir(t.TempDir()), Manifest: &payload.Manifest{},
			Marker: &datadir.Marker{ID: "0123456789abcdef"}, Lock: &datadir.Lock{}, Log: slog.New(slog.DiscardHandler),
		},
		Settings: config.Node{DataDir: layout.DataDir(t.TempDir()), PrivateRegistry: "/etc/registries.yaml", DisableDefaultEndpoint: true},
		Cluster: join.Cluster{
			ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"), ClusterDNS: netip.MustParseAddr("10.43.0.10"),
			ClusterDomain: "cluster.local", APIServiceIP: netip.MustParseAddr("10.43.0.1"),
			FlannelBackend: config.VXLAN, FlannelPort: layout.VXLANPort, FlannelExternalIP: true, DisableNetworkPolicy: true, EmbeddedRegistry: true,
			StorageDir: "/srv/storage", LoadBalancerPool: []config.AddressRange{{From: netip.MustParseAddr("192.0.2.10"), To: netip.MustParseAddr("192.0.2.20")}},
		},
		Identity: Identity{
			Kubelet: "kubelet", Proxy: "proxy", ServerCA: "server-ca", ClientCA: "client-ca", Client: Pair{"client", "client-key"}, Serving: Pair{"serving", "serving-key"},
			KubeletCA: func() ([]byte, error) { return nil, nil },
		},
		Server: "192.0.2.9:6443", Own: netip.MustParseAddrPort("192.0.2.1:6443"),
	}
	for _, options := range []any{o.node(), o.network(), o.policies(), o.registry(), o.pool(), o.balancer()} {
		v := reflect.ValueOf(options)
		for i := range v.NumField() {
			// New sets Await and EvictsBelow: they are methods of other components.
			if name := v.Type().Field(i).Name; v.Field(i).IsZero() && name != "Await" && name != "EvictsBelow" {
				t.Errorf("%s.%s has no value", v.Type(), name)
			}
		}
	}
	if id := o.node().Identity; id.ServingCert != "serving" || id.ServingKey != "serving-key" {
		t.Errorf("the kubelet of a server has the serving certificate %q, %q", id.ServingCert, id.ServingKey)
	}
	o.Identity.RenewedHere = true
	if id := o.node().Identity; id.ServingCert != "" || id.ServingKey != "" {
		t.Errorf("a kubelet that renews its certificates has %q, %q", id.ServingCert, id.ServingKey)
	}
}
