package network

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"polymesh.dev/polymesh/pkg/preflight"
)

// base is the machine's interface that carries the packets between nodes.
type base struct {
	index   int
	name    string
	address netip.Addr
	mtu     int // bytes
}

// findBase returns the interface of --flannel-iface, or else the one with the node's address. It is looked up again on every pass: an interface
// may be created again with another index, and its address or MTU may change.
func (o Options) findBase() (base, error) {
	if name := o.Settings.FlannelIface; name != "" {
		link, err := netlink.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return base{}, fmt.Errorf("--flannel-iface %s: this machine has no such network interface (`ip link` lists them)", name)
		}
		if err != nil {
			return base{}, fmt.Errorf("find network interface %s: %w", name, err)
		}
		return o.baseOf(link)
	}
	links, err := byAddress()
	if err != nil {
		return base{}, err
	}
	index, ok := links[o.IP]
	if !ok && !o.Settings.NodeIP.IsValid() {
		// The machine has got another address, which a restart will use. Pods keep their network until then.
		if ip, err := preflight.NodeIP(); err == nil {
			index, ok = links[ip]
		}
	}
	if !ok {
		return base{}, fmt.Errorf("the node's address %s is on no interface", o.IP)
	}
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return base{}, fmt.Errorf("find the network interface of %s: %w", o.IP, err)
	}
	return o.baseOf(link)
}

// baseOf describes an interface, with the node's address if it has that, and its first global one otherwise.
func (o Options) baseOf(link netlink.Link) (base, error) {
	b := base{index: link.Attrs().Index, name: link.Attrs().Name, mtu: link.Attrs().MTU}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return base{}, fmt.Errorf("list the addresses of %s: %w", b.name, err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		if ok && ip.IsGlobalUnicast() && (ip == o.IP || !b.address.IsValid()) {
			b.address = ip
		}
	}
	if !b.address.IsValid() {
		return base{}, fmt.Errorf("network interface %s, which carries the pods' packets to other nodes, has no IPv4 address", b.name)
	}
	return b, nil
}

// byAddress returns the index of the interface of each of the machine's IPv4 addresses.
func byAddress() (map[netip.Addr]int, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the machine's addresses: %w", err)
	}
	out := map[netip.Addr]int{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			out[ip] = a.LinkIndex
		}
	}
	return out, nil
}
