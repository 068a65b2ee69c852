package route

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// forHeader names the user for whom a server passes a request on. It is only trusted from a server.
const forHeader = "X-Polymesh-For"

// serverUser is the user of a server's own certificate (certificate.Polymesh).
const serverUser = "system:polymesh"

const dialTimeout = 5 * time.Second

var dialer = net.Dialer{Timeout: dialTimeout}

// Caller returns the user who has sent a request to the API server. passed is set if another server has passed it on; groups are the user's if it was sent
// here, otherwise none. known is false if the API server has not authenticated the request.
func Caller(r *http.Request) (name string, groups []string, passed, known bool) {
	u, ok := request.UserFrom(r.Context())
	if !ok {
		return "", nil, false, false
	}
	text := r.Header.Values(forHeader)
	if len(text) == 0 || u.GetName() != serverUser || !slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) {
		return u.GetName(), u.GetGroups(), false, true
	}
	name, err := url.QueryUnescape(text[0])
	if err != nil || len(text) > 1 || name == "" {
		return "", nil, false, false
	}
	return name, nil, true, true
}

// retry is the answer of a server that cannot pass a request on now.
func retry(w http.ResponseWriter, text string) {
	w.Header().Set("Retry-After", "5")
	http.Error(w, text, http.StatusServiceUnavailable)
}

// Pass sends a request on to the server that has the store, for the user who has sent it here and may.
func (r *Route) Pass(w http.ResponseWriter, in *http.Request) {
	name, _, passed, known := Caller(in)
	if !known {
		http.Error(w, "no user", http.StatusForbidden)
		return
	}
	p, err := r.where()
	switch {
	case err != nil:
		retry(w, err.Error())
	case p.server == "":
		http.Error(w, "this cluster has no store of metrics, logs and traces", http.StatusNotFound)
	case passed || p.server == r.o.Server:
		retry(w, "this server does not have the store of metrics, logs and traces: try again")
	default:
		r.to(p, name).ServeHTTP(w, in)
	}
}

// to returns the handler that passes a request on.
func (r *Route) to(p place, name string) http.Handler {
	return &httputil.ReverseProxy{
		Transport: roundTripper(r.round),
		Rewrite: func(q *httputil.ProxyRequest) {
			q.Out.URL.Scheme, q.Out.URL.Host, q.Out.Host = "https", p.address.String(), p.address.String()
			// This server authenticates itself, with its certificate.
			for header := range q.Out.Header {
				if header == "Authorization" || header == "Cookie" || strings.HasPrefix(header, "X-Polymesh-") || strings.HasPrefix(header, "X-Remote-") || strings.HasPrefix(header, "Impersonate-") {
					delete(q.Out.Header, header)
				}
			}
			q.Out.Header.Set(forHeader, url.QueryEscape(name))
		},
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			var large *http.MaxBytesError
			if errors.As(err, &large) {
				http.Error(w, "the request is too large", http.StatusRequestEntityTooLarge)
				return
			}
			r.log.Debug("the server with the store does not answer", "server", p.server, "err", err)
			retry(w, fmt.Sprintf("server %s, which has the store of metrics, logs and traces, does not answer", p.server))
		},
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
