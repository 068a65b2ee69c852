package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/config"
)

// other returns a node that joined after some seconds.
func other(name, pods, address, mac string, joined int) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1000+int64(joined), 0)),
		Annotations: map[string]string{backendType: "vxlan", backendData: fmt.Sprintf(`{"VNI":1,"VtepMAC":%q}`, mac), publicIP: address, kubeSubnetManager: "true"},
	}}
	n.Spec.PodCIDR = pods
	return n
}

func thisView(backend config.FlannelBackend) view {
	return view{
		node: "a", cluster: netip.MustParsePrefix("10.42.0.0/16"), backend: backend,
		pods: netip.MustParsePrefix("10.42.0.0/24"), address: netip.MustParseAddr("192.0.2.1"), mac: hardwareAddr("id", "a"), key: wgtypes.Key{1},
	}
}

// The annotations are flannel's, to the letter: its tools and K3s's read them.
func TestAnnouncement(t *testing.T) {
	v := thisView(config.VXLAN)
	got, err := v.announce()
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"flannel.alpha.coreos.com/backend-type":        "vxlan",
		"flannel.alpha.coreos.com/backend-data":        fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, v.mac),
		"flannel.alpha.coreos.com/public-ip":           "192.0.2.1",
		"flannel.alpha.coreos.com/kube-subnet-manager": "true",
	} {
		if got[key] != want {
			t.Errorf("%s is %q, want %q", key, got[key], want)
		}
	}
	if got, err := thisView(config.HostGW).announce(); err != nil || got[backendData] != "null" || got[backendType] != "host-gw" {
		t.Errorf("host-gw: %v, %v", got, err)
	}
	v = thisView(config.WireGuard)
	v.port = 51820
	got, err = v.announce()
	if want := `{"PublicKey":"` + v.key.String() + `","Port":51820}`; err != nil || got[backendData] != want || got[backendType] != "wireguard" {
		t.Errorf("WireGuard: %v, %v", got, err)
	}
	v = thisView(config.VXLAN)
	if again := hardwareAddr("id", "a"); again.String() != v.mac.String() || again[0]&3 != 2 || hardwareAddr("id", "b").String() == again.String() {
		t.Errorf("hardware address %s", again)
	}
}

func TestPeers(t *testing.T) {
	own := other("a", "10.42.0.0/24", "192.0.2.1", "02:00:00:00:00:01", 0)
	joining, unannounced := other("d", "", "", "", 3), other("e", "10.42.4.0/24", "", "", 4)
	good := []*corev1.Node{own, other("c", "10.42.2.0/24", "198.51.100.3", "02:00:00:00:00:03", 2), other("b", "10.42.1.0/24", "192.0.2.2", "02:00:00:00:00:02", 1), joining, unannounced}
	peers, notes := thisView(config.VXLAN).peers(good)
	if len(notes) > 0 || describe(peers) != "b 10.42.1.0/24 via 192.0.2.2, c 10.42.2.0/24 via 198.51.100.3" || peers[0].mac != "\x02\x00\x00\x00\x00\x02" || peers[0].gateway().String() != "10.42.1.0" {
		t.Errorf("%v, %q", peers, notes)
	}
}

// A node writes its own annotations and, when it registers, its own range: what it claims must not take another node's packets, nor be
// understood as something else by the kernel.
func TestHostileAnnouncements(t *testing.T) {
	victim := other("b", "10.42.1.0/24", "192.0.2.2", "02:00:00:00:00:02", 1)
	for what, c := range map[string]struct {
		pods, address, mac string
		want               string
	}{
		"the default route":              {"0.0.0.0/0", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"the whole cluster":              {"10.42.0.0/16", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"service addresses":              {"10.43.0.0/24", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"IPv6":                           {"fd00::/64", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"no range":                       {"x", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"bits of the host":               {"10.42.3.1/24", "192.0.2.3", "02:00:00:00:00:03", "not a part of --cluster-cidr"},
		"this node's range":              {"10.42.0.0/24", "192.0.2.3", "02:00:00:00:00:03", "overlaps this node's 10.42.0.0/24"},
		"a part of another's range":      {"10.42.1.128/25", "192.0.2.3", "02:00:00:00:00:03", "overlaps 10.42.1.0/24 of node b"},
		"more than another's range":      {"10.42.0.0/17", "192.0.2.3", "02:00:00:00:00:03", "overlaps"},
		"another's hardware address":     {"10.42.3.0/24", "192.0.2.3", "02:00:00:00:00:02", "claims the hardware address 02:00:00:00:00:02 of node b"},
		"this node's hardware address":   {"10.42.3.0/24", "192.0.2.3", hardwareAddr("id", "a").String(), "of this node's vxlan"},
		"the address that is flooded to": {"10.42.3.0/24", "192.0.2.3", "00:00:00:00:00:00", "is not VNI 1 with the hardware address of an interface"},
		"broadcast":                      {"10.42.3.0/24", "192.0.2.3", "ff:ff:ff:ff:ff:ff", "is not VNI 1 with the hardware address"},
		"a group":                        {"10.42.3.0/24", "192.0.2.3", "01:00:5e:00:00:01", "is not VNI 1 with the hardware address"},
		"a long hardware address":        {"10.42.3.0/24", "192.0.2.3", "02:00:00:00:00:00:00:03", "is not VNI 1 with the hardware address"},
		"this node's address":            {"10.42.3.0/24", "192.0.2.1", "02:00:00:00:00:03", "claims this node's address 192.0.2.1"},
		"a pod's address":                {"10.42.3.0/24", "10.42.1.7", "02:00:00:00:00:03", "is not the IPv4 address of a node"},
		"loopback":                       {"10.42.3.0/24", "127.0.0.1", "02:00:00:00:00:03", "is not the IPv4 address of a node"},
		"a group's address":              {"10.42.3.0/24", "224.0.0.1", "02:00:00:00:00:03", "is not the IPv4 address of a node"},
		"a name":                         {"10.42.3.0/24", "example.com", "02:00:00:00:00:03", "is not the IPv4 address of a node"},
		"an address over two lines":      {"10.42.3.0/24", "192.0.2.3\nroot", "02:00:00:00:00:03", `"192.0.2.3\nroot", its annotation`},
	} {
		nodes := []*corev1.Node{other("evil", c.pods, c.address, c.mac, 2), victim}
		peers, notes := thisView(config.VXLAN).peers(nodes)
		if describe(peers) != "b 10.42.1.0/24 via 192.0.2.2" || len(notes) != 1 || !strings.HasPrefix(notes[0], "no route to the pods of node evil: ") || !strings.Contains(notes[0], c.want) || strings.Contains(notes[0], "\n") {
			t.Errorf("%s: peers %v, notes %q, want %q", what, peers, notes, c.want)
		}
	}

	for what, change := range map[string]func(*corev1.Node){
		"another backend":   func(n *corev1.Node) { n.Annotations[backendType] = "host-gw" },
		"another VNI":       func(n *corev1.Node) { n.Annotations[backendData] = `{"VNI":2,"VtepMAC":"02:00:00:00:00:03"}` },
		"no backend data":   func(n *corev1.Node) { delete(n.Annotations, backendData) },
		"data that is long": func(n *corev1.Node) { n.Annotations[backendData] = strings.Repeat("x", 100000) },
	} {
		n := other("c", "10.42.3.0/24", "192.0.2.3", "02:00:00:00:00:03", 2)
		change(n)
		if peers, notes := thisView(config.VXLAN).peers([]*corev1.Node{n}); len(peers) != 0 || len(notes) != 1 || len(notes[0]) > 300 {
			t.Errorf("%s: %v, %q", what, peers, notes)
		}
	}
	// With WireGuard the key counts.
	first := other("b", "10.42.1.0/24", "192.0.2.2", "", 1)
	first.Annotations[backendType], first.Annotations[backendData] = "wireguard", fmt.Sprintf(`{"PublicKey":%q,"Port":51820}`, wgtypes.Key{2})
	for data, want := range map[string]string{
		fmt.Sprintf(`{"PublicKey":%q,"Port":51821}`, wgtypes.Key{3}): "",
		fmt.Sprintf(`{"PublicKey":%q,"Port":51820}`, wgtypes.Key{2}): "it claims the WireGuard key of node b",
		fmt.Sprintf(`{"PublicKey":%q,"Port":51820}`, wgtypes.Key{1}): "it claims this node's WireGuard key",
		fmt.Sprintf(`{"PublicKey":%q,"Port":51820}`, wgtypes.Key{}):  "is not a WireGuard key with a port",
		fmt.Sprintf(`{"PublicKey":%q}`, wgtypes.Key{3}):              "is not a WireGuard key with a port",
		`{"PublicKey":"x","Port":51820}`:                             "is not a WireGuard key with a port",
		`{"PublicKey":"x","Port":70000}`:                             "cannot be read",
	} {
		n := other("c", "10.42.3.0/24", "192.0.2.3", "", 2)
		n.Annotations[backendType], n.Annotations[backendData] = "wireguard", data
		peers, notes := thisView(config.WireGuard).peers([]*corev1.Node{n, first})
		if want == "" && (len(peers) != 2 || peers[1].port != 51821) || want != "" && (len(peers) != 1 || len(notes) != 1 || !strings.Contains(notes[0], want)) {
			t.Errorf("%s: %v, %q, want %q", data, peers, notes, want)
		}
	}
	// With host-gw only the route counts.
	n := other("c", "10.42.3.0/24", "192.0.2.3", "", 2)
	n.Annotations[backendType], n.Annotations[backendData] = "host-gw", "null"
	if peers, notes := thisView(config.HostGW).peers([]*corev1.Node{n}); len(peers) != 1 || len(notes) != 0 {
		t.Errorf("host-gw: %v, %q", peers, notes)
	}
}

// Of two nodes that claim the same, the first has it, whatever the order of the list.
func TestFirstClaimCounts(t *testing.T) {
	nodes := []*corev1.Node{
		other("late", "10.42.1.0/24", "192.0.2.9", "02:00:00:00:00:09", 9),
		other("first", "10.42.1.0/24", "192.0.2.2", "02:00:00:00:00:02", 1),
	}
	for range 2 {
		peers, notes := thisView(config.VXLAN).peers(nodes)
		if len(peers) != 1 || peers[0].node != "first" || len(notes) != 1 {
			t.Errorf("%v, %q", peers, notes)
		}
		slices.Reverse(nodes)
	}
}
