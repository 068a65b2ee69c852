package tracestore

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/privilege"
	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	defaultLimit = 20
	// firstWindow is the first time window of a search for the newest spans. Each further window is wider.
	firstWindow = 5 * time.Minute
	// widest is the widest window.
	widest = 30 * 24 * time.Hour
	// ahead is how far the clocks of clients may be ahead: the store takes no rows from later.
	ahead = 24 * time.Hour
	// around is how far from a found span the other spans of its trace are searched. Trace has no such limit.
	around = time.Hour
	// chunk is how many traces are read at a time, chunkBytes how much more than one of them may have: they stay in memory while a client reads.
	chunk      = 20
	chunkBytes = 4 << 20
)

// found is a trace with a span that matches a query.
type found struct {
	trace    string
	at       time.Time
	duration int64
}

// Trace returns all spans of a trace. The id may be shorter than 32 digits, as Zipkin's and Jaeger's are.
func (s *Store) Trace(ctx context.Context, id string) (Trace, error) {
	full, err := ParseTraceID(id)
	if err != nil {
		return Trace{}, err
	}
	traces, _, err := s.read(ctx, []string{full}, time.Time{}, time.Time{})
	if err != nil {
		return Trace{}, fmt.Errorf("reading trace %s: %w", full, err)
	}
	if len(traces[0].Spans) == 0 {
		return Trace{}, fmt.Errorf("%w: %s", ErrNotFound, full)
	}
	return traces[0], nil
}

// ParseTraceID returns an id with 32 digits in lower case.
func ParseTraceID(id string) (string, error) {
	full := strings.ToLower(id)
	if len(full) < 32 {
		full = strings.Repeat("0", 32-len(full)) + full
	}
	if !isID(full, 32) {
		return "", fmt.Errorf("%w: %.40q is not a trace's id: that has up to 32 hexadecimal digits, and is not zero", ErrQuery, id)
	}
	return full, nil
}

// Find returns the traces that match a query, in the requested order. It returns fewer if they are too large together.
func (s *Store) Find(ctx context.Context, q Query) ([]Trace, error) {
	var traces []Trace
	bytes := 0
	err := s.Walk(ctx, q, func(t Trace) bool {
		for i := range t.Spans {
			bytes += size(&t.Spans[i])
		}
		if bytes > maxAnswerBytes && len(traces) > 0 {
			return false
		}
		traces = append(traces, t)
		return true
	})
	return traces, err
}

// Walk calls each for the traces that Find would return, without a limit on all of them together. It ends when each returns false. each may take its
// time: it does not block other queries.
func (s *Store) Walk(ctx context.Context, q Query, each func(Trace) bool) error {
	all, err := s.look(ctx, q)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(all, chunk) {
		ids := make([]string, len(part))
		first, last := part[0].at, part[0].at
		for i, f := range part {
			ids[i] = f.trace
			if f.at.Before(first) {
				first = f.at
			}
			if f.at.After(last) {
				last = f.at
			}
		}
		more, err := s.walk(ctx, ids, first.Add(-around), last.Add(around), each)
		if err != nil {
			return fmt.Errorf("reading the traces that were found: %w", err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

// walk calls each for traces, and returns whether it wants more. If they are too large together, it reads one after the other.
func (s *Store) walk(ctx context.Context, ids []string, start, end time.Time, each func(Trace) bool) (bool, error) {
	traces, complete, err := s.read(ctx, ids, start, end)
	if err != nil {
		return false, err
	}
	if !complete && len(ids) > 1 {
		clear(traces)
		for i := range ids {
			if more, err := s.walk(ctx, ids[i:i+1], start, end, each); err != nil || !more {
				return false, err
			}
		}
		return true, nil
	}
	for i := range traces {
		if len(traces[i].Spans) > 0 && !each(traces[i]) {
			return false, nil
		}
		traces[i] = Trace{}
	}
	return true, nil
}

// look returns which traces match a query, in its order.
func (s *Store) look(ctx context.Context, q Query) ([]found, error) {
	if q.Limit < 0 {
		return nil, fmt.Errorf("%w: the limit is %d", ErrQuery, q.Limit)
	}
	limit := min(cmp.Or(q.Limit, defaultLimit), MaxTraces)
	filter, err := q.filter()
	if err != nil {
		return nil, err
	}
	release, err := s.load(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	start, end := s.bounds(q.Start, q.End)
	look := s.newest
	if q.Slowest {
		look = s.slowest
	}
	all, err := look(ctx, filter, start, end, limit)
	if err != nil {
		return nil, fmt.Errorf("looking for traces: %w", err)
	}
	return all, nil
}

// load waits until whole spans may be read.
func (s *Store) load(ctx context.Context) (func(), error) {
	var own chan struct{} // nil is never ready
	if privilege.Of(ctx) {
		own = s.own
	}
	select {
	case s.loads <- struct{}{}:
		return func() { <-s.loads }, nil
	case own <- struct{}{}:
		return func() { <-s.own }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for other questions about traces: %w", ctx.Err())
	}
}

// newest returns traces by their newest span that matches the filter. It searches backwards in windows that become wider: usually the
// first ones have enough.
func (s *Store) newest(ctx context.Context, filter string, start, end time.Time, limit int) ([]found, error) {
	rows := max(256, limit*16)
	query := fmt.Sprintf("%s | fields _time, %s | sort by (_time desc) limit %d", filter, columnTrace, rows)
	var all []found
	seen := map[string]struct{}{}
	for window := firstWindow; end.After(start) && len(all) < limit; {
		from := end.Add(-window)
		if from.Before(start) {
			from = start
		}
		batch, err := s.search(ctx, query, from, end)
		if err != nil {
			return nil, err
		}
		slices.SortStableFunc(batch, func(a, b found) int { return b.at.Compare(a.at) })
		for _, f := range batch {
			if _, ok := seen[f.trace]; !ok && len(all) < limit {
				seen[f.trace] = struct{}{}
				all = append(all, f)
			}
		}
		if len(batch) < rows {
			end = from
			window = min(window*4, widest)
			continue
		}
		// Continue in this window before the oldest of these spans. If more spans than the limit have the same nanosecond, some are skipped.
		if oldest := batch[len(batch)-1].at; oldest.Add(1).Before(end) {
			end = oldest.Add(1)
		} else {
			end = oldest
		}
		window = max(window/4, time.Second)
	}
	return all, nil
}

// slowest returns traces by their longest span that matches the filter.
func (s *Store) slowest(ctx context.Context, filter string, start, end time.Time, limit int) ([]found, error) {
	const rounds = 8 // of spans of the same traces
	rows := max(256, limit*8)
	var all []found
	seen := map[string]struct{}{}
	bound := ""
	for range rounds {
		query := fmt.Sprintf("%s%s | fields _time, %s, %s | sort by (%s desc) limit %d", filter, bound, columnTrace, columnDuration, columnDuration, rows)
		batch, err := s.search(ctx, query, start, end)
		if err != nil {
			return nil, err
		}
		slices.SortStableFunc(batch, func(a, b found) int { return cmp.Compare(b.duration, a.duration) })
		for _, f := range batch {
			if _, ok := seen[f.trace]; !ok && len(all) < limit {
				seen[f.trace] = struct{}{}
				all = append(all, f)
			}
		}
		if len(batch) < rows || len(all) == limit {
			break
		}
		bound = fmt.Sprintf(" %s:<%d", columnDuration, batch[len(batch)-1].duration)
	}
	return all, nil
}

func (s *Store) search(ctx context.Context, query string, start, end time.Time) ([]found, error) {
	var batch []found
	err := s.rows.Query(ctx, query, start, end, func(r rowstore.Row) bool {
		f := found{at: r.Time}
		for _, field := range r.Fields {
			switch field.Name {
			case columnTrace:
				f.trace = field.Value
			case columnDuration:
				f.duration, _ = strconv.ParseInt(field.Value, 10, 64)
			}
		}
		if f.trace != "" {
			batch = append(batch, f)
		}
		return true
	})
	return batch, err
}

// read returns the spans of traces. If they are too large together, it returns that they are incomplete, and each must be read alone.
func (s *Store) read(ctx context.Context, ids []string, start, end time.Time) (traces []Trace, complete bool, err error) {
	release, err := s.load(ctx)
	if err != nil {
		return nil, false, err
	}
	defer release()
	traces = make([]Trace, len(ids))
	index := make(map[string]int, len(ids))
	quoted := make([]string, len(ids))
	for i, id := range ids {
		traces[i].ID, index[id], quoted[i] = id, i, rowstore.Literal(id)
	}
	most := maxAnswerBytes
	if len(ids) > 1 {
		most = chunkBytes
	}
	count, bytes, full := 0, 0, false
	query := fmt.Sprintf("%s %s:in(%s)", spans, columnTrace, strings.Join(quoted, ","))
	err = s.rows.Query(ctx, query, start, end, func(r rowstore.Row) bool {
		one := spanOf(r)
		i, ok := index[one.TraceID]
		if !ok {
			return true
		}
		count++
		bytes += size(&one)
		if count > MaxTraceSpans || bytes > most {
			full = true
			return false
		}
		traces[i].Spans = append(traces[i].Spans, one)
		return true
	})
	if err != nil {
		return nil, false, err
	}
	for i := range traces {
		if full {
			traces[i].Incomplete = fmt.Sprintf("the trace has more spans than these %d, which are as many as are read at a time", len(traces[i].Spans))
		}
		arrange(&traces[i])
	}
	return traces, !full, nil
}

// Services returns the names of all services with a span in a time, sorted.
func (s *Store) Services(ctx context.Context, start, end time.Time) ([]string, error) {
	query := fmt.Sprintf("%s | uniq by (%s) limit %d", spans, columnService, maxNames)
	var names []string
	start, end = s.bounds(start, end)
	err := s.rows.Query(ctx, query, start, end, func(r rowstore.Row) bool {
		for _, f := range append(r.Stream, r.Fields...) {
			if f.Name == columnService {
				names = append(names, f.Value)
			}
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("listing services: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

// Operations returns the names of a service's spans in a time, sorted: of one kind, or of all of them if that is nil.
func (s *Store) Operations(ctx context.Context, service string, kind *Kind, start, end time.Time) ([]Operation, error) {
	if len(service) > maxTermBytes {
		return nil, fmt.Errorf("%w: the service's name has %d bytes", ErrQuery, len(service))
	}
	query := spans + " " + has(columnService, service)
	if kind != nil {
		query += fmt.Sprintf(" %s:=%s", columnKind, rowstore.Literal(kind.String()))
	}
	query += fmt.Sprintf(" | uniq by (%s, %s) limit %d", columnName, columnKind, maxNames)
	var all []Operation
	start, end = s.bounds(start, end)
	err := s.rows.Query(ctx, query, start, end, func(r rowstore.Row) bool {
		var o Operation
		for _, f := range r.Fields {
			switch f.Name {
			case columnName:
				o.Name = f.Value
			case columnKind:
				o.Kind, _ = ParseKind(f.Value)
			}
		}
		all = append(all, o)
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("listing the operations of a service: %w", err)
	}
	slices.SortFunc(all, func(a, b Operation) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind)) })
	return all, nil
}

// Dependencies returns the calls between services in a time range, rounded to minutes.
func (s *Store) Dependencies(ctx context.Context, start, end time.Time) ([]Dependency, error) {
	query := fmt.Sprintf("{%s=%s} | stats by (%s, %s) sum(%s) %s, sum(%s) %s | limit %d", streamRows, rowstore.Literal(streamCalls),
		columnCaller, columnCallee, columnCalls, columnCalls, columnErrors, columnErrors, maxNames)
	s.storing.RLock() // so that nothing is counted twice
	defer s.storing.RUnlock()
	counts := s.calls.pending(start, end)
	err := s.rows.Query(ctx, query, start, end, func(r rowstore.Row) bool {
		var p pair
		var n count
		for _, f := range r.Fields {
			switch f.Name {
			case columnCaller:
				p.parent = f.Value
			case columnCallee:
				p.child = f.Value
			case columnCalls:
				n.calls, _ = strconv.ParseUint(f.Value, 10, 64)
			case columnErrors:
				n.errors, _ = strconv.ParseUint(f.Value, 10, 64)
			}
		}
		n.calls += counts[p].calls
		n.errors += counts[p].errors
		counts[p] = n
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("reading the calls between services: %w", err)
	}
	all := make([]Dependency, 0, len(counts))
	for p, n := range counts {
		all = append(all, Dependency{p.parent, p.child, n.calls, n.errors})
	}
	slices.SortFunc(all, func(a, b Dependency) int {
		return cmp.Or(cmp.Compare(a.Parent, b.Parent), cmp.Compare(a.Child, b.Child))
	})
	return all, nil
}
