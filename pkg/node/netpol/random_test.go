package netpol

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Few values of each kind, so that random selectors and packets often meet.
var (
	randomNamespaces = []string{"a", "b", "c"}
	randomPorts      = []int32{79, 80, 81, 443, 8080}
	randomNames      = []string{"http", "dns", "none"}
	randomBlocks     = []string{"0.0.0.0/0", "10.42.0.0/16", "10.42.0.0/24", "10.42.1.0/24", "10.42.0.2/31", "10.42.0.4/32", "198.18.0.0/24", "198.18.0.2/32", "2001:db8::/32"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func randomLabels(r *rand.Rand) labels.Set {
	set := labels.Set{}
	for _, key := range []string{"app", "track"} {
		if r.IntN(4) > 0 {
			set[key] = pick(r, []string{"x", "y", "z"})
		}
	}
	return set
}

func randomSelector(r *rand.Rand) metav1.LabelSelector {
	var s metav1.LabelSelector
	if r.IntN(3) == 0 {
		return s
	}
	if r.IntN(2) == 0 {
		s.MatchLabels = randomLabels(r)
	}
	if r.IntN(2) == 0 {
		e := metav1.LabelSelectorRequirement{Key: pick(r, []string{"app", "track", "no"}),
			Operator: pick(r, []metav1.LabelSelectorOperator{metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist})}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = []string{"x", "y", "z"}[r.IntN(2) : 2+r.IntN(2)]
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func randomPeers(r *rand.Rand) []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	for range r.IntN(4) {
		var p networkingv1.NetworkPolicyPeer
		pods, namespaces := randomSelector(r), randomSelector(r)
		switch r.IntN(4) {
		case 0:
			p.PodSelector = &pods
		case 1:
			p.NamespaceSelector = &namespaces
		case 2:
			p.PodSelector, p.NamespaceSelector = &pods, &namespaces
		case 3:
			p.IPBlock = &networkingv1.IPBlock{CIDR: pick(r, randomBlocks)}
			for range r.IntN(3) {
				// As the API server requires, within the block.
				whole, part := netip.MustParsePrefix(p.IPBlock.CIDR), netip.MustParsePrefix(pick(r, randomBlocks))
				if whole.Overlaps(part) && part.Bits() > whole.Bits() {
					p.IPBlock.Except = append(p.IPBlock.Except, part.String())
				}
			}
		}
		out = append(out, p)
	}
	return out
}

var randomProtocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}

func randomPolicyPorts(r *rand.Rand) []networkingv1.NetworkPolicyPort {
	var out []networkingv1.NetworkPolicyPort
	for range r.IntN(3) {
		protocol := pick(r, randomProtocols)
		p := networkingv1.NetworkPolicyPort{Protocol: &protocol}
		number, name := intstr.FromInt32(pick(r, randomPorts)), intstr.FromString(pick(r, randomNames))
		switch r.IntN(4) {
		case 0:
			p.Port = &number
		case 1:
			end := number.IntVal + int32(r.IntN(3))
			p.Port, p.EndPort = &number, &end
		case 2:
			p.Port = &name
		}
		out = append(out, p)
	}
	return out
}

// randomPolicy is a policy as the API server stores it.
func randomPolicy(r *rand.Rand, i int) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, randomNamespaces), Name: fmt.Sprint("p", i)}}
	p.Spec.PodSelector = randomSelector(r)
	p.Spec.PolicyTypes = pick(r, [][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}})
	for range r.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: randomPeers(r), Ports: randomPolicyPorts(r)})
	}
	for range r.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: randomPeers(r), Ports: randomPolicyPorts(r)})
	}
	return p
}

// randomCluster has pods with the addresses 10.42.0.2 to .5, of this node, and 10.42.1.2 and .3, of another one.
func randomCluster(r *rand.Rand) Cluster {
	c := Cluster{Namespaces: map[string]labels.Set{}}
	for _, ns := range randomNamespaces {
		c.Namespaces[ns] = randomLabels(r)
	}
	for i, address := range []string{"10.42.0.2", "10.42.0.3", "10.42.0.4", "10.42.0.5", "10.42.1.2", "10.42.1.3"} {
		pod := Pod{Namespace: pick(r, randomNamespaces), Name: fmt.Sprint("pod-", i), Labels: randomLabels(r), Addresses: []netip.Addr{netip.MustParseAddr(address)}, Local: i < 4}
		for range r.IntN(3) {
			pod.Ports = append(pod.Ports, NamedPort{pick(r, randomNames[:2]), pick(r, randomProtocols), uint16(pick(r, randomPorts))})
		}
		c.Pods = append(c.Pods, pod)
	}
	for i := range r.IntN(6) {
		c.Policies = append(c.Policies, randomPolicy(r, i))
	}
	return c
}
