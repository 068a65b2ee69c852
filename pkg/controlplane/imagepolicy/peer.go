package imagepolicy

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
)

// sameProcess reports whether the other end of a connection on the loopback is a socket of this process, as the API server's
// is. Every local user and every pod in the host's network can reach the port, but none of them can have such a socket. So the
// API server needs no client certificate, which it would also present to the webhooks of users.
func sameProcess(conn net.Conn) (bool, error) {
	here, ok := conn.LocalAddr().(*net.TCPAddr)
	there, also := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || !also || here.IP.To4() == nil || there.IP.To4() == nil {
		return false, nil
	}
	inode, err := socketInode(there, here)
	if err != nil || inode == "" {
		return false, err
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return false, err
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && target == "socket:["+inode+"]" {
			return true, nil
		}
	}
	return false, nil
}

// socketInode returns the inode of the socket with these two ends (proc_net(5), /proc/net/tcp); empty if there is none.
func socketInode(local, remote *net.TCPAddr) (string, error) {
	f, err := os.Open("/proc/thread-self/net/tcp")
	if err != nil {
		return "", err
	}
	defer f.Close()
	// The kernel writes an address as a number in its byte order in memory.
	written := func(a *net.TCPAddr) string {
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a.IP.To4()), a.Port)
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 9 && fields[1] == written(local) && fields[2] == written(remote) {
			return fields[9], nil
		}
	}
	return "", lines.Err()
}
