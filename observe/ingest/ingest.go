// Package ingest accepts what the collectors of other nodes push (packages push and wire) into the stores of logs and metrics.
//
// The sender is known: the API server has authenticated the node, and the server has put its name into a header on the store's socket. A node is
// only trusted about itself, because it may be compromised: the label "node" is set here, a container's line is stored only if the API
// server has the pod on that node, a sample only if it belongs to the node's own metrics, and times, sizes, streams, series and rates are bounded for
// each node. Rejected lines and samples are counted, with a reason.
//
// It owns how far each node's lines have been stored, and saves it once they are on disk. A repeated chunk is recognised by its number;
// lines that may already be stored, after a restart of the collector or of the store, are looked up, as in podlogs.
package ingest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/prometheus/storage"

	"polymesh.dev/polymesh/observe/checkpoint"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/wire"
)

// NodeHeader holds the name of the node that pushes. Only root can write to the socket, and the server sets the header.
const NodeHeader = "X-Polymesh-Node"

// Path is where pushes are accepted, on the socket for root.
const Path = "/api/polymesh/v1/ingest"

const (
	// bytesPerSecond is how much of one node's records is stored, with a burst of ten seconds' worth. lineCost is the cost of a line beside its
	// length, so that short ones are not cheap.
	bytesPerSecond = 2 << 20
	lineCost       = 256
	// lookupCost is the cost of a lookup of stored lines, beside the lines that it reads.
	lookupCost = 16 << 10
	// Stored lines are looked up for this long after the first chunk of a collector or of this run of the store, and for at least
	// this many chunks.
	recognised       = 2 * time.Minute
	recognisedChunks = 128
	// saveInterval is how often the state is saved.
	saveInterval = time.Second
	// maxPushes is how many pushes are read at a time, bodyTime how long one may take to arrive, and barTime for how long a node whose push took longer
	// is refused.
	maxPushes = 4
	bodyTime  = 30 * time.Second
	barTime   = time.Minute
)

// Options of an Ingest.
type Options struct {
	// Node is this machine's node, whose own logs and numbers are read here.
	Node    string
	Logs    *logstore.Store
	Samples storage.AppendableV2
	// Families are the metrics that a node may send, with the names of their labels; Job is the value of their label "job".
	Families map[string][]string
	Job      string
	// Pod returns the namespace, name and node of the pod with a UID, also of a deleted one. final is false while the pods are not known.
	Pod func(uid string) (p Pod, known, final bool)
	// Workload returns the workload of a pod, if it is known.
	Workload func(namespace, pod string) (name string, known bool)
	// State is the file that holds how far each node's lines are stored.
	State string
	// Retention is how long lines are kept: older ones are not accepted.
	Retention time.Duration
	Log       *slog.Logger
}

// Pod is a pod and where it runs.
type Pod struct{ Namespace, Name, Node string }

// Ingest accepts pushes.
type Ingest struct {
	opts  Options
	began time.Time
	hash  maphash.Seed
	// pushes bounds the pushes in memory; turn is held while one is decoded.
	pushes  chan struct{}
	turn    sync.Mutex
	decoder *wire.Decoder

	checkpoint *checkpoint.File[state]

	mu     sync.Mutex
	nodes  map[string]*node
	dirty  bool
	failed string // why the state is not saved
}

// New returns an Ingest with the state of an earlier run.
func New(o Options) (*Ingest, error) {
	decoder, err := wire.NewDecoder()
	if err != nil {
		return nil, err
	}
	in := &Ingest{opts: o, began: time.Now(), hash: maphash.MakeSeed(), pushes: make(chan struct{}, maxPushes), decoder: decoder, checkpoint: checkpoint.New[state](o.State, o.Logs)}
	if in.nodes, err = in.load(); err != nil {
		// Nodes then send again what they still have, and lines that are already stored are recognised.
		o.Log.Warn("how far other nodes' logs were stored was forgotten", "err", err)
	}
	return in, nil
}

// Run saves the state until ctx ends.
func (in *Ingest) Run(ctx context.Context) error {
	ticker := time.NewTicker(saveInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			in.save()
		}
	}
}

// refusal is an answer other than 200.
type refusal struct {
	status int
	text   string
	retry  time.Duration
}

func (r *refusal) Error() string { return r.text }

// ServeHTTP accepts one push.
func (in *Ingest) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, pause, err := in.serve(w, r)
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		pause = refused.retry
	case err != nil:
		in.opts.Log.Error("a node's push failed", "node", fmt.Sprintf("%.63q", r.Header.Get(NodeHeader)), "err", err)
		refused = &refusal{http.StatusServiceUnavailable, "the store cannot store this now: see its log", 0}
		pause = 5 * time.Second
	}
	if pause > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((pause+time.Second-1)/time.Second)))
	}
	if refused != nil {
		http.Error(w, refused.text, refused.status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

func (in *Ingest) serve(w http.ResponseWriter, r *http.Request) (wire.Answer, time.Duration, error) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return wire.Answer{}, 0, &refusal{http.StatusMethodNotAllowed, "only POST", 0}
	}
	names := r.Header.Values(NodeHeader)
	if len(names) != 1 || !validName(names[0]) {
		return wire.Answer{}, 0, &refusal{http.StatusForbidden, "only the server sends this, for a node", 0}
	}
	if names[0] == in.opts.Node {
		return wire.Answer{}, 0, &refusal{http.StatusForbidden, "the store reads the logs of its own node itself", 0}
	}
	n, err := in.begin(names[0])
	if err != nil {
		return wire.Answer{}, 0, err
	}
	defer in.end(n)
	select {
	case in.pushes <- struct{}{}:
		defer func() { <-in.pushes }()
	default:
		return wire.Answer{}, 0, &refusal{http.StatusServiceUnavailable, "several other nodes send at this moment: try again", 2 * time.Second}
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime)) // a recorder in a test has none
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxBody))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return wire.Answer{}, 0, &refusal{http.StatusRequestEntityTooLarge, fmt.Sprintf("a push has at most %d bytes", wire.MaxBody), 0}
	case errors.Is(err, os.ErrDeadlineExceeded):
		in.bar(n)
		return wire.Answer{}, 0, &refusal{http.StatusRequestTimeout, fmt.Sprintf("the push did not arrive within %s", bodyTime), barTime}
	case err != nil:
		return wire.Answer{}, 0, &refusal{http.StatusBadRequest, "the push was cut off", 0}
	}
	h, chunks, err := wire.CutHeader(body)
	if err != nil {
		return wire.Answer{}, 0, &refusal{http.StatusBadRequest, err.Error(), 0}
	}
	return in.push(r.Context(), n, h, chunks)
}

// push stores the new chunks. pause is how long the node should wait before it continues.
func (in *Ingest) push(ctx context.Context, n *node, h wire.Header, chunks []byte) (a wire.Answer, pause time.Duration, err error) {
	g := in.generation(n, h)
	defer func() { a.Position, a.Durable = in.positions(g) }()
	if position, _ := in.positions(g); h.First > position+1 && h.First > h.Oldest {
		return wire.Answer{Missing: true}, 0, nil
	}
	for len(chunks) > 0 {
		info, chunk, rest, err := wire.CutFrame(chunks)
		if err != nil {
			return a, 0, &refusal{http.StatusBadRequest, err.Error(), 0}
		}
		chunks = rest
		position, _ := in.positions(g)
		switch {
		case info.Number <= position:
			continue
		case info.Number > position+1 && info.Number != h.First:
			return a, 0, &refusal{http.StatusBadRequest, "the chunks of a push have no gaps", 0}
		}
		if wait := n.budget.wait(time.Now()); wait > 0 {
			return a, wait, nil
		}
		wait, err := in.chunk(ctx, n, g, info, chunk)
		if err != nil || wait > 0 {
			return a, wait, err
		}
	}
	return a, 0, nil
}

// chunk stores one chunk, or returns how long to wait until its pods are known.
func (in *Ingest) chunk(ctx context.Context, n *node, g *generation, info wire.Info, chunk []byte) (time.Duration, error) {
	now := time.Now()
	c := in.collect(n, now)
	raw, err := in.decode(chunk, c)
	n.budget.take(raw) // also if the chunk comes again: it is read each time
	var unknown *unknownPodError
	switch {
	case errors.As(err, &unknown):
		return unknown.wait, nil
	case errors.Is(err, wire.ErrMalformed):
		// Sending it again would not help. The records before the malformed one are stored.
		c.reject(1, err.Error())
	case err != nil:
		return 0, err
	}
	n.budget.take(int(c.count) * lineCost)
	if in.mayBeStored(g, now) {
		if err := in.leaveOut(ctx, n, c); err != nil {
			return 0, err
		}
	}
	// Samples first, as they can be stored twice: the chunk comes again if storing the lines fails.
	samples, err := in.storeSamples(ctx, c)
	if err != nil {
		return 0, err
	}
	lines, err := in.storeLines(c)
	if err != nil {
		in.torn(g)
		return 0, err
	}
	in.stored(n, g, info.Number, func(s *NodeStatus) {
		s.Lines += lines
		s.Samples += samples
		s.Rejected += c.rejected
		s.Repeated += c.repeated
		if c.reason != "" {
			s.Reason = c.reason
		}
	})
	if c.rejected > 0 {
		in.tell(n, c, now)
	}
	return 0, nil
}

// decode collects the records of a chunk. Chunks are decoded one at a time, because decoding takes the most memory. Storing them is concurrent.
func (in *Ingest) decode(chunk []byte, c *collected) (raw int, err error) {
	in.turn.Lock()
	defer in.turn.Unlock()
	return in.decoder.Records(chunk, c.add)
}

// tellPeriod is how often rejections of one node are logged.
const tellPeriod = time.Minute

func (in *Ingest) tell(n *node, c *collected, now time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n.rejected = now
	if now.Sub(n.told) >= tellPeriod {
		n.told = now
		in.opts.Log.Warn("a part of what a node sends is rejected", "node", n.name, "lines_and_samples", c.rejected, "reason", c.reason)
	}
}
