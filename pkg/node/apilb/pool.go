package apilb

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
)

const (
	// standbyTicks is how many intervals pass between two checks of a server that nothing uses. It bounds the load of the
	// checks on the servers, and still finds one that is switched off within 15 seconds.
	standbyTicks = 3
	// silences is how many checks in a row a server may leave unanswered. One is not enough on a busy machine; a server that
	// refuses, or reports that it is not ready, is unhealthy at once.
	silences = 2
	// settled is how many good checks in a row a preferred server needs before connections are moved to it.
	settled = 3
	// maxServers bounds the list. etcd works with up to seven members; more servers only share a datastore.
	maxServers = 64
)

// pool is the state of the balancer. Only the goroutine of run uses it, so it needs no lock, and must not wait for anything.
type pool struct {
	b    *Balancer
	wait *sync.WaitGroup
	save chan []netip.AddrPort

	servers    map[netip.AddrPort]*server
	current    netip.AddrPort // where the newest connection went
	ticks      int
	unresolved string
}

// server is one API server.
type server struct {
	addr netip.AddrPort
	// own is this node's; listed is in the cluster's list; configured is an address of the configured server.
	own, listed, configured bool
	// order is its place among equals, random so that the nodes of a cluster choose different servers.
	order int

	prober   *prober
	checking bool
	checked  bool
	problem  error // nil if it is healthy
	silent   int   // unanswered checks in a row
	good     int   // good checks in a row
	due      int   // the tick of its next check

	conns map[*conn]struct{}
}

func newPool(b *Balancer, wait *sync.WaitGroup, save chan []netip.AddrPort) *pool {
	p := &pool{b: b, wait: wait, save: save, servers: map[netip.AddrPort]*server{}}
	if b.opts.Own.IsValid() {
		p.add(b.opts.Own).own = true
	}
	return p
}

// add returns the server with this address, new if there is none.
func (p *pool) add(addr netip.AddrPort) *server {
	s := p.servers[addr]
	if s == nil {
		s = &server{addr: addr, order: rand.Int(), prober: newProber(p.b, addr), conns: map[*conn]struct{}{}}
		p.servers[addr] = s
	}
	return s
}

// list takes the cluster's servers. An empty list is no news: a cluster that has answered has a server.
func (p *pool) list(addrs []netip.AddrPort) {
	if len(addrs) == 0 {
		return
	}
	for _, s := range p.servers {
		s.listed = false
	}
	for _, addr := range addrs {
		p.add(addr).listed = true
	}
	p.drop()
	p.move()
	// Only the newest list matters to the goroutine that writes it.
	select {
	case <-p.save:
	default:
	}
	p.save <- slices.Clone(addrs)
}

// configure takes the addresses of the configured server, or why there are none: then the previous ones stay.
func (p *pool) configure(addrs []netip.AddrPort, problem string) {
	p.unresolved = ""
	if len(addrs) == 0 {
		known := slices.ContainsFunc(p.all(), func(s *server) bool { return s.configured })
		if !known {
			p.unresolved = problem
		}
		return
	}
	for _, s := range p.servers {
		s.configured = false
	}
	for _, addr := range addrs {
		p.add(addr).configured = true
	}
	p.drop()
}

// drop forgets servers that nothing names and nothing uses.
func (p *pool) drop() {
	for addr, s := range p.servers {
		if !s.own && !s.listed && !s.configured && len(s.conns) == 0 {
			s.prober.close()
			delete(p.servers, addr)
		}
	}
}

// tick begins the checks that are due.
func (p *pool) tick(ctx context.Context) {
	p.ticks++
	healthy := p.anyHealthy()
	for _, s := range p.servers {
		// What is in use or in doubt is checked each time.
		if s.due <= p.ticks || !healthy || s.own || len(s.conns) > 0 || s.silent > 0 {
			p.check(ctx, s)
		}
	}
}

func (p *pool) check(ctx context.Context, s *server) {
	if s.checking {
		return
	}
	s.checking, s.due = true, p.ticks+standbyTicks
	p.wait.Go(func() {
		err := s.prober.check(ctx)
		p.b.with(ctx, func(p *pool) { p.result(s, err) })
	})
}

// result takes the result of a check.
func (p *pool) result(s *server, err error) {
	s.checking = false
	if p.servers[s.addr] != s {
		return // dropped meanwhile
	}
	was := s.healthy()
	switch {
	case err == nil:
		s.silent, s.problem = 0, nil
		s.good++
	default:
		s.good = 0
		s.silent++
		if answered(err) {
			s.silent = 0
		}
		if s.checked && s.problem == nil && s.silent > 0 && s.silent < silences {
			return
		}
		s.problem = err
	}
	first := !s.checked
	s.checked = true
	if first || was != s.healthy() {
		if s.healthy() {
			p.b.log.Info("API server is healthy", "server", s.addr.String())
		} else {
			p.b.log.Warn("API server is not healthy", "server", s.addr.String(), "err", err)
		}
	}
	p.move()
}

func (s *server) healthy() bool { return s.checked && s.problem == nil }

func (p *pool) anyHealthy() bool {
	for _, s := range p.servers {
		if s.healthy() {
			return true
		}
	}
	return false
}

// move closes the connections that are not where they should be; their clients connect again, to the best server.
func (p *pool) move() {
	best := p.candidates()
	for _, s := range p.servers {
		switch {
		case len(s.conns) == 0:
		case s.checked && s.problem != nil && (p.anyHealthy() || errors.As(s.problem, new(silence))):
			// A server that answers, although it is not ready, is better than none.
			p.b.log.Info("closing the connections to an API server that is not healthy", "server", s.addr.String(), "connections", len(s.conns))
			s.closeConns()
		case best[0].healthy() && best[0].good >= settled && best[0].tier() < s.tier():
			p.b.log.Info("moving the connections to a preferred API server", "from", s.addr.String(), "to", best[0].addr.String(), "connections", len(s.conns))
			s.closeConns()
		}
	}
	p.drop()
}

// closeConns closes the connections to a server. Their goroutines end, and find them unregistered.
func (s *server) closeConns() {
	for c := range s.conns {
		c.close()
		delete(s.conns, c)
	}
}

// tier is how much a server is preferred; the lowest is best.
func (s *server) tier() int {
	switch {
	case s.own:
		return 0
	case s.listed:
		return 1
	case s.configured:
		// It may be the address of another balancer, which adds a hop.
		return 2
	}
	return 3
}

// all returns the servers, in a fixed order.
func (p *pool) all() []*server {
	all := make([]*server, 0, len(p.servers))
	for _, s := range p.servers {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *server) int { return a.addr.Compare(b.addr) })
	return all
}

// candidates returns the servers for a new connection, the best first. Unhealthy ones are last, but not left out: the
// check may be wrong, and without a choice the client gets the server's own error.
func (p *pool) candidates() []*server {
	all := p.all()
	bit := func(b bool) int {
		if b {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(all, func(a, b *server) int {
		return cmp.Or(
			cmp.Compare(bit(a.healthy()), bit(b.healthy())),
			cmp.Compare(a.tier(), b.tier()),
			cmp.Compare(bit(a.addr == p.current), bit(b.addr == p.current)),
			cmp.Compare(a.order, b.order),
		)
	})
	return all
}

// register records a connection that was made. It reports false if the server is no longer there, or must not be used now.
func (p *pool) register(addr netip.AddrPort, c *conn) bool {
	s := p.servers[addr]
	if s == nil || s.checked && s.problem != nil && p.anyHealthy() {
		return false
	}
	s.conns[c] = struct{}{}
	p.current = addr
	return true
}

// unregister removes a connection that has ended.
func (p *pool) unregister(addr netip.AddrPort, c *conn) {
	if s := p.servers[addr]; s != nil {
		delete(s.conns, c)
		p.drop()
	}
}

func (p *pool) view() *view {
	v := &view{unresolved: p.unresolved}
	for _, s := range p.all() {
		sv := serverView{addr: s.addr, checked: s.checked, conns: len(s.conns), current: s.addr == p.current}
		if s.problem != nil {
			sv.problem = s.problem.Error()
		}
		v.servers = append(v.servers, sv)
	}
	return v
}

func (p *pool) close() {
	for _, s := range p.servers {
		s.closeConns()
		s.prober.close()
	}
}
