package logql

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"polymesh.dev/polymesh/observe/logstore"
)

// evaluation is one range aggregation at work. Lines come in the order of time. Each belongs to the points of time whose range it is in: the
// first one at or after it, and those that follow within the range. So a line waits in its series until the last of these is done, and a point
// is done when a line comes that is later.
type evaluation struct {
	leaf
	grid    grid
	limits  Limits
	offset  int64 // nanoseconds
	series  map[string]*window
	active  []*window // that have something waiting
	done    int       // points of the grid that are done
	waiting int
	points  int
	scratch []Label
	key     []byte
	values  []float64
}

// window is a series and what waits in it.
type window struct {
	labels []Label
	series series
	// waiting is from head on.
	waiting []sample
	head    int
}

// sample is a number, or a sum of numbers that leave at the same time.
type sample struct {
	value float64
	last  int // point of the grid that needs it
}

// evaluate makes the series of a leaf.
func (e *Engine) evaluate(ctx context.Context, l leaf, g grid, meter *meter) ([]*series, error) {
	ev := &evaluation{leaf: l, grid: g, limits: e.limits, offset: int64(l.rangeExpr.offset), series: map[string]*window{}}
	sel := l.log.Selector()
	sel.Start = g.at(0).Add(-l.window - l.rangeExpr.offset)
	sel.End = g.at(g.count - 1).Add(-l.rangeExpr.offset + 1) // which is not included
	if l.window > e.limits.Span || sel.End.Sub(sel.Start) > 2*e.limits.Span {
		return nil, refusal("the query time range exceeds the limit (query length: %s, limit: %s)", sel.End.Sub(sel.Start), e.limits.Span)
	}
	if c, ok := ev.counted(); ok {
		return e.count(ctx, ev, c, meter)
	}
	stages := l.log.stages
	if l.unwrap != nil {
		stages = append(append(slices.Clone(stages), l.unwrap), l.after...)
	}
	pipeline, err := newPipeline(stages)
	if err != nil {
		return nil, err
	}
	levelled := ev.wantsLevel()
	var failed error
	take := ev.take
	switch l.op {
	case counterOp:
		take = ev.takeRaw
	case absentOp:
		take = ev.takePresence
	}
	if err := e.source.Select(ctx, sel, func(entry logstore.Entry) bool {
		if failed = meter.read(entry.Line); failed != nil {
			return false
		}
		if levelled {
			entry = WithLevel(entry)
		}
		r, ok := pipeline.run(entry)
		if !ok {
			return true
		}
		if r.err != "" && !r.keepError {
			failed = pipelineError(r)
		} else {
			failed = take(r)
		}
		return failed == nil && ctx.Err() == nil
	}); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, failed
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if l.op == absentOp {
		return ev.absent()
	}
	if err := ev.advance(ctx, g.count); err != nil {
		return nil, err
	}
	out := make([]*series, 0, len(ev.series))
	for _, w := range ev.series {
		if len(w.series.points) > 0 {
			w.series.labels = toLabels(w.labels)
			out = append(out, &w.series)
		}
	}
	slices.SortFunc(out, func(a, b *series) int { return labels.Compare(a.labels, b.labels) })
	return out, nil
}

// wantsLevel says whether the query names the level that WithLevel finds.
func (ev *evaluation) wantsLevel() bool {
	for _, g := range [...]*grouping{ev.grouping, ev.by} {
		if g != nil && !g.without && slices.Contains(g.names, levelLabel) {
			return true
		}
	}
	return strings.Contains(ev.rangeExpr.String(), levelLabel)
}

// pipelineError refuses a query whose numbers would be wrong without saying so.
func pipelineError(r *record) error {
	var b strings.Builder
	for i, l := range r.seriesLabels(nil, nil) {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(l.Name + "=" + strconv.Quote(clip(l.Value)))
	}
	return refusal("pipeline error: '%s' for series: '{%s}'.\nUse a label filter to intentionally skip this error. (e.g | %s!=\"%s\").\n"+
		"To skip all potential errors you can match empty errors.(e.g %s=\"\")\nThe filter belongs after the stage that fails, which can be unwrap.",
		r.err, b.String(), errorLabel, r.err, errorLabel)
}

// span returns the first and the last point of the grid whose range a time is in.
func (ev *evaluation) span(at time.Time) (first, last int, ok bool) {
	ns := at.UnixNano() + ev.offset
	start, step := ev.grid.start*int64(time.Millisecond), ev.grid.step*int64(time.Millisecond)
	first = max(0, int(ceilDiv(ns-start, step)))
	last = min(ev.grid.count, int(ceilDiv(ns+int64(ev.window)-start, step))) - 1
	return first, last, first <= last
}

func ceilDiv(a, b int64) int64 {
	q := a / b
	if a%b > 0 {
		q++
	}
	return q
}

// seriesOf finds the series of a record, or makes it.
func (ev *evaluation) seriesOf(r *record) (*window, error) {
	g := ev.grouping
	if ev.by != nil {
		g = ev.by
	}
	ev.scratch = r.seriesLabels(g, ev.scratch[:0])
	ev.key = appendKey(ev.key[:0], ev.scratch)
	if w := ev.series[string(ev.key)]; w != nil {
		return w, nil
	}
	if len(ev.series) == ev.limits.Series {
		return nil, ev.tooManySeries()
	}
	w := &window{labels: slices.Clone(ev.scratch)}
	ev.series[string(ev.key)] = w
	return w, nil
}

// take puts a line's number into its series.
func (ev *evaluation) take(r *record) error {
	first, last, ok := ev.span(r.time)
	if !ok {
		return nil
	}
	if err := ev.advance(context.Background(), first); err != nil {
		return err
	}
	w, err := ev.seriesOf(r)
	if err != nil {
		return err
	}
	value := r.value
	if ev.unwrap == nil {
		value = 1
		if ev.op == "bytes_rate" || ev.op == "bytes_over_time" {
			value = float64(len(r.line))
		}
	}
	n := len(w.waiting)
	if n == w.head {
		ev.active = append(ev.active, w)
	} else if ev.unwrap == nil && w.waiting[n-1].last == last {
		// What leaves together is one number. That it came later does not matter: the points before are done.
		w.waiting[n-1].value += value
		return nil
	}
	if ev.waiting++; ev.waiting > ev.limits.Waiting {
		return refusal("the query has more than %d numbers in its range at a time; choose a shorter range or fewer streams", ev.limits.Waiting)
	}
	w.waiting = append(w.waiting, sample{value: value, last: last})
	return nil
}

// advance finishes the points before one of the grid.
func (ev *evaluation) advance(ctx context.Context, to int) error {
	for ; ev.done < to; ev.done++ {
		if len(ev.active) == 0 {
			ev.done = to
			return nil
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		at := ev.grid.start + int64(ev.done)*ev.grid.step
		still := ev.active[:0]
		for _, w := range ev.active {
			for w.head < len(w.waiting) && w.waiting[w.head].last < ev.done {
				w.head++
				ev.waiting--
			}
			if w.head == len(w.waiting) {
				w.waiting, w.head = w.waiting[:0], 0
				continue
			}
			if w.head > 1024 && w.head > len(w.waiting)/2 {
				w.waiting = slices.Delete(w.waiting, 0, w.head)
				w.head = 0
			}
			still = append(still, w)
			if ev.points++; ev.points > ev.limits.Samples {
				return ev.tooManyPoints()
			}
			w.series.points = append(w.series.points, point{at: at, value: ev.aggregate(w.waiting[w.head:])})
		}
		clear(ev.active[len(still):])
		ev.active = still
	}
	return nil
}

func (ev *evaluation) tooManySeries() error {
	return refusal("maximum of series (%d) reached for a single query; choose fewer streams, a shorter time, or sum the series by few labels", ev.limits.Series)
}

func (ev *evaluation) tooManyPoints() error {
	return refusal("the query gives more than %d values; ask for fewer series, a shorter time or a longer step", ev.limits.Samples)
}

// aggregate makes one number of those in a range.
func (ev *evaluation) aggregate(in []sample) float64 {
	switch ev.op {
	case "count_over_time", "bytes_over_time", "sum_over_time":
		return sum(in)
	case "rate", "bytes_rate":
		return sum(in) / ev.window.Seconds()
	case "avg_over_time":
		return sum(in) / float64(len(in))
	case "first_over_time":
		return in[0].value
	case "last_over_time":
		return in[len(in)-1].value
	case "max_over_time":
		return fold(in, func(a, b float64) bool { return b > a })
	case "min_over_time":
		return fold(in, func(a, b float64) bool { return b < a })
	case "stdvar_over_time":
		return variance(in)
	case "stddev_over_time":
		return math.Sqrt(variance(in))
	case quantileOp:
		ev.values = ev.values[:0]
		for _, s := range in {
			ev.values = append(ev.values, s.value)
		}
		return quantile(*ev.param, ev.values)
	}
	panic(fmt.Sprintf("logql: no aggregation %s", ev.op)) // the parser knows no others
}

func sum(in []sample) float64 {
	total := 0.0
	for _, s := range in {
		total += s.value
	}
	return total
}

// fold returns the number that is better than all others; anything is better than no number.
func fold(in []sample, better func(a, b float64) bool) float64 {
	best := in[0].value
	for _, s := range in[1:] {
		if better(best, s.value) || math.IsNaN(best) {
			best = s.value
		}
	}
	return best
}

func variance(in []sample) float64 {
	mean, squares := 0.0, 0.0
	for i, s := range in {
		off := s.value - mean
		mean += off / float64(i+1)
		squares += off * (s.value - mean)
	}
	return squares / float64(len(in))
}

// quantile is Prometheus': between two values it takes the part that belongs to it.
func quantile(q float64, values []float64) float64 {
	switch {
	case math.IsNaN(q):
		return math.NaN()
	case q < 0:
		return math.Inf(-1)
	case q > 1:
		return math.Inf(1)
	}
	slices.Sort(values)
	rank := q * float64(len(values)-1)
	lower := int(math.Floor(rank))
	upper := min(lower+1, len(values)-1)
	weight := rank - math.Floor(rank)
	return values[lower]*(1-weight) + values[upper]*weight
}

// takeRaw keeps the numbers as they are, for Prometheus' rate. A series has one value in a millisecond, the last one.
func (ev *evaluation) takeRaw(r *record) error {
	w, err := ev.seriesOf(r)
	if err != nil {
		return err
	}
	p := point{at: r.time.UnixMilli(), value: r.value}
	if n := len(w.series.points); n > 0 && w.series.points[n-1].at == p.at {
		w.series.points[n-1] = p
		return nil
	}
	if ev.points++; ev.points > ev.limits.Samples {
		return ev.tooManyPoints()
	}
	w.series.points = append(w.series.points, p)
	return nil
}

// absentOp asks for where there is nothing.
const absentOp = "absent_over_time"

// takePresence notes the points that have a line.
func (ev *evaluation) takePresence(r *record) error {
	first, last, ok := ev.span(r.time)
	if !ok {
		return nil
	}
	// done is the first point that is not known to have one; all before are in values.
	if ev.values == nil {
		ev.values = make([]float64, ev.grid.count)
	}
	for i := max(first, ev.done); i <= last; i++ {
		ev.values[i] = 1
	}
	ev.done = max(ev.done, last+1)
	return nil
}

// absent makes the series of the points without a line. Its labels are what the query says they would have been.
func (ev *evaluation) absent() ([]*series, error) {
	s := &series{}
	for i := range ev.grid.count {
		if ev.values == nil || ev.values[i] == 0 {
			s.points = append(s.points, point{at: ev.grid.start + int64(i)*ev.grid.step, value: 1})
		}
	}
	b := labels.NewBuilder(labels.EmptyLabels())
	seen := map[string]bool{}
	for _, m := range ev.log.Matchers {
		if m.Type == labels.MatchEqual && !seen[m.Name] {
			b.Set(m.Name, m.Value)
		} else {
			b.Del(m.Name)
		}
		seen[m.Name] = true
	}
	s.labels = b.Labels()
	if len(s.points) == 0 {
		return nil, nil
	}
	return []*series{s}, nil
}
