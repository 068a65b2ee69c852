package tracestore

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"
	"time"
)

// maxSkewWarnings is how many spans of a trace get a warning that their clock differs.
const maxSkewWarnings = 100

// arrange sorts the spans of a trace, removes duplicates, separates spans that share an id, and warns where clocks differ. Times are not changed.
func arrange(t *Trace) {
	slices.SortStableFunc(t.Spans, func(a, b Span) int {
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.SpanID, b.SpanID), cmp.Compare(a.Kind, b.Kind))
	})
	once(t)
	unshare(t)
	flagSkew(t)
}

// once removes duplicate spans: clients send again what they think was lost.
func once(t *Trace) {
	type name struct {
		id, service, name string
		start             int64
		kind              Kind
		duration          time.Duration
	}
	seen := make(map[name]struct{}, len(t.Spans))
	t.Spans = slices.DeleteFunc(t.Spans, func(s Span) bool {
		n := name{s.SpanID, s.Service, s.Name, s.Start.UnixNano(), s.Kind, s.Duration}
		_, ok := seen[n]
		seen[n] = struct{}{}
		return ok
	})
}

// unshare gives a server's span with the id of its client's span a new id, and makes it the client's child. Zipkin's clients may share ids.
func unshare(t *Trace) {
	clients := map[string]struct{}{}
	for i := range t.Spans {
		if s := &t.Spans[i]; s.Kind == KindClient {
			clients[s.SpanID] = struct{}{}
		}
	}
	type place struct{ service, id string }
	renamed := map[place]string{}
	for i := range t.Spans {
		s := &t.Spans[i]
		if s.Kind != KindServer {
			continue
		}
		if _, ok := clients[s.SpanID]; ok {
			own := ownID(s.SpanID)
			renamed[place{s.Service, s.SpanID}] = own
			s.ParentID, s.SpanID = s.SpanID, own
		}
	}
	if len(renamed) == 0 {
		return
	}
	for i := range t.Spans {
		// What a server did is its own span's child, not the client's.
		s := &t.Spans[i]
		if own, ok := renamed[place{s.Service, s.ParentID}]; ok && own != s.SpanID {
			s.ParentID = own
		}
	}
}

// ownID derives another id from one.
func ownID(id string) string {
	h := fnv.New64a()
	h.Write([]byte("server " + id))
	return fmt.Sprintf("%016x", max(1, h.Sum64()))
}

// flagSkew warns at spans of other services that start before their parents: their clocks differ.
func flagSkew(t *Trace) {
	byID := make(map[string]int, len(t.Spans))
	for i := range t.Spans {
		byID[t.Spans[i].SpanID] = i
	}
	warned := 0
	for i := range t.Spans {
		s := &t.Spans[i]
		p, ok := byID[s.ParentID]
		if !ok || p == i {
			continue
		}
		parent := &t.Spans[p]
		if early := parent.Start.Sub(s.Start); early > 0 && parent.Service != s.Service && warned < maxSkewWarnings {
			s.Warnings = append(s.Warnings, fmt.Sprintf("it starts %s before its parent, a span of %s: their clocks differ", early, parent.Service))
			warned++
		}
	}
}
