package route

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/apiserver/pkg/authentication/user"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/join"
)

// What the store expects on its socket (observe/ingest, in a module of its own).
const (
	storePath  = "/api/polymesh/v1/ingest"
	nodeHeader = "X-Polymesh-Node"
)

const (
	// maxPush is the largest push (observe/wire), pushTime the time for one with its answer: a collector waits for 45 seconds.
	maxPush  = 4 << 20
	pushTime = 40 * time.Second
	// maxSenders is how many nodes send at a time. A node sends one push at a time; pushRate and pushBurst bound how often.
	maxSenders          = 32
	turnWait            = 5 * time.Second
	pushRate, pushBurst = 4, 40
	// maxKnown bounds the nodes with a known rate.
	maxKnown = 2000
)

// senders are the nodes that send.
type senders struct {
	lock sync.Mutex
	// busy has a channel for each node that sends, closed when it has. A node has the answer to its push a moment before its push has ended here, so
	// another one of it may wait, which waiting has.
	busy    map[string]chan struct{}
	waiting map[string]bool
	rates   map[string]*rate.Limiter
}

// begin reports whether a node may send now, or once its previous push has ended. The caller must call end.
func (s *senders) begin(ctx context.Context, node string) bool {
	s.lock.Lock()
	defer s.lock.Unlock()
	if before := s.busy[node]; before != nil {
		if s.waiting[node] {
			return false
		}
		if s.waiting == nil {
			s.waiting = map[string]bool{}
		}
		s.waiting[node] = true
		s.lock.Unlock()
		select {
		case <-before:
		case <-ctx.Done():
		case <-time.After(turnWait):
		}
		s.lock.Lock()
		delete(s.waiting, node)
	}
	if s.busy[node] != nil || len(s.busy) >= maxSenders {
		return false
	}
	if s.rates[node] == nil {
		if s.rates == nil || len(s.rates) >= maxKnown {
			s.rates = map[string]*rate.Limiter{}
		}
		s.rates[node] = rate.NewLimiter(pushRate, pushBurst)
	}
	if !s.rates[node].Allow() {
		return false
	}
	if s.busy == nil {
		s.busy = map[string]chan struct{}{}
	}
	s.busy[node] = make(chan struct{})
	return true
}

func (s *senders) end(node string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	close(s.busy[node])
	delete(s.busy, node)
}

// Where is the answer to a node that asks whether there is a store.
type Where struct {
	// Server is the name of the server that has it.
	Server string `json:"server"`
}

// Ingest returns the handler for layout.ObserveIngestPath: a GET asks whether the cluster has a store, a POST sends something to it.
func (r *Route) Ingest() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, in *http.Request) {
		node, err := sender(in)
		switch {
		case err != nil:
			http.Error(w, err.Error(), http.StatusForbidden)
		case in.Method == http.MethodGet:
			r.answer(w)
		case in.Method == http.MethodPost:
			r.push(w, in, node)
		default:
			w.Header().Set("Allow", "GET, POST")
			http.Error(w, "use POST", http.StatusMethodNotAllowed)
		}
	})
}

// sender returns the node that has sent a request: to this server, or to another one that has checked its groups and passed it on.
func sender(in *http.Request) (string, error) {
	name, groups, passed, known := Caller(in)
	node, is := strings.CutPrefix(name, join.User(""))
	if !known || !is || !config.ValidNodeName(node) || !passed && !slices.Contains(groups, user.NodesGroup) {
		return "", errors.New("only the cluster's nodes send here")
	}
	return node, nil
}

func (r *Route) answer(w http.ResponseWriter) {
	p, err := r.where()
	switch {
	case err != nil:
		retry(w, err.Error())
	case p.server == "":
		http.Error(w, "this cluster has no store of metrics, logs and traces", http.StatusNotFound)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(Where{p.server})
	}
}

func (r *Route) push(w http.ResponseWriter, in *http.Request, node string) {
	if !r.begin(in.Context(), node) {
		w.Header().Set("Retry-After", "2")
		http.Error(w, "this node, or many others, send at this moment: try again", http.StatusTooManyRequests)
		return
	}
	defer r.end(node)
	ctx, cancel := context.WithTimeout(in.Context(), pushTime)
	defer cancel()
	out := in.Clone(ctx)
	out.Body = http.MaxBytesReader(w, in.Body, maxPush)
	if r.o.Socket == "" {
		r.Pass(w, out)
		return
	}
	r.store(node).ServeHTTP(w, out)
}

// store returns the handler that sends a push to the store here.
func (r *Route) store(node string) http.Handler {
	return &httputil.ReverseProxy{
		Transport: &http.Transport{
			DisableKeepAlives: true, DisableCompression: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, "unix", r.o.Socket)
			},
		},
		Rewrite: func(q *httputil.ProxyRequest) {
			q.Out.URL.Scheme, q.Out.URL.Host, q.Out.Host = "http", "polymesh-observe", "polymesh-observe"
			q.Out.URL.Path, q.Out.URL.RawPath, q.Out.URL.RawQuery = storePath, "", ""
			// Only the body comes from the node.
			q.Out.Header = http.Header{nodeHeader: {node}, "Content-Type": {"application/octet-stream"}}
		},
		ModifyResponse: func(resp *http.Response) error {
			// A store that does not know the path has an earlier version, and is about to be restarted.
			if resp.StatusCode == http.StatusNotFound {
				return fmt.Errorf("the store does not know %s", storePath)
			}
			return nil
		},
		ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			var large *http.MaxBytesError
			if errors.As(err, &large) {
				http.Error(w, "a push is not so large", http.StatusRequestEntityTooLarge)
				return
			}
			r.log.Debug("the store does not answer", "err", err)
			retry(w, "the store of metrics, logs and traces does not answer")
		},
	}
}
