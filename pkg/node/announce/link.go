package announce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// setAddresses gives the interface exactly these addresses, each with its full length, and removes the interface if there are
// none. The kernel then responds to ARP for them on every interface (arp_ignore 0, its default), and accepts packets to them,
// which kube-proxy forwards. It is a bridge without ports, because the pod network needs bridges anyway, and dummy interfaces
// need another kernel module. The kernel removes an address after its lifetime, if it is not set again; 0 is forever. It returns the
// addresses that the interface did not have.
//
// The interface has the alias, by which `polymesh reset` recognizes it. One without an alias is of an earlier version.
func setAddresses(alias string, want []netip.Addr, lifetime time.Duration) (added []netip.Addr, err error) {
	link, err := netlink.LinkByName(layout.PoolLink)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		if len(want) == 0 {
			return nil, nil
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = layout.PoolLink
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return nil, fmt.Errorf("create network interface %s: %w", layout.PoolLink, err)
		}
		link, err = netlink.LinkByName(layout.PoolLink)
	}
	if err != nil {
		return nil, fmt.Errorf("look up network interface %s: %w", layout.PoolLink, err)
	}
	if have := link.Attrs().Alias; have != "" && have != alias {
		if len(want) == 0 {
			return nil, nil
		}
		return nil, fmt.Errorf("network interface %s is another server's (%q): run one server in a network namespace, or remove it with `ip link delete %s`", layout.PoolLink, have, layout.PoolLink)
	}
	if len(want) == 0 {
		if err := netlink.LinkDel(link); err != nil {
			return nil, fmt.Errorf("remove network interface %s: %w", layout.PoolLink, err)
		}
		return nil, nil
	}
	// A new one has none yet: the kernel accepts an alias only for an existing interface.
	if link.Attrs().Alias == "" {
		if err := netlink.LinkSetAlias(link, alias); err != nil {
			return nil, fmt.Errorf("mark network interface %s: %w", layout.PoolLink, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring up network interface %s: %w", layout.PoolLink, err)
	}
	have, err := addressesOf(link)
	if err != nil {
		return nil, err
	}
	for _, a := range have {
		if slices.Contains(want, a) || a.IsLinkLocalUnicast() {
			continue
		}
		// One whose lifetime has just ended is gone.
		if err := netlink.AddrDel(link, &netlink.Addr{IPNet: hostNet(a)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil, fmt.Errorf("remove address %s from network interface %s: %w", a, layout.PoolLink, err)
		}
	}
	for _, a := range want {
		// No duplicate address detection: it would never end without a carrier.
		seconds := int(lifetime / time.Second)
		err := netlink.AddrReplace(link, &netlink.Addr{IPNet: hostNet(a), Flags: unix.IFA_F_NODAD, ValidLft: seconds, PreferedLft: seconds})
		if err != nil {
			return nil, fmt.Errorf("add address %s to network interface %s: %w", a, layout.PoolLink, err)
		}
		if !slices.Contains(have, a) {
			added = append(added, a)
		}
	}
	return added, nil
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// OtherAddresses returns the machine's addresses outside our interface, with the name of the interface that has them.
func OtherAddresses() (map[netip.Addr]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	used := make(map[netip.Addr]string)
	for _, link := range links {
		if link.Attrs().Name == layout.PoolLink {
			continue
		}
		addresses, err := addressesOf(link)
		if err != nil {
			return nil, err
		}
		for _, a := range addresses {
			used[a] = link.Attrs().Name
		}
	}
	return used, nil
}

func addressesOf(link netlink.Link) ([]netip.Addr, error) {
	list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of network interface %s: %w", link.Attrs().Name, err)
	}
	var out []netip.Addr
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			out = append(out, addr.Unmap())
		}
	}
	return out, nil
}
