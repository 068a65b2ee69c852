package logstore

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/rowstore"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(Options{Store: rowstore.Options{Dir: t.TempDir()}, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func selected(t *testing.T, s *Store, sel Selector) []Entry {
	t.Helper()
	s.Flush()
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
			Labels: []Field{{Name: "pod", Value: fmt.Sprint("p", i%7)}, {Name: "namespace", Value: "shop"}},
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
	require.Equal(t, []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "p0"}}, got[0].Labels)

	got = selected(t, s, Selector{Newest: true, Limit: 3, Matchers: []Matcher{{"pod", Equal, "p3"}}})
	require.Equal(t, []string{"line 297", "line 290", "line 283"}, lines(got))
}

// at makes an entry of the pod p.
func at(t time.Time, pod, line string, metadata ...Field) Entry {
	return Entry{Time: t, Labels: []Field{{Name: "job", Value: "pods"}, {Name: "pod", Value: pod}}, Line: line, Metadata: metadata}
}

func TestSelectInPieces(t *testing.T) {
	s := open(t)
	start := time.Now().Add(-2 * time.Hour).UTC().Round(0)
	// Three times what may be held to sort, some of it in bursts, much of it at equal times.
	random := rand.New(rand.NewPCG(1, 2))
	var want []Entry
	for i := range 3000 {
		when := start.Add(time.Duration(i/3) * time.Second)
		if i > 1000 && i < 2000 {
			when = start.Add(333 * time.Second).Add(time.Duration(i / 3))
		}
		want = append(want, at(when, fmt.Sprint("p", i%3), fmt.Sprintf("%05d %s", i, strings.Repeat("x", 8000))))
	}
	shuffled := slices.Clone(want)
	random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	require.NoError(t, s.Append(shuffled))

	slices.SortStableFunc(want, func(a, b Entry) int { return cmp.Or(a.Time.Compare(b.Time), compareLabels(a.Labels, b.Labels)) })
	require.Equal(t, lines(want), lines(selected(t, s, Selector{})))

	slices.SortStableFunc(want, func(a, b Entry) int { return cmp.Or(b.Time.Compare(a.Time), compareLabels(a.Labels, b.Labels)) })
	require.Equal(t, lines(want), lines(selected(t, s, Selector{Newest: true})))
	for _, limit := range []int{1, 7, 1499, 2999} {
		require.Equal(t, lines(want[:limit]), lines(selected(t, s, Selector{Newest: true, Limit: limit})))
	}
	n := 0
	require.NoError(t, s.Select(context.Background(), Selector{}, func(Entry) bool { n++; return n < 1234 }))
	require.Equal(t, 1234, n)
}

func TestSelectOfOneTime(t *testing.T) {
	s := open(t)
	now := time.Now().Add(-time.Minute).UTC().Round(0)
	want := map[string]bool{}
	for i := range 400 {
		l := fmt.Sprintf("%05d %s", i, strings.Repeat("x", 40_000))
		want[l] = true
		require.NoError(t, s.Append([]Entry{at(now, "p", l)}))
	}
	require.NoError(t, s.Append([]Entry{at(now.Add(-1), "p", "before"), at(now.Add(1), "p", "after")}))
	for _, newest := range []bool{false, true} {
		got := lines(selected(t, s, Selector{Newest: newest}))
		require.Equal(t, 402, len(got))
		ends := []string{got[0], got[401]}
		if newest {
			slices.Reverse(ends)
		}
		require.Equal(t, []string{"before", "after"}, ends)
		for _, l := range got[1:401] {
			require.True(t, want[l])
		}
	}
	require.Len(t, selected(t, s, Selector{Newest: true, Limit: 100}), 100)
}

func TestSelectBoundsMemory(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	const n = 2000
	for i := range n {
		require.NoError(t, s.Append([]Entry{at(now.Add(-time.Duration(i)*time.Millisecond), "p", fmt.Sprintf("%d%s", i, strings.Repeat(string(rune('a'+i%26)), 60_000)))}))
	}
	s.Flush()
	var before, now2 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	peak := uint64(0)
	i := 0
	require.NoError(t, s.Select(context.Background(), Selector{}, func(e Entry) bool {
		if i++; i%100 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&now2)
			peak = max(peak, now2.HeapAlloc)
		}
		return true
	}))
	require.Equal(t, n, i)
	require.Less(t, int64(peak)-int64(before.HeapAlloc), int64(48<<20), "120 MB of lines are never in memory together")
}

func TestMatchersAndFilters(t *testing.T) {
	s := open(t)
	now := time.Now().UTC().Round(0)
	entries := []Entry{
		{Time: now.Add(1), Labels: []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "api-1"}}, Line: `level=info msg="hello world"`, Metadata: []Field{{Name: "uid", Value: "1"}}},
		{Time: now.Add(2), Labels: []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "api-2"}}, Line: `level=error msg="a.b*c"`, Metadata: []Field{{Name: "uid", Value: "2"}}},
		{Time: now.Add(3), Labels: []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "web-1"}, {Name: "app", Value: "web"}}, Line: ``},
		{Time: now.Add(4), Labels: []Field{{Name: "namespace", Value: "sys\"tem{}"}, {Name: "pod", Value: "x"}}, Line: "Ünïcode\n日本", Metadata: []Field{{Name: "_msg", Value: "not the line"}, {Name: "pod", Value: "other"}}},
	}
	require.NoError(t, s.Append(entries))
	for _, c := range []struct {
		name string
		sel  Selector
		want []int
	}{
		{"all", Selector{}, []int{0, 1, 2, 3}},
		{"equal", Selector{Matchers: []Matcher{{"namespace", Equal, "shop"}}}, []int{0, 1, 2}},
		{"hostile", Selector{Matchers: []Matcher{{"namespace", Equal, `sys"tem{}`}}}, []int{3}},
		{"not", Selector{Matchers: []Matcher{{"namespace", NotEqual, "shop"}}}, []int{3}},
		{"regexp", Selector{Matchers: []Matcher{{"pod", Regexp, "api-.*"}}}, []int{0, 1}},
		{"regexp is anchored", Selector{Matchers: []Matcher{{"pod", Regexp, "api"}}}, nil},
		{"alternatives are anchored", Selector{Matchers: []Matcher{{"pod", Regexp, "api|x"}}}, []int{3}},
		{"not regexp", Selector{Matchers: []Matcher{{"pod", NotRegexp, "api-.*"}}}, []int{2, 3}},
		{"missing label", Selector{Matchers: []Matcher{{"app", Equal, ""}}}, []int{0, 1, 3}},
		{"present label", Selector{Matchers: []Matcher{{"app", NotEqual, ""}}}, []int{2}},
		{"regexp that matches nothing too", Selector{Matchers: []Matcher{{"app", Regexp, "web|"}}}, []int{0, 1, 2, 3}},
		{"text", Selector{Filters: []Filter{{Text: "hello"}}}, []int{0}},
		{"part of a word", Selector{Filters: []Filter{{Text: "ell"}}}, []int{0}},
		{"across words", Selector{Filters: []Filter{{Text: "o w"}}}, []int{0}},
		{"text is no pattern", Selector{Filters: []Filter{{Text: "a.b*c"}}}, []int{1}},
		{"text with quotes", Selector{Filters: []Filter{{Text: `msg="a`}}}, []int{1}},
		{"case counts", Selector{Filters: []Filter{{Text: "HELLO"}}}, nil},
		{"unicode", Selector{Filters: []Filter{{Text: "ïcode\n日"}}}, []int{3}},
		{"negative", Selector{Filters: []Filter{{Text: "level", Negative: true}}}, []int{2, 3}},
		{"empty text", Selector{Filters: []Filter{{Text: ""}}}, []int{0, 1, 2, 3}},
		{"not the empty text", Selector{Filters: []Filter{{Text: "", Negative: true}}}, nil},
		{"regexp on the line", Selector{Filters: []Filter{{Text: "level=(info|warn)", Regexp: true}}}, []int{0}},
		{"it is not anchored", Selector{Filters: []Filter{{Text: "w.rld", Regexp: true}}}, []int{0}},
		{"any line", Selector{Filters: []Filter{{Text: ".*", Regexp: true}}}, []int{0, 1, 2, 3}},
		{"any line with something", Selector{Filters: []Filter{{Text: ".+", Regexp: true}}}, []int{0, 1, 3}},
		{"not regexp on the line", Selector{Filters: []Filter{{Text: "level=.*", Regexp: true, Negative: true}}}, []int{2, 3}},
		{"both", Selector{Matchers: []Matcher{{"pod", Regexp, "api-."}}, Filters: []Filter{{Text: "level"}, {Text: "error", Negative: true}}}, []int{0}},
		{"metadata", Selector{Metadata: []Matcher{{"uid", Equal, "2"}}}, []int{1}},
		{"metadata not", Selector{Metadata: []Matcher{{"uid", NotEqual, "2"}}}, []int{0, 2, 3}},
		{"metadata regexp", Selector{Metadata: []Matcher{{"uid", Regexp, "1|2"}}}, []int{0, 1}},
		{"metadata not regexp", Selector{Metadata: []Matcher{{"uid", NotRegexp, "1|2"}}}, []int{2, 3}},
		{"metadata missing", Selector{Metadata: []Matcher{{"uid", Equal, ""}}}, []int{2, 3}},
		{"metadata named like a label", Selector{Metadata: []Matcher{{"pod", Equal, "other"}}}, []int{3}},
		{"metadata named like the line", Selector{Metadata: []Matcher{{"_msg", Equal, "not the line"}}}, []int{3}},
		{"times", Selector{Start: now.Add(2), End: now.Add(4)}, []int{1, 2}},
		{"end before start", Selector{Start: now.Add(4), End: now.Add(2)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := selected(t, s, c.sel)
			want := make([]Entry, 0, len(c.want))
			for _, i := range c.want {
				want = append(want, entries[i])
			}
			require.Equal(t, lines(want), lines(got))
			for i := range got {
				require.ElementsMatch(t, want[i].Metadata, got[i].Metadata)
				require.ElementsMatch(t, want[i].Labels, got[i].Labels)
			}
			// What a tail would have been given is the same.
			compiled, err := compile(c.sel)
			require.NoError(t, err)
			var tailed []string
			for i := range entries {
				e, reason := s.clean(entries[i])
				require.Empty(t, reason)
				if compiled.match(&e) && c.sel.Start.IsZero() {
					tailed = append(tailed, e.Line)
				}
			}
			if c.sel.Start.IsZero() {
				require.ElementsMatch(t, lines(want), tailed)
			}
			n := int64(0)
			require.NoError(t, s.Count(context.Background(), c.sel, Grouping{By: []string{}}, func(c Counted) bool { n += c.Lines; return true }))
			require.Equal(t, int64(len(want)), n)
		})
	}
}

func TestSelectorsThatAreRefused(t *testing.T) {
	s := open(t)
	many := make([]Matcher, maxMatchers+1)
	for i := range many {
		many[i] = Matcher{"a", Equal, "b"}
	}
	for what, sel := range map[string]Selector{
		"valid label name":   {Matchers: []Matcher{{`a="b"} or {c`, Equal, "d"}}},
		"reading the match":  {Matchers: []Matcher{{"a", Regexp, "("}}},
		"reading the filter": {Filters: []Filter{{Text: "(", Regexp: true}}},
		"64 matchers":        {Matchers: many},
		"bytes, more than":   {Filters: []Filter{{Text: strings.Repeat("x", maxFilterBytes+1)}}},
		"bytes of name":      {Metadata: []Matcher{{strings.Repeat("x", 200), Equal, "d"}}},
	} {
		require.ErrorContains(t, s.Select(context.Background(), sel, func(Entry) bool { return true }), what)
		require.ErrorContains(t, s.Count(context.Background(), sel, Grouping{}, func(Counted) bool { return true }), what)
		_, _, err := s.Tail(context.Background(), sel)
		require.ErrorContains(t, err, what)
	}
}

func TestEntriesThatAreRefused(t *testing.T) {
	s, err := Open(Options{Store: rowstore.Options{Dir: t.TempDir()}, MaxStreams: 20, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	now := time.Now()
	labels := make([]Field, MaxLabels+1)
	metadata := make([]Field, MaxMetadata+1)
	for i := range labels {
		labels[i] = Field{Name: fmt.Sprint("l", i), Value: "v"}
	}
	for i := range metadata {
		metadata[i] = Field{Name: fmt.Sprint("m", i), Value: "v"}
	}
	ok := []Field{{Name: "pod", Value: "p"}}
	for what, e := range map[string]Entry{
		"no labels":         {Time: now},
		"valid label name":  {Time: now, Labels: []Field{{Name: "a-b", Value: "v"}}},
		`"_stream" is no`:   {Time: now, Labels: []Field{{Name: "_stream", Value: "v"}}},
		"17 labels":         {Time: now, Labels: labels},
		"twice":             {Time: now, Labels: []Field{{Name: "a", Value: "v"}, {Name: "a", Value: "w"}}},
		"1025 bytes":        {Time: now, Labels: []Field{{Name: "a", Value: strings.Repeat("v", 1025)}}},
		"65 fields":         {Time: now, Labels: ok, Metadata: metadata},
		"valid metadata na": {Time: now, Labels: ok, Metadata: []Field{{Name: "m*", Value: "v"}}},
		"older than":        {Time: now.Add(-8 * 24 * time.Hour), Labels: ok},
	} {
		err := s.Append([]Entry{at(now, "good", what), e})
		var refused *rowstore.RejectedError
		require.ErrorAs(t, err, &refused, what)
		require.Equal(t, 1, refused.Rows)
		require.Contains(t, refused.Reason, what)
	}
	require.Len(t, selected(t, s, Selector{}), 9)

	var refused *rowstore.RejectedError
	for i := range 30 {
		err = s.Append([]Entry{at(now, fmt.Sprint("p", i), "x")})
	}
	require.ErrorAs(t, err, &refused)
	require.Contains(t, refused.Reason, "20 other streams")
	require.NoError(t, s.Append([]Entry{at(now, "p1", "known streams go on")}))
}

// Clients choose their labels and their times. However many they choose, and whenever they say that it was, the platform's lines are stored.
func TestStreamsOfClients(t *testing.T) {
	s, err := Open(Options{Store: rowstore.Options{Dir: t.TempDir()}, MaxStreams: 20, MaxForeignStreams: 10, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	now := time.Now()
	pushed := func(at time.Time, i int) Entry {
		return Entry{Time: at, Line: "x", Labels: []Field{{Name: "job", Value: "mine"}, {Name: "source", Value: "push"}, {Name: "n", Value: fmt.Sprint(i)}}}
	}
	otlp := func(at time.Time, i int) Entry {
		return Entry{Time: at, Line: "x", Labels: []Field{{Name: "job", Value: "otlp"}, {Name: "pod", Value: fmt.Sprint(i)}}}
	}
	var refused *rowstore.RejectedError
	for i := range 50 {
		for _, at := range []time.Time{time.Unix(0, 1<<63-1), now.Add(-8 * 24 * time.Hour)} {
			require.ErrorAs(t, s.Append([]Entry{pushed(at, i), otlp(at, i)}), &refused)
			require.Contains(t, refused.Reason, "its time")
		}
	}
	require.Empty(t, s.Problem(), "what cannot be stored takes no place")
	for i := range 5 {
		require.NoError(t, s.Append([]Entry{pushed(now.Add(23*time.Hour), i), otlp(now, i)}))
	}
	for i := range 50 {
		require.ErrorAs(t, s.Append([]Entry{pushed(now, i+5), otlp(now.Add(23*time.Hour), i+5)}), &refused)
		require.Equal(t, 2, refused.Rows)
		require.Contains(t, refused.Reason, "10 other streams of clients")
	}
	require.Contains(t, s.Problem(), "10 other streams of clients")
	for i := range 20 {
		require.NoError(t, s.Append([]Entry{at(now, fmt.Sprint("p", i), "x"), pushed(now, 1)}))
	}
	require.ErrorAs(t, s.Append([]Entry{at(now, "p20", "x")}), &refused)
	require.Contains(t, s.Problem(), "20 other streams have")
}

// A stream that is not seen on a new day takes no place on it, and the day is that of the clock.
func TestStreamsOfADay(t *testing.T) {
	s, now := newStreams(1, 1), time.Now()
	a, b := []Field{{Name: "pod", Value: "a"}}, []Field{{Name: "pod", Value: "b"}}
	require.Empty(t, s.admit(a, now))
	require.NotEmpty(t, s.admit(b, now))
	require.Empty(t, s.admit(b, now.Add(24*time.Hour)))
	require.NotEmpty(t, s.admit(a, now.Add(24*time.Hour)))
	require.Empty(t, s.admit(a, now), "the clock was a day ahead, and is right again")
}

// Clients share a rate, which is not that of the platform's lines.
func TestRateOfClients(t *testing.T) {
	s, err := Open(Options{Store: rowstore.Options{Dir: t.TempDir()}, ForeignBytesPerSecond: 1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	now, long := time.Now(), strings.Repeat("x", MaxLineBytes)
	pushed := Entry{Time: now, Line: long, Labels: []Field{{Name: "job", Value: "mine"}, {Name: "source", Value: "push"}}}
	otlp := Entry{Time: now, Line: long, Labels: []Field{{Name: "job", Value: "otlp"}}}
	for range 6 {
		otlp.Metadata = append(otlp.Metadata, Field{Name: fmt.Sprint("m", len(otlp.Metadata)), Value: strings.Repeat("m", 5000)})
	}
	require.NoError(t, s.Append([]Entry{otlp}), "any one is taken")
	var refused *rowstore.RejectedError
	require.ErrorAs(t, s.Append([]Entry{pushed, at(now, "p", long), at(now, "p", long), otlp}), &refused)
	require.Equal(t, 2, refused.Rows)
	require.Contains(t, refused.Reason, "clients send more than 1 bytes")
	require.Contains(t, s.Problem(), "clients send more than 1 bytes")
	require.Equal(t, int64(2), s.Numbers()["refused"])
	require.Len(t, selected(t, s, Selector{}), 3)
	require.Empty(t, s.refusals.problem(time.Now().Add(refusalShown)))
}

// Clients choose the names of their metadata. However many they choose, lines and their metadata come back as they were.
func TestNamesOfClients(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	of := func(name string) []Field { return []Field{{Name: "job", Value: "otlp"}, {Name: "pod", Value: name}} }
	for i := range 20 {
		e := Entry{Time: now.Add(23*time.Hour + 50*time.Minute), Labels: of(fmt.Sprint(i))}
		for k := range 60 {
			e.Metadata = append(e.Metadata, Field{Name: fmt.Sprintf("n%dx%d", i, k), Value: "v"})
		}
		require.NoError(t, s.Append([]Entry{e}))
	}
	want := []Entry{
		at(now, "api", "the platform's", Field{Name: "uid", Value: "7"}, Field{Name: "restart", Value: "0"}),
		{Time: now.Add(1), Labels: of("api"), Line: "a client's", Metadata: []Field{{Name: "late", Value: `a "quoted" text`}, {Name: "_msg", Value: "no line"}}},
	}
	require.NoError(t, s.Append(want))
	got := selected(t, s, Selector{End: now.Add(time.Hour)})
	require.Equal(t, lines(want), lines(got))
	for i := range want {
		require.ElementsMatch(t, want[i].Metadata, got[i].Metadata)
	}
	require.NotZero(t, s.Stats().Folded)
	require.Len(t, selected(t, s, Selector{Metadata: []Matcher{{"uid", Equal, "7"}}}), 1)
	require.Len(t, selected(t, s, Selector{Filters: []Filter{{Text: "a client's"}}}), 1)
}

func TestTextThatIsNone(t *testing.T) {
	s := open(t)
	long := strings.Repeat("é", MaxLineBytes)
	require.NoError(t, s.Append([]Entry{at(time.Now(), "p\xff", "a\xffb\x00c", Field{Name: "k", Value: "\xfe"}), at(time.Now(), "q", long)}))
	got := selected(t, s, Selector{})
	require.Equal(t, "a\uFFFDb\x00c", got[0].Line)
	require.Equal(t, "p\uFFFD", Value(got[0].Labels, "pod"))
	require.Equal(t, "\uFFFD", Value(got[0].Metadata, "k"))
	require.Equal(t, long[:MaxLineBytes], got[1].Line)
	require.Equal(t, fmt.Sprint(len(long)), Value(got[1].Metadata, Truncated))
}

func TestLabels(t *testing.T) {
	s := open(t)
	ctx := context.Background()
	now := time.Now()
	require.NoError(t, s.Append([]Entry{
		{Time: now.Add(-2 * time.Hour), Labels: []Field{{Name: "namespace", Value: "old"}, {Name: "container", Value: "c"}}, Line: "x"},
		{Time: now, Labels: []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "b"}}, Line: "x"},
		{Time: now, Labels: []Field{{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "a"}}, Line: "x", Metadata: []Field{{Name: "container", Value: "no label"}}},
		{Time: now, Labels: []Field{{Name: "namespace", Value: `q"uo,te={}`}, {Name: "pod", Value: "c"}}, Line: "x"},
	}))
	names, err := s.LabelNames(ctx, nil, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []string{"container", "namespace", "pod"}, names)
	names, err = s.LabelNames(ctx, nil, now.Add(-time.Hour), now.Add(time.Hour))
	require.NoError(t, err)
	require.Equal(t, []string{"namespace", "pod"}, names)
	values, err := s.LabelValues(ctx, "namespace", nil, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []string{"old", `q"uo,te={}`, "shop"}, values)
	values, err = s.LabelValues(ctx, "pod", []Matcher{{"namespace", Equal, "shop"}}, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []string{"a", "b"}, values)
	series, err := s.Series(ctx, []Matcher{{"pod", NotEqual, ""}}, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, [][]Field{{{Name: "namespace", Value: `q"uo,te={}`}, {Name: "pod", Value: "c"}}, {{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "a"}}, {{Name: "namespace", Value: "shop"}, {Name: "pod", Value: "b"}}}, series)
}

func TestCount(t *testing.T) {
	s := open(t)
	origin := time.Now().Add(-time.Hour).UTC().Truncate(time.Second).Add(123456789)
	var entries []Entry
	for i := range 120 {
		entries = append(entries, at(origin.Add(time.Duration(i)*time.Second), fmt.Sprint("p", i%2), strings.Repeat("x", i)))
	}
	require.NoError(t, s.Append(entries))
	count := func(g Grouping) map[string]Counted {
		got := map[string]Counted{}
		require.NoError(t, s.Count(context.Background(), Selector{Start: origin, End: origin.Add(time.Hour)}, g, func(c Counted) bool {
			key := Value(c.Labels, "pod")
			if !c.Time.IsZero() {
				key += " " + c.Time.Sub(origin).String()
			}
			got[key] = c
			return true
		}))
		return got
	}
	got := count(Grouping{Step: time.Minute, Origin: origin})
	require.Len(t, got, 4)
	require.Equal(t, Counted{Time: origin.Add(time.Minute), Labels: []Field{{Name: "job", Value: "pods"}, {Name: "pod", Value: "p1"}}, Lines: 30, Bytes: (61 + 119) * 15}, got["p1 1m0s"])
	got = count(Grouping{Step: time.Minute, Origin: origin, By: []string{"job"}})
	require.Equal(t, Counted{Time: origin, Labels: []Field{{Name: "job", Value: "pods"}}, Lines: 60, Bytes: 59 * 30}, got[" 0s"])
	got = count(Grouping{By: []string{"pod"}})
	require.Equal(t, Counted{Labels: []Field{{Name: "pod", Value: "p0"}}, Lines: 60, Bytes: 118 * 30}, got["p0"])
	got = count(Grouping{By: []string{"no_such"}})
	require.Equal(t, int64(120), got[""].Lines)
}

func TestTail(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	require.NoError(t, s.Append([]Entry{at(now, "api", "before")}))
	ctx, cancel := context.WithCancel(context.Background())
	entries, dropped, err := s.Tail(ctx, Selector{Matchers: []Matcher{{"pod", Equal, "api"}}, Filters: []Filter{{Text: "yes"}}})
	require.NoError(t, err)
	require.NoError(t, s.Append([]Entry{at(now, "api", "yes 1"), at(now, "web", "yes 2"), at(now, "api", "no 3"), at(now, "api", "yes 4", Field{Name: "uid", Value: "7"})}))
	require.Equal(t, "yes 1", (<-entries).Line)
	e := <-entries
	require.Equal(t, at(now, "api", "yes 4", Field{Name: "uid", Value: "7"}), e)
	require.Zero(t, dropped())

	// Nobody reads: what does not fit is counted.
	for range 20 {
		require.NoError(t, s.Append([]Entry{at(now, "api", "yes "+strings.Repeat("x", 200_000))}))
	}
	require.Eventually(t, func() bool { return dropped() >= 9 }, 5*time.Second, time.Millisecond)
	n := 0
	for n+dropped() < 20 {
		<-entries
		n++
	}
	require.LessOrEqual(t, n, 11)

	cancel()
	for range entries {
	}
	require.NoError(t, s.Append([]Entry{at(now, "api", "yes after")}))
	require.Empty(t, s.tails)

	entries, _, err = s.Tail(context.Background(), Selector{})
	require.NoError(t, err)
	for range maxTails - 1 {
		_, _, err = s.Tail(context.Background(), Selector{})
		require.NoError(t, err)
	}
	_, _, err = s.Tail(context.Background(), Selector{})
	require.ErrorContains(t, err, "close one")
	require.NoError(t, s.Close())
	_, open := <-entries
	require.False(t, open, "closing the store ends its tails")
}
