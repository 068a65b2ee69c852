// Package diagnose finds why a workload is not ready, by the rows of the guide's troubleshooting table (docs/guide.md): what
// happened, to what, what to do, and which field of the manifest to change.
//
// It only reads from the cluster. pkg/workflow/cluster calls it while it waits, and pkg/workflow/deploy adds file and line; the
// server's add-ons and mesh get their one-line reasons from it (Summary, Serving), and the page of the store what is wrong with the whole
// cluster (Surveyor).
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

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/condition"
)

// Reason is a row of the table.
type Reason string

// The rows.
const (
	Unschedulable    Reason = "Pending"          // no node has the resources, or none matches
	ImagePull        Reason = "ImagePull"        // the image cannot be pulled
	Configuration    Reason = "Configuration"    // a Secret, ConfigMap or volume that the pod names is missing
	Crash            Reason = "Crash"            // the container terminates repeatedly
	OutOfMemory      Reason = "OutOfMemory"      // it was killed at its memory limit
	ProbeFailing     Reason = "ProbeFailing"     // it runs, but its probe fails
	InjectionMissing Reason = "InjectionMissing" // the namespace or the pod requests a sidecar, and the pod has none
	Refused          Reason = "Refused"          // no pod can be created: quota, admission, an invalid template
	MTLSMismatch     Reason = "MTLSMismatch"     // plain text meets STRICT
	GatewayMismatch  Reason = "GatewayMismatch"  // a route or Gateway that nothing serves
	Istio            Reason = "Istio"            // anything else that Istio's own checks report
	NotReady         Reason = "NotReady"         // none of the above
)

// Place is a field of an object. An empty Object means the workload.
type Place struct {
	Object string // as in Finding
	Path   []string
}

// Finding is one reason why a workload is not ready.
type Finding struct {
	Reason Reason `json:"reason"`
	// Object is the workload, "deployment.apps/api -n shop"; Pod and Container are its parts, if it is about one.
	Object    string `json:"object"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	// Message is what happened, as the cluster reports it; Advice is what to do.
	Message string `json:"message"`
	Advice  string `json:"advice"`
	// At is the file and line to change, if a manifest is known. Places are the fields, the best first: only the caller knows
	// which of them its manifests have.
	At     string  `json:"at,omitempty"`
	Places []Place `json:"-"`
	// Final means that waiting will not help.
	Final bool `json:"final"`
	// since is when the pod stopped to be ready, zero if the finding is about no pod.
	since time.Time
}

// String returns the finding in three lines.
func (f Finding) String() string {
	who := f.Object
	if f.Pod != "" {
		who += ", pod " + f.Pod
	}
	if f.Container != "" {
		who += ", container " + f.Container
	}
	text := fmt.Sprintf("%s: %s\n    %s\n    → %s", f.Reason, who, f.Message, f.Advice)
	if f.At != "" {
		text = f.At + ": " + text // as compilers do, so that editors find the place
	}
	return text
}

// crashes is the number of restarts after which waiting does not help.
const crashes = 3

// Workload examines the newest pods of a Deployment, StatefulSet, DaemonSet, ReplicaSet or Job. It finds nothing if the pods
// are ready or just need more time. With an error it returns the findings about what it could read: a user who may not read
// namespaces, for example, still learns why an image cannot be pulled.
func Workload(ctx context.Context, client kubernetes.Interface, id string, workload *unstructured.Unstructured) ([]Finding, error) {
	w := &examination{client: client, id: id, workload: workload}
	_, err := w.examine(ctx)
	return w.findings, err
}

// examine adds findings, and returns the pods of the newest template, the newest first.
func (w *examination) examine(ctx context.Context) ([]corev1.Pod, error) {
	fields, found, err := unstructured.NestedMap(w.workload.Object, "spec", "selector")
	if err != nil || !found {
		return nil, fmt.Errorf("%s has no selector: it is not a workload", w.id)
	}
	selector := &metav1.LabelSelector{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(fields, selector); err != nil {
		return nil, fmt.Errorf("%s: %w", w.id, err)
	}
	parsed, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.id, err)
	}
	list, err := w.client.CoreV1().Pods(w.workload.GetNamespace()).List(ctx, metav1.ListOptions{LabelSelector: parsed.String()})
	if err != nil {
		return nil, fmt.Errorf("list the pods of %s: %w", w.id, err)
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		if p.DeletionTimestamp != nil {
			w.ending = p.Name
		}
		return p.DeletionTimestamp != nil
	})
	// The pods of an older template may still be ready when none of the newest can be created.
	if c := meta.FindStatusCondition(condition.OfObject(w.workload), string(appsv1.DeploymentReplicaFailure)); c != nil && c.Status == metav1.ConditionTrue {
		w.refused(c.Message)
		return pods, nil
	}
	if len(pods) == 0 {
		if w.brief {
			return nil, nil
		}
		return nil, w.noPods(ctx)
	}
	slices.SortStableFunc(pods, func(a, b corev1.Pod) int { return b.CreationTimestamp.Compare(a.CreationTimestamp.Time) })
	// Pods of an older template will be removed, so their state no longer matters.
	generation := templateHash(pods[0])
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return templateHash(p) != generation })
	examined := pods
	if w.most > 0 {
		examined = slices.Clone(pods)
		slices.SortStableFunc(examined, func(a, b corev1.Pod) int { return order(PodReady(&a)) - order(PodReady(&b)) })
		examined = examined[:min(w.most, len(examined))]
	}
	var unread []error
	for _, pod := range examined {
		if err := w.pod(ctx, &pod); err != nil {
			unread = append(unread, err)
		}
	}
	return pods, errors.Join(unread...)
}

func templateHash(pod corev1.Pod) string {
	return pod.Labels["pod-template-hash"] + pod.Labels["controller-revision-hash"]
}

// examination is one examination of a workload.
type examination struct {
	client   kubernetes.Interface
	id       string
	workload *unstructured.Unstructured
	// brief omits what needs more than pods and nodes: events, logs, namespaces.
	brief bool
	// most is how many pods are examined, those first that are not ready; 0 for all.
	most int
	// outputTime is the limit for reading a container's last output, logTime if it is 0.
	outputTime time.Duration
	// output is what each container last wrote when it was examined before, and written what it wrote now.
	output, written map[string]string
	// ending is a pod that is being deleted.
	ending   string
	findings []Finding
}

// order sorts what holds after what does not.
func order(holds bool) int {
	if holds {
		return 1
	}
	return 0
}

// add adds a finding once: ten pods that fail in the same way are one finding.
func (w *examination) add(f Finding) {
	f.Object = w.id
	f.Message = Line(f.Message)
	if !w.has(f.Reason, f.Container) {
		w.findings = append(w.findings, f)
	}
}

func (w *examination) has(reason Reason, container string) bool {
	return slices.ContainsFunc(w.findings, func(f Finding) bool { return f.Reason == reason && f.Container == container })
}

// field returns a field of the workload.
func field(path ...string) []Place { return []Place{{Path: path}} }

// template returns a field of the pod template in the workload.
func template(path ...string) []Place { return field(append([]string{"spec", "template"}, path...)...) }

// item returns a field of the item with that name in a list of the pod template. The template does not have what injection adds
// to a pod.
func (w *examination) item(list, name string, path ...string) []Place {
	items, _, err := unstructured.NestedSlice(w.workload.Object, "spec", "template", "spec", list)
	if err != nil {
		return nil
	}
	for i, item := range items {
		if item, ok := item.(map[string]any); ok && item["name"] == name {
			return template(append([]string{"spec", list, strconv.Itoa(i)}, path...)...)
		}
	}
	return nil
}

// container returns a field of a container, or the template if the container is not in it.
func (w *examination) container(name string, path ...string) []Place {
	for _, list := range []string{"containers", "initContainers"} {
		if found := w.item(list, name, path...); found != nil {
			return found
		}
	}
	return template("spec")
}

// noPods adds why no pod was created: the controllers report that in events of the workload or its ReplicaSet.
func (w *examination) noPods(ctx context.Context) error {
	events, err := w.client.CoreV1().Events(w.workload.GetNamespace()).List(ctx, metav1.ListOptions{
		FieldSelector: fields.Set{"type": corev1.EventTypeWarning, "reason": "FailedCreate"}.String(),
	})
	if err != nil {
		return fmt.Errorf("list the events of %s: %w", w.id, err)
	}
	for _, e := range events.Items {
		// A ReplicaSet has the name of its Deployment with a hash appended.
		hash, of := strings.CutPrefix(e.InvolvedObject.Name, w.workload.GetName()+"-")
		if e.InvolvedObject.Name == w.workload.GetName() || of && !strings.Contains(hash, "-") {
			w.refused(e.Message)
		}
	}
	return nil
}

// refused adds that the API server rejects the pod.
func (w *examination) refused(message string) {
	f := Finding{Reason: Refused, Message: message, Advice: "the API server rejects the pod: change what the message names", Places: template("spec")}
	switch {
	case strings.Contains(message, "exceeded quota"):
		f.Advice = "the namespace's ResourceQuota is used up: raise it, or lower the replicas or requests"
		f.Places = append(w.quota(message), field("spec", "replicas")...)
	case strings.Contains(message, "failed quota"):
		f.Advice = "a ResourceQuota counts requests or limits, so each container must specify its own"
		f.Places = template("spec", "containers", "0", "resources")
	case strings.Contains(message, "image-policy.polymesh.dev"):
		f.Advice = "sign the image (polymesh deploy --sign-key FILE, polymesh image sign), or name one that is signed"
	case strings.Contains(message, "violates PodSecurity"):
		f.Advice = "the namespace enforces a Pod Security Standard: change what the message names, or the namespace's label pod-security.kubernetes.io/enforce"
		if strings.Contains(message, `"istio-init"`) {
			// It is in no manifest, and the levels baseline and restricted both forbid it (docs/operate/hardening.md).
			f.Advice = "a sidecar's init container needs NET_ADMIN, so a namespace with sidecars must allow it: `kubectl label namespace " + w.workload.GetNamespace() +
				" pod-security.kubernetes.io/enforce=privileged pod-security.kubernetes.io/warn=restricted`"
		}
		f.Final = true
	case strings.Contains(message, "serviceaccount") && strings.Contains(message, "not found"):
		f.Advice, f.Places = "create the ServiceAccount, or correct its name", template("spec", "serviceAccountName")
	case strings.Contains(message, "sidecar-injector") || strings.Contains(message, "istiod"):
		f.Reason, f.Advice = InjectionMissing, "istiod, which injects the sidecar, does not respond: see `polymesh status` and `kubectl get pods -n istio-system`"
	}
	w.add(f)
}

var exceeded = regexp.MustCompile(`exceeded quota: ([^,]+), requested: ([^=]+)=`)

// quota returns the limit that a message such as "exceeded quota: NAME, requested: pods=1, …" is about.
func (w *examination) quota(message string) []Place {
	found := exceeded.FindStringSubmatch(message)
	if found == nil {
		return nil
	}
	return []Place{{Object: fmt.Sprintf("resourcequota/%s -n %s", found[1], w.workload.GetNamespace()), Path: []string{"spec", "hard", found[2]}}}
}
