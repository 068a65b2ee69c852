//go:build integration

package netpol

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/layout"
)

func realKernel(t *testing.T) *kernel {
	t.Helper()
	nft, err := knftables.New(knftables.InetFamily, layout.PolicyTable)
	must(t, err)
	return &kernel{nft: nft}
}

func (k *kernel) must(t *testing.T, c Cluster) *Table {
	t.Helper()
	table := compile(t, c)
	must(t, k.apply(t.Context(), table))
	return table
}

// packets are all packets between the addresses.
func packets(addrs []netip.Addr, protocols []corev1.Protocol, ports ...int32) (out []packet) {
	for _, from := range addrs {
		for _, to := range addrs {
			// What never leaves the other node is not ours.
			if from == to || !fromHere.Contains(from) && !fromHere.Contains(to) {
				continue
			}
			for _, protocol := range protocols {
				for _, port := range ports {
					out = append(out, packet{from, to, protocol, uint16(port)})
				}
			}
		}
	}
	return out
}

var fromHere = netip.MustParsePrefix("10.42.0.0/24")

// passes is what the kernel should do: as in the table, and the node's own packets always pass.
func (m *machine) passes(table *Table) func(packet) bool {
	return func(p packet) bool { return p.From == m.node.addr || table.allows(p) }
}

// The kernel treats real packets as the table does, for random policies: between pods of one node over the bridge, to and from
// pods of another node, from outside, to the node and from it. TestLikeKubeNetworkPolicies shows that the table is right.
func TestPackets(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	ports := []int32{79, 80, 81, 443}
	l := newLab(t, m, ports)
	k := realKernel(t)
	all := packets(m.addrs(), []corev1.Protocol{corev1.ProtocolUDP, corev1.ProtocolTCP, corev1.ProtocolSCTP}, ports...)
	l.check("without policies", all, func(packet) bool { return true })
	random := rand.New(rand.NewPCG(5, 6))
	arrived := 0
	const states = 40
	for i := range states {
		c := randomCluster(random)
		table := k.must(t, c)
		want := m.passes(table)
		l.check(fmt.Sprintf("state %d", i), all, want)
		for _, p := range all {
			if want(p) {
				arrived++
			}
		}
		if t.Failed() {
			t.Fatalf("state %d: %v\n%s", i, c, list(t))
		}
	}
	t.Logf("%d packets, %d of them allowed", states*len(all), arrived)
	k.must(t, Cluster{})
	if text := list(t); strings.Contains(text, layout.PolicyTable) {
		t.Errorf("without policies there are rules:\n%s", text)
	}
}

// list returns the rules in the kernel.
func list(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// pods are the machine's, in one namespace, with their last byte as label n.
func pods(last ...string) (out []Pod) {
	for _, n := range last {
		out = append(out, Pod{Namespace: "a", Name: "pod-" + n, Labels: labels.Set{"n": n}, Addresses: []netip.Addr{netip.MustParseAddr("10.42.0." + n)}, Local: true})
	}
	return out
}

func policy(spec networkingv1.NetworkPolicySpec) []*networkingv1.NetworkPolicy {
	return []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}, Spec: spec}}
}

func selects(n string) metav1.LabelSelector {
	return metav1.LabelSelector{MatchLabels: map[string]string{"n": n}}
}

func from(n string) []networkingv1.NetworkPolicyIngressRule {
	s := selects(n)
	return []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &s}}}}
}

var bothWays = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}

// A pod of which the policies are not known yet sends and receives nothing, if there is any policy; without one, it is not held up.
func TestUnknownPod(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	l := newLab(t, m, []int32{80})
	k := realKernel(t)
	all := packets(m.addrs(), []corev1.Protocol{corev1.ProtocolUDP, corev1.ProtocolTCP}, 80)
	k.must(t, Cluster{Pods: pods("2", "3", "4")})
	l.check("without policies", all, func(packet) bool { return true })
	fifth := netip.MustParseAddr("10.42.0.5")
	c := Cluster{Pods: pods("2", "3", "4"), Policies: policy(networkingv1.NetworkPolicySpec{PodSelector: selects("none")})}
	k.must(t, c)
	// The node's own packets are not filtered. Of a connection that it opens, the replies pass.
	l.check("with a policy of others", all, func(p packet) bool { return p.From == m.node.addr || p.From != fifth && p.To != fifth })
	c.Pods = pods("2", "3", "4", "5")
	k.must(t, c)
	l.check("once it is known", all, func(packet) bool { return true })
	c.Policies = policy(networkingv1.NetworkPolicySpec{PodSelector: selects("5"), PolicyTypes: bothWays})
	k.must(t, c)
	l.check("with its policy", all, func(p packet) bool { return p.From == m.node.addr || p.From != fifth && p.To != fifth })
}

const (
	// longEnough is the time for what should arrive, dropped that for what should not: a packet filter that lets it pass does so at once.
	longEnough = 30 * time.Second
	dropped    = 500 * time.Millisecond
)

// Existing connections continue when a policy comes, and new ones do not begin.
func TestEstablished(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	newLab(t, m, []int32{80})
	k := realKernel(t)
	dial := func(to string, timeout time.Duration) (conn net.Conn, err error) {
		m.pods["2"].do(func() { conn, err = net.DialTimeout("tcp4", to, timeout) })
		return conn, err
	}
	echo := func(conn net.Conn) {
		t.Helper()
		_, err := conn.Write([]byte("x"))
		must(t, err)
		must(t, conn.SetReadDeadline(time.Now().Add(longEnough)))
		_, err = conn.Read(make([]byte, 1))
		must(t, err)
	}
	conn, err := dial("10.42.0.3:80", longEnough)
	must(t, err)
	defer conn.Close()
	echo(conn)
	k.must(t, Cluster{Pods: pods("2", "3", "4", "5"), Policies: policy(networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{}, PolicyTypes: bothWays})})
	echo(conn)
	if _, err := dial("10.42.0.3:80", dropped); err == nil {
		t.Error("a new connection begins")
	}
}

// Policies see the address behind a Service, where kube-proxy has translated it, and the sender's own. A pod reaches itself through a
// Service whatever its policies.
func TestServices(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	newLab(t, m, []int32{8080})
	k := realKernel(t)
	m.world.do(func() { route(t, "10.43.0.0/16", "198.18.0.1") })
	reaches := func(h *host, to string, should bool) bool {
		var conn net.Conn
		var err error
		timeout := map[bool]time.Duration{true: longEnough, false: dropped}[should]
		h.do(func() { conn, err = net.DialTimeout("tcp4", to, timeout) })
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	const service, nodePort = "10.43.0.10:80", "198.18.0.1:30080"
	check := func(what string, want map[string]bool) {
		t.Helper()
		for who, h := range map[string]*host{"2": m.pods["2"], "3": m.pods["3"], "4": m.pods["4"], "world": m.world} {
			if got := reaches(h, service, want[who]); got != want[who] {
				t.Errorf("%s: %s reaches the Service: %v", what, who, got)
			}
		}
		if got := reaches(m.world, nodePort, want["world"]); got != want["world"] {
			t.Errorf("%s: the world reaches the NodePort: %v", what, got)
		}
	}
	c := Cluster{Pods: pods("2", "3", "4", "5")}
	k.must(t, c)
	check("without policies", map[string]bool{"2": true, "3": true, "4": true, "world": true})
	c.Policies = policy(networkingv1.NetworkPolicySpec{PodSelector: selects("3"), PolicyTypes: bothWays, Ingress: from("2")})
	k.must(t, c)
	check("from pod 2", map[string]bool{"2": true, "3": true})
	port := intstr.FromInt32(8080)
	c.Policies = policy(networkingv1.NetworkPolicySpec{PodSelector: selects("3"), Ingress: []networkingv1.NetworkPolicyIngressRule{{
		Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}, From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "198.18.0.2/32"}}}}}})
	k.must(t, c)
	check("from outside", map[string]bool{"3": true, "world": true})
	c.Policies = policy(networkingv1.NetworkPolicySpec{PodSelector: selects("2"), PolicyTypes: bothWays, Egress: []networkingv1.NetworkPolicyEgressRule{{
		To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.43.0.10/32"}}}}}})
	k.must(t, c)
	check("egress to the Service's own address", map[string]bool{"3": true, "4": true, "world": true})
}

// Pods have link-local addresses of IPv6, which no policy names.
func TestIPv6(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	k := realKernel(t)
	var server, client net.PacketConn
	var err error
	m.pods["3"].do(func() { server, err = net.ListenPacket("udp6", "[fd00::3]:80") })
	must(t, err)
	defer server.Close()
	m.pods["2"].do(func() { client, err = net.ListenPacket("udp6", "[fd00::2]:0") })
	must(t, err)
	defer client.Close()
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[fd00::3]:80"))
	sent := byte(0)
	arrives := func(wait time.Duration) bool {
		sent++
		_, err := client.WriteTo([]byte{sent}, to)
		must(t, err)
		must(t, server.SetReadDeadline(time.Now().Add(wait)))
		for got := make([]byte, 1); ; {
			if _, _, err := server.ReadFrom(got); err != nil {
				return false
			}
			// What was sent before may have been late.
			if got[0] == sent {
				return true
			}
		}
	}
	eventually(t, "without policies it arrives", func() bool { return arrives(time.Second) })
	k.must(t, Cluster{Pods: pods("2", "3", "4", "5"), Policies: policy(networkingv1.NetworkPolicySpec{})})
	if arrives(200 * time.Millisecond) {
		t.Error("with a policy it arrives")
	}
	k.must(t, Cluster{})
	eventually(t, "without policies it arrives again", func() bool { return arrives(time.Second) })
}

// Texts that could break out of a rule do not, with the real program.
func TestHostileTextsInTheKernel(t *testing.T) {
	if !private(t) {
		return
	}
	k := realKernel(t)
	table, problems := Compile(hostileCluster())
	if len(problems) == 0 {
		t.Error("no problem is reported")
	}
	must(t, k.apply(t.Context(), table))
	text := list(t)
	if strings.Contains(text, "evil") || strings.Count(text, "table ") != 1 {
		t.Errorf("the rules are:\n%s", text)
	}
}

// How long a connection between two pods takes to open when its pod has many policies, the last of which allows it, and a packet of
// an open one. It fails on nothing but errors.
func TestConnectionCost(t *testing.T) {
	if !private(t) {
		return
	}
	m := newMachine(t)
	newLab(t, m, []int32{80})
	k := realKernel(t)
	for _, n := range []int{0, 10, 100, 1000} {
		c := Cluster{Pods: pods("2", "3", "4", "5")}
		for i := range n {
			p := policy(networkingv1.NetworkPolicySpec{PodSelector: selects("3"), Ingress: from("none")})[0]
			p.Name = fmt.Sprintf("p%04d", i)
			if i == n-1 {
				p.Spec.Ingress = from("2")
			}
			c.Policies = append(c.Policies, p)
		}
		k.must(t, c)
		var opens, trips []time.Duration
		m.pods["2"].do(func() {
			for range 500 {
				begin := time.Now()
				conn, err := net.DialTimeout("tcp4", "10.42.0.3:80", 10*time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				opens = append(opens, time.Since(begin))
				begin = time.Now()
				if _, err = conn.Write([]byte("x")); err == nil {
					_, err = conn.Read(make([]byte, 1))
				}
				if err != nil {
					t.Error(err)
				}
				trips = append(trips, time.Since(begin))
				conn.Close()
			}
		})
		slices.Sort(opens)
		slices.Sort(trips)
		if len(opens) > 0 {
			t.Logf("%d policies: a connection opens in %s (p99 %s), a round trip takes %s (p99 %s)", n,
				opens[len(opens)/2], opens[len(opens)*99/100], trips[len(trips)/2], trips[len(trips)*99/100])
		}
	}
}

// How long a change takes among many policies. It fails on nothing but errors: see docs/operate/network-policy.md for the numbers.
func TestScale(t *testing.T) {
	if !private(t) {
		return
	}
	k := realKernel(t)
	for _, n := range []int{10, 100, 1000} {
		c := big(n)
		measure := func(what string) {
			begin := time.Now()
			table := compile(t, c)
			compiled := time.Since(begin)
			must(t, k.apply(t.Context(), table))
			t.Logf("%d policies and pods, %s: compiled in %s, in force after %s", n, what, compiled.Round(10*time.Microsecond), time.Since(begin).Round(100*time.Microsecond))
		}
		measure("all")
		c.Pods = append(c.Pods, Pod{Namespace: "ns-3", Name: "new", Labels: labels.Set{"app": "app-7"}, Addresses: []netip.Addr{netip.MustParseAddr("10.42.99.1")}, Local: true})
		measure("a new pod")
		c.Policies[5] = c.Policies[5].DeepCopy()
		c.Policies[5].Spec.Ingress[0].From = nil
		measure("a policy changes")
		begin := time.Now()
		missing, err := k.missing(t.Context())
		if missing || err != nil {
			t.Errorf("missing: %v, %v", missing, err)
		}
		t.Logf("%d policies and pods, the check whether the rules are there: %s", n, time.Since(begin).Round(100*time.Microsecond))
	}
}
