package tracestore

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	// maxTags is how many tags a query may have.
	maxTags = 16
	// maxTermBytes bounds each text of a query.
	maxTermBytes = 2 << 10
)

// spans is the condition for a row that is a span.
var spans = fmt.Sprintf("{%s!=%s}", streamRows, rowstore.Literal(streamCalls))

// The attributes in which proxies and SDKs have the x-request-id, the path and the status of a request.
var (
	RequestIDKeys = []string{"guid:x-request-id", "http.request.header.x-request-id", "http.request_id", "x-request-id", "request_id", "request.id"}
	PathKeys      = []string{"url.path", "http.target", "http.url", "url.full"}
	StatusKeys    = []string{"http.response.status_code", "http.status_code"}
)

// filter is the query's condition on a span, in LogsQL.
func (q *Query) filter() (string, error) {
	if len(q.Tags) > maxTags {
		return "", fmt.Errorf("%w: it has %d tags, more than %d", ErrQuery, len(q.Tags), maxTags)
	}
	terms := []string{q.Service, q.Operation, q.RequestID, q.Path, q.Status}
	for k, v := range q.Tags {
		terms = append(terms, k, v)
	}
	for _, t := range terms {
		if len(t) > maxTermBytes {
			return "", fmt.Errorf("%w: a text has %d bytes, more than %d", ErrQuery, len(t), maxTermBytes)
		}
	}

	and := []string{spans}
	if q.Service != "" {
		and = append(and, has(columnService, q.Service))
	}
	if q.Operation != "" {
		and = append(and, has(columnName, q.Operation))
	}
	if q.MinDuration > 0 {
		and = append(and, fmt.Sprintf("%s:>=%d", columnDuration, q.MinDuration.Nanoseconds()))
	}
	if q.MaxDuration > 0 {
		and = append(and, fmt.Sprintf("%s:<=%d", columnDuration, q.MaxDuration.Nanoseconds()))
	}
	for _, key := range slices.Sorted(maps.Keys(q.Tags)) {
		and = append(and, tagFilter(key, q.Tags[key]))
	}
	if q.RequestID != "" {
		var or []string
		for _, key := range RequestIDKeys {
			or = append(or, has(column(ofSpan, byte(String), key), q.RequestID))
		}
		// A header is an array.
		or = append(or, has(column(ofSpan, byte(JSON), RequestIDKeys[1]), jsonText([]string{q.RequestID})))
		and = append(and, oneOf(or))
	}
	if q.Path != "" {
		var or []string
		for _, key := range PathKeys {
			or = append(or, contains(column(ofSpan, byte(String), key), q.Path))
		}
		and = append(and, oneOf(or))
	}
	if q.Status != "" {
		status, err := statusFilter(q.Status)
		if err != nil {
			return "", err
		}
		and = append(and, status)
	}
	return strings.Join(and, " "), nil
}

func oneOf(conditions []string) string { return "(" + strings.Join(conditions, " or ") + ")" }

func contains(column, text string) string {
	return fmt.Sprintf("%s:*%s*", rowstore.FieldName(column), rowstore.Literal(text))
}

// statusFilter reads Query.Status.
func statusFilter(status string) (string, error) {
	switch status {
	case StatusOK.String(), StatusError.String():
		return has(columnStatus, status), nil
	}
	bad := fmt.Errorf("%w: the status %q is not error, ok, a number of HTTP, or a class such as 5xx", ErrQuery, status)
	if len(status) != 3 {
		return "", bad
	}
	var or []string
	for _, key := range StatusKeys {
		for _, kind := range []ValueType{String, Int} {
			name := column(ofSpan, byte(kind), key)
			if status[1:] == "xx" && status[0] >= '1' && status[0] <= '5' {
				or = append(or, fmt.Sprintf("%s:range[%c00, %c99]", rowstore.FieldName(name), status[0], status[0]))
			} else if _, err := strconv.ParseUint(status, 10, 16); err != nil {
				return "", bad
			} else {
				or = append(or, has(name, status))
			}
		}
	}
	return oneOf(or), nil
}

// tagFilter is the condition that a span has a tag as Jaeger shows it.
func tagFilter(key, value string) string {
	or := attributeFilters(key, value)
	switch key {
	case "error":
		if value == "true" {
			or = append(or, has(columnStatus, StatusError.String()))
		}
	case "span.kind":
		or = append(or, has(columnKind, value))
	case "otel.status_code":
		or = append(or, has(columnStatus, strings.ToLower(value)))
	case "otel.status_description":
		or = append(or, has(columnMessage, value))
	case "otel.scope.name", "otel.library.name":
		or = append(or, has(columnScope, value))
	case "otel.scope.version", "otel.library.version":
		or = append(or, has(columnVersion, value))
	case "w3c.tracestate":
		or = append(or, has(columnState, value))
	case "event":
		or = append(or, contains(columnEvents, `"n":`+jsonText(value)))
	}
	return oneOf(or)
}

// attributeFilters returns conditions for a span with this attribute: on itself, on its resource, or on one of its events. One must be true.
func attributeFilters(key, value string) []string {
	var or []string
	for _, kind := range valueTypes {
		if !validValue(kind, value, false) || kind == JSON && !strings.HasPrefix(value, "[") && !strings.HasPrefix(value, "{") {
			continue
		}
		or = append(or, contains(columnEvents, jsonText(attribute{key, string(kind), value})))
		stored, text := byte(kind), value
		if value == "" {
			stored, text = empty, "-"
		}
		for _, place := range []byte{ofSpan, ofResource} {
			name := column(place, stored, key)
			if !canBeColumn(key) {
				or = append(or, contains(columnMore, jsonText([2]string{name, text})))
				continue
			}
			or = append(or, has(name, text), contains(rowstore.RestField, inRest(name, text)))
		}
	}
	return or
}

// inRest returns what rowstore writes into RestField for a field beyond the limit on names.
func inRest(name, value string) string {
	object, _ := json.Marshal(map[string]string{name: value}) // strings always marshal
	return strings.TrimSuffix(strings.TrimPrefix(string(object), "{"), "}")
}

// bounds returns the time range of a search, which does not start before the oldest span.
func (s *Store) bounds(start, end time.Time) (time.Time, time.Time) {
	now := time.Now()
	if end.IsZero() || end.After(now.Add(ahead)) {
		end = now.Add(ahead)
	}
	oldest := s.rows.Stats().Oldest
	if oldest.IsZero() { // none is on disk
		oldest = now.Add(-max(s.opts.Retention, 24*time.Hour))
	}
	if start.Before(oldest) {
		start = oldest
	}
	return start, end
}
