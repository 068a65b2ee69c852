package loki

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/coder/websocket"

	"polymesh.dev/polymesh/observe/logql"
)

const (
	// tailWait is how long lines are gathered before they are sent, maxBatch how many go at once.
	tailWait = 100 * time.Millisecond
	maxBatch = 1000
	// A client that takes nothing for sendTime is gone; one that is silent is asked every pingTime.
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

// droppedLine stands for a line that was not sent. Which one it was is not known: only how many they are.
type droppedLine struct {
	Labels    map[string]string `json:"labels"`
	Timestamp string            `json:"timestamp"`
}

// tail sends lines as they come, after the last ones that are there.
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
	// First the tail, then what is there: else lines in between are lost. Those that both have are sent once.
	entries, dropped, err := l.opts.Store.Tail(ctx, log.Selector())
	if err != nil {
		http.Error(w, err.Error(), http.StatusTooManyRequests)
		return
	}
	now := time.Now()
	before, err := l.engine.Query(ctx, logql.Request{Query: request.form.Get("query"), Start: start, End: now, Limit: limit, Direction: logql.Backward})
	if err != nil {
		l.fail(w, r, err)
		return
	}
	conn, err := websocket.Accept(w, r, nil) // which refuses pages of other origins
	if err != nil {
		return // it has answered
	}
	defer conn.CloseNow() //nolint:errcheck // the end in any case
	ctx = conn.CloseRead(ctx)
	t := &tailing{conn: conn, split: categorized(r.Header)}
	seen := map[string]int{}
	for _, s := range before.Streams {
		for _, line := range s.Entries {
			seen[lineKey(s, line)]++
		}
	}
	if len(before.Streams) > 0 {
		if t.send(ctx, before.Streams) != nil {
			return
		}
	}
	ping := time.NewTicker(pingTime)
	defer ping.Stop()
	flush := time.NewTimer(0)
	<-flush.C
	var batch []logql.Stream
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
			if key := lineKey(s, s.Entries[0]); seen[key] > 0 {
				seen[key]--
				continue
			}
			if len(batch) == 0 {
				flush.Reset(max(tailWait, delay))
			}
			if batch = append(batch, s); len(batch) < maxBatch {
				continue
			}
			flush.Stop()
			t.missed(dropped())
			if t.send(ctx, batch) != nil {
				return
			}
			batch = nil
		case <-flush.C:
			t.missed(dropped())
			if len(batch) > 0 && t.send(ctx, batch) != nil {
				return
			}
			batch, seen = nil, nil
		}
	}
}

// lineKey is the same for the same line of the same stream.
func lineKey(s logql.Stream, line logql.Line) string {
	key, _ := json.Marshal([]any{s.Labels, line.Time.UnixNano(), line.Text}) // texts and numbers have JSON
	return string(key)
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

// maxTold is how many lost lines are listed in one message.
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
