package dashboard

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe/route"
)

const (
	// Path is the path of the API server below which it serves the store. The API server has checked who calls, and whether they may: the store
	// has all namespaces, as every Prometheus has.
	Path = layout.ObservePath
	// Role is the ClusterRole for Path, which is bound to no one.
	Role = layout.ObserveRole
	// userHeader tells the store who asks, for its log.
	userHeader = "X-Polymesh-User"
	// statusPath is answered by every store.
	statusPath = "/api/polymesh/v1/status"
)

// Gateway returns the handler for Path. socket is that of the store on this machine.
//
// A path of the API server, and not a Service behind services/proxy: that would open a port of a pod to every other pod, needs a pod, and
// changes the links in HTML.
func Gateway(socket string, log *slog.Logger) http.Handler {
	proxy := &httputil.ReverseProxy{
		Transport: unixTransport(socket),
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", "polymesh-observe"
			p.Out.URL.Path = "/" + strings.TrimPrefix(p.In.URL.Path, Path)
			p.Out.URL.RawPath = ""
			p.Out.Host = "polymesh-observe"
			stripped(p.Out.Header)
			if user, _, _, known := route.Caller(p.In); known {
				p.Out.Header.Set(userHeader, url.QueryEscape(user))
			}
		},
		ModifyResponse: func(r *http.Response) error { cleaned(r.Header); return nil },
		FlushInterval:  -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			log.Debug("the store does not answer", "err", err)
			http.Error(w, "the store of metrics, logs and traces does not run on this server", http.StatusServiceUnavailable)
		},
	}
	return admitted(proxy)
}

// Elsewhere returns the handler for Path on a server without the store. pass sends requests to the one that has it.
func Elsewhere(pass http.HandlerFunc) http.Handler { return admitted(pass) }

// admitted refuses what is not for Path.
func admitted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _, _, known := route.Caller(r)
		switch {
		case !known || !strings.HasPrefix(r.URL.Path, Path):
			http.Error(w, "no user", http.StatusForbidden)
		case r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "":
			// A browser with a client certificate would let every page use it.
			http.Error(w, "this path is not for browsers: use `polymesh dashboard`", http.StatusForbidden)
		default:
			if readOnly(w, r) {
				next.ServeHTTP(w, r)
			}
		}
	})
}

// readOnly refuses what is not reading.
func readOnly(w http.ResponseWriter, r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "the store is read-only here", http.StatusMethodNotAllowed)
		return false
	}
	if up := r.Header.Get("Upgrade"); up != "" && !strings.EqualFold(up, "websocket") {
		http.Error(w, "only WebSocket", http.StatusBadRequest)
		return false
	}
	return true
}

// stripped removes what is for the server in between, and what others may not claim.
func stripped(h http.Header) {
	for _, name := range []string{"Authorization", "Cookie", "Origin", "Forwarded"} {
		h.Del(name)
	}
	for name := range h {
		if strings.HasPrefix(name, "X-Polymesh-") || strings.HasPrefix(name, "X-Forwarded-") || strings.HasPrefix(name, "X-Remote-") || strings.HasPrefix(name, "Impersonate-") {
			delete(h, name)
		}
	}
}

// cleaned removes from a response what would let others in.
func cleaned(h http.Header) {
	h.Del("Set-Cookie")
	for name := range h {
		if strings.HasPrefix(name, "Access-Control-") {
			delete(h, name)
		}
	}
}

// unixTransport connects to a socket, whatever the address is.
func unixTransport(socket string) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, fmt.Errorf("connect to the store: %w", err)
			}
			return conn, nil
		},
		DisableCompression: true, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
	}
}
