package logql

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"

	"polymesh.dev/polymesh/observe/logstore"
)

// Label is a name and a value.
type Label struct{ Name, Value string }

// Stream is lines with the same labels.
type Stream struct {
	// Labels are all of them, sorted; Stream is the ones that name the stream in the store.
	Labels, Stream []Label
	Entries        []Line
}

// Line of a stream. Metadata came with it, Parsed is what the pipeline made; both are in the stream's Labels too.
type Line struct {
	Time             time.Time
	Text             string
	Metadata, Parsed []Label
}

// Pipeline is what a query does with lines. It serves one goroutine.
type Pipeline struct {
	stages []stage
	record *record
}

// NewPipeline makes the pipeline of a query.
func (e *LogExpr) NewPipeline() (*Pipeline, error) { return newPipeline(e.stages) }

// newPipeline gives each template functions of its own.
func newPipeline(stages []stage) (*Pipeline, error) {
	p := &Pipeline{stages: slices.Clone(stages), record: newRecord()}
	for i, s := range p.stages {
		switch s := s.(type) {
		case lineFormatStage:
			bound, err := s.template.bind()
			if err != nil {
				return nil, err
			}
			p.stages[i] = lineFormatStage{bound}
		case labelFormatStage:
			s = slices.Clone(s)
			for j, f := range s {
				if f.template == nil {
					continue
				}
				bound, err := f.template.bind()
				if err != nil {
					return nil, err
				}
				s[j].template = bound
			}
			p.stages[i] = s
		}
	}
	return p, nil
}

// run lets an entry through, or not. The record is good until the next one.
func (p *Pipeline) run(e logstore.Entry) (*record, bool) {
	p.record.reset(e)
	for _, s := range p.stages {
		if !s.run(p.record) {
			return nil, false
		}
	}
	return p.record, true
}

// Run lets an entry through and returns it as a line with its labels.
func (p *Pipeline) Run(e logstore.Entry) (stream Stream, ok bool) {
	r, ok := p.run(e)
	if !ok {
		return Stream{}, false
	}
	line := Line{Time: r.time, Text: r.line}
	for _, l := range r.current() {
		one := Label{l.name, l.value}
		stream.Labels = append(stream.Labels, one)
		switch l.origin {
		case fromStream:
			stream.Stream = append(stream.Stream, one)
		case fromMetadata:
			line.Metadata = append(line.Metadata, one)
		default:
			line.Parsed = append(line.Parsed, one)
		}
	}
	stream.Entries = []Line{line}
	return stream, true
}

// Selector is what the store can do of a query: the streams, and the first line filters. The pipeline does them again; what the store leaves
// out must only be what the pipeline would leave out too.
func (e *LogExpr) Selector() logstore.Selector {
	sel := logstore.Selector{Matchers: Matchers(e.Matchers)}
	const most, mostBytes = 32, 4 << 10
	for _, s := range e.stages {
		f, ok := s.(*lineFilter)
		if !ok {
			if _, changes := s.(lineFormatStage); changes || isLineChange(s) {
				break
			}
			continue
		}
		if len(sel.Filters) == most {
			break
		}
		if filter, ok := f.forStore(); ok && len(filter.Text) <= mostBytes {
			sel.Filters = append(sel.Filters, filter)
		}
	}
	return sel
}

// isLineChange says whether a stage makes another line, so filters after it are not about the stored one.
func isLineChange(s stage) bool {
	switch s.(type) {
	case decolorizeStage, unpackStage:
		return true
	}
	return false
}

// forStore is the filter as one on stored lines.
func (f *lineFilter) forStore() (logstore.Filter, bool) {
	first := f.texts[0]
	if first.ip != nil || first.pattern != nil || first.text == "" || len(f.texts) > 1 {
		return logstore.Filter{}, false
	}
	if first.re != nil {
		return logstore.Filter{Text: first.re.String(), Regexp: true, Negative: f.negative()}, true
	}
	return logstore.Filter{Text: first.text, Negative: f.negative()}, true
}

// Matchers gives parsed matchers to the store.
func Matchers(parsed []*labels.Matcher) []logstore.Matcher {
	matchers := make([]logstore.Matcher, len(parsed))
	for i, m := range parsed {
		of := logstore.Equal
		switch m.Type {
		case labels.MatchNotEqual:
			of = logstore.NotEqual
		case labels.MatchRegexp:
			of = logstore.Regexp
		case labels.MatchNotRegexp:
			of = logstore.NotRegexp
		}
		matchers[i] = logstore.Matcher{Name: m.Name, Type: of, Value: m.Value}
	}
	return matchers
}

// lines answers a query for lines.
func (e *Engine) lines(ctx context.Context, expr *LogExpr, req Request, meter *meter, result *Result) error {
	result.Streams = []Stream{}
	limit := req.Limit
	if limit == 0 || !req.Start.Before(req.End) {
		return nil
	}
	pipeline, err := expr.NewPipeline()
	if err != nil {
		return err
	}
	sel := expr.Selector()
	sel.Start, sel.End, sel.Newest = req.Start, req.End, req.Direction == Backward
	if len(expr.stages) == 0 && req.Interval == 0 { // else the pipeline decides which lines count
		sel.Limit = limit
	}
	levelled := strings.Contains(req.Query, levelLabel)
	var (
		last     time.Time
		byLabels = map[string]int{}
		size     int
		failed   error
	)
	err = e.source.Select(ctx, sel, func(entry logstore.Entry) bool {
		if failed = meter.read(entry.Line); failed != nil {
			return false
		}
		if req.Interval > 0 && !last.IsZero() && entry.Time.Sub(last).Abs() < req.Interval {
			return true
		}
		if levelled {
			entry = WithLevel(entry)
		}
		got, ok := pipeline.Run(entry)
		if ok && !levelled { // only for lines that are given, which are few of those that are read
			got, ok = pipeline.Run(WithLevel(entry))
		}
		if !ok {
			return true
		}
		last = entry.Time
		line := got.Entries[0]
		if size += len(line.Text) + labelBytes(line.Metadata) + labelBytes(line.Parsed); size > e.limits.ResultBytes {
			result.Warnings = append(result.Warnings, "the lines are too long for one answer: there are more, ask for a shorter time or fewer lines")
			return false
		}
		key := string(appendKey(nil, got.Labels))
		i, known := byLabels[key]
		if !known {
			i = len(result.Streams)
			byLabels[key] = i
			size += labelBytes(got.Labels)
			result.Streams = append(result.Streams, Stream{Labels: got.Labels, Stream: got.Stream})
		}
		result.Streams[i].Entries = append(result.Streams[i].Entries, line)
		result.Stats.Entries++
		return result.Stats.Entries < limit
	})
	if err == nil {
		err = failed
	}
	slices.SortFunc(result.Streams, func(a, b Stream) int {
		return slices.CompareFunc(a.Labels, b.Labels, func(x, y Label) int {
			if c := strings.Compare(x.Name, y.Name); c != 0 {
				return c
			}
			return strings.Compare(x.Value, y.Value)
		})
	})
	return err
}

func labelBytes(labels []Label) int {
	n := 0
	for _, l := range labels {
		n += len(l.Name) + len(l.Value) + 32
	}
	return n
}

// appendKey makes bytes that are the same for the same labels only: lengths stand before the texts, as a label may have any text.
func appendKey(key []byte, labels []Label) []byte {
	for _, l := range labels {
		key = appendText(appendText(key, l.Name), l.Value)
	}
	return key
}

func appendText(key []byte, s string) []byte {
	n := len(s)
	return append(append(key, byte(n>>24), byte(n>>16), byte(n>>8), byte(n)), s...)
}

// Merge puts the lines of streams with the same labels together, in the order of time.
func Merge(streams []Stream, direction Direction) []Stream {
	var out []Stream
	byLabels := map[string]int{}
	for _, s := range streams {
		key := string(appendKey(nil, s.Labels))
		i, known := byLabels[key]
		if !known {
			i = len(out)
			byLabels[key] = i
			out = append(out, Stream{Labels: s.Labels, Stream: s.Stream})
		}
		out[i].Entries = append(out[i].Entries, s.Entries...)
	}
	for _, s := range out {
		slices.SortStableFunc(s.Entries, func(a, b Line) int {
			if direction == Forward {
				return a.Time.Compare(b.Time)
			}
			return b.Time.Compare(a.Time)
		})
	}
	return out
}
