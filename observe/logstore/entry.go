package logstore

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"polymesh.dev/polymesh/observe/rowstore"
)

// entryCost is the cost of a client's line beside its length, and largestEntry the largest cost of a line.
const (
	entryCost    = 128
	largestEntry = entryCost + MaxLineBytes + MaxMetadataBytes
)

// metadataPrefix separates the names of metadata from those of labels and of the storage.
const metadataPrefix = "meta."

// clean returns the entry as it is stored: with checked and sorted labels, a bounded line and valid UTF-8. Or it returns why the entry is refused.
func (s *Store) clean(e Entry) (Entry, string) {
	labels := make([]Field, 0, len(e.Labels))
	for _, l := range e.Labels {
		if l.Value == "" { // as in Prometheus: the same as no label
			continue
		}
		if !ValidName(l.Name) {
			return e, fmt.Sprintf("%.40q is not a valid label name", l.Name)
		}
		if len(l.Value) > MaxLabelBytes {
			return e, fmt.Sprintf("the label %s has %d bytes, more than %d", l.Name, len(l.Value), MaxLabelBytes)
		}
		labels = append(labels, Field{Name: l.Name, Value: text(l.Value)})
	}
	switch {
	case len(labels) == 0:
		return e, "it has no labels"
	case len(labels) > MaxLabels:
		return e, fmt.Sprintf("it has %d labels, more than %d", len(labels), MaxLabels)
	}
	slices.SortFunc(labels, func(a, b Field) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(labels); i++ {
		if labels[i].Name == labels[i-1].Name {
			return e, "it has the label " + labels[i].Name + " twice"
		}
	}
	now := time.Now()
	if reason := s.rows.CheckTime(e.Time, now); reason != "" {
		return e, reason
	}

	size := 0
	metadata := make([]Field, 0, len(e.Metadata)+1)
	for _, m := range e.Metadata {
		if m.Value == "" {
			continue
		}
		if m.Name == "" || len(m.Name) > MaxNameBytes || strings.HasSuffix(m.Name, "*") {
			return e, fmt.Sprintf("%.40q is not a valid metadata name", m.Name)
		}
		size += len(m.Name) + len(m.Value)
		metadata = append(metadata, Field{Name: text(m.Name), Value: text(m.Value)})
	}
	if len(metadata) > MaxMetadata || size > MaxMetadataBytes {
		return e, fmt.Sprintf("it has %d fields of metadata with %d bytes, more than %d or %d", len(metadata), size, MaxMetadata, MaxMetadataBytes)
	}
	if foreign(labels) && !s.foreign.AllowN(now, entryCost+size+min(len(e.Line), MaxLineBytes)) {
		return e, s.refusals.note(now, fmt.Sprintf("clients send more than %d bytes of lines a second", int(s.foreign.Limit())))
	}
	// Last, so that a refused line does not count as a stream.
	if reason := s.streams.admit(labels, now); reason != "" {
		return e, s.refusals.note(now, reason)
	}
	line := e.Line
	if n := len(line); n > MaxLineBytes {
		line = line[:MaxLineBytes]
		for len(line) > 0 && !utf8.RuneStart(e.Line[len(line)]) {
			line = line[:len(line)-1]
		}
		metadata = append(metadata, Field{Name: Truncated, Value: strconv.Itoa(n)})
	}
	return Entry{Time: e.Time, Labels: labels, Line: text(line), Metadata: metadata}, ""
}

// ValidName reports whether a label may have this name: one that Prometheus and Loki allow, and that the storage does not use itself.
func ValidName(name string) bool {
	if name == "" || len(name) > MaxNameBytes {
		return false
	}
	for i, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || i > 0 && c >= '0' && c <= '9') {
			return false
		}
	}
	switch name {
	case rowstore.MessageField, rowstore.RestField, "_time", "_stream", "_stream_id":
		return false
	}
	return true
}

// text replaces invalid UTF-8, so that the text can be encoded as JSON.
func text(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func (e *Entry) row() rowstore.Row {
	fields := make([]Field, 0, 1+len(e.Metadata))
	fields = append(fields, Field{Name: rowstore.MessageField, Value: e.Line})
	for _, m := range e.Metadata {
		fields = append(fields, Field{Name: metadataPrefix + m.Name, Value: m.Value})
	}
	return rowstore.Row{Time: e.Time, Stream: e.Labels, Fields: fields, Foreign: foreign(e.Labels)}
}

// foreign reports whether a line was sent by a client, which chooses its labels, its metadata and its time: by OTLP (package receive) or by Loki's push API
// (package loki). They set these labels, and no others can.
func foreign(labels []Field) bool {
	return Value(labels, "job") == "otlp" || Value(labels, "source") == "push"
}

func entryOf(row rowstore.Row) Entry {
	e := Entry{Time: row.Time, Labels: row.Stream}
	for _, f := range row.Fields {
		if f.Name == rowstore.RestField {
			var rest map[string]string
			if json.Unmarshal([]byte(f.Value), &rest) == nil {
				for _, name := range slices.Sorted(maps.Keys(rest)) {
					e.set(name, rest[name], len(rest))
				}
			}
			continue
		}
		e.set(f.Name, f.Value, len(row.Fields))
	}
	return e
}

// set takes the value of a field, of about so many. The first of a name stays.
func (e *Entry) set(field, value string, fields int) {
	if field == rowstore.MessageField && e.Line == "" {
		e.Line = value
		return
	}
	name, ok := strings.CutPrefix(field, metadataPrefix)
	if !ok || Value(e.Metadata, name) != "" {
		return
	}
	if e.Metadata == nil {
		e.Metadata = make([]Field, 0, fields)
	}
	e.Metadata = append(e.Metadata, Field{Name: name, Value: value})
}

// streams tracks which streams had lines today, to bound them. Those of clients have a separate bound, so that they do not displace the platform's.
type streams struct {
	most, mostForeign int
	seed              maphash.Seed

	mu            sync.Mutex
	day           int64
	seen, foreign map[uint64]struct{}
}

func newStreams(most, mostForeign int) streams {
	return streams{most: most, mostForeign: mostForeign, seed: maphash.MakeSeed()}
}

// admit returns why a line of that stream cannot be stored, empty if it can. The day is the current one: a line's own time is chosen by its sender.
func (s *streams) admit(labels []Field, now time.Time) (reason string) {
	var h maphash.Hash
	h.SetSeed(s.seed)
	for _, l := range labels {
		maphash.WriteComparable(&h, l)
	}
	key := h.Sum64()
	s.mu.Lock()
	defer s.mu.Unlock()
	if day := now.Unix() / 86400; day != s.day || s.seen == nil {
		s.day, s.seen, s.foreign = day, map[uint64]struct{}{}, map[uint64]struct{}{}
	}
	seen, most, whose := s.seen, s.most, ""
	if foreign(labels) {
		seen, most, whose = s.foreign, s.mostForeign, " of clients"
	}
	if _, ok := seen[key]; ok {
		return ""
	}
	if len(seen) >= most {
		return fmt.Sprintf("%d other streams%s have had lines today, which is the limit: something makes too many values for a label", most, whose)
	}
	seen[key] = struct{}{}
	return ""
}

// refusals records that lines were refused because of their number.
type refusals struct {
	mu     sync.Mutex
	last   time.Time
	reason string
}

// refusalShown is for how long a refusal is a problem.
const refusalShown = time.Hour

// note returns the reason.
func (r *refusals) note(now time.Time, reason string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last, r.reason = now, reason
	return reason
}

// problem returns why lines were refused lately, empty if none were.
func (r *refusals) problem(now time.Time) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reason == "" || now.Sub(r.last) >= refusalShown {
		return ""
	}
	return "lines were not stored: " + r.reason
}
