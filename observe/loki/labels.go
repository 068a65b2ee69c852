package loki

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"

	"polymesh.dev/polymesh/observe/logql"
	"polymesh.dev/polymesh/observe/logstore"
)

// labelSpan is the default time span of requests for labels.
const labelSpan = 6 * time.Hour

// selector parses a parameter with a selector of streams; an empty one selects all.
func (r *request) selector(name string) ([]*labels.Matcher, error) {
	if r.form.Get(name) == "" {
		return nil, nil
	}
	return logql.ParseMatchers(r.form.Get(name))
}

// some returns [] instead of null, which clients do not expect.
func some[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (l *Loki) labels(r *request) (any, error) {
	start, end, err := r.span(labelSpan)
	if err != nil {
		return nil, err
	}
	matchers, err := r.selector("query")
	if err != nil {
		return nil, err
	}
	names, err := l.opts.Store.LabelNames(r.ctx, logql.Matchers(matchers), start, end)
	return success(some(names)), err
}

func (l *Loki) labelValues(r *request) (any, error) {
	start, end, err := r.span(labelSpan)
	if err != nil {
		return nil, err
	}
	matchers, err := r.selector("query")
	if err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	if !logstore.ValidName(name) {
		return nil, invalid("%.40q is not a valid label name", name)
	}
	values, err := l.opts.Store.LabelValues(r.ctx, name, logql.Matchers(matchers), start, end)
	return success(some(values)), err
}

// maxSelectors is how many match[] a request may have.
const maxSelectors = 32

func (l *Loki) series(r *request) (any, error) {
	start, end, err := r.span(labelSpan)
	if err != nil {
		return nil, err
	}
	selectors := append(slices.Clone(r.form["match"]), r.form["match[]"]...)
	if len(selectors) == 0 {
		selectors = []string{"{}"}
	}
	if len(selectors) > maxSelectors {
		return nil, invalid("the request has more than %d match[]", maxSelectors)
	}
	out := []map[string]string{}
	seen := map[string]bool{}
	for _, s := range selectors {
		matchers, err := logql.ParseMatchers(s)
		if err != nil {
			return nil, err
		}
		found, err := l.opts.Store.Series(r.ctx, logql.Matchers(matchers), start, end)
		if err != nil {
			return nil, err
		}
		for _, fields := range found {
			if key := fmt.Sprintf("%q", fields); !seen[key] {
				seen[key] = true
				out = append(out, fieldMap(fields))
			}
		}
	}
	return success(out), nil
}

func fieldMap(fields []logstore.Field) map[string]string {
	m := make(map[string]string, len(fields))
	for _, f := range fields {
		m[f.Name] = f.Value
	}
	return m
}

// selected parses the selector of a request for volumes or statistics.
func (r *request) selected() (string, []*labels.Matcher, error) {
	query := r.form.Get("query")
	if query == "" {
		return "", nil, invalid("the parameter query is required")
	}
	matchers, err := logql.ParseMatchers(query)
	if err != nil {
		// Clients send whole queries, too; only their streams count.
		log, errLog := logql.ParseLog(query)
		if errLog != nil {
			return "", nil, err
		}
		matchers = log.Matchers
	}
	if len(matchers) == 0 {
		matchers = []*labels.Matcher{labels.MustNewMatcher(labels.MatchRegexp, "job", ".+")} // every stream of the platform has one
	}
	return (&logql.LogExpr{Matchers: matchers}).String(), matchers, nil
}

// instant evaluates a query at the end of a span.
func (l *Loki) instant(r *request, query string, end time.Time) (promql.Vector, error) {
	result, err := l.engine.Query(r.ctx, logql.Request{Query: query, Start: end, End: end, Instant: true})
	if err != nil {
		return nil, err
	}
	vector, _ := result.Value.(promql.Vector)
	return vector, nil
}

// window writes a span as the range of a query.
func window(start, end time.Time) string {
	return "[" + max(end.Sub(start), time.Millisecond).Truncate(time.Millisecond).String() + "]"
}

func (l *Loki) indexStats(r *request) (any, error) {
	start, end, err := r.span(time.Hour)
	if err != nil {
		return nil, err
	}
	selector, matchers, err := r.selected()
	if err != nil {
		return nil, err
	}
	streams, err := l.opts.Store.Series(r.ctx, logql.Matchers(matchers), start, end)
	if err != nil {
		return nil, err
	}
	out := map[string]int64{"streams": int64(len(streams)), "chunks": 0, "entries": 0, "bytes": 0}
	for name, function := range map[string]string{"entries": "count_over_time", "bytes": "bytes_over_time"} {
		vector, err := l.instant(r, "sum("+function+"("+selector+window(start, end)+"))", end)
		if err != nil {
			return nil, err
		}
		for _, s := range vector {
			out[name] = int64(s.F)
		}
	}
	return out, nil
}

// volumeQuery returns a query for the bytes of a selector's streams, by the requested labels.
func (r *request) volumeQuery(window string) (query string, byLabel bool, err error) {
	selector, matchers, err := r.selected()
	if err != nil {
		return "", false, err
	}
	var names []string
	if targets := r.form.Get("targetLabels"); targets != "" {
		names = strings.Split(targets, ",")
	} else {
		for _, m := range matchers {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	for i, n := range names {
		names[i] = strings.TrimSpace(n)
		if !logstore.ValidName(names[i]) {
			return "", false, invalid("%.40q is not a valid label name", n)
		}
	}
	byLabel = r.form.Get("aggregateBy") == "labels"
	return "sum by (" + strings.Join(names, ", ") + ") (bytes_over_time(" + selector + window + "))", byLabel, nil
}

func (l *Loki) volume(r *request) (any, error) {
	start, end, err := r.span(time.Hour)
	if err != nil {
		return nil, err
	}
	limit, err := r.limit()
	if err != nil {
		return nil, err
	}
	query, byLabel, err := r.volumeQuery(window(start, end))
	if err != nil {
		return nil, err
	}
	vector, err := l.instant(r, query, end)
	if err != nil {
		return nil, err
	}
	out := make([]sampleJSON, 0, len(vector))
	if byLabel {
		bytes := map[string]float64{}
		for _, s := range vector {
			s.Metric.Range(func(label labels.Label) { bytes[label.Name] += s.F })
		}
		vector = vector[:0]
		for name, n := range bytes {
			vector = append(vector, promql.Sample{Metric: labels.FromStrings(name, ""), T: end.UnixMilli(), F: n})
		}
	}
	slices.SortFunc(vector, func(a, b promql.Sample) int {
		return cmp.Or(cmp.Compare(b.F, a.F), labels.Compare(a.Metric, b.Metric))
	})
	for _, s := range vector[:min(limit, len(vector))] {
		out = append(out, sampleJSON{Metric: metric(s.Metric), Value: pair(s.T, s.F)})
	}
	return success(queryData{ResultType: "vector", Result: out}), nil
}

func (l *Loki) volumeRange(r *request) (any, error) {
	start, end, err := r.span(time.Hour)
	if err != nil {
		return nil, err
	}
	step, err := r.step(start, end)
	if err != nil {
		return nil, err
	}
	limit, err := r.limit()
	if err != nil {
		return nil, err
	}
	query, _, err := r.volumeQuery("[" + step.String() + "]")
	if err != nil {
		return nil, err
	}
	result, err := l.engine.Query(r.ctx, logql.Request{Query: query, Start: start, End: end, Step: step})
	if err != nil {
		return nil, err
	}
	matrix, _ := result.Value.(promql.Matrix)
	out := make([]seriesJSON, 0, len(matrix))
	for _, s := range matrix[:min(limit, len(matrix))] {
		one := seriesJSON{Metric: metric(s.Metric)}
		for _, p := range s.Floats {
			one.Values = append(one.Values, pair(p.T, p.F))
		}
		out = append(out, one)
	}
	return success(queryData{ResultType: "matrix", Result: out, Stats: statsOf(result.Stats)}), nil
}

// detectedLabels returns the labels of streams and the number of their values.
func (l *Loki) detectedLabels(r *request) (any, error) {
	start, end, err := r.span(labelSpan)
	if err != nil {
		return nil, err
	}
	matchers, err := r.selector("query")
	if err != nil {
		return nil, err
	}
	found, err := l.opts.Store.Series(r.ctx, logql.Matchers(matchers), start, end)
	if err != nil {
		return nil, err
	}
	values := map[string]map[string]bool{}
	for _, fields := range found {
		for _, f := range fields {
			if values[f.Name] == nil {
				values[f.Name] = map[string]bool{}
			}
			values[f.Name][f.Value] = true
		}
	}
	type detected struct {
		Label       string `json:"label"`
		Cardinality int    `json:"cardinality"`
	}
	out := []detected{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		out = append(out, detected{name, len(values[name])})
	}
	return map[string]any{"detectedLabels": out}, nil
}

// detectedField is a field of lines.
type detectedField struct {
	Label       string   `json:"label"`
	Type        string   `json:"type"`
	Cardinality int      `json:"cardinality"`
	Parsers     []string `json:"parsers"`
	values      map[string]bool
}

const (
	// detectLines is how many lines are examined, maxFields and maxValues bound what is kept of them.
	detectLines = 500
	maxFields   = 1000
	maxValues   = 1000
)

// detect finds the fields in the newest lines of a query.
func (l *Loki) detect(r *request) (map[string]*detectedField, error) {
	start, end, err := r.span(time.Hour)
	if err != nil {
		return nil, err
	}
	log, err := logql.ParseLog(r.form.Get("query"))
	if err != nil {
		return nil, err
	}
	fields := map[string]*detectedField{}
	note := func(parser string, from []logql.Label) {
		for _, label := range from {
			if strings.HasPrefix(label.Name, "__error") {
				continue
			}
			f := fields[label.Name]
			if f == nil {
				if len(fields) == maxFields {
					continue
				}
				f = &detectedField{Label: label.Name, values: map[string]bool{}}
				fields[label.Name] = f
			}
			if parser != "" && !slices.Contains(f.Parsers, parser) {
				f.Parsers = append(f.Parsers, parser)
			}
			if len(f.values) < maxValues {
				f.values[label.Value] = true
			}
		}
	}
	for _, parser := range []string{"json", "logfmt"} {
		result, err := l.engine.Query(r.ctx, logql.Request{Query: log.String() + " | " + parser, Start: start, End: end, Limit: min(detectLines, l.engine.Limits().Entries)})
		if err != nil {
			return nil, err
		}
		for _, stream := range result.Streams {
			for _, line := range stream.Entries {
				note("", line.Metadata)
				if (parser == "json") == strings.HasPrefix(strings.TrimSpace(line.Text), "{") {
					note(parser, line.Parsed)
				}
			}
		}
	}
	for _, f := range fields {
		f.Cardinality, f.Type = len(f.values), typeOf(f.values)
	}
	return fields, nil
}

// typeOf guesses the common type of all values.
func typeOf(values map[string]bool) string {
	is := map[string]func(string) error{
		"int":      func(s string) error { _, err := strconv.ParseInt(s, 10, 64); return err },
		"float":    func(s string) error { _, err := strconv.ParseFloat(s, 64); return err },
		"boolean":  func(s string) error { _, err := strconv.ParseBool(s); return err },
		"duration": func(s string) error { _, err := time.ParseDuration(s); return err },
	}
	for _, kind := range []string{"int", "float", "boolean", "duration"} {
		all := true
		for v := range values {
			if all = all && is[kind](v) == nil; !all {
				break
			}
		}
		if all {
			return kind
		}
	}
	return "string"
}

func (l *Loki) detectedFields(r *request) (any, error) {
	fields, err := l.detect(r)
	if err != nil {
		return nil, err
	}
	limit, err := r.limit()
	if err != nil {
		return nil, err
	}
	out := []*detectedField{}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if len(out) < limit {
			out = append(out, fields[name])
		}
	}
	return map[string]any{"fields": out, "limit": limit}, nil
}

func (l *Loki) detectedValues(r *request) (any, error) {
	fields, err := l.detect(r)
	if err != nil {
		return nil, err
	}
	limit, err := r.limit()
	if err != nil {
		return nil, err
	}
	values := []string{}
	if f := fields[r.PathValue("name")]; f != nil {
		values = slices.Sorted(maps.Keys(f.values))
	}
	return map[string]any{"values": values[:min(limit, len(values))], "limit": limit}, nil
}

// patterns returns none: they are not detected when lines are stored.
func (l *Loki) patterns(r *request) (any, error) {
	if _, _, err := r.selected(); err != nil {
		return nil, err
	}
	return success([]any{}), nil
}
