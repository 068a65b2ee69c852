//go:build integration

package netpol

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/layout"
)

// namespaceVar names the test for which this process has a network namespace of its own.
const namespaceVar = "POLYMESH_TEST_NAMESPACE"

// private reports whether this process has a network namespace of its own. If not, it runs the test again in one that has.
func private(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceVar) == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	bin, err := filepath.Abs("../../../.build/host/bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(bin, "nft")); err != nil {
		t.Skip("make has not built it yet: ", err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), namespaceVar+"="+t.Name(), "PATH="+bin+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	// What the control plane logs is of interest after a failure only.
	for line := range strings.Lines(string(out)) {
		if err != nil || strings.Contains(line, "_test.go:") {
			t.Log(strings.TrimSuffix(line, "\n"))
		}
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) && !strings.Contains(string(out), "--- SKIP: "+t.Name()) {
		t.Fatalf("in its own network namespace: %v", err)
	}
	return false
}

// must fails the test for an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 30 seconds: " + what)
		}
	}
}

// host is a network namespace with a thread in it.
type host struct {
	calls chan func()
	fd    int
	addr  netip.Addr
}

// do calls f in the namespace. Sockets that it opens stay there.
func (h *host) do(f func()) {
	if h.calls == nil {
		f()
		return
	}
	done := make(chan struct{})
	h.calls <- func() { defer close(done); f() }
	<-done
}

func newHost(t *testing.T, addr string) *host {
	t.Helper()
	h := &host{calls: make(chan func()), addr: netip.MustParseAddr(addr)}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			h.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		ready <- err
		for f := range h.calls {
			f()
		}
	}()
	must(t, <-ready)
	t.Cleanup(func() { close(h.calls); unix.Close(h.fd) })
	return h
}

func up(t *testing.T, name string, addrs ...string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(link))
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		must(t, err)
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		must(t, netlink.AddrAdd(link, addr))
	}
	return link
}

func route(t *testing.T, to, via string) {
	t.Helper()
	_, dst, err := net.ParseCIDR(to)
	must(t, err)
	must(t, netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}))
}

func set(t *testing.T, name, value string) {
	t.Helper()
	must(t, os.WriteFile("/proc/sys/"+name, []byte(value), 0o644))
}

// machine is a node: this process's namespace with the pods' bridge, pods behind it, and others beyond it.
type machine struct {
	node  *host
	pods  map[string]*host // by the last byte of their address
	world *host            // has 198.18.0.2 and the addresses of pods of another node
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{node: &host{addr: netip.MustParseAddr("10.42.0.1")}, pods: map[string]*host{}}
	up(t, "lo")
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: layout.Bridge}}))
	bridge := up(t, layout.Bridge, "10.42.0.1/24")
	for name := range forwarding {
		set(t, name, forwarding[name])
	}
	for _, last := range []string{"2", "3", "4", "5"} {
		pod := newHost(t, "10.42.0."+last)
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod" + last, MasterIndex: bridge.Attrs().Index}, PeerName: "eth0", PeerNamespace: netlink.NsFd(pod.fd)}))
		must(t, netlink.LinkSetHairpin(up(t, "pod"+last), true))
		pod.do(func() {
			up(t, "lo")
			up(t, "eth0", "10.42.0."+last+"/24", "fd00::"+last+"/64")
			route(t, "0.0.0.0/0", "10.42.0.1")
		})
		m.pods[last] = pod
	}
	m.world = newHost(t, "198.18.0.2")
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(m.world.fd)}))
	up(t, "up0", "198.18.0.1/24")
	m.world.do(func() {
		up(t, "lo", "10.42.1.2/32", "10.42.1.3/32")
		up(t, "eth0", "198.18.0.2/24")
		route(t, "10.42.0.0/24", "198.18.0.1")
	})
	route(t, "10.42.1.0/24", "198.18.0.2")
	// As kube-proxy does it, for one Service with the pod 3 behind it, as ClusterIP and as NodePort. It also has the kernel track
	// connections, as on every node.
	nft := exec.Command("nft", "-f", "-")
	nft.Stdin = strings.NewReader(`table ip proxy {
		chain services {
			type nat hook prerouting priority dstnat
			ip daddr 10.43.0.10 tcp dport 80 dnat to 10.42.0.3:8080
			ip daddr 198.18.0.1 tcp dport 30080 meta mark set 0x4000 dnat to 10.42.0.3:8080
		}
		chain masquerading {
			type nat hook postrouting priority srcnat
			meta mark 0x4000 masquerade
			ip saddr 10.42.0.3 ip daddr 10.42.0.3 masquerade
		}
	}`)
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return m
}

// forwarding is as pkg/node sets it.
var forwarding = map[string]string{"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1", "net/bridge/bridge-nf-call-ip6tables": "1"}

// host returns where an address is.
func (m *machine) host(a netip.Addr) *host {
	for _, pod := range m.pods {
		if pod.addr == a {
			return pod
		}
	}
	if a == m.node.addr {
		return m.node
	}
	return m.world
}

// lab sends packets and notes which arrive.
type lab struct {
	*machine
	t       *testing.T
	next    uint32
	mu      sync.Mutex
	arrived map[uint32]bool
	senders map[netip.Addr]*net.UDPConn
	raw     map[netip.Addr]int
}

// newLab listens on all addresses for UDP, TCP and SCTP at the ports.
func newLab(t *testing.T, m *machine, ports []int32) *lab {
	t.Helper()
	l := &lab{machine: m, t: t, arrived: map[uint32]bool{}, senders: map[netip.Addr]*net.UDPConn{}, raw: map[netip.Addr]int{}}
	for _, a := range m.addrs() {
		m.host(a).do(func() {
			for _, port := range ports {
				udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(port))))
				must(t, err)
				t.Cleanup(func() { udp.Close() })
				go l.receive(func(b []byte) (int, error) { n, _, err := udp.ReadFrom(b); return n, err }, 0)
				tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(port))))
				must(t, err)
				t.Cleanup(func() { tcp.Close() })
				go func() {
					for {
						conn, err := tcp.Accept()
						if err != nil {
							return
						}
						go func() {
							// Echo, until the other side ends.
							buf := make([]byte, 16)
							for n, err := conn.Read(buf); err == nil; n, err = conn.Read(buf) {
								_, _ = conn.Write(buf[:n])
							}
							conn.Close()
						}()
					}
				}()
			}
			sender, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
			must(t, err)
			t.Cleanup(func() { sender.Close() })
			l.senders[a] = sender
			sctp, err := net.ListenIP("ip4:132", &net.IPAddr{IP: a.AsSlice()})
			must(t, err)
			t.Cleanup(func() { sctp.Close() })
			// SCTP's initiate tag, behind common header and chunk header.
			go l.receive(func(b []byte) (int, error) { n, _, err := sctp.ReadFrom(b); return n, err }, 16)
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
			must(t, err)
			must(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: a.As4()}))
			t.Cleanup(func() { unix.Close(fd) })
			l.raw[a] = fd
		})
	}
	return l
}

// addrs are the addresses of the node, of its pods, of pods of another node, and outside.
func (m *machine) addrs() []netip.Addr {
	var out []netip.Addr
	for _, a := range []string{"10.42.0.1", "10.42.0.2", "10.42.0.3", "10.42.0.4", "10.42.0.5", "10.42.1.2", "10.42.1.3", "198.18.0.2"} {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func (l *lab) receive(read func([]byte) (int, error), offset int) {
	buf := make([]byte, 1500)
	for {
		n, err := read(buf)
		if err != nil {
			return
		}
		if n >= offset+4 {
			l.mu.Lock()
			l.arrived[binary.BigEndian.Uint32(buf[offset:])] = true
			l.mu.Unlock()
		}
	}
}

// probe is a packet on its way.
type probe struct {
	packet
	id uint32
	fd int // of a TCP connection
}

func (l *lab) send(p packet) *probe {
	l.t.Helper()
	l.next++
	s := &probe{packet: p, id: l.next, fd: -1}
	switch p.Protocol {
	case corev1.ProtocolUDP:
		text := binary.BigEndian.AppendUint32(nil, s.id)
		_, err := l.senders[p.From].WriteToUDPAddrPort(text, netip.AddrPortFrom(p.To, p.Port))
		// An earlier packet may have reached a closed port.
		if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			l.t.Fatal(err)
		}
	case corev1.ProtocolSCTP:
		must(l.t, unix.Sendto(l.raw[p.From], sctpInit(uint16(20000+s.id%40000), p.Port, s.id), 0, &unix.SockaddrInet4{Addr: p.To.As4()}))
	case corev1.ProtocolTCP:
		l.host(p.From).do(func() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			must(l.t, err)
			must(l.t, unix.Bind(fd, &unix.SockaddrInet4{Addr: p.From.As4()}))
			if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: p.To.As4(), Port: int(p.Port)}); err != nil && err != unix.EINPROGRESS {
				l.t.Fatal(err)
			}
			s.fd = fd
		})
	}
	return s
}

// sctpInit is the first packet of an association (RFC 9260, sections 3.1 and 3.3.2).
func sctpInit(from, to uint16, tag uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // verification tag, checksum
	b = append(b, 1, 0, 0, 20)            // INIT, its length
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(b, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1) // window, streams, first number
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

func (l *lab) got(s *probe) bool {
	if s.fd < 0 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.arrived[s.id]
	}
	poll := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(poll, 0); err != nil || n == 0 || poll[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
		return false
	}
	return true
}

// check sends packets and compares what arrives. All that should arrive is waited for; by then the others would have.
func (l *lab) check(what string, packets []packet, want func(packet) bool) {
	l.t.Helper()
	var probes []*probe
	for _, p := range packets {
		probes = append(probes, l.send(p))
	}
	deadline := time.Now().Add(30 * time.Second)
	for _, s := range probes {
		if !want(s.packet) {
			continue
		}
		for !l.got(s) && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		if !l.got(s) {
			l.t.Errorf("%s: %s does not arrive", what, s.packet)
		}
	}
	for _, s := range probes {
		if !want(s.packet) && l.got(s) {
			l.t.Errorf("%s: %s arrives", what, s.packet)
		}
		if s.fd >= 0 {
			unix.Close(s.fd)
		}
	}
}
