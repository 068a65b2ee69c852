package kubestate

import (
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func workloads() []family {
	deployment := func(name, help string, of func(*appsv1.Deployment, adder), labels ...string) family {
		return gauge("kube_deployment_"+name, help, append([]string{"namespace", "deployment"}, labels...), func(o *lists, add adder) {
			for _, d := range o.deployments {
				of(d, add)
			}
		})
	}
	statefulSet := func(name, help string, of func(*appsv1.StatefulSet, adder)) family {
		return gauge("kube_statefulset_"+name, help, []string{"namespace", "statefulset"}, func(o *lists, add adder) {
			for _, s := range o.statefulSets {
				of(s, add)
			}
		})
	}
	daemonSet := func(name, help string, of func(*appsv1.DaemonSet) float64) family {
		return gauge("kube_daemonset_"+name, help, []string{"namespace", "daemonset"}, func(o *lists, add adder) {
			for _, d := range o.daemonSets {
				add(of(d), d.Namespace, d.Name)
			}
		})
	}
	status := func(of func(*appsv1.DeploymentStatus) int32) func(*appsv1.Deployment, adder) {
		return func(d *appsv1.Deployment, add adder) { add(float64(of(&d.Status)), d.Namespace, d.Name) }
	}
	setStatus := func(of func(*appsv1.StatefulSetStatus) int32) func(*appsv1.StatefulSet, adder) {
		return func(s *appsv1.StatefulSet, add adder) { add(float64(of(&s.Status)), s.Namespace, s.Name) }
	}
	return []family{
		deployment("created", "When a Deployment was created, in seconds since 1970.", func(d *appsv1.Deployment, add adder) {
			addTime(add, &d.CreationTimestamp, d.Namespace, d.Name)
		}),
		deployment("spec_replicas", "The pods that a Deployment should have.", func(d *appsv1.Deployment, add adder) {
			addNumber(add, d.Spec.Replicas, d.Namespace, d.Name)
		}),
		deployment("spec_paused", "Whether a Deployment is paused.", func(d *appsv1.Deployment, add adder) {
			add(boolean(d.Spec.Paused), d.Namespace, d.Name)
		}),
		deployment("metadata_generation", "The generation of what a Deployment should be.", func(d *appsv1.Deployment, add adder) {
			add(float64(d.Generation), d.Namespace, d.Name)
		}),
		deployment("status_observed_generation", "The generation that the controller has seen.", func(d *appsv1.Deployment, add adder) {
			add(float64(d.Status.ObservedGeneration), d.Namespace, d.Name)
		}),
		deployment("status_replicas", "The pods that a Deployment has.", status(func(s *appsv1.DeploymentStatus) int32 { return s.Replicas })),
		deployment("status_replicas_ready", "The ready pods of a Deployment.", status(func(s *appsv1.DeploymentStatus) int32 { return s.ReadyReplicas })),
		deployment("status_replicas_available", "The available pods of a Deployment.", status(func(s *appsv1.DeploymentStatus) int32 { return s.AvailableReplicas })),
		deployment("status_replicas_unavailable", "The pods that a Deployment lacks.", status(func(s *appsv1.DeploymentStatus) int32 { return s.UnavailableReplicas })),
		deployment("status_replicas_updated", "The pods of a Deployment's newest template.", status(func(s *appsv1.DeploymentStatus) int32 { return s.UpdatedReplicas })),
		statesOf(deployment("status_condition", "The conditions of a Deployment.", func(d *appsv1.Deployment, add adder) {
			for _, c := range d.Status.Conditions {
				addStatus(add, c.Status, d.Namespace, d.Name, deploymentReason(c.Reason), string(c.Type))
			}
		}, "reason", "condition", "status")),
		statefulSet("created", "When a StatefulSet was created, in seconds since 1970.", func(s *appsv1.StatefulSet, add adder) {
			addTime(add, &s.CreationTimestamp, s.Namespace, s.Name)
		}),
		statefulSet("replicas", "The pods that a StatefulSet should have.", func(s *appsv1.StatefulSet, add adder) {
			addNumber(add, s.Spec.Replicas, s.Namespace, s.Name)
		}),
		statefulSet("metadata_generation", "The generation of what a StatefulSet should be.", func(s *appsv1.StatefulSet, add adder) {
			add(float64(s.Generation), s.Namespace, s.Name)
		}),
		statefulSet("status_observed_generation", "The generation that the controller has seen.", func(s *appsv1.StatefulSet, add adder) {
			add(float64(s.Status.ObservedGeneration), s.Namespace, s.Name)
		}),
		statefulSet("status_replicas", "The pods that a StatefulSet has.", setStatus(func(s *appsv1.StatefulSetStatus) int32 { return s.Replicas })),
		statefulSet("status_replicas_ready", "The ready pods of a StatefulSet.", setStatus(func(s *appsv1.StatefulSetStatus) int32 { return s.ReadyReplicas })),
		statefulSet("status_replicas_available", "The available pods of a StatefulSet.", setStatus(func(s *appsv1.StatefulSetStatus) int32 { return s.AvailableReplicas })),
		statefulSet("status_replicas_current", "The pods of a StatefulSet's former revision.", setStatus(func(s *appsv1.StatefulSetStatus) int32 { return s.CurrentReplicas })),
		statefulSet("status_replicas_updated", "The pods of a StatefulSet's newest revision.", setStatus(func(s *appsv1.StatefulSetStatus) int32 { return s.UpdatedReplicas })),

		daemonSet("created", "When a DaemonSet was created, in seconds since 1970.", func(d *appsv1.DaemonSet) float64 { return float64(d.CreationTimestamp.Unix()) }),
		daemonSet("metadata_generation", "The generation of what a DaemonSet should be.", func(d *appsv1.DaemonSet) float64 { return float64(d.Generation) }),
		daemonSet("status_observed_generation", "The generation that the controller has seen.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.ObservedGeneration) }),
		daemonSet("status_desired_number_scheduled", "The nodes that should have a DaemonSet's pod.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.DesiredNumberScheduled) }),
		daemonSet("status_current_number_scheduled", "The nodes that should have and do have a DaemonSet's pod.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.CurrentNumberScheduled) }),
		daemonSet("status_number_misscheduled", "The nodes that have a DaemonSet's pod and should not.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.NumberMisscheduled) }),
		daemonSet("status_number_ready", "The nodes with a ready pod of a DaemonSet.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.NumberReady) }),
		daemonSet("status_number_available", "The nodes with an available pod of a DaemonSet.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.NumberAvailable) }),
		daemonSet("status_number_unavailable", "The nodes that lack an available pod of a DaemonSet.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.NumberUnavailable) }),
		daemonSet("status_updated_number_scheduled", "The nodes with a pod of a DaemonSet's newest template.", func(d *appsv1.DaemonSet) float64 { return float64(d.Status.UpdatedNumberScheduled) }),
	}
}

// deploymentReason returns a reason that Kubernetes' controller gives, and "unknown" for others.
func deploymentReason(reason string) string {
	switch reason {
	case "", "ReplicaSetUpdated", "ReplicaSetCreateError", "NewReplicaSetCreated", "FoundNewReplicaSet", "NewReplicaSetAvailable", "ProgressDeadlineExceeded",
		"DeploymentPaused", "DeploymentResumed", "MinimumReplicasAvailable", "MinimumReplicasUnavailable":
		return reason
	}
	return "unknown"
}

// replicaSets returns the families of ReplicaSets with pods: a Deployment keeps ten old ones without.
func replicaSets() []family {
	return []family{gauge("kube_replicaset_owner", "The owner of a ReplicaSet.", append([]string{"namespace", "replicaset"}, owner()...), func(o *lists, add adder) {
		for _, r := range o.replicaSets {
			if r.Status.Replicas > 0 || r.Spec.Replicas != nil && *r.Spec.Replicas > 0 {
				addOwners(add, r.OwnerReferences, r.Namespace, r.Name)
			}
		}
	})}
}

func owner() []string { return []string{"owner_kind", "owner_name", "owner_is_controller"} }

// maxOwners bounds how many owners an object can claim.
const maxOwners = 4

// addOwners adds the owners that an object claims to have.
func addOwners(add adder, owners []metav1.OwnerReference, labels ...string) {
	if len(owners) == 0 {
		add(1, with(labels, "", "", "")...)
		return
	}
	owners = owners[:min(len(owners), maxOwners)]
	for i, ref := range owners {
		if slices.ContainsFunc(owners[:i], func(o metav1.OwnerReference) bool { return o.Kind == ref.Kind && o.Name == ref.Name }) {
			continue
		}
		add(1, with(labels, ref.Kind, ref.Name, strconv.FormatBool(ref.Controller != nil && *ref.Controller))...)
	}
}

func autoscalers() []family {
	scaler := func(name, help string, of func(*autoscalingv2.HorizontalPodAutoscaler, adder), labels ...string) family {
		return gauge("kube_horizontalpodautoscaler_"+name, help, append([]string{"namespace", "horizontalpodautoscaler"}, labels...), func(o *lists, add adder) {
			for _, h := range o.autoscalers {
				of(h, add)
			}
		})
	}
	type hpa = autoscalingv2.HorizontalPodAutoscaler
	return []family{
		scaler("info", "An autoscaler and what it scales.", func(h *hpa, add adder) {
			target := h.Spec.ScaleTargetRef
			add(1, h.Namespace, h.Name, target.APIVersion, target.Kind, target.Name)
		}, "scaletargetref_api_version", "scaletargetref_kind", "scaletargetref_name"),
		scaler("spec_min_replicas", "The fewest pods.", func(h *hpa, add adder) { addNumber(add, h.Spec.MinReplicas, h.Namespace, h.Name) }),
		scaler("spec_max_replicas", "The most pods.", func(h *hpa, add adder) { add(float64(h.Spec.MaxReplicas), h.Namespace, h.Name) }),
		scaler("status_current_replicas", "The pods that there are.", func(h *hpa, add adder) { add(float64(h.Status.CurrentReplicas), h.Namespace, h.Name) }),
		scaler("status_desired_replicas", "The pods that there should be.", func(h *hpa, add adder) { add(float64(h.Status.DesiredReplicas), h.Namespace, h.Name) }),
		statesOf(scaler("status_condition", "The conditions of an autoscaler.", func(h *hpa, add adder) {
			for _, c := range h.Status.Conditions {
				addStatus(add, c.Status, h.Namespace, h.Name, string(c.Type))
			}
		}, "condition", "status")),
	}
}

func jobs() []family {
	job := func(name, help string, of func(*batchv1.Job, adder), labels ...string) family {
		return gauge("kube_job_"+name, help, append([]string{"namespace", "job_name"}, labels...), func(o *lists, add adder) {
			for _, j := range o.jobs {
				of(j, add)
			}
		})
	}
	cronJob := func(name, help string, of func(*batchv1.CronJob, adder), labels ...string) family {
		return gauge("kube_cronjob_"+name, help, append([]string{"namespace", "cronjob"}, labels...), func(o *lists, add adder) {
			for _, j := range o.cronJobs {
				of(j, add)
			}
		})
	}
	condition := func(kind batchv1.JobConditionType) func(*batchv1.Job, adder) {
		return func(j *batchv1.Job, add adder) {
			for _, c := range j.Status.Conditions {
				if c.Type == kind {
					addStatus(add, c.Status, j.Namespace, j.Name)
				}
			}
		}
	}
	return []family{
		job("info", "A Job.", func(j *batchv1.Job, add adder) { add(1, j.Namespace, j.Name) }),
		job("owner", "The owner of a Job.", func(j *batchv1.Job, add adder) { addOwners(add, j.OwnerReferences, j.Namespace, j.Name) }, owner()...),
		job("created", "When a Job was created, in seconds since 1970.", func(j *batchv1.Job, add adder) { addTime(add, &j.CreationTimestamp, j.Namespace, j.Name) }),
		job("spec_completions", "The pods of a Job that should succeed.", func(j *batchv1.Job, add adder) { addNumber(add, j.Spec.Completions, j.Namespace, j.Name) }),
		job("status_active", "The pods of a Job that run.", func(j *batchv1.Job, add adder) { add(float64(j.Status.Active), j.Namespace, j.Name) }),
		job("status_succeeded", "The pods of a Job that have succeeded.", func(j *batchv1.Job, add adder) { add(float64(j.Status.Succeeded), j.Namespace, j.Name) }),
		job("status_failed", "The pods of a Job that have failed, with the reason why it ended.", jobFailed, "reason"),
		job("status_start_time", "When a Job was started, in seconds since 1970.", func(j *batchv1.Job, add adder) { addTime(add, j.Status.StartTime, j.Namespace, j.Name) }),
		job("status_completion_time", "When a Job was complete, in seconds since 1970.", func(j *batchv1.Job, add adder) {
			addTime(add, j.Status.CompletionTime, j.Namespace, j.Name)
		}),
		statesOf(job("complete", "Whether a Job is complete.", condition(batchv1.JobComplete), "condition")),
		statesOf(job("failed", "Whether a Job has failed.", condition(batchv1.JobFailed), "condition")),
		cronJob("info", "A CronJob and its schedule.", func(j *batchv1.CronJob, add adder) {
			zone := "local"
			if j.Spec.TimeZone != nil {
				zone = *j.Spec.TimeZone
			}
			add(1, j.Namespace, j.Name, j.Spec.Schedule, string(j.Spec.ConcurrencyPolicy), zone)
		}, "schedule", "concurrency_policy", "timezone"),
		cronJob("created", "When a CronJob was created, in seconds since 1970.", func(j *batchv1.CronJob, add adder) {
			addTime(add, &j.CreationTimestamp, j.Namespace, j.Name)
		}),
		cronJob("spec_suspend", "Whether a CronJob starts no Jobs.", func(j *batchv1.CronJob, add adder) {
			if j.Spec.Suspend != nil {
				add(boolean(*j.Spec.Suspend), j.Namespace, j.Name)
			}
		}),
		cronJob("status_active", "The Jobs of a CronJob that run.", func(j *batchv1.CronJob, add adder) { add(float64(len(j.Status.Active)), j.Namespace, j.Name) }),
		cronJob("status_last_schedule_time", "When a CronJob last started a Job, in seconds since 1970.", func(j *batchv1.CronJob, add adder) {
			addTime(add, j.Status.LastScheduleTime, j.Namespace, j.Name)
		}),
		cronJob("status_last_successful_time", "When a Job of a CronJob last succeeded, in seconds since 1970.", func(j *batchv1.CronJob, add adder) {
			addTime(add, j.Status.LastSuccessfulTime, j.Namespace, j.Name)
		}),
	}
}

// jobFailed adds a series for each reason for which Kubernetes ends a Job, or the number of failed pods if the Job has another reason or still runs.
func jobFailed(j *batchv1.Job, add adder) {
	if j.Status.Failed == 0 {
		add(0, j.Namespace, j.Name, "")
		return
	}
	known := false
	for _, c := range j.Status.Conditions {
		if c.Type != batchv1.JobFailed {
			continue
		}
		for _, reason := range []string{"BackoffLimitExceeded", "DeadlineExceeded", "Evicted"} {
			is := c.Status == corev1.ConditionTrue && c.Reason == reason
			known = known || is
			add(boolean(is), j.Namespace, j.Name, reason)
		}
	}
	if !known {
		add(float64(j.Status.Failed), j.Namespace, j.Name, "")
	}
}
