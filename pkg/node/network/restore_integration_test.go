//go:build integration

package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/keeper"
)

// newNetworkNamespace moves the test into its own network namespace, with the shipped programs in PATH: nft and the CNI
// plugins, built by `make`.
func newNetworkNamespace(t *testing.T) (plugins string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	build, err := filepath.Abs("../../../.build")
	if err != nil {
		t.Fatal(err)
	}
	plugins = filepath.Join(build, "bin", "cni")
	for _, program := range []string{filepath.Join(build, "host", "bin", "nft"), filepath.Join(plugins, "bridge")} {
		if _, err := os.Stat(program); err != nil {
			t.Skip("make has not built it yet: ", err)
		}
	}
	t.Setenv("PATH", filepath.Join(build, "host", "bin")+":"+os.Getenv("PATH"))
	// The thread is not reused: it ends with the test.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("cannot create a network namespace here: ", err)
	}
	return plugins
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func wantMissing(t *testing.T, what string, p keeper.Part, want string) {
	t.Helper()
	gone, err := p.Missing(t.Context())
	if err != nil || gone != want {
		t.Errorf("%s: %q is missing (%v), want %q", what, gone, err, want)
	}
}

func restore(t *testing.T, p keeper.Part) {
	t.Helper()
	if err := p.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestMasqueradeComesBack(t *testing.T) {
	newNetworkNamespace(t)
	pods := ""
	m, err := newMasquerade("polymesh-pods", netip.MustParsePrefix("10.42.0.0/16"), func() string { return pods })
	if err != nil {
		t.Fatal(err)
	}
	const gone = "the rule through which pods reach addresses outside the cluster"
	wantMissing(t, "before the node has a range", m, "")
	pods = "10.42.0.0/24"
	wantMissing(t, "at first", m, gone)
	restore(t, m)
	wantMissing(t, "once it is made", m, "")
	for _, flush := range []string{"flush ruleset", "flush table ip polymesh", "delete table ip polymesh", "delete chain ip polymesh postrouting"} {
		run(t, "nft", strings.Fields(flush)...)
		wantMissing(t, flush, m, gone)
		restore(t, m)
		wantMissing(t, "after "+flush, m, "")
	}
	pods = "10.42.7.0/24"
	wantMissing(t, "with another range", m, gone)
	restore(t, m)
	if rules := run(t, "nft", "list", "table", "ip", layout.Table); strings.Count(rules, "masquerade") != 1 || !strings.Contains(rules, "ip saddr 10.42.7.0/24 ip daddr != 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random") {
		t.Errorf("the rules are:\n%s", rules)
	}

	// Before Linux 5.13.
	old := &masquerade{network: m.network, cluster: m.cluster, pods: m.pods}
	wantMissing(t, "iptables at first", old, gone)
	for range 2 {
		restore(t, old)
		wantMissing(t, "iptables once it is made", old, "")
	}
	if rules := run(t, "iptables-save", "-t", "nat"); strings.Count(rules, layout.MasqueradeChain) != 4 {
		t.Errorf("the rules are:\n%s", rules)
	}
	run(t, "iptables", "-t", "nat", "-F")
	wantMissing(t, "iptables -F", old, gone)
	restore(t, old)
	wantMissing(t, "after iptables -F", old, "")
}

// A pod with a hostPort, attached by the shipped plugins: its rules and its bridge are restored.
func TestAttachmentsComeBack(t *testing.T) {
	plugins := newNetworkNamespace(t)
	network, notes, state := "polymesh-test-pods", t.TempDir(), t.TempDir()
	text, err := Conflist(network, "10.42.0.0/24", state, 1450, true)
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.ConfListFromBytes(text)
	if err != nil {
		t.Fatal(err)
	}
	pods := newAttachments(network, plugins, notes)
	name := fmt.Sprintf("polymesh-test-%d", os.Getpid())
	run(t, "ip", "netns", "add", name)
	t.Cleanup(func() { run(t, "ip", "netns", "delete", name) })
	rt := &libcni.RuntimeConf{
		ContainerID: "c1", NetNS: filepath.Join("/run/netns", name), IfName: "eth0",
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
	if _, err := pods.cni.AddNetworkList(t.Context(), list, rt); err != nil {
		t.Fatal(err)
	}
	ports := &hostPorts{attachments: pods}
	br := &bridge{attachments: pods, pods: func() string { return "10.42.0.0/24" }, alias: "polymesh test", mtu: func() int { return 1450 }}
	wantMissing(t, "at first", ports, "")
	wantMissing(t, "at first", br, "")

	run(t, "nft", "flush", "ruleset")
	wantMissing(t, "flushed", ports, "the rules of hostPorts")
	restore(t, ports)
	wantMissing(t, "after it", ports, "")
	rules := run(t, "nft", "list", "table", "ip", "cni_hostport")
	if !strings.Contains(rules, "tcp dport 8080 dnat to 10.42.0.2:80") {
		t.Errorf("the rules are:\n%s", rules)
	}
	// Existing rules are not duplicated.
	restore(t, ports)
	if again := run(t, "nft", "list", "table", "ip", "cni_hostport"); again != rules {
		t.Errorf("a second time:\n%s", again)
	}

	gateway, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer gateway.Close()
	_, port, _ := net.SplitHostPort(gateway.Addr().String())
	connect := func() {
		run(t, "timeout", "5", "ip", "netns", "exec", name, "bash", "-c", ": </dev/tcp/10.42.0.1/"+port)
	}
	connect()
	for _, c := range []struct {
		what    []string
		missing string
	}{
		{[]string{"link", "delete", layout.Bridge}, "the interface " + layout.Bridge + ", which connects the pods"},
		{[]string{"link", "set", layout.Bridge, "down"}, layout.Bridge + " is down: what connects the pods"},
		{[]string{"link", "set", layout.Bridge, "mtu", "1400"}, "the MTU 1450 of " + layout.Bridge},
		{[]string{"address", "flush", "dev", layout.Bridge}, "the address 10.42.0.1/24 of " + layout.Bridge + ", the pods' gateway"},
	} {
		run(t, "ip", c.what...)
		wantMissing(t, strings.Join(c.what, " "), br, c.missing)
		restore(t, br)
		wantMissing(t, "after "+strings.Join(c.what, " "), br, "")
		connect()
	}
	if link, err := netlink.LinkByName(layout.Bridge); err != nil || link.Attrs().Alias != br.alias {
		t.Errorf("a restored bridge is not marked: %v, %v", link, err)
	}
	ends, err := br.ends()
	if err != nil || len(ends) != 1 {
		t.Fatalf("the pod's interfaces are %v, %v", ends, err)
	}
	if err := netlink.LinkSetNoMaster(ends[0]); err != nil {
		t.Fatal(err)
	}
	wantMissing(t, "unplugged", br, "the connection of a pod's interface "+ends[0].Attrs().Name+" to "+layout.Bridge)
	restore(t, br)
	wantMissing(t, "plugged in again", br, "")

	wantLoopbackClosed(t, name)

	// A pod that has ended is ignored, even if libcni's record of it still exists.
	if err := pods.cni.DelNetworkList(t.Context(), list, rt); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "delete", layout.Bridge)
	run(t, "nft", "flush", "ruleset")
	wantMissing(t, "without a pod", ports, "")
	wantMissing(t, "without a pod", br, "")
}

// wantLoopbackClosed checks that a pod, in the network namespace of the name and with the hostPort 8080 for its port 80, does not reach what
// listens on 127.0.0.1, and that its hostPort works there.
func wantLoopbackClosed(t *testing.T, pod string) {
	t.Helper()
	l, err := newLoopback("polymesh-test-pods")
	if err != nil {
		t.Fatal(err)
	}
	const gone = "the rule that keeps pods from 127.0.0.1"
	wantMissing(t, "at first", l, gone)
	run(t, "ip", "link", "set", "lo", "up")
	own, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	_, port, _ := net.SplitHostPort(own.Addr().String())
	// What a pod with NET_RAW sends itself, the kernel sends here.
	inPod := func(name string, args ...string) error {
		return exec.Command("ip", append([]string{"netns", "exec", pod, name}, args...)...).Run()
	}
	for _, line := range []string{"sysctl -w net.ipv4.conf.eth0.route_localnet=1", "ip route add 127.0.0.1/32 via 10.42.0.1 dev eth0"} {
		if args := strings.Fields(line); inPod(args[0], args[1:]...) != nil {
			t.Fatal(line)
		}
	}
	reaches := func() bool { return inPod("timeout", "2", "bash", "-c", ": </dev/tcp/127.0.0.1/"+port) == nil }
	if !reaches() {
		t.Error("without the rule, the pod reaches nothing on 127.0.0.1: what does this test show?")
	}
	restore(t, l)
	wantMissing(t, "once it is made", l, "")
	if reaches() {
		t.Error("a pod reaches what listens on 127.0.0.1")
	}
	listener := make(chan net.Listener, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with it
		var in net.Listener
		if ns, err := os.Open(filepath.Join("/run/netns", pod)); err == nil {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err == nil {
				in, _ = net.Listen("tcp4", "0.0.0.0:80")
			}
			ns.Close()
		}
		listener <- in
	}()
	in := <-listener
	if in == nil {
		t.Fatal("no listener in the pod")
	}
	defer in.Close()
	run(t, "timeout", "5", "bash", "-c", ": </dev/tcp/127.0.0.1/8080")
	for _, flush := range []string{"flush ruleset", "delete chain ip polymesh loopback"} {
		run(t, "nft", strings.Fields(flush)...)
		wantMissing(t, flush, l, gone)
		restore(t, l)
		wantMissing(t, "after "+flush, l, "")
	}
}

// Rules of Docker or ufw, and those that K3s leaves behind, as written by iptables.
func TestObstacles(t *testing.T) {
	newNetworkNamespace(t)
	wantObstacle := func(what, want string) {
		t.Helper()
		got, err := obstacles(t.Context(), "10.42.0.0/24")
		if err != nil || want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(text string) bool { return strings.Contains(text, want) }) {
			t.Errorf("%s: %q, %v; want %q", what, got, err, want)
		}
	}
	wantObstacle("at first", "")
	run(t, "iptables", "-P", "FORWARD", "DROP")
	wantObstacle("with Docker", "a firewall drops forwarded packets (table ip filter, chain FORWARD;")
	run(t, "iptables", "-A", "FORWARD", "-s", "10.42.0.0/16", "-j", "ACCEPT")
	wantObstacle("with a rule for pods", "")
	run(t, "iptables", "-N", "KUBE-ROUTER-FORWARD")
	wantObstacle("after K3s", "run k3s-killall.sh")
}
