package apilb

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/porttest"
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

// apiServer is an API server that a test can make fail.
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
	b := New(Options{
		Listen: porttest.Loopback(t),
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
