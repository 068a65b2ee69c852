package scrapeconfig

import "net/netip"

// cloudMetadata lists addresses at which clouds serve secrets to a machine, in addition to the link-local ones.
var cloudMetadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"),   // AWS, IPv6
	netip.MustParseAddr("100.100.100.200"), // Alibaba Cloud
	netip.MustParseAddr("168.63.129.16"),   // Azure
}

// Forbidden returns why this machine must not connect to an address that others have chosen, empty if it may.
func Forbidden(ip netip.Addr) string {
	ip = ip.Unmap().WithZone("")
	switch {
	case !ip.IsValid():
		return "it is not an address"
	case ip.IsLoopback():
		return "it is this machine's own"
	case ip.IsUnspecified(), ip.Is4() && ip.As4()[0] == 0: // Linux connects 0.x to itself
		return "it is this machine's own"
	case ip.IsLinkLocalUnicast():
		return "it is link-local, as are the metadata of a cloud's machines"
	case ip.IsMulticast(), ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "it is not one machine's"
	}
	for _, a := range cloudMetadata {
		if ip == a {
			return "it serves the metadata of a cloud's machines"
		}
	}
	return ""
}
