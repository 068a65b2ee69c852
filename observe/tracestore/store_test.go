package tracestore

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/privilege"
)

func str(key, value string) Attribute { return Attribute{key, Value{String, value}} }

// full is a span with something in every field.
func full(at time.Time) Span {
	return Span{
		TraceID: "4bf92f3577b34da6a3ce929d0e0e4736", SpanID: "00f067aa0ba902b7", ParentID: "00f067aa0ba902b6", Service: "shop.tracing",
		Name: "shop.tracing.svc.cluster.local:8080/*", Kind: KindServer, Start: at, Duration: 1234567 * time.Nanosecond,
		Status: StatusError, StatusMessage: "it broke", TraceState: "vendor=1", Flags: 257,
		Attributes: []Attribute{
			{"bytes", Value{Bytes, "AAEC"}}, {"double", Value{Float, "0.5"}}, str("empty", ""), str("http.url", "http://shop:8080/a/b?c=d"),
			{"int", Value{Int, "-7"}}, {"list", Value{JSON, `["a",1]`}}, {"yes", Value{Bool, "true"}},
		},
		Resource: []Attribute{str("host.name", "node-1")},
		Scope:    Scope{"envoy", "1.40", []Attribute{str("kind", "proxy")}},
		Events:   []Event{{at.Add(time.Microsecond), "exception", []Attribute{str("exception.type", "ValueError")}}, {at.Add(-time.Second), "early", []Attribute{}}},
		Links:    []Link{{"4bf92f3577b34da6a3ce929d0e0e4737", "00f067aa0ba902b8", "a=b", []Attribute{{"n", Value{Int, "1"}}}}},
	}
}

func TestSpanComesBackAsItWas(t *testing.T) {
	s := open(t)
	want := full(time.Now().Add(-time.Minute).UTC())
	appendAll(t, s, want)
	got, err := s.Trace(t.Context(), want.TraceID)
	require.NoError(t, err)
	require.Equal(t, Trace{ID: want.TraceID, Spans: []Span{want}}, got)
	require.Equal(t, want.Start, got.Start())
	require.Equal(t, want.Duration, got.Duration())

	_, err = s.Trace(t.Context(), "4bf92f3577b34da6a3ce929d0e0e4730")
	require.ErrorIs(t, err, ErrNotFound)
	for _, bad := range []string{"", "0", "xyz", strings.Repeat("1", 33), `" or *`} {
		_, err = s.Trace(t.Context(), bad)
		require.ErrorIs(t, err, ErrQuery, bad)
	}
}

func TestSpansOutliveTheProcess(t *testing.T) {
	dir := t.TempDir()
	want := full(time.Now().UTC())
	s := openIn(t, dir)
	appendAll(t, s, want, call(want.TraceID, "00f067aa0ba902b6", "", "client", want.Start, time.Second))
	require.NoError(t, s.Close())
	s = openIn(t, dir)
	got, err := s.Trace(t.Context(), want.TraceID)
	require.NoError(t, err)
	require.Len(t, got.Spans, 2)
	links, err := s.Dependencies(t.Context(), time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []Dependency{{"client", "shop.tracing", 1, 1}}, links)
}

// call is a short span.
func call(trace, id, parent, service string, at time.Time, took time.Duration, attributes ...Attribute) Span {
	return Span{
		TraceID: trace, SpanID: id, ParentID: parent, Service: service, Name: "GET", Kind: KindServer, Start: at, Duration: took,
		Attributes: attributes,
	}
}

func trace(n int) string { return fmt.Sprintf("%032x", n+1) }
func id(n int) string    { return fmt.Sprintf("%016x", n+1) }

func ids(traces []Trace) []string {
	out := []string{}
	for _, t := range traces {
		out = append(out, t.ID)
	}
	return out
}

func TestFind(t *testing.T) { testFind(t, func(*Store, time.Time) {}) }

// TestFindAmongManyKeys finds the same where services have sent more keys than the storage has columns, also for tomorrow.
func TestFindAmongManyKeys(t *testing.T) {
	testFind(t, func(s *Store, now time.Time) {
		for i := range 30 {
			one := call(trace(100+i), id(100+i), "", fmt.Sprint("hostile", i), now.Add(23*time.Hour+50*time.Minute), 1)
			if i%2 == 0 {
				one.Start = now.Add(-5 * time.Hour)
			}
			for k := range 100 {
				one.Attributes = append(one.Attributes, str(fmt.Sprintf("key-%d-%d", i, k), "v"))
			}
			appendAll(t, s, one)
		}
		settle(t, s)
		require.NotZero(t, s.Stats().Folded)
	})
}

func testFind(t *testing.T, before func(*Store, time.Time)) {
	s := open(t)
	now := time.Now().UTC()
	before(s, now)
	one := full(now.Add(-time.Hour))
	other := call(trace(1), id(1), "", "stock.tracing", now.Add(-2*time.Hour), 3*time.Second, str("guid:x-request-id", "30450c11-359b-9e2d-9844-a7a456c25a09"),
		str("http.status_code", "503"), str("key*", `a"b`), str(strings.Repeat("k", 300), "long"))
	third := call(trace(2), id(2), "", "stock.tracing", now.Add(-3*time.Hour), 2*time.Second, Attribute{"http.response.status_code", Value{Int, "200"}},
		str("url.path", "/orders/17"))
	appendAll(t, s, one, other, third)

	tags := func(key, value string) Query { return Query{Tags: map[string]string{key: value}} }
	for name, test := range map[string]struct {
		query Query
		want  []Span
	}{
		"nothing":            {Query{}, []Span{one, other, third}},
		"slowest":            {Query{Slowest: true}, []Span{other, third, one}},
		"limit":              {Query{Limit: 1}, []Span{one}},
		"slowest, limit":     {Query{Limit: 1, Slowest: true}, []Span{other}},
		"service":            {Query{Service: "stock.tracing"}, []Span{other, third}},
		"operation":          {Query{Service: "shop.tracing", Operation: one.Name}, []Span{one}},
		"operation alone":    {Query{Operation: one.Name}, []Span{one}},
		"times":              {Query{Start: now.Add(-150 * time.Minute), End: now.Add(-90 * time.Minute)}, []Span{other}},
		"min duration":       {Query{MinDuration: 2500 * time.Millisecond}, []Span{other}},
		"max duration":       {Query{MaxDuration: 2500 * time.Millisecond}, []Span{one, third}},
		"request id":         {Query{RequestID: "30450c11-359b-9e2d-9844-a7a456c25a09"}, []Span{other}},
		"part of request id": {Query{RequestID: "30450c11"}, nil},
		"path in a URL":      {Query{Path: "/a/b"}, []Span{one}},
		"path":               {Query{Path: "orders/17"}, []Span{third}},
		"error":              {Query{Status: "error"}, []Span{one}},
		"503":                {Query{Status: "503"}, []Span{other}},
		"5xx":                {Query{Status: "5xx"}, []Span{other}},
		"200":                {Query{Status: "200"}, []Span{third}},
		"2xx":                {Query{Status: "2xx"}, []Span{third}},
		"text":               {tags("http.url", "http://shop:8080/a/b?c=d"), []Span{one}},
		"int":                {tags("int", "-7"), []Span{one}},
		"float":              {tags("double", "0.5"), []Span{one}},
		"bool":               {tags("yes", "true"), []Span{one}},
		"empty":              {tags("empty", ""), []Span{one}},
		"list":               {tags("list", `["a",1]`), []Span{one}},
		"resource":           {tags("host.name", "node-1"), []Span{one}},
		"event's attribute":  {tags("exception.type", "ValueError"), []Span{one}},
		"event":              {tags("event", "exception"), []Span{one}},
		"error as a tag":     {tags("error", "true"), []Span{one}},
		"kind":               {Query{Service: "stock.tracing", Tags: map[string]string{"span.kind": "server"}}, []Span{other, third}},
		"status code":        {tags("otel.status_code", "ERROR"), []Span{one}},
		"scope":              {tags("otel.scope.name", "envoy"), []Span{one}},
		"star in the key":    {tags("key*", `a"b`), []Span{other}},
		"long key":           {tags(strings.Repeat("k", 300), "long"), []Span{other}},
		"two tags":           {Query{Tags: map[string]string{"int": "-7", "yes": "false"}}, nil},
		"hostile value":      {tags("int", `-7" or "`), nil},
		"hostile key":        {tags(`x":* or "`, "1"), nil},
		"hostile service":    {Query{Service: `x" or *`}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			want := []string{}
			for _, s := range test.want {
				want = append(want, s.TraceID)
			}
			if test.query.Start.IsZero() {
				test.query.Start, test.query.End = now.Add(-4*time.Hour), now
			}
			got, err := s.Find(t.Context(), test.query)
			require.NoError(t, err)
			require.Equal(t, want, ids(got))
		})
	}
	for _, bad := range []Query{
		{Status: "bad"}, {Status: "6xx"}, {Status: "50"}, {Limit: -1}, {Service: strings.Repeat("x", 3000)},
		{Tags: map[string]string{"1": "", "2": "", "3": "", "4": "", "5": "", "6": "", "7": "", "8": "", "9": "", "10": "", "11": "", "12": "", "13": "", "14": "", "15": "", "16": "", "17": ""}},
	} {
		_, err := s.Find(t.Context(), bad)
		require.ErrorIs(t, err, ErrQuery)
	}
}

// TestFindManySpansOfFewTraces looks for traces behind more spans than are looked at in one step, of which many started in the same nanosecond.
func TestFindManySpansOfFewTraces(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	var spans []Span
	for n := range 40 {
		at := now.Add(-time.Duration(n) * time.Second)
		for i := range 100 {
			spans = append(spans, call(trace(n), id(n*1000+i), "", "many", at, time.Duration(1000-i)))
		}
	}
	appendAll(t, s, spans...)
	settle(t, s)
	for _, slowest := range []bool{false, true} {
		got, err := s.Find(t.Context(), Query{Limit: 30, Slowest: slowest})
		require.NoError(t, err)
		require.Len(t, got, 30)
		if !slowest {
			for n := range got {
				require.Equal(t, trace(n), got[n].ID)
				require.Len(t, got[n].Spans, 100)
			}
		}
	}
}

func TestServicesAndOperations(t *testing.T) {
	s := open(t)
	now := time.Now()
	services, err := s.Services(t.Context(), time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Empty(t, services)

	client := call(trace(1), id(3), "", "a", now, 1)
	client.Kind = KindClient
	appendAll(t, s, call(trace(1), id(1), "", "b", now, 1), call(trace(1), id(2), id(1), "a", now, 1), client)
	require.NoError(t, s.writeCalls())
	services, err = s.Services(t.Context(), time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []string{"a", "b"}, services)
	operations, err := s.Operations(t.Context(), "a", nil, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []Operation{{"GET", KindServer}, {"GET", KindClient}}, operations)
	kind := KindClient
	operations, err = s.Operations(t.Context(), "a", &kind, time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []Operation{{"GET", KindClient}}, operations)
}

func TestDependencies(t *testing.T) {
	s := open(t)
	now := time.Now()
	failed := call(trace(1), id(3), id(1), "back", now, 1)
	failed.Status = StatusError
	shared := call(trace(2), id(4), "", "back", now, 1)
	shared.Shared = true
	client := call(trace(2), id(4), "", "front", now, 1)
	client.Kind = KindClient
	appendAll(t, s,
		call(trace(1), id(2), id(1), "back", now, 1), // before its parent
		call(trace(1), id(1), "", "front", now, 1),
		call(trace(1), id(5), id(1), "front", now, 1), // inside of one service
		failed, shared, client)
	want := []Dependency{{"front", "back", 3, 1}}
	for range 2 {
		got, err := s.Dependencies(t.Context(), now.Add(-time.Hour), now.Add(time.Hour))
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.NoError(t, s.writeCalls())
	}
	got, err := s.Dependencies(t.Context(), now.Add(-2*time.Hour), now.Add(-time.Hour))
	require.NoError(t, err)
	require.Empty(t, got)
}

func TestWhatIsNoSpan(t *testing.T) {
	s := open(t)
	now := time.Now()
	for reason, span := range map[string]Span{
		"trace id":   call("", id(1), "", "a", now, 1),
		"16 bytes":   call(strings.Repeat("0", 32), id(1), "", "a", now, 1),
		"is not 16":  call(strings.Repeat("G", 32), id(1), "", "a", now, 1),
		"span id":    call(trace(1), "1", "", "a", now, 1),
		"parent":     call(trace(1), id(1), "zz", "a", now, 1),
		"older than": call(trace(1), id(1), "", "a", time.Unix(0, 1), 1),
		"future":     call(trace(1), id(1), "", "a", now.Add(48*time.Hour), 1),
	} {
		r, err := s.Append([]Span{span, call(trace(9), id(9), "", "a", now, 1)})
		require.NoError(t, err)
		require.Equal(t, 1, r.Stored, reason)
		require.Equal(t, 1, r.Refused, reason)
		require.Contains(t, r.Reason, reason)
	}
	require.EqualValues(t, 7, s.Stats().Stored)
	require.EqualValues(t, 7, s.Stats().Refused)
}

func TestLimitsOnASpan(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	big := call(trace(1), id(1), "0000000000000000", strings.Repeat("s", 1000), now, -5, str("", "no key"), str("twice", "1"), str("twice", "2"), str("bad", "a\xffb\x00c"),
		str("long", strings.Repeat("ä", MaxValueBytes)), Attribute{"int", Value{Int, "no int"}}, Attribute{"type", Value{'?', "x"}})
	big.Kind, big.Status = 99, 99
	for i := range 300 {
		big.Attributes = append(big.Attributes, str(fmt.Sprintf("k%03d", i), "v"))
		big.Resource = append(big.Resource, str(fmt.Sprintf("r%03d", i), "v"))
		big.Scope.Attributes = append(big.Scope.Attributes, str(fmt.Sprintf("c%03d", i), "v"))
		big.Events = append(big.Events, Event{now, "e", []Attribute{str("x", strings.Repeat("y", 1000))}})
		big.Links = append(big.Links, Link{TraceID: trace(2), SpanID: id(2)})
	}
	big.Links[0].SpanID = "nonsense"
	appendAll(t, s, big)
	found, err := s.Trace(t.Context(), trace(1))
	require.NoError(t, err)
	got := found.Spans[0]
	require.Equal(t, strings.Repeat("s", MaxServiceBytes), got.Service)
	require.Empty(t, got.ParentID)
	require.Zero(t, got.Duration)
	require.Equal(t, KindUnspecified, got.Kind)
	require.Equal(t, StatusUnset, got.Status)
	require.Len(t, got.Attributes, MaxAttributes)
	require.Len(t, got.Resource, MaxResourceAttributes)
	require.Len(t, got.Scope.Attributes, MaxScopeAttributes)
	require.Less(t, size(&got), 2*MaxSpanBytes)
	require.Len(t, got.Warnings, 1)
	for _, part := range []string{"1 values were cut", "attributes were left off", "events were left off", "links were left off", "1 names were cut"} {
		require.Contains(t, got.Warnings[0], part)
	}
	values := map[string]Value{}
	for _, a := range got.Attributes {
		values[a.Key] = a.Value
	}
	require.Equal(t, Value{String, "1"}, values["twice"])
	require.Equal(t, Value{String, "a�b\x00c"}, values["bad"])
	require.Equal(t, Value{String, strings.Repeat("ä", MaxValueBytes/2)}, values["long"])
	require.Equal(t, Value{String, "no int"}, values["int"])
	require.Equal(t, Value{String, "x"}, values["type"])
}

// TestManyKeys sends more keys than the storage has columns: nothing is lost, and all of it is found.
func TestManyKeys(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	const spans, each = 60, 100
	for i := range spans {
		one := call(trace(i), id(i), "", "hostile", now, 1)
		for j := range each {
			one.Attributes = append(one.Attributes, str(fmt.Sprintf("key-%d-%d", i, j), fmt.Sprintf("<%d>", j)))
		}
		appendAll(t, s, one)
	}
	settle(t, s)
	for i := range spans {
		got, err := s.Find(t.Context(), Query{Tags: map[string]string{fmt.Sprintf("key-%d-%d", i, each-1): fmt.Sprintf("<%d>", each-1)}})
		require.NoError(t, err)
		require.Equal(t, []string{trace(i)}, ids(got))
		require.Len(t, got[0].Spans[0].Attributes, each)
	}
}

func TestManyServices(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	for i := range maxStreams + 100 {
		appendAll(t, s, call(trace(i), id(i), "", fmt.Sprintf("service-%04d", i), now, 1))
	}
	settle(t, s)
	require.Less(t, s.Stats().Streams, int64(maxStreams+10))
	services, err := s.Services(t.Context(), time.Time{}, time.Time{})
	require.NoError(t, err)
	require.Len(t, services, maxStreams+100)
	got, err := s.Find(t.Context(), Query{Service: fmt.Sprintf("service-%04d", maxStreams+99)})
	require.NoError(t, err)
	require.Equal(t, []string{trace(maxStreams + 99)}, ids(got))
}

// TestLongTrace asks for traces of which one is longer than an answer may be.
func TestLongTrace(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	var spans []Span
	for i := range MaxTraceSpans + 10 {
		spans = append(spans, call(trace(1), id(i), "", "endless", now, 1))
	}
	r, err := s.Append(spans)
	require.NoError(t, err)
	require.Equal(t, MaxTraceSpans, r.Stored)
	require.Equal(t, 10, r.Refused)
	require.Contains(t, r.Reason, "a trace has more than 10000 spans")
	appendAll(t, s, call(trace(2), id(1), "", "endless", now.Add(-time.Second), 1))
	settle(t, s)

	got, err := s.Find(t.Context(), Query{})
	require.NoError(t, err)
	require.Equal(t, []string{trace(1), trace(2)}, ids(got))
	require.Len(t, got[0].Spans, MaxTraceSpans)
	require.Empty(t, got[0].Incomplete)

	heavy := call(trace(3), id(0), "", "heavy", now.Add(time.Second), 1, str("text", strings.Repeat("x", MaxValueBytes)))
	for i := range 2100 {
		heavy.SpanID = id(i)
		appendAll(t, s, heavy)
	}
	settle(t, s)
	got, err = s.Find(t.Context(), Query{})
	require.NoError(t, err)
	require.Equal(t, []string{trace(3)}, ids(got), "an answer has one trace at least, and no more than fit")
	require.Contains(t, got[0].Incomplete, "more spans")
	walked := 0
	require.NoError(t, s.Walk(t.Context(), Query{}, func(Trace) bool {
		require.Empty(t, s.loads, "others may ask while a client reads")
		walked++
		return true
	}))
	require.Equal(t, 3, walked)
}

func TestAskingEnds(t *testing.T) {
	s := open(t)
	for range loads {
		release, err := s.load(t.Context())
		require.NoError(t, err)
		defer release()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Trace(ctx, trace(1))
	require.ErrorIs(t, err, context.Canceled)
	_, err = s.Find(ctx, Query{})
	require.ErrorIs(t, err, context.Canceled)
	// One place is kept for an administrator.
	_, err = s.Find(privilege.With(t.Context()), Query{})
	require.NoError(t, err)
	require.Empty(t, s.own)
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	s := openIn(t, dir)
	appendAll(t, s, full(time.Now().UTC()))
	require.NoError(t, s.Close())
	s, err := Open(Options{Dir: dir, Retention: 7 * 24 * time.Hour, ReadOnly: true, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	got, err := s.Find(t.Context(), Query{})
	require.NoError(t, err)
	require.Len(t, got, 1)
	_, err = s.Append([]Span{full(time.Now().UTC())})
	require.Error(t, err)
}
