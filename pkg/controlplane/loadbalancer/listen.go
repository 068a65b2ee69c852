package loadbalancer

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// procNet lists the sockets of the server's own network namespace. Namespaces belong to threads: this is the one that
// netlink sees too.
const procNet = "/proc/thread-self/net"

// Socket states of /proc/net/tcp and /proc/net/udp (include/net/tcp_states.h): an unconnected UDP socket is in
// TCP_CLOSE.
const (
	stateListen      = "0A"
	stateUnconnected = "07"
)

// listening returns the ports on which a process is reachable at one of the node's addresses.
func listening(dir string, node []netip.Addr) (map[Port]bool, error) {
	ports := make(map[Port]bool)
	for _, table := range []struct {
		file     string
		protocol corev1.Protocol
		state    string
	}{
		{"tcp", corev1.ProtocolTCP, stateListen},
		{"tcp6", corev1.ProtocolTCP, stateListen},
		{"udp", corev1.ProtocolUDP, stateUnconnected},
		{"udp6", corev1.ProtocolUDP, stateUnconnected},
	} {
		f, err := os.Open(filepath.Join(dir, table.file))
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("look for ports in use: %w", err)
		}
		bound, err := boundSockets(f, table.state)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("look for ports in use: %s: %w", f.Name(), err)
		}
		for _, at := range bound {
			if at.Addr().IsUnspecified() || slices.Contains(node, at.Addr()) {
				ports[Port{table.protocol, int32(at.Port())}] = true
			}
		}
	}
	return ports, nil
}

// boundSockets reads the local addresses of the sockets in one state (Documentation/networking/proc_net_tcp.rst in the
// kernel): the second column, the address as 32-bit words in the machine's byte order.
func boundSockets(r io.Reader, state string) ([]netip.AddrPort, error) {
	var bound []netip.AddrPort
	lines := bufio.NewScanner(r)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != state {
			continue
		}
		at, err := parseSocketAddress(fields[1])
		if err != nil {
			return nil, err
		}
		bound = append(bound, at)
	}
	return bound, lines.Err()
}

func parseSocketAddress(text string) (netip.AddrPort, error) {
	bad := fmt.Errorf("%q is not a socket address", text)
	addrText, portText, ok := strings.Cut(text, ":")
	raw, err := hex.DecodeString(addrText)
	if !ok || err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, bad
	}
	for word := range slices.Chunk(raw, 4) {
		binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
	}
	addr, ok := netip.AddrFromSlice(raw)
	port, err := strconv.ParseUint(portText, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, bad
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}
