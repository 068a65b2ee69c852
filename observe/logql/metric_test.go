package logql

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
)

// traffic is an hour of lines of three pods, some of which are no logfmt.
func traffic() []logstore.Entry {
	random := rand.New(rand.NewPCG(1, 2))
	var entries []logstore.Entry
	at := testStart
	for i := range 2000 {
		at = at.Add(time.Duration(random.Int64N(int64(3600 * time.Millisecond))))
		line := fmt.Sprintf("status=%d took=%dms size=%dKB path=/%c id=%d", 200+100*random.IntN(4), random.IntN(900), random.IntN(50), 'a'+random.IntN(3), i)
		if i%50 == 0 {
			line = "plain text of " + strconv.Itoa(i)
		}
		if i%400 < 20 { // several lines at the same time
			at = at.Truncate(time.Second)
		}
		entries = append(entries, logstore.Entry{Time: at, Line: line, Metadata: fields("trace", fmt.Sprint(i%2)),
			Labels: fields("app", "shop", "pod", "p"+strconv.Itoa(random.IntN(3)))})
	}
	return entries
}

// naive is what a range aggregation means, written down without any cleverness: for each point of time it looks at each line.
type naive struct {
	keep   func(line string) bool
	labels func(e logstore.Entry, parsed map[string]string) map[string]string
	value  func(line string, parsed map[string]string) (float64, bool)
	fold   func(values []float64, seconds float64) float64
}

func (n naive) at(entries []logstore.Entry, end time.Time, window time.Duration) map[string]float64 {
	values := map[string][]float64{}
	for _, e := range entries {
		if !e.Time.After(end.Add(-window)) || e.Time.After(end) || n.keep != nil && !n.keep(e.Line) {
			continue
		}
		parsed := map[string]string{}
		for _, pair := range strings.Fields(e.Line) {
			if name, value, ok := strings.Cut(pair, "="); ok {
				parsed[name] = value
			}
		}
		value, ok := n.value(e.Line, parsed)
		if !ok {
			continue
		}
		b := labels.NewScratchBuilder(4)
		for name, v := range n.labels(e, parsed) {
			if v != "" {
				b.Add(name, v)
			}
		}
		b.Sort()
		key := b.Labels().String()
		values[key] = append(values[key], value)
	}
	out := map[string]float64{}
	for key, v := range values {
		out[key] = n.fold(v, window.Seconds())
	}
	return out
}

func byStream(e logstore.Entry, _ map[string]string) map[string]string {
	return map[string]string{"app": "shop", "pod": logstore.Value(e.Labels, "pod"), "trace": logstore.Value(e.Metadata, "trace")}
}

// by is the labels of a grouping.
func by(names ...string) func(logstore.Entry, map[string]string) map[string]string {
	return func(e logstore.Entry, parsed map[string]string) map[string]string {
		out := map[string]string{}
		for _, n := range names {
			out[n] = logstore.Value(e.Labels, n) + parsed[n]
		}
		return out
	}
}

func ones(string, map[string]string) (float64, bool) { return 1, true }

// took is the milliseconds of a line.
func took(_ string, parsed map[string]string) (float64, bool) {
	d, err := time.ParseDuration(parsed["took"])
	return d.Seconds(), err == nil
}

func sizes(_ string, parsed map[string]string) (float64, bool) {
	n, err := strconv.ParseFloat(strings.TrimSuffix(parsed["size"], "KB"), 64)
	return n * 1000, err == nil
}

func total(v []float64, _ float64) float64 {
	n := 0.0
	for _, x := range v {
		n += x
	}
	return n
}

func perSecond(v []float64, seconds float64) float64 { return total(v, 0) / seconds }
func mean(v []float64, _ float64) float64            { return total(v, 0) / float64(len(v)) }
func greatest(v []float64, _ float64) float64        { return slices.Max(v) }
func least(v []float64, _ float64) float64           { return slices.Min(v) }

func deviation(v []float64, _ float64) float64 {
	n := 0.0
	for _, x := range v {
		n += (x - mean(v, 0)) * (x - mean(v, 0))
	}
	return n / float64(len(v))
}

func quantileOf(q float64) func([]float64, float64) float64 {
	return func(v []float64, _ float64) float64 {
		v = slices.Sorted(slices.Values(v))
		at := q * float64(len(v)-1)
		low := int(at)
		high := min(low+1, len(v)-1)
		return v[low] + (v[high]-v[low])*(at-float64(low))
	}
}

// TestMetrics compares the engine with what it should say, on ranges and steps of all kinds.
func TestMetrics(t *testing.T) {
	entries := traffic()
	engine := newEngine(t, Limits{Series: 5000}, entries)
	shapes := []struct{ window, step, offset time.Duration }{
		{time.Minute, time.Minute, 0},
		{5 * time.Minute, 30 * time.Second, 0},
		{7 * time.Second, time.Minute, 0}, // most lines are in no range
		{90 * time.Second, 7 * time.Second, 3 * time.Minute},
		{time.Hour, 10 * time.Minute, 0},
		{time.Minute, 13 * time.Second, -2 * time.Minute},
	}
	for query, want := range map[string]naive{
		`count_over_time({app="shop"} %s)`:                 {labels: byStream, value: ones, fold: total},
		`rate({app="shop"} |= "path=/a" %s)`:               {keep: func(l string) bool { return strings.Contains(l, "path=/a") }, labels: byStream, value: ones, fold: perSecond},
		`bytes_over_time({app="shop"} !~ "path=/[ab]" %s)`: {keep: func(l string) bool { return !strings.Contains(l, "path=/a") && !strings.Contains(l, "path=/b") }, labels: byStream, value: func(l string, _ map[string]string) (float64, bool) { return float64(len(l)), true }, fold: total},
		`bytes_rate({app="shop"} %s)`:                      {labels: byStream, value: func(l string, _ map[string]string) (float64, bool) { return float64(len(l)), true }, fold: perSecond},
		// These the store counts.
		`sum by (pod) (count_over_time({app="shop"} |= "path=/a" %s))`: {keep: func(l string) bool { return strings.Contains(l, "path=/a") }, labels: by("pod"), value: ones, fold: total},
		`sum(rate({app="shop"} !~ "path=/[ab]" != "id=7" %s))`: {keep: func(l string) bool {
			return !strings.Contains(l, "path=/a") && !strings.Contains(l, "path=/b") && !strings.Contains(l, "id=7")
		}, labels: by(), value: ones, fold: perSecond},
		`sum by (pod, namespace) (bytes_rate({app="shop"} %s))`:                                                        {labels: by("pod"), value: func(l string, _ map[string]string) (float64, bool) { return float64(len(l)), true }, fold: perSecond},
		`sum by (status) (count_over_time({app="shop"} | logfmt %s))`:                                                  {labels: by("status"), value: ones, fold: total},
		`sum by (pod, path) (rate({app="shop"} | logfmt %s))`:                                                          {labels: by("pod", "path"), value: ones, fold: perSecond},
		`sum(count_over_time({app="shop"} | logfmt | status >= 400 %s))`:                                               {keep: func(l string) bool { return strings.Contains(l, "status=4") || strings.Contains(l, "status=5") }, labels: by(), value: ones, fold: total},
		`sum by (pod) (sum_over_time({app="shop"} | logfmt | unwrap duration(took) %s))`:                               {labels: by("pod"), value: took, fold: total},
		`sum by (pod) (rate({app="shop"} | logfmt | unwrap duration(took) %s))`:                                        {labels: by("pod"), value: took, fold: perSecond},
		`avg_over_time({app="shop"} | logfmt | unwrap duration_seconds(took) %s) by (path)`:                            {labels: by("path"), value: took, fold: mean},
		`max_over_time({app="shop"} | logfmt | unwrap bytes(size) %s) by (pod)`:                                        {labels: by("pod"), value: sizes, fold: greatest},
		`min_over_time({app="shop"} | logfmt | unwrap bytes(size) %s) by ()`:                                           {labels: by(), value: sizes, fold: least},
		`max by (pod) (max_over_time({app="shop"} | logfmt | unwrap bytes(size) %s))`:                                  {labels: by("pod"), value: sizes, fold: greatest},
		`min(min_over_time({app="shop"} | logfmt | unwrap bytes(size) %s))`:                                            {labels: by(), value: sizes, fold: least},
		`stdvar_over_time({app="shop"} | logfmt | unwrap duration(took) %s) by (pod)`:                                  {labels: by("pod"), value: took, fold: deviation},
		`stddev_over_time({app="shop"} | logfmt | unwrap duration(took) %s) by (pod)`:                                  {labels: by("pod"), value: took, fold: func(v []float64, s float64) float64 { return math.Sqrt(deviation(v, s)) }},
		`quantile_over_time(0.9, {app="shop"} | logfmt | unwrap duration(took) %s) by (path)`:                          {labels: by("path"), value: took, fold: quantileOf(0.9)},
		`quantile_over_time(0.5, {app="shop"} | logfmt | unwrap duration(took) %s) by (pod)`:                           {labels: by("pod"), value: took, fold: quantileOf(0.5)},
		`avg_over_time({app="shop"} | logfmt | keep pod, took | unwrap duration(took) %s)`:                             {labels: by("pod"), value: took, fold: mean},
		`avg_over_time({app="shop"} | logfmt | unwrap duration(took) %s) without (app, trace, status, size, path, id)`: {labels: by("pod"), value: took, fold: mean},
		`count_over_time({app="shop"} | logfmt %s) by (path)`:                                                          {labels: by("path"), value: ones, fold: total},
	} {
		for _, s := range shapes {
			text := "[" + s.window.String() + "]"
			if s.offset != 0 {
				text += " offset " + s.offset.String()
			}
			text = fmt.Sprintf(query, text)
			start, end := testStart.Add(5*time.Minute), testStart.Add(65*time.Minute)
			result, err := engine.Query(context.Background(), Request{Query: text, Start: start, End: end, Step: s.step, Limit: 100})
			require.NoError(t, err, text)
			got := map[int64]map[string]float64{}
			for _, series := range result.Value.(promql.Matrix) {
				for _, p := range series.Floats {
					if got[p.T] == nil {
						got[p.T] = map[string]float64{}
					}
					got[p.T][series.Metric.String()] = p.F
				}
			}
			points := 0
			for at := start; !at.After(end); at = at.Add(s.step) {
				expected := want.at(entries, at.Add(-s.offset), s.window)
				require.Len(t, got[at.UnixMilli()], len(expected), "%s at %s", text, at)
				for key, value := range expected {
					require.InDelta(t, value, got[at.UnixMilli()][key], 1e-9*math.Max(1, math.Abs(value)), "%s of %s at %s", text, key, at)
					points++
				}
			}
			require.Positive(t, points, text)
		}
	}
}

// one returns the values of an instant query by labels.
func one(t *testing.T, engine *Engine, query string, at time.Time) map[string]float64 {
	t.Helper()
	result, err := engine.Query(context.Background(), Request{Query: query, Start: at, End: at, Instant: true, Limit: 100})
	require.NoError(t, err, query)
	out := map[string]float64{}
	switch v := result.Value.(type) {
	case promql.Vector:
		for _, s := range v {
			out[s.Metric.String()] = s.F
		}
	case promql.Scalar:
		out["scalar"] = v.V
	default:
		t.Fatalf("%s gives %T", query, v)
	}
	return out
}

// TestOuter has what stands around the brackets, which Prometheus' engine does.
func TestOuter(t *testing.T) {
	var entries []logstore.Entry
	add := func(n int, app, machine, line string) {
		for i := range n {
			entries = append(entries, logstore.Entry{Time: testStart.Add(time.Duration(i) * time.Second), Line: line, Labels: fields("app", app, "machine", machine)})
		}
	}
	add(10, "foo", "a", "status=200 cost=2")
	add(20, "foo", "b", "status=500 cost=3")
	add(5, "bar", "a", "status=200 cost=4")
	engine := newEngine(t, Limits{}, entries)
	at := testStart.Add(time.Minute - time.Millisecond)
	for query, want := range map[string]map[string]float64{
		`1 + 1`:                                      {"scalar": 2},
		`vector(1)+vector(1)`:                        {"{}": 2},
		`count_over_time({app="foo"}[1m]) > 10`:      {`{app="foo", machine="b"}`: 20},
		`count_over_time({app="foo"}[1m]) > bool 10`: {`{app="foo", machine="a"}`: 0, `{app="foo", machine="b"}`: 1},
		`sum without(app) (count_over_time({app="foo"}[1m])) > sum without(app) (count_over_time({app="bar"}[1m]))`:                    {`{machine="a"}`: 10},
		`sum without(app) (count_over_time({app="foo"}[1m])) > bool sum without(app) (count_over_time({app="bar"}[1m]))`:               {`{machine="a"}`: 1},
		`max by(machine) (count_over_time({app="foo"}[1m])) > bool ignoring(machine) group_left avg(count_over_time({app="foo"}[1m]))`: {`{machine="a"}`: 0, `{machine="b"}`: 1},
		`sum by(machine) (count_over_time({app="foo"}[1m])) / on() group_left sum(count_over_time({app="foo"}[1m]))`:                   {`{machine="a"}`: 1. / 3, `{machine="b"}`: 2. / 3},
		`count_over_time({app=~"foo|bar"}[1m]) and count_over_time({app="bar"}[1m])`:                                                   {`{app="bar", machine="a"}`: 5},
		`count_over_time({app=~"foo|bar"}[1m]) unless count_over_time({app="foo"}[1m])`:                                                {`{app="bar", machine="a"}`: 5},
		`sum(count_over_time({app="none"}[1m])) or vector(0)`:                                                                          {`{}`: 0},
		`topk(1, sum by (app) (count_over_time({app=~".+"}[1m])))`:                                                                     {`{app="foo"}`: 30},
		`approx_topk(1, sum by (app) (count_over_time({app=~".+"}[1m])))`:                                                              {`{app="foo"}`: 30},
		`bottomk(1, sum by (app) (count_over_time({app=~".+"}[1m])))`:                                                                  {`{app="bar"}`: 5},
		`count(count_over_time({app=~".+"}[1m]))`:                                                                                      {`{}`: 3},
		`avg by (app) (count_over_time({app=~".+"}[1m]))`:                                                                              {`{app="foo"}`: 15, `{app="bar"}`: 5},
		`stddev(count_over_time({app="foo"}[1m]))`:                                                                                     {`{}`: 5},
		`label_replace(sum by (app) (count_over_time({app="bar"}[1m])), "foo", "$1", "app", "(b).*")`:                                  {`{app="bar", foo="b"}`: 5},
		`sum by (app, status) (count_over_time({app=~".+"} | logfmt [5m])) / on (app) group_left sum by (app) (count_over_time({app=~".+"} | logfmt [5m]))`: {
			`{app="foo", status="200"}`: 1. / 3, `{app="foo", status="500"}`: 2. / 3, `{app="bar", status="200"}`: 1},
		`sum by (app) (count_over_time({app="foo"}[1m])) * on (app) group_left(machine) max_over_time({app="foo", machine="b"} | logfmt | unwrap cost [5m]) by (app, machine)`: {`{app="foo", machine="b"}`: 90},
		`absent_over_time({app="none", x=~"y"}[1m])`:                                                  {`{app="none"}`: 1},
		`absent_over_time({app="foo"}[1m])`:                                                           {},
		`first_over_time({app="foo", machine="b"} | logfmt | unwrap cost [1m]) by (app)`:              {`{app="foo"}`: 3},
		`last_over_time({app=~".+"} | logfmt | unwrap cost [1m]) by ()`:                               {`{}`: 3},
		`2 * sum(count_over_time({app="bar"}[1m])) ^ 2 - 1`:                                           {`{}`: 49},
		`sum(count_over_time({app="foo"} |= "status" [1m] offset 30s))`:                               {`{}`: 30},
		`sum(count_over_time({app="foo"}[1m] offset 1h)) or vector(-1)`:                               {`{}`: -1},
		`sum by (detected_level) (count_over_time({app="foo"}[1m]))`:                                  {`{detected_level="unknown"}`: 30},
		`sum by (nothing) (count_over_time({app="foo"} | json | __error__!="" [1m]))`:                 {`{}`: 30},
		`count_over_time({app="bar"} | json | __error__=~".*" | drop __error__ [1m])`:                 {`{app="bar", machine="a"}`: 5},
		`sum(count_over_time({app="foo"} | json | __error__="" [1m])) or vector(0)`:                   {`{}`: 0},
		`sum by (__error__) (count_over_time({app="foo"} | logfmt | cost > 1s | __error__!="" [1m]))`: {`{__error__="LabelFilterErr"}`: 30},
		`sum(sum_over_time({app="foo"} | logfmt | unwrap duration(cost) | __error__=~".+" [1m]))`:     {`{}`: 0},
		`sum by (status) (count_over_time({app="foo"} | label_format status="{{.none}}" [1m]))`:       {`{}`: 30},
	} {
		got := one(t, engine, query, at)
		require.Len(t, got, len(want), "%s: %v", query, got)
		for key, value := range want {
			require.InDelta(t, value, got[key], 1e-9, "%s: %v", query, got)
		}
	}

	// The order of sort is the result's.
	result, err := engine.Query(context.Background(), Request{Query: `sort_desc(count_over_time({app=~".+"}[1m]))`, Start: at, End: at, Instant: true})
	require.NoError(t, err)
	var values []float64
	for _, s := range result.Value.(promql.Vector) {
		values = append(values, s.F)
	}
	require.Equal(t, []float64{20, 10, 5}, values)

	for query, want := range map[string]string{
		`count_over_time({app="foo"} | json [1m])`:                                     `pipeline error: 'JSONParserErr' for series: '{`,
		`sum(count_over_time({app="foo"} | json | __error__="" or machine="a" [1m]))`:  `pipeline error: 'JSONParserErr'`,
		`sum_over_time({app="foo"} | logfmt | unwrap duration(cost) [1m])`:             `pipeline error: 'SampleExtractionErr'`,
		`count_over_time({app="foo"}[1m]) + on (app) count_over_time({app="foo"}[1m])`: `many-to-many matching`,
		`{app="foo"}`: `log queries are not supported as an instant query type`,
	} {
		_, err := engine.Query(context.Background(), Request{Query: query, Start: at, End: at, Instant: true})
		require.ErrorContains(t, err, want, query)
		require.True(t, Refused(err), query)
	}
}

// TestRateCounter has a counter that begins again.
func TestRateCounter(t *testing.T) {
	var entries []logstore.Entry
	value := 0
	for i := range 60 {
		if value += 10; i == 30 {
			value = 5
		}
		entries = append(entries, logstore.Entry{Time: testStart.Add(time.Duration(i) * 10 * time.Second), Line: fmt.Sprintf("n=%d", value), Labels: fields("app", "a")})
	}
	engine := newEngine(t, Limits{}, entries)
	got := one(t, engine, `rate_counter({app="a"} | logfmt | unwrap n [5m] offset 1m)`, testStart.Add(11*time.Minute-10*time.Second))
	require.InDelta(t, 1, got[`{app="a"}`], 0.05)
}

// TestAbsent has a hole in the lines.
func TestAbsent(t *testing.T) {
	var entries []logstore.Entry
	for i := range 60 {
		if i < 20 || i >= 40 {
			entries = append(entries, logstore.Entry{Time: testStart.Add(time.Duration(i) * time.Minute), Line: "x", Labels: fields("app", "a")})
		}
	}
	engine := newEngine(t, Limits{}, entries)
	result, err := engine.Query(context.Background(), Request{Query: `absent_over_time({app="a"}[5m])`, Start: testStart, End: testStart.Add(59 * time.Minute), Step: time.Minute})
	require.NoError(t, err)
	matrix := result.Value.(promql.Matrix)
	require.Len(t, matrix, 1)
	require.Equal(t, `{app="a"}`, matrix[0].Metric.String())
	require.Len(t, matrix[0].Floats, 16)
	require.Equal(t, testStart.Add(24*time.Minute).UnixMilli(), matrix[0].Floats[0].T)
	require.Equal(t, promql.FPoint{T: testStart.Add(39 * time.Minute).UnixMilli(), F: 1}, matrix[0].Floats[15])
}

// TestLimits has queries that ask for too much, each of something else.
func TestLimits(t *testing.T) {
	var entries []logstore.Entry
	for i := range 1000 {
		entries = append(entries, logstore.Entry{Time: testStart.Add(time.Duration(i) * time.Second), Line: fmt.Sprintf("n=%d ", i) + strings.Repeat("x", 100), Labels: fields("app", "a")})
	}
	hour := Request{Start: testStart, End: testStart.Add(time.Hour), Step: time.Minute, Limit: 10}
	for want, c := range map[string]struct {
		query  string
		limits Limits
		change func(*Request)
	}{
		`maximum of series (100) reached for a single query`:                          {query: `count_over_time({app="a"} | logfmt [5m])`, limits: Limits{Series: 100}},
		`more than 500 lines`:                                                         {query: `count_over_time({app="a"}[5m])`, limits: Limits{Read: 500}},
		`would read more than 400 lines`:                                              {query: `{app="a"} |= "n=7" |= "nothing" or "else"`, limits: Limits{Read: 400}, change: func(r *Request) { r.Query = `{app="a"} | json | logfmt | none="x"` }},
		`more than 99 numbers in its range`:                                           {query: `avg_over_time({app="a"} | logfmt | unwrap n [5m]) by ()`, limits: Limits{Waiting: 99}},
		`gives more than 10 values`:                                                   {query: `count_over_time({app="a"}[5m])`, limits: Limits{Samples: 10}},
		`exceeded maximum resolution of 11,000`:                                       {query: `count_over_time({app="a"}[5m])`, change: func(r *Request) { r.Step = 100 * time.Millisecond }},
		`zero or negative query resolution`:                                           {query: `count_over_time({app="a"}[5m])`, change: func(r *Request) { r.Step = 0 }},
		`the query time range exceeds the limit (query length: 1h0m0s, limit: 30m0s)`: {query: `{app="a"}`, limits: Limits{Span: 30 * time.Minute}},
		`limit: 10m0s)`:                                                               {query: `count_over_time({app="a"}[30m])`, limits: Limits{Span: 10 * time.Minute}, change: func(r *Request) { r.Start = r.End.Add(-time.Minute) }},
		`max entries limit per query exceeded, limit > max_entries_limit_per_query (10 > 5)`: {query: `{app="a"}`, limits: Limits{Entries: 5}},
		`end timestamp must not be before`:                                                   {query: `{app="a"}`, change: func(r *Request) { r.Start = r.End.Add(1) }},
		`the query took longer than 1ns`:                                                     {query: `{app="a"} |= "x"`, limits: Limits{Time: 1}},
	} {
		request := hour
		request.Query = c.query
		if c.change != nil {
			c.change(&request)
		}
		_, err := newEngine(t, c.limits, entries).Query(context.Background(), request)
		require.ErrorContains(t, err, want, c.query)
		require.True(t, Refused(err), "%s: %s", c.query, err)
	}

	// Lines that are too many bytes end the answer, and it says so.
	request := hour
	request.Query, request.Limit = `{app="a"}`, 1000
	result, err := newEngine(t, Limits{ResultBytes: 10_000}, entries).Query(context.Background(), request)
	require.NoError(t, err)
	require.NotEmpty(t, result.Warnings)
	require.Less(t, result.Stats.Entries, 100)

	// Who asked has gone away.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = newEngine(t, Limits{}, entries).Query(ctx, request)
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, Refused(err))
}

func TestLines(t *testing.T) {
	entries := traffic()
	engine := newEngine(t, Limits{}, entries)
	request := Request{Query: `{app="shop"}`, Start: testStart, End: testStart.Add(2 * time.Hour), Limit: 100, Direction: Forward}
	result, err := engine.Query(context.Background(), request)
	require.NoError(t, err)
	require.Equal(t, 100, result.Stats.Entries)
	seen := map[string]bool{}
	for _, stream := range result.Streams {
		for i, line := range stream.Entries {
			seen[line.Text] = true
			require.Equal(t, "app", stream.Stream[0].Name)
			require.Len(t, line.Metadata, 2) // trace and detected_level
			require.True(t, i == 0 || !line.Time.Before(stream.Entries[i-1].Time))
		}
	}
	for _, e := range entries[:100] {
		require.True(t, seen[e.Line], e.Line)
	}

	// The newest first, from the pipeline, with filters that the store does and ones that it cannot do.
	for _, query := range []string{
		`{app="shop"} |= "status=5" |~ "path=/[ab]" != "id=7" | logfmt`,
		`{app="shop"} | logfmt | status >= 500 and path=~"/a|/b" and id!~"7.*"`,
		`{app="shop"} | logfmt | line_format "{{.status}} {{.path}} {{.id}}" |> "5<_> /<_> <_>" !~ "/c|/. 7"`,
	} {
		request.Query, request.Direction = query, Backward
		result, err = engine.Query(context.Background(), request)
		require.NoError(t, err)
		var want, got []time.Time
		for i := len(entries) - 1; i >= 0 && len(want) < 100; i-- {
			l := entries[i].Line
			if strings.Contains(l, "status=5") && !strings.Contains(l, "path=/c") && !strings.Contains(l, "id=7") {
				want = append(want, entries[i].Time)
			}
		}
		for _, stream := range result.Streams {
			for _, line := range stream.Entries {
				got = append(got, line.Time)
			}
		}
		slices.SortFunc(got, func(a, b time.Time) int { return b.Compare(a) })
		require.Len(t, got, len(want), query)
		for i := range want {
			require.True(t, want[i].Equal(got[i]), query)
		}
	}

	// The end is not included, the start is.
	at := entries[500].Time
	request.Query, request.Start, request.End = `{app="shop"}`, at, at
	result, err = engine.Query(context.Background(), request)
	require.NoError(t, err)
	require.Empty(t, result.Streams)
	request.End = at.Add(1)
	result, err = engine.Query(context.Background(), request)
	require.NoError(t, err)
	require.NotEmpty(t, result.Streams)

	// With an interval, lines that follow too soon are left out.
	request.Start, request.End, request.Interval, request.Direction = testStart, testStart.Add(2*time.Hour), 5*time.Minute, Forward
	result, err = engine.Query(context.Background(), request)
	require.NoError(t, err)
	require.InDelta(t, 12, result.Stats.Entries, 2)

	request.Interval, request.Limit = 0, 0
	result, err = engine.Query(context.Background(), request)
	require.NoError(t, err)
	require.Empty(t, result.Streams)
}

// TestHostile has names and values that would break out of the engine's query, if they were put into its text.
func TestHostile(t *testing.T) {
	hostile := `"}) or vector(1) #` + "\n\\"
	engine := newEngine(t, Limits{}, []logstore.Entry{
		{Time: testStart, Line: `{"__name__":"up","a":` + strconv.Quote(`"}) or vector(1)`) + `}`, Labels: fields("app", hostile)},
	})
	got := one(t, engine, `sum by (a, app) (count_over_time({app=~".+"} | json [1m])) * 2`, testStart.Add(time.Second))
	require.Len(t, got, 1)
	for key, value := range got {
		require.Equal(t, 2., value)
		require.Contains(t, key, strconv.Quote(hostile))
	}
	got = one(t, engine, `label_replace(count_over_time({app=~".+"} | json | __error__="" [1m]), "x", "`+`\"}) or (`+`", "app", "(?s:.*)")`, testStart.Add(time.Second))
	require.Len(t, got, 1)
	for key := range got {
		require.NotContains(t, key, "__name__")
		require.Contains(t, key, `x="\"}) or ("`)
	}
}

// TestRepeatedLabels has label_replace that makes labels longer than there is memory for.
func TestRepeatedLabels(t *testing.T) {
	replace := func(inner string, times int) string {
		return `label_replace(` + inner + `, "app", "` + strings.Repeat("$1", times) + `", "app", "(.*)")`
	}
	var entries []logstore.Entry
	for i := range 400 {
		entries = append(entries, logstore.Entry{Time: testStart, Line: "a", Labels: fields("app", strings.Repeat("x", 1000)+strconv.Itoa(i))})
	}
	engine := newEngine(t, Limits{}, entries)
	count := func(selector string) string { return `count_over_time({app=~"` + selector + `"}[1m])` }
	for query, problem := range map[string]string{
		replace(count(".+"), 2):                           "",
		replace(replace(count(".+"), 2), 2):               "",
		replace(count(".+1"), 60):                         "",
		replace(count(".+"), 60):                          "select fewer series",
		replace(count(".+"), 2000):                        "repeat labels too often",
		replace(replace(count(".+"), 10), 10):             "repeat labels too often",
		`sum by (app) (` + replace("vector(1)", 70) + `)`: "repeat labels too often",
	} {
		_, err := engine.Query(t.Context(), Request{Query: query, Start: testStart.Add(time.Second), End: testStart.Add(time.Second), Instant: true, Limit: 100})
		if problem == "" {
			require.NoError(t, err, "%.100s", query)
			continue
		}
		require.ErrorContains(t, err, problem, "%.100s", query)
	}
}

// TestTranslation checks that what is written for Prometheus' engine is PromQL, whatever was parsed.
func TestTranslation(t *testing.T) {
	promql := parser.NewParser(parser.Options{})
	for _, query := range append(append([]string{}, documented...), more...) {
		expr, err := Parse(query)
		require.NoError(t, err)
		if _, ok := expr.(*LogExpr); ok {
			continue
		}
		text := (&translation{}).write(expr)
		_, err = promql.ParseExpr(text)
		require.NoError(t, err, "%s\nof %s", text, query)
	}
}

// TestCounted says which queries the store counts.
func TestCounted(t *testing.T) {
	for query, want := range map[string]bool{
		`sum(count_over_time({a="b"}[5m]))`:                                     true,
		`sum by (pod) (rate({a="b"} |= "x" != "y" |~ "z" [5m]))`:                true,
		`sum by (namespace, workload) (bytes_over_time({a="b"}[5m] offset 1h))`: true,
		`sum(count_over_time({a="b"} |= "" [5m]))`:                              true,
		`sum by (container) (rate({a="b"}[5m]))`:                                false,
		`sum without (pod) (rate({a="b"}[5m]))`:                                 false,
		`count_over_time({a="b"}[5m])`:                                          false,
		`max(count_over_time({a="b"}[5m]))`:                                     false,
		`sum(count_over_time({a="b"} |= "x" or "y" [5m]))`:                      false,
		`sum(count_over_time({a="b"} | json [5m]))`:                             false,
		`sum(count_over_time({a="b"} | line_format "x" |= "x" [5m]))`:           false,
		`sum(count_over_time({a="b"} |= ip("10.0.0.1") [5m]))`:                  false,
		`sum(sum_over_time({a="b"} | unwrap x [5m]))`:                           false,
		`sum(count_over_time({a="b"}[1234567ns]))`:                              false,
	} {
		expr, err := Parse(query)
		require.NoError(t, err)
		tr := &translation{grid: grid{start: testStart.UnixMilli(), step: 30_000, count: 100}}
		tr.write(expr)
		l := tr.leaves[0]
		_, ok := (&evaluation{leaf: l, grid: tr.grid, offset: int64(l.rangeExpr.offset)}).counted()
		require.Equal(t, want, ok, query)
	}
}
