package loki

import (
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"

	"polymesh.dev/polymesh/observe/logql"
)

// answer is the common form of all results.
type answer struct {
	Status   string   `json:"status"`
	Data     any      `json:"data"`
	Warnings []string `json:"warnings,omitempty"`
}

func success(data any) answer { return answer{Status: "success", Data: data} }

// queryData is the answer of a query.
type queryData struct {
	ResultType    string   `json:"resultType"`
	Result        any      `json:"result"`
	EncodingFlags []string `json:"encodingFlags,omitempty"`
	Stats         stats    `json:"stats"`
}

// stats has the figures that Loki's clients show. There are no ingesters and no chunks here.
type stats struct {
	Summary  summary  `json:"summary"`
	Querier  querier  `json:"querier"`
	Ingester struct{} `json:"ingester"`
}

type querier struct {
	Store struct{} `json:"store"`
}

type summary struct {
	BytesProcessedPerSecond int64   `json:"bytesProcessedPerSecond"`
	LinesProcessedPerSecond int64   `json:"linesProcessedPerSecond"`
	TotalBytesProcessed     int64   `json:"totalBytesProcessed"`
	TotalLinesProcessed     int64   `json:"totalLinesProcessed"`
	ExecTime                float64 `json:"execTime"`
	QueueTime               float64 `json:"queueTime"`
	Subqueries              int     `json:"subqueries"`
	TotalEntriesReturned    int     `json:"totalEntriesReturned"`
}

func statsOf(s logql.Stats) stats {
	seconds := max(s.Took.Seconds(), 1e-9)
	return stats{Summary: summary{
		BytesProcessedPerSecond: int64(float64(s.Bytes) / seconds), LinesProcessedPerSecond: int64(float64(s.Lines) / seconds),
		TotalBytesProcessed: s.Bytes, TotalLinesProcessed: s.Lines, ExecTime: s.Took.Seconds(), TotalEntriesReturned: s.Entries,
	}}
}

func (l *Loki) query(r *request) (any, error) {
	at := r.now
	if s := r.form.Get("time"); s != "" {
		var err error
		if at, err = parseTime(s); err != nil {
			return nil, invalid("could not parse 'time' parameter: %s", err)
		}
	}
	limit, err := r.limit()
	if err != nil {
		return nil, err
	}
	direction, err := r.direction()
	if err != nil {
		return nil, err
	}
	return l.ask(r, logql.Request{Query: r.form.Get("query"), Start: at, End: at, Instant: true, Limit: limit, Direction: direction})
}

func (l *Loki) queryRange(r *request) (any, error) {
	start, end, err := r.span(time.Hour)
	if err != nil {
		return nil, err
	}
	step, errStep := r.step(start, end)
	interval, errInterval := r.interval()
	limit, errLimit := r.limit()
	direction, errDirection := r.direction()
	for _, err := range []error{errStep, errInterval, errLimit, errDirection} {
		if err != nil {
			return nil, err
		}
	}
	return l.ask(r, logql.Request{Query: r.form.Get("query"), Start: start, End: end, Step: step, Interval: interval, Limit: limit, Direction: direction})
}

func (l *Loki) ask(r *request, q logql.Request) (any, error) {
	result, err := l.engine.Query(r.ctx, q)
	if err != nil {
		return nil, err
	}
	data := queryData{Stats: statsOf(result.Stats)}
	switch v := result.Value.(type) {
	case nil:
		data.ResultType = "streams"
		split := categorized(r.Header)
		if split {
			data.EncodingFlags = []string{categorizeLabels}
		}
		data.Result = streams(result.Streams, split, q.Direction)
	case promql.Vector:
		data.ResultType = "vector"
		out := make([]sampleJSON, 0, len(v))
		for _, s := range v {
			out = append(out, sampleJSON{Metric: metric(s.Metric), Value: pair(s.T, s.F)})
		}
		data.Result = out
	case promql.Matrix:
		data.ResultType = "matrix"
		out := make([]seriesJSON, 0, len(v))
		for _, s := range v {
			values := make([]json.RawMessage, 0, len(s.Floats))
			for _, p := range s.Floats {
				values = append(values, pair(p.T, p.F))
			}
			out = append(out, seriesJSON{Metric: metric(s.Metric), Values: values})
		}
		data.Result = out
	case promql.Scalar:
		data.ResultType = "scalar"
		data.Result = pair(v.T, v.V)
	default:
		return nil, errors.New("the query's result is of a kind that Loki does not have")
	}
	return answer{Status: "success", Data: data, Warnings: result.Warnings}, nil
}

type sampleJSON struct {
	Metric map[string]string `json:"metric"`
	Value  json.RawMessage   `json:"value"`
}

type seriesJSON struct {
	Metric map[string]string `json:"metric"`
	Values []json.RawMessage `json:"values"`
}

func metric(l labels.Labels) map[string]string { return l.Map() }

// pair is a time in seconds and a number as text.
func pair(ms int64, value float64) json.RawMessage {
	b := append(make([]byte, 0, 40), '[')
	b = strconv.AppendFloat(b, float64(ms)/1000, 'f', -1, 64)
	b = append(b, `,"`...)
	b = strconv.AppendFloat(b, value, 'f', -1, 64)
	return append(b, `"]`...)
}

// streamJSON is a stream of lines. A value is [time, line], and what belongs to the line alone if that was asked for.
type streamJSON struct {
	Stream map[string]string `json:"stream"`
	Values [][]any           `json:"values"`
	key    string
}

type lineLabels struct {
	StructuredMetadata map[string]string `json:"structuredMetadata,omitempty"`
	Parsed             map[string]string `json:"parsed,omitempty"`
}

func streams(from []logql.Stream, split bool, direction logql.Direction) []*streamJSON {
	out := make([]*streamJSON, 0, len(from))
	if !split {
		for _, s := range from {
			stream := &streamJSON{Stream: labelMap(s.Labels)}
			for _, line := range s.Entries {
				stream.Values = append(stream.Values, []any{nanoseconds(line.Time), line.Text})
			}
			out = append(out, stream)
		}
		return out
	}
	// Streams that only differ in the metadata of lines are merged, in the order of time.
	lines := map[string][]logql.Line{}
	for _, s := range from {
		named := labelMap(s.Stream)
		key, _ := json.Marshal(named) // a map of texts has JSON, with its names sorted
		if _, known := lines[string(key)]; !known {
			out = append(out, &streamJSON{Stream: named, key: string(key)})
		}
		lines[string(key)] = append(lines[string(key)], s.Entries...)
	}
	for _, stream := range out {
		of := lines[stream.key]
		slices.SortStableFunc(of, func(a, b logql.Line) int {
			if direction == logql.Forward {
				return a.Time.Compare(b.Time)
			}
			return b.Time.Compare(a.Time)
		})
		for _, line := range of {
			stream.Values = append(stream.Values, []any{nanoseconds(line.Time), line.Text, lineLabels{labelMap(line.Metadata), labelMap(line.Parsed)}})
		}
	}
	return out
}

func nanoseconds(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) }

func labelMap(from []logql.Label) map[string]string {
	m := make(map[string]string, len(from))
	for _, l := range from {
		m[l.Name] = l.Value
	}
	return m
}
