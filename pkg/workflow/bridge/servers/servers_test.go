package servers

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

func TestAsk(t *testing.T) {
	answering := func(status int, body string) *url.URL {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}))
		t.Cleanup(server.Close)
		return parsed(t, server.URL)
	}
	down := httptest.NewServer(http.NotFoundHandler())
	away := parsed(t, down.URL)
	down.Close()
	ended, end := context.WithCancel(t.Context())
	end()
	for _, c := range []struct {
		name      string
		ctx       context.Context
		addresses []*url.URL
		body, err string
		status    int
	}{
		{"the first", t.Context(), []*url.URL{answering(200, "a"), answering(200, "b")}, "a", "", 200},
		{"the first is down", t.Context(), []*url.URL{away, answering(200, "b")}, "b", "", 200},
		{"the first does not know", t.Context(), []*url.URL{answering(500, "no\n leader"), answering(200, "b")}, "b", "", 200},
		{"there is no such thing", t.Context(), []*url.URL{answering(404, ""), answering(200, "b")}, "", "", 404},
		{"none knows", t.Context(), []*url.URL{away, answering(500, "no\n leader")}, "", "returned 500: no leader", 0},
		{"the caller has gone", ended, []*url.URL{answering(200, "a")}, "", "context canceled", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Servers{http.DefaultClient, c.addresses, func(*http.Request, *url.URL) {}}
			reply, err := s.Ask(c.ctx, Request{Method: http.MethodGet})
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("the error is %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || reply.Status != c.status || string(reply.Body) != c.body {
				t.Errorf("got %d %q, %v; want %d %q", reply.Status, reply.Body, err, c.status, c.body)
			}
		})
	}
}

// The request is sent unchanged, to the path below the server's own, and secrets in an address are neither sent nor shown.
func TestRequest(t *testing.T) {
	var got *http.Request
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r }))
	t.Cleanup(server.Close)
	address := parsed(t, server.URL+"/eureka/")
	address.User = url.UserPassword("user", "secret")
	s := Servers{http.DefaultClient, []*url.URL{address}, func(r *http.Request, server *url.URL) {
		if password, _ := server.User.Password(); password == "secret" {
			r.Header.Set("X-Token", "token")
		}
	}}
	if _, err := s.Ask(t.Context(), Request{http.MethodPut, []string{"apps", "a/b c?"}, "value=UP", []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	if got.Method != http.MethodPut || got.URL.EscapedPath() != "/eureka/apps/a%2Fb%20c%3F" || got.URL.RawQuery != "value=UP" {
		t.Errorf("the request was %s %s?%s", got.Method, got.URL.EscapedPath(), got.URL.RawQuery)
	}
	if got.Header.Get("X-Token") != "token" || got.Header.Get("Authorization") != "" || got.Header.Get("Content-Type") != "application/json" {
		t.Errorf("the headers are %v", got.Header)
	}
	if strings.Contains(s.String(), "secret") || !strings.Contains(s.String(), "/eureka/") {
		t.Errorf("String() is %s", s)
	}
}

func parsed(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
