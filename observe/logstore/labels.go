package logstore

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

// MaxSeries is how many streams LabelNames, LabelValues and Series read.
const MaxSeries = 10_000

// Series returns the labels of the streams with lines from start to end, at most MaxSeries of them, sorted.
func (s *Store) Series(ctx context.Context, matchers []Matcher, start, end time.Time) ([][]Field, error) {
	c, err := compile(Selector{Matchers: matchers})
	if err != nil {
		return nil, err
	}
	var out [][]Field
	err = s.rows.Query(ctx, fmt.Sprintf("%s | uniq by (_stream) limit %d", c.logsql, MaxSeries), start, end, func(row rowstore.Row) bool {
		out = append(out, row.Stream)
		return len(out) < MaxSeries
	})
	if err != nil {
		return nil, fmt.Errorf("reading the logs' streams: %w", err)
	}
	slices.SortFunc(out, compareLabels)
	return out, nil
}

// LabelNames returns the names of these streams' labels, sorted.
func (s *Store) LabelNames(ctx context.Context, matchers []Matcher, start, end time.Time) ([]string, error) {
	series, err := s.Series(ctx, matchers, start, end)
	if err != nil {
		return nil, err
	}
	names := map[string]struct{}{}
	for _, labels := range series {
		for _, l := range labels {
			names[l.Name] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// LabelValues returns the values of one of these streams' labels, sorted.
func (s *Store) LabelValues(ctx context.Context, name string, matchers []Matcher, start, end time.Time) ([]string, error) {
	if !ValidName(name) {
		return nil, fmt.Errorf("%.40q is not a valid label name", name)
	}
	series, err := s.Series(ctx, append(slices.Clone(matchers), Matcher{Name: name, Type: NotEqual}), start, end)
	if err != nil {
		return nil, err
	}
	values := map[string]struct{}{}
	for _, labels := range series {
		values[Value(labels, name)] = struct{}{}
	}
	return slices.Sorted(maps.Keys(values)), nil
}
