package loadbalancer

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/layout"
)

func kubeNode(name string, ready corev1.ConditionStatus, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}}
	for i, a := range addresses {
		kind := corev1.NodeInternalIP
		if i > 0 {
			kind = corev1.NodeExternalIP
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: kind, Address: a})
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
	return n
}

func testView() nodeView {
	return nodeView{
		own: node{"server", addrs("192.0.2.1")}, lastReady: make(map[types.UID]time.Time),
		internal: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")},
	}
}

func TestPublish(t *testing.T) {
	yes, no := corev1.ConditionTrue, corev1.ConditionFalse
	change := func(n *corev1.Node, f func(*corev1.Node)) *corev1.Node { f(n); return n }
	excluded := func(n *corev1.Node) { n.Labels = map[string]string{corev1.LabelNodeExcludeBalancers: "false"} }
	deleted := func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{Time: epoch} }
	asServer := func(n *corev1.Node) { n.Labels = map[string]string{layout.ServerLabel: "true"} }
	server := change(kubeNode("server", yes, "192.0.2.1"), asServer)
	for name, tt := range map[string]struct {
		nodes []*corev1.Node
		want  []string
	}{
		"no node yet":                            {nil, []string{"192.0.2.1"}},
		"one node":                               {[]*corev1.Node{server}, []string{"192.0.2.1"}},
		"one node without addresses yet":         {[]*corev1.Node{kubeNode("server", yes)}, []string{"192.0.2.1"}},
		"one node, external first":               {[]*corev1.Node{change(kubeNode("server", yes, "192.0.2.1", "203.0.113.1"), asServer)}, []string{"203.0.113.1", "192.0.2.1"}},
		"servers first, external first, by name": {[]*corev1.Node{kubeNode("z", yes, "192.0.2.4"), kubeNode("a", yes, "192.0.2.3", "203.0.113.3"), server}, []string{"192.0.2.1", "203.0.113.3", "192.0.2.3", "192.0.2.4"}},
		"not ready, deleted, excluded": {[]*corev1.Node{server, kubeNode("a", no, "192.0.2.3"), change(kubeNode("b", yes, "192.0.2.4"), deleted),
			change(kubeNode("c", yes, "192.0.2.5"), excluded)}, []string{"192.0.2.1"}},
		"own excluded": {[]*corev1.Node{change(kubeNode("server", yes, "192.0.2.1"), excluded), kubeNode("a", yes, "192.0.2.3")}, []string{"192.0.2.3"}},
		"what is no node's address": {[]*corev1.Node{server, kubeNode("a", yes, "10.43.0.1", "10.42.0.7", "127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1", "fe80::1%eth0", "x", "", "::ffff:192.0.2.3")},
			[]string{"192.0.2.1", "192.0.2.3"}},
		"the server's address, and another node's": {[]*corev1.Node{
			change(kubeNode("a", yes, "192.0.2.1", "192.0.2.4"), func(n *corev1.Node) { n.CreationTimestamp = metav1.Time{Time: epoch.Add(time.Hour)} }),
			change(kubeNode("b", yes, "192.0.2.4"), func(n *corev1.Node) { n.CreationTimestamp = metav1.Time{Time: epoch} }), server}, []string{"192.0.2.1", "192.0.2.4"}},
		"an older agent claims a server's external address": {[]*corev1.Node{
			change(kubeNode("a", yes, "192.0.2.3", "203.0.113.1"), func(n *corev1.Node) { n.CreationTimestamp = metav1.Time{Time: epoch.Add(-time.Hour)} }),
			change(kubeNode("server", yes, "192.0.2.1", "203.0.113.1"), func(n *corev1.Node) { asServer(n); n.CreationTimestamp = metav1.Time{Time: epoch} })},
			[]string{"203.0.113.1", "192.0.2.1", "192.0.2.3"}},
	} {
		t.Run(name, func(t *testing.T) {
			v := testView()
			nodes, next := v.publish(tt.nodes, epoch)
			if got := allAddresses(nodes); !slices.Equal(got, addrs(tt.want...)) || next != 0 {
				t.Errorf("got %v, again in %s; want %v", got, next, tt.want)
			}
		})
	}
}

// Which server leads changes nothing: each has its own name and settings only.
func TestPublishWhoeverLeads(t *testing.T) {
	yes := corev1.ConditionTrue
	all := []*corev1.Node{
		kubeNode("agent", yes, "192.0.2.4", "203.0.113.4"),
		kubeNode("a", yes, "192.0.2.1", "203.0.113.1"), kubeNode("b", yes, "192.0.2.2"), kubeNode("c", yes, "192.0.2.3", "203.0.113.3"),
	}
	for _, n := range all[1:] {
		n.Labels = map[string]string{layout.ServerLabel: "true"}
	}
	want := addrs("203.0.113.1", "192.0.2.1", "192.0.2.2", "203.0.113.3", "192.0.2.3", "203.0.113.4", "192.0.2.4")
	for _, leader := range []node{{"a", addrs("203.0.113.1", "192.0.2.1")}, {"b", addrs("192.0.2.2")}, {"c", addrs("203.0.113.3", "192.0.2.3")}} {
		v := nodeView{own: leader, lastReady: make(map[types.UID]time.Time)}
		if nodes, _ := v.publish(all, epoch); !slices.Equal(allAddresses(nodes), want) {
			t.Errorf("while %s leads: %v, want %v", leader.name, allAddresses(nodes), want)
		}
	}
}

// Until a server's own node has announced its external address, after an upgrade for example, that of its settings counts. So does the server itself,
// although its node does not have its label yet.
func TestPublishSettings(t *testing.T) {
	v := nodeView{own: node{"server", addrs("203.0.113.1", "192.0.2.1")}, lastReady: make(map[types.UID]time.Time)}
	older := kubeNode("agent", corev1.ConditionTrue, "192.0.2.2", "203.0.113.1", "192.0.2.1")
	older.CreationTimestamp = metav1.Time{Time: epoch.Add(-time.Hour)}
	for _, own := range []*corev1.Node{kubeNode("server", corev1.ConditionTrue, "192.0.2.1"), kubeNode("server", corev1.ConditionTrue, "192.0.2.1", "203.0.113.1")} {
		own.CreationTimestamp = metav1.Time{Time: epoch}
		want := addrs("203.0.113.1", "192.0.2.1", "192.0.2.2")
		if nodes, _ := v.publish([]*corev1.Node{older, own}, epoch); !slices.Equal(allAddresses(nodes), want) {
			t.Errorf("with %v: %v, want %v", own.Status.Addresses, allAddresses(nodes), want)
		}
	}
}

// A node that is NotReady for a moment keeps its place; when none is Ready, all are published.
func TestPublishGrace(t *testing.T) {
	v := testView()
	step := func(at time.Duration, server, agent corev1.ConditionStatus, wantNext time.Duration, want ...string) {
		t.Helper()
		nodes, next := v.publish([]*corev1.Node{kubeNode("server", server), kubeNode("agent", agent, "192.0.2.2")}, epoch.Add(at))
		if got := allAddresses(nodes); fmt.Sprint(got) != fmt.Sprint(addrs(want...)) || next != wantNext {
			t.Errorf("after %s: %v, again in %s; want %v in %s", at, got, next, want, wantNext)
		}
	}
	yes, no, unknown := corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown
	const second = time.Second
	step(0, no, no, readyGrace, "192.0.2.1") // a node that has just joined
	step(second, yes, yes, 0, "192.0.2.1", "192.0.2.2")
	step(2*second, yes, no, readyGrace-second, "192.0.2.1", "192.0.2.2")
	step(20*second, yes, yes, 0, "192.0.2.1", "192.0.2.2")
	step(21*second, yes, unknown, readyGrace-second, "192.0.2.1", "192.0.2.2")
	step(20*second+readyGrace, yes, unknown, 0, "192.0.2.1")
	step(60*second, no, unknown, readyGrace-(60*second-20*second-readyGrace), "192.0.2.1")
	step(200*second, no, unknown, 0, "192.0.2.1", "192.0.2.2")
	if v.publish(nil, epoch.Add(200*second)); len(v.lastReady) > 0 {
		t.Errorf("nodes that are gone are remembered: %v", v.lastReady)
	}
}
