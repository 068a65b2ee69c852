package placement

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func testNode(name string, age int) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelOSStable: "linux"}, CreationTimestamp: metav1.Time{Time: epoch.Add(-time.Duration(age) * time.Hour)}}}
}

func TestSeveral(t *testing.T) {
	node := func(status corev1.ConditionStatus, since time.Duration) *corev1.Node {
		n := testNode(fmt.Sprint(status, since), 1)
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status, LastTransitionTime: metav1.Time{Time: epoch.Add(-since)}}}
		return n
	}
	pod := &corev1.PodSpec{NodeSelector: map[string]string{corev1.LabelOSStable: "linux"}, Tolerations: []corev1.Toleration{
		{Key: "CriticalAddonsOnly", Operator: corev1.TolerationOpExists},
		{Key: "node-role.kubernetes.io/control-plane", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule},
	}}
	ready := node(corev1.ConditionTrue, time.Hour)
	windows, drained := node(corev1.ConditionTrue, time.Hour), node(corev1.ConditionTrue, time.Hour)
	windows.Labels[corev1.LabelOSStable] = "windows"
	drained.Spec.Taints = []corev1.Taint{{Key: "node-role.kubernetes.io/control-plane", Effect: corev1.TaintEffectNoExecute}}
	preferred := node(corev1.ConditionTrue, time.Hour)
	preferred.Spec.Taints = []corev1.Taint{{Key: "other", Effect: corev1.TaintEffectPreferNoSchedule}}
	lost := node(corev1.ConditionUnknown, lostAfter-time.Second)
	lost.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}}
	cordoned, gone := node(corev1.ConditionTrue, time.Hour), node(corev1.ConditionTrue, time.Hour)
	cordoned.Spec.Unschedulable, gone.DeletionTimestamp = true, &metav1.Time{Time: epoch}
	// One that has just registered, and one that has just become Ready.
	young, untainting, server := node(corev1.ConditionFalse, 10*time.Second), node(corev1.ConditionTrue, 0), node(corev1.ConditionTrue, time.Hour)
	young.CreationTimestamp = metav1.Time{Time: epoch.Add(-12 * time.Second)}
	untainting.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule}}
	server.Spec.Taints = []corev1.Taint{{Key: "CriticalAddonsOnly", Value: "true", Effect: corev1.TaintEffectNoExecute}}
	for _, tt := range []struct {
		nodes []*corev1.Node
		want  bool
	}{
		{[]*corev1.Node{ready, young}, false},
		{[]*corev1.Node{ready, untainting}, false},
		{[]*corev1.Node{ready, server}, true},
		{[]*corev1.Node{ready, windows}, false},
		{[]*corev1.Node{ready, drained}, false},
		{[]*corev1.Node{ready, preferred}, true},
		{[]*corev1.Node{ready, lost}, true},
		{nil, false},
		{[]*corev1.Node{ready}, false},
		{[]*corev1.Node{ready, ready}, true},
		{[]*corev1.Node{ready, node(corev1.ConditionUnknown, lostAfter-time.Second)}, true},
		{[]*corev1.Node{ready, node(corev1.ConditionUnknown, lostAfter)}, false},
		{[]*corev1.Node{ready, node(corev1.ConditionFalse, time.Hour)}, false},
		{[]*corev1.Node{ready, cordoned}, false},
		{[]*corev1.Node{ready, gone}, false},
		{[]*corev1.Node{ready, testNode("new", 0)}, false},
	} {
		if got := Several(tt.nodes, pod, epoch); got != tt.want {
			t.Errorf("%v: %t", tt.nodes, got)
		}
	}
}

// The second replica stays while one runs on a node that is being drained: otherwise it could be the other one that goes.
func TestLeaving(t *testing.T) {
	node := func(name string, status corev1.ConditionStatus, cordoned bool) *corev1.Node {
		n := testNode(name, 1)
		n.Spec.Unschedulable = cordoned
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status, LastTransitionTime: metav1.Time{Time: epoch.Add(-time.Hour)}}}
		return n
	}
	nodes := []*corev1.Node{node("a", corev1.ConditionTrue, false), node("b", corev1.ConditionTrue, true), node("lost", corev1.ConditionUnknown, false)}
	pod := func(node string, phase corev1.PodPhase) corev1.Pod {
		return corev1.Pod{Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
	}
	ending := pod("b", corev1.PodRunning)
	ending.DeletionTimestamp = &metav1.Time{Time: epoch}
	for what, tt := range map[string]struct {
		pods []corev1.Pod
		want bool
	}{
		"one on each":          {[]corev1.Pod{pod("a", corev1.PodRunning), pod("b", corev1.PodRunning)}, true},
		"evicted":              {[]corev1.Pod{pod("a", corev1.PodRunning), pod("", corev1.PodPending), ending}, false},
		"failed":               {[]corev1.Pod{pod("a", corev1.PodRunning), pod("b", corev1.PodFailed)}, false},
		"on a lost node":       {[]corev1.Pod{pod("a", corev1.PodRunning), pod("lost", corev1.PodRunning)}, false},
		"on a node that is no": {[]corev1.Pod{pod("a", corev1.PodRunning), pod("gone", corev1.PodRunning)}, false},
	} {
		if got := leaving(tt.pods, nodes, &corev1.PodSpec{}, epoch); got != tt.want {
			t.Errorf("%s: %t", what, got)
		}
	}
}
