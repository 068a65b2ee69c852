package install

import (
	"context"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestHealthNamesTheTaint(t *testing.T) {
	one := int32(1)
	deployment := func(name string, ok bool) *appsv1.Deployment {
		d := &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: istioNamespace},
			Spec:       appsv1.DeploymentSpec{Replicas: &one, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}},
		}
		status := corev1.ConditionFalse
		if ok {
			status, d.Status.AvailableReplicas = corev1.ConditionTrue, 1
		}
		d.Status.Conditions = []appsv1.DeploymentCondition{{Type: appsv1.DeploymentAvailable, Status: status}}
		return d
	}
	const noRoom = "0/1 nodes are available: 1 node(s) had untolerated taint(s)."
	client := fake.NewClientset(deployment("istiod", false), deployment("istio-ingressgateway", true),
		&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "istiod-1", Namespace: istioNamespace, Labels: map[string]string{"app": "istiod"}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{
				{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: noRoom}}},
		})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	record := &Record{Objects: map[string]string{
		ownPlane: "", objectKey(deploymentKind, istioNamespace, "istio-ingressgateway"): "",
		// The user removed this one.
		objectKey(deploymentKind, istioNamespace, "istio-egressgateway"): "",
	}}
	h := newHealth(ctx, client, record)
	want := func(text string) {
		t.Helper()
		for ctx.Err() == nil {
			err := h.check(ctx)
			if err == nil && text == "" || err != nil && text != "" && strings.Contains(err.Error(), text) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("got %v, want %q", h.check(t.Context()), text)
	}
	want("istiod: 0/1 available: pod istiod-1 cannot be scheduled: " + strings.TrimSuffix(noRoom, "."))
	if _, err := client.AppsV1().Deployments(istioNamespace).Update(ctx, deployment("istiod", true), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	want("")
	if newHealth(ctx, client, &Record{}) != nil {
		t.Error("the empty profile has something to watch")
	}
}
