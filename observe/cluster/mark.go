package cluster

import (
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
)

// kindNode is the kind of a node, as the subject of a mark.
const kindNode = "Node"

// Reasons of marks.
const (
	Deployed           = "Deployed"
	ContainerRestarted = "ContainerRestarted"
	OOMKilled          = "OOMKilled"
	Evicted            = "Evicted"
	NodeReady          = "NodeReady"
	NodeNotReady       = "NodeNotReady"
	RolloutStarted     = "RolloutStarted"
	RolloutStep        = "RolloutStep"
	RolloutEnded       = "RolloutEnded"
	ClusterGone        = "ClusterGone"
	ClusterBack        = "ClusterBack"
)

const (
	normal  = corev1.EventTypeNormal
	warning = corev1.EventTypeWarning
)

const (
	// maxLine is the longest line of a mark or event.
	maxLine = 4096
	// maxQueue bounds the entries that wait to be written.
	maxQueue = 10_000
	// firstLook is how far back an empty store looks.
	firstLook = time.Hour
	// memory is how far back entries are read at the start, so that nothing is written twice. It is longer than the API server keeps events.
	memory = 75 * time.Minute
)

// marks are entries that wait until their workload is known. The Cluster's mutex guards them.
type marks struct {
	queue []pending
	// since is when the store's last entry was written: earlier changes are in the store, or too old. written are the ids of entries.
	since   time.Time
	written map[uint64]bool
}

func newMarks() marks { return marks{since: time.Now().Add(-firstLook), written: map[uint64]bool{}} }

// pending is an entry that is not written yet.
type pending struct {
	at, noticed  time.Time
	subject      ref
	reason, kind string // kind is "Normal" or "Warning"
	source       string
	line         string
	id           uint64
	count        int32
	more         []logstore.Field
}

// maxWritten bounds the ids. Without its id, a repeated change is written twice.
const maxWritten = 20_000

func (m *marks) remember(id uint64) {
	if len(m.written) >= maxWritten {
		clear(m.written)
	}
	m.written[id] = true
}

// identify returns the id of a change, which is the same in each process.
func identify(parts ...string) uint64 {
	h := fnv.New64a()
	for _, p := range parts {
		_, _ = io.WriteString(h, strconv.Itoa(len(p)))
		_, _ = io.WriteString(h, " ")
		_, _ = io.WriteString(h, p)
	}
	return h.Sum64()
}

// mark queues a mark, unless it was written before. happened is zero if the time is unknown.
func (c *Cluster) mark(subject ref, reason, kind, line string, happened time.Time, id uint64, more ...logstore.Field) {
	now := time.Now()
	if happened.IsZero() || happened.After(now) {
		happened = now
	}
	// The minute is for changes that were noticed but not written yet.
	if c.marks.written[id] || happened.Before(c.marks.since.Add(-time.Minute)) {
		return
	}
	c.marks.remember(id)
	c.enqueue(pending{at: happened, noticed: now, subject: subject, reason: reason, kind: kind, source: document.Polymesh, line: line, id: id, count: 1, more: more})
}

func (c *Cluster) enqueue(p pending) {
	if len(c.marks.queue) >= maxQueue {
		c.dropped++
		return
	}
	c.marks.queue = append(c.marks.queue, p)
}

// dueMarks returns the entries whose workload is known, or stays unknown.
func (c *Cluster) dueMarks(now time.Time) []logstore.Entry {
	var entries []logstore.Entry
	c.marks.queue = slices.DeleteFunc(c.marks.queue, func(p pending) bool {
		workload, known := c.workloadFor(p.subject, now)
		if !known && now.Sub(p.noticed) < ownerWait {
			return false
		}
		entries = append(entries, p.entry(workload))
		return true
	})
	return entries
}

func (p pending) entry(workload string) logstore.Entry {
	labels := []logstore.Field{{Name: "job", Value: document.Events}, {Name: "namespace", Value: p.subject.namespace}, {Name: "workload", Value: workload}}
	if p.subject.kind == kindNode && p.source == document.Polymesh {
		labels = append(labels, logstore.Field{Name: "node", Value: p.subject.name})
	}
	return logstore.Entry{Time: p.at, Labels: labels, Line: excerpt.Of(p.line, maxLine), Metadata: append([]logstore.Field{
		{Name: "kind", Value: p.subject.kind}, {Name: "name", Value: p.subject.name}, {Name: "uid", Value: string(p.subject.uid)}, {Name: "reason", Value: p.reason},
		{Name: "type", Value: p.kind}, {Name: "count", Value: strconv.Itoa(int(p.count))}, {Name: "source", Value: p.source}, {Name: "id", Value: strconv.FormatUint(p.id, 16)},
	}, p.more...)}
}

// workloadFor returns the name of an object's workload, empty for none. known is false if that may still change.
func (c *Cluster) workloadFor(o ref, now time.Time) (workload string, known bool) {
	switch o.kind {
	case kindPod:
		if p := c.pods.get(o.namespace, o.name); p != nil {
			if o.uid != "" && p.UID != o.uid {
				return "", true
			}
			w, ok := c.workloadOf(p, now)
			return w.Name, ok
		}
		w, ok := c.owners.gone[o.namespace+"/"+o.name]
		return w.Name, ok
	case kindReplicaSet, kindJob:
		owner, _ := c.find(kindPod, o.kind, o.namespace, o.name)
		if owner == nil || owner.GetUID() != o.uid {
			return "", false
		}
		w, ok := c.top(o.kind, owner)
		return w.Name, ok
	case kindStatefulSet, kindDaemonSet:
		owner, _ := c.find(kindPod, o.kind, o.namespace, o.name)
		return nameOf(owner, o)
	case kindDeployment:
		return nameOf(object(c.deployments.get(o.namespace, o.name)), o)
	case kindCronJob:
		return nameOf(object(c.cronJobs.get(o.namespace, o.name)), o)
	}
	return "", true
}

func nameOf(o metav1.Object, of ref) (string, bool) {
	if o == nil || o.GetUID() != of.uid {
		return "", false
	}
	return of.name, true
}

func field(name, value string) logstore.Field { return logstore.Field{Name: name, Value: value} }

// markPod marks restarts, kills for memory, and evictions.
func (c *Cluster) markPod(old, now *corev1.Pod) {
	subject := ref{kindPod, now.Namespace, now.Name, now.UID}
	if now.Status.Phase == corev1.PodFailed && now.Status.Reason == "Evicted" && (old == nil || old.Status.Reason != "Evicted") {
		line := "pod " + now.Name + " was evicted"
		if now.Spec.NodeName != "" {
			line += " from node " + now.Spec.NodeName
		}
		c.mark(subject, Evicted, warning, line+": "+now.Status.Message, evictedAt(old, now), identify(Evicted, string(now.UID)))
	}
	containers := func(before, after []corev1.ContainerStatus) {
		for _, s := range after {
			var last corev1.ContainerStatus
			if i := slices.IndexFunc(before, func(b corev1.ContainerStatus) bool { return b.Name == s.Name }); i >= 0 {
				last = before[i]
			}
			c.markContainer(subject, last, s)
		}
	}
	var before corev1.PodStatus
	if old != nil {
		before = old.Status
	}
	containers(before.InitContainerStatuses, now.Status.InitContainerStatuses)
	containers(before.ContainerStatuses, now.Status.ContainerStatuses)
}

// evictedAt returns when a pod was evicted: zero, which means now, if the eviction was observed, and otherwise the time in its conditions or containers.
func evictedAt(old, now *corev1.Pod) time.Time {
	if old != nil {
		return time.Time{}
	}
	for _, c := range now.Status.Conditions {
		if c.Type == corev1.DisruptionTarget {
			return c.LastTransitionTime.Time
		}
	}
	at := now.CreationTimestamp.Time
	for _, s := range now.Status.ContainerStatuses {
		if t := s.State.Terminated; t != nil && t.FinishedAt.After(at) {
			at = t.FinishedAt.Time
		}
	}
	return at
}

// markContainer marks what happened to a container since its last status.
func (c *Cluster) markContainer(pod ref, before, after corev1.ContainerStatus) {
	name, uid := after.Name, string(pod.uid)
	killed := func(t *corev1.ContainerStateTerminated) {
		c.mark(pod, OOMKilled, warning, fmt.Sprintf("container %s of pod %s was killed at its memory limit", name, pod.name), t.FinishedAt.Time,
			identify(OOMKilled, uid, name, t.FinishedAt.UTC().Format(time.RFC3339)), field("container", name), field("exit_code", strconv.Itoa(int(t.ExitCode))))
	}
	// It has not been restarted, or not yet. After a restart, the same end is in LastTerminationState and gets the same id.
	if t := after.State.Terminated; t != nil && t.Reason == OOMKilled {
		killed(t)
	}
	t := after.LastTerminationState.Terminated
	if after.RestartCount <= before.RestartCount || t == nil {
		return
	}
	if t.Reason == OOMKilled {
		killed(t)
		return
	}
	kind, how := warning, fmt.Sprintf("ended with exit code %d", t.ExitCode)
	if t.ExitCode == 0 {
		kind, how = normal, "ended"
	}
	if t.Reason != "" && t.Reason != "Error" && t.Reason != "Completed" {
		how += " (" + t.Reason + ")"
	}
	c.mark(pod, ContainerRestarted, kind, fmt.Sprintf("container %s of pod %s %s and was started again, for the %s time", name, pod.name, how, ordinal(after.RestartCount)), t.FinishedAt.Time,
		identify(ContainerRestarted, uid, name, strconv.Itoa(int(after.RestartCount))), field("container", name), field("exit_code", strconv.Itoa(int(t.ExitCode))),
		field("restarts", strconv.Itoa(int(after.RestartCount))))
}

func ordinal(n int32) string {
	suffix := "th"
	if n%100 < 11 || n%100 > 13 {
		switch n % 10 {
		case 1:
			suffix = "st"
		case 2:
			suffix = "nd"
		case 3:
			suffix = "rd"
		}
	}
	return strconv.Itoa(int(n)) + suffix
}

// markNode marks that a node has become ready or not ready.
func (c *Cluster) markNode(old, now *corev1.Node) {
	if now == nil {
		return
	}
	after := readyOf(now)
	before := readyOf(old)
	if after == nil || before == nil || before.Status == after.Status {
		return
	}
	subject, id := ref{kindNode, "", now.Name, now.UID}, identify(NodeReady, string(now.UID), string(after.Status), after.LastTransitionTime.UTC().Format(time.RFC3339))
	if after.Status == corev1.ConditionTrue {
		c.mark(subject, NodeReady, normal, "node "+now.Name+" is ready", after.LastTransitionTime.Time, id)
		return
	}
	c.mark(subject, NodeNotReady, warning, fmt.Sprintf("node %s is not ready: %s", now.Name, after.Message), after.LastTransitionTime.Time, id)
}

func readyOf(n *corev1.Node) *corev1.NodeCondition {
	if n == nil {
		return nil
	}
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == corev1.NodeReady {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

// deployed is the current template of a workload's pods.
type deployed struct {
	revision string
	images   []image
}

type image struct{ container, image string }

func imagesOf(spec *corev1.PodSpec) []image {
	var list []image
	for _, c := range spec.Containers {
		list = append(list, image{c.Name, c.Image})
	}
	return list
}

func (c *Cluster) deployedDeployment(now *appsv1.Deployment) {
	if now != nil {
		var changed time.Time
		for _, condition := range now.Status.Conditions {
			if condition.Type == appsv1.DeploymentProgressing {
				changed = condition.LastUpdateTime.Time
			}
		}
		c.deployed(key{kindDeployment, now.Namespace, now.Name}, now, now.Annotations[revisionAnnotation], &now.Spec.Template.Spec, changed)
	}
}

func (c *Cluster) deployedStatefulSet(now *appsv1.StatefulSet) {
	if now != nil {
		c.deployed(key{kindStatefulSet, now.Namespace, now.Name}, now, now.Status.UpdateRevision, &now.Spec.Template.Spec, time.Time{})
	}
}

func (c *Cluster) deployedDaemonSet(now *appsv1.DaemonSet) {
	if now != nil {
		c.deployed(key{kindDaemonSet, now.Namespace, now.Name}, now, now.Annotations[templateAnnotation], &now.Spec.Template.Spec, time.Time{})
	}
}

// deployed marks that a workload's pods get another template. Kubernetes' controller sets its revision some time after the change.
// changed is the approximate time of a change that was not observed.
func (c *Cluster) deployed(k key, o metav1.Object, revision string, spec *corev1.PodSpec, changed time.Time) {
	if revision == "" {
		return
	}
	r := c.documents.record(k)
	before := r.deployed
	if before.revision == revision {
		return
	}
	r.deployed = deployed{revision, imagesOf(spec)}
	subject, id := ref{k.kind, k.namespace, k.name, o.GetUID()}, identify(Deployed, string(o.GetUID()), revision)
	text := ""
	switch {
	case before.revision == "":
		// A template that existed before the store is not a change.
		if c.marks.since.After(o.GetCreationTimestamp().Time) {
			return
		}
		changed = o.GetCreationTimestamp().Time
		text = "created with " + listImages(r.deployed.images)
	default:
		text = compareImages(before.images, r.deployed.images)
		if c.settled(time.Now()) {
			changed = time.Time{}
		}
	}
	c.mark(subject, Deployed, normal, fmt.Sprintf("%s %s: %s", strings.ToLower(k.kind), k.name, text), changed, id, field("revision", revision))
}

func listImages(list []image) string {
	var texts []string
	for _, i := range list {
		texts = append(texts, i.image)
	}
	return strings.Join(texts, ", ")
}

// compareImages describes which images have changed.
func compareImages(before, now []image) string {
	var texts []string
	for _, n := range now {
		i := slices.IndexFunc(before, func(b image) bool { return b.container == n.container })
		switch {
		case i < 0:
			texts = append(texts, fmt.Sprintf("container %s with %s is new", n.container, n.image))
		case before[i].image != n.image:
			texts = append(texts, fmt.Sprintf("%s → %s", before[i].image, n.image))
		}
	}
	for _, b := range before {
		if !slices.ContainsFunc(now, func(n image) bool { return n.container == b.container }) {
			texts = append(texts, "container "+b.container+" is gone")
		}
	}
	if len(texts) == 0 {
		return "its pods are replaced, with the same images"
	}
	return strings.Join(texts, ", ")
}
