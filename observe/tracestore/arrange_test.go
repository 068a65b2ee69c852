package tracestore

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestArrange(t *testing.T) {
	now := time.Unix(1700000000, 0).UTC()
	span := func(id, parent, service string, kind Kind, at time.Duration) Span {
		return Span{TraceID: trace(1), SpanID: id, ParentID: parent, Service: service, Kind: kind, Start: now.Add(at), Duration: time.Second}
	}
	got := Trace{Spans: []Span{
		span(id(3), id(2), "back", KindInternal, 3), // what the server did
		span(id(2), id(1), "back", KindServer, 2),   // has its client's id
		span(id(2), id(1), "front", KindClient, 4),
		span(id(1), "", "front", KindServer, 1),
		span(id(1), "", "front", KindServer, 1), // sent twice
	}}
	arrange(&got)
	own := ownID(id(2))
	require.Equal(t, []string{id(1), own, id(3), id(2)}, []string{got.Spans[0].SpanID, got.Spans[1].SpanID, got.Spans[2].SpanID, got.Spans[3].SpanID})
	require.Equal(t, []string{"", id(2), own, id(1)}, []string{got.Spans[0].ParentID, got.Spans[1].ParentID, got.Spans[2].ParentID, got.Spans[3].ParentID})
	require.Equal(t, []string{"it starts 2ns before its parent, a span of front: their clocks differ"}, got.Spans[1].Warnings)
	require.Empty(t, got.Spans[2].Warnings)
}
