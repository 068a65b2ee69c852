package forward

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/porttest"
)

// socket listens on a UNIX socket, and serves each connection with f until the test ends.
func socket(t *testing.T, f func(*net.UnixConn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listen(t, path, f)
	return path
}

func listen(t *testing.T, path string, f func(*net.UnixConn)) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				f(conn.(*net.UnixConn))
			})
		}
	})
	stop = sync.OnceFunc(func() { l.Close(); serving.Wait() })
	t.Cleanup(stop)
	return stop
}

// echo sends back what comes until its end, in capitals, and then ends.
func echo(c *net.UnixConn) {
	text, _ := io.ReadAll(c)
	_, _ = c.Write(bytes.ToUpper(text))
}

// start forwards to sockets until stop is called or the test ends, and returns the addresses of the ports.
func start(t *testing.T, sockets ...string) (addresses []string, ready netip.AddrPort, stop func()) {
	t.Helper()
	ready = porttest.Loopback(t)
	o := Options{Address: netip.MustParseAddr("127.0.0.1"), Ready: ready.Port(), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	for _, s := range sockets {
		o.Routes = append(o.Routes, Route{0, s})
	}
	f, err := Listen(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range f.listeners {
		addresses = append(addresses, l.Addr().String())
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { f.Run(ctx); close(ended) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return addresses, ready, stop
}

func dial(t *testing.T, address, from string) *net.TCPConn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// Each port leads to its socket; both directions and their ends get through.
func TestForward(t *testing.T) {
	t.Parallel()
	addresses, _, _ := start(t, socket(t, echo), socket(t, func(c *net.UnixConn) { fmt.Fprint(c, "second") }))
	big := make([]byte, 3<<20)
	if _, err := rand.Read(big); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, addresses[0], "127.0.0.1")
	go func() {
		_, _ = conn.Write(big)
		_ = conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, bytes.ToUpper(big)) {
		t.Errorf("%d bytes came back: %v", len(got), err)
	}
	if got, err := io.ReadAll(dial(t, addresses[1], "127.0.0.1")); err != nil || string(got) != "second" {
		t.Errorf("%q, %v", got, err)
	}
}

// A side that is gone ends the other one.
func TestEndOfOneSide(t *testing.T) {
	t.Parallel()
	gone := make(chan error, 1)
	path := socket(t, func(c *net.UnixConn) {
		_, err := io.Copy(io.Discard, c)
		gone <- err
	})
	addresses, _, _ := start(t, path)
	conn := dial(t, addresses[0], "127.0.0.1")
	fmt.Fprint(conn, "x")
	if err := conn.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-gone; err != nil {
		t.Logf("the socket's end: %v", err)
	}
	// No one listens: the connection ends.
	addresses, _, _ = start(t, filepath.Join(t.TempDir(), "none"))
	if n, err := dial(t, addresses[0], "127.0.0.1").Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// One address cannot take all connections.
func TestLimitOfAnAddress(t *testing.T) {
	t.Parallel()
	path := socket(t, func(c *net.UnixConn) {
		fmt.Fprint(c, "!")
		_, _ = io.Copy(io.Discard, c)
	})
	addresses, _, _ := start(t, path)
	served := func(from string) (*net.TCPConn, bool) {
		conn := dial(t, addresses[0], from)
		n, _ := conn.Read(make([]byte, 1))
		return conn, n == 1
	}
	var first *net.TCPConn
	for i := range maxOfSource {
		conn, ok := served("127.0.0.2")
		if !ok {
			t.Fatalf("connection %d was refused", i)
		}
		if first == nil {
			first = conn
		}
	}
	if _, ok := served("127.0.0.2"); ok {
		t.Error("more connections of an address than it may have")
	}
	if _, ok := served("127.0.0.3"); !ok {
		t.Error("another address is refused")
	}
	first.Close()
	eventually(t, "an address may connect again", func() bool { _, ok := served("127.0.0.2"); return ok })
}

// The port for the kubelet is open while a socket accepts connections, also one that was replaced.
func TestReady(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	_, ready, end := start(t, filepath.Join(dir, "none"), path)
	open := func() bool {
		conn, err := net.Dial("tcp", ready.String())
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	if open() {
		t.Error("it is ready without a socket")
	}
	stop := listen(t, path, echo)
	eventually(t, "ready", open)
	stop()
	eventually(t, "not ready", func() bool { return !open() })
	listen(t, path, echo)
	eventually(t, "ready again", open)
	end()
	if open() {
		t.Error("it is ready after its end")
	}
}

// At the end, what is under way may be completed.
func TestEnd(t *testing.T) {
	t.Parallel()
	addresses, _, stop := start(t, socket(t, echo))
	conn := dial(t, addresses[0], "127.0.0.1")
	fmt.Fprint(conn, "under ")
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	eventually(t, "the port is closed", func() bool {
		c, err := net.Dial("tcp", addresses[0])
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	fmt.Fprint(conn, "way")
	_ = conn.CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "UNDER WAY" {
		t.Errorf("%q, %v", got, err)
	}
	<-stopped
}

// What does not end by itself is ended.
func TestEndOfWhatStays(t *testing.T) {
	t.Parallel()
	addresses, _, stop := start(t, socket(t, func(c *net.UnixConn) {
		fmt.Fprint(c, "!")
		_, _ = io.Copy(io.Discard, c)
	}))
	conn := dial(t, addresses[0], "127.0.0.1")
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is still open")
	}
}

func TestParseRoute(t *testing.T) {
	if r, err := ParseRoute("4317=/run/observe/otlp-grpc.sock"); err != nil || r != (Route{4317, "/run/observe/otlp-grpc.sock"}) {
		t.Errorf("%v, %v", r, err)
	}
	for _, text := range []string{"", "4317", "4317=", "4317=relative", "=/x", "0=/x", "65536=/x", "-1=/x", "http=/x"} {
		if _, err := ParseRoute(text); err == nil || !strings.Contains(err.Error(), "PORT=PATH") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
