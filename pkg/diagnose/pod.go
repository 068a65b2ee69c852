package diagnose

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/condition"
)

// sidecar is the container that Istio's injection adds.
const sidecar = "istio-proxy"

// pod adds what is wrong with one pod.
func (w *look) pod(ctx context.Context, pod *corev1.Pod) error {
	if unschedulable(pod) != "" {
		if !slices.ContainsFunc(w.findings, func(f Finding) bool { return f.Reason == Unschedulable }) {
			w.pending(ctx, pod)
		}
		return nil
	}
	before := len(w.findings)
	for _, s := range pod.Status.InitContainerStatuses {
		if s.State.Terminated == nil || s.State.Terminated.ExitCode != 0 {
			w.status(ctx, pod, s)
		}
	}
	for _, s := range pod.Status.ContainerStatuses {
		w.status(ctx, pod, s)
	}
	if len(w.findings) > before || w.brief {
		return nil
	}
	err := w.injection(ctx, pod)
	if PodReady(pod) || pod.Status.Phase == corev1.PodSucceeded {
		return err
	}
	return errors.Join(err, w.events(ctx, pod))
}

func unschedulable(pod *corev1.Pod) string {
	if c := meta.FindStatusCondition(condition.Of(pod.Status.Conditions), string(corev1.PodScheduled)); c != nil && c.Status == metav1.ConditionFalse {
		return c.Message
	}
	return ""
}

// pending distinguishes the reasons that the scheduler gives (pkg/scheduler/framework/plugins upstream).
func (w *look) pending(ctx context.Context, pod *corev1.Pod) {
	message := unschedulable(pod)
	f := Finding{Reason: Unschedulable, Pod: pod.Name}
	// Behind the first sentence stands why evicting others would not help either.
	f.Message, _, _ = strings.Cut(message, ". ")
	f.Message = strings.TrimSuffix(f.Message, ".")
	switch {
	case strings.Contains(message, "Insufficient"):
		_, resource, _ := strings.Cut(message, "Insufficient ")
		resource = strings.TrimRight(strings.Fields(resource + " ")[0], ".,")
		f.Advice = "no node has that much left: lower the requests, or add a node"
		f.Places = w.container(largestRequest(pod, corev1.ResourceName(resource)), "resources", "requests", resource)
	case strings.Contains(message, "taint"):
		f.Message += w.taints(ctx, pod)
		f.Advice = "the pod does not tolerate a taint (`kubectl describe nodes` shows them): add a toleration, or take the taint off with `kubectl taint`"
		f.Places = template("spec", "tolerations")
	case strings.Contains(message, "node affinity") || strings.Contains(message, "node selector"):
		f.Advice = "no node has the labels that the pod asks for: correct nodeSelector or affinity, or label a node"
		f.Places = template("spec", "nodeSelector")
		if pod.Spec.NodeSelector == nil {
			f.Places = template("spec", "affinity")
		}
	case strings.Contains(message, "persistentvolumeclaim"), strings.Contains(message, "PersistentVolumeClaim"), strings.Contains(message, "volume"):
		f.Advice = "its volume is not there: look at `kubectl get pvc`, and at the claim's name and storage class"
		f.Places = template("spec", "volumes")
	case strings.Contains(message, "ports"):
		f.Advice = "the host port is taken on every node: leave hostPort out and use a Service"
		f.Places = template("spec", "containers", "0", "ports")
	default:
		f.Advice = "look at `kubectl describe pod " + pod.Name + " -n " + pod.Namespace + "`"
		f.Places = template("spec")
	}
	w.add(f)
}

// maxTaints is how many taints a message names.
const maxTaints = 5

// taints names those that keep a pod away, because the scheduler's message only counts them. A user who may not read nodes
// gets the message alone.
func (w *look) taints(ctx context.Context, pod *corev1.Pod) string {
	nodes, err := w.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return ""
	}
	var out []string
	for _, node := range nodes.Items {
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
	if n := len(out) - maxTaints; n > 0 {
		out = append(out[:maxTaints], fmt.Sprintf("and %d more", n))
	}
	return " (" + strings.Join(out, ", ") + ")"
}

// largestRequest is the container that requests most of a resource.
func largestRequest(pod *corev1.Pod, resource corev1.ResourceName) string {
	most := slices.MaxFunc(pod.Spec.Containers, func(a, b corev1.Container) int {
		x, y := a.Resources.Requests[resource], b.Resources.Requests[resource]
		return x.Cmp(y)
	})
	return most.Name
}

// status adds what is wrong with a container that waits or has ended.
func (w *look) status(ctx context.Context, pod *corev1.Pod, s corev1.ContainerStatus) {
	if waiting := s.State.Waiting; waiting != nil {
		f := Finding{Pod: pod.Name, Container: s.Name, Message: waiting.Reason + ": " + waiting.Message}
		switch waiting.Reason {
		case "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError":
			f.Reason, f.Places = ImagePull, w.container(s.Name, "image")
			f.Message = imageMessage(pod, s.Name, waiting)
			f.Advice, f.Final = pullAdvice(pod, s, waiting)
			w.add(f)
			return
		case "CreateContainerConfigError":
			f.Reason, f.Places = Configuration, w.reference(pod, s.Name, waiting.Message)
			f.Message = waiting.Message
			f.Advice = "make the Secret or ConfigMap that the message names, or correct its name or key in env or envFrom"
			w.add(f)
			return
		case "CreateContainerError", "RunContainerError", "StartError":
			w.notStarted(pod, s, waiting.Message)
			return
		}
	}
	// In CrashLoopBackOff the state waits, and the last state is what happened.
	ended := s.State.Terminated
	if ended == nil && s.RestartCount > 0 && !s.Ready {
		ended = s.LastTerminationState.Terminated
	}
	if ended == nil || ended.ExitCode == 0 && pod.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		return
	}
	f := Finding{Pod: pod.Name, Container: s.Name, Final: s.RestartCount >= crashes || pod.Status.Phase == corev1.PodFailed}
	switch {
	case ended.Reason == "StartError" || ended.Reason == "ContainerCannotRun":
		w.notStarted(pod, s, ended.Message)
		return
	case ended.Reason == "OOMKilled":
		f.Reason, f.Places = OutOfMemory, w.container(s.Name, "resources", "limits", "memory")
		f.Message = fmt.Sprintf("killed for memory%s", restarts(s))
		if limit := memoryLimit(pod, s.Name); limit != "" {
			f.Message = fmt.Sprintf("killed at its memory limit of %s%s", limit, restarts(s))
		}
		f.Advice = outOfMemory
	default:
		f.Reason, f.Places = Crash, w.container(s.Name)
		f.Message = fmt.Sprintf("ended with exit code %d%s", ended.ExitCode, restarts(s))
		if text := w.lastOutput(ctx, pod, s); text != "" {
			f.Message += ", its last output: " + text
		}
		f.Advice = "all of its log: `kubectl logs " + logsOf(pod, s) + "`"
		// The kubelet kills with SIGTERM, then SIGKILL, what fails its liveness probe.
		if ended.ExitCode == 137 || ended.ExitCode == 143 {
			f.Advice += "; exit codes 137 and 143 also come from a liveness probe that fails"
		}
	}
	w.add(f)
}

const outOfMemory = "raise the memory limit, or make the program take less"

// notStarted adds that a container's program could not be started.
func (w *look) notStarted(pod *corev1.Pod, s corev1.ContainerStatus, message string) {
	f := Finding{Reason: Crash, Pod: pod.Name, Container: s.Name, Message: "cannot be started: " + lastPart(message), Final: true}
	switch {
	case strings.Contains(message, "OOM-killed"), strings.Contains(message, "memory limit too low"):
		f.Reason, f.Advice, f.Places = OutOfMemory, outOfMemory, w.container(s.Name, "resources", "limits", "memory")
		if limit := memoryLimit(pod, s.Name); limit != "" {
			f.Message = fmt.Sprintf("cannot even start at its memory limit of %s", limit)
		}
	case strings.Contains(message, "no such file or directory"), strings.Contains(message, "executable file not found"):
		f.Advice, f.Places = "the image has no such program: correct command and args, or the image", w.container(s.Name, "command")
	case strings.Contains(message, "permission denied"):
		f.Advice, f.Places = "the file may not be run: make it executable in the image (chmod +x), or correct command", w.container(s.Name, "command")
	case strings.Contains(message, "exec format error"):
		f.Advice, f.Places = "the program is for another kind of machine: build the image for this one's architecture", w.container(s.Name, "image")
	default:
		f.Advice, f.Places = "change what the message names; `kubectl describe pod "+pod.Name+" -n "+pod.Namespace+"` shows all of it", w.container(s.Name)
	}
	w.add(f)
}

// lastPart is what a chain of errors ends with, which is what happened; what comes before is who called whom.
func lastPart(message string) string {
	message = strings.TrimSpace(message)
	if _, cause, ok := strings.Cut(message, "exec: "); ok {
		return strings.TrimSuffix(cause, ": unknown")
	}
	if _, cause, ok := strings.Cut(message, "failed to create shim task: "); ok {
		return strings.TrimSuffix(cause, ": unknown")
	}
	return message
}

func restarts(s corev1.ContainerStatus) string {
	switch s.RestartCount {
	case 0:
		return ""
	case 1:
		return " (1 restart)"
	}
	return fmt.Sprintf(" (%d restarts)", s.RestartCount)
}

func logsOf(pod *corev1.Pod, s corev1.ContainerStatus) string {
	of := fmt.Sprintf("%s -n %s -c %s", pod.Name, pod.Namespace, s.Name)
	if s.RestartCount > 0 {
		of += " --previous"
	}
	return of
}

const (
	lastLines = 2
	lastBytes = 1000
	// logTime is how long a kubelet may take to read them: its node may be away.
	logTime = 10 * time.Second
)

// lastOutput is the last lines of a container that has ended. Without them the finding is still right, so errors, such as
// that of a user who may not read logs, do not count.
func (w *look) lastOutput(ctx context.Context, pod *corev1.Pod, s corev1.ContainerStatus) string {
	if s.State.Terminated != nil && s.State.Terminated.Message != "" {
		return s.State.Terminated.Message
	}
	if w.brief {
		return ""
	}
	lines, limit := int64(lastLines), int64(lastBytes)
	ctx, cancel := context.WithTimeout(ctx, logTime)
	defer cancel()
	text, err := w.client.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{
		Container: s.Name, Previous: s.State.Terminated == nil, TailLines: &lines, LimitBytes: &limit}).DoRaw(ctx)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// reference is where a container names the Secret or ConfigMap that a kubelet's message is about.
func (w *look) reference(pod *corev1.Pod, container, message string) []Place {
	i := slices.IndexFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == container })
	if i < 0 {
		return w.container(container, "env")
	}
	about := func(name, key string) bool {
		return strings.Contains(message, `"`+name+`"`) || key != "" && strings.Contains(message, " "+key+" ") && strings.HasSuffix(message, "/"+name)
	}
	for n, env := range pod.Spec.Containers[i].Env {
		from := env.ValueFrom
		switch {
		case from == nil:
		case from.ConfigMapKeyRef != nil && about(from.ConfigMapKeyRef.Name, from.ConfigMapKeyRef.Key):
			return w.container(container, "env", strconv.Itoa(n), "valueFrom", "configMapKeyRef")
		case from.SecretKeyRef != nil && about(from.SecretKeyRef.Name, from.SecretKeyRef.Key):
			return w.container(container, "env", strconv.Itoa(n), "valueFrom", "secretKeyRef")
		}
	}
	for n, from := range pod.Spec.Containers[i].EnvFrom {
		if from.ConfigMapRef != nil && about(from.ConfigMapRef.Name, "") || from.SecretRef != nil && about(from.SecretRef.Name, "") {
			return w.container(container, "envFrom", strconv.Itoa(n))
		}
	}
	return w.container(container, "env")
}

// imageHead is what stands before the reason why an image is not there.
var imageHead = regexp.MustCompile(`image (name )?"[^"]+": |ErrImagePull: `)

// imageMessage is why an image is not there. The back-off repeats the reason behind its own, and containerd the image's
// name in each part.
func imageMessage(pod *corev1.Pod, container string, waiting *corev1.ContainerStateWaiting) string {
	image := ""
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == container {
			image = c.Image
		}
	}
	message := waiting.Message
	if heads := imageHead.FindAllStringIndex(message, -1); heads != nil {
		message = message[heads[len(heads)-1][1]:]
	}
	if strings.Contains(message, image) {
		return message
	}
	return fmt.Sprintf("%s: %s", image, message)
}

// pullAdvice distinguishes why an image cannot be pulled. A registry that does not answer may answer later.
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
				return "the registry does not answer, and imagePullPolicy Always (the default for latest) asks it each time: give the image a version and leave the policy out", false
			}
		}
		return "the registry does not answer: correct its name, import the image with `polymesh ctr images import FILE`, or build it with `polymesh deploy` (services in polymesh.yaml)", false
	}
	return "look at the image's name and tag, and at imagePullSecrets", false
}

// failures is how often a probe has to fail until it is reported: while a program starts, its first ones do.
const failures = 3

// events adds what only events report: failing probes and volumes that cannot be mounted.
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
			// The events of a container that has become ready since are still there.
			if e.Count < failures || isReady(pod, container) {
				continue
			}
			kind, _, _ := strings.Cut(e.Message, " ") // "Readiness probe failed: …"
			probe := strings.ToLower(kind) + "Probe"
			f := Finding{Reason: ProbeFailing, Pod: pod.Name, Container: container, Message: e.Message,
				Places: w.container(container, probe),
				Advice: fmt.Sprintf("correct the probe's path and port, give the start more time (startupProbe), or see why the app answers so: `kubectl logs %s -n %s -c %s`", pod.Name, pod.Namespace, container)}
			if container == sidecar {
				f.Advice = "the sidecar has no configuration from istiod yet: see `istioctl proxy-status` and the log of istiod"
			}
			w.add(f)
		case "FailedMount", "FailedAttachVolume":
			places := template("spec", "volumes")
			if found := quoted.FindStringSubmatch(e.Message); found != nil {
				if place := w.item("volumes", found[1]); place != nil {
					places = place
				}
			}
			w.add(Finding{Reason: Configuration, Pod: pod.Name, Message: e.Message, Places: places,
				Advice: "make what the volume names (Secret, ConfigMap, claim), or correct its name"})
		case "FailedCreatePodSandBox":
			w.add(Finding{Reason: Refused, Pod: pod.Name, Message: e.Message, Places: template("spec"), Advice: "the node cannot set the pod up: see `polymesh status`"})
		}
	}
	return nil
}

// quoted is the volume in `MountVolume.SetUp failed for volume "x" : …`.
var quoted = regexp.MustCompile(`for volume "([^"]+)"`)

func isReady(pod *corev1.Pod, container string) bool {
	return slices.ContainsFunc(slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses), func(s corev1.ContainerStatus) bool {
		return s.Name == container && s.Ready
	})
}

// injection adds a missing sidecar: with STRICT in force the pod reaches no other pod, and none reaches it.
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
	// The pod's own label wins over the namespace's (pkg/kube/inject in Istio).
	switch {
	case pod.Labels["sidecar.istio.io/inject"] == "false" || pod.Annotations["sidecar.istio.io/inject"] == "false":
		return nil
	case pod.Labels["sidecar.istio.io/inject"] == "true":
		asked = true
	}
	if !asked {
		return nil
	}
	restart := fmt.Sprintf("`kubectl rollout restart %s -n %s`", strings.ToLower(w.workload.GetKind())+"/"+w.workload.GetName(), pod.Namespace)
	f := Finding{Reason: InjectionMissing, Pod: pod.Name, Message: "the pod has no sidecar, although its namespace asks for one",
		Advice: "it is older than the namespace's label, or istiod did not answer when it was made: " + restart}
	if rev := ns.Labels["istio.io/rev"]; rev != "" && ns.Labels["istio-injection"] == "" {
		known, err := w.revision(ctx, rev)
		if err != nil {
			return err
		}
		if !known {
			f.Message = fmt.Sprintf("the pod has no sidecar: namespace %s asks for revision %q, and no control plane has it", pod.Namespace, rev)
			f.Advice = "correct the label istio.io/rev (`istioctl tag list` shows what there is), then " + restart
			f.Places = []Place{{Object: "namespace/" + pod.Namespace, Path: []string{"metadata", "labels", "istio.io/rev"}}}
		}
	}
	w.add(f)
	return nil
}

// revision reports whether a control plane, or a tag, of that name injects.
func (w *look) revision(ctx context.Context, name string) (bool, error) {
	for _, label := range []string{"istio.io/rev", "istio.io/tag"} {
		hooks, err := w.client.AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{LabelSelector: label + "=" + name})
		if err != nil {
			return false, fmt.Errorf("look for revision %s: %w", name, err)
		}
		if len(hooks.Items) > 0 {
			return true, nil
		}
	}
	return false, nil
}

func hasSidecar(pod *corev1.Pod) bool {
	return slices.ContainsFunc(slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers), func(c corev1.Container) bool { return c.Name == sidecar })
}

func inUse(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodRunning || pod.Status.Phase == corev1.PodPending
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
