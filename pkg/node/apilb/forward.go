package apilb

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/relay"
)

// silentPeer is how long a peer may leave packets unacknowledged before its connection ends. A server that is switched off
// does not close its connections, and TCP alone would try for a quarter of an hour.
const silentPeer = 15 * time.Second

// dialer connects to servers. Keepalive finds a silent peer while nothing is sent, TCP_USER_TIMEOUT while something is (tcp(7)).
func (b *Balancer) dialer() *net.Dialer {
	return &net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silentPeer / 3, Interval: silentPeer / 3, Count: 2},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silentPeer.Milliseconds()))
			})
			return errors.Join(err, failed)
		},
	}
}

// conn is a connection of a client, and that to its server.
type conn struct{ client, server *net.TCPConn }

func (c *conn) close() {
	_ = c.client.Close()
	_ = c.server.Close()
}

// accept forwards each connection until the listener is closed.
func (b *Balancer) accept(ctx context.Context, listener net.Listener, wait *sync.WaitGroup) {
	for {
		client, err := listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = client.Close()
			}
			return
		}
		if err != nil {
			// Too many open files, for example: it passes.
			b.log.Error("accept a client of the API server", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		wait.Go(func() { b.forward(ctx, client.(*net.TCPConn)) })
	}
}

// forward connects a client to the first server that accepts the connection.
func (b *Balancer) forward(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	var candidates []netip.AddrPort
	b.with(ctx, func(p *pool) {
		for _, s := range p.candidates() {
			candidates = append(candidates, s.addr)
		}
	})
	for _, addr := range candidates {
		if ctx.Err() != nil {
			return
		}
		dialed, err := b.dialer().DialContext(ctx, "tcp", addr.String())
		if err != nil {
			b.log.Debug("connect to an API server", "server", addr.String(), "err", err)
			b.with(ctx, func(p *pool) {
				if s := p.servers[addr]; s != nil {
					p.check(ctx, s)
				}
			})
			continue
		}
		c := &conn{client, dialed.(*net.TCPConn)}
		used := false
		b.with(ctx, func(p *pool) { used = p.register(addr, c) })
		if !used {
			_ = dialed.Close()
			continue
		}
		relay.Between(c.client, c.server)
		b.with(ctx, func(p *pool) { p.unregister(addr, c) })
		return
	}
}
