// Package nodeaddress reads the addresses in the status of nodes, which each node chooses for itself. The load balancer publishes
// them, CoreDNS resolves nodes' names to them, and API servers and nodes connect to them.
package nodeaddress

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// Of returns a node's addresses of a kind, without duplicates. It leaves out what cannot be a node's address, such as loopback, and
// what is internal: the networks of pods and services.
func Of(n *corev1.Node, kind corev1.NodeAddressType, internal []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, address := range n.Status.Addresses {
		a, err := netip.ParseAddr(address.Address)
		if address.Type != kind || err != nil || a.Zone() != "" {
			continue
		}
		a = a.Unmap()
		inside := slices.ContainsFunc(internal, func(p netip.Prefix) bool { return p.Contains(a) })
		if a.IsGlobalUnicast() && !inside && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// Preferred returns the kinds of addresses at which a node is reached, the preferred one first. external is whether nodes see each other by
// their external addresses (--flannel-external-ip).
func Preferred(external bool) []corev1.NodeAddressType {
	if external {
		return []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP}
	}
	return []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP}
}
