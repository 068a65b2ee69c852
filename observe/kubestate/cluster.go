package kubestate

import (
	"maps"
	"math"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// role is the prefix of the labels with a node's roles.
const role = "node-role.kubernetes.io/"

func nodes() []family {
	each := func(of func(*corev1.Node, adder)) func(*lists, adder) {
		return func(o *lists, add adder) {
			for _, n := range o.nodes {
				of(n, add)
			}
		}
	}
	resources := []string{"node", "resource", "unit"}
	return []family{
		gauge("kube_node_info", "A node and its versions.", []string{
			"node", "kernel_version", "os_image", "container_runtime_version", "kubelet_version", "kubeproxy_version", "provider_id", "pod_cidr", "system_uuid", "internal_ip",
		}, each(func(n *corev1.Node, add adder) {
			ip := ""
			for _, a := range n.Status.Addresses {
				if a.Type == corev1.NodeInternalIP {
					ip = a.Address
				}
			}
			i := n.Status.NodeInfo
			add(1, n.Name, i.KernelVersion, i.OSImage, i.ContainerRuntimeVersion, i.KubeletVersion, "deprecated", n.Spec.ProviderID, n.Spec.PodCIDR, i.SystemUUID, ip)
		})),
		gauge("kube_node_created", "When a node was created, in seconds since 1970.", []string{"node"}, each(func(n *corev1.Node, add adder) {
			addTime(add, &n.CreationTimestamp, n.Name)
		})),
		gauge("kube_node_role", "The roles of a node.", []string{"node", "role"}, each(func(n *corev1.Node, add adder) {
			for _, name := range slices.Sorted(maps.Keys(n.Labels)) {
				if r, ok := strings.CutPrefix(name, role); ok {
					add(1, n.Name, r)
				}
			}
		})),
		gauge("kube_node_spec_unschedulable", "Whether a node gets no new pods.", []string{"node"}, each(func(n *corev1.Node, add adder) {
			add(boolean(n.Spec.Unschedulable), n.Name)
		})),
		gauge("kube_node_spec_taint", "The taints of a node.", []string{"node", "key", "value", "effect"}, each(func(n *corev1.Node, add adder) {
			for _, t := range n.Spec.Taints {
				add(1, n.Name, t.Key, t.Value, string(t.Effect))
			}
		})),
		statesOf(gauge("kube_node_status_condition", "The conditions of a node.", []string{"node", "condition", "status"}, each(func(n *corev1.Node, add adder) {
			for _, c := range n.Status.Conditions {
				addStatus(add, c.Status, n.Name, string(c.Type))
			}
		}))),
		gauge("kube_node_status_capacity", "What a node has.", resources, each(func(n *corev1.Node, add adder) {
			addResources(add, n.Status.Capacity, true, n.Name)
		})),
		gauge("kube_node_status_allocatable", "What a node has for pods.", resources, each(func(n *corev1.Node, add adder) {
			addResources(add, n.Status.Allocatable, true, n.Name)
		})),
	}
}

func namespaces() []family {
	return []family{
		gauge("kube_namespace_created", "When a namespace was created, in seconds since 1970.", []string{"namespace"}, func(o *lists, add adder) {
			for _, n := range o.namespaces {
				addTime(add, &n.CreationTimestamp, n.Name)
			}
		}),
		statesOf(gauge("kube_namespace_status_phase", "The phase of a namespace.", []string{"namespace", "phase"}, func(o *lists, add adder) {
			for _, n := range o.namespaces {
				for _, phase := range []corev1.NamespacePhase{corev1.NamespaceActive, corev1.NamespaceTerminating} {
					add(boolean(n.Status.Phase == phase), n.Name, string(phase))
				}
			}
		})),
	}
}

func services() []family {
	return []family{
		gauge("kube_service_info", "A service and its addresses.", []string{
			"namespace", "service", "uid", "cluster_ip", "external_name", "external_traffic_policy", "load_balancer_ip",
		}, func(o *lists, add adder) {
			for _, s := range o.services {
				add(1, s.Namespace, s.Name, string(s.UID), s.Spec.ClusterIP, s.Spec.ExternalName, string(s.Spec.ExternalTrafficPolicy), s.Spec.LoadBalancerIP)
			}
		}),
		gauge("kube_service_spec_type", "The type of a service.", []string{"namespace", "service", "uid", "type"}, func(o *lists, add adder) {
			for _, s := range o.services {
				add(1, s.Namespace, s.Name, string(s.UID), string(s.Spec.Type))
			}
		}),
	}
}

func claims() []family {
	claim := []string{"namespace", "persistentvolumeclaim"}
	return []family{
		gauge("kube_persistentvolumeclaim_info", "A claim of a volume.", append(slices.Clone(claim), "storageclass", "volumename", "volumemode"), func(o *lists, add adder) {
			for _, c := range o.claims {
				class, found := c.Annotations[corev1.BetaStorageClassAnnotation]
				if !found && c.Spec.StorageClassName != nil {
					class = *c.Spec.StorageClassName
				}
				mode := ""
				if c.Spec.VolumeMode != nil {
					mode = string(*c.Spec.VolumeMode)
				}
				add(1, c.Namespace, c.Name, class, c.Spec.VolumeName, mode)
			}
		}),
		statesOf(gauge("kube_persistentvolumeclaim_status_phase", "The phase of a claim.", append(slices.Clone(claim), "phase"), func(o *lists, add adder) {
			for _, c := range o.claims {
				for _, phase := range []corev1.PersistentVolumeClaimPhase{corev1.ClaimPending, corev1.ClaimBound, corev1.ClaimLost} {
					add(boolean(c.Status.Phase == phase), c.Namespace, c.Name, string(phase))
				}
			}
		})),
		gauge("kube_persistentvolumeclaim_resource_requests_storage_bytes", "The size that a claim asks for.", claim, func(o *lists, add adder) {
			for _, c := range o.claims {
				if size, ok := c.Spec.Resources.Requests[corev1.ResourceStorage]; ok {
					add(float64(size.Value()), c.Namespace, c.Name)
				}
			}
		}),
	}
}

// addStatus adds a series for each status that a condition can have, 1 for the one that it has.
func addStatus(add adder, status corev1.ConditionStatus, labels ...string) {
	for _, s := range []corev1.ConditionStatus{corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionUnknown} {
		add(boolean(status == s), with(labels, strings.ToLower(string(s)))...)
	}
}

// addTime adds a time, if there is one.
func addTime(add adder, t *metav1.Time, labels ...string) {
	if t != nil && !t.IsZero() {
		add(float64(t.Unix()), labels...)
	}
}

func addNumber(add adder, n *int32, labels ...string) {
	if n != nil {
		add(float64(*n), labels...)
	}
}

// maxResources bounds the resources of a container or node: users may request as many extended ones as they like.
const maxResources = 16

// addResources adds amounts with the labels resource and unit. Only a node has pods.
func addResources(add adder, list corev1.ResourceList, node bool, labels ...string) {
	n := 0
	for _, name := range slices.Sorted(maps.Keys(list)) {
		unit := unitOf(name, node)
		if unit == "" {
			continue
		}
		if n++; n > maxResources {
			return
		}
		add(float(list[name]), with(labels, sanitize(string(name)), unit)...)
	}
}

// float converts an amount through thousandths: otherwise 1900m would become 1.9000000000000001.
func float(amount resource.Quantity) float64 {
	if v := amount.Value(); v > math.MaxInt64/1000 || v < math.MinInt64/1000 {
		return float64(v)
	}
	return float64(amount.MilliValue()) / 1000
}

func unitOf(name corev1.ResourceName, node bool) string {
	switch {
	case name == corev1.ResourceCPU:
		return "core"
	case name == corev1.ResourceMemory, name == corev1.ResourceEphemeralStorage, name == corev1.ResourceStorage,
		strings.HasPrefix(string(name), corev1.ResourceHugePagesPrefix), strings.HasPrefix(string(name), corev1.ResourceAttachableVolumesPrefix):
		return "byte"
	case name == corev1.ResourcePods && node:
		return "integer"
	// An extended resource: its name has a domain that is not Kubernetes' own.
	case strings.Contains(string(name), "/") && !strings.Contains(string(name), corev1.ResourceDefaultNamespacePrefix):
		return "integer"
	}
	return ""
}

// sanitize turns a resource's name into a value for a label.
func sanitize(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, name)
}

func with(labels []string, more ...string) []string {
	return append(labels[:len(labels):len(labels)], more...)
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
