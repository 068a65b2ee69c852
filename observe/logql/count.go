package logql

import (
	"context"
	"slices"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"polymesh.dev/polymesh/observe/logstore"
)

// countedLabels are labels by which the store can count without reading lines: the ones that only streams have. Any other name may be metadata of
// a line too, which the store counts by another name.
var countedLabels = []string{"job", "namespace", "node", "pod", "source", "stream", "workload"}

// maxPieces is how many pieces of time the store counts at most.
const maxPieces = 20_000

// counting is how the store is asked to count a leaf.
type counting struct {
	sel   logstore.Selector
	group logstore.Grouping
}

// counted says whether the store can count a leaf: lines or bytes of whole streams, perhaps of lines with a text, in a sum by labels of streams.
func (ev *evaluation) counted() (counting, bool) {
	if ev.unwrap != nil || ev.by == nil || ev.by.without || ev.op == absentOp {
		return counting{}, false
	}
	for _, name := range ev.by.names {
		if !slices.Contains(countedLabels, name) {
			return counting{}, false
		}
	}
	c := counting{sel: ev.log.Selector(), group: logstore.Grouping{By: append([]string{}, ev.by.names...)}}
	for _, s := range ev.log.stages {
		f, ok := s.(*lineFilter)
		if ok && f.op == "|=" && len(f.texts) == 1 && f.texts[0].text == "" { // an editor's filter without a text
			continue
		}
		if !ok || !slices.ContainsFunc(c.sel.Filters, func(stored logstore.Filter) bool {
			mine, ok := f.forStore()
			return ok && mine == stored
		}) {
			return counting{}, false
		}
	}
	// Each piece of time lies in a range as a whole or not at all. A range has its end in it and not its beginning, a piece the other way round.
	window, step := int64(ev.window), ev.grid.step*int64(time.Millisecond)
	piece := window
	if ev.grid.count > 1 {
		piece = divisor(window, step)
	}
	c.sel.Start = ev.grid.at(0).Add(-ev.window - time.Duration(ev.offset) + 1)
	c.sel.End = ev.grid.at(ev.grid.count - 1).Add(-time.Duration(ev.offset) + 1)
	c.group.Step, c.group.Origin = time.Duration(piece), c.sel.Start
	return c, int64(c.sel.End.Sub(c.sel.Start))/piece <= maxPieces
}

// divisor is the greatest one that two numbers share.
func divisor(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// sums is a series that is counted in no order of time.
type sums struct {
	labels []logstore.Field
	values []float64
	any    []bool
}

// count makes the series of a leaf from the store's counts.
func (e *Engine) count(ctx context.Context, ev *evaluation, c counting, meter *meter) ([]*series, error) {
	found := map[string]*sums{}
	var failed error
	err := e.source.Count(ctx, c.sel, c.group, func(n logstore.Counted) bool {
		meter.stats.Lines += n.Lines
		meter.stats.Bytes += n.Bytes
		first, last, ok := ev.span(n.Time)
		if !ok {
			return true
		}
		ev.key = ev.key[:0]
		for _, l := range n.Labels {
			ev.key = appendText(appendText(ev.key, l.Name), l.Value)
		}
		s := found[string(ev.key)]
		if s == nil {
			if len(found) == e.limits.Series {
				failed = ev.tooManySeries()
				return false
			}
			if (len(found)+1)*ev.grid.count > e.limits.Samples {
				failed = ev.tooManyPoints()
				return false
			}
			s = &sums{labels: n.Labels, values: make([]float64, ev.grid.count), any: make([]bool, ev.grid.count)}
			found[string(ev.key)] = s
		}
		value := float64(n.Lines)
		if ev.op == "bytes_rate" || ev.op == "bytes_over_time" {
			value = float64(n.Bytes)
		}
		for i := first; i <= last; i++ {
			s.values[i] += value
			s.any[i] = true
		}
		return true
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, err
	}
	out := make([]*series, 0, len(found))
	for _, s := range found {
		one := &series{}
		b := labels.NewScratchBuilder(len(s.labels))
		for _, l := range s.labels {
			if l.Value != "" {
				b.Add(l.Name, l.Value)
			}
		}
		b.Sort()
		one.labels = b.Labels()
		for i, value := range s.values {
			if s.any[i] {
				one.points = append(one.points, point{at: ev.grid.start + int64(i)*ev.grid.step, value: ev.aggregate([]sample{{value: value}})})
			}
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b *series) int { return labels.Compare(a.labels, b.labels) })
	return out, nil
}
