package metrics

import (
	"context"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"

	"polymesh.dev/polymesh/observe/privilege"
	"polymesh.dev/polymesh/observe/rulefiles"
)

// seats bounds how many queries are evaluated at a time. The tracker is for queries that are not privileged.
type seats struct {
	promql.QueryTracker
	own slots
}

// ownSeat is the index of a privileged query, which is not in the tracker.
const ownSeat = -2

// GetMaxConcurrent implements promql.QueryTracker.
func (p seats) GetMaxConcurrent() int { return p.QueryTracker.GetMaxConcurrent() + cap(p.own) }

// Insert implements promql.QueryTracker. It waits for a place.
func (p seats) Insert(ctx context.Context, query string) (int, error) {
	if !privilege.Of(ctx) {
		return p.QueryTracker.Insert(ctx, query)
	}
	_, err := p.own.Insert(ctx, query)
	return ownSeat, err
}

// Delete implements promql.QueryTracker.
func (p seats) Delete(place int) {
	if place == ownSeat {
		p.own.Delete(place)
		return
	}
	p.QueryTracker.Delete(place)
}

// checked is an engine that refuses what rulefiles.Check does, before it is evaluated. It implements promql.QueryEngine.
type checked struct {
	engine *promql.Engine
	parser parser.Parser
}

// NewInstantQuery implements promql.QueryEngine.
func (c checked) NewInstantQuery(ctx context.Context, q storage.Queryable, opts promql.QueryOpts, qs string, ts time.Time) (promql.Query, error) {
	q, err := c.check(q, qs, 0, 0)
	if err != nil {
		return nil, err
	}
	return c.engine.NewInstantQuery(ctx, q, opts, qs, ts)
}

// NewRangeQuery implements promql.QueryEngine.
func (c checked) NewRangeQuery(ctx context.Context, q storage.Queryable, opts promql.QueryOpts, qs string, start, end time.Time, interval time.Duration) (promql.Query, error) {
	q, err := c.check(q, qs, end.Sub(start), interval)
	if err != nil {
		return nil, err
	}
	return c.engine.NewRangeQuery(ctx, q, opts, qs, start, end, interval)
}

// check returns the storage that the query may read.
func (c checked) check(q storage.Queryable, qs string, span, step time.Duration) (storage.Queryable, error) {
	expr, err := c.parser.ParseExpr(qs)
	if err != nil {
		return q, nil // the engine returns the error
	}
	g, err := rulefiles.Check(expr, span, step)
	if err != nil {
		return nil, err
	}
	return g.Bound(q), nil
}
