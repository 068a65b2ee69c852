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

// guests are the connections of a port, of which some have not shown yet who they are.
type guests struct {
	net.Listener
	most    int // connections that one may have
	mu      sync.Mutex
	waiting *list.List // of *guest, the oldest first
	// known is how many connections of each are answered, all how many there are together.
	known map[string]int
	all   int
}

func newGuests(l net.Listener, most int) *guests {
	return &guests{Listener: l, most: most, waiting: list.New(), known: map[string]int{}}
}

// guest is one connection.
type guest struct {
	net.Conn
	of     *guests
	at     *list.Element // nil once it is known, or closed
	known  bool
	who    string // once it is known
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
		n.known = false
		n.of.all--
		if n.of.known[n.who]--; n.of.known[n.who] == 0 {
			delete(n.of.known, n.who)
		}
	}
	n.closed = true
	n.of.mu.Unlock()
	return n.Conn.Close()
}

// welcome notes whose a connection is, and that it may be answered. It returns false if too many are, of all or of this one.
func (n *guest) welcome(who string) bool {
	n.of.mu.Lock()
	defer n.of.mu.Unlock()
	switch {
	case n.known:
		return true
	case n.closed || n.of.all >= maxConnections || n.of.known[who] >= n.of.most:
		return false
	}
	if n.at != nil {
		n.of.waiting.Remove(n.at)
		n.at = nil
	}
	n.known, n.who = true, who
	n.of.known[who]++
	n.of.all++
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
func welcome(ctx context.Context, who string) bool {
	n, ok := ctx.Value(guestKey{}).(*guest)
	return !ok || n.welcome(who)
}
