// Package tracestore keeps spans: what each service did for a request, when and for how long.
//
// It owns the shape of a span in a row, the limits on what a client may put into one, the sampling when more spans come than the store is
// for, and the count of who calls whom. Package receive appends what clients send; package jaeger and the page ask.
//
// Clients choose every text in a span. Append cuts it to the limits below and says so in the span's Warnings; an attribute is a
// column of its own whose name carries the attribute's type, and no text ever becomes part of a query without being quoted.
package tracestore

import (
	"errors"
	"time"
)

// Limits on one span. What exceeds them is cut or left off, and the span says how much.
const (
	MaxServiceBytes       = 256
	MaxNameBytes          = 512
	MaxValueBytes         = 8 << 10
	MaxKeyBytes           = 512
	MaxAttributes         = 128
	MaxResourceAttributes = 64
	MaxScopeAttributes    = 16
	MaxEvents             = 128
	MaxEventAttributes    = 32
	MaxLinks              = 32
	MaxSpanBytes          = 64 << 10
)

// Limits on an answer.
const (
	// MaxTraceSpans is how many spans of one trace are stored in a short time, and how many are given back.
	MaxTraceSpans = 10_000
	// MaxTraces is how many traces Find gives back.
	MaxTraces = 1_000
	// maxAnswerBytes bounds the spans that one call holds in memory.
	maxAnswerBytes = 16 << 20
	// maxNames is how many services or operations are listed.
	maxNames = 5_000
)

var (
	// ErrNotFound is returned for a trace of which no span is stored.
	ErrNotFound = errors.New("no such trace")
	// ErrQuery is wrapped by errors about what was asked, which will be the same when it is asked again.
	ErrQuery = errors.New("bad query")
)

// Kind is a span's role in a call, with OpenTelemetry's numbers.
type Kind uint8

// The kinds.
const (
	KindUnspecified Kind = iota
	KindInternal
	KindServer
	KindClient
	KindProducer
	KindConsumer
)

var kindNames = [...]string{"", "internal", "server", "client", "producer", "consumer"}

// String is the kind's name in lower case, empty if there is none.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return ""
}

// ParseKind is the reverse of String.
func ParseKind(name string) (Kind, bool) {
	for k, n := range kindNames {
		if n == name {
			return Kind(k), true
		}
	}
	return 0, false
}

// Status is how a span ended, with OpenTelemetry's numbers.
type Status uint8

// The statuses.
const (
	StatusUnset Status = iota
	StatusOK
	StatusError
)

var statusNames = [...]string{"", "ok", "error"}

// String is the status' name in lower case, empty if there is none.
func (s Status) String() string {
	if int(s) < len(statusNames) {
		return statusNames[s]
	}
	return ""
}

// ValueType is the type of an attribute's value.
type ValueType byte

// The types. Their values are stored, as part of columns' names.
const (
	String ValueType = 's'
	Int    ValueType = 'i'
	Float  ValueType = 'f'
	Bool   ValueType = 'b'
	Bytes  ValueType = 'x' // in base64
	JSON   ValueType = 'j' // an array or an object
)

var valueTypes = [...]ValueType{String, Int, Float, Bool, Bytes, JSON}

// Value is an attribute's value, as text.
type Value struct {
	Type ValueType
	Text string
}

// Attribute is a named value.
type Attribute struct {
	Key   string
	Value Value
}

// Event is something that happened during a span.
type Event struct {
	Time       time.Time
	Name       string
	Attributes []Attribute
}

// Link points to another span that has to do with this one and is not its parent.
type Link struct {
	TraceID, SpanID, TraceState string
	Attributes                  []Attribute
}

// Scope is the library that made a span.
type Scope struct {
	Name, Version string
	Attributes    []Attribute
}

// Span is one piece of work of one service.
type Span struct {
	// TraceID has 32 digits, SpanID and ParentID have 16, in lower case; ParentID may be empty.
	TraceID, SpanID, ParentID string
	Service, Name             string
	Kind                      Kind
	Start                     time.Time
	Duration                  time.Duration
	Status                    Status
	StatusMessage             string
	TraceState                string
	Flags                     uint32
	Attributes                []Attribute
	// Resource describes the service's process. service.name is not among it, it is Service.
	Resource []Attribute
	Scope    Scope
	Events   []Event
	Links    []Link
	// Shared is true for a server's span that has its client's id, as Zipkin's clients may do it. Stored spans are told apart.
	Shared bool
	// Warnings are about what was left off, and about clocks that differ. Append takes none.
	Warnings []string
}

// Trace is all spans of one request.
type Trace struct {
	ID string
	// Spans are in the order in which they started.
	Spans []Span
	// Incomplete says why there are more spans than these, if there are.
	Incomplete string
}

// Start is when the first span started.
func (t *Trace) Start() time.Time {
	if len(t.Spans) == 0 {
		return time.Time{}
	}
	return t.Spans[0].Start
}

// Duration is from the start of the first span to the end of the last one.
func (t *Trace) Duration() time.Duration {
	var end time.Time
	for i := range t.Spans {
		if e := t.Spans[i].Start.Add(t.Spans[i].Duration); e.After(end) {
			end = e
		}
	}
	if len(t.Spans) == 0 {
		return 0
	}
	return end.Sub(t.Spans[0].Start)
}

// Query says which traces are wanted: those with a span that fulfils all of it. Empty fields ask for nothing.
type Query struct {
	Service, Operation string
	// Tags are attributes of the span, its resource, or one of its events, whatever their type is. The keys error, span.kind, otel.status_code,
	// otel.status_description, otel.scope.name, otel.scope.version, w3c.tracestate and event are as Jaeger shows them.
	Tags                     map[string]string
	MinDuration, MaxDuration time.Duration
	// Start and End are the limits of the time at which that span started.
	Start, End time.Time
	// Limit is how many traces are wanted, 20 if 0.
	Limit int
	// RequestID is the request's x-request-id.
	RequestID string
	// Path is part of the request's path or URL.
	Path string
	// Status is "error", "ok", an HTTP status such as "503", or a class such as "5xx".
	Status string
	// Slowest asks for the spans that took longest instead of the newest ones.
	Slowest bool
}

// Operation is a name that a service gives to spans.
type Operation struct {
	Name string
	Kind Kind
}

// Dependency says how often one service called another.
type Dependency struct {
	Parent, Child string
	Calls, Errors uint64
}
