package rowstore

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"time"

	"github.com/VictoriaMetrics/VictoriaLogs/lib/logstorage"
)

// checkField returns why a field cannot be stored, empty if it can.
func checkField(f Field, stream bool) string {
	switch {
	case f.Name == "":
		return "a field has no name"
	case len(f.Name) > MaxNameBytes:
		return fmt.Sprintf("a field's name has %d bytes, more than %d", len(f.Name), MaxNameBytes)
	case len(f.Value) > MaxValueBytes:
		return fmt.Sprintf("a field's value has %d bytes, more than %d", len(f.Value), MaxValueBytes)
	case f.Name == "_time" || f.Name == "_stream" || f.Name == "_stream_id" || f.Name == RestField:
		return fmt.Sprintf("the field name %s is the store's own", f.Name)
	// A name that ends so is a pattern of names in a query.
	case strings.HasSuffix(f.Name, "*"):
		return "a field's name ends with *"
	}
	if stream {
		if f.Name == MessageField {
			return "the line cannot be part of the stream's name"
		}
		if err := logstorage.CheckStreamFieldName(f.Name); err != nil || strings.ContainsAny(f.Name, `",{`) {
			return "a stream's field has one of = { } , \" in its name"
		}
	}
	return ""
}

// names holds the field names that a store has received in a day, see MaxNames.
type names struct {
	fixed   map[string]struct{} // these are not counted
	day     int64
	known   map[string]struct{} // of the rows that are not foreign
	foreign map[string]struct{} // of those that are
	streams map[uint64][]uint32 // hashes of the names by the hash of the stream
	seed    maphash.Seed
}

// maxNamedStreams bounds streams: with more, counting starts again.
const maxNamedStreams = 50_000

func newNames(fixed []string) names {
	n := names{fixed: map[string]struct{}{MessageField: {}}}
	for _, name := range fixed {
		n.fixed[name] = struct{}{}
	}
	return n
}

// fold keeps fields whose names are known or still fit, and joins the others into RestField. The first fields, the stream's, are kept. The day is that of
// the clock: a row's own time is whatever its sender says, and one of tomorrow would end the count of today.
func (n *names) fold(fields []logstorage.Field, stream int, foreign bool, now time.Time) ([]logstorage.Field, int) {
	if day := now.Unix() / 86400; day != n.day || n.known == nil {
		n.day, n.known, n.foreign = day, map[string]struct{}{}, map[string]struct{}{}
		n.streams, n.seed = map[uint64][]uint32{}, maphash.MakeSeed()
	}
	inStore, most := n.known, MaxNames
	if foreign {
		inStore, most = n.foreign, MaxForeignNames
	}
	var h maphash.Hash
	h.SetSeed(n.seed)
	for _, f := range fields[:stream] {
		maphash.WriteComparable(&h, Field(f))
	}
	key := h.Sum64()
	ofStream, ok := n.streams[key]
	if !ok && len(n.streams) >= maxNamedStreams {
		clear(n.streams)
	}
	var rest []Field
	kept := fields[:stream]
	for _, f := range fields[stream:] {
		if f.Value == "" {
			continue
		}
		twice := has(kept, f.Name)
		if _, fixed := n.fixed[f.Name]; fixed && !twice {
			kept = append(kept, f)
			continue
		}
		hash := uint32(maphash.String(n.seed, f.Name))
		_, known := inStore[f.Name]
		inStream := slices.Contains(ofStream, hash)
		if twice || !known && len(inStore) >= most || !inStream && len(ofStream) >= MaxStreamNames {
			rest = append(rest, Field(f))
			continue
		}
		if !known {
			inStore[strings.Clone(f.Name)] = struct{}{}
		}
		if !inStream {
			ofStream = append(ofStream, hash)
			n.streams[key] = ofStream
		}
		kept = append(kept, f)
	}
	if len(rest) == 0 {
		return kept, 0
	}
	return append(kept, logstorage.Field{Name: RestField, Value: jsonObject(rest)}), len(rest)
}

func has[F Field | logstorage.Field](fields []F, name string) bool {
	return slices.ContainsFunc(fields, func(f F) bool { return Field(f).Name == name })
}

// jsonObject writes fields as an object; of two with one name the first stays. Bytes that are no text become the replacement character.
func jsonObject(fields []Field) string {
	m := make(map[string]string, len(fields))
	for _, f := range fields {
		if _, ok := m[f.Name]; !ok {
			m[f.Name] = f.Value
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return "{}" // strings always marshal
	}
	return string(b)
}
