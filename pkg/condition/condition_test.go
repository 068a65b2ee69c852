package condition

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestOf(t *testing.T) {
	for kind, got := range map[string][]metav1.Condition{
		"pod":        Of([]corev1.PodCondition{{Type: "Other", Status: "True"}, {Type: "A", Status: "True", Reason: "why", Message: "text"}}),
		"node":       Of([]corev1.NodeCondition{{Type: "A", Status: "True", Reason: "why", Message: "text"}}),
		"deployment": Of([]appsv1.DeploymentCondition{{Type: "A", Status: "True", Reason: "why", Message: "text"}}),
		"job":        Of([]batchv1.JobCondition{{Type: "A", Status: "True", Reason: "why", Message: "text"}}),
		"definition": Of([]apiextensionsv1.CustomResourceDefinitionCondition{{Type: "A", Status: "True", Reason: "why", Message: "text"}}),
		"unstructured": OfObject(&unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": []any{
			"text", map[string]any{"type": int64(1)}, map[string]any{"type": "A", "status": "True", "reason": "why", "message": "text", "extra": true},
		}}}}),
	} {
		if c := meta.FindStatusCondition(got, "A"); c == nil || c.Status != metav1.ConditionTrue || c.Reason != "why" || c.Message != "text" {
			t.Errorf("%s: %+v", kind, got)
		}
	}
	for what, conditions := range map[string]any{"none": nil, "no list": "ready", "no conditions": []any{"ready", nil, int64(7)}} {
		o := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": conditions}}}
		if got := OfObject(o); len(got) != 0 {
			t.Errorf("%s: %+v", what, got)
		}
	}
}
