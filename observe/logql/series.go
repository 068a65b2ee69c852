package logql

import (
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// series is labels and their values in time, as the engine reads them.
type series struct {
	labels labels.Labels
	points points
}

// Labels implements storage.Series.
func (s *series) Labels() labels.Labels { return s.labels }

// Iterator implements storage.Series.
func (s *series) Iterator(chunkenc.Iterator) chunkenc.Iterator {
	return storage.NewListSeriesIterator(s.points)
}

// points implements storage.Samples.
type points []point

func (p points) Get(i int) chunks.Sample { return &p[i] }
func (p points) Len() int                { return len(p) }

// point is one value. It implements chunks.Sample.
type point struct {
	at    int64 // milliseconds
	value float64
}

func (p *point) T() int64                    { return p.at }
func (p *point) F() float64                  { return p.value }
func (*point) ST() int64                     { return 0 }
func (*point) H() *histogram.Histogram       { return nil }
func (*point) FH() *histogram.FloatHistogram { return nil }
func (*point) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (p *point) Copy() chunks.Sample         { return &point{p.at, p.value} }

type seriesSet struct {
	series []*series
	at     int
}

// Next, At, Err and Warnings implement storage.SeriesSet.
func (s *seriesSet) Next() bool                        { s.at++; return s.at < len(s.series) }
func (s *seriesSet) At() storage.Series                { return s.series[s.at] }
func (s *seriesSet) Err() error                        { return nil }
func (s *seriesSet) Warnings() annotations.Annotations { return nil }

// seriesLabels returns the labels of a record's series, sorted. An empty label is none, and a result has no name.
func (r *record) seriesLabels(g *grouping, into []Label) []Label {
	for _, l := range r.labels {
		if l.dropped || l.value == "" || l.name == model.MetricNameLabel {
			continue
		}
		if g != nil && slices.Contains(g.names, l.name) == g.without {
			continue
		}
		into = append(into, Label{l.name, l.value})
	}
	if r.err != "" { // also if a grouping does not name it: what is counted are lines with errors
		into = append(into, Label{errorLabel, r.err})
		if r.details != "" {
			into = append(into, Label{detailsLabel, r.details})
		}
	}
	slices.SortFunc(into, func(a, b Label) int { return strings.Compare(a.Name, b.Name) })
	return into
}

func toLabels(from []Label) labels.Labels {
	b := labels.NewScratchBuilder(len(from))
	for _, l := range from {
		b.Add(l.Name, l.Value)
	}
	return b.Labels()
}
