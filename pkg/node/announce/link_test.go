package announce

import (
	"bytes"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// inNamespace runs the rest of a test on a thread in a network namespace of its own.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can create network interfaces")
	}
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := netns.Set(home); err != nil {
			panic(err) // the thread would run other tests in the wrong namespace
		}
		runtime.UnlockOSThread()
		ns.Close()
		home.Close()
	})
}

func TestSetAddresses(t *testing.T) {
	inNamespace(t)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	own := netip.MustParseAddr("192.0.2.10")
	if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: hostNet(own)}); err != nil {
		t.Fatal(err)
	}

	for _, want := range [][]netip.Addr{
		nil,
		addrs("192.0.2.100"),
		addrs("192.0.2.100", "192.0.2.101", "2001:db8::1"),
		addrs("192.0.2.101"),
		addrs("192.0.2.101"),
		nil,
	} {
		before, _ := linkAddresses()
		added, err := setAddresses("polymesh test", want, 0)
		if err != nil {
			t.Fatalf("set %v: %v", want, err)
		}
		for _, a := range want {
			if slices.Contains(added, a) == slices.Contains(before, a) {
				t.Errorf("%v are there, %v are set, %v are new", before, want, added)
			}
		}
		link, err := netlink.LinkByName(layout.PoolLink)
		if len(want) == 0 {
			if err == nil {
				t.Errorf("interface %s is still there", layout.PoolLink)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		have, err := addressesOf(link)
		if err != nil {
			t.Fatal(err)
		}
		have = slices.DeleteFunc(have, netip.Addr.IsLinkLocalUnicast)
		if !slices.Equal(slices.SortedFunc(slices.Values(have), netip.Addr.Compare), want) {
			t.Errorf("have %v, want %v", have, want)
		}
		used, err := OtherAddresses()
		if err != nil {
			t.Fatal(err)
		}
		if used[own] != "lo" || used[want[0]] != "" {
			t.Errorf("addresses of other interfaces: %v", used)
		}
	}
}

func linkAddresses() ([]netip.Addr, error) {
	link, err := netlink.LinkByName(layout.PoolLink)
	if err != nil {
		return nil, err
	}
	return addressesOf(link)
}

// Without the process the kernel removes an address, unless no other node can have it.
func TestLifetime(t *testing.T) {
	inNamespace(t)
	address := netip.MustParseAddr("192.0.2.100")
	for _, lifetime := range []time.Duration{time.Minute, 0, 30 * time.Second, time.Minute} {
		begin := time.Now()
		if _, err := setAddresses("polymesh test", []netip.Addr{address}, lifetime); err != nil {
			t.Fatal(err)
		}
		link, err := netlink.LinkByName(layout.PoolLink)
		if err != nil {
			t.Fatal(err)
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil || len(list) != 1 {
			t.Fatalf("%v, %v", list, err)
		}
		valid := time.Duration(list[0].ValidLft) * time.Second
		if forever := list[0].ValidLft == math.MaxUint32; forever != (lifetime == 0) || !forever && (valid > lifetime || valid < lifetime-time.Since(begin)-2*time.Second) {
			t.Errorf("with a lifetime of %s it has %s", lifetime, valid)
		}
	}
}

// The machines of the address's network hear of it, and no others.
func TestGratuitousARP(t *testing.T) {
	inNamespace(t)
	listen := func(name, address string) int {
		t.Helper()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "-far"}); err != nil {
			t.Fatal(err)
		}
		for _, end := range []string{name, name + "-far"} {
			link, err := netlink.LinkByName(end)
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetUp(link); err != nil {
				t.Fatal(err)
			}
		}
		near, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		own, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(near, own); err != nil {
			t.Fatal(err)
		}
		far, err := netlink.LinkByName(name + "-far")
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(unix.ETH_P_ARP), Ifindex: far.Attrs().Index}); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	here, elsewhere := listen("here", "192.0.2.10/24"), listen("elsewhere", "198.51.100.10/24")
	address := netip.MustParseAddr("192.0.2.100")
	if err := gratuitousARP(address); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("here")
	if err != nil {
		t.Fatal(err)
	}
	heard := func(fd int) (out [][]byte) {
		for buf := make([]byte, 100); ; {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return out
			}
			// The kernel announces nothing by itself; what it asks is about other addresses.
			if p := slices.Clone(buf[:n]); bytes.Equal(p[14:18], address.AsSlice()) {
				out = append(out, p)
			}
		}
	}
	got := heard(here)
	if len(got) != 2 {
		t.Fatalf("%d packets arrived, want a request and a reply", len(got))
	}
	for i, operation := range []uint16{arpRequest, arpReply} {
		if want := arpPacket(operation, link.Attrs().HardwareAddr, address); !bytes.Equal(got[i], want) {
			t.Errorf("packet %d is %x, want %x", i, got[i], want)
		}
	}
	if got := heard(elsewhere); got != nil {
		t.Errorf("a network without the address hears %x", got)
	}
}
