package rowstore

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func open(t *testing.T, opts Options) *Store {
	t.Helper()
	s, err := Open(opts)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func all(t *testing.T, s *Store, query string) []Row {
	t.Helper()
	var rows []Row
	require.NoError(t, s.Query(context.Background(), query, time.Time{}, time.Time{}, func(r Row) bool {
		rows = append(rows, r)
		return true
	}))
	return rows
}

func line(at time.Time, stream, text string) Row {
	return Row{Time: at, Stream: []Field{{"pod", stream}}, Fields: []Field{{MessageField, text}}}
}

func TestRowsComeBack(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now().UTC().Round(0)
	want := Row{Time: now, Stream: []Field{{"namespace", "shop"}, {"pod", "api-1"}}, Fields: []Field{{MessageField, "hello"}, {"uid", "7"}}}
	require.NoError(t, s.Append([]Row{want}))
	rows := all(t, s, "*")
	require.Len(t, rows, 1)
	require.Equal(t, want.Time, rows[0].Time)
	require.Equal(t, want.Stream, rows[0].Stream)
	require.ElementsMatch(t, want.Fields, rows[0].Fields)
}
