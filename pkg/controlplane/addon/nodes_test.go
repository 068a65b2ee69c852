package addon

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func testNode(name string, age int, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Time{Time: epoch.Add(-time.Duration(age) * time.Hour)}}}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

// A node gets lines in the hosts file for its own name and addresses only, and no other text into it.
func TestHosts(t *testing.T) {
	own := host{netip.MustParseAddr("192.0.2.1"), "server.example.com"}
	internal := []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")}
	gone := testNode("gone", 1, "192.0.2.9")
	gone.DeletionTimestamp = &metav1.Time{Time: epoch}
	external := testNode("external", 1)
	external.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeExternalIP, Address: "192.0.2.8"}, {Type: corev1.NodeHostName, Address: "192.0.2.7"}}
	got := hosts(own, internal, []*corev1.Node{
		testNode("server.example.com", 9, "192.0.2.99"), // the settings count
		testNode("b", 1, "192.0.2.3", "2001:db8::3"),
		testNode("a", 1, "::ffff:192.0.2.2"),
		testNode("github.com", 1, "192.0.2.4"),
		testNode("kubernetes.default.svc.cluster.local", 1, "192.0.2.5"),
		testNode("localhost", 1, "192.0.2.6"),
		testNode("x\n192.0.2.6 y", 1, "192.0.2.6"),
		testNode("evil", 1, "192.0.2.6 y", "192.0.2.6\n192.0.2.7 y", "10.43.0.10", "10.42.1.2", "127.0.0.1", "0.0.0.0", "224.0.0.1", "fe80::1", "fe80::1%eth0", ""),
		testNode("thief", 0, "192.0.2.1", "192.0.2.3"),
		gone, external,
	})
	want := []host{own, {netip.MustParseAddr("192.0.2.2"), "a"}, {netip.MustParseAddr("192.0.2.3"), "b"}, {netip.MustParseAddr("2001:db8::3"), "b"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
