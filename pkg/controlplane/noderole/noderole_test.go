package noderole

import (
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/node/external"
)

func TestFormerNode(t *testing.T) {
	node := func(name, machine string, ready corev1.ConditionStatus, addresses ...string) *corev1.Node {
		n := &corev1.Node{}
		n.Name, n.Status.NodeInfo.MachineID = name, machine
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
		for _, a := range addresses {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: "localhost"})
		return n
	}
	const here, there = "192.0.2.1", "192.0.2.2"
	own := node("new", "m1", corev1.ConditionTrue, here, "2001:db8::1")
	for _, c := range []struct {
		other *corev1.Node
		want  string
	}{
		{node("old", "m1", corev1.ConditionUnknown, here), "old"},
		{node("old", "m1", corev1.ConditionUnknown, there, "2001:db8::1"), "old"},
		{node("clone", "m1", corev1.ConditionUnknown, there), ""}, // a clone of this machine that is off
		{node("clone", "m1", corev1.ConditionUnknown), ""},
		{node("old", "m1", corev1.ConditionTrue, here), ""},      // a second server on this machine
		{node("other", "m2", corev1.ConditionUnknown, here), ""}, // another machine that is off, and had this one's address
		{node("other", "", corev1.ConditionUnknown, here), ""},
		{node("new", "m1", corev1.ConditionUnknown, here), ""},
	} {
		if got := formerNode(own, []*corev1.Node{own, c.other}); got != c.want {
			t.Errorf("%s, %s: %q, want %q", c.other.Name, c.other.Status.NodeInfo.MachineID, got, c.want)
		}
	}
	n := New(Options{Node: "new", Log: slog.New(slog.DiscardHandler)})
	if note := n.Notes(t.Context()); len(note) > 0 {
		t.Errorf("at first the note is %q", note)
	}
	old := "old"
	n.former.Store(&old)
	if note := n.Notes(t.Context()); len(note) != 1 || !strings.Contains(note[0], "remove it with its pods by `polymesh kubectl delete node old`") {
		t.Errorf("the note is %q", note)
	}
}

// The kubelet's taint goes only from a node that keeps its addresses itself; other taints stay.
func TestInitialized(t *testing.T) {
	waiting := corev1.Taint{Key: "node.cloudprovider.kubernetes.io/uninitialized", Value: "true", Effect: corev1.TaintEffectNoSchedule}
	users := corev1.Taint{Key: "users", Effect: corev1.TaintEffectNoExecute}
	for name, c := range map[string]struct {
		annotation string
		taints     []corev1.Taint
		left       int
		waits      bool
	}{
		"a new node":             {"203.0.113.1", []corev1.Taint{users, waiting}, 1, true},
		"a user's provider":      {"", []corev1.Taint{users, waiting}, 1, false},
		"an initialized node":    {"203.0.113.1", []corev1.Taint{users}, 1, false},
		"a node without a taint": {"203.0.113.1", nil, 0, false},
	} {
		n := &corev1.Node{}
		n.Annotations = map[string]string{external.Annotation: c.annotation}
		n.Spec.Taints = c.taints
		left, waits := initialized(n)
		if waits != c.waits || len(left) != c.left || len(left) > 0 && left[0] != users {
			t.Errorf("%s: left %v, waits %v", name, left, waits)
		}
	}
}
