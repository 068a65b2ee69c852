package loadbalancer

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/config"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// lb returns a service that was created age seconds after the others' epoch.
func lb(name string, created int, change ...func(*service)) service {
	s := service{
		uid: types.UID("uid-" + name), name: "demo/" + name, created: epoch.Add(time.Duration(created) * time.Second),
		families: []corev1.IPFamily{corev1.IPv4Protocol}, heldPorts: map[Port]bool{},
	}
	for _, c := range change {
		c(&s)
	}
	return s
}

func tcp(n int32) Port { return Port{corev1.ProtocolTCP, n} }
func udp(n int32) Port { return Port{corev1.ProtocolUDP, n} }

func ports(p ...Port) func(*service) { return func(s *service) { s.ports = p } }
func held(p ...Port) func(*service) {
	return func(s *service) {
		for _, p := range p {
			s.heldPorts[p] = true
		}
	}
}
func holds(addr string) func(*service) {
	return func(s *service) { s.heldAddresses = append(s.heldAddresses, netip.MustParseAddr(addr)) }
}
func requests(addr string) func(*service)          { return func(s *service) { s.requested = addr } }
func families(f ...corev1.IPFamily) func(*service) { return func(s *service) { s.families = f } }

func addrs(text ...string) []netip.Addr {
	var out []netip.Addr
	for _, t := range text {
		out = append(out, netip.MustParseAddr(t))
	}
	return out
}

// one returns one node with these addresses.
func one(text ...string) []node { return []node{{"node-1", addrs(text...)}} }

// local sets externalTrafficPolicy to Local, with ready endpoints on these nodes.
func local(nodes ...string) func(*service) {
	return func(s *service) {
		s.local, s.endpoints = true, make(map[string]bool)
		for _, n := range nodes {
			s.endpoints[n] = true
		}
	}
}

func pool(ranges ...string) []config.AddressRange {
	var out []config.AddressRange
	for _, r := range ranges {
		from, to, _ := strings.Cut(r, "-")
		out = append(out, config.AddressRange{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to)})
	}
	return out
}

func TestAllocate(t *testing.T) {
	const dual = "192.0.2.10 2001:db8::10"
	two := []node{{"node-1", addrs("203.0.113.1", "192.0.2.10")}, {"node-2", addrs("192.0.2.11")}}
	node := network{nodes: one("192.0.2.10"), reserved: ReservedPorts(6443)}
	with := func(change func(*network)) network {
		n := node
		change(&n)
		return n
	}
	poolOf := func(ranges ...string) network {
		return network{nodes: node.nodes, reserved: node.reserved, pool: pool(ranges...)}
	}

	for _, tt := range []struct {
		name     string
		net      network
		services []service
		want     map[string]string // name to addresses, or to "reason: a part of the message"
	}{
		{
			name: "different ports share the node's address", net: node,
			services: []service{lb("a", 1, ports(tcp(80), tcp(443))), lb("b", 2, ports(tcp(8080))), lb("c", 3, ports(udp(80)))},
			want:     map[string]string{"a": "192.0.2.10", "b": "192.0.2.10", "c": "192.0.2.10"},
		},
		{
			name: "first come", net: node,
			services: []service{lb("late", 2, ports(tcp(80))), lb("early", 1, ports(tcp(80)))},
			want:     map[string]string{"early": "192.0.2.10", "late": "PortTaken: port 80/TCP is taken by service demo/early;"},
		},
		{
			name: "same age: the UID decides", net: node,
			services: []service{lb("b", 1, ports(tcp(80))), lb("a", 1, ports(tcp(80)))},
			want:     map[string]string{"a": "192.0.2.10", "b": "PortTaken: demo/a"},
		},
		{
			name: "who holds a port keeps it against an older service", net: node,
			services: []service{lb("old", 1, ports(tcp(80))), lb("holder", 2, ports(tcp(80)), held(tcp(80)))},
			want:     map[string]string{"holder": "192.0.2.10", "old": "PortTaken: demo/holder"},
		},
		{
			name: "a holder that adds a free port keeps the one it has", net: node,
			services: []service{lb("old", 1, ports(tcp(80))), lb("holder", 2, ports(tcp(80), tcp(81)), held(tcp(80)))},
			want:     map[string]string{"holder": "192.0.2.10", "old": "PortTaken: demo/holder"},
		},
		{
			name: "a holder that adds a taken port waits as a whole, and the next one gets what it had", net: node,
			services: []service{
				lb("a", 1, ports(tcp(80), tcp(443)), held(tcp(80))),
				lb("b", 2, ports(tcp(443)), held(tcp(443))),
				lb("c", 3, ports(tcp(80))),
			},
			want: map[string]string{"a": "PortTaken: port 443/TCP is taken by service demo/b", "b": "192.0.2.10", "c": "192.0.2.10"},
		},
		{
			name: "a holder that changes to a held port waits", net: node,
			services: []service{lb("a", 1, ports(tcp(80)), held(tcp(8080))), lb("b", 2, ports(tcp(80)), held(tcp(80)))},
			want:     map[string]string{"a": "PortTaken: demo/b", "b": "192.0.2.10"},
		},
		{
			name: "the node's own ports, and all conflicts are named", net: node,
			services: []service{lb("a", 1, ports(tcp(22), tcp(6443), tcp(80))), lb("b", 2, ports(udp(22)))},
			want: map[string]string{
				"a": "PortInUse: port 22/TCP belongs to the node itself (SSH); port 6443/TCP belongs to the node itself (kube-apiserver);",
				"b": "192.0.2.10",
			},
		},
		{
			name: "a reserved port is removed even from its holder", net: node,
			services: []service{lb("a", 1, ports(tcp(6443)), held(tcp(6443)))},
			want:     map[string]string{"a": "PortInUse: kube-apiserver"},
		},
		{
			name: "a port on which a process listens, unless it is held already", net: with(func(n *network) { n.listening = map[Port]bool{tcp(80): true, tcp(81): true} }),
			services: []service{lb("a", 1, ports(tcp(80))), lb("b", 2, ports(tcp(81)), held(tcp(81)))},
			want:     map[string]string{"a": "PortInUse: a process of the node listens on port 80/TCP", "b": "192.0.2.10"},
		},
		{
			name: "another service's node port, but not one's own", net: with(func(n *network) { n.nodePorts = map[Port]string{tcp(30080): "demo/web"} }),
			services: []service{lb("a", 1, ports(tcp(30080))), lb("web", 2, ports(tcp(30080)))},
			want:     map[string]string{"a": "PortTaken: port 30080/TCP is the node port of service demo/web", "web": "192.0.2.10"},
		},
		{
			name: "families: each gets the addresses that it speaks", net: with(func(n *network) { n.nodes = one(strings.Fields(dual)...) }),
			services: []service{
				lb("four", 1, ports(tcp(80))),
				lb("six", 2, ports(tcp(80)), families(corev1.IPv6Protocol)),
				lb("both", 3, ports(tcp(81)), families(corev1.IPv4Protocol, corev1.IPv6Protocol)),
				lb("clash", 4, ports(tcp(80)), families(corev1.IPv6Protocol, corev1.IPv4Protocol)),
			},
			want: map[string]string{"four": "192.0.2.10", "six": "2001:db8::10", "both": dual, "clash": "PortTaken: demo/four"},
		},
		{
			name: "no address of the family", net: node,
			services: []service{lb("six", 1, ports(tcp(80)), families(corev1.IPv6Protocol))},
			want:     map[string]string{"six": "NoAddress: no node has an address of the service's IP family (IPv6)"},
		},
		{
			name: "several nodes: all their addresses, in order", net: with(func(n *network) { n.nodes = two }),
			services: []service{lb("a", 1, ports(tcp(80))), lb("b", 2, ports(tcp(80)))},
			want:     map[string]string{"a": "203.0.113.1 192.0.2.10 192.0.2.11", "b": "PortTaken: demo/a"},
		},
		{
			name: "Local: the nodes with an endpoint, and no one else gets the port on the others", net: with(func(n *network) { n.nodes = two }),
			services: []service{lb("a", 1, ports(tcp(80)), local("node-2", "gone")), lb("b", 2, ports(tcp(80)), local("node-1"))},
			want:     map[string]string{"a": "192.0.2.11", "b": "PortTaken: demo/a"},
		},
		{
			name: "Local without an endpoint: pending, or what it holds, if that is still a node's", net: with(func(n *network) { n.nodes = two }),
			services: []service{
				lb("new", 1, ports(tcp(80)), local()),
				lb("holder", 2, ports(tcp(81)), held(tcp(81)), holds("192.0.2.11"), holds("192.0.2.12"), local("gone")),
				lb("lost", 3, ports(tcp(82)), held(tcp(82)), holds("192.0.2.12"), local()),
			},
			want: map[string]string{"new": "NoEndpoint: externalTrafficPolicy is Local", "holder": "192.0.2.11", "lost": "NoEndpoint: no node"},
		},
		{
			name: "pool: one address each, same ports, the node's too", net: poolOf("192.0.2.100-192.0.2.101"),
			services: []service{lb("a", 1, ports(tcp(80))), lb("b", 2, ports(tcp(80), tcp(22))), lb("c", 3, ports(tcp(80)))},
			want: map[string]string{
				"a": "192.0.2.100", "b": "192.0.2.101",
				"c": "PoolExhausted: --loadbalancer-pool 192.0.2.100-192.0.2.101 has no free IPv4 address",
			},
		},
		{
			name: "pool: who holds an address keeps it", net: poolOf("192.0.2.100-192.0.2.109"),
			services: []service{lb("old", 1, ports(tcp(80))), lb("holder", 2, ports(tcp(80)), holds("192.0.2.100"))},
			want:     map[string]string{"holder": "192.0.2.100", "old": "192.0.2.101"},
		},
		{
			name: "pool: an address that is no longer in it is released", net: poolOf("192.0.2.100-192.0.2.109"),
			services: []service{lb("a", 1, ports(tcp(80)), holds("192.0.2.10"))},
			want:     map[string]string{"a": "192.0.2.100"},
		},
		{
			name: "pool: requests", net: poolOf("192.0.2.100-192.0.2.109"),
			services: []service{
				lb("a", 1, requests("192.0.2.105")), lb("b", 2, requests("192.0.2.105")),
				lb("c", 3, requests("192.0.2.1")), lb("d", 4, requests("nonsense")),
				lb("moves", 5, holds("192.0.2.101"), requests("192.0.2.102")),
			},
			want: map[string]string{
				"a": "192.0.2.105", "b": "AddressTaken: address 192.0.2.105 is taken by service demo/a",
				"c": "AddressNotInPool: spec.loadBalancerIP 192.0.2.1 is not", "d": "AddressNotInPool: nonsense",
				"moves": "192.0.2.102",
			},
		},
		{
			name: "pool: the machine's own addresses are left out",
			net: network{pool: pool("192.0.2.100-192.0.2.102"), used: map[netip.Addr]string{
				netip.MustParseAddr("192.0.2.100"): "eth0", netip.MustParseAddr("192.0.2.102"): "eth1"}},
			services: []service{lb("a", 1), lb("b", 2, requests("192.0.2.102")), lb("c", 3, holds("192.0.2.100"))},
			want: map[string]string{
				"a": "192.0.2.101", "b": "AddressTaken: the machine's own, on interface eth1",
				"c": "PoolExhausted: no free",
			},
		},
		{
			name:     "pool: what a node says is its address is not given to a service, and taken from none",
			net:      network{pool: pool("192.0.2.100-192.0.2.102"), claimed: map[netip.Addr]string{netip.MustParseAddr("192.0.2.100"): "a", netip.MustParseAddr("192.0.2.101"): "evil"}},
			services: []service{lb("a", 1), lb("b", 2, requests("192.0.2.100")), lb("c", 3, holds("192.0.2.101"))},
			want: map[string]string{
				"a": "192.0.2.102", "b": "AddressTaken: address 192.0.2.100 is that of node a", "c": "192.0.2.101",
			},
		},
		{
			name: "pool: ranges of both families", net: poolOf("2001:db8::100-2001:db8::1ff", "192.0.2.100-192.0.2.100", "192.0.2.200-192.0.2.200"),
			services: []service{
				lb("a", 1), lb("b", 2), lb("c", 3, families(corev1.IPv4Protocol, corev1.IPv6Protocol)),
				lb("d", 4), lb("e", 5, families(corev1.IPv6Protocol)),
			},
			want: map[string]string{
				"a": "192.0.2.100", "b": "192.0.2.200", "c": "2001:db8::100",
				"d": "PoolExhausted: free IPv4 address", "e": "2001:db8::101",
			},
		},
		{
			name: "pool: it may end with the last address there is", net: poolOf("255.255.255.255-255.255.255.255"),
			services: []service{lb("a", 1), lb("b", 2)},
			want:     map[string]string{"a": "255.255.255.255", "b": "PoolExhausted: no free"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			decisions := allocate(tt.services, tt.net)
			for _, s := range tt.services {
				d := decisions[s.uid]
				want := tt.want[strings.TrimPrefix(s.name, "demo/")]
				reason, part, pending := strings.Cut(want, ": ")
				switch {
				case pending && (d.reason != reason || !strings.Contains(d.message, part) || len(d.addresses) > 0):
					t.Errorf("%s: got %v, want %s", s.name, d, want)
				case !pending && (!slices.Equal(d.addresses, addrs(strings.Fields(want)...)) || d.reason != "" || d.message != ""):
					t.Errorf("%s: got %v, want %s", s.name, d, want)
				}
			}
		})
	}
}

// Whatever the services request and were given before, no two share an address, protocol and port, no one gets a
// reserved port, every service gets either addresses or a reason, the order of the list does not matter, and once
// decided nothing changes when it is called again.
func TestAllocateProperties(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		net := network{nodes: []node{{"node-1", addrs("192.0.2.10", "2001:db8::10")}, {"node-2", addrs("192.0.2.11")}}, reserved: map[Port]string{tcp(3): "kubelet"}}
		net.listening = map[Port]bool{tcp(r.Int32N(8)): true}
		net.nodePorts = map[Port]string{tcp(r.Int32N(8)): fmt.Sprint("demo/", r.IntN(8))}
		if r.IntN(2) == 0 {
			net.pool = pool("192.0.2.100-192.0.2.104", "2001:db8::100-2001:db8::101")
			net.used = map[netip.Addr]string{netip.MustParseAddr("192.0.2.101"): "eth0"}
		}
		randomAddr := func() string { return fmt.Sprint("192.0.2.", 98+r.IntN(8)) }
		var services []service
		for i := range 1 + r.IntN(8) {
			s := lb(fmt.Sprint(i), r.IntN(4))
			for n := range int32(8) {
				p := Port{corev1.ProtocolTCP, n}
				if r.IntN(2) == 0 {
					p.Protocol = corev1.ProtocolUDP
				}
				if r.IntN(4) == 0 {
					s.ports = append(s.ports, p)
				}
				if r.IntN(4) == 0 {
					s.heldPorts[p] = true
				}
			}
			s.families = [][]corev1.IPFamily{
				{corev1.IPv4Protocol}, {corev1.IPv6Protocol}, {corev1.IPv6Protocol, corev1.IPv4Protocol},
			}[r.IntN(3)]
			if r.IntN(3) == 0 {
				s.heldAddresses = addrs(randomAddr())
			}
			if r.IntN(5) == 0 {
				s.requested = randomAddr()
			}
			if r.IntN(3) == 0 {
				s.local, s.endpoints = true, map[string]bool{[]string{"node-1", "node-2", "gone"}[r.IntN(3)]: true}
			}
			services = append(services, s)
		}

		first := allocate(services, net)
		type claim struct {
			netip.Addr
			Port
		}
		owner := make(map[claim]string)
		for _, s := range services {
			d, ok := first[s.uid]
			if !ok || (len(d.addresses) == 0) == (d.reason == "") || (d.reason == "") != (d.message == "") {
				t.Fatalf("seed %d: %s: decision %+v", seed, s.name, d)
			}
			for _, a := range d.addresses {
				if !s.speaks(a) {
					t.Fatalf("seed %d: %s of %v got %v", seed, s.name, s.families, a)
				}
				if net.pool != nil && (!inPool(net.pool, a) || net.used[a] != "") {
					t.Fatalf("seed %d: %s got %v", seed, s.name, a)
				}
				for _, p := range s.ports {
					if other := owner[claim{a, p}]; other != "" {
						t.Fatalf("seed %d: %s and %s share %v %v", seed, s.name, other, a, p)
					}
					owner[claim{a, p}] = s.name
					if net.pool == nil && net.reserved[p] != "" {
						t.Fatalf("seed %d: %s got %v", seed, s.name, p)
					}
				}
			}
		}

		shuffled := slices.Clone(services)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		compare(t, seed, "shuffled", first, allocate(shuffled, net))

		// What the controller writes is what it reads the next time.
		for i, s := range services {
			d := first[s.uid]
			services[i].heldAddresses, services[i].heldPorts = d.addresses, map[Port]bool{}
			if net.pool == nil && len(d.addresses) > 0 {
				for _, p := range s.ports {
					services[i].heldPorts[p] = true
				}
			}
		}
		second := allocate(services, net)
		for uid, d := range first {
			if len(d.addresses) > 0 && !slices.Equal(d.addresses, second[uid].addresses) {
				t.Fatalf("seed %d: %s had %v and gets %+v", seed, uid, d.addresses, second[uid])
			}
		}
	}
}

func compare(t *testing.T, seed uint64, what string, a, b map[types.UID]decision) {
	t.Helper()
	for uid := range a {
		if !slices.Equal(a[uid].addresses, b[uid].addresses) || a[uid].message != b[uid].message {
			t.Fatalf("seed %d, %s: %s: %+v and %+v", seed, what, uid, a[uid], b[uid])
		}
	}
}
