package server

import (
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/excerpt"
)

// userHeader names the user: the API server's path and `polymesh dashboard` set it, and remove any value from clients (pkg/dashboard in the main
// module).
const userHeader = "X-Polymesh-User"

// maxAudited is how many bytes of a text that others have chosen are in a line of the log.
const maxAudited = 2 << 10

// audited logs each query and its user, at the debugging level.
func audited(who func(*http.Request) string, log *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user := who(r)
		if !isQuery(r) || writes(r) || !log.Enabled(r.Context(), slog.LevelDebug) {
			next.ServeHTTP(w, r)
			return
		}
		begin := time.Now()
		defer func() {
			form := r.Form // which includes the body, if the handler has read it
			if form == nil {
				form = r.URL.Query()
			}
			log.Debug("query", "user", user, "path", excerpt.Marked(r.URL.Path, maxAudited), "expression", excerpt.Marked(expression(form), maxAudited), "took", time.Since(begin).Round(time.Millisecond).String())
		}()
		next.ServeHTTP(w, r)
	})
}

// asker returns the user of a request on the socket for root.
func asker(r *http.Request) string {
	text := r.Header.Get(userHeader)
	if name, err := url.QueryUnescape(text); err == nil {
		text = name
	}
	if text == "" {
		return "root"
	}
	return excerpt.Marked(text, maxAudited)
}

// anyPod stands for the user on the sockets for pods, where clients cannot prove a name.
func anyPod(r *http.Request) string {
	r.Header.Del(userHeader)
	return "a pod"
}

// isQuery reports whether a request is for data, rather than for a file of the page.
func isQuery(r *http.Request) bool {
	for _, prefix := range []string{"/api/", "/loki/", "/jaeger/"} {
		if strings.HasPrefix(r.URL.Path, prefix) {
			return true
		}
	}
	return false
}

// expression returns what a query is about: its expression, or all of its parameters if it has none.
func expression(form url.Values) string {
	if q := form.Get("query"); q != "" {
		return q
	}
	return form.Encode()
}
