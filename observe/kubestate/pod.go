package kubestate

import (
	"slices"
	"strconv"

	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func pods(name, help string, of func(*corev1.Pod, adder), labels ...string) family {
	return gauge("kube_pod_"+name, help, append([]string{"namespace", "pod", "uid"}, labels...), func(o *lists, add adder) {
		for _, p := range o.pods {
			of(p, add)
		}
	})
}

// id holds the common labels of a pod's series.
func id(p *corev1.Pod, more ...string) []string {
	return append([]string{p.Namespace, p.Name, string(p.UID)}, more...)
}

func podsFirst() []family {
	return []family{
		pods("info", "A pod and where it runs.", func(p *corev1.Pod, add adder) {
			by := metav1.OwnerReference{}
			if ref := metav1.GetControllerOf(p); ref != nil {
				by = *ref
			}
			add(1, id(p, p.Status.HostIP, p.Status.PodIP, p.Spec.NodeName, by.Kind, by.Name, p.Spec.PriorityClassName, strconv.FormatBool(p.Spec.HostNetwork))...)
		}, "host_ip", "pod_ip", "node", "created_by_kind", "created_by_name", "priority_class", "host_network"),
		statesOf(pods("status_phase", "The phase of a pod.", func(p *corev1.Pod, add adder) {
			if p.Status.Phase == "" {
				return
			}
			for _, phase := range []corev1.PodPhase{corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown} {
				add(boolean(p.Status.Phase == phase), id(p, string(phase))...)
			}
		}, "phase")),
		pods("status_reason", "Why a pod has its phase.", podReasons, "reason"),
		statesOf(pods("status_ready", "Whether a pod is ready.", func(p *corev1.Pod, add adder) {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady {
					addStatus(add, c.Status, id(p)...)
				}
			}
		}, "condition")),
		pods("status_unschedulable", "Pods for which there is no node.", func(p *corev1.Pod, add adder) {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
					add(1, id(p)...)
				}
			}
		}),
		pods("owner", "The owner of a pod.", func(p *corev1.Pod, add adder) { addOwners(add, p.OwnerReferences, id(p)...) }, owner()...),
	}
}

func podsMore() []family {
	return []family{
		pods("created", "When a pod was created, in seconds since 1970.", func(p *corev1.Pod, add adder) { addTime(add, &p.CreationTimestamp, id(p)...) }),
		pods("start_time", "When a node took a pod, in seconds since 1970.", func(p *corev1.Pod, add adder) { addTime(add, p.Status.StartTime, id(p)...) }),
		pods("deletion_timestamp", "When a pod is to be gone, in seconds since 1970.", func(p *corev1.Pod, add adder) { addTime(add, p.DeletionTimestamp, id(p)...) }),
		pods("spec_volumes_persistentvolumeclaims_info", "The claims of volumes that a pod uses.", func(p *corev1.Pod, add adder) {
			for _, v := range p.Spec.Volumes {
				switch {
				case v.PersistentVolumeClaim != nil:
					add(1, id(p, v.Name, v.PersistentVolumeClaim.ClaimName, "false")...)
				case v.Ephemeral != nil:
					add(1, id(p, v.Name, p.Name+"-"+v.Name, "true")...)
				}
			}
		}, "volume", "persistentvolumeclaim", "ephemeral"),
	}
}

// podReasons adds the known reasons of a pod, its conditions and its containers.
func podReasons(p *corev1.Pod, add adder) {
	known := []string{"Evicted", "NodeAffinity", "NodeLost", "PreemptionByScheduler", "SchedulingGated", "Shutdown", "TerminationByKubelet", "UnexpectedAdmissionError"}
	for _, reason := range known {
		if p.Status.Reason == reason ||
			slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Reason == reason }) ||
			slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool {
				return c.State.Terminated != nil && c.State.Terminated.Reason == reason
			}) {
			add(1, id(p, reason)...)
		}
	}
	if p.Status.Reason != "" && !slices.Contains(known, p.Status.Reason) {
		add(1, id(p, "Other")...)
	}
}

// container is a container of a pod with its status from the kubelet.
type container struct {
	*corev1.Container
	pod    *corev1.Pod
	status *corev1.ContainerStatus // nil if there is none yet
}

func (c container) id(more ...string) []string {
	return append([]string{c.pod.Namespace, c.pod.Name, string(c.pod.UID), c.Name}, more...)
}

// sidecar reports whether an init container runs as long as the pod does.
func (c container) sidecar() bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// containers returns a family of all containers.
func containers(name, help string, of func(container, adder), labels ...string) family {
	return gauge("kube_pod_container_"+name, help, append([]string{"namespace", "pod", "uid", "container"}, labels...), func(o *lists, add adder) {
		for _, p := range o.pods {
			eachContainer(p, p.Spec.Containers, p.Status.ContainerStatuses, add, of)
		}
	})
}

// initContainers returns a family of all init containers.
func initContainers(name, help string, of func(container, adder), labels ...string) family {
	return gauge("kube_pod_init_container_"+name, help, append([]string{"namespace", "pod", "uid", "container"}, labels...), func(o *lists, add adder) {
		for _, p := range o.pods {
			eachContainer(p, p.Spec.InitContainers, p.Status.InitContainerStatuses, add, of)
		}
	})
}

func eachContainer(p *corev1.Pod, list []corev1.Container, statuses []corev1.ContainerStatus, add adder, of func(container, adder)) {
	for i := range list {
		c := container{Container: &list[i], pod: p}
		for j := range statuses {
			if statuses[j].Name == c.Name {
				c.status = &statuses[j]
				break
			}
		}
		of(c, add)
	}
}

// both returns a family of all containers and one of the init containers, or of only the sidecars among these.
func both(name, help string, onlySidecars bool, of func(container, adder), labels ...string) []family {
	return []family{
		containers(name, help, of, labels...),
		initContainers(name, help, func(c container, add adder) {
			if !onlySidecars || c.sidecar() {
				of(c, add)
			}
		}, labels...),
	}
}

// withStatus calls of for containers with a status.
func withStatus(of func(container, *corev1.ContainerStatus, adder)) func(container, adder) {
	return func(c container, add adder) {
		if c.status != nil {
			of(c, c.status, add)
		}
	}
}

func containersFirst() []family {
	restarts := both("status_restarts_total", "How often a container was started again.", false, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
		add(float64(s.RestartCount), c.id()...)
	}))
	for i := range restarts {
		restarts[i].kind = dto.MetricType_COUNTER
	}
	return slices.Concat(
		restarts,
		both("status_waiting_reason", "Why a container does not run yet.", false, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			if s.State.Waiting != nil {
				add(1, c.id(s.State.Waiting.Reason)...)
			}
		}), "reason"),
		both("status_last_terminated_reason", "Why a container ended before its last start.", false, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			if s.LastTerminationState.Terminated != nil {
				add(1, c.id(s.LastTerminationState.Terminated.Reason)...)
			}
		}), "reason"),
		[]family{containers("status_terminated_reason", "Why a container has ended.", withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			if s.State.Terminated != nil {
				add(1, c.id(s.State.Terminated.Reason)...)
			}
		}), "reason")},
		both("resource_requests", "What a container requests.", true, func(c container, add adder) {
			addResources(add, c.Resources.Requests, false, c.id(c.pod.Spec.NodeName)...)
		}, "node", "resource", "unit"),
		both("resource_limits", "What a container may use at most.", true, func(c container, add adder) {
			addResources(add, c.Resources.Limits, false, c.id(c.pod.Spec.NodeName)...)
		}, "node", "resource", "unit"),
		both("status_ready", "Whether a container is ready.", true, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			add(boolean(s.Ready), c.id()...)
		})),
	)
}

func containersMore() []family {
	return slices.Concat(
		both("status_running", "Whether a container runs.", true, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			add(boolean(s.State.Running != nil), c.id()...)
		})),
		both("status_last_terminated_exitcode", "The exit code of a container before its last start.", false, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			if t := s.LastTerminationState.Terminated; t != nil {
				add(float64(t.ExitCode), c.id()...)
			}
		})),
		both("status_last_terminated_timestamp", "When a container ended before its last start, in seconds since 1970.", false, withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
			if t := s.LastTerminationState.Terminated; t != nil {
				addTime(add, &t.FinishedAt, c.id()...)
			}
		})),
		[]family{
			containers("info", "A container and its image.", withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
				add(1, c.id(c.Image, s.Image, s.ImageID, s.ContainerID)...)
			}), "image_spec", "image", "image_id", "container_id"),
			initContainers("info", "An init container and its image.", withStatus(func(c container, s *corev1.ContainerStatus, add adder) {
				if c.sidecar() {
					add(1, c.id(c.Image, s.Image, s.ImageID, s.ContainerID, string(*c.RestartPolicy))...)
				}
			}), "image_spec", "image", "image_id", "container_id", "restart_policy"),
		},
	)
}
