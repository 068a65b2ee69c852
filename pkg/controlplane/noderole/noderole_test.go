package noderole

import (
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestFormerNode(t *testing.T) {
	node := func(name, machine string, ready corev1.ConditionStatus) *corev1.Node {
		n := &corev1.Node{}
		n.Name, n.Status.NodeInfo.MachineID = name, machine
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
		return n
	}
	own := node("new", "m1", corev1.ConditionTrue)
	for _, c := range []struct {
		other *corev1.Node
		want  string
	}{
		{node("old", "m1", corev1.ConditionUnknown), "old"},
		{node("old", "m1", corev1.ConditionTrue), ""},      // a second server on this machine
		{node("other", "m2", corev1.ConditionUnknown), ""}, // another machine that is off
		{node("other", "", corev1.ConditionUnknown), ""},
		{node("new", "m1", corev1.ConditionUnknown), ""},
	} {
		if got := formerNode(own, []*corev1.Node{own, c.other}); got != c.want {
			t.Errorf("%s, %s: %q, want %q", c.other.Name, c.other.Status.NodeInfo.MachineID, got, c.want)
		}
	}
	n := New(Options{Node: "new", Log: slog.New(slog.DiscardHandler)})
	if note := n.Note(t.Context()); note != "" {
		t.Errorf("at first the note is %q", note)
	}
	old := "old"
	n.former.Store(&old)
	if note := n.Note(t.Context()); !strings.Contains(note, "remove it with its pods by `polymesh kubectl delete node old`") {
		t.Errorf("the note is %q", note)
	}
}
