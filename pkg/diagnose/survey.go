package diagnose

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
)

// Reasons of findings about nodes.
const (
	NodeNotReady Reason = "NodeNotReady"
	NodePressure Reason = "NodePressure" // it is short of memory, disk or process ids, or has no network
)

// Found is a finding about an object of the cluster. The store keeps it (observe/findings), and its page shows it.
type Found struct {
	Reason Reason `json:"reason"`
	// Kind and Name are those of a node, or of what pods belong to in the end: a Deployment, and not its ReplicaSets.
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	// Message is what happened, and Advice what to do.
	Message string    `json:"message"`
	Advice  string    `json:"advice"`
	Since   time.Time `json:"since"`
	// Bad means that it does not work at all.
	Bad bool `json:"bad,omitempty"`
	// Ready is how many of a workload's Replicas are ready.
	Ready    int32 `json:"ready,omitempty"`
	Replicas int32 `json:"replicas,omitempty"`
}

// Survey is what is wrong in a cluster at a time, the worst first.
type Survey struct {
	At       time.Time `json:"at"`
	Findings []Found   `json:"findings"`
	// More is how many workloads, with which something may be wrong, were not examined.
	More int `json:"more,omitempty"`
}

// What a survey costs is bounded, however much is wrong.
const (
	// surveyAge is how old a survey may be that is given again.
	surveyAge  = 15 * time.Second
	surveyTime = 10 * time.Second
	// podsAge is how often all pods are looked at, which is most of the work: in between, only those with which something was wrong.
	podsAge = time.Minute
	// maxExamined workloads are examined, podsExamined pods of each, and findingsKept findings about each are kept.
	maxExamined, podsExamined, findingsKept = 40, 3, 3
	// podPage is how many pods are in memory at a time, maxPods how many are looked at.
	podPage, maxPods = 500, 10_000
	// patience is how long a workload may be not ready for no reason: it needs time to start.
	patience = time.Minute
	// endedAge is how long it is worth a finding that a Job has failed, or a pod that is not made anew.
	endedAge = time.Hour
	// remembered is how long it is known since when there was a finding: what crashes is well in between.
	remembered = 5 * time.Minute
)

// Surveyor looks for what is wrong in the whole cluster when it is asked, and at most every 15 seconds.
type Surveyor struct {
	client kubernetes.Interface
	now    func() time.Time

	mu   sync.Mutex
	last *Survey
	// known are the findings of the last minutes.
	known map[findingKey]findingTimes
	// What was found when all pods were looked at: pods that belong to no workload, and the owners of pods that lack a sidecar.
	podsAt  time.Time
	strays  []subject
	lacking []subject
}

type findingKey struct {
	subject
	reason    Reason
	container string
}

type findingTimes struct{ since, seen time.Time }

// subject is what a finding is about.
type subject struct{ kind, namespace, name string }

// NewSurveyor returns a Surveyor. The client's user may read all objects but Secrets, and logs.
func NewSurveyor(client kubernetes.Interface) *Surveyor {
	return &Surveyor{client: client, now: time.Now, known: map[findingKey]findingTimes{}}
}

// Survey returns what is wrong. The error is why nothing is known.
func (s *Surveyor) Survey(ctx context.Context) (*Survey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.last != nil && now.Sub(s.last.At) < surveyAge {
		return s.last, nil
	}
	ctx, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	r := &round{Surveyor: s, at: now, workloads: map[subject]candidate{}, suspected: map[subject]bool{}, requested: map[string]bool{}, found: []Found{}}
	for _, look := range []func(context.Context) error{r.nodes, r.namespaces, r.deployments, r.statefulSets, r.daemonSets, r.jobs, r.pods} {
		if err := look(ctx); err != nil {
			return nil, fmt.Errorf("look for what is wrong in the cluster: %w", err)
		}
	}
	r.examine(ctx)
	for key, times := range s.known {
		if now.Sub(times.seen) > remembered {
			delete(s.known, key)
		}
	}
	slices.SortStableFunc(r.found, func(a, b Found) int {
		return cmp.Or(order(!a.Bad)-order(!b.Bad), a.Since.Compare(b.Since), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	s.last = &Survey{At: now, Findings: r.found, More: r.more}
	return s.last, nil
}

// since returns since when there is a finding; evidence is what the cluster tells about that.
func (s *Surveyor) since(key findingKey, evidence, now time.Time) time.Time {
	times, ok := s.known[key]
	if !ok {
		times.since = now
		if !evidence.IsZero() && evidence.Before(now) {
			times.since = evidence
		}
	}
	times.seen = now
	s.known[key] = times
	return times.since
}

// round is one survey.
type round struct {
	*Surveyor
	at        time.Time
	workloads map[subject]candidate
	// requested are the namespaces that request sidecars.
	requested map[string]bool
	suspects  []candidate
	suspected map[subject]bool
	found     []Found
	more      int
}

// candidate is a workload, or a pod that belongs to none.
type candidate struct {
	// of is what is shown, which for a Job can be its CronJob.
	of     subject
	object runtime.Object
	kind   schema.GroupVersionKind

	ready, replicas int32
	// unready is set if it is not as it should be; otherwise only sidecars are missing.
	unready bool
	// since is when that began, if its status tells.
	since time.Time
	// failed is why it has failed for good.
	failed string
}

// cached reads what the API server has in memory.
func cached() metav1.ListOptions { return metav1.ListOptions{ResourceVersion: "0"} }

func (r *round) nodes(ctx context.Context) error {
	list, err := r.client.CoreV1().Nodes().List(ctx, cached())
	if err != nil {
		return err
	}
	for _, node := range list.Items {
		for _, c := range node.Status.Conditions {
			f := Found{Kind: "Node", Name: node.Name, Message: Line(cmp.Or(c.Message, c.Reason))}
			switch {
			case c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue:
				f.Reason, f.Bad = NodeNotReady, true
				f.Advice = fmt.Sprintf("run `polymesh status` on it, or start it; if the machine is lost for good, `polymesh node remove %s` on a server", node.Name)
			case c.Status != corev1.ConditionTrue:
				continue
			case c.Type == corev1.NodeMemoryPressure:
				f.Reason, f.Advice = NodePressure, "pods are evicted from it: find what needs so much memory, and set requests and limits, or add a node"
			case c.Type == corev1.NodeDiskPressure:
				f.Reason, f.Advice = NodePressure, "pods are evicted from it: free space on its disk"
			case c.Type == corev1.NodePIDPressure:
				f.Reason, f.Advice = NodePressure, "pods are evicted from it: find what starts so many processes"
			case c.Type == corev1.NodeNetworkUnavailable:
				f.Reason, f.Advice = NodePressure, "its pods have no network: `polymesh status` on it says why"
			default:
				continue
			}
			f.Since = r.since(findingKey{subject{"Node", "", node.Name}, f.Reason, string(c.Type)}, c.LastTransitionTime.Time, r.at)
			r.found = append(r.found, f)
		}
	}
	return nil
}

func (r *round) namespaces(ctx context.Context) error {
	list, err := r.client.CoreV1().Namespaces().List(ctx, cached())
	if err != nil {
		return err
	}
	for _, ns := range list.Items {
		r.requested[ns.Name] = requestsSidecars(&ns)
	}
	return nil
}

// workload notes a workload, by the name of the object that owns its pods.
func (r *round) workload(owner subject, c candidate) {
	r.workloads[owner] = c
	if c.unready {
		r.suspect(owner, c)
	}
}

// suspect has a workload examined.
func (r *round) suspect(owner subject, c candidate) {
	if !r.suspected[owner] {
		r.suspected[owner] = true
		r.suspects = append(r.suspects, c)
	}
}

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

func (r *round) deployments(ctx context.Context) error {
	list, err := r.client.AppsV1().Deployments("").List(ctx, cached())
	if err != nil {
		return err
	}
	for i := range list.Items {
		d := &list.Items[i]
		of := subject{"Deployment", d.Namespace, d.Name}
		c := candidate{of: of, object: d, kind: appsv1.SchemeGroupVersion.WithKind(of.kind), ready: d.Status.ReadyReplicas, replicas: replicas(d.Spec.Replicas)}
		c.unready = !d.Spec.Paused && (c.ready < c.replicas || d.Status.UpdatedReplicas < c.replicas)
		for _, condition := range d.Status.Conditions {
			if condition.Type == appsv1.DeploymentAvailable && condition.Status == corev1.ConditionFalse {
				c.since = condition.LastTransitionTime.Time
			}
		}
		r.workload(of, c)
	}
	return nil
}

func (r *round) statefulSets(ctx context.Context) error {
	list, err := r.client.AppsV1().StatefulSets("").List(ctx, cached())
	if err != nil {
		return err
	}
	for i := range list.Items {
		s := &list.Items[i]
		of := subject{"StatefulSet", s.Namespace, s.Name}
		c := candidate{of: of, object: s, kind: appsv1.SchemeGroupVersion.WithKind(of.kind), ready: s.Status.ReadyReplicas, replicas: replicas(s.Spec.Replicas)}
		c.unready = c.ready < c.replicas
		r.workload(of, c)
	}
	return nil
}

func (r *round) daemonSets(ctx context.Context) error {
	list, err := r.client.AppsV1().DaemonSets("").List(ctx, cached())
	if err != nil {
		return err
	}
	for i := range list.Items {
		d := &list.Items[i]
		of := subject{"DaemonSet", d.Namespace, d.Name}
		c := candidate{of: of, object: d, kind: appsv1.SchemeGroupVersion.WithKind(of.kind), ready: d.Status.NumberReady, replicas: d.Status.DesiredNumberScheduled}
		c.unready = c.ready < c.replicas
		r.workload(of, c)
	}
	return nil
}

func (r *round) jobs(ctx context.Context) error {
	list, err := r.client.BatchV1().Jobs("").List(ctx, cached())
	if err != nil {
		return err
	}
	for i := range list.Items {
		j := &list.Items[i]
		at := subject{JobKind.Kind, j.Namespace, j.Name}
		c := candidate{of: at, object: j, kind: batchv1.SchemeGroupVersion.WithKind(at.kind), replicas: j.Status.Active}
		if j.Status.Ready != nil {
			c.ready = *j.Status.Ready
		}
		if owner := metav1.GetControllerOfNoCopy(j); owner != nil && owner.Kind == "CronJob" {
			c.of = subject{owner.Kind, j.Namespace, owner.Name}
		}
		c.unready = c.ready < c.replicas
		for _, condition := range j.Status.Conditions {
			if condition.Status != corev1.ConditionTrue {
				continue
			}
			switch condition.Type {
			case batchv1.JobComplete, batchv1.JobSuspended:
				c.unready = false
			case batchv1.JobFailed:
				c.since, c.failed = condition.LastTransitionTime.Time, "the job "+j.Name+" failed: "+cmp.Or(condition.Message, condition.Reason)
				c.unready = r.at.Sub(c.since) < endedAge
			}
		}
		r.workload(at, c)
	}
	return nil
}

// podKind is the kind of a pod that belongs to no workload.
const podKind = "Pod"

// pods looks for pods that are not ready and belong to no workload, and for workloads whose pods lack a sidecar.
func (r *round) pods(ctx context.Context) error {
	if r.at.Sub(r.podsAt) < podsAge {
		return r.again(ctx)
	}
	r.podsAt, r.strays, r.lacking = time.Time{}, nil, nil
	options := metav1.ListOptions{Limit: podPage}
	for seen := 0; seen < maxPods; {
		list, err := r.client.CoreV1().Pods("").List(ctx, options)
		if err != nil {
			return err
		}
		for i := range list.Items {
			r.pod(&list.Items[i])
		}
		if seen += len(list.Items); list.Continue == "" {
			break
		}
		options.Continue = list.Continue
	}
	if len(r.strays)+len(r.lacking) <= maxExamined {
		r.podsAt = r.at
	}
	return nil
}

// again looks at what was wrong with pods before.
func (r *round) again(ctx context.Context) error {
	for _, owner := range r.lacking {
		if c, ok := r.workloads[owner]; ok {
			r.suspect(owner, c)
		}
	}
	strays := r.strays
	r.strays = nil
	for _, at := range strays {
		pod, err := r.client.CoreV1().Pods(at.namespace).Get(ctx, at.name, metav1.GetOptions{ResourceVersion: "0"})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			r.strays = strays
			return err
		}
		r.pod(pod)
	}
	return nil
}

func (r *round) pod(pod *corev1.Pod) {
	if pod.DeletionTimestamp != nil {
		return
	}
	at := subject{podKind, pod.Namespace, pod.Name}
	if owner := metav1.GetControllerOfNoCopy(pod); owner != nil {
		by := subject{owner.Kind, pod.Namespace, owner.Name}
		if owner.Kind == "ReplicaSet" {
			at = by
			// The Deployment's name and the hash of its template are the ReplicaSet's name.
			if name, ok := strings.CutSuffix(owner.Name, "-"+pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey]); ok {
				by = subject{"Deployment", pod.Namespace, name}
			}
		}
		if c, ok := r.workloads[by]; ok {
			if lacksSidecar(pod, r.requested[pod.Namespace]) && !r.suspected[by] {
				r.lacking = append(r.lacking, by)
				r.suspect(by, c)
			}
			return
		}
	}
	if r.suspected[at] || PodReady(pod) || pod.Status.Phase == corev1.PodSucceeded {
		return
	}
	c := candidate{of: at, object: pod.DeepCopy(), kind: corev1.SchemeGroupVersion.WithKind(podKind), replicas: 1, unready: true, since: notReadySince(pod)}
	if pod.Status.Phase == corev1.PodFailed {
		if r.at.Sub(c.since) >= endedAge {
			return
		}
		c.failed = "the pod failed: " + cmp.Or(pod.Status.Message, pod.Status.Reason, "see its log")
	}
	r.strays = append(r.strays, subject{podKind, pod.Namespace, pod.Name})
	r.suspect(at, c)
}

// examine examines the suspects, those first of which nothing works.
func (r *round) examine(ctx context.Context) {
	slices.SortStableFunc(r.suspects, func(a, b candidate) int {
		return cmp.Or(order(!a.unready)-order(!b.unready), order(a.ready > 0)-order(b.ready > 0), cmp.Compare(a.of.namespace, b.of.namespace), cmp.Compare(a.of.name, b.of.name))
	})
	for i, c := range r.suspects {
		if i == maxExamined || ctx.Err() != nil {
			r.more = len(r.suspects) - i
			return
		}
		r.explain(ctx, c)
	}
}

// explain adds what is wrong with one of them. What cannot be read is left out: the rest may say enough.
func (r *round) explain(ctx context.Context, c candidate) {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(c.object)
	if err != nil {
		return
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(c.kind)
	w := &examination{client: r.client, id: strings.ToLower(c.kind.Kind) + "/" + u.GetName() + " -n " + u.GetNamespace(), workload: u, most: podsExamined}
	var pods []corev1.Pod
	if pod, ok := c.object.(*corev1.Pod); ok {
		pods = []corev1.Pod{*pod}
		_ = w.pod(ctx, pod)
	} else {
		pods, _ = w.examine(ctx)
	}
	if !c.unready {
		w.findings = slices.DeleteFunc(w.findings, func(f Finding) bool { return f.Reason != InjectionMissing })
	} else if len(w.findings) == 0 {
		f := Finding{Reason: NotReady, Message: Line(c.failed), Advice: "see `kubectl describe " + w.id + "`, and its pods"}
		if key := (findingKey{c.of, NotReady, ""}); c.failed == "" {
			if r.at.Sub(r.since(key, c.since, r.at)) < patience {
				return
			}
			f.Message = stillWaiting(pods)
		}
		w.findings = []Finding{f}
	}
	for _, f := range w.findings[:min(findingsKept, len(w.findings))] {
		evidence := f.since
		if !c.since.IsZero() && (evidence.IsZero() || c.since.Before(evidence)) {
			evidence = c.since
		}
		r.found = append(r.found, Found{
			Reason: f.Reason, Kind: c.of.kind, Namespace: c.of.namespace, Name: c.of.name, Pod: f.Pod, Container: f.Container, Message: f.Message, Advice: f.Advice,
			Since: r.since(findingKey{c.of, f.Reason, f.Container}, evidence, r.at), Bad: c.unready && c.ready == 0 && f.Reason != InjectionMissing, Ready: c.ready, Replicas: c.replicas,
		})
	}
}

// stillWaiting is what the first pod that is not ready is doing.
func stillWaiting(pods []corev1.Pod) string {
	if i := slices.IndexFunc(pods, func(p corev1.Pod) bool { return !PodReady(&p) }); i >= 0 {
		return waitingFor(&pods[i])
	}
	return "no pod yet"
}
