package announce

import (
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/config"
)

func TestServes(t *testing.T) {
	ours, others := Class, "example.com/lb"
	for _, tt := range []struct {
		spec corev1.ServiceSpec
		want bool
	}{
		{corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}, true},
		{corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: &ours}, true},
		{corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: &others}, false},
		{corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort}, false},
		{corev1.ServiceSpec{}, false},
	} {
		if got := Serves(&corev1.Service{Spec: tt.spec}); got != tt.want {
			t.Errorf("%+v: %t", tt.spec, got)
		}
	}
}

// A node has the addresses of the pool that are assigned to it, and no others, although users may write a Service's annotation or status.
func TestAssigned(t *testing.T) {
	others := "example.com/lb"
	service := func(by string, change func(*corev1.Service), addresses ...string) *corev1.Service {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{Annotation: by}}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}
		for _, a := range addresses {
			svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
		}
		if change != nil {
			change(svc)
		}
		kept, err := trimmed(svc)
		if err != nil {
			t.Fatal(err)
		}
		return kept.(*corev1.Service)
	}
	services := []*corev1.Service{
		service("me", nil, "192.0.2.102"),
		service("me", nil, "192.0.2.101", "192.0.2.1", "10.0.0.1", "x", ""),
		service("me", nil, "192.0.2.101"),
		service("me", func(s *corev1.Service) { s.Spec.LoadBalancerClass = &others }, "192.0.2.103"),
		service("me", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP }, "192.0.2.104"),
		service("other", nil, "192.0.2.105"),
		service("", nil, "192.0.2.106"),
		service("me", nil),
	}
	pool := []config.AddressRange{{From: netip.MustParseAddr("192.0.2.100"), To: netip.MustParseAddr("192.0.2.200")}}
	want := addrs("192.0.2.101", "192.0.2.102")
	if got := assigned(services, "me", pool); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := assigned(services, "me", nil); got != nil {
		t.Errorf("without a pool: %v", got)
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}
