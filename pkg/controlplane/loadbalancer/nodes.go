package loadbalancer

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/layout"
)

// readyGrace is how long a node that is no longer Ready keeps its place: a restart of its kubelet must not change every service.
const readyGrace = 30 * time.Second

// node is a node of which services get the addresses, in the order in which they are published.
type node struct {
	name      string
	addresses []netip.Addr
}

// allAddresses returns the addresses of all nodes.
func allAddresses(nodes []node) []netip.Addr {
	var out []netip.Addr
	for _, n := range nodes {
		out = append(out, n.addresses...)
	}
	return out
}

// nodeView selects the nodes whose addresses are published.
type nodeView struct {
	// own is the server's node, with the addresses of its settings, which count until its status has an external one.
	own node
	// internal are the cluster's own networks, in which no node has its address.
	internal []netip.Prefix
	// lastReady is when a node was Ready last.
	lastReady map[types.UID]time.Time
}

// publish returns the nodes whose addresses services get: those that are Ready, servers first, then by name, whichever server leads.
// If next is not zero, the result changes after that time by itself.
//
// Left out are nodes that are being deleted, and those with the label node.kubernetes.io/exclude-from-external-load-balancers. If no
// node is Ready, all the others are returned: an address that may not work is better than none. A node writes its own status, so
// an address that cannot be a node's is ignored, and one that two nodes have is that of the server, which no agent can say to be, or else of
// the older one.
func (v *nodeView) publish(all []*corev1.Node, now time.Time) (nodes []node, next time.Duration) {
	order := slices.SortedFunc(slices.Values(all), func(a, b *corev1.Node) int {
		return cmp.Or(cmp.Compare(v.rank(a), v.rank(b)), a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.UID, b.UID))
	})
	taken := make(map[netip.Addr]bool)
	own := slices.IndexFunc(all, func(n *corev1.Node) bool { return n.Name == v.own.name })
	settings := own < 0 || len(nodeaddress.Of(all[own], corev1.NodeExternalIP, v.internal)) == 0
	if settings {
		for _, a := range v.own.addresses {
			taken[a] = true
		}
	}
	servers := map[string]bool{v.own.name: true}
	seen := make(map[types.UID]bool)
	var ready, notReady []node
	for _, n := range order {
		seen[n.UID] = true
		candidate := node{name: n.Name}
		if v.rank(n) == 0 {
			servers[n.Name] = true
		}
		if n.Name == v.own.name {
			if _, known := v.lastReady[n.UID]; !known {
				v.lastReady[n.UID] = now // it starts with this server
			}
		}
		if n.Name == v.own.name && settings {
			candidate.addresses = slices.Clone(v.own.addresses)
		}
		for _, a := range v.addresses(n) {
			if !taken[a] {
				taken[a] = true
				candidate.addresses = append(candidate.addresses, a)
			}
		}
		isReady := condition.IsNodeReady(n)
		if isReady {
			v.lastReady[n.UID] = now
		}
		if _, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]; excluded || n.DeletionTimestamp != nil {
			continue
		}
		last, known := v.lastReady[n.UID]
		left := readyGrace - now.Sub(last)
		if !known || left <= 0 {
			notReady = append(notReady, candidate)
			continue
		}
		ready = append(ready, candidate)
		if !isReady && (next == 0 || left < next) {
			next = left
		}
	}
	for uid := range v.lastReady {
		if !seen[uid] {
			delete(v.lastReady, uid)
		}
	}
	if own < 0 {
		ready = append(ready, v.own)
	}
	if len(ready) == 0 {
		ready = notReady
	}
	place := func(n node) int {
		if servers[n.name] {
			return 0
		}
		return 1
	}
	slices.SortFunc(ready, func(a, b node) int { return cmp.Or(cmp.Compare(place(a), place(b)), cmp.Compare(a.name, b.name)) })
	return ready, next
}

// rank is rank, and 0 for the own node, which may not have its label yet.
func (v *nodeView) rank(n *corev1.Node) int {
	if n.Name == v.own.name {
		return 0
	}
	return rank(n)
}

// rank is 0 for a server's node, by a label that NodeRestriction keeps nodes from setting, and 1 for another.
func rank(n *corev1.Node) int {
	if _, ok := n.Labels[layout.ServerLabel]; ok {
		return 0
	}
	return 1
}

// addresses returns the external addresses in a node's status, then the internal ones. Behind NAT, packets arrive with the internal
// one, so both are needed.
func (v *nodeView) addresses(n *corev1.Node) []netip.Addr {
	var out []netip.Addr
	for _, kind := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, a := range nodeaddress.Of(n, kind, v.internal) {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// endpointNodes returns the nodes that have a ready endpoint of a service.
func endpointNodes(lister discoverylisters.EndpointSliceLister, svc *corev1.Service) (map[string]bool, error) {
	list, err := lister.EndpointSlices(svc.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: svc.Name}))
	if err != nil {
		return nil, err
	}
	nodes := make(map[string]bool)
	for _, slice := range list {
		for _, e := range slice.Endpoints {
			// No condition means ready (k8s.io/api/discovery/v1, EndpointConditions).
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				nodes[*e.NodeName] = true
			}
		}
	}
	return nodes, nil
}

// trimmed keeps the caches small: of each object only what is used stays.
func trimmed(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Service:
		o.ManagedFields = nil
	case *corev1.Node:
		return &corev1.Node{ObjectMeta: keptMeta(o.ObjectMeta), Spec: corev1.NodeSpec{Unschedulable: o.Spec.Unschedulable}, Status: corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: o.Status.Conditions}}, nil
	case *discoveryv1.EndpointSlice:
		kept := &discoveryv1.EndpointSlice{ObjectMeta: keptMeta(o.ObjectMeta)}
		for _, e := range o.Endpoints {
			kept.Endpoints = append(kept.Endpoints, discoveryv1.Endpoint{NodeName: e.NodeName, Conditions: e.Conditions})
		}
		return kept, nil
	}
	return obj, nil
}

func keptMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: m.Labels,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
	}
}
