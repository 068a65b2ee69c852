package diagnose

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes/fake"
)

// TestSummary uses a client of an API server, as the statuses of the server's parts do.
func TestSummary(t *testing.T) {
	now := time.Now()
	pod := func(name string, age time.Duration, status corev1.PodStatus) corev1.Pod {
		return corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Labels: map[string]string{"app": "api"}, CreationTimestamp: metav1.NewTime(now.Add(-age))},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "api", Image: "shop/api:1"}}}, Status: status}
	}
	waiting := func(reason, message string) corev1.PodStatus {
		return corev1.PodStatus{Phase: corev1.PodPending, ContainerStatuses: []corev1.ContainerStatus{{
			Name: "api", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
		}}}
	}
	unschedulable := corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable,
		// As Kubernetes 1.36 words it.
		Message: "0/1 nodes are available: 1 node(s) had untolerated taint(s). no new claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
	}}}
	tolerant := pod("a", 0, unschedulable)
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: "CriticalAddonsOnly", Operator: corev1.TolerationOpExists}}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{
		{Key: "CriticalAddonsOnly", Value: "true", Effect: corev1.TaintEffectNoExecute},
		{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule},
		{Key: "slow", Effect: corev1.TaintEffectPreferNoSchedule},
	}}}
	crashing := waiting("CrashLoopBackOff", "back-off 5m0s")
	crashing.ContainerStatuses[0].RestartCount = 4
	crashing.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 2}
	old := pod("old", time.Hour, unschedulable)
	old.Labels["pod-template-hash"] = "older"
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
			name: "quota", want: "no pod can be created: pods is forbidden: exceeded quota",
			conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Message: "pods is forbidden:\n exceeded quota"}},
		},
		{
			name: "taint", pods: []corev1.Pod{tolerant},
			want: "pod a cannot be scheduled: 0/1 nodes are available: 1 node(s) had untolerated taint(s) (node-1 dedicated=db:NoSchedule)",
		},
		{
			name: "image", pods: []corev1.Pod{pod("a", 0, waiting("ErrImagePull", "no such image"))},
			want: "pod a, container api: ImagePull: shop/api:1: no such image",
		},
		{
			name: "without a message", pods: []corev1.Pod{pod("a", 0, waiting("CrashLoopBackOff", ""))},
			want: "pod a, container api: CrashLoopBackOff",
		},
		{
			name: "crash, without its log", pods: []corev1.Pod{pod("a", 0, crashing)},
			want: "pod a, container api: Crash: ended with exit code 2 (4 restarts)",
		},
		{
			name: "hostile", pods: []corev1.Pod{pod("a", 0, waiting("Odd", "one\n\x1b[2Ktwo "+strings.Repeat("x", 10000)))},
			want: "pod a, container api: Odd: one \\x1b[2Ktwo " + strings.Repeat("x", maxLine-len("pod a, container api: Odd: one \x1b[2Ktwo ")) + " …",
		},
		{
			name: "the newest counts, those that leave do not",
			pods: []corev1.Pod{leaving, old, pod("new", time.Minute, waiting("ContainerCreating", ""))},
			want: "pod new is starting",
		},
		{
			name: "not ready", pods: []corev1.Pod{pod("a", 0, corev1.PodStatus{Phase: corev1.PodRunning})},
			want: "pod a runs but is not ready",
		},
		{
			name: "not ready, with a reason", want: "pod a runs but is not ready: containers with unready status: [api]",
			pods: []corev1.Pod{pod("a", 0, corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{
				{Type: corev1.PodReady, Status: corev1.ConditionFalse, Message: "containers with unready status: [api]"}}})},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "api", Namespace: "shop"},
				Spec:   appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}},
				Status: appsv1.DeploymentStatus{Conditions: tt.conditions}}
			client := fake.NewClientset(node)
			for _, pod := range tt.pods {
				if err := client.Tracker().Add(&pod); err != nil {
					t.Fatal(err)
				}
			}
			got, err := Summary(t.Context(), client, d)
			if err != nil || got != tt.want {
				t.Errorf("got  %s, %v\nwant %s", got, err, tt.want)
			}
			for _, action := range client.Actions() {
				if resource := action.GetResource().Resource; action.GetVerb() != "list" || resource != "pods" && resource != "nodes" {
					t.Errorf("a summary is queried often, and this one reads more than pods and nodes: %s %s", action.GetVerb(), resource)
				}
			}
		})
	}
}

// A pod on a node that is gone counts as ready until its status is written again.
func TestServing(t *testing.T) {
	node := func(name string, ready corev1.ConditionStatus) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
	}
	pod := func(on string, ready corev1.ConditionStatus) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "coredns-" + on, Namespace: "x", Labels: map[string]string{"app": "dns"}}, Spec: corev1.PodSpec{NodeName: on},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}}}
	}
	none := int32(0)
	for _, c := range []struct {
		name      string
		available corev1.ConditionStatus
		replicas  *int32
		pods      []*corev1.Pod
		want      string
	}{
		{"here", "True", nil, []*corev1.Pod{pod("here", "True")}, ""},
		{"one of two", "True", nil, []*corev1.Pod{pod("lost", "True"), pod("here", "True")}, ""},
		{"lost", "True", nil, []*corev1.Pod{pod("lost", "True"), pod("here", "False")}, "no pod on a node that is Ready: pod coredns-lost is on node lost, which does not report"},
		{"removed", "True", nil, []*corev1.Pod{pod("gone", "True")}, "no pod on a node that is Ready: pod coredns-gone is on node gone, which does not report"},
		{"no pod", "True", nil, nil, "no pod on a node that is Ready"},
		{"scaled down by the user", "True", &none, nil, ""},
		{"not available", "False", nil, []*corev1.Pod{pod("here", "False")}, "pod coredns-here runs but is not ready"},
	} {
		client := fake.NewClientset(node("here", "True"), node("lost", "Unknown"))
		for _, pod := range c.pods {
			if err := client.Tracker().Add(pod); err != nil {
				t.Fatal(err)
			}
		}
		err := Serving(t.Context(), client, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "coredns", Namespace: "x"},
			Spec:   appsv1.DeploymentSpec{Replicas: c.replicas, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "dns"}}},
			Status: appsv1.DeploymentStatus{Conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentAvailable, Status: c.available}}}})
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// kubectl's message about a rollout is cut to the part that matters, and a Job has a rollout too.
func TestRollout(t *testing.T) {
	for text, want := range map[string]string{
		"Waiting for deployment \"api\" rollout to finish: 0 of 1 updated replicas are available...\n": "0 of 1 updated replicas are available",
		"Waiting for deployment spec update to be observed...\n":                                       "deployment spec update to be observed",
		"Waiting for 1 pods to be ready...\n":                                                          "1 pods to be ready",
	} {
		if got := rolloutText(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
	job := func(kind string) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "batch/v1", "kind": "Job", "metadata": map[string]any{"name": "x"},
			"status": map[string]any{"conditions": []any{map[string]any{"type": kind, "status": "True", "message": "the message"}}}}}
	}
	for kind, want := range map[string]struct {
		done bool
		err  string
	}{"Complete": {true, ""}, "Failed": {false, "the job failed: the message"}, "Suspended": {false, ""}} {
		_, done, err := Rollout(job(kind))
		if done != want.done || (err == nil) != (want.err == "") || err != nil && err.Error() != want.err {
			t.Errorf("%s: %v, %v", kind, done, err)
		}
	}
}
