package dashboard

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"embed"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
)

// The paths that the command serves itself.
const (
	doorPrefix  = "/.polymesh/"
	sessionPath = doorPrefix + "session"
	scriptPath  = doorPrefix + "door.js"
)

//go:embed door
var door embed.FS

// anyone is the owner of a guard before the token has been used by a user of the machine.
const anyone = -1

// guard lets one user of this machine in, by a token that works once, and everything from there by a cookie.
//
// A cookie alone would not do: browsers send it to every port of an address, so also to a server of another local user. Therefore it is good
// for the connections of that user only who has used the token.
type guard struct {
	next http.Handler
	// cookie is its name: one browser may have several dashboards open.
	cookie string
	// peer returns the user whose process has opened a connection to this one.
	peer func(local, remote netip.AddrPort) (uid int, err error)

	mu      sync.Mutex
	token   string // empty once it is used
	session string // empty until then
	owner   int    // a user's id, or anyone
}

// newGuard returns a guard for a port. owner may use the token: anyone, or a user's id.
func newGuard(next http.Handler, port uint16, owner int) *guard {
	return &guard{next: next, cookie: fmt.Sprintf("polymesh-dashboard-%d", port), peer: peerOf, token: secret(), owner: owner}
}

// secret returns 256 random bits.
func secret() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}

type connKey struct{}

// withConn is http.Server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	harden(w.Header())
	if problem := foreign(r); problem != "" {
		http.Error(w, problem, http.StatusForbidden)
		return
	}
	switch site := r.Header.Get("Sec-Fetch-Site"); {
	case site == "" || site == "same-origin" || site == "none":
	case r.Method == http.MethodGet && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document":
		// A link on another page: the door is open, what is behind it is not.
		g.serveDoor(w, http.StatusOK)
		return
	default:
		http.Error(w, "requests of other pages are refused", http.StatusForbidden)
		return
	}
	switch {
	case r.URL.Path == sessionPath && r.Method == http.MethodPost:
		g.exchange(w, r)
	case r.URL.Path == sessionPath && r.Method == http.MethodGet:
		if !g.known(r) {
			http.Error(w, "no session", http.StatusUnauthorized)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "the dashboard is read-only", http.StatusMethodNotAllowed)
	case r.URL.Path == scriptPath:
		http.ServeFileFS(w, r, door, "door/door.js")
	case !g.known(r):
		g.serveDoor(w, http.StatusUnauthorized)
	default:
		g.next.ServeHTTP(w, r)
	}
}

// foreign returns why a request is not for this server; empty if it may be. A name that is not one of this machine's own is that of a page whose
// name now leads here (DNS rebinding). The port may be another one: that of an SSH tunnel.
func foreign(r *http.Request) string {
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !remote.Addr().Unmap().IsLoopback() {
		return "the dashboard is for this machine only"
	}
	name := r.Host
	if host, _, err := net.SplitHostPort(name); err == nil {
		name = host
	}
	ip, err := netip.ParseAddr(strings.Trim(name, "[]"))
	if name != "localhost" && (err != nil || !ip.IsLoopback()) {
		return "this address is not the dashboard's: open the one that `polymesh dashboard` has printed"
	}
	for _, origin := range r.Header.Values("Origin") {
		if origin != "http://"+r.Host {
			return "requests of other pages are refused"
		}
	}
	return ""
}

// maxToken is how much of a request's body is read.
const maxToken = 256

// exchange takes the token, and gives the cookie.
func (g *guard) exchange(w http.ResponseWriter, r *http.Request) {
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxToken))
	if err != nil {
		http.Error(w, "not a token", http.StatusBadRequest)
		return
	}
	uid, err := g.user(r)
	if err != nil {
		http.Error(w, "it is not known whose connection this is: "+err.Error(), http.StatusForbidden)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.owner != anyone && g.owner != uid:
		http.Error(w, "this dashboard is another user's", http.StatusForbidden)
		return
	case g.token == "" || subtle.ConstantTimeCompare(text, []byte(g.token)) != 1:
		http.Error(w, "this token is not valid, or was used already", http.StatusForbidden)
		return
	}
	g.token, g.session, g.owner = "", secret(), uid
	http.SetCookie(w, &http.Cookie{Name: g.cookie, Value: g.session, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode})
	w.WriteHeader(http.StatusNoContent)
}

// known reports whether a request has the cookie, and comes from the user to whom it was given.
func (g *guard) known(r *http.Request) bool {
	g.mu.Lock()
	session, owner := g.session, g.owner
	g.mu.Unlock()
	if session == "" {
		return false
	}
	found := false
	for _, c := range r.CookiesNamed(g.cookie) {
		found = found || subtle.ConstantTimeCompare([]byte(c.Value), []byte(session)) == 1
	}
	if !found {
		return false
	}
	uid, err := g.user(r)
	return err == nil && uid == owner
}

// user returns whose process has opened the request's connection.
func (g *guard) user(r *http.Request) (int, error) {
	conn, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok {
		return 0, fmt.Errorf("no connection")
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	remote, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return 0, err
	}
	return g.peer(local, remote)
}

// serveDoor serves the page that uses the token. It has nothing of the store.
func (g *guard) serveDoor(w http.ResponseWriter, status int) {
	page, err := door.ReadFile("door/door.html")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(page)
}

// policy is for responses that have no Content-Security-Policy of their own.
const policy = "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// harden sets the headers of all responses. A policy that is there stays: the page has its own.
func harden(h http.Header) {
	if h.Get("Content-Security-Policy") == "" {
		h.Set("Content-Security-Policy", policy)
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
}

// ownerOf returns who may use the token: the user of the command. Of root's, anyone who has it: with sudo the browser is not root's.
func ownerOf(euid int) int {
	if euid == 0 {
		return anyone
	}
	return euid
}

// browsable reports whether a browser can be opened: not as root, whose command line everyone can read, and with it the token.
func browsable() bool {
	return os.Geteuid() != 0 && (os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != "")
}
