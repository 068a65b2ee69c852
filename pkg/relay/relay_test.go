package relay

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"path/filepath"
	"testing"
)

// pair returns the two ends of a connection.
func pair(t *testing.T, network, address string) (near, far End) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near = dial(t, l)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return near, conn.(End)
}

func dial(t *testing.T, l net.Listener) End {
	t.Helper()
	conn, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(End)
}

// start relays between a TCP connection and one of a UNIX socket, and returns their other ends.
func start(t *testing.T) (client, server End, ended <-chan struct{}) {
	t.Helper()
	client, a := pair(t, "tcp", "127.0.0.1:0")
	b, server := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
	done := make(chan struct{})
	go func() { Between(a, b); close(done) }()
	return client, server, done
}

// Both directions get through, also after one has ended.
func TestBothDirections(t *testing.T) {
	client, server, ended := start(t)
	big := make([]byte, 3<<20)
	if _, err := rand.Read(big); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = client.Write(big)
		_ = client.CloseWrite()
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, big) {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	go func() {
		_, _ = server.Write(big)
		_ = server.CloseWrite()
	}()
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes came back: %v", len(got), err)
	}
	<-ended
}

// A side that is gone ends the other one, although that says nothing.
func TestOneSideIsGone(t *testing.T) {
	client, server, ended := start(t)
	if err := client.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	client.Close() // a reset
	<-ended
	if _, err := server.Read(make([]byte, 1)); err == nil {
		t.Error("the other side is still connected")
	}

	client, server, ended = start(t)
	server.Close()
	// What is written has no reader: both end.
	for err := error(nil); err == nil; _, err = client.Write(make([]byte, 1<<16)) {
	}
	<-ended
}
