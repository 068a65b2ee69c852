package loadbalancer

import (
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestListening(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the tables in testdata come from a little-endian machine")
	}
	// There is no udp6 table in testdata: a kernel without IPv6 has none.
	got, err := listening("testdata", []netip.Addr{netip.MustParseAddr("192.0.2.10")})
	if err != nil {
		t.Fatal(err)
	}
	want := map[Port]bool{
		{corev1.ProtocolTCP, 8080}: true, // 0.0.0.0
		{corev1.ProtocolTCP, 80}:   true, // the node's address
		{corev1.ProtocolTCP, 8443}: true, // ::
		{corev1.ProtocolTCP, 5432}: true, // the node's address as IPv6 shows it
		{corev1.ProtocolUDP, 514}:  true, // 0.0.0.0
	}
	if !maps.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

// The kernel's own tables, with sockets made for it.
func TestListeningOnThisMachine(t *testing.T) {
	loopback := netip.MustParseAddr("127.0.0.1")
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcpPort := Port{corev1.ProtocolTCP, int32(tcp.Addr().(*net.TCPAddr).Port)}
	udpPort := Port{corev1.ProtocolUDP, int32(udp.LocalAddr().(*net.UDPAddr).Port)}

	got, err := listening(procNet, []netip.Addr{loopback})
	if err != nil {
		t.Fatal(err)
	}
	if !got[tcpPort] || !got[udpPort] {
		t.Errorf("%v and %v are not among %v", tcpPort, udpPort, got)
	}
	got, err = listening(procNet, []netip.Addr{netip.MustParseAddr("192.0.2.10")})
	if err != nil {
		t.Fatal(err)
	}
	if got[tcpPort] || got[udpPort] {
		t.Errorf("ports on the loopback count as the node's: %v", got)
	}
}

func TestParseSocketAddressRefusesOther(t *testing.T) {
	for _, text := range []string{"", "00000000", "0000:0050", "zz000000:0050", "00000000:zz", "000000000000000000000000:0050"} {
		if at, err := parseSocketAddress(text); err == nil {
			t.Errorf("%q: %v", text, at)
		}
	}
}
