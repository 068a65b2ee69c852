package page

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/tracestore"
)

const (
	// maxIDs is how many ids of one request are followed: a request has one x-request-id, and apps may start further traces.
	maxIDs = 8
	// requestLines is how many lines of a request are shown.
	requestLines = 2_000
	// around is how far from the spans the lines of their request are: a proxy writes its line when the response is complete, and its log in blocks.
	around = 2 * time.Minute
)

// requestID is what an id may look like. It becomes part of links and of queries.
var requestID = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._:+/=-]{3,127}$`)

// requestAnswer is all that is known about one request.
type requestAnswer struct {
	ID       string   `json:"id"`
	Requests []string `json:"requests"` // x-request-ids
	Traces   []string `json:"traces"`
	// Bars are the spans or, without tracing, what the proxies logged. FromLogs says which.
	Bars       []spanView    `json:"bars"`
	FromLogs   bool          `json:"fromLogs"`
	Lines      []requestLine `json:"lines"`
	More       bool          `json:"more"` // lines for which there was no room
	Incomplete string        `json:"incomplete,omitempty"`
}

// requestLine is a line of the log about the request.
type requestLine struct {
	Time      int64       `json:"time"` // Unix microseconds
	Namespace string      `json:"namespace"`
	Workload  string      `json:"workload"`
	Pod       string      `json:"pod"`
	Container string      `json:"container"`
	Stream    string      `json:"stream,omitempty"`
	Line      string      `json:"line"`
	Access    *accessLine `json:"access,omitempty"`
	// Bar is the id of the bar during which it was written, empty if none is.
	Bar string `json:"bar,omitempty"`
}

// request answers with everything about one request, by its x-request-id or its trace id. Parameters: end, window (a day if absent).
func (s *server) request(r *http.Request) (any, error) {
	id := r.PathValue("id")
	if !requestID.MatchString(id) {
		return nil, invalid("%q is neither an x-request-id nor a trace id", excerpt.Marked(id, 40))
	}
	q := r.URL.Query()
	if q.Get("window") == "" {
		q.Set("window", "1d")
		r.URL.RawQuery = q.Encode()
	}
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	a := &requestAnswer{ID: id, Requests: []string{}, Traces: []string{}, Bars: []spanView{}, Lines: []requestLine{}}
	ctx := r.Context()
	if err := s.addTraces(ctx, a, p, id); err != nil {
		return nil, err
	}
	if len(a.Bars) > 0 {
		first, last := a.Bars[0].Start, int64(0)
		for _, b := range a.Bars {
			first, last = min(first, b.Start), max(last, b.Start+b.Duration)
		}
		p = period{time.UnixMicro(first).Add(-around), time.UnixMicro(last).Add(around)}
	}
	if err := s.addLines(ctx, a, p); err != nil {
		return nil, err
	}
	if len(a.Bars) == 0 {
		// Apps may log the id of a trace next to that of the request.
		for _, trace := range idsIn(a.Lines, "trace_id", "traceId", "traceid", "trace.id") {
			if err := s.addTrace(ctx, a, trace); err != nil {
				return nil, err
			}
		}
	}
	if len(a.Bars) == 0 {
		a.Bars, a.FromLogs = barsOf(a.Lines), true
	} else {
		place(a.Lines, a.Bars)
	}
	if len(a.Bars) == 0 && len(a.Lines) == 0 {
		return nil, missing("nothing was recorded about %s between %s and %s", id, p.start.UTC().Format(time.RFC3339), p.end.UTC().Format(time.RFC3339))
	}
	return a, nil
}

// addTraces adds the traces of an id, and the ids that their spans have.
func (s *server) addTraces(ctx context.Context, a *requestAnswer, p period, id string) error {
	if _, err := tracestore.ParseTraceID(id); err == nil && len(id) >= 16 {
		if err := s.addTrace(ctx, a, id); err != nil {
			return err
		}
		if len(a.Bars) == 0 {
			a.Traces = append(a.Traces, id) // it may still be in a log
		}
		return nil
	}
	a.Requests = append(a.Requests, id)
	found, err := s.Traces.Find(ctx, tracestore.Query{RequestID: id, Start: p.start, End: p.end, Limit: maxIDs})
	if err != nil {
		return err
	}
	for i := range found {
		a.addSpans(&found[i])
	}
	return nil
}

func (s *server) addTrace(ctx context.Context, a *requestAnswer, id string) error {
	t, err := s.Traces.Trace(ctx, id)
	if errors.Is(err, tracestore.ErrNotFound) || errors.Is(err, tracestore.ErrQuery) {
		return nil
	}
	if err != nil {
		return err
	}
	a.addSpans(&t)
	return nil
}

func (a *requestAnswer) addSpans(t *tracestore.Trace) {
	if len(a.Traces) >= maxIDs || slices.Contains(a.Traces, t.ID) {
		return
	}
	a.Traces = append(a.Traces, t.ID)
	a.Incomplete = cmp.Or(a.Incomplete, t.Incomplete)
	for i := range t.Spans {
		a.Bars = append(a.Bars, viewSpan(&t.Spans[i]))
		id := attribute(t.Spans[i].Attributes, tracestore.RequestIDKeys...)
		if requestID.MatchString(id) && len(a.Requests) < maxIDs && !slices.Contains(a.Requests, id) {
			a.Requests = append(a.Requests, id)
		}
	}
}

// addLines adds every line that has one of the ids.
func (s *server) addLines(ctx context.Context, a *requestAnswer, p period) error {
	ids := slices.Concat(a.Requests, a.Traces)
	filter := logstore.Filter{Text: anyOf(ids), Regexp: true}
	if len(ids) == 1 {
		filter = logstore.Filter{Text: ids[0]} // found by the index
	}
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: []logstore.Matcher{{Name: "job", Type: logstore.Regexp, Value: "pods|otlp"}},
		Filters:  []logstore.Filter{filter}, Start: p.start, End: p.end, Limit: requestLines + 1,
	}, func(e logstore.Entry) bool {
		if len(a.Lines) == requestLines {
			a.More = true
			return false
		}
		l := requestLine{
			Time: e.Time.UnixMicro(), Namespace: label(e, "namespace"), Workload: label(e, "workload"), Pod: label(e, "pod"),
			Container: label(e, "container"), Stream: label(e, "stream"), Line: e.Line,
		}
		if access, ok := parseAccessLine(e.Line); ok {
			l.Access = &access
		}
		a.Lines = append(a.Lines, l)
		return true
	})
	return err
}

// idsIn returns the values of fields in lines that are JSON.
func idsIn(lines []requestLine, names ...string) []string {
	var ids []string
	for _, l := range lines {
		if id := fieldIn(l.Line, names...); id != "" && requestID.MatchString(id) && !slices.Contains(ids, id) && len(ids) < maxIDs {
			ids = append(ids, id)
		}
	}
	return ids
}

// fieldIn returns a field of a line that is a JSON object.
func fieldIn(line string, names ...string) string {
	if !strings.HasPrefix(line, "{") {
		return ""
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal([]byte(line), &fields) != nil {
		return ""
	}
	for _, name := range names {
		var value string
		if raw, ok := fields[name]; ok && json.Unmarshal(raw, &value) == nil && value != "" {
			return value
		}
	}
	return ""
}

// barsOf returns a waterfall of what the proxies logged: each line has when its request began and how long it took. Lines get the id of their bar.
//
// A call appears in two logs. The called proxy's line is a child of the caller's if both name the same connection; a call that a pod makes is a child
// of the request that the same pod was serving at that time.
func barsOf(lines []requestLine) []spanView {
	type hop struct {
		*accessLine
		line       int
		start, end time.Time
	}
	var hops []hop
	for i := range lines {
		if access := lines[i].Access; access != nil {
			hops = append(hops, hop{access, i, access.Start, access.Start.Add(time.Duration(access.Duration * float64(time.Millisecond)))})
		}
	}
	slices.SortStableFunc(hops, func(a, b hop) int { return cmp.Or(a.start.Compare(b.start), b.end.Compare(a.end)) })
	const slack = 2 * time.Millisecond // the log has whole milliseconds
	covers := func(outer, inner hop) bool {
		return !inner.start.Before(outer.start.Add(-slack)) && !inner.start.After(outer.end.Add(slack))
	}
	bars := make([]spanView, 0, len(hops))
	for i, h := range hops {
		l := &lines[h.line]
		l.Bar = "line-" + strconv.Itoa(h.line)
		parent := -1
		for j, o := range hops {
			if i == j || !covers(o, h) {
				continue
			}
			from := &lines[o.line]
			switch h.Direction {
			case "inbound":
				// The address of the pod, and if both know it the caller's end of the connection.
				if o.Direction == "outbound" && o.UpstreamHost != "" && o.UpstreamHost == h.Local && (o.UpstreamLocal == "" || h.Remote == "" || o.UpstreamLocal == h.Remote || parent < 0) {
					if parent < 0 || o.UpstreamLocal == h.Remote {
						parent = j
					}
				}
			default:
				if o.Direction == "inbound" && from.Pod == l.Pod && from.Namespace == l.Namespace && (parent < 0 || o.start.After(hops[parent].start)) {
					parent = j
				}
			}
		}
		name := strings.TrimSpace(h.Method + " " + h.Path)
		if name == "" {
			name = cmp.Or(h.Service, h.UpstreamCluster, "connection")
		}
		kind := map[string]string{"inbound": "server", "outbound": "client"}[h.Direction]
		bar := spanView{
			ID: l.Bar, Service: l.Workload, Namespace: l.Namespace, Pod: l.Pod, Name: name, Kind: kind, Proxy: true,
			Start: h.start.UnixMicro(), Duration: h.end.Sub(h.start).Microseconds(), Error: h.failed(), Message: h.Meaning,
		}
		if parent >= 0 {
			bar.Parent = "line-" + strconv.Itoa(hops[parent].line)
		}
		bars = append(bars, bar)
	}
	// The apps' lines belong to what their pod was serving.
	place(lines, bars)
	return bars
}

// place finds the bar of each line that has none: the one with the line's span id or, in the same pod, the shortest one during which the line was
// written. A proxy's line is that of the bar which began at the same time.
func place(lines []requestLine, bars []spanView) {
	const slack = 5_000 // microseconds
	byID := map[string]bool{}
	for _, b := range bars {
		byID[b.ID] = true
	}
	for i := range lines {
		l := &lines[i]
		if l.Bar != "" {
			continue
		}
		if id := fieldIn(l.Line, "span_id", "spanId", "spanid", "span.id"); byID[id] {
			l.Bar = id
			continue
		}
		best := int64(-1)
		for _, b := range bars {
			same := b.Pod != "" && b.Pod == l.Pod || b.Service == l.Workload || b.Service == l.Workload+"."+l.Namespace
			if !same {
				continue
			}
			var distance int64
			if l.Access != nil {
				if wanted := map[string]string{"inbound": "server", "outbound": "client"}[l.Access.Direction]; wanted != b.Kind || !b.Proxy {
					continue
				}
				if distance = b.Start - l.Access.Start.UnixMicro(); distance < 0 {
					distance = -distance
				}
				if distance > 1_000_000 {
					continue
				}
			} else {
				if l.Time < b.Start-slack || l.Time > b.Start+b.Duration+slack {
					continue
				}
				distance = b.Duration
			}
			if best < 0 || distance < best {
				best, l.Bar = distance, b.ID
			}
		}
	}
}

// line answers with the lines of a container before and after a time, each with the fields of the access log if it is of one. Parameters: labels (a
// JSON object: the stream), at (Unix nanoseconds), n.
func (s *server) line(r *http.Request) (any, error) {
	text := r.URL.Query().Get("labels")
	var labels map[string]string
	if len(text) > 8<<10 || json.Unmarshal([]byte(text), &labels) != nil || len(labels) == 0 || len(labels) > logstore.MaxLabels {
		return nil, invalid("labels must be a JSON object with the labels of a stream")
	}
	at, err := strconv.ParseInt(r.URL.Query().Get("at"), 10, 64)
	if err != nil || at <= 0 {
		return nil, invalid("at is not a time in Unix nanoseconds")
	}
	n, err := numberOf(r, "n", 10, 1, 200)
	if err != nil {
		return nil, err
	}
	var matchers []logstore.Matcher
	for name, value := range labels {
		// Both streams of a container tell what happened.
		if name == "stream" || !logstore.ValidName(name) {
			continue
		}
		matchers = append(matchers, equal(name, value))
	}
	if len(matchers) == 0 {
		return nil, invalid("labels has no label of a stream")
	}
	type entry struct {
		Time   string      `json:"time"` // Unix nanoseconds
		Line   string      `json:"line"`
		Stream string      `json:"stream,omitempty"`
		Access *accessLine `json:"access,omitempty"`
	}
	read := func(from, to time.Time, newest bool) ([]entry, error) {
		list := []entry{}
		err := s.Logs.Select(r.Context(), logstore.Selector{Matchers: matchers, Start: from, End: to, Limit: n, Newest: newest}, func(e logstore.Entry) bool {
			x := entry{Time: strconv.FormatInt(e.Time.UnixNano(), 10), Line: e.Line, Stream: label(e, "stream")}
			if access, ok := parseAccessLine(e.Line); ok {
				x.Access = &access
			}
			list = append(list, x)
			return true
		})
		return list, err
	}
	moment := time.Unix(0, at)
	before, err := read(moment.Add(-24*time.Hour), moment, true)
	if err != nil {
		return nil, err
	}
	after, err := read(moment, moment.Add(24*time.Hour), false)
	if err != nil {
		return nil, err
	}
	slices.Reverse(before)
	return map[string][]entry{"before": before, "after": after}, nil
}
