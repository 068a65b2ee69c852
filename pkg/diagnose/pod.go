package diagnose

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// sidecar is the container that Istio's injection adds.
const sidecar = "istio-proxy"

// pod adds what is wrong with one pod.
func (w *look) pod(ctx context.Context, pod *corev1.Pod) error {
	if unschedulable(pod) != "" {
		w.pending(pod)
		return nil
	}
	before := len(w.findings)
	for _, s := range pod.Status.InitContainerStatuses {
		if s.State.Terminated == nil || s.State.Terminated.ExitCode != 0 {
			w.container(pod, s)
		}
	}
	for _, s := range pod.Status.ContainerStatuses {
		w.container(pod, s)
	}
	if len(w.findings) > before {
		return nil
	}
	if err := w.injection(ctx, pod); err != nil {
		return err
	}
	if ready(pod) || pod.Status.Phase == corev1.PodSucceeded {
		return nil
	}
	return w.events(ctx, pod)
}

func ready(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func unschedulable(pod *corev1.Pod) string {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return c.Message
		}
	}
	return ""
}

// pending tells the reasons apart that the scheduler gives (pkg/scheduler/framework/plugins upstream).
func (w *look) pending(pod *corev1.Pod) {
	message := unschedulable(pod)
	f := Finding{Reason: Unschedulable, Pod: pod.Name, Message: message}
	switch {
	case strings.Contains(message, "Insufficient"):
		f.Advice = "no node has that much left: lower the requests, or add a node"
		f.Field = template("spec", "containers", "0", "resources", "requests")
	case strings.Contains(message, "taint"):
		f.Advice = "every node has a taint that the pod does not tolerate: add a toleration, or take the taint off (kubectl taint)"
		f.Field = template("spec", "tolerations")
	case strings.Contains(message, "node affinity") || strings.Contains(message, "node selector"):
		f.Advice = "no node has the labels that the pod asks for: correct nodeSelector or affinity, or label a node"
		f.Field = template("spec", "nodeSelector")
	case strings.Contains(message, "persistentvolumeclaim"), strings.Contains(message, "PersistentVolumeClaim"), strings.Contains(message, "volume"):
		f.Advice = "its volume is not there: look at `kubectl get pvc`, and at the claim's name and storage class"
		f.Field = template("spec", "volumes")
	case strings.Contains(message, "ports"):
		f.Advice = "the host port is taken on every node: leave hostPort out and use a Service"
		f.Field = template("spec", "containers", "0", "ports")
	default:
		f.Advice = "look at `kubectl describe pod " + pod.Name + " -n " + pod.Namespace + "`"
		f.Field = template("spec")
	}
	w.add(f)
}

// container adds what is wrong with a container that waits or has ended.
func (w *look) container(pod *corev1.Pod, s corev1.ContainerStatus) {
	field := containerField(pod, s.Name)
	if waiting := s.State.Waiting; waiting != nil {
		f := Finding{Pod: pod.Name, Container: s.Name, Message: waiting.Reason + ": " + waiting.Message}
		switch waiting.Reason {
		case "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError":
			f.Reason, f.Field = ImagePull, append(field, "image")
			f.Advice, f.Final = pullAdvice(pod, s, waiting)
			w.add(f)
			return
		case "CreateContainerConfigError":
			f.Reason, f.Field, f.Final = Configuration, append(field, "env"), false
			f.Advice = "make the Secret or ConfigMap that the message names, or correct its name or key in env or envFrom"
			w.add(f)
			return
		case "CreateContainerError", "RunContainerError", "StartError":
			f.Reason, f.Field, f.Final = Crash, append(field, "command"), true
			f.Advice = "the image has no such program: correct command and args, or the image"
			w.add(f)
			return
		}
	}
	// In CrashLoopBackOff the state waits, and the last state says what happened.
	ended := s.State.Terminated
	if ended == nil && s.RestartCount > 0 && !s.Ready {
		ended = s.LastTerminationState.Terminated
	}
	if ended == nil || ended.ExitCode == 0 && pod.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		return
	}
	f := Finding{Pod: pod.Name, Container: s.Name, Final: s.RestartCount >= crashes || pod.Status.Phase == corev1.PodFailed}
	logs := fmt.Sprintf("`kubectl logs %s -n %s -c %s --previous`", pod.Name, pod.Namespace, s.Name)
	switch {
	case ended.Reason == "OOMKilled":
		f.Reason, f.Field = OutOfMemory, append(field, "resources", "limits", "memory")
		f.Message = fmt.Sprintf("killed for memory (%d restarts)", s.RestartCount)
		if limit := memoryLimit(pod, s.Name); limit != "" {
			f.Message = fmt.Sprintf("killed at its memory limit of %s (%d restarts)", limit, s.RestartCount)
		}
		f.Advice = "raise the memory limit, or make the program take less"
	default:
		f.Reason, f.Field = Crash, field
		f.Message = fmt.Sprintf("ended with exit code %d (%d restarts) %s", ended.ExitCode, s.RestartCount, ended.Message)
		f.Advice = "its log says why: " + logs
		// The kubelet kills with SIGTERM, then SIGKILL, what fails its liveness probe.
		if ended.ExitCode == 137 || ended.ExitCode == 143 {
			f.Advice += "; exit codes 137 and 143 also come from a liveness probe that fails"
		}
	}
	w.add(f)
}

// pullAdvice tells apart why an image cannot be had. A registry that does not answer may answer later.
func pullAdvice(pod *corev1.Pod, s corev1.ContainerStatus, waiting *corev1.ContainerStateWaiting) (advice string, final bool) {
	message := strings.ToLower(waiting.Message)
	switch {
	case waiting.Reason == "InvalidImageName":
		return "the image's name is not valid: correct it", true
	case waiting.Reason == "ErrImageNeverPull":
		return "imagePullPolicy is Never and the node does not have it: import it with `polymesh ctr images import FILE`", true
	case strings.Contains(message, "unauthorized"), strings.Contains(message, "authorization failed"), strings.Contains(message, "denied"), strings.Contains(message, "no basic auth"), strings.Contains(message, "403"), strings.Contains(message, "401"):
		return "the registry wants a login: make a Secret (kubectl create secret docker-registry) and name it in imagePullSecrets, or correct the image's name", true
	case strings.Contains(message, "not found"), strings.Contains(message, "manifest unknown"):
		return "the registry has no such image or tag: correct it, or push it", true
	case strings.Contains(message, "no such host"), strings.Contains(message, "dial tcp"), strings.Contains(message, "i/o timeout"), strings.Contains(message, "connection refused"):
		for _, c := range pod.Spec.Containers {
			if c.Name == s.Name && c.ImagePullPolicy == corev1.PullAlways {
				return "the registry does not answer, and imagePullPolicy Always (the default for latest) asks it each time: give the image a version and leave the policy out, or name a mirror in registries.yaml", false
			}
		}
		return "the registry does not answer: import the image with `polymesh ctr images import FILE`, build it with `polymesh deploy` (services in polymesh.yaml), or name a mirror", false
	}
	return "look at the image's name and tag, and at imagePullSecrets", false
}

// failures is how often a probe has to fail until it is worth a word: while a program starts, its first ones do.
const failures = 3

// events adds what only events say: failing probes and volumes that cannot be mounted.
func (w *look) events(ctx context.Context, pod *corev1.Pod) error {
	events, err := w.client.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.Set{"involvedObject.uid": string(pod.UID), "type": corev1.EventTypeWarning}.String(),
	})
	if err != nil {
		return fmt.Errorf("list the events of pod %s: %w", pod.Name, err)
	}
	for _, e := range events.Items {
		container := containerOf(e.InvolvedObject.FieldPath)
		switch e.Reason {
		case "Unhealthy":
			if e.Count < failures {
				continue
			}
			kind, _, _ := strings.Cut(e.Message, " ") // "Readiness probe failed: …"
			probe := strings.ToLower(kind) + "Probe"
			f := Finding{Reason: ProbeFailing, Pod: pod.Name, Container: container, Message: e.Message,
				Field:  append(containerField(pod, container), probe),
				Advice: "correct the probe's path and port, give the start more time (startupProbe), or see why the app answers so: " + fmt.Sprintf("`kubectl logs %s -n %s -c %s`", pod.Name, pod.Namespace, container)}
			if container == sidecar {
				f.Advice = "the sidecar has no configuration from istiod yet: see `istioctl proxy-status` and the log of istiod"
			}
			w.add(f)
		case "FailedMount", "FailedAttachVolume":
			w.add(Finding{Reason: Configuration, Pod: pod.Name, Message: e.Message, Field: template("spec", "volumes"),
				Advice: "make what the volume names (Secret, ConfigMap, claim), or correct its name"})
		case "FailedCreatePodSandBox":
			w.add(Finding{Reason: Refused, Pod: pod.Name, Message: e.Message, Field: template("spec"), Advice: "the node cannot set the pod up: see `polymesh status`"})
		}
	}
	return nil
}

// injection adds a missing sidecar: with STRICT in force the pod reaches nobody, and nobody reaches it.
func (w *look) injection(ctx context.Context, pod *corev1.Pod) error {
	if hasSidecar(pod) || pod.Spec.HostNetwork || !inUse(pod) {
		return nil
	}
	ns, err := w.client.CoreV1().Namespaces().Get(ctx, pod.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", pod.Namespace, err)
	}
	asked := ns.Labels["istio-injection"] == "enabled" || ns.Labels["istio.io/rev"] != ""
	// The pod's own word wins over the namespace's (pkg/kube/inject in Istio).
	switch {
	case pod.Labels["sidecar.istio.io/inject"] == "false" || pod.Annotations["sidecar.istio.io/inject"] == "false":
		return nil
	case pod.Labels["sidecar.istio.io/inject"] == "true":
		asked = true
	}
	if !asked {
		return nil
	}
	f := Finding{Reason: InjectionMissing, Pod: pod.Name, Message: "the pod has no sidecar although its namespace asks for one",
		Advice: fmt.Sprintf("the pod is older than the label, or istiod did not answer when it was made: `kubectl rollout restart %s -n %s`", strings.ToLower(w.workload.GetKind())+"/"+w.workload.GetName(), pod.Namespace)}
	if rev := ns.Labels["istio.io/rev"]; rev != "" && ns.Labels["istio-injection"] == "" {
		f.Advice += fmt.Sprintf("; a control plane of revision %q must exist (`istioctl tag list`)", rev)
	}
	w.add(f)
	return nil
}

func hasSidecar(pod *corev1.Pod) bool {
	return slices.ContainsFunc(slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers), func(c corev1.Container) bool { return c.Name == sidecar })
}

func inUse(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodRunning || pod.Status.Phase == corev1.PodPending
}

// containerField is the path of a container in the workload. Injection puts its own beside the template's, and native
// sidecars among the init containers, so the place in the pod says nothing.
func containerField(pod *corev1.Pod, name string) []string {
	at := func(containers []corev1.Container) int {
		own := slices.DeleteFunc(slices.Clone(containers), func(c corev1.Container) bool {
			return c.Name == sidecar || c.Name == "istio-init" || c.Name == "istio-validation"
		})
		return slices.IndexFunc(own, func(c corev1.Container) bool { return c.Name == name })
	}
	if i := at(pod.Spec.Containers); i >= 0 {
		return template("spec", "containers", strconv.Itoa(i))
	}
	if i := at(pod.Spec.InitContainers); i >= 0 {
		return template("spec", "initContainers", strconv.Itoa(i))
	}
	return template("spec")
}

// containerOf takes the container's name out of an event's field path: "spec.containers{api}".
func containerOf(fieldPath string) string {
	_, name, _ := strings.Cut(fieldPath, "{")
	return strings.TrimSuffix(name, "}")
}

func memoryLimit(pod *corev1.Pod, container string) string {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == container {
			if limit, ok := c.Resources.Limits[corev1.ResourceMemory]; ok {
				return limit.String()
			}
		}
	}
	return ""
}
