package bridge

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ownRange is a range of addresses that instances outside the cluster should not have.
type ownRange struct {
	netip.Prefix
	what string
}

// linkLocal contains the metadata services of clouds (169.254.169.254), which hand out credentials.
var linkLocal = []ownRange{
	{netip.MustParsePrefix("169.254.0.0/16"), "a link-local address"},
	{netip.MustParsePrefix("fe80::/10"), "a link-local address"},
}

// ownRanges returns the addresses of the cluster itself: of nodes, pods and Services, including the API server's.
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
		return nil, fmt.Errorf("list the nodes, to exclude their addresses: %w", err)
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
		return nil, fmt.Errorf("list the ServiceCIDRs, to exclude their addresses: %w", err)
	}
	// Before Kubernetes 1.33 only the allocated addresses are visible.
	services, err := c.core.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the Services, to exclude their addresses: %w", err)
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

// refuse returns why the mesh must not send requests to an address from a registry, or "". The smallest range that contains the
// address decides; if two are equal, the one that the user allows.
func (o Options) refuse(address netip.Addr, own []ownRange) string {
	switch {
	case address.IsLoopback() || address.IsUnspecified():
		return fmt.Sprintf("%s refers to a different machine for every caller: set eureka.instance.ip-address, spring.cloud.consul.discovery.ip-address, or the equivalent", address)
	case address.IsMulticast() || address == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || address.Zone() != "":
		return fmt.Sprintf("%s is not the address of a single machine", address)
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
		return fmt.Sprintf("%s is %s: to allow it, use --allow-cidr with a range no larger than %s", address, what, netip.PrefixFrom(address, denied).Masked())
	case allowed < 0 && len(o.Allow) > 0:
		return fmt.Sprintf("%s is not in any range of --allow-cidr", address)
	}
	return ""
}
