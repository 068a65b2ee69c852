package apilb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
				if notes := b.Notes(t.Context()); len(notes) == 0 || !strings.HasPrefix(notes[0], "an API server is not healthy: "+servers[s.server].addr.String()+": ") {
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

// Without another server, the connections to one that reports that it is not ready continue, and new ones are made: it is the best
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

// All servers are away: clients are disconnected, the component reports about each why, and everything works when they come back.
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
