package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
)

// overlay is what lets packets of this node's pods reach those of other nodes: with VXLAN a device, and for each peer a neighbor, an entry in
// the device's forwarding table and a route; with WireGuard a device with peers, and routes; with host-gw a route for each peer. It is desired state: plan compares it with the kernel, and
// steps make up the difference. What it creates carries a mark, the alias of the device and the protocol of routes, and it changes nothing else.
type overlay struct {
	backend config.FlannelBackend
	port    int // UDP
	cluster netip.Prefix
	// alias and mac identify the device as this data dir's. The address is the same whenever the device is created again, so peers need not learn
	// another one.
	alias string
	mac   net.HardwareAddr
	base  func() (base, error)
	// noOffload turns the checksum offload of VXLAN off, see planDevice.
	noOffload bool
	// wg is nil with other backends.
	wg *wireGuard

	mu    sync.Mutex
	pods  netip.Prefix // this node's; invalid until it is known
	peers []peer
	done  settled
}

// settled is what was applied last.
type settled struct {
	ok    bool
	base  base
	pods  netip.Prefix
	peers []peer
}

// set sets the desired state, which Settle applies. It returns the peers that are new or changed, and those that are not as before.
func (o *overlay) set(pods netip.Prefix, peers []peer) (now, before []peer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now, before = without(peers, o.peers), without(o.peers, peers)
	o.pods, o.peers = pods, peers
	return now, before
}

func without(peers, others []peer) []peer {
	return slices.DeleteFunc(slices.Clone(peers), func(p peer) bool { return slices.Contains(others, p) })
}

// mtu returns the largest packet of a pod, in bytes, that passes between nodes without being fragmented.
func (o *overlay) mtu(b base) int {
	switch o.backend {
	case config.VXLAN:
		return b.mtu - vxlanOverhead
	case config.WireGuard:
		return b.mtu - wireGuardOverhead
	}
	return b.mtu
}

// Settle implements keeper.Changing.
func (o *overlay) Settle(context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.pods.IsValid() {
		return nil
	}
	b, err := o.base()
	if err != nil {
		return err
	}
	if d := o.done; d.ok && d.base == b && d.pods == o.pods && slices.Equal(d.peers, o.peers) {
		return nil
	}
	if err := o.apply(b); err != nil {
		return err
	}
	o.done = settled{true, b, o.pods, o.peers}
	return nil
}

// Missing implements keeper.Part.
func (o *overlay) Missing(context.Context) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.pods.IsValid() {
		return "", nil
	}
	b, err := o.base()
	if err != nil {
		return "", err
	}
	steps, err := o.plan(b)
	if err != nil {
		return "", err
	}
	for _, s := range steps {
		if s.what != "" {
			return s.what, nil
		}
	}
	return "", nil
}

// Restore implements keeper.Part.
func (o *overlay) Restore(context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	b, err := o.base()
	if err != nil {
		return err
	}
	return o.apply(b)
}

// step is one difference between the desired state and the kernel's.
type step struct {
	// what is missing; empty for something left over.
	what string
	do   func() error
}

// rounds is enough for a device that has to be deleted, created and set up before there can be routes, and for finding nothing after that.
const rounds = 6

func (o *overlay) apply(b base) error {
	var last string
	for range rounds {
		steps, err := o.plan(b)
		if err != nil || len(steps) == 0 {
			return err
		}
		last = steps[0].what
		var failures []error
		for _, s := range steps {
			// What is gone meanwhile needs no removal, and the next round finds what has been created meanwhile.
			if err := s.do(); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
				failures = append(failures, err)
			}
		}
		if len(failures) > 0 {
			return errors.Join(failures...)
		}
	}
	return fmt.Errorf("another program keeps changing the network between nodes: %s", cmp.Or(last, "what was left over"))
}

// plan returns the steps from the kernel's state to the desired one. Steps that need an earlier one are returned when that is done.
func (o *overlay) plan(b base) ([]step, error) {
	var steps []step
	var link netlink.Link
	name := map[config.FlannelBackend]string{config.VXLAN: layout.FlannelLink, config.WireGuard: layout.WireGuardLink}[o.backend]
	for _, device := range layout.OverlayLinks() {
		found, err := netlink.LinkByName(device)
		switch {
		case errors.As(err, new(netlink.LinkNotFoundError)):
		case err != nil:
			return nil, fmt.Errorf("check %s: %w", device, err)
		case device == name:
			link = found
		case found.Attrs().Alias == o.alias: // of the backend before
			steps = append(steps, step{"", func() error { return netlink.LinkDel(found) }})
		}
	}
	index := b.index
	if name != "" {
		plan := o.planDevice
		if o.backend == config.WireGuard {
			plan = o.planWireGuard
		}
		device, err := plan(b, link)
		if err != nil || len(device) > 0 {
			return append(steps, device...), err
		}
		index = link.Attrs().Index
	}
	if o.backend == config.VXLAN {
		entries, err := o.planEntries(index)
		if err != nil {
			return nil, err
		}
		// Without its neighbor and its forwarding entry the first packets over a route would be lost.
		steps = append(steps, entries...)
	}
	routes, err := o.planRoutes(index)
	return append(steps, routes...), err
}

// planRoutes plans the routes to the peers' pods, over the interface with this index.
func (o *overlay) planRoutes(index int) (steps []step, err error) {
	var have []netlink.Route
	if err := dump(func() (err error) {
		have, err = netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		return err
	}); err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	want := map[string]netlink.Route{}
	for _, p := range o.peers {
		want[p.pods.String()] = o.route(p, index)
	}
	var removals []step
	for _, r := range have {
		if r.Protocol != layout.RouteProtocol || r.Dst == nil {
			continue
		}
		if w, ok := want[r.Dst.String()]; ok && r.Gw.Equal(w.Gw) && r.LinkIndex == w.LinkIndex && r.Priority == w.Priority {
			delete(want, r.Dst.String())
			continue
		}
		removals = append(removals, step{"", func() error { return netlink.RouteDel(&r) }})
	}
	for _, p := range o.peers {
		route, ok := want[p.pods.String()]
		if !ok {
			continue
		}
		steps = append(steps, step{"the route to the pods of node " + p.node, func() error {
			err := netlink.RouteAdd(&route)
			if errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("another program has a route to %s, the pods of node %s: remove it (`ip route show %s`)", p.pods, p.node, p.pods)
			}
			if err != nil && o.backend == config.HostGW {
				return fmt.Errorf("add the route to %s, the pods of node %s, over %s (with host-gw all nodes are in one subnet; vxlan works between subnets): %w", p.pods, p.node, p.address, err)
			}
			if err != nil {
				return fmt.Errorf("add the route to %s, the pods of node %s: %w", p.pods, p.node, err)
			}
			return nil
		}})
	}
	return append(removals, steps...), nil
}

// route returns the route to a peer's pods.
func (o *overlay) route(p peer, index int) netlink.Route {
	r := netlink.Route{Dst: ipNet(p.pods), LinkIndex: index, Protocol: layout.RouteProtocol, Table: unix.RT_TABLE_MAIN}
	switch o.backend {
	case config.VXLAN:
		r.Gw = p.gateway().AsSlice()
		r.SetFlag(netlink.FLAG_ONLINK)
	case config.WireGuard:
		r.Scope = netlink.SCOPE_LINK
	default:
		r.Gw = p.address.AsSlice()
	}
	return r
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// dump repeats a list of the kernel's that changed while it was read.
func dump(list func() error) (err error) {
	for range 5 {
		if err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

// describe names the peers, for logs.
func describe(peers []peer) string {
	var out []string
	for _, p := range peers {
		out = append(out, fmt.Sprintf("%s %s via %s", p.node, p.pods, p.address))
	}
	return strings.Join(out, ", ")
}
