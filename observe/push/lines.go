package push

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/wire"
)

// A record has about maxRecordBytes and at most maxRecordLines lines, so that each fits into a chunk (wire.MaxValues).
const (
	maxRecordBytes = 128 << 10
	maxRecordLines = 8 << 10
)

// stated lists the labels that the store sets itself.
func stated(name string) bool { return name == "node" || name == "workload" }

// Append buffers lines for the store. After an error, none is buffered.
func (b *Buffer) Append(entries []logstore.Entry) error {
	var records []wire.Record
	var counts []uint32
	var last *logstore.Entry
	size := 0
	for i := range entries {
		e := &entries[i]
		line := e.Line[:min(len(e.Line), logstore.MaxLineBytes)]
		if last == nil || size+len(line) > maxRecordBytes || counts[len(counts)-1] >= maxRecordLines || !slices.Equal(last.Labels, e.Labels) || !slices.Equal(last.Metadata, e.Metadata) {
			lines := &wire.Lines{Labels: map[string]string{}}
			for _, l := range e.Labels {
				if !stated(l.Name) {
					lines.Labels[l.Name] = l.Value
				}
			}
			for _, m := range e.Metadata {
				if lines.Metadata == nil {
					lines.Metadata = map[string]string{}
				}
				lines.Metadata[m.Name] = m.Value
			}
			records, counts = append(records, wire.Record{Lines: lines}), append(counts, 0)
			last, size = e, 0
		}
		lines := records[len(records)-1].Lines
		lines.Times, lines.Texts = append(lines.Times, e.Time.UnixNano()), append(lines.Texts, line)
		counts[len(counts)-1]++
		size += len(line)
	}
	if len(records) == 0 {
		return nil
	}
	return b.add(records, counts)
}

// Each finds no lines. The tailers call it to find lines that an earlier run has already appended; here, the store
// recognises them.
func (b *Buffer) Each(context.Context, logstore.Selector, func(logstore.Entry) bool) error {
	return nil
}

// Gather buffers the current values of a gatherer, which must be gauges, counters or untyped.
func (b *Buffer) Gather(from prometheus.Gatherer) error {
	now := time.Now()
	families, err := from.Gather()
	if err != nil {
		return fmt.Errorf("read the machine's numbers: %w", err)
	}
	samples := &wire.Samples{Time: now.UnixMilli()}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			s := wire.Sample{Name: f.GetName(), Value: value(m)}
			// JSON cannot encode them.
			if math.IsNaN(s.Value) || math.IsInf(s.Value, 0) {
				continue
			}
			for _, l := range m.GetLabel() {
				if s.Labels == nil {
					s.Labels = map[string]string{}
				}
				s.Labels[l.GetName()] = l.GetValue()
			}
			samples.Values = append(samples.Values, s)
		}
	}
	if len(samples.Values) == 0 {
		return nil
	}
	return b.add([]wire.Record{{Samples: samples}}, []uint32{uint32(len(samples.Values))})
}

func value(m *dto.Metric) float64 {
	switch {
	case m.Gauge != nil:
		return m.GetGauge().GetValue()
	case m.Counter != nil:
		return m.GetCounter().GetValue()
	case m.Untyped != nil:
		return m.GetUntyped().GetValue()
	}
	return math.NaN()
}
