package tracestore

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"polymesh.dev/polymesh/observe/excerpt"
)

// check returns why a span cannot be stored, empty if it can.
func check(s *Span) string {
	switch {
	case !isID(s.TraceID, 32):
		return "a trace id is not 16 bytes, or is zero"
	case !isID(s.SpanID, 16):
		return "a span id is not 8 bytes, or is zero"
	case s.ParentID != "" && !isHex(s.ParentID, 16):
		return "a parent's span id is not 8 bytes"
	}
	return ""
}

func isHex(id string, digits int) bool {
	return len(id) == digits && strings.Trim(id, "0123456789abcdef") == ""
}

func isID(id string, digits int) bool { return isHex(id, digits) && strings.Trim(id, "0") != "" }

// left counts what was shortened or dropped from a span.
type left struct{ Values, Attributes, Events, Links, Other int }

// String is empty if nothing was dropped.
func (l left) String() string {
	var parts []string
	for _, p := range []struct {
		count int
		what  string
	}{
		{l.Values, "values were cut"}, {l.Attributes, "attributes were left off"}, {l.Events, "events were left off"},
		{l.Links, "links were left off"}, {l.Other, "names were cut"},
	} {
		if p.count > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.count, p.what))
		}
	}
	if parts == nil {
		return ""
	}
	return strings.Join(parts, ", ") + " when the span was stored: they exceed the limits"
}

// bounder limits the texts of one span. All of them share the budget of bytes, in the order of the calls.
type bounder struct {
	budget int
	left   left
}

func (b *bounder) name(s string, limit int) string {
	s, cut := excerpt.Cut(s, limit)
	if cut {
		b.left.Other++
	}
	b.budget -= len(s)
	return s
}

// attributes returns those that fit, without the second of two with the same key. The argument is not changed: spans share their resource.
func (b *bounder) attributes(in []Attribute, limit int) []Attribute {
	out := make([]Attribute, 0, min(len(in), limit))
	// A map only pays off for many.
	var seen map[string]struct{}
	if len(in) > 32 {
		seen = make(map[string]struct{}, min(len(in), limit))
	}
	for i, a := range in {
		if len(out) == limit {
			b.left.Attributes += len(in) - i
			break
		}
		key, _ := excerpt.Cut(a.Key, MaxKeyBytes)
		if key == "" || seen == nil && slices.ContainsFunc(out, func(a Attribute) bool { return a.Key == key }) {
			continue
		}
		if _, ok := seen[key]; ok {
			continue
		}
		value, cut := excerpt.Cut(a.Value.Text, MaxValueBytes)
		if !validValue(a.Value.Type, value, cut) {
			a.Value.Type = String
		}
		if len(key)+len(value) > b.budget {
			b.left.Attributes++
			continue
		}
		if cut {
			b.left.Values++
		}
		b.budget -= len(key) + len(value)
		if seen != nil {
			seen[key] = struct{}{}
		}
		out = append(out, Attribute{key, Value{a.Value.Type, value}})
	}
	return out
}

// validValue reports whether the text is a value of the type. A shortened value becomes a text.
func validValue(t ValueType, text string, cut bool) bool {
	var err error
	switch t {
	case String:
		return true
	case Int:
		_, err = strconv.ParseInt(text, 10, 64)
	case Float:
		_, err = strconv.ParseFloat(text, 64)
	case Bool:
		return text == "true" || text == "false"
	case Bytes:
		_, err = base64.StdEncoding.DecodeString(text)
	case JSON:
		return !cut && json.Valid([]byte(text))
	default:
		return false
	}
	return err == nil && !cut
}

// bound returns the span within the limits, and what was dropped.
func bound(in *Span) (Span, string) {
	b := bounder{budget: MaxSpanBytes}
	s := *in
	s.Warnings = nil
	s.Service, s.Name = b.name(s.Service, MaxServiceBytes), b.name(s.Name, MaxNameBytes)
	if s.Service == "" {
		s.Service = "unknown_service"
	}
	s.StatusMessage, s.TraceState = b.name(s.StatusMessage, MaxValueBytes), b.name(s.TraceState, MaxNameBytes)
	s.Scope.Name, s.Scope.Version = b.name(s.Scope.Name, MaxNameBytes), b.name(s.Scope.Version, MaxNameBytes)
	s.Resource = b.attributes(s.Resource, MaxResourceAttributes)
	s.Scope.Attributes = b.attributes(s.Scope.Attributes, MaxScopeAttributes)
	s.Attributes = b.attributes(s.Attributes, MaxAttributes)
	if int(s.Kind) >= len(kindNames) {
		s.Kind = KindUnspecified
	}
	if int(s.Status) >= len(statusNames) {
		s.Status = StatusUnset
	}
	if isZero(s.ParentID) {
		s.ParentID = ""
	}
	s.Duration = max(s.Duration, 0)

	s.Events = nil
	for i, e := range in.Events {
		if len(s.Events) == MaxEvents || b.budget < len(e.Name) {
			b.left.Events += len(in.Events) - i
			break
		}
		e.Name = b.name(e.Name, MaxNameBytes)
		e.Attributes = b.attributes(e.Attributes, MaxEventAttributes)
		s.Events = append(s.Events, e)
	}
	s.Links = nil
	for i, l := range in.Links {
		if len(s.Links) == MaxLinks || b.budget < len(l.TraceState) {
			b.left.Links += len(in.Links) - i
			break
		}
		if !isID(l.TraceID, 32) || !isID(l.SpanID, 16) {
			b.left.Links++
			continue
		}
		l.TraceState = b.name(l.TraceState, MaxNameBytes)
		l.Attributes = b.attributes(l.Attributes, MaxEventAttributes)
		s.Links = append(s.Links, l)
	}
	return s, b.left.String()
}

func isZero(id string) bool { return strings.Trim(id, "0") == "" }

// size returns about the memory of a span.
func size(s *Span) int {
	const header = 40 // of an attribute
	n := 400 + len(s.Service) + len(s.Name) + len(s.StatusMessage) + len(s.TraceState)
	add := func(attributes []Attribute) {
		for _, a := range attributes {
			n += header + len(a.Key) + len(a.Value.Text)
		}
	}
	add(s.Attributes)
	add(s.Resource)
	add(s.Scope.Attributes)
	for _, e := range s.Events {
		n += 2*header + len(e.Name)
		add(e.Attributes)
	}
	for _, l := range s.Links {
		n += 2*header + 48 + len(l.TraceState)
		add(l.Attributes)
	}
	return n
}
