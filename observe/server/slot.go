package server

import (
	"net/http"
	"sync/atomic"
)

// slot holds a part's handler. The sockets exist before the part works.
type slot struct {
	name    string
	handler atomic.Pointer[http.Handler]
}

func (s *slot) set(h http.Handler) { s.handler.Store(&h) }

// ServeHTTP answers that the part does not work yet until there is a handler.
func (s *slot) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := s.handler.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	w.Header().Set("Retry-After", "5")
	http.Error(w, s.name+" do not work yet: see `polymesh status`", http.StatusServiceUnavailable)
}
