package noderole

import (
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
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
