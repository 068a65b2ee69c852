package cluster

import (
	"cmp"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/document"
)

// describe fills in the document of a workload from its object, which may have been deleted.
func (c *Cluster) describe(doc *document.Workload, r *record) {
	o := r.object
	doc.UID, doc.Created, doc.Generation = string(o.GetUID()), document.At(o.GetCreationTimestamp().Time), o.GetGeneration()
	if !r.gone.IsZero() {
		doc.Deleted = document.At(r.gone)
	}
	switch o := o.(type) {
	case *appsv1.Deployment:
		s := o.Status
		doc.Revision, doc.Paused, doc.Containers = o.Annotations[revisionAnnotation], o.Spec.Paused, containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready, doc.Updated, doc.Available = value(o.Spec.Replicas, 1), s.ReadyReplicas, s.UpdatedReplicas, s.AvailableReplicas
		for _, condition := range s.Conditions {
			doc.Conditions = append(doc.Conditions, conditionOf(string(condition.Type), string(condition.Status), condition.Reason, condition.Message, condition.LastTransitionTime))
		}
	case *appsv1.StatefulSet:
		s := o.Status
		doc.Revision, doc.Containers = s.UpdateRevision, containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready, doc.Updated, doc.Available = value(o.Spec.Replicas, 1), s.ReadyReplicas, s.UpdatedReplicas, s.AvailableReplicas
	case *appsv1.DaemonSet:
		s := o.Status
		doc.Revision, doc.Containers = o.Annotations[templateAnnotation], containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready, doc.Updated, doc.Available = s.DesiredNumberScheduled, s.NumberReady, s.UpdatedNumberScheduled, s.NumberAvailable
	case *appsv1.ReplicaSet:
		doc.Containers = containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready, doc.Available = value(o.Spec.Replicas, 1), o.Status.ReadyReplicas, o.Status.AvailableReplicas
		doc.Updated = o.Status.Replicas
	case *batchv1.Job:
		doc.Containers = containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready = value(o.Spec.Completions, 1), value(o.Status.Ready, 0)
		doc.Updated, doc.Available = o.Status.Active, o.Status.Succeeded
		doc.Paused = o.Spec.Suspend != nil && *o.Spec.Suspend
		for _, condition := range o.Status.Conditions {
			doc.Conditions = append(doc.Conditions, conditionOf(string(condition.Type), string(condition.Status), condition.Reason, condition.Message, condition.LastTransitionTime))
		}
	case *batchv1.CronJob:
		doc.Containers, doc.Schedule = containersOf(&o.Spec.JobTemplate.Spec.Template.Spec), o.Spec.Schedule
		doc.Paused = o.Spec.Suspend != nil && *o.Spec.Suspend
		doc.Updated = int32(len(o.Status.Active))
	}
}

func conditionOf(kind, status, reason, message string, since metav1.Time) document.Condition {
	return document.Condition{Type: kind, Status: status, Reason: reason, Message: message, Since: document.At(since.Time)}
}

// describePod fills in the document of a pod without an owner. Of two pods with this name, the newer one is described.
func (c *Cluster) describePod(doc *document.Workload, pods, ended []*corev1.Pod) {
	if len(pods) == 0 {
		if len(ended) == 0 {
			return
		}
		p := ended[len(ended)-1]
		doc.UID, doc.Created, doc.Containers = string(p.UID), document.At(p.CreationTimestamp.Time), containersOf(&p.Spec)
		doc.Deleted = document.At(cmp.Or(p.DeletionTimestamp, &p.CreationTimestamp).Time)
		return
	}
	p := pods[0]
	doc.UID, doc.Created, doc.Generation, doc.Containers = string(p.UID), document.At(p.CreationTimestamp.Time), p.Generation, containersOf(&p.Spec)
	if p.Status.Phase == corev1.PodSucceeded {
		return
	}
	doc.Replicas, doc.Updated = 1, 1
	for _, condition := range p.Status.Conditions {
		if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
			doc.Ready, doc.Available = 1, 1
		}
	}
}

func value(n *int32, otherwise int32) int32 {
	if n == nil {
		return otherwise
	}
	return *n
}

// The changes of tables.

func (c *Cluster) deploymentChanged(old, now *appsv1.Deployment) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindDeployment, o.Namespace, o.Name}, object(old), object(now))
		c.deployedDeployment(now)
	}
}

func (c *Cluster) statefulSetChanged(old, now *appsv1.StatefulSet) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindStatefulSet, o.Namespace, o.Name}, object(old), object(now))
		c.deployedStatefulSet(now)
	}
}

func (c *Cluster) daemonSetChanged(old, now *appsv1.DaemonSet) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindDaemonSet, o.Namespace, o.Name}, object(old), object(now))
		c.deployedDaemonSet(now)
	}
}

// replicaSetChanged and jobChanged only write documents of objects without an owner: a Deployment or a CronJob has its own.

func (c *Cluster) replicaSetChanged(old, now *appsv1.ReplicaSet) {
	if o := either(old, now); o != nil {
		c.touchOwner(key{kindReplicaSet, o.Namespace, o.Name}, object(old), object(now))
	}
}

func (c *Cluster) jobChanged(old, now *batchv1.Job) {
	if o := either(old, now); o != nil {
		c.touchOwner(key{kindJob, o.Namespace, o.Name}, object(old), object(now))
	}
}

// touchOwner is touchObject for kinds that can own pods and have an owner themselves.
func (c *Cluster) touchOwner(k key, old, now metav1.Object) {
	o := now
	if o == nil {
		o = old
	}
	if c.documents.records[k] != nil || metav1.GetControllerOfNoCopy(o) == nil {
		c.touchObject(k, old, now)
	}
}

// owned returns an object that is a workload although it has an owner: the owner's kind is not watched, or the owner does not exist.
func (c *Cluster) owned(k key) metav1.Object {
	switch k.kind {
	case kindReplicaSet:
		return object(c.replicaSets.get(k.namespace, k.name))
	case kindJob:
		return object(c.jobs.get(k.namespace, k.name))
	}
	return nil
}

func (c *Cluster) cronJobChanged(old, now *batchv1.CronJob) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindCronJob, o.Namespace, o.Name}, object(old), object(now))
	}
}

func (c *Cluster) nodeChanged(old, now *corev1.Node) {
	c.markNode(old, now)
}

func (c *Cluster) podChanged(old, now *corev1.Pod) {
	// Another pod with the same name.
	if old != nil && (now == nil || old.UID != now.UID) {
		k := c.disown(old)
		c.places.leave(old)
		if r := c.documents.record(k); len(r.ended) < maxEnded {
			r.ended = append(r.ended, old)
		}
		c.touch(k)
		old = nil
	}
	if now != nil {
		c.own(now)
		c.places.put(now)
		c.touchPod(now)
		c.markPod(old, now)
	}
}

// touchPod schedules the document of a pod's workload, once the workload is known.
func (c *Cluster) touchPod(p *corev1.Pod) {
	if w, ok := c.workloadOf(p, time.Now()); ok {
		c.touch(key{w.Kind, p.Namespace, w.Name})
	}
}

func either[T any](old, now *T) *T {
	if now != nil {
		return now
	}
	return old
}
