package logstore

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/rowstore"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(Options{Store: rowstore.Options{Dir: t.TempDir()}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func selected(t *testing.T, s *Store, sel Selector) []Entry {
	t.Helper()
	var out []Entry
	require.NoError(t, s.Select(context.Background(), sel, func(e Entry) bool {
		out = append(out, e)
		return true
	}))
	return out
}

func lines(entries []Entry) []string {
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.Line)
	}
	return out
}

func TestSelectSorts(t *testing.T) {
	s := open(t)
	start := time.Now().Add(-3 * time.Hour).UTC()
	var entries []Entry
	for i := range 300 {
		entries = append(entries, Entry{
			Time:   start.Add(time.Duration(i) * 30 * time.Second),
			Labels: []Field{{"pod", fmt.Sprint("p", i%7)}, {"namespace", "shop"}},
			Line:   fmt.Sprint("line ", i),
		})
	}
	for i := len(entries) - 1; i >= 0; i -= 2 {
		require.NoError(t, s.Append(entries[i:i+1]))
	}
	for i := len(entries) - 2; i >= 0; i -= 2 {
		require.NoError(t, s.Append(entries[i:i+1]))
	}
	got := selected(t, s, Selector{})
	require.Equal(t, lines(entries), lines(got))
	require.Equal(t, []Field{{"namespace", "shop"}, {"pod", "p0"}}, got[0].Labels)

	got = selected(t, s, Selector{Newest: true, Limit: 3, Matchers: []Matcher{{"pod", Equal, "p3"}}})
	require.Equal(t, []string{"line 297", "line 290", "line 283"}, lines(got))
}
