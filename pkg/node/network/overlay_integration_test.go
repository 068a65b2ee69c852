//go:build integration

package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/keeper"
)

// machine is a network namespace.
type machine struct {
	t  *testing.T
	ns *os.File
}

func newMachine(t *testing.T) machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	made := make(chan error)
	var ns *os.File
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Skip("cannot create a network namespace here: ", err)
	}
	t.Cleanup(func() { ns.Close() })
	m := machine{t, ns}
	m.run("ip link set lo up")
	return m
}

// path names the namespace for other processes.
func (m machine) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), m.ns.Fd()) }

// in starts work in the namespace, on a thread of its own, and returns its result.
func (m machine) in(work func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(m.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- work()
	}()
	return done
}

func (m machine) do(work func() error) {
	m.t.Helper()
	if err := <-m.in(work); err != nil {
		m.t.Fatal(err)
	}
}

// run runs commands, separated by semicolons, and returns their output.
func (m machine) run(commands string) (output string) {
	m.t.Helper()
	m.do(func() error {
		for _, command := range strings.Split(commands, ";") {
			args := strings.Fields(command)
			out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			output += string(out)
			if err != nil {
				return fmt.Errorf("%s: %w: %s", command, err, out)
			}
		}
		return nil
	})
	return output
}

// node is a machine of a cluster with one pod.
type node struct {
	machine
	name    string
	pods    netip.Prefix
	opts    Options
	overlay *overlay
	pod     machine
	ip      netip.Addr // the pod's
}

// lan is a switch that connects machines, with an address outside of the cluster.
type lan struct {
	machine
	next int
}

func newLAN(t *testing.T) *lan {
	l := &lan{machine: newMachine(t)}
	l.run("ip link add lan type bridge; ip link set lan up; ip address add 198.18.0.254/24 dev lan")
	return l
}

// join connects a new machine, as the node with the backend, and attaches a pod by the shipped plugins.
func (l *lan) join(backend config.FlannelBackend) *node {
	t := l.t
	t.Helper()
	l.next++
	n := &node{machine: newMachine(t), name: fmt.Sprintf("node-%d", l.next), pods: netip.MustParsePrefix(fmt.Sprintf("10.42.%d.0/24", l.next))}
	l.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("port%d", l.next)
		bridge, err := netlink.LinkByName("lan")
		if err != nil {
			return err
		}
		attrs.MasterIndex = bridge.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(n.ns.Fd()))}); err != nil {
			return err
		}
		port, err := netlink.LinkByName(attrs.Name)
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(port)
	})
	address := netip.MustParseAddr(fmt.Sprintf("198.18.0.%d", l.next))
	n.run(fmt.Sprintf("ip address add %s/24 dev eth0; ip link set eth0 up", address))
	n.opts = Options{Name: n.name, IP: address, Backend: backend, Settings: config.Node{FlannelIface: "eth0"}}
	n.overlay = &overlay{
		backend: backend, port: layout.VXLANPort, cluster: netip.MustParsePrefix("10.42.0.0/16"), alias: "polymesh " + n.name,
		mac: hardwareAddr("id", n.name), base: n.opts.findBase,
	}
	if backend == config.WireGuard {
		file := filepath.Join(t.TempDir(), "wireguard.key")
		key, err := wireGuardKey(file)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the key's file: %v, %v", info, err)
		}
		if again, err := wireGuardKey(file); err != nil || again != key {
			t.Errorf("the key is another one after a restart: %v", err)
		}
		n.overlay.port = layout.WireGuardPort
		n.overlay.wg = &wireGuard{key: key, endpoints: map[wgtypes.Key]netip.AddrPort{}, log: slog.New(slog.DiscardHandler)}
		t.Cleanup(func() {
			if n.overlay.wg.user != nil {
				n.overlay.wg.user.Close()
			}
		})
	}
	n.attach()
	return n
}

// peer returns the node as others see it.
func (n *node) peer() (p peer) {
	n.t.Helper()
	n.do(func() error {
		b, err := n.opts.findBase()
		p = peer{node: n.name, pods: n.pods, address: b.address}
		switch n.opts.Backend {
		case config.VXLAN:
			p.mac = string(n.overlay.mac)
		case config.WireGuard:
			p.key, p.port = n.overlay.wg.key.PublicKey(), layout.WireGuardPort
		}
		return err
	})
	return p
}

// know makes a node's overlay settle with these peers.
func (n *node) know(others ...*node) {
	n.t.Helper()
	var peers []peer
	for _, o := range others {
		peers = append(peers, o.peer())
	}
	n.overlay.set(n.pods, peers)
	n.do(func() error { return n.overlay.Settle(context.Background()) })
}

func plugins(t *testing.T) string {
	t.Helper()
	build, err := filepath.Abs("../../../.build")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(build, "bin", "cni")
	for _, program := range []string{filepath.Join(build, "host", "bin", "nft"), filepath.Join(dir, "bridge")} {
		if _, err := os.Stat(program); err != nil {
			t.Skip("make has not built it yet: ", err)
		}
	}
	t.Setenv("PATH", filepath.Join(build, "host", "bin")+":"+os.Getenv("PATH"))
	return dir
}

// attach starts a pod: a namespace that is connected by the CNI configuration, with the masquerading rule and packet forwarding.
func (n *node) attach() {
	t := n.t
	t.Helper()
	dir := plugins(t)
	n.pod = newMachine(t)
	n.do(func() error {
		if err := forwarding().Restore(t.Context()); err != nil {
			return err
		}
		m, err := newMasquerade("polymesh-pods", n.overlay.cluster, n.pods.String)
		if err != nil {
			return err
		}
		if err := m.Settle(t.Context()); err != nil {
			return err
		}
		b, err := n.opts.findBase()
		if err != nil {
			return err
		}
		text, err := Conflist("polymesh-"+n.name, n.pods.String(), t.TempDir(), n.overlay.mtu(b), true)
		if err != nil {
			return err
		}
		list, err := libcni.ConfListFromBytes(text)
		if err != nil {
			return err
		}
		attached, err := newAttachments("polymesh-"+n.name, dir, t.TempDir()).cni.AddNetworkList(t.Context(), list, &libcni.RuntimeConf{ContainerID: n.name, NetNS: n.pod.path(), IfName: "eth0"})
		if err != nil {
			return err
		}
		_ = attached
		n.ip = n.pods.Addr().Next().Next()
		return nil
	})
}

// connects reports whether a pod reaches another one: a megabyte arrives, from the pod's own address.
func (n *node) connects(to *node) error {
	return exchange(n.pod, to.pod, to.ip, n.ip)
}

func (n *node) wantWays(what string, others ...*node) {
	n.t.Helper()
	for _, o := range others {
		if err := errors.Join(n.connects(o), o.connects(n)); err != nil {
			n.t.Errorf("%s: %v\n%s", what, err, n.run("ip -d link; ip route; ip neighbor show; bridge fdb show"))
		}
	}
}

// exchange sends a megabyte from one machine to another one's address and returns an error if it does not arrive, or not from the address.
func exchange(from, to machine, address, source netip.Addr) error {
	var l net.Listener
	if err := <-to.in(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(address, 0).String())
		return err
	}); err != nil {
		return err
	}
	defer l.Close()
	const size = 1 << 20
	received := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			received <- err
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		got, err := io.Copy(io.Discard, c)
		if seen := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); err == nil && (got != size || seen != source) {
			err = fmt.Errorf("%d bytes came from %s, want %d from %s", got, seen, size, source)
		}
		received <- err
	}()
	if err := <-from.in(func() error {
		c, err := net.DialTimeout("tcp4", l.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = c.Write(make([]byte, size))
		return err
	}); err != nil {
		return err
	}
	return <-received
}

func (n *node) missing(what, want string) {
	n.t.Helper()
	n.do(func() error {
		gone, err := n.overlay.Missing(n.t.Context())
		if err != nil || gone != want {
			n.t.Errorf("%s: %q is missing (%v), want %q", what, gone, err, want)
		}
		return nil
	})
}

// What another program removes or changes comes back, and pods reach each other again, each under its own address.
func TestWaysComeBack(t *testing.T) {
	for backend, harms := range map[config.FlannelBackend]map[string]string{
		config.VXLAN: {
			"ip link delete flannel.1":                        "the interface flannel.1, which carries pods' packets to other nodes",
			"ip link set flannel.1 down":                      "flannel.1 (it is down)",
			"ip link set flannel.1 mtu 1400":                  "the MTU of flannel.1",
			"ip link set flannel.1 address 02:00:00:00:00:77": "the hardware address of flannel.1",
			"ip address flush dev flannel.1":                  "the address of flannel.1",
			"ip route flush dev flannel.1":                    "the route to the pods of node node-2",
			"ip neighbor flush dev flannel.1 nud permanent":   "the neighbor entry of node node-2",
			"ip link set eth0 down; ip link set eth0 up":      "",
			"ip link delete flannel.1; ip link add flannel.1 type vxlan id 1 dev eth0 dstport 4789; ip link set flannel.1 alias ALIAS": "the settings of flannel.1",
			"bridge fdb delete MAC dev flannel.1": "the forwarding entry of node node-2",
		},
		// In this process where the kernel has none: a device that is set down loses the test's network namespace.
		config.WireGuard: {
			"ip link delete flannel-wg":                  "the interface flannel-wg, which carries pods' packets to other nodes",
			"ip link set flannel-wg mtu 1300":            "the MTU of flannel-wg",
			"ip address flush dev flannel-wg":            "the address of flannel-wg",
			"ip route flush dev flannel-wg":              "the route to the pods of node node-2",
			"ip link set eth0 down; ip link set eth0 up": "",
		},
		config.HostGW: {
			"ip route flush proto 111":                   "the route to the pods of node node-2",
			"ip link set eth0 down; ip link set eth0 up": "the route to the pods of node node-2",
		},
	} {
		t.Run(string(backend), func(t *testing.T) {
			l := newLAN(t)
			a, b := l.join(backend), l.join(backend)
			a.know(b)
			b.know(a)
			a.wantWays("at first", b)
			for harm, want := range harms {
				harm = strings.NewReplacer("ALIAS", "polymesh "+a.name, "MAC", b.overlay.mac.String()).Replace(harm)
				if alias := "polymesh " + a.name; strings.Contains(harm, alias) {
					before, _, _ := strings.Cut(harm, "; ip link set flannel.1 alias")
					a.run(before)
					a.do(func() error {
						link, err := netlink.LinkByName(layout.FlannelLink)
						if err != nil {
							return err
						}
						return netlink.LinkSetAlias(link, alias)
					})
				} else {
					a.run(harm)
				}
				a.missing(harm, want)
				if err := <-a.in(func() error { return a.overlay.Restore(t.Context()) }); err != nil {
					t.Fatalf("%s: %v", harm, err)
				}
				a.missing("after "+harm, "")
				a.wantWays("after "+harm, b)
			}
			// What leaves the cluster has the node's address.
			if err := exchange(a.pod, l.machine, netip.MustParseAddr("198.18.0.254"), a.opts.IP); err != nil {
				t.Errorf("out of the cluster: %v", err)
			}
		})
	}
}

// Where the checksum offload must be off it stays off; elsewhere it stays as it is.
func TestChecksumOffload(t *testing.T) {
	l := newLAN(t)
	a := l.join(config.VXLAN)
	offload := func(want bool) {
		t.Helper()
		a.do(func() error {
			on, err := txChecksum(layout.FlannelLink)
			if on != want {
				t.Errorf("the offload is on: %v, want %v", on, want)
			}
			return err
		})
	}
	a.know()
	offload(true)
	a.overlay.noOffload = true
	a.missing("with another kernel", "the checksum setting of flannel.1")
	a.do(func() error { return a.overlay.Restore(t.Context()) })
	a.missing("after it", "")
	offload(false)
}

func TestPeersChange(t *testing.T) {
	for _, backend := range []config.FlannelBackend{config.VXLAN, config.HostGW, config.WireGuard} {
		t.Run(string(backend), func(t *testing.T) {
			l := newLAN(t)
			a, b := l.join(backend), l.join(backend)
			a.know()
			if text := a.run("ip route show proto 111; bridge fdb show dev eth0"); strings.Contains(text, "10.42") {
				t.Errorf("without peers there are routes:\n%s", text)
			}
			a.know(b)
			b.know(a)
			a.wantWays("one peer", b)
			c := l.join(backend)
			for _, n := range []*node{a, b, c} {
				var others []*node
				for _, o := range []*node{a, b, c} {
					if o != n {
						others = append(others, o)
					}
				}
				n.know(others...)
			}
			a.wantWays("two peers", b, c)
			b.wantWays("two peers", c)

			// Node b gets another address: its device, and what the others know.
			b.run("ip address delete 198.18.0.2/24 dev eth0; ip address add 198.18.0.77/24 dev eth0")
			b.know(a, c)
			a.know(b, c)
			c.know(a, b)
			a.wantWays("another address", b, c)
			// And another hardware address or key, as a machine that was set up again.
			b.overlay.mac = hardwareAddr("another", b.name)
			if b.overlay.wg != nil {
				key, err := wgtypes.GeneratePrivateKey()
				if err != nil {
					t.Fatal(err)
				}
				b.overlay.wg.key = key
			}
			b.do(func() error { return b.overlay.Restore(t.Context()) })
			a.know(b, c)
			a.wantWays("another hardware address or key", b)

			// Node c leaves.
			a.know(b)
			if text := a.run("ip route show; ip neighbor show nud permanent; bridge fdb show"); strings.Contains(text, "10.42.3.0") || strings.Contains(text, "198.18.0.3") {
				t.Errorf("what is left of a node:\n%s", text)
			}
			if backend == config.WireGuard {
				have, err := a.overlay.wg.get()
				if err != nil || len(have.Peers) != 1 || have.Peers[0].PublicKey != b.overlay.wg.key.PublicKey() {
					t.Errorf("the peers are %v, %v", have, err)
				}
			}
			a.wantWays("after a node left", b)
		})
	}
}

// The device of the other backend goes, and its routes.
func TestBackendChanges(t *testing.T) {
	l := newLAN(t)
	a, b := l.join(config.VXLAN), l.join(config.VXLAN)
	a.know(b)
	b.know(a)
	for _, backend := range []config.FlannelBackend{config.HostGW, config.VXLAN} {
		for _, n := range []*node{a, b} {
			n.overlay.backend, n.opts.Backend, n.overlay.done = backend, backend, settled{}
		}
		a.know(b)
		b.know(a)
		// The pod keeps its smaller MTU.
		a.wantWays(string(backend), b)
		has := strings.Contains(a.run("ip link show"), layout.FlannelLink)
		if routes := a.run("ip route show proto 111"); strings.Count(routes, "10.42.2.0/24") != 1 || has != (backend == config.VXLAN) {
			t.Errorf("%s: routes\n%s, flannel.1 %v", backend, routes, has)
		}
	}
}

// Other programs' devices and routes are left alone, and the error describes what is in the way.
func TestForeignWaysStay(t *testing.T) {
	l := newLAN(t)
	a, b := l.join(config.VXLAN), l.join(config.VXLAN)
	settle := func(want string) {
		t.Helper()
		a.overlay.set(a.pods, []peer{b.peer()})
		err := <-a.in(func() error { return a.overlay.Settle(t.Context()) })
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want %q", err, want)
		}
	}
	a.run("ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472")
	before := a.run("ip -d link show flannel.1")
	settle("network interface flannel.1 is another program's")
	if after := a.run("ip -d link show flannel.1"); after != before {
		t.Errorf("the device was changed: %s", after)
	}
	a.run("ip link delete flannel.1; ip link add other type vxlan id 1 dev eth0 dstport 8472")
	settle("another network interface uses VXLAN 1 on UDP port 8472")
	a.run("ip link delete other; ip route add 10.42.2.0/24 via 198.18.0.9; ip route add 10.42.9.0/24 via 198.18.0.9; ip route add 192.0.2.0/24 via 198.18.0.9 proto bird")
	settle("another program has a route to 10.42.2.0/24, the pods of node node-2: remove it")
	a.run("ip route delete 10.42.2.0/24 via 198.18.0.9")
	settle("")
	a.overlay.set(a.pods, nil)
	a.do(func() error { return a.overlay.Settle(t.Context()) })
	if routes := a.run("ip route show"); !strings.Contains(routes, "10.42.9.0/24 via 198.18.0.9") || !strings.Contains(routes, "192.0.2.0/24 via 198.18.0.9") || strings.Contains(routes, "10.42.2.0/24") {
		t.Errorf("the routes are:\n%s", routes)
	}
}

// A running node repairs its routes as soon as the kernel reports a change, also after its subscriptions were lost or refused.
func TestSubscriptionIsLost(t *testing.T) {
	l := newLAN(t)
	a, b := l.join(config.VXLAN), l.join(config.VXLAN)
	a.know(b)
	b.know(a)
	k := keeper.New(slog.New(slog.DiscardHandler))
	k.Add(a.overlay)
	ctx, cancel := context.WithCancel(t.Context())
	// The smallest buffer that the kernel allows overflows at once.
	watching := a.in(func() error { events{kick: k.Kick, buffer: 1, log: slog.New(slog.DiscardHandler)}.run(ctx); return nil })
	keeping := a.in(func() error { k.Run(ctx); return nil })
	defer func() {
		cancel()
		<-watching
		<-keeping
	}()
	repaired := func(what string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); a.connects(b) != nil; {
			if time.Now().After(end) {
				t.Fatalf("%s: %v", what, a.connects(b))
			}
		}
	}
	a.run("ip link delete flannel.1")
	repaired("the device is deleted")

	var flood strings.Builder
	for i := range 300 {
		fmt.Fprintf(&flood, "link add x%d type bridge\nlink delete x%d\n", i, i)
	}
	batch := filepath.Join(t.TempDir(), "flood")
	if err := os.WriteFile(batch, []byte(flood.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	a.run("ip -batch " + batch)
	a.run("ip route flush dev flannel.1; ip neighbor flush dev flannel.1 nud permanent")
	repaired("the kernel's buffer overflowed")

	// No socket can be opened for a while.
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	a.run("ip link set flannel.1 down")
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	refused := <-a.in(func() error { return events{kick: func() {}, log: slog.New(slog.DiscardHandler)}.watch(ctx) })
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(refused, unix.EMFILE) {
		t.Errorf("a refused subscription returns %v", refused)
	}
	repaired("a subscription was refused")
}

// Interfaces that have another address or MTU than before are found on the next check.
func TestBase(t *testing.T) {
	m := newMachine(t)
	m.run("ip link add eth0 type bridge; ip address add 198.18.0.1/24 dev eth0; ip address add 198.18.0.2/24 dev eth0; ip link add eth1 type bridge; ip link set eth1 mtu 9000")
	for what, c := range map[string]struct {
		opts Options
		want string
	}{
		"by address":            {Options{IP: netip.MustParseAddr("198.18.0.2")}, "eth0 198.18.0.2 1500"},
		"by name":               {Options{IP: netip.MustParseAddr("198.18.0.2"), Settings: config.Node{FlannelIface: "eth0"}}, "eth0 198.18.0.2 1500"},
		"no address":            {Options{Settings: config.Node{FlannelIface: "eth1"}}, "network interface eth1, which carries the pods' packets to other nodes, has no IPv4 address"},
		"no interface":          {Options{Settings: config.Node{FlannelIface: "eth2"}}, "--flannel-iface eth2: this machine has no such network interface (`ip link` lists them)"},
		"a lost address":        {Options{IP: netip.MustParseAddr("198.18.0.3")}, "eth0 198.18.0.1 1500"},
		"a lost, given address": {Options{IP: netip.MustParseAddr("198.18.0.3"), Settings: config.Node{NodeIP: netip.MustParseAddr("198.18.0.3")}}, "the node's address 198.18.0.3 is on no interface"},
	} {
		m.do(func() error {
			if what == "a lost address" {
				if out, err := exec.Command("ip", "link", "set", "eth0", "up").CombinedOutput(); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
			}
			b, err := c.opts.findBase()
			got := fmt.Sprintf("%s %s %d", b.name, b.address, b.mtu)
			if err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("%s: %s, want %s", what, got, c.want)
			}
			return nil
		})
	}
}
