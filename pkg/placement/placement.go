// Package placement decides whether a part of the cluster has two replicas: from two nodes on that can run it. CoreDNS, metrics-server, istiod
// and the gateways follow it.
//
// It owns the rule, and reads nodes and pods; who calls it writes the number. pkg/controlplane/addon and pkg/mesh/install do.
package placement

import (
	"context"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	scheduling "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/ssa"
)

const (
	// lostAfter is how long a node that no longer reports still counts: pods stay bound to it as long
	// (https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/#taint-based-evictions).
	lostAfter = 5 * time.Minute
	// startsIn is how long a node may take from its registration until it is Ready.
	startsIn = time.Minute
)

// Several reports whether pods like this one can run on at least two nodes.
func Several(nodes []*corev1.Node, pod *corev1.PodSpec, now time.Time) bool {
	n := 0
	for _, node := range nodes {
		if usable(node, pod, now) {
			n++
		}
	}
	return n >= 2
}

// Spread reports whether a Deployment is to have two replicas: Several, or it has them and one runs on a node that is cordoned. Which replica
// goes when there is one too many is not ours to choose; it must not be the one that stays when the node is drained.
func Spread(ctx context.Context, client kubernetes.Interface, d *appsv1.Deployment, nodes []*corev1.Node, now time.Time) (bool, error) {
	pod := &d.Spec.Template.Spec
	if Several(nodes, pod, now) || d.Spec.Replicas == nil || *d.Spec.Replicas < 2 {
		return Several(nodes, pod, now), nil
	}
	pods, err := client.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return false, fmt.Errorf("list the pods of Deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	return leaving(pods.Items, nodes, pod, now), nil
}

// leaving reports whether a pod runs on a node that works and takes no more of its kind.
func leaving(pods []corev1.Pod, nodes []*corev1.Node, spec *corev1.PodSpec, now time.Time) bool {
	return slices.ContainsFunc(pods, func(p corev1.Pod) bool {
		if p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning {
			return false
		}
		return slices.ContainsFunc(nodes, func(n *corev1.Node) bool {
			return n.Name == p.Spec.NodeName && condition.IsNodeReady(n) && !usable(n, spec, now)
		})
	})
}

// usable reports whether a pod can be placed on a node: the node is Ready, its labels match, and it has no taint that the pod does not
// tolerate, not even that of a node which has just become Ready; or it was so, and is lost only for a while, so that its restart changes
// nothing.
func usable(node *corev1.Node, pod *corev1.PodSpec, now time.Time) bool {
	ready := condition.NodeReady(node)
	if node.Spec.Unschedulable || node.DeletionTimestamp != nil || ready == nil {
		return false
	}
	if matches, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: *pod}).Match(node); err != nil || !matches {
		return false
	}
	taints := func(lost bool) bool {
		_, untolerated := scheduling.FindMatchingUntoleratedTaint(klog.Background(), node.Spec.Taints, pod.Tolerations, func(t *corev1.Taint) bool {
			isLost := t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady
			return t.Effect != corev1.TaintEffectPreferNoSchedule && !(lost && isLost)
		}, false)
		return untolerated
	}
	if ready.Status == corev1.ConditionTrue {
		return !taints(false)
	}
	// A node that has just registered has not been Ready yet.
	before := ready.LastTransitionTime.Sub(node.CreationTimestamp.Time) > startsIn
	return before && now.Sub(ready.LastTransitionTime.Time) < lostAfter && !taints(true)
}

// Others reports whether a manager other than ours has set a field of a live object, with `kubectl scale` for example: it stays theirs. A
// default belongs to no one.
func Others(live *unstructured.Unstructured, ours string, field ...any) (bool, error) {
	if live == nil {
		return false, nil
	}
	path, err := fieldpath.MakePath(field...)
	if err != nil {
		return false, err
	}
	for _, m := range live.GetManagedFields() {
		if m.Manager == ours && m.Subresource == "" {
			continue
		}
		if owns, err := ssa.Owns(m, path); err != nil || owns {
			return owns, err
		}
	}
	return false, nil
}

// Trimmed keeps the cache of nodes small: only what is used stays.
func Trimmed(obj any) (any, error) {
	if n, ok := obj.(*corev1.Node); ok {
		n.ManagedFields, n.Annotations, n.Status.Images = nil, nil, nil
	}
	return obj, nil
}
