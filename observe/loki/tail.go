package loki

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"net/http"
	"strconv"
	"time"

	"github.com/coder/websocket"

	"polymesh.dev/polymesh/observe/logql"
)

const (
	// tailWait is how long lines are gathered before they are sent, maxBatch and maxBatchBytes how many go at once.
	tailWait      = 100 * time.Millisecond
	maxBatch      = 1000
	maxBatchBytes = 1 << 20
	// histories is how many tails read old lines at a time, historyTime how long one may take. Others wait.
	histories   = 2
	historyTime = 20 * time.Second
	// A client that accepts nothing for sendTime is disconnected; a silent one is pinged every pingTime.
	sendTime = 10 * time.Second
	pingTime = 30 * time.Second
	maxDelay = 5 * time.Second
)

// tailAnswer is one message of a tail.
type tailAnswer struct {
	Streams        []*streamJSON `json:"streams"`
	DroppedEntries []droppedLine `json:"dropped_entries"`
	EncodingFlags  []string      `json:"encodingFlags,omitempty"`
}

// droppedLine stands for a line that was not sent. Only the number of such lines is known.
type droppedLine struct {
	Labels    map[string]string `json:"labels"`
	Timestamp string            `json:"timestamp"`
}

// tail sends the last lines, and then new ones as they come.
func (l *Loki) tail(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	request := newRequest(r)
	log, err := logql.ParseLog(request.form.Get("query"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	start, _, err := request.span(time.Hour)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	limit, err := request.limit()
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if limits := l.histories.Limits(); limit > limits.Entries || request.now.Sub(start) > limits.Span {
		http.Error(w, fmt.Sprintf("a tail begins with at most %d lines, of at most %s", limits.Entries, limits.Span), http.StatusBadRequest)
		return
	}
	delay := time.Duration(0)
	if s := request.form.Get("delay_for"); s != "" {
		seconds, err := strconv.ParseUint(s, 10, 32)
		if delay = time.Duration(seconds) * time.Second; err != nil || delay > maxDelay {
			http.Error(w, "delay_for can't be greater than 5", http.StatusBadRequest)
			return
		}
	}
	pipeline, err := log.NewPipeline()
	if err != nil {
		l.fail(w, r, err)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	// Start the tail before the query: otherwise lines in between are lost. Lines in both are sent once.
	entries, dropped, err := l.opts.Store.Tail(ctx, log.Selector())
	if err != nil {
		http.Error(w, err.Error(), http.StatusTooManyRequests)
		return
	}
	conn, err := websocket.Accept(w, r, nil) // which refuses pages of other origins
	if err != nil {
		return // it has answered
	}
	defer conn.CloseNow() //nolint:errcheck // the end in any case
	ctx = conn.CloseRead(ctx)
	t := &tailing{conn: conn, split: categorized(r.Header)}
	seen, err := l.sendHistory(ctx, t, logql.Request{Query: request.form.Get("query"), Start: start, Limit: limit, Direction: logql.Backward})
	if err != nil {
		_ = conn.Close(websocket.StatusInternalError, "the lines before cannot be read: see the store's log")
		return
	}
	ping := time.NewTicker(pingTime)
	defer ping.Stop()
	flush := time.NewTimer(0)
	<-flush.C
	var batch []logql.Stream
	bytes := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-ping.C:
			alive, stop := context.WithTimeout(ctx, sendTime)
			err := conn.Ping(alive)
			stop()
			if err != nil {
				return
			}
		case e, ok := <-entries:
			if !ok {
				_ = conn.Close(websocket.StatusGoingAway, "the store closes")
				return
			}
			s, ok := pipeline.Run(logql.WithLevel(e))
			if !ok {
				continue
			}
			if seen.take(s, s.Entries[0]) {
				continue
			}
			if len(batch) == 0 {
				flush.Reset(max(tailWait, delay))
			}
			bytes += streamBytes(s)
			if batch = append(batch, s); len(batch) < maxBatch && bytes < maxBatchBytes {
				continue
			}
			flush.Stop()
			t.missed(dropped())
			if t.send(ctx, batch) != nil {
				return
			}
			batch, bytes = nil, 0
		case <-flush.C:
			t.missed(dropped())
			if len(batch) > 0 && t.send(ctx, batch) != nil {
				return
			}
			batch, bytes, seen.lines = nil, 0, nil
		}
	}
}

// sendHistory sends the old lines and returns them. If they are too expensive to find, the tail continues without them: a query
// says why.
func (l *Loki) sendHistory(ctx context.Context, t *tailing, q logql.Request) (*seenLines, error) {
	seen := &seenLines{maphash.MakeSeed(), map[uint64]int{}}
	if err := l.looking.Acquire(ctx, 1); err != nil {
		return seen, err
	}
	q.End = time.Now()
	before, err := l.histories.Query(ctx, q)
	l.looking.Release(1)
	switch {
	case logql.Refused(err):
		l.opts.Log.Debug("a tail begins without the lines before it", "query", q.Query, "err", err)
		return seen, nil
	case err != nil:
		if ctx.Err() == nil {
			l.opts.Log.Error("cannot read the lines before a tail", "err", err)
		}
		return seen, err
	}
	for _, s := range before.Streams {
		for _, line := range s.Entries {
			seen.add(s, line)
		}
	}
	if len(before.Streams) == 0 {
		return seen, nil
	}
	return seen, t.send(ctx, before.Streams)
}

// seenLines are hashes of the lines that a tail has sent.
type seenLines struct {
	seed  maphash.Seed
	lines map[uint64]int
}

// hash is the same for the same line of the same stream.
func (s *seenLines) hash(of logql.Stream, line logql.Line) uint64 {
	var h maphash.Hash
	h.SetSeed(s.seed)
	for _, l := range of.Labels {
		maphash.WriteComparable(&h, l)
	}
	maphash.WriteComparable(&h, line.Time.UnixNano())
	_, _ = h.WriteString(line.Text) // it cannot fail
	return h.Sum64()
}

func (s *seenLines) add(of logql.Stream, line logql.Line) { s.lines[s.hash(of, line)]++ }

// take reports whether the line was sent, once for each time that it was.
func (s *seenLines) take(of logql.Stream, line logql.Line) bool {
	if len(s.lines) == 0 {
		return false
	}
	key := s.hash(of, line)
	if s.lines[key] == 0 {
		return false
	}
	s.lines[key]--
	return true
}

// streamBytes is about how much memory the lines of a stream take.
func streamBytes(s logql.Stream) int {
	n := 0
	for _, l := range s.Labels {
		n += 64 + len(l.Name) + len(l.Value)
	}
	for _, line := range s.Entries {
		n += len(line.Text)
	}
	return n
}

// tailing is the sending side of a tail.
type tailing struct {
	conn    *websocket.Conn
	split   bool
	dropped int // lines that the client knows about
	tell    int
}

func (t *tailing) missed(all int) {
	t.tell = all - t.dropped
	t.dropped = all
}

// maxTold is how many dropped lines are listed in one message.
const maxTold = 100

func (t *tailing) send(ctx context.Context, lines []logql.Stream) error {
	message := tailAnswer{Streams: streams(logql.Merge(lines, logql.Forward), t.split, logql.Forward), DroppedEntries: []droppedLine{}}
	if t.split {
		message.EncodingFlags = []string{categorizeLabels}
	}
	for range min(t.tell, maxTold) {
		message.DroppedEntries = append(message.DroppedEntries, droppedLine{Labels: map[string]string{}, Timestamp: nanoseconds(time.Now())})
	}
	t.tell = 0
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	return t.conn.Write(ctx, websocket.MessageText, text)
}
