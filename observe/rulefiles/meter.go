package rulefiles

import (
	"context"
	"fmt"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
)

// maxMade is how many bytes of labels one query may make by label_join, label_replace and group_left.
const maxMade = 16 << 20

// Bound wraps the storage for a query with this growth: the query fails if its labels would not fit into memory.
func (g Growth) Bound(q storage.Queryable) storage.Queryable {
	if g == (Growth{}) {
		return q
	}
	left := float64(maxMade)
	return storage.QueryableFunc(func(mint, maxt int64) (storage.Querier, error) {
		reader, err := q.Querier(mint, maxt)
		if err != nil {
			return nil, err
		}
		return &meteredQuerier{Querier: reader, growth: g, left: &left}, nil
	})
}

// meteredQuerier ends a query whose labels become too long. The engine reads the sets of a query one after the other.
type meteredQuerier struct {
	storage.Querier
	growth Growth
	left   *float64
}

// Select implements storage.Querier.
func (q *meteredQuerier) Select(ctx context.Context, sorted bool, hints *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	return &meteredSet{SeriesSet: q.Querier.Select(ctx, sorted, hints, matchers...), query: q}
}

type meteredSet struct {
	storage.SeriesSet
	query *meteredQuerier
	err   error
}

// Next implements storage.SeriesSet.
func (s *meteredSet) Next() bool {
	if s.err != nil || !s.SeriesSet.Next() {
		return false
	}
	q := s.query
	if *q.left -= q.growth.Times*float64(Length(s.At().Labels())) + q.growth.Added; *q.left < 0 {
		s.err = fmt.Errorf("label_join, label_replace and group_left make more than %d bytes of labels: select fewer series", maxMade)
		return false
	}
	return true
}

// Err implements storage.SeriesSet.
func (s *meteredSet) Err() error {
	if s.err != nil {
		return s.err
	}
	return s.SeriesSet.Err()
}

// Length returns the size of a series' labels in bytes.
func Length(ls labels.Labels) int {
	n := 0
	ls.Range(func(l labels.Label) { n += len(l.Name) + len(l.Value) })
	return n
}
