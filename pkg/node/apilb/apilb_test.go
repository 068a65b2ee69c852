package apilb

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"

	"polymesh.dev/polymesh/pkg/certificate"
)

// cluster has the certificates of a cluster's API servers and nodes.
func cluster(t *testing.T) certificate.Store {
	t.Helper()
	dir := t.TempDir()
	if _, err := certificate.Ensure(certificate.Options{
		Dir: dir, NodeName: "n1", NodeIP: netip.MustParseAddr("192.0.2.1"), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now(),
	}); err != nil {
		t.Fatal(err)
	}
	return certificate.Store(dir)
}

// mode is how a server behaves.
type mode int32

const (
	ready    mode = iota
	notReady      // /readyz returns 500, the rest works
	hangs         // connections are accepted, and nothing answers any more
	resets        // connections are accepted, and reset
	modes
)

func (m mode) String() string { return [...]string{"ready", "not ready", "hangs", "resets"}[m] }

// apiServer is a server that other tests of a balancer would switch off by a plug.
type apiServer struct {
	t      *testing.T
	name   string
	config *tls.Config
	addr   netip.AddrPort
	mode   atomic.Int32
	hung   chan struct{} // closed at the end of the test

	mu       sync.Mutex
	listener net.Listener
	server   *http.Server
	conns    []net.Conn
}

// listen is where servers listen: not on the address from which clients connect, whose ports are in use for that.
const listen = "127.0.0.2:0"

func newServer(t *testing.T, store certificate.Store, name, on string) *apiServer {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(store.Cert(certificate.APIServer), store.Key(certificate.APIServer))
	if err != nil {
		t.Fatal(err)
	}
	clients, err := os.ReadFile(store.Cert(certificate.ClientCA))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(clients)
	s := &apiServer{t: t, name: name, hung: make(chan struct{})}
	s.config = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	s.addr = netip.MustParseAddrPort(on)
	s.start()
	t.Cleanup(func() { close(s.hung); s.kill() })
	return s
}

func (s *apiServer) set(m mode) { s.mode.Store(int32(m)) }

// start listens, after the first time on the same address.
func (s *apiServer) start() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr.String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.addr = netip.MustParseAddrPort(l.Addr().String())
	s.mu.Lock()
	s.listener = l
	s.server = &http.Server{Handler: s, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	server := s.server
	s.mu.Unlock()
	go func() { _ = server.Serve(tls.NewListener(&listener{l, s}, s.config)) }()
}

// kill ends the server like kill -9: its connections are reset, and new ones refused.
func (s *apiServer) kill() {
	s.mu.Lock()
	conns, server, listening := s.conns, s.server, s.listener
	s.conns = nil
	s.mu.Unlock()
	_ = listening.Close() // the server may not know it yet
	for _, c := range conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	_ = server.Close() // it waits for Accept
}

type listener struct {
	net.Listener
	s *apiServer
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.s.mu.Lock()
		l.s.conns = append(l.s.conns, c)
		l.s.mu.Unlock()
		switch mode(l.s.mode.Load()) {
		case hangs:
			continue
		case resets:
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
			continue
		}
		return c, nil
	}
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if mode(s.mode.Load()) == hangs {
		<-s.hung
		return
	}
	switch {
	case r.TLS.PeerCertificates[0].Subject.CommonName != "system:node:n1":
		w.WriteHeader(http.StatusUnauthorized)
	case r.URL.Path == "/readyz" && mode(s.mode.Load()) != ready:
		w.WriteHeader(http.StatusInternalServerError)
	case r.URL.Path == "/stream":
		fmt.Fprintln(w, s.name)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-s.hung:
		case <-r.Context().Done():
		}
	default:
		fmt.Fprintln(w, s.name)
	}
}

// balancer starts a balancer whose checks follow each other at once.
func balancer(t *testing.T, store certificate.Store, change func(*Balancer)) *Balancer {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	b := New(Options{
		Listen: netip.MustParseAddrPort(free.Addr().String()),
		CA:     store.Cert(certificate.ServerCA), Cert: store.Cert(certificate.Kubelet), Key: store.Key(certificate.Kubelet),
		State: filepath.Join(t.TempDir(), "agent", "servers.json"), Log: slog.New(slog.DiscardHandler),
	})
	b.interval, b.timeout = 10*time.Millisecond, time.Second
	change(b)
	if err := b.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := b.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return b
}

// listed makes the balancer take a list of servers, as from the cluster.
func listed(t *testing.T, b *Balancer, servers ...*apiServer) {
	t.Helper()
	var addrs []netip.AddrPort
	for _, s := range servers {
		addrs = append(addrs, s.addr)
	}
	if !b.with(t.Context(), func(p *pool) { p.list(addrs) }) {
		t.Fatal("the balancer has ended")
	}
}

// eventually waits until done returns nil.
func eventually(t *testing.T, what string, done func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := done()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// healthy waits until exactly these servers are healthy.
func healthy(t *testing.T, b *Balancer, servers ...*apiServer) {
	t.Helper()
	var want []netip.AddrPort
	for _, s := range servers {
		want = append(want, s.addr)
	}
	slices.SortFunc(want, netip.AddrPort.Compare)
	eventually(t, "the healthy servers", func() error {
		var have []netip.AddrPort
		v := b.view.Load()
		for _, s := range v.servers {
			if !s.checked {
				return fmt.Errorf("%s is not checked yet", s.addr)
			}
			if s.problem == "" {
				have = append(have, s.addr)
			}
		}
		if !slices.Equal(have, want) {
			return fmt.Errorf("%v are healthy, want %v; %s", have, want, v.problems())
		}
		return nil
	})
}

// client makes requests with a new connection each.
func client(t *testing.T, b *Balancer) *http.Client {
	t.Helper()
	config, err := b.tlsConfig()
	if err != nil {
		t.Fatal(err)
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
}

// where returns the name of the server that answers.
func where(t *testing.T, b *Balancer) (string, error) {
	t.Helper()
	response, err := client(t, b).Get("https://" + b.Addr().String() + "/name")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return strings.TrimSpace(string(text)), err
}

// goesTo checks where a new connection goes.
func goesTo(t *testing.T, b *Balancer, want *apiServer) {
	t.Helper()
	if name, err := where(t, b); err != nil || name != want.name {
		t.Errorf("a new connection goes to %q (%v), want %q", name, err, want.name)
	}
}

// stream is a response that does not end, like a watch.
type stream struct {
	server string
	ended  chan struct{}
}

func open(t *testing.T, b *Balancer) *stream {
	t.Helper()
	response, err := client(t, b).Get("https://" + b.Addr().String() + "/stream")
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(response.Body)
	name, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	s := &stream{strings.TrimSpace(name), make(chan struct{})}
	go func() {
		defer close(s.ended)
		defer response.Body.Close()
		_, _ = r.ReadByte()
	}()
	return s
}

func (s *stream) waitEnd(t *testing.T) {
	t.Helper()
	select {
	case <-s.ended:
	case <-time.After(time.Minute):
		t.Fatalf("the connection to %s goes on", s.server)
	}
}

func (s *stream) goesOn(t *testing.T) {
	t.Helper()
	select {
	case <-s.ended:
		t.Errorf("the connection to %s has ended", s.server)
	default:
	}
}

// three returns three servers, and a balancer that has checked all of them.
func three(t *testing.T) (map[string]*apiServer, *Balancer) {
	t.Helper()
	store := cluster(t)
	servers := map[string]*apiServer{}
	for _, name := range []string{"a", "b", "c"} {
		servers[name] = newServer(t, store, name, listen)
	}
	b := balancer(t, store, func(b *Balancer) { b.opts.Server = servers["a"].addr.String() })
	listed(t, b, servers["a"], servers["b"], servers["c"])
	healthy(t, b, servers["a"], servers["b"], servers["c"])
	return servers, b
}

// The balancer stays with a server that works. However that one fails, its connections end and new ones go to another.
func TestFailover(t *testing.T) {
	for what, fail := range map[string]func(*apiServer){
		"killed":    (*apiServer).kill,
		"not ready": func(s *apiServer) { s.set(notReady) },
		"hangs":     func(s *apiServer) { s.set(hangs) },
		"resets":    func(s *apiServer) { s.set(resets) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			servers, b := three(t)
			s := open(t, b)
			for range 10 {
				goesTo(t, b, servers[s.server])
			}
			fail(servers[s.server])
			s.waitEnd(t)
			other := open(t, b)
			if other.server == s.server {
				t.Fatalf("a new connection goes to %s, which %s", other.server, what)
			}
			for range 10 {
				goesTo(t, b, servers[other.server])
			}
			if err := b.Ready(t.Context()); err != nil {
				t.Errorf("not ready: %v", err)
			}
			eventually(t, "the note names the server that is away", func() error {
				if notes := b.Notes(t.Context()); len(notes) != 1 || !strings.HasPrefix(notes[0], "an API server is not healthy: "+servers[s.server].addr.String()+": ") {
					return fmt.Errorf("they are %q", notes)
				}
				return nil
			})
			other.goesOn(t)
		})
	}
}

// No request is lost when a server is killed between two of them: the next one is connected to another server.
func TestNothingIsLostBetweenRequests(t *testing.T) {
	servers, b := three(t)
	for range 5 {
		s := open(t, b)
		servers[s.server].kill()
		if _, err := where(t, b); err != nil {
			t.Errorf("a new connection after %s was killed: %v", s.server, err)
		}
		servers[s.server].start()
		healthy(t, b, servers["a"], servers["b"], servers["c"])
	}
}

// A powered-off machine acknowledges nothing. The kernel does the same for a listener whose queue is full.
func TestPowerOff(t *testing.T) {
	store := cluster(t)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	off := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*syscall.SockaddrInet4).Port))
	for {
		c, err := net.DialTimeout("tcp", off.String(), 200*time.Millisecond)
		if err != nil {
			break
		}
		defer c.Close()
	}
	works := newServer(t, store, "works", listen)
	b := balancer(t, store, func(b *Balancer) { b.opts.Own, b.opts.Server = off, works.addr.String() })
	// It is tried first, and does not keep the client from the other.
	goesTo(t, b, works)
	healthy(t, b, works)
	if note := strings.Join(b.Notes(t.Context()), "\n"); !strings.Contains(note, off.String()+": no answer within 1s") {
		t.Errorf("the note is %q", note)
	}
}

// A connection ends 15 s after its server has stopped acknowledging what was sent.
func TestUserTimeout(t *testing.T) {
	s := newServer(t, cluster(t), "a", listen)
	c, err := (&Balancer{}).dialer().DialContext(t.Context(), "tcp", s.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var timeout, idle, interval int
	var errs [3]error
	if err := raw.Control(func(fd uintptr) {
		timeout, errs[0] = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		idle, errs[1] = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		interval, errs[2] = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)
	}); err != nil || errors.Join(errs[:]...) != nil {
		t.Fatal(err, errs)
	}
	if timeout != 15000 || idle+2*interval != 15 {
		t.Errorf("TCP_USER_TIMEOUT is %d ms, keepalive begins after %d s and repeats after %d s", timeout, idle, interval)
	}
}

// Without another server, the connections to one that says that it is not ready go on, and new ones are made: it is the best
// there is. Once another one is ready they move.
func TestTheBestThereIs(t *testing.T) {
	store := cluster(t)
	a, c := newServer(t, store, "a", listen), newServer(t, store, "c", listen)
	b := balancer(t, store, func(b *Balancer) { b.opts.Server = a.addr.String() })
	healthy(t, b, a)
	s := open(t, b)
	a.set(notReady)
	healthy(t, b)
	s.goesOn(t)
	goesTo(t, b, a)
	if err := b.Ready(t.Context()); err == nil || err.Error() != "no API server is healthy: "+a.addr.String()+": /readyz returned 500" {
		t.Errorf("the component is %v", err)
	}
	listed(t, b, a, c)
	healthy(t, b, c)
	s.waitEnd(t)
	goesTo(t, b, c)
}

// A balancer stops, whenever that is.
func TestEveryStopEnds(t *testing.T) {
	store := cluster(t)
	a := newServer(t, store, "a", listen)
	for range 100 {
		// balancer stops it at the end, and fails if that takes a minute.
		t.Run("", func(t *testing.T) { balancer(t, store, func(b *Balancer) { b.opts.Server = a.addr.String() }) })
	}
}

// What `polymesh status` shows: which server the node is connected to, and which others there are.
func TestServers(t *testing.T) {
	store := cluster(t)
	a, b := newServer(t, store, "a", listen), newServer(t, store, "b", listen)
	lb := balancer(t, store, func(lb *Balancer) { lb.opts.Server = a.addr.String() })
	listed(t, lb, a, b)
	healthy(t, lb, a, b)
	gone, left := a, b
	if open(t, lb).server == "b" {
		gone, left = b, a
	}
	eventually(t, "its server has the connection, and one of two gets new ones", func() error {
		var current []string
		for _, s := range lb.Servers() {
			if s.Problem != "" || s.Address == gone.addr.String() && s.Connections == 0 {
				return fmt.Errorf("%+v", s)
			}
			if s.Current {
				current = append(current, s.Address)
			}
		}
		if len(current) != 1 {
			return fmt.Errorf("new connections go to %q", current)
		}
		return nil
	})
	gone.kill()
	eventually(t, "the other one is known to be away", func() error {
		for _, s := range lb.Servers() {
			if (s.Problem == "") != (s.Address == left.addr.String()) {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
}

// All servers are away: clients are disconnected, the component says of each why, and everything works when they come back.
func TestAllAway(t *testing.T) {
	servers, b := three(t)
	s := open(t, b)
	servers["a"].kill()
	servers["b"].set(notReady)
	servers["c"].set(hangs)
	healthy(t, b)
	s.waitEnd(t)
	err := b.Ready(t.Context())
	for name, want := range map[string]string{"a": "connect: connection refused", "b": "/readyz returned 500", "c": "no answer within 1s"} {
		if want = servers[name].addr.String() + ": " + want; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the component is %v, want %q", err, want)
		}
	}
	servers["b"].kill()
	servers["c"].kill()
	healthy(t, b)
	if name, err := where(t, b); err == nil {
		t.Errorf("%s answered", name)
	}
	for _, s := range servers {
		s.set(ready)
		s.start()
	}
	healthy(t, b, servers["a"], servers["b"], servers["c"])
	if _, err := where(t, b); err != nil {
		t.Errorf("after all have come back: %v", err)
	}
}

// A server's own API server is used while it works, and again when it has come back: connections move to it then.
func TestOwnServer(t *testing.T) {
	store := cluster(t)
	own, other := newServer(t, store, "own", listen), newServer(t, store, "other", listen)
	b := balancer(t, store, func(b *Balancer) { b.opts.Own, b.opts.Server = own.addr, other.addr.String() })
	listed(t, b, other, own)
	healthy(t, b, own, other)
	goesTo(t, b, own)
	own.kill()
	s := open(t, b)
	if s.server != "other" {
		t.Fatalf("without the own server the connection goes to %s", s.server)
	}
	healthy(t, b, other)
	own.start()
	s.waitEnd(t)
	goesTo(t, b, own)
}

// Servers come from the list and from the configuration. One that is in neither any more is left; an empty list changes nothing.
func TestListChanges(t *testing.T) {
	servers, b := three(t)
	listed(t, b)
	healthy(t, b, servers["a"], servers["b"], servers["c"])
	listed(t, b, servers["b"])
	// a is the configured one.
	healthy(t, b, servers["a"], servers["b"])
	s := open(t, b)
	if s.server != "b" {
		t.Errorf("the connection goes to %s, want b, which is in the list", s.server)
	}
	listed(t, b, servers["c"])
	s.waitEnd(t)
	healthy(t, b, servers["a"], servers["c"])
	goesTo(t, b, servers["c"])
	servers["c"].kill()
	goesTo(t, b, servers["a"])
}

// The list outlives the process: a node finds its cluster although the configured server is away.
func TestListIsKept(t *testing.T) {
	store := cluster(t)
	a, c := newServer(t, store, "a", listen), newServer(t, store, "c", listen)
	state := filepath.Join(t.TempDir(), "servers.json")
	first := balancer(t, store, func(b *Balancer) { b.opts.Server, b.opts.State = a.addr.String(), state })
	listed(t, first, a, c)
	eventually(t, "the list is written", func() error {
		known, err := readState(state, netip.AddrPort{})
		if err == nil && len(known) != 2 {
			err = fmt.Errorf("it contains %v", known)
		}
		return err
	})
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v", info, err)
	}
	a.kill()
	second := balancer(t, store, func(b *Balancer) { b.opts.Server, b.opts.State = a.addr.String(), state })
	goesTo(t, second, c)
	healthy(t, second, c)
	// And an old file does not keep a node from the configured server.
	c.kill()
	a.start()
	healthy(t, second, a)
	goesTo(t, second, a)
}

// A file that is not a list of servers is ignored, and the configured server is used.
func TestHostileState(t *testing.T) {
	self := netip.MustParseAddrPort("127.0.0.1:6444")
	many := `{"servers":["` + strings.Repeat(`10.0.0.1:1","`, 8192) + `10.0.0.1:1"]}`
	var distinct []string
	for i := range 2 * maxServers {
		distinct = append(distinct, fmt.Sprintf(`"10.0.0.1:%d"`, i+1))
	}
	for content, want := range map[string]struct {
		servers int
		err     string
	}{
		``:                                 {err: "unexpected end"},
		`{`:                                {err: "unexpected end"},
		`{"servers":"10.0.0.1:6443"}`:      {err: "cannot unmarshal"},
		`{"servers":[1]}`:                  {err: "cannot unmarshal"},
		`{"servers":["example.com:6443"]}`: {err: "is not an address"},
		`{"servers":["10.0.0.1"]}`:         {err: "is not an address"},
		many:                               {err: "more than 65536 bytes"},
		`{"servers":[]}`:                   {},
		`{"servers":["127.0.0.1:6444","::ffff:127.0.0.1:6444","0.0.0.0:1","10.0.0.1:0","224.0.0.1:1","169.254.169.254:80","[fe80::1%eth0]:1"]}`: {err: "is not an address"},
		`{"servers":["127.0.0.1:6444","[::ffff:127.0.0.1]:6444","0.0.0.0:1","10.0.0.1:0","224.0.0.1:1","169.254.169.254:80","[fe80::1%e]:1"]}`:  {},
		`{"servers":["10.0.0.1:6443","[::ffff:10.0.0.1]:6443","10.0.0.2:6443"]}`:                                                                {servers: 2},
		`{"servers":[` + strings.Join(distinct, ",") + `]}`:                                                                                     {servers: maxServers},
	} {
		path := filepath.Join(t.TempDir(), "servers.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readState(path, self)
		if len(got) != want.servers || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%.80s: %v, %v; want %d servers and %q", content, got, err, want.servers, want.err)
		}
	}
	store := cluster(t)
	a := newServer(t, store, "a", listen)
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		if err := os.MkdirAll(filepath.Dir(b.opts.State), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(b.opts.State, []byte(`{"servers":["a b"]}`), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	healthy(t, b, a)
	goesTo(t, b, a)
}

// Of an EndpointSlice only what can be a server is used.
func TestAddresses(t *testing.T) {
	port, no, bad := int32(6443), false, int32(70000)
	s := &discoveryv1.EndpointSlice{
		Ports: []discoveryv1.EndpointPort{{Port: &port}, {Port: &bad}, {}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.0.0.1", "10.0.0.1", "example.com", "", "0.0.0.0"}},
			{Addresses: []string{"10.0.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}},
		},
	}
	if got, want := usable(addresses(s), netip.AddrPort{}), []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:6443")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A server of another cluster, and one that does not accept the node, is not used, even if it answers /readyz.
func TestForeignServers(t *testing.T) {
	mine, foreign := cluster(t), cluster(t)
	a, x := newServer(t, mine, "a", listen), newServer(t, foreign, "x", listen)
	b := balancer(t, mine, func(b *Balancer) { b.opts.Server, b.opts.Own = a.addr.String(), x.addr })
	healthy(t, b, a)
	goesTo(t, b, a)
	if note := strings.Join(b.Notes(t.Context()), "\n"); !strings.Contains(note, x.addr.String()+": tls: failed to verify certificate: x509: certificate signed by unknown authority") {
		t.Errorf("the note is %q", note)
	}
	other := balancer(t, mine, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		b.opts.Cert, b.opts.Key = mine.Cert(certificate.KubeProxy), mine.Key(certificate.KubeProxy)
	})
	eventually(t, "the server does not accept the certificate", func() error {
		if err := other.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "/readyz returned 401: it does not accept this node's certificate") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
}

// A node that has no certificate yet can connect, in order to get one; then it is used.
func TestFirstCertificate(t *testing.T) {
	store := cluster(t)
	a := newServer(t, store, "a", listen)
	dir := t.TempDir()
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		b.opts.Cert, b.opts.Key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	})
	eventually(t, "the check needs the certificate", func() error {
		if err := b.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "read the node's certificate: ") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
	direct, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	config := &tls.Config{InsecureSkipVerify: true} // only that it is forwarded matters here
	if err := tls.Client(direct, config).HandshakeContext(t.Context()); err != nil {
		t.Errorf("without a certificate: %v", err)
	}
	for from, to := range map[string]string{store.Key(certificate.Kubelet): b.opts.Key, store.Cert(certificate.Kubelet): b.opts.Cert} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	healthy(t, b, a)
}

// The configured name is resolved again: a registration address that moves is followed.
func TestNameMoves(t *testing.T) {
	store := cluster(t)
	a := newServer(t, store, "a", "127.0.0.2:0")
	c := newServer(t, store, "c", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), a.addr.Port()).String())
	var answer atomic.Pointer[netip.Addr]
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = fmt.Sprintf("api.example.com:%d", a.addr.Port())
		b.resolver = nameServer(t, &answer)
	})
	eventually(t, "the name does not exist", func() error {
		if err := b.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no such host") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
	first, second := a.addr.Addr(), c.addr.Addr()
	answer.Store(&first)
	healthy(t, b, a)
	s := open(t, b)
	answer.Store(&second)
	healthy(t, b, c)
	s.waitEnd(t)
	goesTo(t, b, c)
	// While the name cannot be resolved, its last addresses are used.
	answer.Store(nil)
	goesTo(t, b, c)
}

// nameServer is a resolver with a DNS server (RFC 1035) that returns answer for each name, or that there is no such name.
func nameServer(t *testing.T, answer *atomic.Pointer[netip.Addr]) *net.Resolver {
	t.Helper()
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			buffer := make([]byte, 512)
			n, from, err := l.ReadFrom(buffer)
			if err != nil {
				return
			}
			end := 12
			for end < n && buffer[end] != 0 {
				end += int(buffer[end]) + 1
			}
			end += 5 // the root label, type and class
			if end > n {
				continue
			}
			reply := append([]byte{}, buffer[:end]...)
			flags, answers := uint16(0x8180), uint16(0)
			ip := answer.Load()
			switch {
			case ip == nil:
				flags |= 3 // NXDOMAIN
			case binary.BigEndian.Uint16(buffer[end-4:]) == 1: // A
				answers = 1
				reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
				reply = append(reply, ip.AsSlice()...)
			}
			binary.BigEndian.PutUint16(reply[2:], flags)
			binary.BigEndian.PutUint16(reply[6:], answers)
			binary.BigEndian.PutUint32(reply[8:], 0)
			_, _ = l.WriteTo(reply, from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", l.LocalAddr().String())
	}}
}

// Servers fail and come back in any order and way, and the list changes, under clients that connect all the time. After each change
// the balancer finds what works.
func TestChaos(t *testing.T) {
	servers, b := three(t)
	all := []*apiServer{servers["a"], servers["b"], servers["c"]}
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for range 4 {
		c := client(t, b)
		load.Go(func() {
			for ctx.Err() == nil {
				r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+b.Addr().String()+"/name", nil)
				if err != nil {
					t.Error(err)
					return
				}
				if response, err := c.Do(r); err == nil {
					_, _ = io.Copy(io.Discard, response.Body)
					response.Body.Close()
				}
			}
		})
	}
	t.Cleanup(load.Wait)
	t.Cleanup(cancel)
	killed := map[*apiServer]bool{}
	for range 20 {
		s := all[rand.IntN(len(all))]
		if killed[s] {
			s.start()
		}
		m := mode(rand.IntN(int(modes)))
		s.set(m)
		if killed[s] = rand.IntN(4) == 0; killed[s] {
			s.kill()
		}
		if rand.IntN(2) == 0 {
			listed(t, b, all[rand.IntN(len(all)):]...)
		}
		// The next checks see it: each of the servers is checked, and is what it is.
		var want []*apiServer
		eventually(t, fmt.Sprintf("%s is %s, killed %v", s.name, m, killed[s]), func() error {
			want = want[:0]
			for _, v := range b.view.Load().servers {
				for _, s := range all {
					if s.addr != v.addr {
						continue
					}
					works := !killed[s] && mode(s.mode.Load()) == ready
					if !v.checked || works != (v.problem == "") {
						return fmt.Errorf("%s: %+v, want working %v", s.name, v, works)
					}
					if works {
						want = append(want, s)
					}
				}
			}
			return nil
		})
		if len(want) == 0 {
			continue
		}
		eventually(t, "a request is answered by a server that works", func() error {
			name, err := where(t, b)
			if err == nil && !slices.ContainsFunc(want, func(s *apiServer) bool { return s.name == name }) {
				err = fmt.Errorf("%s answered", name)
			}
			return err
		})
	}
}

// Stop ends with clients connected, and those are disconnected.
func TestStop(t *testing.T) {
	_, b := three(t)
	s := open(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	s.waitEnd(t)
	if _, err := net.Dial("tcp", b.Addr().String()); err == nil {
		t.Error("it still listens")
	}
}

func TestInit(t *testing.T) {
	local := netip.MustParseAddrPort("127.0.0.1:6444")
	for want, o := range map[string]Options{
		"is not an address of this machine's loopback": {Listen: netip.MustParseAddrPort("0.0.0.0:6444"), Server: "a:1"},
		"no API server is configured":                  {Listen: local},
		`the server "example.com" is not HOST:PORT`:    {Listen: local, Server: "example.com"},
		`the server ":6443" is not HOST:PORT`:          {Listen: local, Server: ":6443"},
		`the server "a:0" is not HOST:PORT`:            {Listen: local, Server: "a:0"},
		`the server "a:70000" is not HOST:PORT`:        {Listen: local, Server: "a:70000"},
	} {
		o.Log = slog.New(slog.DiscardHandler)
		if err := New(o).Init(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", o, err, want)
		}
	}
}
