package loadbalancer

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/config"
)

// Port is a port number together with its protocol.
type Port struct {
	Protocol corev1.Protocol
	Number   int32
}

func (p Port) String() string { return fmt.Sprintf("%d/%s", p.Number, p.Protocol) }

// Reasons of events about pending services.
const (
	reasonPortTaken        = "PortTaken"
	reasonPortInUse        = "PortInUse"
	reasonPoolExhausted    = "PoolExhausted"
	reasonAddressNotInPool = "AddressNotInPool"
	reasonAddressTaken     = "AddressTaken"
	reasonNoAddress        = "NoAddress"
	reasonNoEndpoint       = "NoEndpoint"
)

// service is the relevant part of a Service of type LoadBalancer.
type service struct {
	uid      types.UID
	name     string // namespace/name
	created  time.Time
	ports    []Port
	families []corev1.IPFamily // the primary one first
	// requested is spec.loadBalancerIP.
	requested string
	// local is whether spec.externalTrafficPolicy is Local: only nodes with a ready endpoint, which endpoints are, pass traffic on.
	local     bool
	endpoints map[string]bool

	// heldPorts and heldAddresses are what it was given before, according to its status.
	heldPorts     map[Port]bool
	heldAddresses []netip.Addr
	// announcer is the node that announces the address of the pool; empty if there is none.
	announcer string
}

// network is which addresses and ports are available, and which are not.
type network struct {
	// nodes are the nodes whose addresses services get, in the order in which they are published.
	nodes []node
	// reserved ports always belong to the nodes; the value is their owner. No service gets or keeps one.
	reserved map[Port]string
	// listening are the ports on which a process of the server's node currently listens. A service that holds one keeps it: its traffic
	// never reaches the process.
	listening map[Port]bool
	// nodePorts are the ports that a Service of any type has on the node, with its namespace/name.
	nodePorts map[Port]string

	// pool, if there is one, replaces the node's addresses: each service gets its own.
	pool []config.AddressRange
	// used are other addresses of this machine, with the interface that has them.
	used map[netip.Addr]string
	// claimed are the addresses that nodes report as theirs, with the node's name. They are given to no service, but taken from none: a
	// node writes its own status.
	claimed map[netip.Addr]string
	// announcers are the nodes that can announce an address of the pool.
	announcers []announcer
}

// decision is the result for a service: addresses, or the reason why it gets none.
type decision struct {
	addresses       []netip.Addr
	reason, message string
	// announcer is the node that announces the address of the pool.
	announcer string
}

// allocate decides for all services at once. No two of them ever get the same address, protocol and port: that is the key
// of kube-proxy's map (pkg/proxy/nftables, service-ips), in which the later one would silently replace the earlier.
// Services that hold what they request keep it; the others are served in order of creation.
func allocate(services []service, net network) map[types.UID]decision {
	if len(net.pool) > 0 {
		return allocatePool(services, net)
	}
	return allocateNode(services, net)
}

func allocateNode(services []service, net network) map[types.UID]decision {
	// A service that holds all it requests goes before one that requests something in addition, and that one before a new
	// one.
	rank := func(s service) int {
		switch held := s.countHeld(); {
		case held == len(s.ports):
			return 0
		case held > 0:
			return 1
		default:
			return 2
		}
	}
	order := slices.SortedFunc(slices.Values(services), func(a, b service) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), firstCome(a, b))
	})

	type claim struct {
		netip.Addr
		Port
	}
	taken := make(map[claim]string)
	decisions := make(map[types.UID]decision, len(services))
	for _, s := range order {
		// A port belongs to one service on all nodes, also if that publishes the addresses of some only: pods move.
		addresses := s.reachable(allAddresses(net.nodes))
		if len(addresses) == 0 {
			decisions[s.uid] = s.noAddress("no node has an address")
			continue
		}
		var conflicts []string
		var reason string
		conflict := func(r, format string, args ...any) {
			reason = cmp.Or(reason, r)
			conflicts = append(conflicts, fmt.Sprintf(format, args...))
		}
		for _, p := range s.ports {
			owner := ""
			for _, a := range addresses {
				owner = cmp.Or(owner, taken[claim{a, p}])
			}
			nodePortOwner, isNodePort := net.nodePorts[p]
			switch {
			case net.reserved[p] != "":
				conflict(reasonPortInUse, "port %s belongs to the node itself (%s)", p, net.reserved[p])
			case owner != "":
				conflict(reasonPortTaken, "port %s is taken by service %s", p, owner)
			case s.heldPorts[p]:
			case isNodePort && nodePortOwner != s.name:
				conflict(reasonPortTaken, "port %s is the node port of service %s", p, nodePortOwner)
			case net.listening[p]:
				conflict(reasonPortInUse, "a process of the node listens on port %s", p)
			}
		}
		if conflicts != nil {
			decisions[s.uid] = decision{reason: reason, message: strings.Join(conflicts, "; ") +
				"; choose another port or free this one, or start the server with --loadbalancer-pool, which gives each service its own address"}
			continue
		}
		for _, p := range s.ports {
			for _, a := range addresses {
				taken[claim{a, p}] = s.name
			}
		}
		decisions[s.uid] = s.published(net.nodes, addresses)
	}
	return decisions
}

// published returns those of the addresses that the service's status gets: with externalTrafficPolicy Local, those of the nodes that have
// a ready endpoint. While none has, a service keeps what it holds, as it would at a cloud's load balancer.
func (s service) published(nodes []node, addresses []netip.Addr) decision {
	if !s.local {
		return decision{addresses: addresses}
	}
	var local []node
	for _, n := range nodes {
		if s.endpoints[n.name] {
			local = append(local, n)
		}
	}
	out := s.reachable(allAddresses(local))
	if len(out) == 0 {
		for _, a := range addresses {
			if slices.Contains(s.heldAddresses, a) {
				out = append(out, a)
			}
		}
	}
	if len(out) == 0 {
		return decision{reason: reasonNoEndpoint, message: "externalTrafficPolicy is Local, and no node that is Ready has a ready endpoint of the service"}
	}
	return decision{addresses: out}
}

func allocatePool(services []service, net network) map[types.UID]decision {
	order := slices.SortedFunc(slices.Values(services), firstCome)
	decisions := make(map[types.UID]decision, len(services))
	taken := make(map[netip.Addr]string)
	give := func(s service, a netip.Addr) {
		taken[a] = s.name
		decisions[s.uid] = decision{addresses: []netip.Addr{a}, announcer: elect(s, a, net.announcers)}
	}
	free := func(a netip.Addr) bool { return taken[a] == "" && net.used[a] == "" && net.claimed[a] == "" }

	for _, s := range order {
		for _, a := range s.heldAddresses {
			if inPool(net.pool, a) && taken[a] == "" && net.used[a] == "" && s.speaks(a) && (s.requested == "" || s.requested == a.String()) {
				give(s, a)
				break
			}
		}
	}
	// next is where the search for a free address of a family continues: an address that was skipped does not become free.
	next := make(map[corev1.IPFamily]position)
	for _, s := range order {
		if _, done := decisions[s.uid]; done {
			continue
		}
		if s.requested != "" {
			decisions[s.uid] = s.request(net, taken, give)
			continue
		}
		a, ok := netip.Addr{}, false
		for _, family := range s.families {
			if a, next[family], ok = search(net.pool, next[family], family, free); ok {
				break
			}
		}
		if !ok {
			decisions[s.uid] = decision{reason: reasonPoolExhausted, message: fmt.Sprintf(
				"--loadbalancer-pool %s has no free %s address; delete a service of type LoadBalancer or start the server with a larger pool",
				poolText(net.pool), familyText(s.families))}
			continue
		}
		give(s, a)
	}
	return decisions
}

// request decides for a service that requests a specific address.
func (s service) request(net network, taken map[netip.Addr]string, give func(service, netip.Addr)) decision {
	a, err := netip.ParseAddr(s.requested)
	switch {
	case err != nil || !inPool(net.pool, a):
		return decision{reason: reasonAddressNotInPool, message: fmt.Sprintf(
			"spec.loadBalancerIP %s is not an address of --loadbalancer-pool %s", s.requested, poolText(net.pool))}
	case !s.speaks(a):
		return s.noAddress("spec.loadBalancerIP " + s.requested + " is not an address")
	case taken[a] != "":
		return decision{reason: reasonAddressTaken, message: fmt.Sprintf("address %s is taken by service %s; choose another one", a, taken[a])}
	case net.used[a] != "":
		return decision{reason: reasonAddressTaken, message: fmt.Sprintf("address %s is the machine's own, on interface %s; choose another one", a, net.used[a])}
	case net.claimed[a] != "":
		return decision{reason: reasonAddressTaken, message: fmt.Sprintf("address %s is that of node %s; choose another one", a, net.claimed[a])}
	}
	give(s, a)
	return decision{addresses: []netip.Addr{a}, announcer: elect(s, a, net.announcers)}
}

func (s service) noAddress(what string) decision {
	return decision{reason: reasonNoAddress, message: fmt.Sprintf("%s of the service's IP family (%s)", what, familyText(s.families))}
}

// position is the state of a search in a pool.
type position struct {
	rng  int
	addr netip.Addr // not valid: the range's first
}

// search returns the next free address of a family from pos on, and where the search after it begins.
func search(pool []config.AddressRange, pos position, family corev1.IPFamily, free func(netip.Addr) bool) (netip.Addr, position, bool) {
	for ; pos.rng < len(pool); pos = (position{rng: pos.rng + 1}) {
		rng := pool[pos.rng]
		if familyOf(rng.From) != family {
			continue
		}
		if !pos.addr.IsValid() {
			pos.addr = rng.From
		}
		for ; pos.addr.IsValid() && rng.Contains(pos.addr); pos.addr = pos.addr.Next() {
			if free(pos.addr) {
				return pos.addr, pos, true // no longer free the next time
			}
		}
	}
	return netip.Addr{}, pos, false
}

func (s service) countHeld() int {
	n := 0
	for _, p := range s.ports {
		if s.heldPorts[p] {
			n++
		}
	}
	return n
}

func (s service) speaks(a netip.Addr) bool { return slices.Contains(s.families, familyOf(a)) }

func (s service) reachable(addresses []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range addresses {
		if s.speaks(a) {
			out = append(out, a)
		}
	}
	return out
}

// firstCome orders by age, then by UID, so that the order is always the same.
func firstCome(a, b service) int {
	return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.uid, b.uid))
}

func inPool(pool []config.AddressRange, a netip.Addr) bool {
	return slices.ContainsFunc(pool, func(r config.AddressRange) bool { return r.Contains(a) })
}

func familyOf(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

func familyText(families []corev1.IPFamily) string {
	var out []string
	for _, f := range families {
		out = append(out, string(f))
	}
	return strings.Join(out, " or ")
}

func poolText(pool []config.AddressRange) string {
	var out []string
	for _, r := range pool {
		out = append(out, r.From.String()+"-"+r.To.String())
	}
	return strings.Join(out, ",")
}
