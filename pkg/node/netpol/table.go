package netpol

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/layout"
)

// Types of sets, in nft's words.
const (
	addressType = "ipv4_addr"
	pairType    = "ipv4_addr . ipv4_addr"
	portType    = "ipv4_addr . inet_proto . inet_service"
	verdictType = "ipv4_addr : verdict"
)

// Sets that always exist while there is a policy.
const (
	// knownSet has the addresses of the pods of this node whose policies are compiled.
	knownSet = "known"
	// selfSet has each isolated pod's address twice: no policy keeps a pod from itself.
	selfSet = "self"
)

// Table is the content of the packet filter table: the result of Compile, by which two states are compared.
//
// A packet between two pods passes two base chains, of the sender's node for egress and of the receiver's for ingress, both if they
// are on one node. "accept" ends only the base chain that it is in, so each direction decides for itself.
type Table struct {
	Sets   map[string]*Set
	Maps   map[string]*Map
	Chains map[string]*Chain
	// Isolated is the number of pods of this node to which a policy applies.
	Isolated int
}

// Set is a set of tuples. Elements are keyed by their text in nft's language.
type Set struct {
	Type     string
	Elements map[string][]string
}

// Map maps addresses to chains.
type Map struct {
	Elements map[string]string
}

// Chain is a chain; with a Hook, one that packets enter.
type Chain struct {
	Hook     knftables.BaseChainHook
	Priority knftables.BaseChainPriority
	Comment  string
	Rules    []Rule
}

// Rule is a rule: all conditions that are set must hold.
type Rule struct {
	Direction direction
	// Text is a condition in nft's language, of a rule that does not depend on policies.
	Text string
	// Peers is a set with the address of the other side.
	Peers string
	// Blocks are addresses of the other side.
	Blocks []span
	// Protocol and Ports are those of the destination.
	Protocol string
	Ports    []span
	// NamedPorts is a set with address, protocol and port of the destination.
	NamedPorts string
	Verdict    string
}

func newTable() *Table {
	return &Table{Sets: map[string]*Set{}, Maps: map[string]*Map{}, Chains: map[string]*Chain{}}
}

// Empty reports whether there is nothing to enforce.
func (t *Table) Empty() bool { return len(t.Chains) == 0 }

func (t *Table) set(name, kind string) *Set {
	s, ok := t.Sets[name]
	if !ok {
		s = &Set{Type: kind, Elements: map[string][]string{}}
		t.Sets[name] = s
	}
	return s
}

// verdicts is the map from an isolated pod's address to its chain.
func (t *Table) verdicts(d direction) *Map {
	name := "isolated-" + string(d)
	m, ok := t.Maps[name]
	if !ok {
		m = &Map{Elements: map[string]string{}}
		t.Maps[name] = m
	}
	return m
}

func (s *Set) add(key ...string) { s.Elements[strings.Join(key, " . ")] = key }

func (m *Map) put(address, chain string) { m.Elements[address] = "jump " + chain }

// Base chains. kube-proxy translates service addresses in prerouting, so that here a packet has its final destination, and still
// the sender's address: source addresses are translated in postrouting.
const (
	egressChain  = "forward-out"
	ingressChain = "forward-in"
	nodeChain    = "input-out"
)

// Before other filters, whose accept does not matter here, as ours does not there.
const (
	egressPriority  = knftables.FilterPriority + "-10"
	ingressPriority = knftables.FilterPriority + "-9"
)

// addBaseChains adds the rules that every packet passes. A packet between two pods of one bridge passes them too
// (net.bridge.bridge-nf-call-iptables), and both of its interfaces are the bridge then. The node's own packets, such as probes of
// the kubelet, do not: they leave by the output hook.
func (t *Table) addBaseChains() {
	// Replies belong to a connection that was allowed. A connection that exists when a policy is created continues, as in K3s.
	established := Rule{Text: "ct state established,related", Verdict: "accept"}
	// Pods have IPv4 addresses only. Link-local IPv6 between two pods of a bridge would go around each policy.
	ipv6 := func(condition string) Rule { return Rule{Text: "meta nfproto ipv6 " + condition, Verdict: "drop"} }
	from, to := fmt.Sprintf("iifname %q", layout.Bridge), fmt.Sprintf("oifname %q", layout.Bridge)
	// A pod that is not known yet may be one with a policy. Nothing but pods is behind the bridge; multicast is not either.
	unknown := func(condition, side string) Rule {
		return Rule{Text: condition + " ip " + side + " != @" + knownSet, Verdict: "drop"}
	}
	self := Rule{Text: "ip saddr . ip daddr @" + selfSet, Verdict: "accept"}
	isolated := func(side string, d direction) Rule {
		return Rule{Text: "ip " + side, Verdict: "vmap @isolated-" + string(d)}
	}
	t.Chains[egressChain] = &Chain{Hook: knftables.ForwardHook, Priority: egressPriority, Rules: []Rule{
		established, ipv6(from), ipv6(to), unknown(from, "saddr"), self, isolated("saddr", egress),
	}}
	t.Chains[ingressChain] = &Chain{Hook: knftables.ForwardHook, Priority: ingressPriority, Rules: []Rule{
		established, unknown(to, "daddr"), self, isolated("daddr", ingress),
	}}
	// Services of the node itself are a destination like others.
	t.Chains[nodeChain] = &Chain{Hook: knftables.InputHook, Priority: egressPriority, Rules: []Rule{
		established, ipv6(from), unknown(from, "saddr"), isolated("saddr", egress),
	}}
}

// nft returns the rule in nft's language. All texts in it are ours: names of sets and chains are hashes.
func (r Rule) nft() string {
	side := "saddr"
	if r.Direction == egress {
		side = "daddr"
	}
	var parts []string
	if r.Text != "" {
		parts = append(parts, r.Text)
	}
	if r.Peers != "" {
		parts = append(parts, "ip "+side+" @"+r.Peers)
	}
	if len(r.Blocks) > 0 {
		parts = append(parts, "ip "+side+" { "+join(r.Blocks, addressText)+" }")
	}
	switch {
	case r.Protocol != "" && len(r.Ports) == 1 && r.Ports[0] == (span{0, 65535}):
		parts = append(parts, "meta l4proto "+r.Protocol)
	case r.Protocol != "":
		parts = append(parts, r.Protocol+" dport { "+join(r.Ports, func(n uint32) string { return fmt.Sprint(n) })+" }")
	}
	if r.NamedPorts != "" {
		parts = append(parts, "ip daddr . meta l4proto . th dport @"+r.NamedPorts)
	}
	return strings.Join(append(parts, r.Verdict), " ")
}

func join(spans []span, text func(uint32) string) string {
	parts := make([]string, len(spans))
	for i, s := range spans {
		if parts[i] = text(s.From); s.To != s.From {
			parts[i] += "-" + text(s.To)
		}
	}
	return strings.Join(parts, ", ")
}

func addressText(n uint32) string {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b).String()
}
