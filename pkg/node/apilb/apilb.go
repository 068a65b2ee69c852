// Package apilb is a node's balancer over the cluster's API servers: clients on the node connect to one address on loopback, and
// are forwarded to a server that works.
//
// It forwards TCP: TLS is between the client and the API server, so the balancer needs no permission except to read
// /readyz and to list the servers, with the node's certificate. It owns the listener and the file with the servers. The lists of
// components of a server and of an agent use it; the kubeconfigs of a node's parts have its address.
//
// One goroutine owns all state (pool.go), and never does I/O. Others check servers (check.go), forward connections
// (forward.go) and keep the list of servers (list.go), and give it their results.
package apilb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/status"
)

// Options of a balancer.
type Options struct {
	// Listen is the address for clients, on loopback.
	Listen netip.AddrPort
	// Server is the configured server, HOST:PORT. It is always tried too, whatever the list contains, and a name is resolved
	// again before each round of checks. Empty if there is none.
	Server string
	// Own is the API server of this node, under the address that it advertises. It is preferred. Invalid if there is none.
	Own netip.AddrPort
	// CA is the PEM file of the authority that signs the API servers' certificates.
	CA string
	// Cert and Key are the node's client certificate and key, PEM; they may be one file. The files are read again for each
	// connection, and need not exist yet.
	Cert, Key string
	// State is the file that keeps the list of servers for the next start.
	State string
	Log   *slog.Logger
}

const (
	// checkInterval is how often a server that is in use is checked.
	checkInterval = 2 * time.Second
	// checkTimeout is the time for a server's answer, with the connection.
	checkTimeout = 2 * time.Second
	// dialTimeout is the time for the connection to one server, before the next one is tried.
	dialTimeout = 2 * time.Second
)

// Balancer is the component "api-balancer".
type Balancer struct {
	opts Options
	log  *slog.Logger
	// interval and timeout are checkInterval and checkTimeout, except in tests.
	interval, timeout time.Duration
	resolver          *net.Resolver

	background component.Background
	listener   net.Listener
	do         chan func(*pool)
	view       atomic.Pointer[view]
	watching   atomic.Pointer[string] // why the list cannot be watched; nil if it is
}

var (
	_ component.Component = (*Balancer)(nil)
	_ component.Noted     = (*Balancer)(nil)
)

// New returns a balancer that does not listen yet.
func New(o Options) *Balancer {
	b := &Balancer{opts: o, interval: checkInterval, timeout: checkTimeout, resolver: net.DefaultResolver, do: make(chan func(*pool))}
	b.log = o.Log.With("component", b.Name())
	b.view.Store(&view{})
	return b
}

// Name implements component.Component.
func (*Balancer) Name() string { return "api-balancer" }

// Init checks the addresses.
func (b *Balancer) Init(context.Context) error {
	if !b.opts.Listen.IsValid() || !b.opts.Listen.Addr().IsLoopback() {
		return fmt.Errorf("listen on %s: it is not an address of this machine's loopback interface", b.opts.Listen)
	}
	if b.opts.Server == "" && !b.opts.Own.IsValid() {
		return errors.New("no API server is configured")
	}
	if b.opts.Server != "" {
		if _, _, err := splitServer(b.opts.Server); err != nil {
			return err
		}
	}
	return nil
}

// splitServer returns the parts of HOST:PORT.
func splitServer(server string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(server)
	if err == nil && host == "" {
		err = errors.New("the host is missing")
	}
	var number uint64
	if err == nil {
		number, err = strconv.ParseUint(text, 10, 16)
	}
	if err == nil && number == 0 {
		err = errors.New("port 0 is not a port")
	}
	if err != nil {
		return "", 0, fmt.Errorf("the server %q is not HOST:PORT: %w", server, err)
	}
	return host, uint16(number), nil
}

// Start listens, and begins to check the servers that are known from the configuration and from the file.
func (b *Balancer) Start(ctx context.Context) error {
	known, err := readState(b.opts.State, b.opts.Listen)
	if err != nil {
		// It is only a memory of servers: the configured one has the current list.
		b.log.Warn("ignoring the list of API servers of the previous run", "file", b.opts.State, "err", err)
	}
	listener, err := net.Listen("tcp", b.opts.Listen.String())
	if err != nil {
		return fmt.Errorf("listen for clients of the API server: %w", err)
	}
	b.listener = listener
	b.background.Go(ctx, func(ctx context.Context) { b.run(ctx, listener, known) })
	return nil
}

// run returns when ctx has ended and everything that belongs to the balancer has too.
func (b *Balancer) run(ctx context.Context, listener net.Listener, known []netip.AddrPort) {
	var wait sync.WaitGroup
	defer wait.Wait()
	save := make(chan []netip.AddrPort, 1)
	p := newPool(b, &wait, save)
	p.list(known)
	// Before the first client: it may be one that has no other server.
	if b.opts.Server != "" {
		p.configure(b.configured(ctx))
	}
	wait.Go(func() { b.accept(ctx, listener, &wait) })
	wait.Go(func() { b.watch(ctx) })
	wait.Go(func() { b.keepState(ctx, save, known) })
	if b.named() {
		wait.Go(func() { b.resolve(ctx) })
	}
	tick := time.NewTicker(b.interval)
	defer tick.Stop()
	p.tick(ctx)
	for {
		b.view.Store(p.view())
		select {
		case <-ctx.Done():
			// Here, and not by context.AfterFunc: ctx is done before its functions are called, and what ends by then would stop them.
			_ = listener.Close()
			p.close()
			return
		case <-tick.C:
			p.tick(ctx)
		case change := <-b.do:
			change(p)
		}
	}
}

// with runs change in the goroutine that owns the state, and returns after it. It reports false if ctx has ended first.
func (b *Balancer) with(ctx context.Context, change func(*pool)) bool {
	done := make(chan struct{})
	select {
	case b.do <- func(p *pool) { defer close(done); change(p) }:
		<-done
		return true
	case <-ctx.Done():
		return false
	}
}

// Addr returns the address for clients.
func (b *Balancer) Addr() net.Addr { return b.listener.Addr() }

// Ready returns nil while at least one server is healthy, and otherwise what is wrong with each.
func (b *Balancer) Ready(context.Context) error {
	v := b.view.Load()
	switch {
	case len(v.servers) == 0 && v.unresolved == "":
		return errors.New("checking the API servers")
	case v.healthy() > 0:
		return nil
	}
	return fmt.Errorf("no API server is healthy: %s", strings.Join(v.problems(), "; "))
}

// Notes implements component.Noted: servers that are away, and what keeps the list from being current.
func (b *Balancer) Notes(context.Context) []string {
	v := b.view.Load()
	if v.healthy() == 0 {
		return nil
	}
	var notes []string
	for _, problem := range v.problems() {
		notes = append(notes, "an API server is not healthy: "+problem)
	}
	if why := b.watching.Load(); why != nil {
		notes = append(notes, "the list of API servers may be old: "+*why)
	}
	return notes
}

// Servers returns the API servers that the balancer knows, for `polymesh status`.
func (b *Balancer) Servers() []status.APIServer {
	var all []status.APIServer
	for _, s := range b.view.Load().servers {
		server := status.APIServer{Address: s.addr.String(), Connections: s.conns, Current: s.current, Problem: s.problem}
		if !s.checked {
			server.Problem = unchecked
		}
		all = append(all, server)
	}
	return all
}

// Stop stops listening, and closes all connections.
func (b *Balancer) Stop(ctx context.Context) error { return b.background.Stop(ctx) }

// view is the state for readers outside of the goroutine that owns it.
type view struct {
	servers    []serverView
	unresolved string // why the configured name has no address
}

type serverView struct {
	addr    netip.AddrPort
	checked bool
	problem string // empty if it is healthy
	conns   int
	current bool // the newest connection went there
}

// unchecked is the problem of a server whose first check has not ended.
const unchecked = "no answer yet"

func (v *view) healthy() int {
	n := 0
	for _, s := range v.servers {
		if s.checked && s.problem == "" {
			n++
		}
	}
	return n
}

// problems lists the servers that do not work, and why.
func (v *view) problems() []string {
	var all []string
	for _, s := range v.servers {
		switch {
		case !s.checked:
			all = append(all, s.addr.String()+": "+unchecked)
		case s.problem != "":
			all = append(all, s.addr.String()+": "+s.problem)
		}
	}
	if v.unresolved != "" {
		all = append(all, v.unresolved)
	}
	return all
}
