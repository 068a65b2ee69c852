package rowstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/VictoriaLogs/lib/logstorage"
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
	s.Flush()
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
	require.Equal(t, int64(1), s.Stats().Rows)
}

// hostile are texts that mean something to somebody on the way.
var hostile = []string{
	`"`, `\`, "`", `" or *`, `} or {pod=~".*`, `) | delete *`, "a\nb", "a\x00b", "\xff\xfe", "*", `=~".*"`, "{", "}", ",", "#comment",
	`options(concurrency=1000) *`, "\u202e", "日本語", strings.Repeat("x", 5000), "_time:5m", "'", "$(x)", "%s",
}

func TestHostileTexts(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now()
	for i, text := range hostile {
		require.NoError(t, s.Append([]Row{{
			Time:   now.Add(time.Duration(i)),
			Stream: []Field{{"pod", text}},
			Fields: []Field{{MessageField, "x " + text + " y"}, {"field", text}},
		}}))
	}
	for _, text := range hostile {
		for _, query := range []string{
			"{" + FieldName("pod") + "=" + Literal(text) + "}",
			FieldName("field") + ":=" + Literal(text),
			FieldName("field") + ":=" + Literal(text) + " " + FieldName(MessageField) + ":*" + Literal(text+" y") + "*",
		} {
			rows := all(t, s, query)
			require.Len(t, rows, 1, query)
			require.Equal(t, []Field{{"pod", text}}, rows[0].Stream)
			require.Contains(t, rows[0].Fields, Field{"field", text})
		}
	}
}

func TestHostileNames(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now()
	for _, name := range []string{`"`, `a:b`, `) | delete * `, "a\nb", "\xff", "日本", "{", "options", "or", "_msg.x"} {
		require.NoError(t, s.Append([]Row{{Time: now, Stream: []Field{{"pod", "p"}}, Fields: []Field{{name, "value"}}}}))
		rows := all(t, s, FieldName(name)+":="+Literal("value"))
		require.Len(t, rows, 1, name)
		require.Equal(t, []Field{{name, "value"}}, rows[0].Fields)
	}
}

func TestRowsThatAreRefused(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir(), Retention: 48 * time.Hour})
	now := time.Now()
	many := make([]Field, MaxFields+1)
	for i := range many {
		many[i] = Field{fmt.Sprint("f", i), "v"}
	}
	pod := []Field{{"pod", "p"}}
	for what, row := range map[string]Row{
		"older":             {Time: now.Add(-49 * time.Hour), Stream: pod},
		"future":            {Time: now.Add(25 * time.Hour), Stream: pod},
		"257 fields":        {Time: now, Fields: many},
		"129 bytes":         {Time: now, Fields: []Field{{strings.Repeat("n", 129), "v"}}},
		"value has":         {Time: now, Fields: []Field{{"f", strings.Repeat("v", MaxValueBytes+1)}}},
		"it has":            {Time: now, Fields: []Field{{"f", strings.Repeat("v", MaxValueBytes)}, {"g", strings.Repeat("v", MaxValueBytes)}}},
		"no name":           {Time: now, Fields: []Field{{"", "v"}}},
		"_time":             {Time: now, Fields: []Field{{"_time", "v"}}},
		"_stream":           {Time: now, Fields: []Field{{"_stream", "v"}}},
		"_stream_id":        {Time: now, Fields: []Field{{"_stream_id", "v"}}},
		"ends with *":       {Time: now, Fields: []Field{{"meta*", "v"}}},
		"stream's field":    {Time: now, Stream: []Field{{`a="b",c`, "v"}}},
		"pod twice":         {Time: now, Stream: []Field{{"pod", "a"}, {"pod", "b"}}},
		"part of the strea": {Time: now, Stream: []Field{{MessageField, "v"}}},
	} {
		err := s.Append([]Row{line(now, "good", what), row})
		var refused *RejectedError
		require.ErrorAs(t, err, &refused, what)
		require.Equal(t, 1, refused.Rows)
		require.Contains(t, refused.Reason, what)
	}
	require.Len(t, all(t, s, "*"), 14, "the good rows are stored")
	require.Equal(t, int64(14), s.Stats().Rejected)
}

func TestTooManyNames(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now()
	const rows = 3000
	for i := range rows {
		require.NoError(t, s.Append([]Row{{Time: now.Add(time.Duration(i)), Stream: []Field{{"pod", "p"}}, Fields: []Field{
			{"always", "here"}, {fmt.Sprint("attribute-", i), fmt.Sprint(i)},
		}}}))
	}
	got := all(t, s, "always:=here")
	require.Len(t, got, rows, "no row is lost for its names")
	names := map[string]bool{}
	values := map[string]bool{}
	for _, row := range got {
		for _, f := range row.Fields {
			names[f.Name] = true
			if f.Name == RestField {
				var rest map[string]string
				require.NoError(t, json.Unmarshal([]byte(f.Value), &rest))
				for _, v := range rest {
					values[v] = true
				}
			} else {
				values[f.Value] = true
			}
		}
	}
	require.Len(t, names, MaxStreamNames+1)
	require.Len(t, values, rows+1, "and no value")
	require.Equal(t, int64(rows-MaxStreamNames+1), s.Stats().Folded)

	require.NoError(t, s.Append([]Row{{Time: now, Stream: []Field{{"pod", "q"}}, Fields: []Field{{"twice", "a"}, {"twice", "b"}}}}))
	require.ElementsMatch(t, []Field{{"twice", "a"}, {RestField, `{"twice":"b"}`}}, all(t, s, `{pod="q"}`)[0].Fields)
}

// Whoever sends rows chooses their names and their times. Neither takes the line, the fixed names or the names of others away.
func TestForeignNames(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir(), Names: []string{"fixed"}})
	now := time.Now()
	for _, day := range []time.Duration{0, 23*time.Hour + 50*time.Minute, -48 * time.Hour} {
		for i := range 40 {
			row := Row{Time: now.Add(day), Stream: []Field{{"from", fmt.Sprint(day, i)}}, Foreign: true}
			for k := range 100 {
				row.Fields = append(row.Fields, Field{fmt.Sprint(day, i, "x", k), "v"})
			}
			require.NoError(t, s.Append([]Row{row}))
		}
	}
	s.Flush()
	folded := s.Stats().Folded
	require.Equal(t, int64(3*40*100-MaxForeignNames), folded)
	message, fixed := Field{MessageField, "a line"}, Field{"fixed", "f"}
	require.NoError(t, s.Append([]Row{
		{Time: now, Stream: []Field{{"pod", "p"}}, Fields: []Field{message, {"uid", "7"}, fixed}},
		{Time: now, Stream: []Field{{"from", "q"}}, Fields: []Field{{"late", "1"}, message, fixed}, Foreign: true},
	}))
	require.ElementsMatch(t, []Field{message, fixed, {"uid", "7"}}, all(t, s, `{pod="p"}`)[0].Fields)
	require.ElementsMatch(t, []Field{message, fixed, {RestField, `{"late":"1"}`}}, all(t, s, `{from="q"}`)[0].Fields)
	require.Equal(t, folded+1, s.Stats().Folded)
}

// The names of a day are forgotten on the next one, which is when the clock says so.
func TestNamesOfADay(t *testing.T) {
	n, now := newNames(nil), time.Now()
	folded := func(name string, now time.Time) int {
		_, folded := n.fold([]logstorage.Field{{Name: "pod", Value: name}, {Name: MessageField, Value: "a line"}, {Name: name, Value: "v"}}, 1, true, now)
		return folded
	}
	for i := range MaxForeignNames {
		require.Zero(t, folded(fmt.Sprint(i), now))
	}
	require.Equal(t, 1, folded("more", now))
	require.Zero(t, folded("more", now.Add(24*time.Hour)))
	require.Zero(t, folded("more", now), "the clock was a day ahead, and is right again")
}

func TestTimeRange(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	start := time.Now().Add(-time.Hour).UTC().Round(0)
	var rows []Row
	for i := range 10 {
		rows = append(rows, line(start.Add(time.Duration(i)), "p", fmt.Sprint(i)))
	}
	require.NoError(t, s.Append(rows))
	count := func(from, to time.Time) (n int) {
		require.NoError(t, s.Query(context.Background(), "*", from, to, func(Row) bool { n++; return true }))
		return n
	}
	require.Equal(t, 10, count(time.Time{}, time.Time{}))
	require.Equal(t, 5, count(start.Add(2), start.Add(7)), "the end is not part of it")
	require.Equal(t, 0, count(start.Add(7), start.Add(7)))
	require.Equal(t, 3, count(start.Add(7), time.Time{}))
	n := 0
	require.NoError(t, s.QueryWhere(context.Background(), "*", time.Time{}, time.Time{},
		func(at time.Time) bool { return at.Equal(start.Add(4)) }, func(r Row) bool { n++; return true }))
	require.Equal(t, 1, n)
}

// What waits in memory counts as much as what is on disk: callers limit their queries by these times.
func TestStatsOfWhatWaits(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now().UTC().Round(0)
	for _, at := range []time.Time{now, now.Add(time.Minute), now.Add(-time.Hour), now.Add(time.Second)} {
		require.NoError(t, s.Append([]Row{line(at, "p", "x")}))
	}
	for _, what := range []string{"in memory", "handed over"} {
		require.Equal(t, now.Add(-time.Hour), s.Stats().Oldest, what)
		require.Equal(t, now.Add(time.Minute), s.Stats().Newest, what)
		s.Flush()
	}
}

func TestQueryEnds(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	now := time.Now()
	var rows []Row
	for i := range 1000 {
		rows = append(rows, line(now, fmt.Sprint("p", i%10), fmt.Sprint(i)))
	}
	require.NoError(t, s.Append(rows))
	n := 0
	require.NoError(t, s.Query(context.Background(), "*", time.Time{}, time.Time{}, func(Row) bool { n++; return n < 7 }))
	require.Equal(t, 7, n)

	ctx, cancel := context.WithCancel(context.Background())
	err := s.Query(ctx, "*", time.Time{}, time.Time{}, func(Row) bool { cancel(); return true })
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, s.Query(context.Background(), "{", time.Time{}, time.Time{}, nil), "reading the query")
	require.ErrorContains(t, s.Query(context.Background(), strings.Repeat("a ", MaxQueryBytes), time.Time{}, time.Time{}, nil), "more than")
}

func TestQueriesWhileWriting(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	var wg sync.WaitGroup
	const writers, each = 4, 500
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if err := s.Append([]Row{line(time.Now(), fmt.Sprint("w", w), fmt.Sprint(i))}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if err := s.Query(context.Background(), "*", time.Time{}, time.Time{}, func(Row) bool { return true }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, all(t, s, "*"), writers*each)
}

func TestDurableFollowsMark(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	require.NoError(t, s.Append([]Row{line(time.Now(), "p", "a"), line(time.Now(), "p", "b")}))
	require.Equal(t, uint64(2), s.Mark())
	require.Equal(t, uint64(0), s.Durable(), "it is in memory still")
	require.Eventually(t, func() bool { return s.Durable() == 2 }, 20*time.Second, 20*time.Millisecond)
	reader := open(t, Options{Dir: dir, ReadOnly: true})
	require.Len(t, all(t, reader, `{pod="p"}`), 2)
}

func TestClose(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	require.NoError(t, s.Append([]Row{line(time.Now(), "p", "a")}))
	_, err := Open(Options{Dir: dir})
	require.ErrorContains(t, err, "another process writes to it")
	require.NoError(t, s.Close())
	require.Equal(t, uint64(1), s.Durable())
	require.ErrorIs(t, s.Append([]Row{line(time.Now(), "p", "b")}), ErrClosed)
	require.ErrorIs(t, s.Query(context.Background(), "*", time.Time{}, time.Time{}, nil), ErrClosed)
	require.True(t, errors.Is(s.Close(), ErrClosed))

	s = open(t, Options{Dir: dir})
	require.Len(t, all(t, s, "*"), 1)
}

func TestRetention(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir, Retention: 10 * 24 * time.Hour})
	now := time.Now()
	for day := range 8 {
		require.NoError(t, s.Append([]Row{line(now.Add(-time.Duration(day)*24*time.Hour), "p", fmt.Sprint(day))}))
	}
	require.Len(t, all(t, s, "*"), 8)
	require.Equal(t, 8, s.Stats().Partitions)
	require.NoError(t, s.Close())

	s = open(t, Options{Dir: dir, Retention: 2 * 24 * time.Hour})
	require.Eventually(t, func() bool { return s.Stats().Partitions == 3 }, 10*time.Second, 10*time.Millisecond)
	require.Len(t, all(t, s, "*"), 3)
}

func TestCounting(t *testing.T) {
	s := open(t, Options{Dir: t.TempDir()})
	start := time.Now().Add(-time.Hour).UTC().Truncate(time.Minute)
	var rows []Row
	for i := range 100 {
		rows = append(rows, line(start.Add(time.Duration(i)*time.Second), "p", fmt.Sprint(i)))
	}
	require.NoError(t, s.Append(rows))
	got := map[time.Time]string{}
	require.NoError(t, s.Query(context.Background(), "* | stats by (_time:1m) count() n", time.Time{}, time.Time{}, func(r Row) bool {
		got[r.Time] = r.Fields[0].Value
		return true
	}))
	require.Equal(t, map[time.Time]string{start: "60", start.Add(time.Minute): "40"}, got)
}
