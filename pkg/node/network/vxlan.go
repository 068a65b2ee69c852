package network

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// vxlanOverhead is what VXLAN adds to a packet, in bytes: IPv4, UDP, VXLAN and Ethernet headers (RFC 7348).
const vxlanOverhead = 20 + 8 + 8 + 14

// hardwareAddr derives the address of the node's device from what identifies the node.
func hardwareAddr(id, node string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(id + "\x00" + node))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2 // one interface's, locally administered
	return mac
}

// planDevice plans the VXLAN device; link is nil if there is none. Its steps come before all others.
func (o *overlay) planDevice(b base, link netlink.Link) ([]step, error) {
	const name = layout.FlannelLink
	if link == nil {
		return []step{{"the interface " + name + ", which carries pods' packets to other nodes", func() error { return o.addDevice(b) }}}, nil
	}
	attrs := link.Attrs()
	vxlan, ok := link.(*netlink.Vxlan)
	// A device without an alias is from a server that was killed before it could mark it.
	if attrs.Alias != o.alias && (attrs.Alias != "" || attrs.HardwareAddr.String() != o.mac.String()) || !ok {
		return nil, foreign(name)
	}
	if vxlan.VxlanId != vni || vxlan.Port != o.port || vxlan.VtepDevIndex != b.index || !vxlan.SrcAddr.Equal(b.address.AsSlice()) || vxlan.Learning {
		return []step{{"the settings of " + name, func() error { return netlink.LinkDel(link) }}}, nil
	}
	var steps []step
	if attrs.HardwareAddr.String() != o.mac.String() {
		steps = append(steps, setting("the hardware address of "+name, func() error { return netlink.LinkSetHardwareAddr(link, o.mac) }))
	}
	// Linux before 5.7 computes a wrong checksum for packets that were translated before they were encapsulated, and a NAT between nodes may spoil it
	// (projectcalico/felix#2811, flannel-io/flannel#1929). Otherwise the offload stays as it is: without it the throughput is a fifth.
	if o.noOffload {
		on, err := txChecksum(name)
		if err != nil {
			return nil, fmt.Errorf("check the checksum offload of %s: %w", name, err)
		}
		if on {
			steps = append(steps, setting("the checksum setting of "+name, func() error { return setTxChecksum(name, false) }))
		}
	}
	rest, err := o.planLink(b, link)
	return append(steps, rest...), err
}

// foreign is the error for an interface that is in the way.
func foreign(name string) error {
	return fmt.Errorf("network interface %s is another program's: stop that, K3s for example with k3s-killall.sh, and remove it (`ip link delete %s`)", name, name)
}

// setting is the step that sets something of an interface.
func setting(what string, do func() error) step {
	return step{what, func() error {
		if err := do(); err != nil {
			return fmt.Errorf("set %s: %w", what, err)
		}
		return nil
	}}
}

// planLink plans what a device of any kind needs: mark, MTU, address, and being up.
func (o *overlay) planLink(b base, link netlink.Link) (steps []step, err error) {
	attrs := link.Attrs()
	name := attrs.Name
	add := func(what string, do func() error) { steps = append(steps, setting(what, do)) }
	if attrs.Alias == "" {
		add("the mark of "+name, func() error { return netlink.LinkSetAlias(link, o.alias) })
	}
	if attrs.MTU != o.mtu(b) {
		add("the MTU of "+name, func() error { return netlink.LinkSetMTU(link, o.mtu(b)) })
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	// The source of the node's own packets to other nodes' pods, without a network, so that no route comes with it.
	own, has := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(o.pods.Addr(), 32))}, false
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP.To4())
		if a.IPNet.String() == own.IPNet.String() {
			has = true
		} else if o.cluster.Contains(ip) { // of a range that this node had before
			steps = append(steps, step{"", func() error { return netlink.AddrDel(link, &a) }})
		}
	}
	if !has {
		add("the address of "+name, func() error { return netlink.AddrReplace(link, own) })
	}
	if attrs.Flags&net.FlagUp == 0 {
		add(name+" (it is down)", func() error { return netlink.LinkSetUp(link) })
	}
	return steps, nil
}

func (o *overlay) addDevice(b base) error {
	device := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: layout.FlannelLink, HardwareAddr: o.mac, MTU: o.mtu(b), TxQLen: -1},
		VxlanId:   vni, VtepDevIndex: b.index, SrcAddr: b.address.AsSlice(), Port: o.port,
	}
	err := netlink.LinkAdd(device)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("create %s: another network interface uses VXLAN %d on UDP port %d (`ip -d link show type vxlan`): remove it, or set another --flannel-port on all servers", layout.FlannelLink, vni, o.port)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("create %s: UDP port %d is in use (`ss -lunp sport = :%d`): stop the program that uses it, or set another --flannel-port on all servers", layout.FlannelLink, o.port, o.port)
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", layout.FlannelLink, err)
	}
	// The kernel ignores the alias of a device that it creates.
	if err := netlink.LinkSetAlias(device, o.alias); err != nil {
		return fmt.Errorf("mark %s: %w", layout.FlannelLink, err)
	}
	// Packets between pods are IPv4 only: this saves the kernel's IPv6 announcements on the device, and is not needed for anything.
	_ = os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", layout.FlannelLink, "disable_ipv6"), []byte("1"), 0o644)
	return nil
}

// planEntries plans the peers' neighbors and forwarding entries on the device.
func (o *overlay) planEntries(index int) (steps []step, err error) {
	var neighbors, forwarding []netlink.Neigh
	if err := dump(func() (err error) {
		if neighbors, err = netlink.NeighList(index, netlink.FAMILY_V4); err == nil {
			forwarding, err = netlink.NeighList(index, unix.AF_BRIDGE)
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("list the neighbors on %s: %w", layout.FlannelLink, err)
	}
	for _, p := range o.peers {
		mac := net.HardwareAddr(p.mac)
		neighbor := netlink.Neigh{
			LinkIndex: index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: p.gateway().AsSlice(), HardwareAddr: mac,
		}
		entry := netlink.Neigh{
			LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: p.address.AsSlice(), HardwareAddr: mac,
		}
		if !contains(neighbors, neighbor) {
			steps = append(steps, step{"the neighbor entry of node " + p.node, setEntry(neighbor, p)})
		}
		if !contains(forwarding, entry) {
			steps = append(steps, step{"the forwarding entry of node " + p.node, setEntry(entry, p)})
		}
	}
	// The device is ours, and it learns nothing, so entries of no peer are left over.
	for _, n := range slices.Concat(neighbors, forwarding) {
		if n.State&netlink.NUD_PERMANENT != 0 && !o.wanted(n) {
			steps = append(steps, step{"", func() error { return netlink.NeighDel(&n) }})
		}
	}
	return steps, nil
}

func setEntry(n netlink.Neigh, p peer) func() error {
	return func() error {
		if err := netlink.NeighSet(&n); err != nil {
			return fmt.Errorf("set the route to node %s (%s): %w", p.node, p.address, err)
		}
		return nil
	}
}

func contains(list []netlink.Neigh, n netlink.Neigh) bool {
	return slices.ContainsFunc(list, func(o netlink.Neigh) bool {
		return o.State&netlink.NUD_PERMANENT != 0 && o.IP.Equal(n.IP) && o.HardwareAddr.String() == n.HardwareAddr.String()
	})
}

// wanted reports whether a neighbor or forwarding entry is, or will be replaced by, a peer's.
func (o *overlay) wanted(n netlink.Neigh) bool {
	return slices.ContainsFunc(o.peers, func(p peer) bool {
		if n.Family == unix.AF_BRIDGE {
			return string(n.HardwareAddr) == p.mac
		}
		return n.IP.Equal(p.gateway().AsSlice())
	})
}

// ethtoolValue is struct ethtool_value, and ifreq struct ifreq with a pointer (linux/ethtool.h, netdevice(7)).
type ethtoolValue struct{ command, data uint32 }

type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// txChecksum reports whether a device offloads the checksum of packets that it sends: ethtool's tx-checksum-ip-generic for VXLAN.
func txChecksum(name string) (bool, error) {
	v := ethtoolValue{command: unix.ETHTOOL_GTXCSUM}
	err := ethtool(name, &v)
	return v.data != 0, err
}

func setTxChecksum(name string, on bool) error {
	v := ethtoolValue{command: unix.ETHTOOL_STXCSUM}
	if on {
		v.data = 1
	}
	return ethtool(name, &v)
}

func ethtool(name string, value *ethtoolValue) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r := ifreq{data: unsafe.Pointer(value)}
	copy(r.name[:unix.IFNAMSIZ-1], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}
