package diagnose

import (
	"cmp"
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
func (w *examination) pod(ctx context.Context, pod *corev1.Pod) error {
	before := len(w.findings)
	err := w.podFindings(ctx, pod)
	for i := before; i < len(w.findings); i++ {
		w.findings[i].since = notReadySince(pod)
	}
	return err
}

// notReadySince returns since when a pod is not ready.
func notReadySince(pod *corev1.Pod) time.Time {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status != corev1.ConditionTrue && !c.LastTransitionTime.IsZero() {
			return c.LastTransitionTime.Time
		}
	}
	return pod.CreationTimestamp.Time
}

func (w *examination) podFindings(ctx context.Context, pod *corev1.Pod) error {
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
	var err error
	if w.workload.GetKind() != podKind { // no controller makes such a pod anew
		err = w.injection(ctx, pod)
	}
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

// pending adds why a pod cannot be scheduled, by the scheduler's messages (pkg/scheduler/framework/plugins upstream).
func (w *examination) pending(ctx context.Context, pod *corev1.Pod) {
	message := unschedulable(pod)
	f := Finding{Reason: Unschedulable, Pod: pod.Name}
	// After the first sentence comes why preemption would not help either.
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
		f.Advice = "the pod does not tolerate a taint (`kubectl describe nodes` shows them): add a toleration, or remove the taint with `kubectl taint`"
		f.Places = template("spec", "tolerations")
	case strings.Contains(message, "node affinity") || strings.Contains(message, "node selector"):
		f.Advice = "no node has the labels that the pod requires: correct nodeSelector or affinity, or label a node"
		f.Places = template("spec", "nodeSelector")
		if pod.Spec.NodeSelector == nil {
			f.Places = template("spec", "affinity")
		}
	case strings.Contains(message, "persistentvolumeclaim"), strings.Contains(message, "PersistentVolumeClaim"), strings.Contains(message, "volume"):
		f.Advice = "its volume does not exist: check `kubectl get pvc`, and the claim's name and storage class"
		f.Places = template("spec", "volumes")
	case strings.Contains(message, "ports"):
		f.Advice = "the host port is in use on every node: remove hostPort and use a Service"
		f.Places = template("spec", "containers", "0", "ports")
	default:
		f.Advice = "see `kubectl describe pod " + pod.Name + " -n " + pod.Namespace + "`"
		f.Places = template("spec")
	}
	w.add(f)
}

// maxTaints is how many taints a message names.
const maxTaints = 5

// taints returns the taints that keep a pod away, because the scheduler's message only counts them. It is empty for a user who
// may not read nodes.
func (w *examination) taints(ctx context.Context, pod *corev1.Pod) string {
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

// largestRequest returns the container that requests most of a resource.
func largestRequest(pod *corev1.Pod, resource corev1.ResourceName) string {
	most := slices.MaxFunc(pod.Spec.Containers, func(a, b corev1.Container) int {
		x, y := a.Resources.Requests[resource], b.Resources.Requests[resource]
		return x.Cmp(y)
	})
	return most.Name
}

// status adds what is wrong with a container that waits or has terminated.
func (w *examination) status(ctx context.Context, pod *corev1.Pod, s corev1.ContainerStatus) {
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
			f.Advice = "create the Secret or ConfigMap that the message names, or correct its name or key in env or envFrom"
			w.add(f)
			return
		case "CreateContainerError", "RunContainerError", "StartError":
			w.notStarted(pod, s, waiting.Message)
			return
		}
	}
	// In CrashLoopBackOff the state is waiting, and the last state is what happened.
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
	case w.has(Crash, s.Name): // the output of one pod is enough
		return
	default:
		f.Reason, f.Places = Crash, w.container(s.Name)
		f.Message = fmt.Sprintf("ended with exit code %d%s", ended.ExitCode, restarts(s))
		if text := w.lastOutput(ctx, pod, s); text != "" {
			f.Message += ", its last output: " + text
		}
		f.Advice = "its whole log: `kubectl logs " + logsOf(pod, s) + "`"
		// The kubelet kills with SIGTERM, then SIGKILL, what fails its liveness probe.
		if ended.ExitCode == 137 || ended.ExitCode == 143 {
			f.Advice += "; exit codes 137 and 143 also come from a liveness probe that fails"
		}
	}
	w.add(f)
}

const outOfMemory = "raise the memory limit, or make the program use less"

// notStarted adds that a container's program could not be started.
func (w *examination) notStarted(pod *corev1.Pod, s corev1.ContainerStatus, message string) {
	f := Finding{Reason: Crash, Pod: pod.Name, Container: s.Name, Message: "cannot be started: " + lastPart(message), Final: true}
	switch {
	case strings.Contains(message, "OOM-killed"), strings.Contains(message, "memory limit too low"):
		f.Reason, f.Advice, f.Places = OutOfMemory, outOfMemory, w.container(s.Name, "resources", "limits", "memory")
		if limit := memoryLimit(pod, s.Name); limit != "" {
			f.Message = fmt.Sprintf("cannot even start at its memory limit of %s", limit)
		}
	case strings.Contains(message, "no such file or directory"), strings.Contains(message, "executable file not found"):
		f.Advice, f.Places = "the image does not have this program: correct command and args, or the image", w.container(s.Name, "command")
	case strings.Contains(message, "permission denied"):
		f.Advice, f.Places = "the file is not executable: make it executable in the image (chmod +x), or correct command", w.container(s.Name, "command")
	case strings.Contains(message, "exec format error"):
		f.Advice, f.Places = "the program is for another architecture: build the image for that of the node", w.container(s.Name, "image")
	default:
		f.Advice, f.Places = "change what the message names; `kubectl describe pod "+pod.Name+" -n "+pod.Namespace+"` shows all of it", w.container(s.Name)
	}
	w.add(f)
}

// lastPart returns the end of a chain of errors, which is the cause; before it are the callers.
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
	// logTime is the timeout for reading them from the kubelet: its node may be gone.
	logTime = 10 * time.Second
)

// lastOutput returns the last lines of a container that has terminated. The finding is right without them, so it ignores errors,
// such as that of a user who may not read logs.
func (w *examination) lastOutput(ctx context.Context, pod *corev1.Pod, s corev1.ContainerStatus) string {
	if w.brief {
		if s.State.Terminated != nil {
			return s.State.Terminated.Message
		}
		return ""
	}
	text := ""
	if s.State.Terminated != nil {
		text = s.State.Terminated.Message
	}
	if text == "" {
		lines, limit := int64(lastLines), int64(lastBytes)
		ctx, cancel := context.WithTimeout(ctx, cmp.Or(w.outputTime, logTime))
		defer cancel()
		read, err := w.client.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{
			Container: s.Name, Previous: s.State.Terminated == nil, TailLines: &lines, LimitBytes: &limit}).DoRaw(ctx)
		if err != nil {
			// What it wrote before may not be what it wrote now.
			return ""
		}
		text = strings.TrimSpace(string(read))
	}
	if before := w.output[s.Name]; sameLines(before, text) {
		text = before
	}
	if w.written == nil {
		w.written = map[string]string{}
	}
	w.written[s.Name] = text
	return text
}

// sameLines reports whether two texts have the same lines. A program's two streams are separate pipes, so the container runtime may log what it
// wrote to both in either order, each time it crashes.
func sameLines(a, b string) bool {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

// reference returns the field in which a container names the Secret or ConfigMap that a kubelet's message is about.
func (w *examination) reference(pod *corev1.Pod, container, message string) []Place {
	about := func(name, key string) bool {
		return strings.Contains(message, `"`+name+`"`) || key != "" && strings.Contains(message, " "+key+" ") && strings.HasSuffix(message, "/"+name)
	}
	spec := specOf(pod, container)
	for n, env := range spec.Env {
		from := env.ValueFrom
		switch {
		case from == nil:
		case from.ConfigMapKeyRef != nil && about(from.ConfigMapKeyRef.Name, from.ConfigMapKeyRef.Key):
			return w.container(container, "env", strconv.Itoa(n), "valueFrom", "configMapKeyRef")
		case from.SecretKeyRef != nil && about(from.SecretKeyRef.Name, from.SecretKeyRef.Key):
			return w.container(container, "env", strconv.Itoa(n), "valueFrom", "secretKeyRef")
		}
	}
	for n, from := range spec.EnvFrom {
		if from.ConfigMapRef != nil && about(from.ConfigMapRef.Name, "") || from.SecretRef != nil && about(from.SecretRef.Name, "") {
			return w.container(container, "envFrom", strconv.Itoa(n))
		}
	}
	return w.container(container, "env")
}

// imageHead matches what comes before the reason why an image could not be pulled.
var imageHead = regexp.MustCompile(`image (name )?"[^"]+": |ErrImagePull: `)

// imageMessage returns why an image could not be pulled. The back-off message repeats the reason after its own text, and
// containerd repeats the image's name in each part.
func imageMessage(pod *corev1.Pod, container string, waiting *corev1.ContainerStateWaiting) string {
	image, message := specOf(pod, container).Image, waiting.Message
	if heads := imageHead.FindAllStringIndex(message, -1); heads != nil {
		message = message[heads[len(heads)-1][1]:]
	}
	if strings.Contains(message, image) {
		return message
	}
	return fmt.Sprintf("%s: %s", image, message)
}

// pullAdvice returns what to do about an image that cannot be pulled. It is not final if the registry does not respond: it may
// later.
func pullAdvice(pod *corev1.Pod, s corev1.ContainerStatus, waiting *corev1.ContainerStateWaiting) (advice string, final bool) {
	message := strings.ToLower(waiting.Message)
	switch {
	case waiting.Reason == "InvalidImageName":
		return "the image's name is not valid: correct it", true
	case waiting.Reason == "ErrImageNeverPull":
		return fmt.Sprintf("imagePullPolicy is Never and node %s does not have the image: import it there with `polymesh ctr images import FILE`", pod.Spec.NodeName), true
	case strings.Contains(message, "unauthorized"), strings.Contains(message, "authorization failed"), strings.Contains(message, "denied"), strings.Contains(message, "no basic auth"), strings.Contains(message, "403"), strings.Contains(message, "401"):
		return "the registry requires a login: create a Secret (kubectl create secret docker-registry) and name it in imagePullSecrets, or correct the image's name", true
	case strings.Contains(message, "not found"), strings.Contains(message, "manifest unknown"):
		return "the registry has no such image or tag: correct it, or push it", true
	case strings.Contains(message, "no such host"), strings.Contains(message, "dial tcp"), strings.Contains(message, "i/o timeout"), strings.Contains(message, "connection refused"):
		if specOf(pod, s.Name).ImagePullPolicy == corev1.PullAlways {
			return "the registry does not respond, and imagePullPolicy Always (the default for latest) contacts it each time: give the image a version and omit the policy", false
		}
		return "the registry does not respond: correct its name, import the image with `polymesh ctr images import FILE`, or build it with `polymesh deploy` (services in polymesh.yaml)", false
	}
	return "check the image's name and tag, and imagePullSecrets", false
}

// failures is how often a probe must fail until it is reported: while a program starts, the first probes fail.
const failures = 3

// events adds what only events report: failing probes and volumes that cannot be mounted.
func (w *examination) events(ctx context.Context, pod *corev1.Pod) error {
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
			// The events of a container that has become ready since still exist.
			if e.Count < failures || isReady(pod, container) {
				continue
			}
			kind, _, _ := strings.Cut(e.Message, " ") // "Readiness probe failed: …"
			probe := strings.ToLower(kind) + "Probe"
			f := Finding{Reason: ProbeFailing, Pod: pod.Name, Container: container, Message: e.Message,
				Places: w.container(container, probe),
				Advice: fmt.Sprintf("correct the probe's path and port, give the start more time (startupProbe), or see the app's log: `kubectl logs %s -n %s -c %s`", pod.Name, pod.Namespace, container)}
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
				Advice: "create what the volume names (Secret, ConfigMap, claim), or correct its name"})
		case "FailedCreatePodSandBox":
			w.add(Finding{Reason: Refused, Pod: pod.Name, Message: e.Message, Places: template("spec"), Advice: fmt.Sprintf("node %s cannot set up the pod: see `polymesh status` there", pod.Spec.NodeName)})
		}
	}
	return nil
}

// quoted matches the volume in `MountVolume.SetUp failed for volume "x" : …`.
var quoted = regexp.MustCompile(`for volume "([^"]+)"`)

func isReady(pod *corev1.Pod, container string) bool {
	return slices.ContainsFunc(slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses), func(s corev1.ContainerStatus) bool {
		return s.Name == container && s.Ready
	})
}

// injection adds a missing sidecar: with STRICT mTLS the pod cannot reach other pods, nor be reached.
func (w *examination) injection(ctx context.Context, pod *corev1.Pod) error {
	if !lacksSidecar(pod, true) {
		return nil
	}
	ns, err := w.client.CoreV1().Namespaces().Get(ctx, pod.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", pod.Namespace, err)
	}
	if !lacksSidecar(pod, requestsSidecars(ns)) {
		return nil
	}
	restart := fmt.Sprintf("`kubectl rollout restart %s -n %s`", strings.ToLower(w.workload.GetKind())+"/"+w.workload.GetName(), pod.Namespace)
	f := Finding{Reason: InjectionMissing, Pod: pod.Name, Message: "the pod has no sidecar, although its namespace requests one",
		Advice: "it is older than the namespace's label, or istiod did not respond when it was created: " + restart}
	if rev := ns.Labels["istio.io/rev"]; rev != "" && ns.Labels["istio-injection"] == "" {
		known, err := w.revision(ctx, rev)
		if err != nil {
			return err
		}
		if !known {
			f.Message = fmt.Sprintf("the pod has no sidecar: namespace %s requests revision %q, and no control plane has it", pod.Namespace, rev)
			f.Advice = "correct the label istio.io/rev (`istioctl tag list` lists the existing ones), then " + restart
			f.Places = []Place{{Object: "namespace/" + pod.Namespace, Path: []string{"metadata", "labels", "istio.io/rev"}}}
		}
	}
	w.add(f)
	return nil
}

// requestsSidecars reports whether a namespace's pods are to have sidecars.
func requestsSidecars(ns *corev1.Namespace) bool {
	return ns.Labels["istio-injection"] == "enabled" || ns.Labels["istio.io/rev"] != ""
}

// lacksSidecar reports whether a pod was to get a sidecar and has none. Its own label wins over the namespace's (pkg/kube/inject in Istio).
func lacksSidecar(pod *corev1.Pod, requested bool) bool {
	if hasSidecar(pod) || pod.Spec.HostNetwork || !inUse(pod) || pod.Annotations["sidecar.istio.io/inject"] == "false" {
		return false
	}
	switch pod.Labels["sidecar.istio.io/inject"] {
	case "false":
		return false
	case "true":
		return true
	}
	return requested
}

// revision reports whether a control plane, or a tag, of that name injects.
func (w *examination) revision(ctx context.Context, name string) (bool, error) {
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

// containerOf returns the container's name in an event's field path: "spec.containers{api}".
func containerOf(fieldPath string) string {
	_, name, _ := strings.Cut(fieldPath, "{")
	return strings.TrimSuffix(name, "}")
}

// specOf returns a container of a pod by its name, an empty one if there is none.
func specOf(pod *corev1.Pod, container string) corev1.Container {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == container {
			return c
		}
	}
	return corev1.Container{}
}

// memoryLimit returns the memory limit of a container, empty for none.
func memoryLimit(pod *corev1.Pod, container string) string {
	if limit, ok := specOf(pod, container).Resources.Limits[corev1.ResourceMemory]; ok {
		return limit.String()
	}
	return ""
}
