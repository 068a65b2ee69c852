package diagnose

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
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

// Reasons of findings that only a Survey has.
const (
	NodeNotReady Reason = "NodeNotReady"
	NodePressure Reason = "NodePressure" // it is short of memory, disk or process ids, or has no network
	Deleting     Reason = "Deleting"     // it was deleted long ago, and still exists
	Undetermined Reason = "Undetermined" // it is not ready, and there was no time to find out why
)

// Found is a finding about an object of the cluster. The store keeps it (observe/findings), and its page shows it.
type Found struct {
	Reason Reason `json:"reason"`
	// Kind and Name are those of a node, of a namespace, or of what pods belong to in the end: a Deployment, and not its ReplicaSets.
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
	// Checked is when this was last found, if there was no time to look again.
	Checked time.Time `json:"checked,omitzero"`
}

// Survey is what is wrong in a cluster at a time, the worst first.
type Survey struct {
	At       time.Time `json:"at"`
	Findings []Found   `json:"findings"`
	// More is how many more workloads there are with which something may be wrong.
	More int `json:"more,omitempty"`
}

// What a survey costs is bounded, however much is wrong.
const (
	// surveyAge is how old a survey may be that is given again.
	surveyAge  = 15 * time.Second
	surveyTime = 10 * time.Second
	// Of that time, looking at all pods gets at most podsTime, examining one workload examineTime, and reading a container's output outputTime: a
	// node that does not answer must not use up the time of the rest.
	podsTime, examineTime, outputTime = 5 * time.Second, 3 * time.Second, time.Second
	// podsAge is how often all pods are looked at, which is most of the work: in between, only those with which something was wrong.
	podsAge = time.Minute
	// maxExamined workloads are examined, podsExamined pods of each, and findingsKept findings about each are kept. Of the others, what was
	// found last is told, of maxNamed workloads in all.
	maxExamined, podsExamined, findingsKept, maxNamed = 40, 3, 3, 100
	// podPage is how many pods are in memory at a time, maxPods how many are looked at.
	podPage, maxPods = 500, 10_000
	// patience is how long a workload may be not ready for no reason: it needs time to start.
	patience = time.Minute
	// endedAge is how long it is worth a finding that a Job has failed, or a pod that is not made anew.
	endedAge = time.Hour
	// deletion is how long it may take until what was deleted is gone.
	deletion = 10 * time.Minute
	// remembered is how long it is known since when there was a finding: what crashes is well in between.
	remembered = 5 * time.Minute
)

// Surveyor looks for what is wrong in the whole cluster when it is asked, and at most every 15 seconds.
type Surveyor struct {
	client kubernetes.Interface
	now    func() time.Time

	last   atomic.Pointer[Survey]
	making singleflight.Group

	// The rest is only used by the survey that is being made.

	// known are the findings of the last minutes.
	known map[findingKey]findingTimes
	// examined is what was found about each workload that something is wrong with, when it was last examined.
	examined map[subject]examined
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

type examined struct {
	// at is zero before it was examined with success; tried is when that was last begun.
	at, tried time.Time
	found     []Found
	// output is what each container last wrote.
	output map[string]string
}

// subject is what a finding is about.
type subject struct{ kind, namespace, name string }

// NewSurveyor returns a Surveyor. The client's user may read all objects but Secrets, and logs.
func NewSurveyor(client kubernetes.Interface) *Surveyor {
	return &Surveyor{client: client, now: time.Now, known: map[findingKey]findingTimes{}, examined: map[subject]examined{}}
}

// Survey returns what is wrong. The error is why nothing is known. A survey that has begun goes on when ctx ends: the next one who asks gets it.
func (s *Surveyor) Survey(ctx context.Context) (*Survey, error) {
	if survey := s.fresh(); survey != nil {
		return survey, nil
	}
	made := s.making.DoChan("", func() (any, error) {
		// Another one may have been made between the look above and this.
		if survey := s.fresh(); survey != nil {
			return survey, nil
		}
		survey, err := s.survey(context.WithoutCancel(ctx))
		if err == nil {
			s.last.Store(survey)
		}
		return survey, err
	})
	select {
	case r := <-made:
		survey, _ := r.Val.(*Survey)
		return survey, r.Err
	case <-ctx.Done():
		return nil, fmt.Errorf("look for what is wrong in the cluster: %w", context.Cause(ctx))
	}
}

// Last returns the last survey, nil before the first.
func (s *Surveyor) Last() *Survey { return s.last.Load() }

// fresh returns the last survey if it may be given again, nil otherwise.
func (s *Surveyor) fresh() *Survey {
	if last := s.last.Load(); last != nil && s.now().Sub(last.At) < surveyAge {
		return last
	}
	return nil
}

func (s *Surveyor) survey(ctx context.Context) (*Survey, error) {
	now := s.now()
	ctx, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	r := &round{Surveyor: s, at: now, workloads: map[subject]candidate{}, going: map[subject]bool{}, suspected: map[subject]bool{}, namespaced: map[string]namespace{}, away: map[string]bool{}, found: []Found{}}
	// The namespaces after what is in them: one that is deleted meanwhile explains why its workloads are not ready.
	for _, look := range []func(context.Context) error{r.nodes, r.deployments, r.statefulSets, r.daemonSets, r.jobs, r.namespaces, r.pods} {
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
	return &Survey{At: now, Findings: r.found, More: r.more}, nil
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
	// going are those that are being deleted.
	going map[subject]bool
	// namespaced are the namespaces.
	namespaced map[string]namespace
	suspects   []candidate
	suspected  map[subject]bool
	// stuck are objects that were deleted long ago, and away the nodes that are not ready.
	stuck []Found
	away  map[string]bool
	found []Found
	more  int
}

type namespace struct{ requestsSidecars, deleted bool }

// candidate is a workload, or a pod that belongs to none.
type candidate struct {
	// of is what is shown, which for a Job can be its CronJob. at is the object itself.
	of, at subject
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
		if r.deleted(subject{"Node", "", node.Name}, &node) {
			continue
		}
		for _, c := range node.Status.Conditions {
			f := Found{Kind: "Node", Name: node.Name, Message: Line(cmp.Or(c.Message, c.Reason))}
			switch {
			case c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue:
				f.Reason, f.Bad, r.away[node.Name] = NodeNotReady, true, true
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
		r.namespaced[ns.Name] = namespace{requestsSidecars(&ns), ns.DeletionTimestamp != nil}
		if r.deleted(subject{NamespaceKind, ns.Name, ns.Name}, &ns) && r.at.Sub(ns.DeletionTimestamp.Time) >= deletion {
			f := &r.stuck[len(r.stuck)-1]
			var why []string
			for _, c := range ns.Status.Conditions {
				if c.Status == corev1.ConditionTrue && c.Message != "" {
					why = append(why, c.Message)
				}
			}
			f.Message = Line(cmp.Or(strings.Join(why, " "), f.Message))
			f.Advice = "see what still exists in it, and the program that should remove its finalizers: `kubectl get namespace " + ns.Name + " -o yaml`"
		}
	}
	return nil
}

// NamespaceKind is the kind of a finding about a namespace.
const NamespaceKind = "Namespace"

// deleted reports whether an object has been deleted and only exists until its finalizers are done: then it is not wrong that it does not work.
// If that takes long, this is a finding.
func (r *round) deleted(of subject, o metav1.Object) bool {
	at := o.GetDeletionTimestamp()
	if at == nil {
		return false
	}
	if r.at.Sub(at.Time) >= deletion {
		f := Found{Reason: Deleting, Kind: of.kind, Namespace: of.namespace, Name: of.name, Message: "it was deleted and still exists", Since: at.Time, Bad: true}
		id := strings.ToLower(of.kind) + "/" + of.name
		if of.namespace != "" {
			id += " -n " + of.namespace
		}
		f.Advice = "see `kubectl describe " + id + "`"
		if finalizers := o.GetFinalizers(); len(finalizers) > 0 {
			f.Message += ", held by its finalizers: " + strings.Join(finalizers, ", ")
			f.Advice = "the program that set a finalizer must remove it: check that it runs; `kubectl get " + id + " -o yaml` shows all of it"
		}
		f.Message = Line(f.Message)
		r.stuck = append(r.stuck, f)
	}
	return true
}

// ending reports whether a namespace is being deleted, or is already gone.
func (r *round) ending(name string) bool {
	ns, ok := r.namespaced[name]
	return !ok || ns.deleted
}

// workload notes a workload, by the name of the object that owns its pods, unless it is being deleted.
func (r *round) workload(owner subject, object metav1.Object, c candidate) {
	if r.deleted(c.of, object) {
		r.going[owner] = true
		return
	}
	r.workloads[owner] = c
	if c.unready {
		r.suspect(owner, c)
	}
}

// suspect has a workload examined.
func (r *round) suspect(owner subject, c candidate) {
	if !r.suspected[owner] {
		r.suspected[owner] = true
		c.at = owner
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
		r.workload(of, d, c)
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
		r.workload(of, s, c)
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
		r.workload(of, d, c)
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
		r.workload(at, j, c)
	}
	return nil
}

// podKind is the kind of a pod that belongs to no workload.
const podKind = "Pod"

// pods looks for pods that are not ready and belong to no workload, and for workloads whose pods lack a sidecar. What it has no time for is as it
// was found before.
func (r *round) pods(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, podsTime)
	defer cancel()
	strays, lacking := r.strays, r.lacking
	if r.at.Sub(r.podsAt) < podsAge {
		return r.again(ctx)
	}
	r.strays, r.lacking = nil, nil
	options := metav1.ListOptions{Limit: podPage}
	for seen := 0; seen < maxPods; {
		list, err := r.client.CoreV1().Pods("").List(ctx, options)
		if err != nil {
			r.podsAt, r.strays, r.lacking = time.Time{}, strays, lacking
			return r.unseen(ctx, err)
		}
		for i := range list.Items {
			r.pod(&list.Items[i])
		}
		if seen += len(list.Items); list.Continue == "" {
			break
		}
		options.Continue = list.Continue
	}
	r.podsAt = time.Time{}
	if len(r.strays)+len(r.lacking) <= maxExamined {
		r.podsAt = r.at
	}
	return nil
}

// again looks at what was wrong with pods before.
func (r *round) again(ctx context.Context) error {
	r.unsidecared()
	strays := r.strays
	r.strays = nil
	for i, at := range strays {
		pod, err := r.client.CoreV1().Pods(at.namespace).Get(ctx, at.name, metav1.GetOptions{ResourceVersion: "0"})
		switch {
		case apierrors.IsNotFound(err):
		case err != nil:
			r.strays = append(r.strays, strays[i:]...)
			return r.unseen(ctx, err)
		default:
			r.pod(pod)
		}
	}
	return nil
}

// unsidecared has the workloads examined whose pods lacked a sidecar.
func (r *round) unsidecared() {
	for _, owner := range r.lacking {
		if c, ok := r.workloads[owner]; ok {
			r.suspect(owner, c)
		}
	}
}

// unseen has what was found before about pods told again, if err is that there was no time to look.
func (r *round) unseen(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	r.unsidecared()
	for _, at := range r.strays {
		if _, ok := r.examined[at]; ok {
			r.suspect(at, candidate{of: at, replicas: 1, unready: true})
		}
	}
	return nil
}

func (r *round) pod(pod *corev1.Pod) {
	at, of := subject{podKind, pod.Namespace, pod.Name}, subject{podKind, pod.Namespace, pod.Name}
	var c candidate
	owned := false
	if owner := metav1.GetControllerOfNoCopy(pod); owner != nil {
		by := subject{owner.Kind, pod.Namespace, owner.Name}
		if owner.Kind == "ReplicaSet" {
			at = by
			// The Deployment's name and the hash of its template are the ReplicaSet's name.
			if name, ok := strings.CutSuffix(owner.Name, "-"+pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey]); ok {
				by = subject{"Deployment", pod.Namespace, name}
			}
		}
		if r.going[by] {
			return
		}
		if c, owned = r.workloads[by]; owned {
			at, of = by, c.of
		}
	}
	if pod.DeletionTimestamp != nil {
		// A node that is away explains why its pods do not end.
		if n := len(r.stuck); r.deleted(of, pod) && len(r.stuck) > n && r.away[pod.Spec.NodeName] {
			r.stuck = r.stuck[:n]
		} else if len(r.stuck) > n {
			f := &r.stuck[n]
			f.Pod, f.Bad = pod.Name, false
			f.Advice = "see `kubectl describe pod/" + pod.Name + " -n " + pod.Namespace + "`, and the log of its node"
			r.strays = append(r.strays, subject{podKind, pod.Namespace, pod.Name})
		}
		return
	}
	if owned {
		if lacksSidecar(pod, r.namespaced[pod.Namespace].requestsSidecars) && !r.suspected[at] {
			r.lacking = append(r.lacking, at)
			r.suspect(at, c)
		}
		return
	}
	if r.suspected[at] || PodReady(pod) || pod.Status.Phase == corev1.PodSucceeded {
		return
	}
	c = candidate{of: at, object: pod.DeepCopy(), kind: corev1.SchemeGroupVersion.WithKind(podKind), replicas: 1, unready: true, since: notReadySince(pod)}
	if pod.Status.Phase == corev1.PodFailed {
		if r.at.Sub(c.since) >= endedAge {
			return
		}
		c.failed = "the pod failed: " + cmp.Or(pod.Status.Message, pod.Status.Reason, "see its log")
	}
	r.strays = append(r.strays, subject{podKind, pod.Namespace, pod.Name})
	r.suspect(at, c)
}

// examine examines the suspects: first those that do not work and that had to wait for it longest.
func (r *round) examine(ctx context.Context) {
	// A namespace that is being deleted explains all that is wrong in it.
	r.stuck = slices.DeleteFunc(r.stuck, func(f Found) bool { return f.Kind != NamespaceKind && f.Namespace != "" && r.ending(f.Namespace) })
	r.found = append(r.found, r.stuck[:min(len(r.stuck), maxExamined)]...)
	r.more += max(len(r.stuck)-maxExamined, 0)
	r.suspects = slices.DeleteFunc(r.suspects, func(c candidate) bool { return r.ending(c.at.namespace) })
	slices.SortStableFunc(r.suspects, func(a, b candidate) int {
		return cmp.Or(order(!a.unready)-order(!b.unready), r.examined[a.at].tried.Compare(r.examined[b.at].tried), order(a.ready > 0)-order(b.ready > 0),
			cmp.Compare(a.at.namespace, b.at.namespace), cmp.Compare(a.at.name, b.at.name))
	})
	before := r.examined
	r.examined = make(map[subject]examined, len(r.suspects))
	for i, c := range r.suspects {
		last, seen := before[c.at]
		if i < maxExamined && ctx.Err() == nil && c.object != nil {
			now, pods, err := r.explain(ctx, c, last)
			if err == nil {
				r.examined[c.at] = now
				r.found = append(r.found, now.found...)
				continue
			}
			// The next time, others come first. What is gone has no finding.
			last.tried, seen = r.at, true
			if pods != nil {
				last.found = slices.DeleteFunc(slices.Clone(last.found), func(f Found) bool {
					return f.Pod != "" && !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Name == f.Pod })
				})
			}
			r.undetermined(c, last, pods, err)
		} else if i < maxNamed {
			r.undetermined(c, last, nil, nil)
		} else {
			r.more++
		}
		if seen {
			r.examined[c.at] = last
		}
	}
}

// undetermined adds what was found last about a workload that could not be examined; without that, that it is not ready.
func (r *round) undetermined(c candidate, last examined, pods []corev1.Pod, err error) {
	key := findingKey{c.of, NotReady, ""}
	if len(last.found) > 0 {
		f := last.found[0]
		f.Checked, f.Ready, f.Replicas = last.at, c.ready, c.replicas
		f.Bad = c.unready && c.ready == 0 && f.Reason != InjectionMissing
		r.since(findingKey{c.of, f.Reason, f.Container}, f.Since, r.at)
		r.found = append(r.found, f)
		return
	}
	f := Found{Reason: Undetermined, Kind: c.of.kind, Namespace: c.of.namespace, Name: c.of.name, Bad: c.unready && c.ready == 0, Ready: c.ready, Replicas: c.replicas}
	f.Message = "there was no time to find out why"
	switch {
	case !c.unready && !last.at.IsZero():
		return // all that it was to be examined for was not found
	case !c.unready:
		f.Reason, f.Message = InjectionMissing, "a pod has no sidecar, although one is requested"
	case err != nil && !errors.Is(err, context.DeadlineExceeded):
		f.Message = "why could not be found out: " + err.Error()
	case c.failed != "":
		f.Message = c.failed
	}
	if c.unready && len(pods) > 0 {
		f.Message = stillWaiting(pods, "") + "; " + f.Message
	}
	f.Message = Line(f.Message)
	f.Advice = "see `kubectl describe " + strings.ToLower(c.at.kind) + "/" + c.at.name + " -n " + c.at.namespace + "`, and its pods"
	f.Since = r.since(key, c.since, r.at)
	if c.unready && c.failed == "" && r.at.Sub(f.Since) < patience {
		return
	}
	r.found = append(r.found, f)
}

// explain finds out what is wrong with a workload. The error is why that is not known; the pods are those that could be read.
func (r *round) explain(ctx context.Context, c candidate, last examined) (examined, []corev1.Pod, error) {
	now := examined{at: r.at, tried: r.at}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(c.object)
	if err != nil {
		return now, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, examineTime)
	defer cancel()
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(c.kind)
	w := &examination{
		client: r.client, id: strings.ToLower(c.kind.Kind) + "/" + u.GetName() + " -n " + u.GetNamespace(), workload: u,
		most: podsExamined, outputTime: outputTime, output: last.output,
	}
	var pods []corev1.Pod
	if pod, ok := c.object.(*corev1.Pod); ok {
		pods = []corev1.Pod{*pod}
		err = w.pod(ctx, pod)
	} else {
		pods, err = w.examine(ctx)
	}
	if !c.unready {
		w.findings = slices.DeleteFunc(w.findings, func(f Finding) bool { return f.Reason != InjectionMissing })
	}
	// What could be read may say enough.
	if err != nil && len(w.findings) == 0 {
		return now, pods, err
	}
	now.output = w.written
	if now.output == nil {
		now.output = last.output
	}
	if c.unready && len(w.findings) == 0 {
		f := Finding{Reason: NotReady, Message: Line(c.failed), Advice: "see `kubectl describe " + w.id + "`, and its pods"}
		if key := (findingKey{c.of, NotReady, ""}); c.failed == "" {
			if r.at.Sub(r.since(key, c.since, r.at)) < patience {
				return now, pods, nil
			}
			f.Message = stillWaiting(pods, w.ending)
		}
		w.findings = []Finding{f}
	}
	for _, f := range w.findings[:min(findingsKept, len(w.findings))] {
		evidence := f.since
		if !c.since.IsZero() && (evidence.IsZero() || c.since.Before(evidence)) {
			evidence = c.since
		}
		now.found = append(now.found, Found{
			Reason: f.Reason, Kind: c.of.kind, Namespace: c.of.namespace, Name: c.of.name, Pod: f.Pod, Container: f.Container, Message: f.Message, Advice: f.Advice,
			Since: r.since(findingKey{c.of, f.Reason, f.Container}, evidence, r.at), Bad: c.unready && c.ready == 0 && f.Reason != InjectionMissing, Ready: c.ready, Replicas: c.replicas,
		})
	}
	return now, pods, nil
}

// stillWaiting is what the first pod that is not ready is doing. Without a pod, ending is one that is being deleted.
func stillWaiting(pods []corev1.Pod, ending string) string {
	if i := slices.IndexFunc(pods, func(p corev1.Pod) bool { return !PodReady(&p) }); i >= 0 {
		return waitingFor(&pods[i])
	}
	switch {
	case len(pods) > 0:
		return "its pods are ready, but do not count as ready yet"
	case ending != "":
		return "pod " + ending + " is being deleted, and there is no other yet"
	}
	return "no pod yet"
}
