package loadbalancer

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestElect(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.100")
	a, b, c := announcer{name: "a"}, announcer{name: "b"}, announcer{name: "c"}
	cordoned := announcer{"a", true}
	chosen := elect(service{}, address, []announcer{a, b, c})
	for name, tt := range map[string]struct {
		s     service
		nodes []announcer
		want  string
	}{
		"it stays":                                {service{announcer: "a"}, []announcer{a, b, c}, "a"},
		"it moves when the node is lost":          {service{announcer: "a"}, []announcer{b}, "b"},
		"it moves when the node is cordoned":      {service{announcer: "a"}, []announcer{cordoned, b}, "b"},
		"a cordoned node, if there is no other":   {service{announcer: "a"}, []announcer{cordoned}, "a"},
		"a new one, on a cordoned node":           {service{}, []announcer{cordoned}, "a"},
		"no node: it stays":                       {service{announcer: "a"}, nil, "a"},
		"no node at all":                          {service{}, nil, ""},
		"the order does not matter":               {service{}, []announcer{c, b, a}, chosen},
		"local: where an endpoint is":             {service{announcer: "a", local: true, endpoints: map[string]bool{"b": true}}, []announcer{a, b, c}, "b"},
		"local: it stays":                         {service{announcer: "a", local: true, endpoints: map[string]bool{"a": true, "b": true}}, []announcer{a, b, c}, "a"},
		"local: a cordoned node has the only one": {service{announcer: "a", local: true, endpoints: map[string]bool{"a": true}}, []announcer{cordoned, b}, "a"},
		"local: cordoned, and another has one":    {service{announcer: "a", local: true, endpoints: map[string]bool{"a": true, "b": true}}, []announcer{cordoned, b}, "b"},
		"local: no endpoint, it stays":            {service{announcer: "a", local: true}, []announcer{a, b}, "a"},
		"local: no endpoint, a new one":           {service{local: true}, []announcer{a, b}, ""},
		"local: the endpoint's node is lost":      {service{local: true, endpoints: map[string]bool{"c": true}}, []announcer{a, b}, ""},
	} {
		if got := elect(tt.s, address, tt.nodes); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}

	// Addresses are spread over the nodes, and when one goes only its own move.
	count := make(map[string]int)
	for n := range 100 {
		address := netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})
		all := elect(service{}, address, []announcer{a, b, c})
		count[all]++
		if two := elect(service{}, address, []announcer{a, b}); all != "c" && two != all {
			t.Errorf("%s moves from %s to %s when c goes", address, all, two)
		}
	}
	for _, n := range []string{"a", "b", "c"} {
		if count[n] < 20 {
			t.Errorf("100 addresses are on %v", count)
		}
	}
}

func TestAnnouncers(t *testing.T) {
	yes, no, unknown := corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown
	v := testView()
	was := []*corev1.Node{kubeNode("restarting", yes), kubeNode("lost", yes)}
	v.publish(was, epoch.Add(-10*time.Second))
	excluded, deleted, drained := kubeNode("excluded", yes), kubeNode("deleted", yes), kubeNode("drained", yes)
	excluded.Labels = map[string]string{corev1.LabelNodeExcludeBalancers: ""}
	deleted.DeletionTimestamp = &metav1.Time{Time: epoch}
	drained.Spec.Unschedulable = true
	nodes := []*corev1.Node{kubeNode("ready", yes), kubeNode("restarting", no), kubeNode("lost", unknown), kubeNode("never", no), {}, excluded, deleted, drained}
	v.publish(nodes, epoch)
	got, next := v.announcers(nodes, epoch)
	if want := []announcer{{name: "ready"}, {name: "restarting"}, {"drained", true}}; !slices.Equal(got, want) || next != 20*time.Second {
		t.Errorf("%v, again after %s; want %v", got, next, want)
	}
	got, next = v.announcers(nodes, epoch.Add(20*time.Second))
	if want := []announcer{{name: "ready"}, {"drained", true}}; !slices.Equal(got, want) || next != 0 {
		t.Errorf("later: %v, again after %s; want %v", got, next, want)
	}
}
