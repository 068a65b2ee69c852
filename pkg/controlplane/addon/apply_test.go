package addon

import (
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"polymesh.dev/polymesh/pkg/ssa"
)

func object(apiVersion, kind, name string, change ...func(*unstructured.Unstructured)) *unstructured.Unstructured {
	obj := &unstructured.Unstructured{}
	obj.SetAPIVersion(apiVersion)
	obj.SetKind(kind)
	obj.SetNamespace("kube-system")
	obj.SetName(name)
	obj.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: ssa.Addon, Operation: metav1.ManagedFieldsOperationApply}})
	for _, c := range change {
		c(obj)
	}
	return obj
}

func ignore(obj *unstructured.Unstructured) {
	obj.SetAnnotations(map[string]string{ignoreAnnotation: "true"})
}

func foreign(obj *unstructured.Unstructured) {
	obj.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: "kubectl", Operation: metav1.ManagedFieldsOperationUpdate}})
}

func TestPlan(t *testing.T) {
	account := object("v1", "ServiceAccount", "coredns")
	deployment := object("apps/v1", "Deployment", "coredns")
	for _, tt := range []struct {
		name           string
		want, existing []*unstructured.Unstructured
		apply, remove  []string
	}{
		{
			name:  "empty cluster",
			want:  []*unstructured.Unstructured{account, deployment},
			apply: []string{"ServiceAccount kube-system/coredns", "Deployment kube-system/coredns"},
		},
		{
			name:     "everything is applied again",
			want:     []*unstructured.Unstructured{account, deployment},
			existing: []*unstructured.Unstructured{account, deployment},
			apply:    []string{"ServiceAccount kube-system/coredns", "Deployment kube-system/coredns"},
		},
		{
			name:     "object of an earlier version goes",
			want:     []*unstructured.Unstructured{deployment},
			existing: []*unstructured.Unstructured{account, deployment},
			apply:    []string{"Deployment kube-system/coredns"},
			remove:   []string{"ServiceAccount kube-system/coredns"},
		},
		{
			name:     "disabled: the pods are removed before their permissions",
			existing: []*unstructured.Unstructured{account, deployment},
			remove:   []string{"Deployment kube-system/coredns", "ServiceAccount kube-system/coredns"},
		},
		{
			name:     "ignored objects are neither changed nor removed",
			want:     []*unstructured.Unstructured{deployment},
			existing: []*unstructured.Unstructured{object("v1", "ServiceAccount", "coredns", ignore), object("apps/v1", "Deployment", "coredns", ignore)},
		},
		{
			name:     "a user's copy with our label stays",
			existing: []*unstructured.Unstructured{object("apps/v1", "Deployment", "copy", foreign)},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			existing := make(map[id]*unstructured.Unstructured)
			for _, obj := range tt.existing {
				existing[idOf(obj)] = obj
			}
			apply, remove := plan(tt.want, existing, ssa.Addon)
			if got := names(apply); !slices.Equal(got, tt.apply) {
				t.Errorf("apply %q, want %q", got, tt.apply)
			}
			if got := names(remove); !slices.Equal(got, tt.remove) {
				t.Errorf("remove %q, want %q", got, tt.remove)
			}
		})
	}
}

func names(objects []*unstructured.Unstructured) []string {
	var names []string
	for _, obj := range objects {
		names = append(names, idOf(obj).String())
	}
	return names
}
