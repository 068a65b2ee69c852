package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ARP's operations (RFC 826).
const (
	arpRequest = 1
	arpReply   = 2
)

// gratuitousARP announces to the machines of the networks to which an address belongs that it is here (RFC 5227, section 3): as request and as reply, because
// each is ignored by some. An address of no network of this machine is announced nowhere: packets to it come by a router.
func gratuitousARP(address netip.Addr) error {
	if !address.Is4() {
		return nil // a pool has IPv4 addresses only
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list network interfaces: %w", err)
	}
	var errs []error
	for _, link := range links {
		attrs := link.Attrs()
		if attrs.Flags&net.FlagUp == 0 || attrs.Flags&net.FlagLoopback != 0 || attrs.RawFlags&unix.IFF_NOARP != 0 || len(attrs.HardwareAddr) != 6 {
			continue
		}
		addresses, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			errs = append(errs, fmt.Errorf("list addresses of network interface %s: %w", attrs.Name, err))
			continue
		}
		for _, a := range addresses {
			if ones, _ := a.Mask.Size(); ones < 32 && a.Contains(address.AsSlice()) {
				errs = append(errs, broadcastARP(attrs, address))
				break
			}
		}
	}
	return errors.Join(errs...)
}

func broadcastARP(link *netlink.LinkAttrs, address netip.Addr) error {
	// The kernel writes the Ethernet header (packet(7), SOCK_DGRAM). The protocol 0 receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ARP), Ifindex: link.Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	for _, operation := range []uint16{arpRequest, arpReply} {
		if err := unix.Sendto(fd, arpPacket(operation, link.HardwareAddr, address), 0, to); err != nil {
			return fmt.Errorf("announce %s on network interface %s: %w", address, link.Name, err)
		}
	}
	return nil
}

// arpPacket reports that hardware has address, in a packet of Ethernet and IPv4 (RFC 826).
func arpPacket(operation uint16, hardware net.HardwareAddr, address netip.Addr) []byte {
	target := make([]byte, 6) // of a request: ignored
	if operation == arpReply {
		target = hardware
	}
	p := binary.BigEndian.AppendUint16(nil, unix.ARPHRD_ETHER)
	p = binary.BigEndian.AppendUint16(p, unix.ETH_P_IP)
	p = append(p, 6, 4)
	p = binary.BigEndian.AppendUint16(p, operation)
	p = append(append(p, hardware...), address.AsSlice()...)
	return append(append(p, target...), address.AsSlice()...)
}

func bigEndian(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}
