// Package forward passes connections to ports on to UNIX sockets, byte by byte: a program of the machine serves pods in this way without
// listening on a port.
//
// It owns the limits of these connections. cmd/forward runs it in the pods of the add-on observe-access (pkg/controlplane/addon), which have
// the folder of the sockets and nothing else of the machine.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"polymesh.dev/polymesh/pkg/relay"
)

const (
	// maxConnections is how many connections there are at a time, maxOfSource how many of one address: a pod cannot take them all.
	maxConnections, maxOfSource = 2048, 128
	// dialLimit is for a socket of the same machine.
	dialLimit = 5 * time.Second
	// endLimit is how long connections may take after the end was requested. The pod has 10 seconds.
	endLimit = 5 * time.Second
	// reportInterval is how often refused connections are logged.
	reportInterval = time.Minute
	// checkInterval is how often the sockets are checked for the kubelet.
	checkInterval = 2 * time.Second
	// acceptPause is how long nothing is accepted when the process has too many files open.
	acceptPause = 100 * time.Millisecond
)

// Route is a port and the socket behind it.
type Route struct {
	Port   uint16
	Socket string
}

// ParseRoute reads PORT=PATH, with an absolute path.
func ParseRoute(text string) (Route, error) {
	port, path, ok := strings.Cut(text, "=")
	n, err := strconv.ParseUint(port, 10, 16)
	if !ok || err != nil || n == 0 || !filepath.IsAbs(path) {
		return Route{}, fmt.Errorf("%q is not PORT=PATH, with the absolute path of a UNIX socket", text)
	}
	return Route{uint16(n), path}, nil
}

// Options are what is forwarded.
type Options struct {
	// Address is where the ports are; the zero value is all addresses.
	Address netip.Addr
	Routes  []Route
	// Ready is the port that accepts connections, and closes them, while at least one socket does: for the kubelet. Without an HTTP server
	// the program is half as large.
	Ready uint16
	Log   *slog.Logger
}

// Forwarder has opened its ports.
type Forwarder struct {
	opts      Options
	listeners []net.Listener // of the routes, in their order

	mu      sync.Mutex
	open    map[net.Conn]struct{} // both ends of each connection
	sources map[netip.Addr]int    // connections of each address
	total   int
	refused int // since the last report
	closed  bool
}

// Listen opens the ports of the routes.
func Listen(o Options) (*Forwarder, error) {
	f := &Forwarder{opts: o, open: map[net.Conn]struct{}{}, sources: map[netip.Addr]int{}}
	for _, r := range o.Routes {
		l, err := f.listen(r.Port)
		if err != nil {
			f.closeListeners()
			return nil, err
		}
		f.listeners = append(f.listeners, l)
	}
	return f, nil
}

func (f *Forwarder) listen(port uint16) (net.Listener, error) {
	host := ""
	if f.opts.Address.IsValid() {
		host = f.opts.Address.String()
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return nil, fmt.Errorf("open port %d: %w", port, err)
	}
	return l, nil
}

func (f *Forwarder) closeListeners() {
	for _, l := range f.listeners {
		l.Close()
	}
}

// Run forwards until ctx ends. Then no new connection is accepted, and those that are open may end.
func (f *Forwarder) Run(ctx context.Context) {
	var accepting, connections sync.WaitGroup
	for i, l := range f.listeners {
		accepting.Go(func() { f.accept(ctx, l, f.opts.Routes[i].Socket, &connections) })
	}
	accepting.Go(func() { f.beReady(ctx) })
	reports := time.NewTicker(reportInterval)
	defer reports.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-reports.C:
			f.report()
		}
	}
	f.closeListeners()
	accepting.Wait()
	ended := make(chan struct{})
	go func() { connections.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(endLimit):
		f.closeAll()
		<-ended
	}
}

// accept serves one port until its listener is closed.
func (f *Forwarder) accept(ctx context.Context, l net.Listener, socket string, connections *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			f.opts.Log.Warn("no connection could be accepted", "address", l.Addr().String(), "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		source, ok := f.admit(conn)
		if !ok {
			conn.Close()
			continue
		}
		connections.Go(func() {
			defer f.leave(conn, source)
			f.forward(conn, socket)
		})
	}
}

// admit counts a connection, unless there are too many.
func (f *Forwarder) admit(conn net.Conn) (source netip.Addr, ok bool) {
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		source = a.AddrPort().Addr().Unmap()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.total >= maxConnections || f.sources[source] >= maxOfSource {
		f.refused++
		return source, false
	}
	f.total++
	f.sources[source]++
	f.open[conn] = struct{}{}
	return source, true
}

func (f *Forwarder) leave(conn net.Conn, source netip.Addr) {
	conn.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, conn)
	f.total--
	if f.sources[source]--; f.sources[source] == 0 {
		delete(f.sources, source)
	}
}

// forward copies both directions until both have ended.
func (f *Forwarder) forward(conn net.Conn, socket string) {
	dialed, err := net.DialTimeout("unix", socket, dialLimit)
	if err != nil {
		f.opts.Log.Debug("the socket does not accept connections", "err", err)
		return
	}
	defer dialed.Close()
	f.mu.Lock()
	f.open[dialed] = struct{}{}
	closed := f.closed
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.open, dialed)
	}()
	if closed {
		return
	}
	relay.Between(conn.(*net.TCPConn), dialed.(*net.UnixConn))
}

func (f *Forwarder) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for conn := range f.open {
		conn.Close()
	}
}

func (f *Forwarder) report() {
	f.mu.Lock()
	refused, total := f.refused, f.total
	f.refused = 0
	f.mu.Unlock()
	if refused > 0 {
		f.opts.Log.Warn("connections were refused: there are too many, of all or of one address", "refused", refused, "open", total, "most", maxConnections, "most of an address", maxOfSource)
	}
}

// beReady opens the port for the kubelet while a socket accepts connections. The sockets belong to one program, of which a part may fail: the
// others are still served.
func (f *Forwarder) beReady(ctx context.Context) {
	var open net.Listener
	closed := func() {
		if open != nil {
			open.Close()
			open = nil
		}
	}
	defer closed()
	checks := time.NewTicker(checkInterval)
	defer checks.Stop()
	for ctx.Err() == nil {
		switch accepts := f.anyAccepts(); {
		case !accepts:
			closed()
		case open == nil:
			l, err := f.listen(f.opts.Ready)
			if err != nil {
				f.opts.Log.Error("the kubelet cannot be told that this pod is ready", "err", err)
				break
			}
			open = l
			go greet(l)
		}
		select {
		case <-ctx.Done():
		case <-checks.C:
		}
	}
}

// greet closes each connection of a listener, until that is closed.
func greet(l net.Listener) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(acceptPause)
			continue
		}
		conn.Close()
	}
}

func (f *Forwarder) anyAccepts() bool {
	for _, route := range f.opts.Routes {
		if conn, err := net.DialTimeout("unix", route.Socket, dialLimit); err == nil {
			conn.Close()
			return true
		}
	}
	return false
}
