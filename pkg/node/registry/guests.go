package registry

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"sync"
)

// maxGuests is how many connections to a port may wait at a time to show who they are. More close the oldest ones: whoever may be answered
// shows it at once, and others must not keep it from the port by holding connections. All nodes of a large cluster may connect at once.
const maxGuests = 1024

// guests are the connections of a port that have not shown yet who they are.
type guests struct {
	net.Listener
	mu      sync.Mutex
	waiting *list.List // of *guest, the oldest first
	known   int
}

func newGuests(l net.Listener) *guests { return &guests{Listener: l, waiting: list.New()} }

// guest is one connection.
type guest struct {
	net.Conn
	of     *guests
	at     *list.Element // nil once it is known, or closed
	known  bool
	closed bool
}

// Accept implements net.Listener.
func (g *guests) Accept() (net.Conn, error) {
	conn, err := g.Listener.Accept()
	if err != nil {
		return nil, err
	}
	n := &guest{Conn: conn, of: g}
	g.mu.Lock()
	n.at = g.waiting.PushBack(n)
	var oldest *guest
	if g.waiting.Len() > maxGuests {
		oldest = g.waiting.Remove(g.waiting.Front()).(*guest)
		oldest.at, oldest.closed = nil, true
	}
	g.mu.Unlock()
	if oldest != nil {
		_ = oldest.Close()
	}
	return n, nil
}

// Close implements net.Conn.
func (n *guest) Close() error {
	n.of.mu.Lock()
	if n.at != nil {
		n.of.waiting.Remove(n.at)
		n.at = nil
	}
	if n.known {
		n.of.known--
		n.known = false
	}
	n.closed = true
	n.of.mu.Unlock()
	return n.Conn.Close()
}

// welcome notes that a connection may be answered. It returns false if too many are.
func (n *guest) welcome() bool {
	n.of.mu.Lock()
	defer n.of.mu.Unlock()
	switch {
	case n.known:
		return true
	case n.closed || n.of.known >= maxConnections:
		return false
	}
	if n.at != nil {
		n.of.waiting.Remove(n.at)
		n.at = nil
	}
	n.known = true
	n.of.known++
	return true
}

type guestKey struct{}

// withGuest is an http.Server's ConnContext.
func withGuest(ctx context.Context, conn net.Conn) context.Context {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	if n, ok := conn.(*guest); ok {
		return context.WithValue(ctx, guestKey{}, n)
	}
	return ctx
}

// welcome is guest.welcome for the connection of a request.
func welcome(ctx context.Context) bool {
	n, ok := ctx.Value(guestKey{}).(*guest)
	return !ok || n.welcome()
}
