package page

import (
	"context"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// instant evaluates an expression at one time.
func (s *server) instant(ctx context.Context, expr string, at time.Time) (promql.Vector, error) {
	q, err := s.Engine.NewInstantQuery(ctx, s.Queryable, nil, expr, at)
	if err != nil {
		return nil, fmt.Errorf("prepare a query of metrics: %w", err)
	}
	defer q.Close()
	result := q.Exec(ctx)
	if result.Err != nil {
		return nil, fmt.Errorf("query metrics: %w", result.Err)
	}
	vector, err := result.Vector()
	if err != nil {
		return nil, fmt.Errorf("query metrics: %w", err)
	}
	return append(promql.Vector(nil), vector...), nil // Close reuses the slice
}

// over evaluates an expression at each step of a period. The engine holds an aggregation's input of all steps in memory, up to a number of samples;
// if that is too many, parts of the period are evaluated one after the other.
func (s *server) over(ctx context.Context, expr string, p period, step time.Duration) ([]line, error) {
	most := int(p.window()/step) + 1
	all := []line{}
	index := map[string]int{}
	for part := (period{p.start, p.end}); !part.start.After(p.end); {
		if part.end = part.start.Add(time.Duration(most-1) * step); part.end.After(p.end) {
			part.end = p.end
		}
		lines, err := s.inOnePiece(ctx, expr, part, step)
		if errors.As(err, new(promql.ErrTooManySamples)) && most > 1 {
			most = max(1, most/4)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			key := labels.FromMap(l.Labels).String()
			i, known := index[key]
			if !known {
				i = len(all)
				index[key] = i
				all = append(all, line{Labels: l.Labels, Points: [][2]float64{}})
			}
			all[i].Points = append(all[i].Points, l.Points...)
		}
		part.start = part.start.Add(time.Duration(most) * step)
	}
	return all, nil
}

func (s *server) inOnePiece(ctx context.Context, expr string, p period, step time.Duration) ([]line, error) {
	q, err := s.Engine.NewRangeQuery(ctx, s.Queryable, nil, expr, p.start, p.end, step)
	if err != nil {
		return nil, fmt.Errorf("prepare a query of metrics: %w", err)
	}
	defer q.Close()
	result := q.Exec(ctx)
	if result.Err != nil {
		return nil, fmt.Errorf("query metrics: %w", result.Err)
	}
	matrix, err := result.Matrix()
	if err != nil {
		return nil, fmt.Errorf("query metrics: %w", err)
	}
	lines := make([]line, 0, len(matrix))
	for _, series := range matrix {
		l := line{Labels: series.Metric.Map(), Points: make([][2]float64, 0, len(series.Floats))}
		for _, point := range series.Floats {
			if !math.IsNaN(point.F) && !math.IsInf(point.F, 0) {
				l.Points = append(l.Points, [2]float64{float64(point.T), point.F})
			}
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// standing is a series that is above a limit at the end of a period, and since when it has been so without a break.
type standing struct {
	labels map[string]string
	value  float64
	since  time.Time
	// earlier means that it was so from the start of the period, so it may have begun before.
	earlier bool
}

// above returns the lines of an expression in a period, and those that are above a limit at its end. What has ended before is not.
func (s *server) above(ctx context.Context, expr string, limit float64, p period, step time.Duration) ([]standing, []line, error) {
	lines, err := s.over(ctx, expr, p, step)
	if err != nil {
		return nil, nil, err
	}
	now, err := s.instant(ctx, expr, p.end)
	if err != nil {
		return nil, nil, err
	}
	index := make(map[string]*line, len(lines))
	for i := range lines {
		index[labels.FromMap(lines[i].Labels).String()] = &lines[i]
	}
	var list []standing
	for _, sample := range now {
		if math.IsNaN(sample.F) || math.IsInf(sample.F, 0) || sample.F <= limit {
			continue
		}
		x := standing{labels: sample.Metric.Map(), value: sample.F, since: p.end}
		if l := index[sample.Metric.String()]; l != nil {
			x.since = l.since(limit, p.end, step)
		}
		x.earlier = x.since.Sub(p.start) <= step
		list = append(list, x)
	}
	return list, lines, nil
}

// since returns since when a series that is above a limit at a time has been so without a break.
func (l *line) since(limit float64, at time.Time, step time.Duration) time.Time {
	for _, point := range slices.Backward(l.Points) {
		if before := time.UnixMilli(int64(point[0])); point[1] > limit && at.Sub(before) <= max(2*step, time.Minute) {
			at = before
			continue
		}
		break
	}
	return at
}

// line is a series in time: pairs of Unix milliseconds and value. Values that are not finite are left out.
type line struct {
	Labels map[string]string `json:"labels,omitempty"`
	Points [][2]float64      `json:"points"`
}

// The series that the page counts are those of the store's own jobs. What a user's job reads has another label job: the same sidecars read twice would
// double every rate.
var (
	ofProxies  = is("job", scrapeconfig.JobProxies)
	ofObjects  = is("job", scrapeconfig.JobState)
	ofNodes    = is("job", scrapeconfig.JobNode)
	ofKubelets = is("job", scrapeconfig.JobKubelet)
	ofServer   = is("job", scrapeconfig.JobServer)
)

// The matchers of a selector. Values are quoted here, and nowhere else are names of others part of an expression.

func is(name, value string) string      { return name + "=" + strconv.Quote(value) }
func matches(name, regex string) string { return name + "=~" + strconv.Quote(regex) }

func oneOf(name string, values ...string) string { return matches(name, anyOf(values)) }

// anyOf returns a regular expression for one of the values.
func anyOf(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = regexp.QuoteMeta(v)
	}
	return strings.Join(quoted, "|")
}

// failedCodes are the codes of responses that failed, and of none. It is outcomeOf as a matcher, without gRPC's.
const failedCodes = "5..|0"

func selector(metric string, matchers ...string) string {
	return metric + "{" + strings.Join(matchers, ",") + "}"
}

// duration writes a duration as PromQL reads it.
func duration(d time.Duration) string { return model.Duration(d.Truncate(time.Millisecond)).String() }

// grown returns an expression for how much each counter of a selector has grown in the window, as increase does, but counts a series that began in
// the window from zero. increase sees nothing of the first request with a new response code, and nothing at all of two requests to a new pod.
//
// A series that is missing at the start of the window has not always begun in it: its target may not have answered at that time. So this applies
// only if the target answered then, or was not known in the hour before.
func (s *server) grown(selected string, window time.Duration) string {
	w, up := duration(window), selector("up", ofProxies)
	return fmt.Sprintf("(((last_over_time(%[1]s[%[2]s]) unless (%[1]s offset %[2]s))"+
		" unless on (job, instance) (last_over_time(%[3]s[1h] offset %[2]s) unless (%[3]s offset %[2]s == 1)))"+
		" or increase(%[1]s[%[2]s]))", selected, w, up)
}

// recorded returns the part of a period that has metrics: the store may be younger, or was not running at the start.
func (s *server) recorded(ctx context.Context, p period) (period, error) {
	lines, err := s.over(ctx, "count("+selector("up", ofProxies)+")", p, p.step(60))
	if err != nil {
		return p, err
	}
	if len(lines) == 0 || len(lines[0].Points) == 0 {
		return p, nil
	}
	first := time.UnixMilli(int64(lines[0].Points[0][0]))
	if !first.After(p.start) {
		return p, nil
	}
	// Two scrapes later every target has answered once.
	if first = first.Add(30 * time.Second); p.end.Sub(first) >= minWindow {
		p.start = first
	}
	return p, nil
}
