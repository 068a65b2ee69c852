// Package porttest reserves ports for the programs and components that tests start; only tests import it.
package porttest

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Reserve returns a port of an IPv4 address of this machine that stays reserved until the end of the test.
//
// A socket is bound to it and does not listen. With SO_REUSEADDR on both sockets a program can listen there, again and again; connections
// are refused meanwhile, and the kernel chooses the port neither for a listener on port 0 nor for an outgoing connection
// (inet_csk_get_port and __inet_hash_connect in Linux). Go, PostgreSQL, MariaDB and Envoy set the option on sockets that listen.
func Reserve(t testing.TB, ip netip.Addr) netip.AddrPort {
	t.Helper()
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(socket) })
	if err := unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(socket, &unix.SockaddrInet4{Addr: ip.As4()}); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(socket)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(ip, uint16(bound.(*unix.SockaddrInet4).Port))
}

// Loopback is Reserve on 127.0.0.1.
func Loopback(t testing.TB) netip.AddrPort {
	t.Helper()
	return Reserve(t, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
}
