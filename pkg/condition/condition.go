// Package condition reads the conditions in the status of objects.
//
// Kubernetes has one type of condition for each of its older kinds, and metav1.Condition for all newer ones. This package
// turns the older ones, and those of unstructured objects, into metav1.Condition, so that the functions of
// k8s.io/apimachinery/pkg/api/meta (FindStatusCondition, IsStatusConditionTrue) work for every object. Whatever reads a
// status uses it.
package condition

import (
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Typed is a type of condition of its own kind.
type Typed interface {
	corev1.PodCondition | corev1.NodeCondition | appsv1.DeploymentCondition | batchv1.JobCondition |
		apiextensionsv1.CustomResourceDefinitionCondition
}

// Of returns the conditions of an object of an older kind.
func Of[C Typed](typed []C) []metav1.Condition {
	out := make([]metav1.Condition, 0, len(typed))
	for i := range typed {
		switch c := any(&typed[i]).(type) {
		case *corev1.PodCondition:
			out = append(out, condition(c.Type, c.Status, c.Reason, c.Message))
		case *corev1.NodeCondition:
			out = append(out, condition(c.Type, c.Status, c.Reason, c.Message))
		case *appsv1.DeploymentCondition:
			out = append(out, condition(c.Type, c.Status, c.Reason, c.Message))
		case *batchv1.JobCondition:
			out = append(out, condition(c.Type, c.Status, c.Reason, c.Message))
		case *apiextensionsv1.CustomResourceDefinitionCondition:
			out = append(out, condition(c.Type, c.Status, c.Reason, c.Message))
		}
	}
	return out
}

func condition[T, S ~string](kind T, status S, reason, message string) metav1.Condition {
	return metav1.Condition{Type: string(kind), Status: metav1.ConditionStatus(status), Reason: reason, Message: message}
}

// NodeReady returns a node's condition Ready; nil until the node has reported.
func NodeReady(n *corev1.Node) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if c := &n.Status.Conditions[i]; c.Type == corev1.NodeReady {
			return c
		}
	}
	return nil
}

// IsNodeReady reports whether a node is Ready.
func IsNodeReady(n *corev1.Node) bool {
	c := NodeReady(n)
	return c != nil && c.Status == corev1.ConditionTrue
}

// OfObject returns the conditions of an object of any kind. What is not a condition there is left out.
func OfObject(o *unstructured.Unstructured) []metav1.Condition {
	list, _, err := unstructured.NestedSlice(o.Object, "status", "conditions")
	if err != nil {
		return nil
	}
	var out []metav1.Condition
	for _, item := range list {
		fields, _ := item.(map[string]any)
		text := func(name string) string {
			value, _ := fields[name].(string)
			return value
		}
		if text("type") != "" {
			out = append(out, condition(text("type"), text("status"), text("reason"), text("message")))
		}
	}
	return out
}
