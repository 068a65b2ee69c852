package server

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"polymesh.dev/polymesh/observe/ingest"
)

// Limits of the HTTP servers. Users of the cluster choose what they send, and how slowly.
const (
	headerTime = 10 * time.Second
	idleTime   = 2 * time.Minute
	maxHeader  = 64 << 10
	// maxBody is the largest body as sent: decompressed sizes are limited where bodies are decompressed.
	maxBody  = 16 << 20
	bodyTime = time.Minute
	// answerTime is the time limit for sending an answer, and queryTime for evaluating a query.
	answerTime = 3 * time.Minute
	queryTime  = 2 * time.Minute
	// queueTime is how long a request waits for its turn.
	queueTime = 10 * time.Second
)

// gate lets a number of requests through at a time.
type gate struct {
	turns chan struct{}
	queue time.Duration
}

func newGate(n int) *gate { return &gate{make(chan struct{}, n), queueTime} }

// handler waits for a turn, and refuses a request that does not get one.
func (g *gate) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case g.turns <- struct{}{}:
		default:
			timer := time.NewTimer(g.queue)
			defer timer.Stop()
			select {
			case g.turns <- struct{}{}:
			case <-timer.C:
				w.Header().Set("Retry-After", "10")
				http.Error(w, "too many requests at the same time: try again later", http.StatusServiceUnavailable)
				return
			case <-r.Context().Done():
				return
			}
		}
		defer func() { <-g.turns }()
		next.ServeHTTP(w, r)
	})
}

// tailPath serves live logs, the only requests that last as long as the client stays.
const tailPath = "/loki/api/v1/tail"

// front bounds the resources of all requests on some sockets.
type front struct {
	queries, writes, tails *gate
	log                    *slog.Logger
}

func newFront(queries, writes, tails int, log *slog.Logger) *front {
	return &front{newGate(queries), newGate(writes), newGate(tails), log}
}

// limited bounds the resources of a request. Live logs have separate limits, because they last.
func (f *front) limited(next http.Handler) http.Handler {
	query, write, tail := f.queries.handler(timed(next)), f.writes.handler(next), f.tails.handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				panic(p)
			default:
				f.log.Error("a request panicked", "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				http.Error(w, "internal error: see the store's log", http.StatusInternalServerError)
			}
		}()
		if r.URL.EscapedPath() == tailPath {
			tail.ServeHTTP(w, r)
			return
		}
		control := http.NewResponseController(w)
		_ = control.SetWriteDeadline(time.Now().Add(queueTime + answerTime))
		if r.Body != nil && r.Body != http.NoBody {
			_ = control.SetReadDeadline(time.Now().Add(queueTime + bodyTime))
			r.Body = &body{http.MaxBytesReader(w, r.Body, maxBody), control}
		}
		switch {
		case arrives(r):
			next.ServeHTTP(w, r)
		case writes(r):
			write.ServeHTTP(w, r)
		default:
			query.ServeHTTP(w, r)
		}
	})
}

// writes reports whether a request brings something to store, rather than to query.
func writes(r *http.Request) bool {
	return arrives(r) || r.Method == http.MethodPost && (r.URL.Path == "/api/v1/write" || r.URL.Path == ingest.Path)
}

// arrives reports whether a request sends data to package receive or loki. These bound the memory of requests themselves, counting only what has
// arrived: behind a gate, slow clients would keep the others out.
func arrives(r *http.Request) bool {
	if r.Method != http.MethodPost {
		return false
	}
	switch r.URL.Path {
	case "/loki/api/v1/push", "/otlp/v1/logs", "/v1/logs", "/v1/traces", "/v1/metrics", "/api/v2/spans", "/api/traces":
		return true
	}
	return false
}

// timed ends a query that takes too long.
func timed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), queryTime)
		defer cancel()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// body removes the deadline when it has been read: after it, the server only reads to notice that the client goes away.
type body struct {
	io.ReadCloser
	control *http.ResponseController
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
}
