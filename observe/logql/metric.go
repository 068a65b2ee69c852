package logql

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/util/annotations"

	"polymesh.dev/polymesh/observe/rulefiles"
)

// metric answers a query for numbers.
func (e *Engine) metric(ctx context.Context, expr Expr, req Request, meter *meter, result *Result) error {
	grid, err := newGrid(req)
	if err != nil {
		return err
	}
	t := &translation{grid: grid}
	text := t.write(expr)
	growth, err := check(text, grid)
	if err != nil {
		return refusal("%s", err)
	}
	source := growth.Bound(&ranges{engine: e, translation: t, meter: meter})
	// Values stand exactly where the engine looks, and a value of another step is not one of this.
	options := promql.NewPrometheusQueryOpts(false, time.Millisecond, nil)
	var query promql.Query
	if req.Instant {
		query, err = e.promql.NewInstantQuery(ctx, source, options, text, grid.at(0))
	} else {
		query, err = e.promql.NewRangeQuery(ctx, source, options, text, grid.at(0), grid.at(grid.count-1), time.Duration(grid.step)*time.Millisecond)
	}
	if err != nil {
		return refusal("parse error : %s", err)
	}
	defer query.Close()
	answer := query.Exec(ctx)
	if answer.Err != nil {
		return e.reason(answer.Err)
	}
	result.Value = clone(answer.Value)
	return nil
}

// check refuses what PromQL would refuse, above all label_replace that repeats labels.
func check(text string, g grid) (rulefiles.Growth, error) {
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		return rulefiles.Growth{}, fmt.Errorf("parse error : %w", err)
	}
	step := time.Duration(g.step) * time.Millisecond
	return rulefiles.Check(expr, time.Duration(g.count-1)*step, step)
}

// reason takes this package's own errors out of the engine's, and tells the engine's refusals from failures.
func (e *Engine) reason(err error) error {
	var ours *Error
	var stored promql.ErrStorage
	var tooMany promql.ErrTooManySamples
	var tooLate promql.ErrQueryTimeout
	switch {
	case errors.As(err, &stored):
		return stored.Err
	case errors.As(err, &ours):
		return ours
	case errors.As(err, &tooMany):
		return refusal("the query needs more than %d values at a time; ask for fewer series, a shorter time or a longer step", 2*e.limits.Samples)
	case errors.As(err, &tooLate):
		return refusal("the query took longer than %s", e.limits.Time)
	}
	return refusal("%s", err)
}

// clone copies a result, whose memory the engine uses again after Close.
func clone(v parser.Value) parser.Value {
	switch v := v.(type) {
	case promql.Matrix:
		out := make(promql.Matrix, len(v))
		for i, s := range v {
			out[i] = promql.Series{Metric: s.Metric, Floats: slices.Clone(s.Floats)}
		}
		return out
	case promql.Vector:
		return slices.Clone(v)
	}
	return v
}

// grid is the points of time at which a query is evaluated, in milliseconds as the engine counts.
type grid struct {
	start, step int64
	count       int
}

func newGrid(req Request) (grid, error) {
	if req.Instant {
		return grid{start: req.End.UnixMilli(), step: 1, count: 1}, nil
	}
	step := req.Step.Milliseconds()
	if step <= 0 {
		return grid{}, refusal("zero or negative query resolution step widths are not accepted. Try a positive integer")
	}
	start := req.Start.UnixMilli()
	count := (req.End.UnixMilli()-start)/step + 1
	if count > maxPoints {
		return grid{}, refusal("exceeded maximum resolution of 11,000 points per time series. Try increasing the value of the step parameter")
	}
	return grid{start: start, step: step, count: int(count)}, nil
}

func (g grid) at(i int) time.Time { return time.UnixMilli(g.start + int64(i)*g.step) }

// translation makes PromQL of the parts of a query that are around the brackets, and remembers the brackets.
type translation struct {
	grid   grid
	leaves []leaf
}

// leaf is a range aggregation that PromQL sees as a metric.
type leaf struct {
	*rangeExpr
	// by narrows its series to what the sum around it keeps, which is the difference between a few series and one for each line.
	by *grouping
}

// leafName is the name of a leaf's metric. Its series do not have it: a result of LogQL has no name.
func leafName(i int) string { return "logql:" + strconv.Itoa(i) }

func (t *translation) write(e Expr) string {
	switch e := e.(type) {
	case numberExpr:
		return promqlNumber(float64(e))
	case constVector:
		return "vector(" + promqlNumber(float64(e)) + ")"
	case *replaceExpr:
		return "label_replace(" + t.write(e.inner) + ", " + strconv.Quote(e.target) + ", " + strconv.Quote(e.replacement) + ", " +
			strconv.Quote(e.source) + ", " + strconv.Quote(e.re) + ")"
	case *binaryExpr:
		return "(" + t.write(e.left) + " " + e.operator(joinQuoted) + " " + t.write(e.right) + ")"
	case *vectorExpr:
		return t.vector(e)
	case *rangeExpr:
		return t.leaf(leaf{rangeExpr: e})
	}
	panic(fmt.Sprintf("logql: no PromQL for %T", e)) // the parser makes no others here
}

func (t *translation) vector(e *vectorExpr) string {
	op := e.op
	if op == "approx_topk" { // an exact answer is a good approximation
		op = "topk"
	}
	var inner string
	if r, ok := e.inner.(*rangeExpr); ok && associative(e.op, r.op) && r.grouping == nil {
		inner = t.leaf(leaf{rangeExpr: r, by: cmpGrouping(e.grouping)})
	} else {
		inner = t.write(e.inner)
	}
	if e.param != nil {
		inner = promqlNumber(math.Trunc(*e.param)) + ", " + inner
	}
	if e.grouping == nil {
		return op + "(" + inner + ")"
	}
	by := "by"
	if e.grouping.without {
		by = "without"
	}
	return op + " " + by + " (" + joinQuoted(e.grouping.names, ", ") + ") (" + inner + ")"
}

// cmpGrouping is the grouping of an aggregation, which is by () when nothing is said.
func cmpGrouping(g *grouping) *grouping {
	if g == nil {
		return &grouping{}
	}
	return g
}

// associative says whether the aggregation may be done on lines instead of on series.
func associative(outer, inner string) bool {
	switch outer {
	case "sum":
		switch inner {
		case "rate", "count_over_time", "bytes_rate", "bytes_over_time", "sum_over_time":
			return true
		}
	case "max":
		return inner == "max_over_time"
	case "min":
		return inner == "min_over_time"
	}
	return false
}

func (t *translation) leaf(l leaf) string {
	t.leaves = append(t.leaves, l)
	text := "{__name__=" + strconv.Quote(leafName(len(t.leaves)-1)) + "}"
	if l.op != counterOp {
		return text
	}
	// The numbers themselves are the series, and Prometheus knows how a counter is read.
	text = "rate(" + text + "[" + promqlDuration(l.window) + "]"
	switch {
	case l.offset > 0:
		text += " offset " + promqlDuration(l.offset)
	case l.offset < 0:
		text += " offset -" + promqlDuration(-l.offset)
	}
	return text + ")"
}

// counterOp is the one that is left to Prometheus.
const counterOp = "rate_counter"

func promqlDuration(d time.Duration) string {
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10) + "ms"
}

func promqlNumber(n float64) string {
	if n < 0 {
		return "(" + formatNumber(n) + ")"
	}
	return formatNumber(n)
}

func joinQuoted(names []string, separator string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = strconv.Quote(n)
	}
	return strings.Join(quoted, separator)
}

// ranges is the storage that the engine reads: the leaves of one query.
type ranges struct {
	engine      *Engine
	translation *translation
	meter       *meter
}

var _ storage.Queryable = (*ranges)(nil)

// Querier implements storage.Queryable.
func (r *ranges) Querier(int64, int64) (storage.Querier, error) { return r, nil }

// Close implements storage.Querier.
func (*ranges) Close() error { return nil }

// LabelValues and LabelNames implement storage.Querier; the engine asks for neither.
func (*ranges) LabelValues(context.Context, string, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, nil
}

func (*ranges) LabelNames(context.Context, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, nil
}

// Select evaluates a leaf.
func (r *ranges) Select(ctx context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	for i, l := range r.translation.leaves {
		if matchers[0].Value != leafName(i) {
			continue
		}
		series, err := r.engine.evaluate(ctx, l, r.translation.grid, r.meter)
		if err != nil {
			return storage.ErrSeriesSet(err)
		}
		return &seriesSet{series: series, at: -1}
	}
	return storage.EmptySeriesSet()
}
