// Package logql answers questions about logs in LogQL, the language of Grafana Loki.
//
// It owns the language: its parser, the pipeline that each line goes through, and what stands in the brackets of rate(…) and its like. What
// stands around them, sums, comparisons, arithmetic, is PromQL in all but name: each bracket is offered to Prometheus' engine as series, so
// those parts mean what they mean everywhere. Lines come from a logstore; package loki calls this for its HTTP API.
//
// Clients choose queries, and apps choose lines, so both are bounded: how long and deep a query is, how large its
// regular expressions, what its templates make, how many lines it reads, how many series and bytes it gives.
package logql

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"

	"polymesh.dev/polymesh/observe/logstore"
)

// Source is where lines come from: *logstore.Store.
type Source interface {
	Select(ctx context.Context, sel logstore.Selector, each func(logstore.Entry) bool) error
	Count(ctx context.Context, sel logstore.Selector, group logstore.Grouping, each func(logstore.Counted) bool) error
}

// Limits on one query. A zero is the default.
type Limits struct {
	Entries     int           // lines that are given at most; 5,000
	Read        int           // lines that are read at most; 20 million
	ResultBytes int           // bytes of lines that are given at most; 16 MiB
	Series      int           // of a metric query; 1,000
	Samples     int           // values of all series together; a million
	Waiting     int           // numbers that a metric query holds at a time, which is what unwrap finds in its range; half a million
	Time        time.Duration // it may take; a minute
	Span        time.Duration // of time that it may ask for; 31 days
}

func (l Limits) withDefaults() Limits {
	set := func(n *int, value int) {
		if *n == 0 {
			*n = value
		}
	}
	set(&l.Entries, 5_000)
	set(&l.Read, 20_000_000)
	set(&l.ResultBytes, 16<<20)
	set(&l.Series, 1_000)
	set(&l.Samples, 1_000_000)
	set(&l.Waiting, 500_000)
	if l.Time == 0 {
		l.Time = time.Minute
	}
	if l.Span == 0 {
		l.Span = 31 * 24 * time.Hour
	}
	return l
}

// maxPoints is how many values one series may have, as in Prometheus and Loki.
const maxPoints = 11_000

// Engine answers queries.
type Engine struct {
	source Source
	limits Limits
	promql *promql.Engine
}

// New makes an engine that reads from the source.
func New(source Source, limits Limits, log *slog.Logger) *Engine {
	limits = limits.withDefaults()
	return &Engine{source: source, limits: limits, promql: promql.NewEngine(promql.EngineOpts{
		Logger:     log,
		MaxSamples: 2 * limits.Samples, // series as they are made, and what is calculated with them
		Timeout:    limits.Time,
		Parser:     parser.NewParser(parser.Options{}),
	})}
}

// Limits returns the engine's limits.
func (e *Engine) Limits() Limits { return e.limits }

// Direction is the order of lines.
type Direction bool

// Newest lines come first with Backward, which is what people want to see.
const (
	Backward Direction = false
	Forward  Direction = true
)

// Request is a query and the time that it is about.
type Request struct {
	Query string
	// Start and End are the span of time. For a query at one point of time, both are that.
	Start, End time.Time
	// Step is the time between two values of a series.
	Step time.Duration
	// Instant asks for one value of each series, at End.
	Instant bool
	// Limit is how many lines are wanted, at most Limits.Entries.
	Limit     int
	Direction Direction
	// Interval leaves out lines that follow another one sooner than this.
	Interval time.Duration
}

// Result is the answer: Streams of lines, or Value with the numbers.
type Result struct {
	Streams []Stream
	Value   parser.Value // promql.Vector, promql.Matrix or promql.Scalar
	Stats   Stats
	// Warnings say what is missing.
	Warnings []string
}

// Stats is what a query took.
type Stats struct {
	Lines, Bytes int64 // read
	Entries      int   // given
	Took         time.Duration
}

// Error is what the asker can change. Others are failures of the store.
type Error struct{ message string }

func (e *Error) Error() string { return e.message }

func refusal(format string, args ...any) error { return &Error{fmt.Sprintf(format, args...)} }

// Refused says whether an error of this package is about the query, not about the store.
func Refused(err error) bool {
	var parse *ParseError
	var other *Error
	return errors.As(err, &parse) || errors.As(err, &other)
}

// Query answers a query.
func (e *Engine) Query(ctx context.Context, req Request) (*Result, error) {
	expr, err := Parse(req.Query)
	if err != nil {
		return nil, err
	}
	if err := e.checkSpan(req); err != nil {
		return nil, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, e.limits.Time, refusal("the query took longer than %s", e.limits.Time))
	defer cancel()
	result := &Result{}
	meter := &meter{limit: e.limits.Read, stats: &result.Stats}
	if log, ok := expr.(*LogExpr); ok {
		if req.Instant {
			return nil, refusal("log queries are not supported as an instant query type, please change your query to a range query type")
		}
		err = e.lines(ctx, log, req, meter, result)
	} else {
		err = e.metric(ctx, expr, req, meter, result)
	}
	if err == nil || ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	result.Stats.Took = time.Since(began)
	return result, nil
}

func (e *Engine) checkSpan(req Request) error {
	switch span := req.End.Sub(req.Start); {
	case span < 0:
		return refusal("end timestamp must not be before or equal to start time")
	case span > e.limits.Span:
		return refusal("the query time range exceeds the limit (query length: %s, limit: %s)", span, e.limits.Span)
	case req.Limit < 0 || req.Limit > e.limits.Entries:
		return refusal("max entries limit per query exceeded, limit > max_entries_limit_per_query (%d > %d)", req.Limit, e.limits.Entries)
	}
	return nil
}

// meter counts what a query reads, and ends it when that is too much.
type meter struct {
	limit int
	stats *Stats
}

func (m *meter) read(line string) error {
	m.stats.Lines++
	m.stats.Bytes += int64(len(line))
	if m.stats.Lines > int64(m.limit) {
		return refusal("the query would read more than %d lines; choose fewer streams or a shorter time", m.limit)
	}
	return nil
}
