package dashboard

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// peerOf returns the user whose process has opened the connection from remote to local, both on this machine (proc_net(5)). A socket that its
// process has closed belongs to no one any more.
func peerOf(local, remote netip.AddrPort) (uid int, err error) {
	local, remote = unmapped(local), unmapped(remote)
	for _, file := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		f, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return 0, err
		}
		uid, ok := findPeer(bufio.NewScanner(f), local, remote)
		f.Close()
		if ok {
			return uid, nil
		}
	}
	return 0, fmt.Errorf("no process of this machine has the connection from %s", remote)
}

func findPeer(lines *bufio.Scanner, local, remote netip.AddrPort) (uid int, ok bool) {
	for lines.Scan() {
		// sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode …
		f := strings.Fields(lines.Text())
		if len(f) < 10 || f[9] == "0" {
			continue
		}
		from, err := parseAddress(f[1])
		if err != nil || from != remote {
			continue
		}
		to, err := parseAddress(f[2])
		if err != nil || to != local {
			continue
		}
		if uid, err := strconv.Atoi(f[7]); err == nil {
			return uid, true
		}
	}
	return 0, false
}

// parseAddress reads an address of /proc/net/tcp: words of 32 bits in the machine's byte order, in hexadecimal form.
func parseAddress(text string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(text, ":")
	words, err := hex.DecodeString(host)
	n, errPort := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || errPort != nil || len(words)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address of /proc/net/tcp", text)
	}
	for i := 0; i < len(words); i += 4 {
		binary.NativeEndian.PutUint32(words[i:], binary.BigEndian.Uint32(words[i:]))
	}
	ip, ok := netip.AddrFromSlice(words)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address of /proc/net/tcp", text)
	}
	return unmapped(netip.AddrPortFrom(ip, uint16(n))), nil
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
