package network

import (
	"flag"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

var update = flag.Bool("update", false, "write the golden files")

func TestConflist(t *testing.T) {
	for name, nftables := range map[string]bool{"conflist-nftables.json": true, "conflist-iptables.json": false} {
		text, err := Conflist(layout.DefaultDataDir.PodNetwork(), "10.42.0.0/24", "/run/polymesh/cni", 1450, nftables)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(path); err != nil || string(text) != string(want) {
			t.Errorf("%s differs (go test -update writes it): %v\n%s", path, err, text)
		}
	}
}

// newNetwork returns a component that was not started.
func newNetwork(backend config.FlannelBackend) *Network {
	return New(Options{
		Settings: config.Node{DataDir: layout.DefaultDataDir}, Name: "node-1", IP: netip.MustParseAddr("192.0.2.10"), ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"),
		Backend: backend, Port: layout.VXLANPort, Marker: &datadir.Marker{ID: "id"}, Log: slog.New(slog.DiscardHandler),
	})
}

func TestNetworkSaysWhatItWaitsFor(t *testing.T) {
	n := newNetwork(config.VXLAN)
	n.addresses = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(127, 0, 0, 1), Mask: net.CIDRMask(8, 32)}, &net.IPNet{IP: net.IPv4(192, 0, 2, 10), Mask: net.CIDRMask(24, 32)}}, nil
	}
	condition := func(s corev1.ConditionStatus, message string) *corev1.Node {
		node := &corev1.Node{}
		node.Name = "node-1"
		if s != "" {
			node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeMemoryPressure, Status: "True"}, {Type: corev1.NodeReady, Status: s, Message: message}}
		}
		return node
	}
	for _, c := range []struct {
		node *corev1.Node
		want string
	}{
		{nil, "the node has not registered yet"},
		{condition("", ""), "node node-1 has not reported yet"},
		{condition(corev1.ConditionFalse, "no network"), "node node-1 is not Ready: no network"},
		{condition(corev1.ConditionTrue, ""), ""},
	} {
		if c.node != nil {
			if err := n.nodes.Add(c.node); err != nil {
				t.Fatal(err)
			}
		}
		err := n.Ready(t.Context())
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("error is %v, want %q", err, c.want)
		}
	}

	// The cluster's address for the node disappears while the server runs: the node's own condition stays True.
	n.addresses = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(192, 0, 2, 11), Mask: net.CIDRMask(24, 32)}}, nil
	}
	if err := n.Ready(t.Context()); err == nil || err.Error() != "the node's address 192.0.2.10 is on no interface any more: restart the server, so that it uses the machine's new one" {
		t.Errorf("without the address: %v", err)
	}
	n.opts.Settings.NodeIP = n.opts.IP
	if err := n.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "restart the server with another --node-ip") {
		t.Errorf("without the configured address: %v", err)
	}
}
