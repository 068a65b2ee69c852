package loadbalancer

import (
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"polymesh.dev/polymesh/pkg/layout"
)

func TestSetAddresses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can create network interfaces")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	ns, err := netns.New()
	if err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	defer ns.Close()
	defer func() {
		if err := netns.Set(home); err != nil {
			panic(err) // the thread would run other tests in the wrong namespace
		}
	}()

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
		if err := setAddresses("polymesh test", want); err != nil {
			t.Fatalf("set %v: %v", want, err)
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
		used, err := otherAddresses()
		if err != nil {
			t.Fatal(err)
		}
		if used[own] != "lo" || used[want[0]] != "" {
			t.Errorf("addresses of other interfaces: %v", used)
		}
	}
}
