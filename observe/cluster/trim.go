package cluster

import (
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/excerpt"
)

// Limits of what is kept of an object, far above what normal objects have.
const (
	maxContainers = 64
	maxConditions = 32
	maxVolumes    = 32
	maxOwners     = 8
	maxTaints     = 32
	maxShort      = 256 // bytes of a name or reason
	maxMessage    = 1024
)

// Annotations and labels that are kept. All others may be large or secret.
const (
	revisionAnnotation = "deployment.kubernetes.io/revision"
	// templateAnnotation is incremented by Kubernetes with each change of a DaemonSet's template.
	templateAnnotation = "deprecated.daemonset.template.generation"
	templateLabel      = "pod-template-hash"
	controllerLabel    = "controller-revision-hash"
	roleLabel          = "node-role.kubernetes.io/"
)

// clipAt shortens a text in place.
func clipAt(s *string, limit int) { *s = excerpt.Of(*s, limit) }

// head returns the first elements of a list.
func head[T any](list []T, limit int) []T {
	if len(list) <= limit {
		return list
	}
	return slices.Clone(list[:limit])
}

// trimMeta keeps what identifies an object, and the named labels and annotations.
func trimMeta(m *metav1.ObjectMeta, labels func(string) bool, annotations ...string) {
	kept := metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion, Generation: m.Generation,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
	}
	for _, o := range head(m.OwnerReferences, maxOwners) {
		clipAt(&o.Kind, maxShort)
		clipAt(&o.Name, maxShort)
		clipAt((*string)(&o.UID), maxShort)
		kept.OwnerReferences = append(kept.OwnerReferences, metav1.OwnerReference{Kind: o.Kind, Name: o.Name, UID: o.UID, Controller: o.Controller})
	}
	if labels != nil {
		for name, value := range m.Labels {
			if labels(name) {
				if kept.Labels == nil {
					kept.Labels = map[string]string{}
				}
				kept.Labels[name] = value
			}
		}
	}
	for _, name := range annotations {
		if value, ok := m.Annotations[name]; ok {
			if kept.Annotations == nil {
				kept.Annotations = map[string]string{}
			}
			kept.Annotations[name] = excerpt.Of(value, maxShort)
		}
	}
	*m = kept
}

func trimPod(object any) *corev1.Pod {
	p, ok := object.(*corev1.Pod)
	if !ok {
		return nil
	}
	trimMeta(&p.ObjectMeta, func(name string) bool { return name == templateLabel || name == controllerLabel }, mirrorAnnotation)
	spec := corev1.PodSpec{
		NodeName: p.Spec.NodeName, PriorityClassName: p.Spec.PriorityClassName, HostNetwork: p.Spec.HostNetwork,
		Containers: trimContainers(p.Spec.Containers), InitContainers: trimContainers(p.Spec.InitContainers),
	}
	for _, v := range p.Spec.Volumes {
		if len(spec.Volumes) == maxVolumes {
			break
		}
		switch {
		case v.PersistentVolumeClaim != nil:
			source := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: v.PersistentVolumeClaim.ClaimName}}
			spec.Volumes = append(spec.Volumes, corev1.Volume{Name: v.Name, VolumeSource: source})
		case v.Ephemeral != nil:
			spec.Volumes = append(spec.Volumes, corev1.Volume{Name: v.Name, VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}})
		}
	}
	p.Spec = spec
	s := p.Status
	p.Status = corev1.PodStatus{
		Phase: s.Phase, Reason: excerpt.Of(s.Reason, maxShort), Message: excerpt.Of(s.Message, maxMessage), HostIP: s.HostIP, PodIP: s.PodIP, StartTime: s.StartTime,
		ContainerStatuses: trimStatuses(s.ContainerStatuses), InitContainerStatuses: trimStatuses(s.InitContainerStatuses),
	}
	for _, c := range s.Conditions {
		switch c.Type {
		case corev1.PodReady, corev1.PodScheduled, corev1.DisruptionTarget:
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{
				Type: c.Type, Status: c.Status, Reason: excerpt.Of(c.Reason, maxShort), Message: excerpt.Of(c.Message, maxMessage), LastTransitionTime: c.LastTransitionTime,
			})
		}
	}
	p.Status.Conditions = head(p.Status.Conditions, maxConditions)
	return p
}

// trimContainers keeps images and resources, but not commands and environment, which may contain passwords.
func trimContainers(list []corev1.Container) []corev1.Container {
	var kept []corev1.Container
	for _, c := range head(list, maxContainers) {
		kept = append(kept, corev1.Container{
			Name: c.Name, Image: excerpt.Of(c.Image, maxMessage), RestartPolicy: c.RestartPolicy,
			Resources: corev1.ResourceRequirements{Requests: trimResources(c.Resources.Requests), Limits: trimResources(c.Resources.Limits)},
		})
	}
	return kept
}

// maxResources bounds the kinds of resources.
const maxResources = 16

func trimResources(list corev1.ResourceList) corev1.ResourceList {
	if len(list) <= maxResources {
		return list
	}
	kept := corev1.ResourceList{}
	for name, amount := range list {
		if name == corev1.ResourceCPU || name == corev1.ResourceMemory || name == corev1.ResourceEphemeralStorage {
			kept[name] = amount
		}
	}
	return kept
}

func trimStatuses(list []corev1.ContainerStatus) []corev1.ContainerStatus {
	var kept []corev1.ContainerStatus
	for _, s := range head(list, maxContainers) {
		kept = append(kept, corev1.ContainerStatus{
			Name: s.Name, Ready: s.Ready, RestartCount: s.RestartCount, State: trimState(s.State), LastTerminationState: trimState(s.LastTerminationState),
			Image: excerpt.Of(s.Image, maxMessage), ImageID: excerpt.Of(s.ImageID, maxMessage), ContainerID: excerpt.Of(s.ContainerID, maxShort),
		})
	}
	return kept
}

func trimState(s corev1.ContainerState) corev1.ContainerState {
	if w := s.Waiting; w != nil {
		s.Waiting = &corev1.ContainerStateWaiting{Reason: excerpt.Of(w.Reason, maxShort), Message: excerpt.Of(w.Message, maxMessage)}
	}
	if t := s.Terminated; t != nil {
		s.Terminated = &corev1.ContainerStateTerminated{
			ExitCode: t.ExitCode, Signal: t.Signal, Reason: excerpt.Of(t.Reason, maxShort), Message: excerpt.Of(t.Message, maxMessage), StartedAt: t.StartedAt, FinishedAt: t.FinishedAt,
		}
	}
	return s
}

// trimTemplate keeps what a workload's document shows.
func trimTemplate(t *corev1.PodTemplateSpec) {
	*t = corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: trimContainers(t.Spec.Containers), InitContainers: trimContainers(t.Spec.InitContainers)}}
}

func trimDeployment(object any) *appsv1.Deployment {
	d, ok := object.(*appsv1.Deployment)
	if !ok {
		return nil
	}
	trimMeta(&d.ObjectMeta, nil, revisionAnnotation)
	trimTemplate(&d.Spec.Template)
	d.Spec = appsv1.DeploymentSpec{Replicas: d.Spec.Replicas, Paused: d.Spec.Paused, Template: d.Spec.Template}
	d.Status.Conditions = head(d.Status.Conditions, maxConditions)
	for i := range d.Status.Conditions {
		c := &d.Status.Conditions[i]
		clipAt((*string)(&c.Type), maxShort)
		clipAt(&c.Reason, maxShort)
		clipAt(&c.Message, maxMessage)
	}
	return d
}

func trimReplicaSet(object any) *appsv1.ReplicaSet {
	r, ok := object.(*appsv1.ReplicaSet)
	if !ok {
		return nil
	}
	trimMeta(&r.ObjectMeta, nil, revisionAnnotation)
	// A bare ReplicaSet is a workload and shows its template. A Deployment shows its own template, and keeps ten old ReplicaSets.
	if metav1.GetControllerOf(r) != nil {
		r.Spec.Template = corev1.PodTemplateSpec{}
	}
	trimTemplate(&r.Spec.Template)
	r.Spec = appsv1.ReplicaSetSpec{Replicas: r.Spec.Replicas, Template: r.Spec.Template}
	r.Status.Conditions = nil
	return r
}

func trimStatefulSet(object any) *appsv1.StatefulSet {
	s, ok := object.(*appsv1.StatefulSet)
	if !ok {
		return nil
	}
	trimMeta(&s.ObjectMeta, nil)
	trimTemplate(&s.Spec.Template)
	s.Spec = appsv1.StatefulSetSpec{Replicas: s.Spec.Replicas, Template: s.Spec.Template}
	s.Status.Conditions = nil
	clipAt(&s.Status.CurrentRevision, maxShort)
	clipAt(&s.Status.UpdateRevision, maxShort)
	return s
}

func trimDaemonSet(object any) *appsv1.DaemonSet {
	d, ok := object.(*appsv1.DaemonSet)
	if !ok {
		return nil
	}
	trimMeta(&d.ObjectMeta, nil, templateAnnotation)
	trimTemplate(&d.Spec.Template)
	d.Spec = appsv1.DaemonSetSpec{Template: d.Spec.Template}
	d.Status.Conditions = nil
	return d
}

func trimJob(object any) *batchv1.Job {
	j, ok := object.(*batchv1.Job)
	if !ok {
		return nil
	}
	trimMeta(&j.ObjectMeta, nil)
	trimTemplate(&j.Spec.Template)
	j.Spec = batchv1.JobSpec{Completions: j.Spec.Completions, Parallelism: j.Spec.Parallelism, Suspend: j.Spec.Suspend, Template: j.Spec.Template}
	s := j.Status
	j.Status = batchv1.JobStatus{
		StartTime: s.StartTime, CompletionTime: s.CompletionTime, Active: s.Active, Ready: s.Ready, Succeeded: s.Succeeded, Failed: s.Failed,
		Conditions: head(s.Conditions, maxConditions),
	}
	for i := range j.Status.Conditions {
		c := &j.Status.Conditions[i]
		clipAt((*string)(&c.Type), maxShort)
		clipAt(&c.Reason, maxShort)
		clipAt(&c.Message, maxMessage)
	}
	return j
}

func trimCronJob(object any) *batchv1.CronJob {
	j, ok := object.(*batchv1.CronJob)
	if !ok {
		return nil
	}
	trimMeta(&j.ObjectMeta, nil)
	trimTemplate(&j.Spec.JobTemplate.Spec.Template)
	spec := batchv1.CronJobSpec{
		Schedule: excerpt.Of(j.Spec.Schedule, maxShort), TimeZone: j.Spec.TimeZone, ConcurrencyPolicy: j.Spec.ConcurrencyPolicy, Suspend: j.Spec.Suspend,
	}
	spec.JobTemplate.Spec.Template = j.Spec.JobTemplate.Spec.Template
	j.Spec = spec
	// Only the number is kept.
	j.Status.Active = make([]corev1.ObjectReference, min(len(j.Status.Active), maxContainers))
	return j
}

func trimNode(object any) *corev1.Node {
	n, ok := object.(*corev1.Node)
	if !ok {
		return nil
	}
	trimMeta(&n.ObjectMeta, func(name string) bool { return strings.HasPrefix(name, roleLabel) })
	n.Spec = corev1.NodeSpec{
		PodCIDR: n.Spec.PodCIDR, ProviderID: excerpt.Of(n.Spec.ProviderID, maxShort), Unschedulable: n.Spec.Unschedulable, Taints: head(n.Spec.Taints, maxTaints),
	}
	for i := range n.Spec.Taints {
		n.Spec.Taints[i].TimeAdded = nil
	}
	s := n.Status
	n.Status = corev1.NodeStatus{
		Capacity: trimResources(s.Capacity), Allocatable: trimResources(s.Allocatable), Addresses: head(s.Addresses, maxOwners), NodeInfo: s.NodeInfo,
	}
	for _, c := range head(s.Conditions, maxConditions) {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{
			Type: corev1.NodeConditionType(excerpt.Of(string(c.Type), maxShort)), Status: c.Status, Reason: excerpt.Of(c.Reason, maxShort), Message: excerpt.Of(c.Message, maxMessage),
			LastTransitionTime: c.LastTransitionTime,
		})
	}
	return n
}

func trimNamespace(object any) *corev1.Namespace {
	n, ok := object.(*corev1.Namespace)
	if !ok {
		return nil
	}
	trimMeta(&n.ObjectMeta, nil)
	n.Spec, n.Status = corev1.NamespaceSpec{}, corev1.NamespaceStatus{Phase: n.Status.Phase}
	return n
}

func trimService(object any) *corev1.Service {
	s, ok := object.(*corev1.Service)
	if !ok {
		return nil
	}
	trimMeta(&s.ObjectMeta, nil)
	spec := corev1.ServiceSpec{
		Type: s.Spec.Type, ClusterIP: s.Spec.ClusterIP, ExternalName: excerpt.Of(s.Spec.ExternalName, maxShort), LoadBalancerIP: excerpt.Of(s.Spec.LoadBalancerIP, maxShort),
		ExternalTrafficPolicy: s.Spec.ExternalTrafficPolicy, Ports: head(s.Spec.Ports, maxContainers),
	}
	if len(s.Spec.Selector) <= maxConditions {
		spec.Selector = s.Spec.Selector
	}
	s.Spec, s.Status = spec, corev1.ServiceStatus{}
	return s
}

func trimClaim(object any) *corev1.PersistentVolumeClaim {
	c, ok := object.(*corev1.PersistentVolumeClaim)
	if !ok {
		return nil
	}
	trimMeta(&c.ObjectMeta, nil, corev1.BetaStorageClassAnnotation)
	c.Spec = corev1.PersistentVolumeClaimSpec{
		StorageClassName: c.Spec.StorageClassName, VolumeName: c.Spec.VolumeName, VolumeMode: c.Spec.VolumeMode,
		Resources: corev1.VolumeResourceRequirements{Requests: trimResources(c.Spec.Resources.Requests)},
	}
	c.Status = corev1.PersistentVolumeClaimStatus{Phase: c.Status.Phase}
	return c
}

func trimAutoscaler(object any) *autoscalingv2.HorizontalPodAutoscaler {
	h, ok := object.(*autoscalingv2.HorizontalPodAutoscaler)
	if !ok {
		return nil
	}
	trimMeta(&h.ObjectMeta, nil)
	target := h.Spec.ScaleTargetRef
	h.Spec = autoscalingv2.HorizontalPodAutoscalerSpec{
		MinReplicas: h.Spec.MinReplicas, MaxReplicas: h.Spec.MaxReplicas,
		ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{
			APIVersion: excerpt.Of(target.APIVersion, maxShort), Kind: excerpt.Of(target.Kind, maxShort), Name: excerpt.Of(target.Name, maxShort),
		},
	}
	s := h.Status
	h.Status = autoscalingv2.HorizontalPodAutoscalerStatus{CurrentReplicas: s.CurrentReplicas, DesiredReplicas: s.DesiredReplicas}
	for _, c := range head(s.Conditions, maxConditions) {
		h.Status.Conditions = append(h.Status.Conditions, autoscalingv2.HorizontalPodAutoscalerCondition{
			Type: autoscalingv2.HorizontalPodAutoscalerConditionType(excerpt.Of(string(c.Type), maxShort)), Status: c.Status,
		})
	}
	return h
}
