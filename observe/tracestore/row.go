package tracestore

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

// The columns of a span's row. None has a colon: the columns of attributes do.
const (
	columnTrace    = "trace"
	columnSpan     = "span"
	columnParent   = "parent"
	columnService  = "service"
	columnName     = "name"
	columnKind     = "kind"
	columnStatus   = "status"
	columnMessage  = "message"
	columnDuration = "duration" // in nanoseconds
	columnState    = "state"
	columnFlags    = "flags"
	columnShared   = "shared"
	columnScope    = "scope"
	columnVersion  = "version"
	columnEvents   = "events" // JSON, see event
	columnLinks    = "links"  // JSON, see link
	columnLeft     = "left"   // what was left off
	columnMore     = "more"   // JSON, attributes whose keys cannot be columns
)

// ownColumns are the columns that services' attributes cannot displace: those that are read by name, or searched without RestField (filter.go).
func ownColumns() []string {
	own := []string{
		columnTrace, columnSpan, columnParent, columnService, columnName, columnKind, columnStatus, columnMessage, columnDuration, columnState, columnFlags,
		columnShared, columnScope, columnVersion, columnEvents, columnLinks, columnLeft, columnMore, columnCaller, columnCallee, columnCalls, columnErrors,
	}
	for _, keys := range [][]string{RequestIDKeys, PathKeys, StatusKeys} {
		for _, key := range keys {
			for _, kind := range []ValueType{String, Int, JSON} {
				own = append(own, column(ofSpan, byte(kind), key))
			}
		}
	}
	return own
}

// An attribute's column is the place, the type, a colon and the key.
const (
	ofSpan     = 'a'
	ofResource = 'r'
	ofScope    = 'c'
	// empty is the type of a column for an empty text: the store knows no empty values.
	empty = 'e'
)

// column returns the name of an attribute's column.
func column(place, kind byte, key string) string { return string([]byte{place, kind, ':'}) + key }

// columns caches the names of columns while spans, which often have the same attributes, are converted to rows.
type columns map[columnKey]string

type columnKey struct {
	place, kind byte
	key         string
}

func (c columns) name(place, kind byte, key string) string {
	k := columnKey{place, kind, key}
	name, ok := c[k]
	if !ok {
		name = column(place, kind, key)
		c[k] = name
	}
	return name
}

// canBeColumn is false for keys that the store does not take as part of a column's name.
func canBeColumn(key string) bool {
	return len(key)+3 <= rowstore.MaxNameBytes && !strings.HasSuffix(key, "*")
}

// attribute is an attribute in JSON: key, type, value. Being an array, its text is the same whenever it is written, so that it can be searched for.
type attribute [3]string

type event struct {
	Offset     int64       `json:"t"` // nanoseconds since the start of the span
	Name       string      `json:"n"`
	Attributes []attribute `json:"a,omitempty"`
}

type link struct {
	Trace      string      `json:"t"`
	Span       string      `json:"s"`
	State      string      `json:"w,omitempty"`
	Attributes []attribute `json:"a,omitempty"`
}

func attributesJSON(in []Attribute) []attribute {
	var out []attribute
	for _, a := range in {
		out = append(out, attribute{a.Key, string(a.Value.Type), a.Value.Text})
	}
	return out
}

func attributesOf(in []attribute) []Attribute {
	out := make([]Attribute, 0, len(in))
	for _, a := range in {
		if len(a[1]) == 1 {
			out = append(out, Attribute{a[0], Value{ValueType(a[1][0]), a[2]}})
		}
	}
	return out
}

// jsonText does not escape for HTML, which keeps the stored text short.
func jsonText(v any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil { // not for strings and numbers
		return ""
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// row converts a bounded span to a row. ownStream is false for services beyond the limit on streams.
func row(s *Span, leftOff string, ownStream bool, names columns) rowstore.Row {
	fields := make([]rowstore.Field, 0, 16+len(s.Attributes)+len(s.Resource)+len(s.Scope.Attributes))
	add := func(name, value string) {
		if value != "" {
			fields = append(fields, rowstore.Field{Name: name, Value: value})
		}
	}
	add(columnTrace, s.TraceID)
	add(columnSpan, s.SpanID)
	add(columnParent, s.ParentID)
	add(columnName, s.Name)
	add(columnKind, s.Kind.String())
	add(columnStatus, s.Status.String())
	add(columnMessage, s.StatusMessage)
	add(columnDuration, strconv.FormatInt(int64(s.Duration), 10))
	add(columnState, s.TraceState)
	if s.Flags != 0 {
		add(columnFlags, strconv.FormatUint(uint64(s.Flags), 10))
	}
	if s.Shared {
		add(columnShared, "true")
	}
	add(columnScope, s.Scope.Name)
	add(columnVersion, s.Scope.Version)
	add(columnLeft, leftOff)

	var more [][2]string
	attributes := func(place byte, in []Attribute) {
		for _, a := range in {
			kind, value := byte(a.Value.Type), a.Value.Text
			if value == "" {
				kind, value = empty, "-"
			}
			if canBeColumn(a.Key) {
				add(names.name(place, kind, a.Key), value)
			} else {
				more = append(more, [2]string{column(place, kind, a.Key), value})
			}
		}
	}
	attributes(ofSpan, s.Attributes)
	attributes(ofResource, s.Resource)
	attributes(ofScope, s.Scope.Attributes)
	if more != nil {
		add(columnMore, jsonText(more))
	}
	if len(s.Events) > 0 {
		events := make([]event, len(s.Events))
		for i, e := range s.Events {
			events[i] = event{int64(e.Time.Sub(s.Start)), e.Name, attributesJSON(e.Attributes)}
		}
		add(columnEvents, jsonText(events))
	}
	if len(s.Links) > 0 {
		links := make([]link, len(s.Links))
		for i, l := range s.Links {
			links[i] = link{l.TraceID, l.SpanID, l.TraceState, attributesJSON(l.Attributes)}
		}
		add(columnLinks, jsonText(links))
	}
	r := rowstore.Row{Time: s.Start, Fields: fields}
	service := rowstore.Field{Name: columnService, Value: s.Service}
	if ownStream {
		r.Stream = []rowstore.Field{service}
	} else {
		r.Fields = append(r.Fields, service)
	}
	return r
}

// spanOf is the reverse of row. It skips what it cannot parse.
func spanOf(r rowstore.Row) Span {
	s := Span{Start: r.Time}
	for _, f := range r.Stream {
		s.set(f.Name, f.Value)
	}
	for _, f := range r.Fields {
		s.set(f.Name, f.Value)
	}
	byKey := func(a, b Attribute) int { return cmp.Compare(a.Key, b.Key) }
	slices.SortFunc(s.Attributes, byKey)
	slices.SortFunc(s.Resource, byKey)
	slices.SortFunc(s.Scope.Attributes, byKey)
	return s
}

// set sets the value of a column.
func (s *Span) set(name, value string) {
	if len(name) > 3 && name[2] == ':' {
		s.setAttribute(name, value)
		return
	}
	switch name {
	case columnTrace:
		s.TraceID = value
	case columnSpan:
		s.SpanID = value
	case columnParent:
		s.ParentID = value
	case columnService:
		s.Service = value
	case columnName:
		s.Name = value
	case columnKind:
		s.Kind, _ = ParseKind(value)
	case columnStatus:
		s.Status = Status(max(0, slices.Index(statusNames[:], value)))
	case columnMessage:
		s.StatusMessage = value
	case columnDuration:
		n, _ := strconv.ParseInt(value, 10, 64)
		s.Duration = time.Duration(n)
	case columnState:
		s.TraceState = value
	case columnFlags:
		n, _ := strconv.ParseUint(value, 10, 32)
		s.Flags = uint32(n)
	case columnShared:
		s.Shared = true
	case columnScope:
		s.Scope.Name = value
	case columnVersion:
		s.Scope.Version = value
	case columnLeft:
		s.Warnings = append(s.Warnings, value)
	case columnMore:
		var more [][2]string
		if json.Unmarshal([]byte(value), &more) == nil {
			for _, m := range more {
				if len(m[0]) > 3 {
					s.setAttribute(m[0], m[1])
				}
			}
		}
	case rowstore.RestField:
		var rest map[string]string
		if json.Unmarshal([]byte(value), &rest) == nil {
			for n, v := range rest {
				if n != rowstore.RestField {
					s.set(n, v)
				}
			}
		}
	case columnEvents:
		var events []event
		if json.Unmarshal([]byte(value), &events) == nil {
			for _, e := range events {
				s.Events = append(s.Events, Event{s.Start.Add(time.Duration(e.Offset)), e.Name, attributesOf(e.Attributes)})
			}
		}
	case columnLinks:
		var links []link
		if json.Unmarshal([]byte(value), &links) == nil {
			for _, l := range links {
				s.Links = append(s.Links, Link{l.Trace, l.Span, l.State, attributesOf(l.Attributes)})
			}
		}
	}
}

func (s *Span) setAttribute(name, value string) {
	a := Attribute{name[3:], Value{ValueType(name[1]), value}}
	if a.Value.Type == empty {
		a.Value = Value{String, ""}
	}
	switch name[0] {
	case ofSpan:
		s.Attributes = append(s.Attributes, a)
	case ofResource:
		s.Resource = append(s.Resource, a)
	case ofScope:
		s.Scope.Attributes = append(s.Scope.Attributes, a)
	}
}

// has returns the condition that a column has this value.
func has(column, value string) string {
	return fmt.Sprintf("%s:=%s", rowstore.FieldName(column), rowstore.Literal(value))
}
