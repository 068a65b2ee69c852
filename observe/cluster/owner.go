package cluster

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Kinds of workloads.
const (
	kindDeployment  = "Deployment"
	kindStatefulSet = "StatefulSet"
	kindDaemonSet   = "DaemonSet"
	kindReplicaSet  = "ReplicaSet"
	kindJob         = "Job"
	kindCronJob     = "CronJob"
	kindPod         = "Pod"
)

// Workload is what a pod belongs to: the Deployment, StatefulSet, DaemonSet, CronJob, Job or ReplicaSet above it, or the pod itself.
type Workload struct {
	Kind, Name string
}

const (
	// maxGone bounds the pods that are remembered after their deletion.
	maxGone = 8192
	// ownerWait is how long the owner of a new pod or event may be unknown: the API server reports each kind separately.
	ownerWait = 5 * time.Second
)

// owners knows the workload of each pod, for some time also of deleted pods. The Cluster's mutex guards it.
type owners struct {
	of map[types.UID]ownerOf
	// pods are the pods of each workload, by UID.
	pods map[key]map[types.UID]*corev1.Pod
	// open are pods with owners that were not found.
	open map[types.UID]*corev1.Pod
	// gone are the workloads of deleted pods by "namespace/name", and order the oldest first.
	gone  map[string]Workload
	order []string
}

type ownerOf struct {
	workload Workload
	final    bool // all owners were found
}

func newOwners() owners {
	return owners{of: map[types.UID]ownerOf{}, pods: map[key]map[types.UID]*corev1.Pod{}, open: map[types.UID]*corev1.Pod{}, gone: map[string]Workload{}}
}

// Workload returns what a pod belongs to, also after its deletion, and false if the pod or its owner is not known yet.
func (c *Cluster) Workload(namespace, pod string) (Workload, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pods.get(namespace, pod); p != nil {
		return c.workloadOf(p, time.Now())
	}
	w, ok := c.owners.gone[namespace+"/"+pod]
	return w, ok
}

// workloadOf returns a known pod's workload. An owner that is not found after some time does not exist: a pod can name any owner.
func (c *Cluster) workloadOf(p *corev1.Pod, now time.Time) (Workload, bool) {
	o, ok := c.owners.of[p.UID]
	return o.workload, ok && (o.final || c.settled(now) && now.Sub(p.CreationTimestamp.Time) > ownerWait)
}

// top follows the owners of an object to the topmost one. An owner's name and UID must both be those of an
// existing object. known is false if one was not found. A chain ends before an owner of a kind that is not watched: its name
// cannot be checked.
func (c *Cluster) top(kind string, o metav1.Object) (w Workload, known bool) {
	w = Workload{kind, o.GetName()}
	// The longest chains are Pod, ReplicaSet, Deployment and Pod, Job, CronJob. An owner of the same kind would be a circle.
	for range 2 {
		ref := metav1.GetControllerOfNoCopy(o)
		if ref == nil {
			return w, true
		}
		owner, watched := c.find(w.Kind, ref.Kind, o.GetNamespace(), ref.Name)
		if !watched {
			return w, true
		}
		if owner == nil || owner.GetUID() != ref.UID {
			return w, false
		}
		w, o = Workload{ref.Kind, owner.GetName()}, owner
	}
	return w, true
}

// find returns the owner of an object of this kind, nil if it does not exist. watched is false if owners of that kind are not watched.
func (c *Cluster) find(kind, owner, namespace, name string) (o metav1.Object, watched bool) {
	switch {
	case owner == kindDeployment && kind == kindReplicaSet:
		return object(c.deployments.get(namespace, name)), true
	case owner == kindCronJob && kind == kindJob:
		return object(c.cronJobs.get(namespace, name)), true
	case kind != kindPod:
		return nil, false
	}
	switch owner {
	case kindReplicaSet:
		return object(c.replicaSets.get(namespace, name)), true
	case kindStatefulSet:
		return object(c.statefulSets.get(namespace, name)), true
	case kindDaemonSet:
		return object(c.daemonSets.get(namespace, name)), true
	case kindJob:
		return object(c.jobs.get(namespace, name)), true
	}
	return nil, false
}

// object returns an interface that is nil if the pointer is.
func object[T any, P interface {
	*T
	metav1.Object
}](p P) metav1.Object {
	if p == nil {
		return nil
	}
	return p
}

// own finds the workload of a new or changed pod. It is kept once all owners were found, because owners are deleted before their pods.
func (c *Cluster) own(p *corev1.Pod) {
	before, known := c.owners.of[p.UID]
	now := before
	if w, final := c.top(kindPod, p); final || !known {
		now = ownerOf{w, final}
	}
	if known && before.workload != now.workload {
		c.leave(key{before.workload.Kind, p.Namespace, before.workload.Name}, p.UID)
	}
	c.owners.of[p.UID] = now
	if now.final {
		delete(c.owners.open, p.UID)
	} else {
		c.owners.open[p.UID] = p
	}
	k := key{now.workload.Kind, p.Namespace, now.workload.Name}
	if c.owners.pods[k] == nil {
		c.owners.pods[k] = map[types.UID]*corev1.Pod{}
	}
	c.owners.pods[k][p.UID] = p
}

func (c *Cluster) leave(k key, pod types.UID) {
	delete(c.owners.pods[k], pod)
	if len(c.owners.pods[k]) == 0 {
		delete(c.owners.pods, k)
	}
	if r := c.documents.records[k]; r != nil {
		r.dirty = true
	}
}

// disown removes a deleted pod and returns its workload.
func (c *Cluster) disown(p *corev1.Pod) key {
	w := c.owners.of[p.UID].workload
	delete(c.owners.of, p.UID)
	delete(c.owners.open, p.UID)
	k := key{w.Kind, p.Namespace, w.Name}
	c.leave(k, p.UID)
	c.owners.remember(p.Namespace+"/"+p.Name, w)
	return k
}

// remember keeps the workload of a deleted pod.
func (o *owners) remember(pod string, w Workload) {
	if _, ok := o.gone[pod]; !ok {
		o.order = append(o.order, pod)
	}
	o.gone[pod] = w
	if n := len(o.order) - maxGone; n > 0 {
		for _, old := range o.order[:n] {
			delete(o.gone, old)
		}
		o.order = slices.Delete(o.order, 0, n)
	}
}

// reown searches again for owners that were not found.
func (c *Cluster) reown() {
	for _, p := range c.owners.open {
		c.own(p)
		c.touchPod(p)
	}
}

// settled reports whether all kinds that own pods are known, or stay unknown.
func (c *Cluster) settled(now time.Time) bool {
	if c.conn.since.IsZero() {
		return false
	}
	for _, synced := range []bool{
		c.pods.synced, c.replicaSets.synced, c.deployments.synced, c.statefulSets.synced, c.daemonSets.synced, c.jobs.synced, c.cronJobs.synced,
	} {
		if !synced {
			return c.conn.reachable && now.Sub(c.conn.since) > settleWait
		}
	}
	return true
}

// settleWait is how long to wait for kinds that the API server does not return.
const settleWait = 30 * time.Second
