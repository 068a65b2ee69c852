package addon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/config"
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
	if a.opts.Name == config.CoreDNS {
		return a.answers(ctx)
	}
	return nil
}

// answers asks the cluster's name server by its service address for a name that every cluster has. A Deployment stays
// available for most of a minute when its node is gone, and for ever when only the way to it is.
func (a *Addon) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	server := net.JoinHostPort(a.opts.ClusterDNS.String(), "53")
	// No packet is sent yet. A machine without a default route has no way to a service address; its pods do.
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", server)
	if errors.Is(err, syscall.ENETUNREACH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the cluster's name server cannot be asked: %w", err)
	}
	conn.Close()
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, server)
	}}
	name := "kubernetes.default.svc." + a.opts.ClusterDomain + "."
	if _, err := resolver.LookupNetIP(ctx, "ip4", name); err != nil {
		return fmt.Errorf("the cluster's name server does not answer at its service address: %w", err)
	}
	return nil
}

// answerTimeout is for a question that never leaves the machine.
const answerTimeout = 2 * time.Second

func (a *Addon) deploymentAvailable(ctx context.Context, namespace, name string) error {
	d, err := a.clientset.AppsV1().Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read deployment %s/%s: %w", namespace, name, err)
	}
	c := condition(d, appsv1.DeploymentAvailable)
	available := d.Status.ObservedGeneration >= d.Generation && c != nil && c.Status == corev1.ConditionTrue
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
	if available {
		return onReadyNode(d, pods.Items, nodes())
	}
	return errors.New(explain(d, pods.Items, nodes))
}

// onReadyNode is an error when all pods that count as ready are on nodes that do not report: their state is what was
// written last.
func onReadyNode(d *appsv1.Deployment, pods []corev1.Pod, nodes []corev1.Node) error {
	if d.Spec.Replicas != nil && *d.Spec.Replicas == 0 {
		return nil
	}
	lost := ""
	for _, pod := range pods {
		ready := slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		if !ready || pod.DeletionTimestamp != nil {
			continue
		}
		reports := slices.ContainsFunc(nodes, func(n corev1.Node) bool {
			return n.Name == pod.Spec.NodeName && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			})
		})
		if reports {
			return nil
		}
		lost = fmt.Sprintf(": pod %s is on node %s, which does not report", pod.Name, pod.Spec.NodeName)
	}
	return errors.New("no pod on a node that is Ready" + lost)
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
