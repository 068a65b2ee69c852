package addon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/klog/v2"
)

// available asks the cluster whether everything that the add-on runs is available.
func (a *Addon) available(ctx context.Context) error {
	for _, obj := range a.objects {
		var err error
		switch obj.GetKind() {
		case "Deployment":
			err = a.deploymentAvailable(ctx, obj.GetNamespace(), obj.GetName())
		case "APIService":
			err = a.apiServiceAvailable(ctx, obj)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *Addon) deploymentAvailable(ctx context.Context, namespace, name string) error {
	d, err := a.clientset.AppsV1().Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read deployment %s/%s: %w", namespace, name, err)
	}
	if c := condition(d, appsv1.DeploymentAvailable); d.Status.ObservedGeneration >= d.Generation && c != nil && c.Status == corev1.ConditionTrue {
		return nil
	}
	pods, err := a.clientset.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return fmt.Errorf("list pods of deployment %s/%s: %w", namespace, name, err)
	}
	nodes := func() []corev1.Node {
		list, err := a.clientset.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil // the scheduler's message says enough
		}
		return list.Items
	}
	return errors.New(explain(d, pods.Items, nodes))
}

// explain says in one line why a deployment is not available: what its newest pod waits for. nodes is asked for when the
// pod finds no node.
func explain(d *appsv1.Deployment, pods []corev1.Pod, nodes func() []corev1.Node) string {
	pods = slices.DeleteFunc(slices.Clone(pods), func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if len(pods) == 0 {
		if c := condition(d, appsv1.DeploymentReplicaFailure); c != nil && c.Status == corev1.ConditionTrue {
			return oneLine("no pod can be made: " + c.Message)
		}
		return "no pod yet"
	}
	pod := slices.MaxFunc(pods, func(a, b corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			// What follows the first sentence is about preemption, which helps no add-on.
			message, _, _ := strings.Cut(c.Message, ". ")
			return oneLine(fmt.Sprintf("pod %s cannot be scheduled: %s%s", pod.Name, strings.TrimSuffix(message, "."), taints(pod, nodes())))
		}
	}
	for _, s := range pod.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return oneLine(fmt.Sprintf("pod %s: %s: %s", pod.Name, w.Reason, w.Message))
		}
		if t := s.State.Terminated; t != nil {
			return oneLine(fmt.Sprintf("pod %s: %s, exit code %d: %s", pod.Name, t.Reason, t.ExitCode, t.Message))
		}
	}
	if pod.Status.Phase == corev1.PodRunning {
		return fmt.Sprintf("pod %s runs but is not ready", pod.Name)
	}
	return fmt.Sprintf("pod %s is starting", pod.Name)
}

// taints names the taints that keep a pod away, because the scheduler's message only counts them.
func taints(pod corev1.Pod, nodes []corev1.Node) string {
	var out []string
	for _, node := range nodes {
		for _, taint := range node.Spec.Taints {
			tolerated := slices.ContainsFunc(pod.Spec.Tolerations, func(t corev1.Toleration) bool {
				return t.ToleratesTaint(klog.Background(), &taint, false)
			})
			if !tolerated && taint.Effect != corev1.TaintEffectPreferNoSchedule {
				out = append(out, node.Name+" "+taint.ToString())
			}
		}
	}
	if out == nil {
		return ""
	}
	return " (" + strings.Join(out, ", ") + ")"
}

func condition(d *appsv1.Deployment, t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range d.Status.Conditions {
		if d.Status.Conditions[i].Type == t {
			return &d.Status.Conditions[i]
		}
	}
	return nil
}

func (a *Addon) apiServiceAvailable(ctx context.Context, obj *unstructured.Unstructured) error {
	got, err := a.resource(idOf(obj)).Get(ctx, obj.GetName(), metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read API service %s: %w", obj.GetName(), err)
	}
	message := "not checked yet"
	conditions, _, _ := unstructured.NestedSlice(got.Object, "status", "conditions")
	for _, c := range conditions {
		c, ok := c.(map[string]any)
		if !ok || c["type"] != "Available" {
			continue
		}
		if c["status"] == "True" {
			return nil
		}
		message, _ = c["message"].(string)
	}
	return errors.New(oneLine(fmt.Sprintf("API %s is not available: %s", obj.GetName(), message)))
}

func oneLine(text string) string {
	return strings.TrimSuffix(strings.Join(strings.Fields(text), " "), ":")
}
