package loadbalancer

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"

	"polymesh.dev/polymesh/pkg/node/announce"
)

func isLocal(svc *corev1.Service) bool {
	return svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// requestOf returns what a service requests and, from its status, what it was given.
func requestOf(svc *corev1.Service) service {
	s := service{
		uid: svc.UID, name: svc.Namespace + "/" + svc.Name, created: svc.CreationTimestamp.Time,
		families: svc.Spec.IPFamilies, requested: svc.Spec.LoadBalancerIP,
		local:     isLocal(svc),
		heldPorts: make(map[Port]bool), announcer: svc.Annotations[announce.Annotation],
	}
	for _, p := range svc.Spec.Ports {
		s.ports = append(s.ports, Port{p.Protocol, p.Port})
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(in.IP); err == nil {
			s.heldAddresses = append(s.heldAddresses, a)
		}
		for _, p := range in.Ports {
			s.heldPorts[Port{p.Protocol, p.Port}] = true
		}
	}
	return s
}

// ingress returns the status of a service with what it was given. With the nodes' addresses it includes the ports: they record
// which service has them, also after a restart or a change of a node's address.
func ingress(d decision, ports []Port, pool bool) []corev1.LoadBalancerIngress {
	var out []corev1.LoadBalancerIngress
	mode := corev1.LoadBalancerIPModeVIP
	for _, a := range d.addresses {
		in := corev1.LoadBalancerIngress{IP: a.String(), IPMode: &mode}
		if !pool {
			for _, p := range ports {
				in.Ports = append(in.Ports, corev1.PortStatus{Port: p.Number, Protocol: p.Protocol})
			}
		}
		out = append(out, in)
	}
	return out
}

// inBoth returns the entries of have with an address that want has too.
func inBoth(have, want []corev1.LoadBalancerIngress) []corev1.LoadBalancerIngress {
	var out []corev1.LoadBalancerIngress
	for _, in := range have {
		if slices.ContainsFunc(want, func(w corev1.LoadBalancerIngress) bool { return w.IP == in.IP }) {
			out = append(out, in)
		}
	}
	return out
}

// nodePorts returns the node ports of all services. The nftables proxy checks load balancer addresses first, so a service on such
// a port would make the node port unreachable.
func nodePorts(lister corelisters.ServiceLister) (map[Port]string, error) {
	all, err := lister.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	ports := make(map[Port]string)
	for _, svc := range all {
		for _, p := range svc.Spec.Ports {
			if p.NodePort != 0 {
				ports[Port{p.Protocol, p.NodePort}] = svc.Namespace + "/" + svc.Name
			}
		}
	}
	return ports, nil
}
