package jaeger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/tracestore"
)

// answered is what a client reads of an answer.
type answered struct {
	Data   json.RawMessage
	Total  int
	Errors []responseError
}

type gotTrace struct {
	TraceID string
	Spans   []struct {
		TraceID, SpanID, OperationName, ProcessID string
		References                                []reference
		Tags                                      []tag
	}
	Processes map[string]process
}

func traces(t *testing.T, a answered) []gotTrace {
	t.Helper()
	var out []gotTrace
	require.NoError(t, json.Unmarshal(a.Data, &out), string(a.Data))
	return out
}

// wantGolden compares with a file. Times of the trace, which begin at start, become times since the beginning of 2026.
func wantGolden(t *testing.T, name string, start time.Time, text []byte) {
	t.Helper()
	fixed := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, offset := range []time.Duration{0, -time.Millisecond, time.Microsecond, 4 * time.Millisecond, 5 * time.Millisecond} {
		was, is := start.Add(offset), fixed.Add(offset)
		text = bytes.ReplaceAll(text, []byte(strconv.FormatInt(was.UnixNano(), 10)), []byte(strconv.FormatInt(is.UnixNano(), 10)))
		text = bytes.ReplaceAll(text, []byte(strconv.FormatInt(was.UnixMicro(), 10)), []byte(strconv.FormatInt(is.UnixMicro(), 10)))
	}
	var pretty bytes.Buffer
	require.NoError(t, json.Indent(&pretty, text, "", "  "))
	file := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(file, pretty.Bytes(), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), pretty.String())
}

func fetch(t *testing.T, url string) []byte {
	t.Helper()
	answer, err := http.Get(url)
	require.NoError(t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, answer.StatusCode, string(text))
	return text
}

func TestShape(t *testing.T) {
	s := open(t)
	start := time.Now().UTC().Truncate(time.Microsecond)
	spans := request(start)
	store(t, s, spans...)
	url := api(t, s)
	wantGolden(t, "trace.json", start, fetch(t, url+"/api/traces/"+spans[0].TraceID))
	wantGolden(t, "traces.json", start, fetch(t, url+"/api/traces?service=back.shop"))
	wantGolden(t, "trace-v3.json", start, fetch(t, url+"/api/v3/traces/"+spans[0].TraceID))
	wantGolden(t, "services.json", start, fetch(t, url+"/api/services"))
	wantGolden(t, "operations.json", start, fetch(t, url+"/api/operations?service=back.shop"))
	wantGolden(t, "operation-names.json", start, fetch(t, url+"/api/services/back.shop/operations"))
	wantGolden(t, "dependencies.json", start, fetch(t, url+"/api/dependencies?lookback=3600000&endTs="+strconv.FormatInt(start.Add(time.Minute).UnixMilli(), 10)))
	for _, path := range []string{"/api/traces/" + spans[0].TraceID, "/api/services", "/api/v3/services"} {
		require.Equal(t, fetch(t, url+path), fetch(t, url+"/jaeger"+path))
	}
	require.Equal(t, fetch(t, url+"/api/v3/traces/"+spans[0].TraceID), fetch(t, url+"/api/v3/traces?query.service_name=back.shop&query.start_time_min="+start.Add(-time.Hour).Format(time.RFC3339Nano)))
}

func TestNotFound(t *testing.T) {
	url := api(t, open(t))
	var a answered
	// Grafana reads the first element of data without looking whether there is one.
	require.Equal(t, http.StatusNotFound, get(t, url+"/api/traces/4bf92f3577b34da6a3ce929d0e0e4736", &a))
	require.Equal(t, answered{Data: json.RawMessage("null"), Errors: []responseError{{Code: 404, Msg: "trace not found"}}}, a)

	var v3 errorV3
	for _, path := range []string{"/api/v3/traces/4bf92f3577b34da6a3ce929d0e0e4736", "/api/v3/traces?query.service_name=x"} {
		require.Equal(t, http.StatusNotFound, get(t, url+path, &v3))
		require.Equal(t, 404, v3.Error.HTTPCode)
	}
	a = answered{}
	require.Equal(t, http.StatusOK, get(t, url+"/api/traces?service=x", &a))
	require.JSONEq(t, `[]`, string(a.Data))
	require.Nil(t, a.Errors)
	require.Equal(t, http.StatusOK, get(t, url+"/api/services", &a))
	require.JSONEq(t, `[]`, string(a.Data))
	require.Equal(t, http.StatusOK, get(t, url+"/api/dependencies", &a))
	require.JSONEq(t, `[]`, string(a.Data))
	require.Equal(t, http.StatusNotFound, get(t, url+"/", nil))
}

func TestSearch(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	spans := request(now)
	store(t, s, spans...)
	old := spans[0]
	old.TraceID, old.Start, old.Name, old.Duration = "00000000000000000000000000000def", now.Add(-72*time.Hour), "odd/name with spaces", time.Second
	store(t, s, old)
	base := api(t, s)
	micros := func(at time.Time) string { return strconv.FormatInt(at.UnixMicro(), 10) }
	young, aged := spans[0].TraceID, "0000000000000def"
	for _, test := range []struct {
		query url.Values
		want  []string
	}{
		{url.Values{}, []string{young}}, // two days back
		{url.Values{"start": {micros(now.Add(-100 * time.Hour))}}, []string{young, aged}},
		{url.Values{"lookback": {"100h"}}, []string{young, aged}},
		{url.Values{"lookback": {"custom"}, "start": {micros(now.Add(-100 * time.Hour))}, "end": {micros(now.Add(-time.Hour))}}, []string{aged}},
		{url.Values{"service": {"front.shop"}, "limit": {"1"}, "lookback": {"100h"}}, []string{young}},
		{url.Values{"lookback": {"100h"}, "limit": {"1"}, "order": {"slowest"}}, []string{aged}},
		{url.Values{"service": {"front.shop"}, "operation": {"odd/name with spaces"}, "lookback": {"100h"}}, []string{aged}},
		{url.Values{"service": {"front.shop"}, "tags": {`{"int":"7"}`}}, []string{young}},
		{url.Values{"service": {"front.shop"}, "tags": {`{"int":7,"bool":true}`}}, []string{young}},
		{url.Values{"service": {"front.shop"}, "tag": {"host.name:node-1", "int:8"}}, nil},
		{url.Values{"service": {"back.shop"}, "tags": {`{"error":"true"}`}}, []string{young}},
		{url.Values{"minDuration": {"4.5ms"}, "maxDuration": {"6ms"}}, []string{young}},
		{url.Values{"minDuration": {"1h"}}, nil},
		{url.Values{"status": {"503"}}, []string{young}},
		{url.Values{"traceID": {young, aged}}, []string{young, aged}},
	} {
		var a answered
		require.Equal(t, http.StatusOK, get(t, base+"/api/traces?"+test.query.Encode(), &a))
		var got []string
		for _, one := range traces(t, a) {
			got = append(got, one.TraceID)
		}
		require.Equal(t, test.want, got, test.query)
	}
	var a answered
	require.Equal(t, http.StatusOK, get(t, base+"/api/traces?traceID=1&traceID="+young, &a))
	require.Len(t, traces(t, a), 1)
	require.Equal(t, []responseError{{Msg: "trace not found", TraceID: "1"}}, a.Errors)

	require.Equal(t, http.StatusOK, get(t, base+"/api/operations?service=front.shop&spanKind=client", &a))
	require.JSONEq(t, `[{"name":"GET /","spanKind":"client"},{"name":"odd/name with spaces","spanKind":"client"}]`, string(a.Data))
	require.Equal(t, http.StatusOK, get(t, base+"/api/operations?service=front.shop&spanKind=server", &a))
	require.JSONEq(t, `[]`, string(a.Data))

	for path, code := range map[string]int{
		"/api/traces?limit=x":                                   400,
		"/api/traces?limit=-1":                                  400,
		"/api/traces?start=yesterday":                           400,
		"/api/traces?end=99999999999999999999":                  400,
		"/api/traces?start=9223372036854775807":                 400,
		"/api/traces?minDuration=5":                             400,
		"/api/traces?minDuration=5s&maxDuration=1s":             400,
		"/api/traces?tag=x":                                     400,
		"/api/traces?tags=x":                                    400,
		"/api/traces?status=x":                                  400,
		"/api/traces?traceID=x":                                 400,
		"/api/traces?service=%zz":                               400,
		"/api/traces/x":                                         400,
		"/api/traces/" + strings.Repeat("1", 33):                400,
		"/api/operations":                                       400,
		"/api/operations?service=x&spanKind=x":                  400,
		"/api/dependencies?endTs=x":                             400,
		"/api/dependencies?lookback=x":                          400,
		"/api/traces?" + strings.Repeat("traceID=1&", maxIDs+1): 400,
	} {
		var a answered
		require.Equal(t, code, get(t, base+path, &a), path)
		require.Len(t, a.Errors, 1)
		require.Equal(t, code, a.Errors[0].Code)
		require.NotEmpty(t, a.Errors[0].Msg)
	}
	for _, path := range []string{
		"/api/v3/traces?query.start_time_min=x", "/api/v3/traces?query.start_time_max=1", "/api/v3/traces?query.num_traces=x", "/api/v3/traces?query.duration_min=x",
		"/api/v3/traces?query.attributes=x", "/api/v3/operations", "/api/v3/traces/x", "/api/v3/dependencies?start_time=x",
	} {
		var e errorV3
		require.Equal(t, http.StatusBadRequest, get(t, base+path, &e), path)
		require.NotEmpty(t, e.Error.Message)
	}
	for _, path := range []string{
		"/api/v3/traces?query.serviceName=front.shop&query.startTimeMin=2020-01-01T00:00:00Z&query.durationMin=500ms&query.searchDepth=5",
		`/api/v3/traces?query.service_name=front.shop&query.start_time_min=2020-01-01T00:00:00Z&query.attributes={"int":"7"}&query.num_traces=1&query.duration_min=500ms`,
	} {
		var result struct {
			Result struct {
				ResourceSpans []struct {
					ScopeSpans []struct {
						Spans []struct{ TraceID, Name string }
					}
				}
			}
		}
		require.Equal(t, http.StatusOK, get(t, base+strings.NewReplacer(`"`, "%22", "{", "%7B", "}", "%7D").Replace(path), &result), path)
		require.Equal(t, "00000000000000000000000000000def", result.Result.ResourceSpans[0].ScopeSpans[0].Spans[0].TraceID)
	}
}

// TestManyTraces reads more than is held in memory at a time.
func TestManyTraces(t *testing.T) {
	s := open(t)
	now := time.Now().UTC()
	for n := range 300 {
		spans := request(now.Add(-time.Duration(n) * time.Second))
		for i := range spans {
			spans[i].TraceID = fmt.Sprintf("%032x", n+1<<60)
			spans[i].Attributes = append(spans[i].Attributes, attribute("text", tracestore.String, strings.Repeat("x", tracestore.MaxValueBytes)))
		}
		store(t, s, spans...)
	}
	url := api(t, s) + "/api/traces?limit=2000"
	// What comes this fast is not visible at once.
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		var a answered
		require.Equal(c, http.StatusOK, get(t, url, &a))
		require.Empty(c, a.Errors)
		require.Equal(c, 300, len(traces(t, a))) // and not Len, which would print them
	}, time.Minute, 100*time.Millisecond)
}

// slowClient takes a time for each part of an answer, if the deadline allows.
type slowClient struct {
	*httptest.ResponseRecorder
	takes    time.Duration
	deadline time.Time
}

func (s *slowClient) SetWriteDeadline(at time.Time) error {
	s.deadline = at
	return nil
}

func (s *slowClient) Write(text []byte) (int, error) {
	if left := time.Until(s.deadline); left < s.takes {
		time.Sleep(left)
		return 0, os.ErrDeadlineExceeded
	}
	time.Sleep(s.takes)
	return s.ResponseRecorder.Write(text)
}

// An answer must be read, part by part, and in a time.
func TestSlowClients(t *testing.T) {
	part := strings.Repeat("x", writeBytes)
	for takes, until := range map[time.Duration]time.Duration{writeTime + 1: writeTime, writeTime: callTime} {
		synctest.Test(t, func(t *testing.T) {
			client := &slowClient{ResponseRecorder: httptest.NewRecorder(), takes: takes}
			begin := time.Now()
			out := newStream(client, "")
			for out.addText([]byte(part)) {
			}
			require.Equal(t, until, time.Since(begin))
			client = &slowClient{ResponseRecorder: httptest.NewRecorder(), takes: takes}
			begin = time.Now()
			writeJSON(client, http.StatusOK, strings.Repeat(part, 100))
			require.Equal(t, until, time.Since(begin))
		})
	}
}
