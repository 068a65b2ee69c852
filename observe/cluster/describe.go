package cluster

import (
	"cmp"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// describe fills in the document of a workload from its object, which may be gone.
func (c *Cluster) describe(doc *workloadDocument, r *record) {
	o := r.object
	doc.UID, doc.Created, doc.Generation = string(o.GetUID()), moment{o.GetCreationTimestamp().Time}, o.GetGeneration()
	if !r.gone.IsZero() {
		doc.Deleted = moment{r.gone}
	}
	switch o := o.(type) {
	case *appsv1.Deployment:
		s := o.Status
		doc.Revision, doc.Paused, doc.Containers = o.Annotations[revisionAnnotation], o.Spec.Paused, containersOf(&o.Spec.Template.Spec)
		doc.Replicas, doc.Ready, doc.Updated, doc.Available = value(o.Spec.Replicas, 1), s.ReadyReplicas, s.UpdatedReplicas, s.AvailableReplicas
		for _, condition := range s.Conditions {
			doc.Conditions = append(doc.Conditions, conditionDocument{
				string(condition.Type), string(condition.Status), condition.Reason, condition.Message, moment{condition.LastTransitionTime.Time},
			})
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
			doc.Conditions = append(doc.Conditions, conditionDocument{
				string(condition.Type), string(condition.Status), condition.Reason, condition.Message, moment{condition.LastTransitionTime.Time},
			})
		}
	case *batchv1.CronJob:
		doc.Containers, doc.Schedule = containersOf(&o.Spec.JobTemplate.Spec.Template.Spec), o.Spec.Schedule
		doc.Paused = o.Spec.Suspend != nil && *o.Spec.Suspend
		doc.Updated = int32(len(o.Status.Active))
	}
}

// describePod fills in the document of a pod that belongs to nothing else. Of two with this name the newer one is there.
func (c *Cluster) describePod(doc *workloadDocument, pods, ended []*corev1.Pod) {
	if len(pods) == 0 {
		if len(ended) == 0 {
			return
		}
		p := ended[len(ended)-1]
		doc.UID, doc.Created, doc.Containers = string(p.UID), moment{p.CreationTimestamp.Time}, containersOf(&p.Spec)
		doc.Deleted = moment{cmp.Or(p.DeletionTimestamp, &p.CreationTimestamp).Time}
		return
	}
	p := pods[0]
	doc.UID, doc.Created, doc.Generation, doc.Containers = string(p.UID), moment{p.CreationTimestamp.Time}, p.Generation, containersOf(&p.Spec)
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

// nodeDocument is the document of a node.
type nodeDocument struct {
	Kind          string              `json:"kind"`
	Name          string              `json:"name"`
	UID           string              `json:"uid"`
	Created       moment              `json:"created,omitzero"`
	Deleted       moment              `json:"deleted,omitzero"`
	Unschedulable bool                `json:"unschedulable,omitempty"`
	Roles         []string            `json:"roles,omitempty"`
	Addresses     map[string]string   `json:"addresses,omitempty"`
	Versions      map[string]string   `json:"versions,omitempty"`
	Capacity      map[string]string   `json:"capacity,omitempty"`
	Allocatable   map[string]string   `json:"allocatable,omitempty"`
	Conditions    []conditionDocument `json:"conditions,omitempty"`
}

func (c *Cluster) nodeDocument(_ key, r *record) (any, bool) {
	n, ok := r.object.(*corev1.Node)
	if !ok {
		return nil, false
	}
	i := n.Status.NodeInfo
	doc := nodeDocument{
		Kind: kindNode, Name: n.Name, UID: string(n.UID), Created: moment{n.CreationTimestamp.Time}, Unschedulable: n.Spec.Unschedulable, Roles: rolesOf(n),
		Addresses: map[string]string{}, Capacity: amounts(n.Status.Capacity), Allocatable: amounts(n.Status.Allocatable),
		Versions: map[string]string{"kubelet": i.KubeletVersion, "runtime": i.ContainerRuntimeVersion, "kernel": i.KernelVersion, "os": i.OSImage},
	}
	if !r.gone.IsZero() {
		doc.Deleted = moment{r.gone}
	}
	for _, a := range n.Status.Addresses {
		doc.Addresses[string(a.Type)] = a.Address
	}
	for _, condition := range n.Status.Conditions {
		doc.Conditions = append(doc.Conditions, conditionDocument{
			string(condition.Type), string(condition.Status), condition.Reason, condition.Message, moment{condition.LastTransitionTime.Time},
		})
	}
	return doc, r.gone.IsZero()
}

func rolesOf(n *corev1.Node) []string {
	var roles []string
	for name := range n.Labels {
		if role, ok := strings.CutPrefix(name, roleLabel); ok {
			roles = append(roles, role)
		}
	}
	slices.Sort(roles)
	return roles
}

// serviceDocument is the document of a service.
type serviceDocument struct {
	Kind      string            `json:"kind"`
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	UID       string            `json:"uid"`
	Created   moment            `json:"created,omitzero"`
	Deleted   moment            `json:"deleted,omitzero"`
	Type      string            `json:"type"`
	ClusterIP string            `json:"clusterIP,omitempty"`
	External  string            `json:"externalName,omitempty"`
	Selector  map[string]string `json:"selector,omitempty"`
	Ports     []portDocument    `json:"ports,omitempty"`
}

type portDocument struct {
	Name     string `json:"name,omitempty"`
	Protocol string `json:"protocol"`
	Port     int32  `json:"port"`
	Target   string `json:"target,omitempty"`
	Node     int32  `json:"nodePort,omitempty"`
}

func (c *Cluster) serviceDocument(_ key, r *record) (any, bool) {
	s, ok := r.object.(*corev1.Service)
	if !ok {
		return nil, false
	}
	doc := serviceDocument{
		Kind: kindService, Namespace: s.Namespace, Name: s.Name, UID: string(s.UID), Created: moment{s.CreationTimestamp.Time}, Type: string(s.Spec.Type),
		ClusterIP: s.Spec.ClusterIP, External: s.Spec.ExternalName, Selector: s.Spec.Selector,
	}
	if !r.gone.IsZero() {
		doc.Deleted = moment{r.gone}
	}
	for _, p := range s.Spec.Ports {
		doc.Ports = append(doc.Ports, portDocument{p.Name, string(p.Protocol), p.Port, p.TargetPort.String(), p.NodePort})
	}
	return doc, r.gone.IsZero()
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

// replicaSetChanged and jobChanged have no documents of those that a Deployment or a CronJob owns: only where pods have no other workload.

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

// touchOwner is touchObject for what can own pods and be owned itself.
func (c *Cluster) touchOwner(k key, old, now metav1.Object) {
	o := now
	if o == nil {
		o = old
	}
	if c.documents.records[k] != nil || metav1.GetControllerOfNoCopy(o) == nil {
		c.touchObject(k, old, now)
	}
}

// owned returns what is a workload although it has an owner, of a kind that is not watched, or one that is not there.
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

func (c *Cluster) serviceChanged(old, now *corev1.Service) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindService, o.Namespace, o.Name}, object(old), object(now))
	}
}

func (c *Cluster) nodeChanged(old, now *corev1.Node) {
	if o := either(old, now); o != nil {
		c.touchObject(key{kindNode, "", o.Name}, object(old), object(now))
		c.markNode(old, now)
	}
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

// touchPod has the document of a pod's workload written, once it is known which that is.
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
