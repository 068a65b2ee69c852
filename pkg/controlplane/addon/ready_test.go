package addon

import (
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestExplain(t *testing.T) {
	now := time.Now()
	pod := func(name string, age time.Duration, status corev1.PodStatus) corev1.Pod {
		return corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(now.Add(-age))}, Status: status}
	}
	waiting := func(reason, message string) corev1.PodStatus {
		return corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{
			State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
		}}}
	}
	unschedulable := corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable,
		// As Kubernetes 1.36 words it.
		Message: "0/1 nodes are available: 1 node(s) had untolerated taint(s). no new claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
	}}}
	tolerant := pod("a", 0, unschedulable)
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: "CriticalAddonsOnly", Operator: corev1.TolerationOpExists}}
	nodes := func() []corev1.Node {
		return []corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: "CriticalAddonsOnly", Value: "true", Effect: corev1.TaintEffectNoExecute},
			{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule},
			{Key: "slow", Effect: corev1.TaintEffectPreferNoSchedule},
		}}}}
	}
	leaving := pod("leaving", 0, waiting("CrashLoopBackOff", "back-off"))
	leaving.DeletionTimestamp = &metav1.Time{Time: now}

	for _, tt := range []struct {
		name       string
		conditions []appsv1.DeploymentCondition
		pods       []corev1.Pod
		want       string
	}{
		{name: "nothing", want: "no pod yet"},
		{
			name: "quota", want: "no pod can be made: pods is forbidden: exceeded quota",
			conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Message: "pods is forbidden:\n exceeded quota"}},
		},
		{
			name: "taint", pods: []corev1.Pod{tolerant},
			want: "pod a cannot be scheduled: 0/1 nodes are available: 1 node(s) had untolerated taint(s) (node-1 dedicated=db:NoSchedule)",
		},
		{
			name: "image", pods: []corev1.Pod{pod("a", 0, waiting("ErrImagePull", "no such image"))},
			want: "pod a: ErrImagePull: no such image",
		},
		{
			name: "without a message", pods: []corev1.Pod{pod("a", 0, waiting("CrashLoopBackOff", ""))},
			want: "pod a: CrashLoopBackOff",
		},
		{
			name: "the newest counts, those that leave do not",
			pods: []corev1.Pod{leaving, pod("old", time.Hour, unschedulable), pod("new", time.Minute, waiting("ContainerCreating", ""))},
			want: "pod new is starting",
		},
		{
			name: "not ready", pods: []corev1.Pod{pod("a", 0, corev1.PodStatus{Phase: corev1.PodRunning})},
			want: "pod a runs but is not ready",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &appsv1.Deployment{Status: appsv1.DeploymentStatus{Conditions: tt.conditions}}
			if got := explain(d, tt.pods, nodes); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// A pod on a node that is gone counts as ready until its status is written again.
func TestOnReadyNode(t *testing.T) {
	node := func(name string, ready corev1.ConditionStatus) corev1.Node {
		return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
	}
	pod := func(on string, ready corev1.ConditionStatus) corev1.Pod {
		return corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "coredns-" + on}, Spec: corev1.PodSpec{NodeName: on},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}}}
	}
	nodes := []corev1.Node{node("here", corev1.ConditionTrue), node("lost", corev1.ConditionUnknown)}
	none := int32(0)
	for _, c := range []struct {
		name     string
		replicas *int32
		pods     []corev1.Pod
		want     string
	}{
		{"here", nil, []corev1.Pod{pod("here", corev1.ConditionTrue)}, ""},
		{"one of two", nil, []corev1.Pod{pod("lost", corev1.ConditionTrue), pod("here", corev1.ConditionTrue)}, ""},
		{"lost", nil, []corev1.Pod{pod("lost", corev1.ConditionTrue), pod("here", corev1.ConditionFalse)}, "no pod on a node that is Ready: pod coredns-lost is on node lost, which does not report"},
		{"removed", nil, []corev1.Pod{pod("gone", corev1.ConditionTrue)}, "no pod on a node that is Ready: pod coredns-gone is on node gone, which does not report"},
		{"no pod", nil, nil, "no pod on a node that is Ready"},
		{"scaled down by the user", &none, nil, ""},
	} {
		err := onReadyNode(&appsv1.Deployment{Spec: appsv1.DeploymentSpec{Replicas: c.replicas}}, c.pods, nodes)
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
