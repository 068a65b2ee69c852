package diagnose

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubectl/pkg/polymorphichelpers"

	"polymesh.dev/polymesh/pkg/condition"
)

// JobKind is the one workload that Rollout knows and `kubectl rollout status` does not.
var JobKind = schema.GroupKind{Group: "batch", Kind: "Job"}

// IsWorkload reports whether Rollout knows when an object of a kind is ready.
func IsWorkload(gk schema.GroupKind) bool {
	if gk == JobKind {
		return true
	}
	_, err := polymorphichelpers.StatusViewerFor(gk)
	return err == nil
}

// Rollout reports the progress of the newest version of a Deployment, StatefulSet, DaemonSet or Job, by the rule of `kubectl
// rollout status`, and for Jobs by their conditions. An error means that it has failed permanently. An object of another kind
// is done when it exists.
func Rollout(live *unstructured.Unstructured) (status string, done bool, err error) {
	gk := live.GroupVersionKind().GroupKind()
	if gk == JobKind {
		conditions := condition.OfObject(live)
		if meta.IsStatusConditionTrue(conditions, "Complete") {
			return "complete", true, nil
		}
		if c := meta.FindStatusCondition(conditions, "Failed"); c != nil && c.Status == metav1.ConditionTrue {
			return "failed", false, fmt.Errorf("the job failed: %s", c.Message)
		}
		return "running", false, nil
	}
	viewer, err := polymorphichelpers.StatusViewerFor(gk)
	if err != nil {
		return "", true, nil
	}
	status, done, err = viewer.Status(live, 0)
	if done && err == nil {
		ready, _, _ := unstructured.NestedInt64(live.Object, "status", "readyReplicas")
		if gk.Kind == "DaemonSet" {
			ready, _, _ = unstructured.NestedInt64(live.Object, "status", "numberReady")
		}
		return fmt.Sprintf("%d ready", ready), true, nil
	}
	return rolloutText(status), done, err
}

// rolloutText returns kubectl's message about a rollout without its beginning: "0 of 1 updated replicas are available".
func rolloutText(text string) string {
	if _, rest, ok := strings.Cut(text, "rollout to finish: "); ok {
		text = rest
	}
	text = strings.TrimPrefix(text, "Waiting for ")
	return strings.TrimSuffix(strings.TrimSpace(text), "...")
}

// Available reports whether a Deployment has its condition Available for its newest spec. It stays true during a rolling
// update, where Rollout is not done.
func Available(d *appsv1.Deployment) bool {
	return d.Status.ObservedGeneration >= d.Generation &&
		meta.IsStatusConditionTrue(condition.Of(d.Status.Conditions), string(appsv1.DeploymentAvailable))
}

// PodReady reports whether a pod is ready and stays.
func PodReady(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && meta.IsStatusConditionTrue(condition.Of(pod.Status.Conditions), string(corev1.PodReady))
}

// Serving returns nil if a Deployment is available and one of its ready pods runs on a node that is Ready: the status that a lost
// node last wrote stays for most of a minute. Otherwise the error is the reason, in one line.
func Serving(ctx context.Context, client kubernetes.Interface, d *appsv1.Deployment) error {
	if !Available(d) {
		summary, err := Summary(ctx, client, d)
		if err != nil {
			return err
		}
		return errors.New(summary)
	}
	if d.Spec.Replicas != nil && *d.Spec.Replicas == 0 {
		return nil
	}
	pods, err := client.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return fmt.Errorf("list the pods of deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the nodes of deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	reporting := map[string]bool{}
	for _, node := range nodes.Items {
		reporting[node.Name] = condition.IsNodeReady(&node)
	}
	lost := ""
	for _, pod := range pods.Items {
		if !PodReady(&pod) {
			continue
		}
		if reporting[pod.Spec.NodeName] {
			return nil
		}
		lost = fmt.Sprintf(": pod %s is on node %s, which does not report", pod.Name, pod.Spec.NodeName)
	}
	return errors.New("no pod on a node that is Ready" + lost)
}

// Summary returns in one line why a workload is not ready, for a status that is queried often: it reads pods, and nodes if taints
// keep a pod away, but neither events nor logs. Workload returns the whole diagnosis.
func Summary(ctx context.Context, client kubernetes.Interface, workload metav1.Object) (string, error) {
	u, ok := workload.(*unstructured.Unstructured)
	if !ok {
		content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(workload)
		if err != nil {
			return "", fmt.Errorf("read %s/%s: %w", workload.GetNamespace(), workload.GetName(), err)
		}
		u = &unstructured.Unstructured{Object: content}
	}
	w := &examination{client: client, id: u.GetNamespace() + "/" + u.GetName(), workload: u, brief: true}
	pods, err := w.examine(ctx)
	switch {
	case err != nil:
		return "", err
	case len(w.findings) > 0:
		return w.findings[0].line(), nil
	case len(pods) == 0:
		return "no pod yet", nil
	}
	return waitingFor(&pods[0]), nil
}

// line returns a finding in one line. Its parts were escaped when it was added.
func (f Finding) line() string {
	switch {
	case f.Pod == "":
		return "no pod can be created: " + f.Message
	case f.Reason == Unschedulable:
		return fmt.Sprintf("pod %s cannot be scheduled: %s", f.Pod, f.Message)
	case f.Container == "":
		return fmt.Sprintf("pod %s: %s: %s", f.Pod, f.Reason, f.Message)
	}
	return fmt.Sprintf("pod %s, container %s: %s: %s", f.Pod, f.Container, f.Reason, f.Message)
}

// waitingFor returns what a pod without a finding is doing.
func waitingFor(pod *corev1.Pod) string {
	for _, s := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		w := s.State.Waiting
		if w == nil || w.Reason == "" || w.Reason == "ContainerCreating" || w.Reason == "PodInitializing" {
			continue
		}
		return Line(strings.TrimSuffix(fmt.Sprintf("pod %s, container %s: %s: %s", pod.Name, s.Name, w.Reason, w.Message), ": "))
	}
	if pod.Status.Phase != corev1.PodRunning {
		return fmt.Sprintf("pod %s is starting", pod.Name)
	}
	text := fmt.Sprintf("pod %s runs but is not ready", pod.Name)
	if c := meta.FindStatusCondition(condition.Of(pod.Status.Conditions), string(corev1.PodReady)); c != nil && c.Message != "" {
		text += ": " + c.Message
	}
	return Line(text)
}
