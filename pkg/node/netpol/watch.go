package netpol

import (
	"context"
	"net/netip"
	"slices"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	coreinformers "k8s.io/client-go/informers/core/v1"
	networkinginformers "k8s.io/client-go/informers/networking/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// staticUID is the annotation of a mirror pod with the id by which the kubelet, and so the pod network, knows the static pod
// (ConfigHashAnnotationKey in k8s.io/kubernetes, pkg/kubelet/types).
const staticUID = "kubernetes.io/config.hash"

// source is a watched kind of objects.
type source struct {
	cache.SharedIndexInformer
	what string
	// failure is the last error of its watch; nil if there was none.
	failure atomic.Pointer[error]
}

// sources are what the rules are compiled from. Pods and namespaces are watched from the first NetworkPolicy on: a cluster without
// any pays nothing for them.
type sources struct {
	policies, namespaces, pods *source
}

func newSources(client kubernetes.Interface, changed func()) (s sources, err error) {
	for _, k := range []struct {
		to        **source
		what      string
		informer  cache.SharedIndexInformer
		transform cache.TransformFunc
	}{
		{&s.policies, "NetworkPolicies", networkinginformers.NewNetworkPolicyInformer(client, metav1.NamespaceAll, 0, nil), stripPolicy},
		{&s.namespaces, "Namespaces", coreinformers.NewNamespaceInformer(client, 0, nil), stripNamespace},
		{&s.pods, "Pods", coreinformers.NewPodInformer(client, metav1.NamespaceAll, 0, nil), stripPod},
	} {
		src := &source{SharedIndexInformer: k.informer, what: k.what}
		*k.to = src
		if err := src.SetTransform(k.transform); err != nil {
			return s, err
		}
		if err := src.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			src.failure.Store(&err)
			changed() // so that the state shows it
		}); err != nil {
			return s, err
		}
		if _, err := src.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { changed() },
			UpdateFunc: func(old, now any) {
				if !same(old, now) {
					changed()
				}
			},
			DeleteFunc: func(any) { changed() },
		}); err != nil {
			return s, err
		}
	}
	return s, nil
}

// waiting is the error for a source that has not been listed yet.
type waiting struct {
	what    string
	failure error // of the last request; nil if none failed
}

func (w waiting) Error() string {
	text := "waiting for the list of " + w.what
	if w.failure != nil {
		text += ": " + w.failure.Error()
	}
	return text
}

func (s *source) waiting() error {
	if s.HasSynced() {
		return nil
	}
	w := waiting{what: s.what}
	if failure := s.failure.Load(); failure != nil {
		w.failure = *failure
	}
	return w
}

// same reports whether two versions of an object are equal in all that was kept of them: most updates of a pod are of its status.
func same(old, now any) bool {
	switch old := old.(type) {
	case *networkingv1.NetworkPolicy:
		return equality.Semantic.DeepEqual(old.Spec, now.(*networkingv1.NetworkPolicy).Spec)
	case *corev1.Namespace:
		return equality.Semantic.DeepEqual(old.Labels, now.(*corev1.Namespace).Labels)
	case *corev1.Pod:
		now := now.(*corev1.Pod)
		return old.UID == now.UID && equality.Semantic.DeepEqual(old.Labels, now.Labels) && equality.Semantic.DeepEqual(old.Annotations, now.Annotations) &&
			equality.Semantic.DeepEqual(old.Spec, now.Spec) && equality.Semantic.DeepEqual(old.Status, now.Status)
	}
	return false
}

func meta(o metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: o.Labels}
}

// The transforms keep what the rules are compiled from: of a pod, some hundred bytes of several thousand.

func stripPolicy(o any) (any, error) {
	if p, ok := o.(*networkingv1.NetworkPolicy); ok {
		return &networkingv1.NetworkPolicy{ObjectMeta: meta(p.ObjectMeta), Spec: p.Spec}, nil
	}
	return o, nil
}

func stripNamespace(o any) (any, error) {
	if n, ok := o.(*corev1.Namespace); ok {
		return &corev1.Namespace{ObjectMeta: meta(n.ObjectMeta)}, nil
	}
	return o, nil
}

func stripPod(o any) (any, error) {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return o, nil
	}
	kept := &corev1.Pod{
		ObjectMeta: meta(p.ObjectMeta),
		Spec:       corev1.PodSpec{NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork},
		Status:     corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs, StartTime: p.Status.StartTime},
	}
	if uid, ok := p.Annotations[staticUID]; ok {
		kept.Annotations = map[string]string{staticUID: uid}
	}
	ports := func(c corev1.Container) {
		for _, port := range c.Ports {
			if port.Name != "" {
				if len(kept.Spec.Containers) == 0 {
					kept.Spec.Containers = make([]corev1.Container, 1)
				}
				kept.Spec.Containers[0].Ports = append(kept.Spec.Containers[0].Ports,
					corev1.ContainerPort{Name: port.Name, Protocol: port.Protocol, ContainerPort: port.ContainerPort})
			}
		}
	}
	for _, c := range p.Spec.Containers {
		ports(c)
	}
	for _, c := range p.Spec.InitContainers {
		// A sidecar's ports count, as for Services (FindPort in k8s.io/kubernetes, pkg/api/v1/pod/util.go).
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			ports(c)
		}
	}
	return kept, nil
}

// cluster returns the state for Compile. attached are the pods of this node on its network.
func (s sources) cluster(node string, attached []attachment) Cluster {
	c := Cluster{Namespaces: map[string]labels.Set{}}
	for _, o := range s.policies.GetStore().List() {
		c.Policies = append(c.Policies, o.(*networkingv1.NetworkPolicy))
	}
	for _, o := range s.namespaces.GetStore().List() {
		ns := o.(*corev1.Namespace)
		c.Namespaces[ns.Name] = ns.Labels
	}
	var pods []*corev1.Pod
	for _, o := range s.pods.GetStore().List() {
		pods = append(pods, o.(*corev1.Pod))
	}
	c.Pods = running(pods, node, attached)
	return c
}

// running returns the pods with an address of their own that have not ended, and their addresses. Each address is of one pod: a
// new pod may have that of one which has ended and is still stored. On this node the network's own records decide, elsewhere the
// pod that has started last.
func running(pods []*corev1.Pod, node string, attached []attachment) []Pod {
	type key struct{ namespace, name string }
	records := map[key][]attachment{}
	taken := map[netip.Addr]bool{}
	for _, a := range attached {
		k := key{a.namespace, a.name}
		records[k] = append(records[k], a)
		for _, addr := range a.addresses {
			taken[addr] = true
		}
	}
	var out []Pod
	owners := map[netip.Addr]*corev1.Pod{}
	addresses := map[*corev1.Pod][]netip.Addr{}
	for _, p := range pods {
		if p.Spec.HostNetwork || p.Spec.NodeName == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		if p.Spec.NodeName == node {
			for _, a := range records[key{p.Namespace, p.Name}] {
				if static, ok := p.Annotations[staticUID]; a.uid == string(p.UID) || ok && a.uid == static {
					addresses[p] = append(addresses[p], a.addresses...)
				}
			}
		}
		if len(addresses[p]) > 0 {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			addr, err := netip.ParseAddr(ip.IP)
			if err != nil || !addr.Is4() || taken[addr] {
				continue
			}
			if other := owners[addr]; other != nil && !startedAfter(p, other) {
				continue
			}
			owners[addr] = p
		}
	}
	for addr, p := range owners {
		addresses[p] = append(addresses[p], addr)
	}
	for _, p := range pods {
		if len(addresses[p]) == 0 {
			continue
		}
		pod := Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, Addresses: addresses[p], Local: p.Spec.NodeName == node}
		slices.SortFunc(pod.Addresses, netip.Addr.Compare)
		for _, c := range p.Spec.Containers {
			for _, port := range c.Ports {
				pod.Ports = append(pod.Ports, NamedPort{port.Name, port.Protocol, uint16(port.ContainerPort)})
			}
		}
		out = append(out, pod)
	}
	return out
}

func startedAfter(a, b *corev1.Pod) bool {
	if a.Status.StartTime == nil || b.Status.StartTime == nil {
		return a.Status.StartTime != nil
	}
	return a.Status.StartTime.After(b.Status.StartTime.Time)
}
