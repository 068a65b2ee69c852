package addon

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/noderole"
	"polymesh.dev/polymesh/pkg/layout"
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
	second := testNode("second.example.com", 0, "192.0.2.11") // only of servers are names with a dot
	second.Labels = map[string]string{layout.ServerLabel: "true"}
	got := hosts(own, internal, []*corev1.Node{
		second, testNode("agent.example.com", 1, "192.0.2.12"), testNode("older", 9, "192.0.2.11"),
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
	want := []host{
		{netip.MustParseAddr("192.0.2.2"), "a"}, {netip.MustParseAddr("192.0.2.3"), "b"}, {netip.MustParseAddr("2001:db8::3"), "b"},
		{netip.MustParseAddr("192.0.2.11"), "second.example.com"}, own,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A change of leader changes nothing of CoreDNS; other name servers of any server do, those of an agent do not.
func TestLeaderChangesNothing(t *testing.T) {
	type machine struct {
		name, address string
		servers       []string
	}
	machines := []machine{{"a.example.com", "192.0.2.1", []string{"192.0.2.53"}}, {"b", "192.0.2.2", nil}, {"c", "192.0.2.3", []string{"192.0.2.53", "192.0.2.54"}}}
	var nodes []*corev1.Node
	for _, m := range machines {
		n := testNode(m.name, 1, m.address)
		n.Labels = map[string]string{layout.ServerLabel: "true"}
		n.Annotations = map[string]string{"other": "x", noderole.Nameservers: noderole.Announcement(m.servers)}
		if _, err := trimmed(n); err != nil || len(n.Annotations) != 1 {
			t.Fatalf("kept %v (%v)", n.Annotations, err)
		}
		nodes = append(nodes, n)
	}
	agent := testNode("agent", 1, "192.0.2.4")
	nodes = append(nodes, agent)
	hash := nameserversOf(machines[0].name, machines[0].servers, nodes)
	list := hosts(host{netip.MustParseAddr(machines[0].address), machines[0].name}, nil, nodes)
	if len(list) != 4 {
		t.Errorf("hosts are %v", list)
	}
	for _, m := range machines[1:] {
		if got := nameserversOf(m.name, m.servers, nodes); got != hash {
			t.Errorf("while %s leads, the hash is %s, not %s", m.name, got, hash)
		}
		if got := hosts(host{netip.MustParseAddr(m.address), m.name}, nil, nodes); !slices.Equal(got, list) {
			t.Errorf("while %s leads, hosts are %v, not %v", m.name, got, list)
		}
	}
	agent.Annotations = map[string]string{noderole.Nameservers: "192.0.2.66"}
	if got := nameserversOf("b", nil, nodes); got != hash {
		t.Error("an agent's name servers count")
	}
	nodes[2].Annotations[noderole.Nameservers] = "192.0.2.55"
	if got := nameserversOf("b", nil, nodes); got == hash {
		t.Error("another server's name servers do not count")
	}
	if nameserversOf("b", []string{"192.0.2.55"}, nil) == nameserversOf("b", nil, nil) {
		t.Error("the own name servers do not count")
	}
}
