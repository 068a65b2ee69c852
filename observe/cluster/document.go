package cluster

import (
	"cmp"
	"encoding/json"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/logstore"
)

// How often documents are written.
const (
	// documentPause is the time between two documents of one object, and bigDocumentPause if they are big.
	documentPause, bigDocumentPause = 5 * time.Second, 30 * time.Second
	bigDocument                     = 16 << 10
	// snapshotEvery is how often all objects are written, changed or not. So what existed at a time is in the documents of the
	// snapshotEvery before it.
	snapshotEvery = 10 * time.Minute
	// maxDocument is the longest document in bytes. A longer one has only some of the workload's pods.
	maxDocument = 64 << 10
)

// key names a workload with documents.
type key struct{ kind, namespace, name string }

// documents tracks which objects have to be written. The Cluster's mutex guards it.
type documents struct {
	seed    maphash.Seed
	records map[key]*record
	// snapshot is when all objects were last written.
	snapshot time.Time
}

// record is what is known about the documents of an object.
type record struct {
	dirty   bool
	written time.Time
	size    int
	hash    uint64 // of the last document: a change that is not in the document is not written
	// object is the last known state, for the document that records its deletion; nil for a bare pod.
	object metav1.Object
	gone   time.Time
	// ended are deleted pods that no document has recorded as deleted yet.
	ended []*corev1.Pod
	// recalled means that the object is in the store's last documents, but has not been seen since the start.
	recalled bool
	// deployed is the current template, to compare the next one with.
	deployed deployed
}

func newDocuments() documents {
	return documents{seed: maphash.MakeSeed(), records: map[key]*record{}}
}

// record returns the record of an object.
func (d *documents) record(k key) *record {
	r := d.records[k]
	if r == nil {
		r = &record{}
		d.records[k] = r
	}
	return r
}

// touch schedules a document of an object.
func (c *Cluster) touch(k key) { c.documents.record(k).dirty = true }

// touchObject is touch for an object that is new or changed, or deleted if now is nil.
func (c *Cluster) touchObject(k key, old, now metav1.Object) {
	r := c.documents.record(k)
	r.dirty = true
	r.recalled = false
	if now != nil {
		r.object, r.gone = now, time.Time{}
		return
	}
	r.object, r.gone = old, time.Now()
}

// maxEnded bounds the pods that ended since the last document of their workload.
const maxEnded = 256

// dueDocuments returns entries with the documents that are due.
func (c *Cluster) dueDocuments(now time.Time) []logstore.Entry {
	if !c.settled(now) || !c.conn.reachable {
		return nil
	}
	all := now.Sub(c.documents.snapshot) >= snapshotEvery
	if all {
		c.documents.snapshot = now
	}
	var entries []logstore.Entry
	for k, r := range c.documents.records {
		pause := documentPause
		if r.size > bigDocument {
			pause = bigDocumentPause
		}
		if !all && (!r.dirty || now.Sub(r.written) < pause) {
			continue
		}
		r.dirty = false
		entry, line, exists := c.document(k, r)
		hash := maphash.String(c.documents.seed, line)
		// The document of the deletion is written once, even if nothing else has changed.
		if line != "" && (all || hash != r.hash) {
			entry.Time, entry.Line = now, line
			entries = append(entries, entry)
			r.written, r.hash, r.size = now, hash, len(line)
			// The next document does not contain them.
			r.dirty = len(r.ended) > 0
			r.ended = nil
		}
		if !exists {
			delete(c.documents.records, k)
		}
	}
	return entries
}

// document returns an object's document. exists is false if the object and its pods are gone.
func (c *Cluster) document(k key, r *record) (entry logstore.Entry, line string, exists bool) {
	line, exists = c.workloadLine(k, r)
	uid := ""
	if r.object != nil {
		uid = string(r.object.GetUID())
	}
	entry = logstore.Entry{
		Labels:   []logstore.Field{{Name: "job", Value: document.Objects}, {Name: "namespace", Value: k.namespace}, {Name: "workload", Value: k.name}},
		Metadata: []logstore.Field{{Name: "kind", Value: k.kind}, {Name: "name", Value: k.name}, {Name: "uid", Value: uid}},
	}
	return entry, line, exists
}

func encode(doc any) string {
	text, err := json.Marshal(doc)
	if err != nil {
		// Documents only contain texts, numbers and times; only a year above 9999 cannot be encoded.
		return ""
	}
	return string(text)
}

func momentOf(t *metav1.Time) document.Moment {
	if t == nil {
		return document.Moment{}
	}
	return document.At(t.Time)
}

// workloadLine returns the document of a workload, with as many pods as fit.
func (c *Cluster) workloadLine(k key, r *record) (line string, exists bool) {
	pods := slices.Collect(maps.Values(c.owners.pods[k]))
	doc := document.Workload{Kind: k.kind, Namespace: k.namespace, Name: k.name}
	if r.object == nil {
		r.object = c.owned(k)
	}
	switch {
	case r.recalled && r.object == nil && len(pods)+len(r.ended) == 0:
		// It was deleted while the store did not run.
		doc.Deleted = document.At(time.Now())
		return encode(doc), false
	case k.kind == kindPod && len(pods)+len(r.ended) == 0:
		return "", false
	case k.kind == kindPod:
		c.describePod(&doc, pods, r.ended)
	case r.object == nil:
		return "", len(pods) > 0
	default:
		c.describe(&doc, r)
	}
	exists = len(pods) > 0 || k.kind != kindPod && r.gone.IsZero()
	list := make([]document.Pod, 0, len(pods)+len(r.ended))
	for _, p := range pods {
		list = append(list, c.podDocument(p, false))
	}
	for _, p := range r.ended {
		list = append(list, c.podDocument(p, true))
	}
	// Pods that are not ready come first, then the newest.
	slices.SortFunc(list, func(a, b document.Pod) int {
		return cmp.Or(order(!a.Ready, !b.Ready), b.Created.Compare(a.Created.Time), strings.Compare(a.Name, b.Name), strings.Compare(a.UID, b.UID))
	})
	doc.Pods = list
	for {
		line = encode(doc)
		if len(line) <= maxDocument || len(doc.Pods) == 0 {
			return line, exists
		}
		doc.Pods = list[:min(len(doc.Pods)-1, len(doc.Pods)*maxDocument/len(line))]
		doc.More = len(list) - len(doc.Pods)
	}
}

// order is -1 if only the first is true.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

func (c *Cluster) podDocument(p *corev1.Pod, gone bool) document.Pod {
	doc := document.Pod{
		Name: p.Name, UID: string(p.UID), Node: p.Spec.NodeName, IP: p.Status.PodIP, Phase: string(p.Status.Phase), Reason: p.Status.Reason, Message: p.Status.Message,
		Created: document.At(p.CreationTimestamp.Time), Started: momentOf(p.Status.StartTime), Deleting: momentOf(p.DeletionTimestamp), Deleted: gone,
		Template: p.Labels[templateLabel], Revision: p.Labels[controllerLabel],
	}
	if ref := metav1.GetControllerOfNoCopy(p); ref != nil {
		doc.Owner = ref.Name
		if owner := c.replicaSets.get(p.Namespace, ref.Name); owner != nil && owner.UID == ref.UID {
			doc.Revision = owner.Annotations[revisionAnnotation]
		}
	}
	for _, condition := range p.Status.Conditions {
		switch {
		case condition.Type == corev1.PodReady:
			doc.Ready = condition.Status == corev1.ConditionTrue && !gone
		case condition.Type == corev1.PodScheduled && condition.Status == corev1.ConditionFalse && doc.Message == "":
			doc.Message = condition.Message
		}
	}
	add := func(statuses []corev1.ContainerStatus, containers []corev1.Container, isInit bool) {
		for _, s := range statuses {
			// An init container that has succeeded is left out. A sidecar does not end.
			if t := s.State.Terminated; isInit && t != nil && t.ExitCode == 0 {
				continue
			}
			image := ""
			if i := slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == s.Name }); i >= 0 {
				image = containers[i].Image
			}
			doc.Containers = append(doc.Containers, stateOf(s, image, isInit))
		}
	}
	add(p.Status.InitContainerStatuses, p.Spec.InitContainers, true)
	add(p.Status.ContainerStatuses, p.Spec.Containers, false)
	return doc
}

func stateOf(s corev1.ContainerStatus, image string, isInit bool) document.State {
	doc := document.State{Name: s.Name, Image: image, Init: isInit, Ready: s.Ready, Restarts: s.RestartCount, State: "waiting"}
	switch {
	case s.State.Running != nil:
		doc.State, doc.Since = "running", document.At(s.State.Running.StartedAt.Time)
	case s.State.Terminated != nil:
		t := s.State.Terminated
		doc.State, doc.Reason, doc.Message, doc.ExitCode, doc.Since = "terminated", t.Reason, t.Message, t.ExitCode, document.At(t.FinishedAt.Time)
	case s.State.Waiting != nil:
		doc.Reason, doc.Message = s.State.Waiting.Reason, s.State.Waiting.Message
	}
	if t := s.LastTerminationState.Terminated; t != nil {
		doc.Last = &document.End{Reason: t.Reason, ExitCode: t.ExitCode, Finished: document.At(t.FinishedAt.Time)}
	}
	return doc
}

func containersOf(spec *corev1.PodSpec) []document.Container {
	var list []document.Container
	for _, c := range spec.Containers {
		list = append(list, document.Container{Name: c.Name, Image: c.Image, Requests: amounts(c.Resources.Requests), Limits: amounts(c.Resources.Limits)})
	}
	return list
}

func amounts(list corev1.ResourceList) map[string]string {
	if len(list) == 0 {
		return nil
	}
	texts := map[string]string{}
	for name, amount := range list {
		texts[string(name)] = amount.String()
	}
	return texts
}
