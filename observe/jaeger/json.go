package jaeger

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"

	"polymesh.dev/polymesh/observe/tracestore"
)

// The JSON of Jaeger's UI.
type (
	trace struct {
		TraceID   string             `json:"traceID"`
		Spans     []span             `json:"spans"`
		Processes map[string]process `json:"processes"`
		Warnings  []string           `json:"warnings"`
	}
	span struct {
		TraceID       string      `json:"traceID"`
		SpanID        string      `json:"spanID"`
		OperationName string      `json:"operationName"`
		References    []reference `json:"references"`
		StartTime     int64       `json:"startTime"` // in microseconds
		Duration      int64       `json:"duration"`
		Tags          []tag       `json:"tags"`
		Logs          []logEntry  `json:"logs"`
		ProcessID     string      `json:"processID"`
		Warnings      []string    `json:"warnings"`
	}
	reference struct {
		RefType string `json:"refType"`
		TraceID string `json:"traceID"`
		SpanID  string `json:"spanID"`
	}
	tag struct {
		Key   string `json:"key"`
		Type  string `json:"type"`
		Value any    `json:"value"`
	}
	logEntry struct {
		Timestamp int64 `json:"timestamp"`
		Fields    []tag `json:"fields"`
	}
	process struct {
		ServiceName string `json:"serviceName"`
		Tags        []tag  `json:"tags"`
	}
)

const (
	childOf     = "CHILD_OF"
	followsFrom = "FOLLOWS_FROM"
	// refTypeKey is the attribute of a link that says it is a parent.
	refTypeKey = "opentracing.ref_type"
)

// shortID is a trace's id as Jaeger writes it: with half of the digits if the other half is zero.
func shortID(id string) string {
	if short, ok := strings.CutPrefix(id, "0000000000000000"); ok && len(short) == 16 {
		return short
	}
	return id
}

func traceOf(t *tracestore.Trace) trace {
	out := trace{TraceID: shortID(t.ID), Spans: make([]span, 0, len(t.Spans)), Processes: map[string]process{}}
	if t.Incomplete != "" {
		out.Warnings = []string{t.Incomplete}
	}
	known := map[string]string{}
	for i := range t.Spans {
		s := &t.Spans[i]
		own := process{s.Service, tagsOf(s.Resource)}
		name, err := json.Marshal(own)
		if err != nil { // tags marshal
			continue
		}
		id, ok := known[string(name)]
		if !ok {
			id = fmt.Sprintf("p%d", len(known)+1)
			known[string(name)], out.Processes[id] = id, own
		}
		out.Spans = append(out.Spans, spanOf(s, id))
	}
	return out
}

func spanOf(s *tracestore.Span, processID string) span {
	out := span{
		TraceID: shortID(s.TraceID), SpanID: s.SpanID, OperationName: s.Name, References: references(s), StartTime: s.Start.UnixMicro(), Duration: s.Duration.Microseconds(),
		Tags: tagsOf(tags(s)), Logs: make([]logEntry, 0, len(s.Events)), ProcessID: processID, Warnings: s.Warnings,
	}
	for _, e := range s.Events {
		out.Logs = append(out.Logs, logEntry{e.Time.UnixMicro(), tagsOf(fields(&e))})
	}
	return out
}

// references are the parent, which comes first, and the links.
func references(s *tracestore.Span) []reference {
	out := []reference{}
	if s.ParentID != "" {
		out = append(out, reference{childOf, shortID(s.TraceID), s.ParentID})
	}
	for _, l := range s.Links {
		kind := followsFrom
		for _, a := range l.Attributes {
			if a.Key == refTypeKey && a.Value.Text == "child_of" {
				kind = childOf
			}
		}
		out = append(out, reference{kind, shortID(l.TraceID), l.SpanID})
	}
	return out
}

// tags are the attributes of a span and what Jaeger has no fields for, under the names that it gives them.
func tags(s *tracestore.Span) []tracestore.Attribute {
	var out []tracestore.Attribute
	add := func(key string, kind tracestore.ValueType, text string) {
		if text == "" {
			return
		}
		for _, a := range s.Attributes {
			if a.Key == key {
				return
			}
		}
		out = append(out, tracestore.Attribute{Key: key, Value: tracestore.Value{Type: kind, Text: text}})
	}
	add("otel.scope.name", tracestore.String, s.Scope.Name)
	add("otel.scope.version", tracestore.String, s.Scope.Version)
	out = append(out, s.Attributes...)
	add("span.kind", tracestore.String, s.Kind.String())
	add("otel.status_code", tracestore.String, strings.ToUpper(s.Status.String()))
	if s.Status == tracestore.StatusError {
		add("error", tracestore.Bool, "true")
	}
	add("otel.status_description", tracestore.String, s.StatusMessage)
	add("w3c.tracestate", tracestore.String, s.TraceState)
	return out
}

// fields are what Jaeger has of an event.
func fields(e *tracestore.Event) []tracestore.Attribute {
	var out []tracestore.Attribute
	if e.Name != "" {
		out = append(out, tracestore.Attribute{Key: "event", Value: tracestore.Value{Type: tracestore.String, Text: e.Name}})
	}
	return append(out, e.Attributes...)
}

func tagsOf(in []tracestore.Attribute) []tag {
	out := make([]tag, 0, len(in))
	for _, a := range in {
		out = append(out, tagOf(a))
	}
	return out
}

func tagOf(a tracestore.Attribute) tag {
	text := a.Value.Text
	switch a.Value.Type {
	case tracestore.Bool:
		return tag{a.Key, "bool", text == "true"}
	case tracestore.Int:
		// JavaScript has no larger integers.
		const safe = 1<<53 - 1
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			if n > safe || n < -safe {
				return tag{a.Key, "int64", text}
			}
			return tag{a.Key, "int64", n}
		}
	case tracestore.Float:
		if f, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(f) && !math.IsInf(f, 0) {
			return tag{a.Key, "float64", f}
		}
	case tracestore.Bytes:
		return tag{a.Key, "binary", text}
	}
	return tag{a.Key, "string", text}
}
