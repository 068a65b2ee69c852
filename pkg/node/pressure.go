package node

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Warning implements component.Warning: what the kubelet says the node is short of. Such a node is Ready, takes no new pods
// and evicts some.
func (n *Network) Warning() string { return pressure(n.node.Load()) }

func pressure(node *corev1.Node) string {
	if node == nil {
		return ""
	}
	var short []string
	for _, c := range node.Status.Conditions {
		switch c.Type {
		case corev1.NodeDiskPressure, corev1.NodeMemoryPressure, corev1.NodePIDPressure:
			if c.Status == corev1.ConditionTrue {
				short = append(short, fmt.Sprintf("%s: %s", c.Type, c.Message))
			}
		}
	}
	if len(short) == 0 {
		return ""
	}
	return fmt.Sprintf("node %s takes no new pods and evicts some: %s", node.Name, strings.Join(short, "; "))
}
