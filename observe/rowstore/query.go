package rowstore

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/VictoriaLogs/lib/logstorage"
)

// MaxQueryBytes bounds the text of a query.
const MaxQueryBytes = 64 << 10

// readers is how many goroutines read blocks for one query. Each one holds some megabytes of unpacked rows.
func readers() int { return min(2, runtime.GOMAXPROCS(0)) }

// Query calls each for every row from start (inclusive) to end (exclusive) that the LogsQL query gives, in any order; a zero time is no limit.
// Rows appended before the call are seen, but for those that Flush would wait for. The calls come one after the other, and what they are given may be kept.
// It ends early, without an error, when each returns false. each must not call Query of the same store: few run at a time.
//
// Values from elsewhere go into the query through Literal, names through FieldName.
func (s *Store) Query(ctx context.Context, logsql string, start, end time.Time, each func(Row) bool) error {
	return s.QueryWhere(ctx, logsql, start, end, nil, each)
}

// QueryWhere is Query for a caller who can reject rows by their time, before they are copied. want may be nil.
func (s *Store) QueryWhere(ctx context.Context, logsql string, start, end time.Time, want func(time.Time) bool, each func(Row) bool) error {
	if len(logsql) > MaxQueryBytes {
		return fmt.Errorf("the query has %d bytes, more than %d", len(logsql), MaxQueryBytes)
	}
	q, err := logstorage.ParseQuery(logsql)
	if err != nil {
		return fmt.Errorf("reading the query: %w", err)
	}
	if !start.IsZero() || !end.IsZero() {
		from, to := int64(math.MinInt64), int64(math.MaxInt64)
		if !start.IsZero() {
			from = start.UnixNano()
		}
		if !end.IsZero() {
			to = end.UnixNano() - 1
		}
		if from > to {
			return nil
		}
		q.AddTimeFilter(from, to)
	}

	select {
	case s.queries <- struct{}{}:
		defer func() { <-s.queries }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for other queries to end: %w", ctx.Err())
	case <-s.closed.Done():
		return ErrClosed
	}
	s.dbMu.RLock()
	defer s.dbMu.RUnlock()
	if s.db == nil {
		return ErrClosed
	}
	s.mu.Lock()
	s.show()
	s.mu.Unlock()
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.closed, cancel)()

	var (
		mu      sync.Mutex
		stopped bool
		failed  error
	)
	stats := &logstorage.QueryStats{}
	qctx := logstorage.NewQueryContext(running, stats, []logstorage.TenantID{{}}, q, false, nil)
	err = s.db.RunQuery(qctx, func(_ uint, block *logstorage.DataBlock) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		more, err := eachRow(block, want, func(row Row) bool { return running.Err() == nil && each(row) })
		if err != nil {
			failed = err
		}
		if !more || err != nil {
			stopped = true
			cancel()
		}
	})
	mu.Lock()
	defer mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("running the query: %w", ctx.Err())
	case s.closed.Err() != nil:
		return ErrClosed
	case failed != nil:
		return failed
	case err != nil && !stopped:
		return fmt.Errorf("running the query: %w", err)
	}
	return nil
}

// eachRow calls each for the rows of a block. A row's strings are copied together, so that keeping one row keeps no block.
func eachRow(block *logstorage.DataBlock, want func(time.Time) bool, each func(Row) bool) (bool, error) {
	columns := block.GetColumns(false)
	names := make([]string, len(columns))
	timeColumn, streamColumn := -1, -1
	for i, c := range columns {
		switch names[i] = strings.Clone(c.Name); names[i] {
		case "_time":
			timeColumn = i
		case "_stream":
			streamColumn = i
		}
	}
	var (
		text       string
		stream     []Field
		inStream   = make([]bool, len(columns))
		unpacked   bool
		values     []byte
		valuesEnds []int
	)
	var times []int64
	if timeColumn >= 0 {
		var ok bool
		if times, ok = block.GetTimestamps(nil); !ok {
			return false, errors.New("reading the times of a block: one is not a time")
		}
	}
	for r := range block.RowsCount() {
		var row Row
		if times != nil {
			row.Time = time.Unix(0, times[r]).UTC()
			if want != nil && !want(row.Time) {
				continue
			}
		}
		// Rows of one stream lie together, so the stream is nearly always that of the row before.
		if streamColumn >= 0 && (!unpacked || columns[streamColumn].Values[r] != text) {
			text, unpacked = strings.Clone(columns[streamColumn].Values[r]), true
			var err error
			if stream, err = parseStream(text); err != nil {
				return false, err
			}
			for i, name := range names {
				inStream[i] = false
				for _, f := range stream {
					inStream[i] = inStream[i] || f.Name == name
				}
			}
		}
		row.Stream = stream[:len(stream):len(stream)]

		values, valuesEnds = values[:0], valuesEnds[:0]
		count := 0
		for i, c := range columns {
			if v := c.Values[r]; v != "" && i != timeColumn && i != streamColumn && names[i] != "_stream_id" && !inStream[i] {
				values = append(values, v...)
				count++
			}
			valuesEnds = append(valuesEnds, len(values))
		}
		all, from := string(values), 0
		row.Fields = make([]Field, 0, count)
		for i, to := range valuesEnds {
			if to > from {
				row.Fields = append(row.Fields, Field{Name: names[i], Value: all[from:to]})
			}
			from = to
		}
		if !each(row) {
			return false, nil
		}
	}
	return true, nil
}

// parseStream reads a stream as the library writes it: {name="value",…}, sorted, the values quoted as Go does. checkField keeps names out that
// would make this ambiguous.
func parseStream(s string) ([]Field, error) {
	inner, ok := strings.CutPrefix(s, "{")
	if ok {
		inner, ok = strings.CutSuffix(inner, "}")
	}
	if !ok {
		if s == "" { // a stream whose name is not in the index yet
			return nil, nil
		}
		return nil, fmt.Errorf("reading a row's stream: it is not a list in braces: %.100q", s)
	}
	var fields []Field
	for inner != "" {
		name, rest, ok := strings.Cut(inner, "=")
		if !ok {
			return nil, fmt.Errorf("reading a row's stream: a name has no value: %.100q", s)
		}
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return nil, fmt.Errorf("reading a row's stream: a value is not quoted: %.100q", s)
		}
		value, err := strconv.Unquote(quoted)
		if err != nil {
			return nil, fmt.Errorf("reading a row's stream: %w", err)
		}
		fields = append(fields, Field{Name: name, Value: value})
		inner = strings.TrimPrefix(rest[len(quoted):], ",")
	}
	return fields, nil
}
