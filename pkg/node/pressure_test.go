package node

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestPressure(t *testing.T) {
	if w := pressure(nil); w != "" {
		t.Errorf("without a node the warning is %q", w)
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	node.Status.Conditions = []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Message: "kubelet is posting ready status"},
		{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse, Message: "kubelet has no disk pressure"},
	}
	if w := pressure(node); w != "" {
		t.Errorf("for a node that is well the warning is %q", w)
	}
	node.Status.Conditions[1] = corev1.NodeCondition{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Message: "kubelet has disk pressure"}
	if w, want := pressure(node), "node n1 takes no new pods and evicts some: DiskPressure: kubelet has disk pressure"; w != want {
		t.Errorf("the warning is %q, want %q", w, want)
	}
}
