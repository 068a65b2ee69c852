package loadbalancer

import (
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/node/announce"
)

// A restart must read back what was given.
func TestStatusIsTheMemory(t *testing.T) {
	given := []Port{tcp(80), udp(53)}
	d := decision{addresses: []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("192.0.2.10")}}
	svc := &corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}, {Port: 53, Protocol: corev1.ProtocolUDP}}}}
	svc.Status.LoadBalancer.Ingress = ingress(d, given, false)
	svc.Annotations = map[string]string{announce.Annotation: "node-2"}
	s := requestOf(svc)
	if !slices.Equal(s.heldAddresses, d.addresses) || s.countHeld() != len(given) || s.announcer != "node-2" {
		t.Errorf("read back %+v", s)
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if in.IPMode == nil || *in.IPMode != corev1.LoadBalancerIPModeVIP {
			t.Errorf("IP mode of %s is not VIP", in.IP)
		}
	}
	if in := ingress(d, given, true); len(in[0].Ports) != 0 {
		t.Errorf("an address of the pool has ports: %v", in)
	}
	if in := ingress(decision{reason: reasonPortTaken}, given, false); in != nil {
		t.Errorf("a pending service has %v", in)
	}
}
