package bridge

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ownRange is a range of addresses that an instance outside has no reason to be at.
type ownRange struct {
	netip.Prefix
	what string
}

// linkLocal holds the metadata services of clouds (169.254.169.254), which give out credentials.
var linkLocal = []ownRange{
	{netip.MustParsePrefix("169.254.0.0/16"), "a link-local address"},
	{netip.MustParsePrefix("fe80::/10"), "a link-local address"},
}

// ownRanges are the addresses of the cluster itself: of its nodes, pods and Services, the API server's among them.
func (c *cluster) ownRanges(ctx context.Context) ([]ownRange, error) {
	var ranges []ownRange
	add := func(what string, texts ...string) {
		for _, text := range texts {
			prefix, err := netip.ParsePrefix(text)
			if err != nil {
				var address netip.Addr
				if address, err = netip.ParseAddr(text); err == nil {
					prefix = netip.PrefixFrom(address.Unmap(), address.Unmap().BitLen())
				}
			}
			if err == nil {
				ranges = append(ranges, ownRange{prefix.Masked(), what})
			}
		}
	}
	nodes, err := c.core.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the nodes, whose addresses no instance may have: %w", err)
	}
	for _, node := range nodes.Items {
		add("a pod's address", node.Spec.PodCIDRs...)
		for _, a := range node.Status.Addresses {
			if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
				add("the address of node "+node.Name, a.Address)
			}
		}
	}
	cidrs, err := c.core.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{})
	if err == nil {
		for _, cidr := range cidrs.Items {
			add("the address of a Service", cidr.Spec.CIDRs...)
		}
		return ranges, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("list the ServiceCIDRs, whose addresses no instance may have: %w", err)
	}
	// Before Kubernetes 1.33 only the addresses that are given out can be seen.
	services, err := c.core.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the Services, whose addresses no instance may have: %w", err)
	}
	for _, s := range services.Items {
		for _, address := range s.Spec.ClusterIPs {
			if address != corev1.ClusterIPNone {
				add("the address of a Service", address)
			}
		}
	}
	return ranges, nil
}

// refuse says why the mesh must not send requests to an address that a registry names, or nothing. Of the ranges that hold an
// address the smallest counts, and of two alike the one that the user allows.
func (o Options) refuse(address netip.Addr, own []ownRange) string {
	switch {
	case address.IsLoopback() || address.IsUnspecified():
		return fmt.Sprintf("%s means another machine to everyone: set eureka.instance.ip-address, spring.cloud.consul.discovery.ip-address, or their like", address)
	case address.IsMulticast() || address == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || address.Zone() != "":
		return fmt.Sprintf("%s is not the address of one machine", address)
	}
	allowed, denied, what := -1, -1, ""
	for _, prefix := range o.Allow {
		if prefix.Contains(address) {
			allowed = max(allowed, prefix.Bits())
		}
	}
	for _, ranges := range [][]ownRange{linkLocal, own} {
		for _, r := range ranges {
			if r.Contains(address) && r.Bits() > denied {
				denied, what = r.Bits(), r.what
			}
		}
	}
	switch {
	case denied > allowed:
		return fmt.Sprintf("%s is %s: only --allow-cidr with a range as small as %s lets it in", address, what, netip.PrefixFrom(address, denied).Masked())
	case allowed < 0 && len(o.Allow) > 0:
		return fmt.Sprintf("%s is in none of the ranges of --allow-cidr", address)
	}
	return ""
}
