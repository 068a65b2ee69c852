package registry

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// Connections that show no credentials do not keep those that do from a port, however many there are and whatever they send.
func TestGuests(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := newGuests(l, 2)
	server := &http.Server{ConnContext: withGuest, ReadHeaderTimeout: time.Hour, Handler: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		if who := h.Header.Get("Authorization"); who != "" && !welcome(h.Context(), who) {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})}
	go func() { _ = server.Serve(g) }()
	t.Cleanup(func() { server.Close() })
	dial := func(text string) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	askAs := func(who string, client *http.Client) int {
		t.Helper()
		h, err := http.NewRequest(http.MethodGet, "http://"+l.Addr().String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		h.Header.Set("Authorization", who)
		answer, err := client.Do(h)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode
	}
	ask := func(client *http.Client) int { return askAs("yes", client) }
	keeping := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
	if got := ask(keeping); got != http.StatusOK {
		t.Fatal(got)
	}
	oldest := dial("GET / HTTP/1.1\r\n")
	for i := range maxGuests + maxGuests/4 {
		dial([]string{"", "G", "GET / HTTP/1.1\r\nHost: x\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"}[i%4])
	}
	// A new one, and the one of before.
	for _, client := range []*http.Client{{Transport: &http.Transport{DisableKeepAlives: true}}, keeping} {
		if got := ask(client); got != http.StatusOK {
			t.Errorf("a connection with credentials gets %d", got)
		}
	}
	if _, err := oldest.Read(make([]byte, 1)); err == nil {
		t.Error("the oldest connection without credentials is open")
	}
	// Those that are known are limited, too.
	// The server notices that the new one is closed.
	known := func() int {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.all
	}
	for deadline := time.Now().Add(30 * time.Second); known() != 1 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
	}
	if n := known(); n != 1 {
		t.Errorf("%d connections are known, want the one that is kept", n)
	}
	// One that has as many connections as it may keeps no other one from the port.
	for range 2 {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
		defer client.CloseIdleConnections()
		if got := askAs("greedy", client); got != http.StatusOK {
			t.Errorf("one of the allowed connections gets %d", got)
		}
	}
	if got := askAs("greedy", &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}); got != http.StatusServiceUnavailable {
		t.Errorf("one more connection of the same gets %d", got)
	}
	if got := askAs("another", &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}); got != http.StatusOK {
		t.Errorf("a connection of another one gets %d", got)
	}
	g.mu.Lock()
	g.all = maxConnections
	waiting := g.waiting.Len()
	g.mu.Unlock()
	if waiting > maxGuests {
		t.Errorf("%d connections wait", waiting)
	}
	if got := ask(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}); got != http.StatusServiceUnavailable {
		t.Errorf("one connection too many gets %d", got)
	}
}
