package loki

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }

// testAt is a whole minute in the past.
var testAt = time.Now().Add(-30 * time.Minute).Truncate(time.Minute)

// serve starts the API with a real store, on a real socket.
func serve(t *testing.T, entries ...logstore.Entry) (*httptest.Server, *logstore.Store) {
	t.Helper()
	store := logstoretest.Open(t, rowstore.Options{Dir: t.TempDir()})
	if len(entries) > 0 {
		require.NoError(t, store.Append(entries))
	}
	server := httptest.NewServer(New(Options{Store: store, Log: slog.New(slog.DiscardHandler)}))
	t.Cleanup(server.Close)
	return server, store
}

func fields(pairs ...string) []logstore.Field {
	var f []logstore.Field
	for i := 0; i < len(pairs); i += 2 {
		f = append(f, logstore.Field{Name: pairs[i], Value: pairs[i+1]})
	}
	return f
}

// do sends a request and returns the answer, decoded if it is JSON.
func do(t *testing.T, method, address string, header http.Header, body io.Reader) (int, map[string]any, string) {
	t.Helper()
	r, err := http.NewRequest(method, address, body)
	require.NoError(t, err)
	for name, values := range header {
		r.Header[name] = values
	}
	response, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	var decoded map[string]any
	if strings.HasPrefix(response.Header.Get("Content-Type"), "application/json") {
		require.NoError(t, json.Unmarshal(text, &decoded), string(text))
	}
	return response.StatusCode, decoded, string(text)
}

func ns(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) }

// dig walks into decoded JSON.
func dig(v any, path ...any) any {
	for _, step := range path {
		switch s := step.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[s]
		case int:
			list, _ := v.([]any)
			if s >= len(list) {
				return nil
			}
			v = list[s]
		}
	}
	return v
}

// TestContract is the requests of Grafana's Loki data source, and the shape of the answers that it decodes.
func TestContract(t *testing.T) {
	var entries []logstore.Entry
	for i := range 10 {
		entries = append(entries, logstore.Entry{Time: testAt.Add(time.Duration(i) * time.Second), Line: fmt.Sprintf(`{"level":"info","n":%d}`, i),
			Labels: fields("job", "pods", "namespace", "shop", "pod", "api-"+strconv.Itoa(i%2)), Metadata: fields("trace_id", "t"+strconv.Itoa(i))})
	}
	server, _ := serve(t, entries...)
	start, end := ns(testAt.Add(-time.Minute)), ns(testAt.Add(time.Minute))
	categorize := http.Header{"X-Loki-Response-Encoding-Flags": {"categorize-labels"}, "X-Scope-Orgid": {"anybody"}, "X-Query-Tags": {"Source=grafana"}}
	for name, c := range map[string]struct {
		path   string
		query  url.Values
		header http.Header
		status int
		check  func(t *testing.T, got map[string]any, text string)
	}{
		"health check": {path: "/loki/api/v1/query", query: url.Values{"query": {"vector(1)+vector(1)"}, "direction": {"backward"}, "time": {ns(time.Now())}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, "success", got["status"])
			require.Equal(t, "vector", dig(got, "data", "resultType"))
			require.Equal(t, "2", dig(got, "data", "result", 0, "value", 1), text)
			require.NotNil(t, dig(got, "data", "stats", "summary", "execTime"))
		}},
		"lines": {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{namespace="shop"} |= "info"`}, "start": {start}, "end": {end}, "limit": {"4"}, "direction": {"backward"}, "step": {"1000ms"}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, "streams", dig(got, "data", "resultType"))
			require.Len(t, dig(got, "data", "result"), 4) // each line has metadata of its own, so it is a stream of its own
			require.Equal(t, "info", dig(got, "data", "result", 0, "stream", "detected_level"))
			require.Equal(t, "t6", dig(got, "data", "result", 0, "stream", "trace_id"), text)
			require.Equal(t, ns(testAt.Add(6*time.Second)), dig(got, "data", "result", 0, "values", 0, 0))
			require.NotContains(t, text, "encodingFlags")
		}},
		"lines with categories": {path: "/loki/api/v1/query_range", header: categorize, query: url.Values{"query": {`{namespace="shop"} | json`}, "start": {start}, "end": {end}, "limit": {"6"}, "direction": {"backward"}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, []any{"categorize-labels"}, dig(got, "data", "encodingFlags"))
			require.Len(t, dig(got, "data", "result"), 2)
			require.Equal(t, map[string]any{"job": "pods", "namespace": "shop", "pod": "api-1"}, dig(got, "data", "result", 1, "stream"), text)
			require.Len(t, dig(got, "data", "result", 1, "values"), 3)
			require.Equal(t, map[string]any{"structuredMetadata": map[string]any{"trace_id": "t9", "detected_level": "info"}, "parsed": map[string]any{"level": "info", "n": "9"}},
				dig(got, "data", "result", 1, "values", 0, 2), text)
			require.Equal(t, ns(testAt.Add(5*time.Second)), dig(got, "data", "result", 1, "values", 2, 0), "newest first")
		}},
		"histogram": {path: "/loki/api/v1/query_range", header: categorize, query: url.Values{"query": {`sum by (level, detected_level) (count_over_time({namespace="shop"} | drop __error__[1m]))`}, "start": {start}, "end": {end}, "step": {"60000ms"}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, "matrix", dig(got, "data", "resultType"))
			require.Equal(t, map[string]any{"detected_level": "info"}, dig(got, "data", "result", 0, "metric"), text)
			require.Equal(t, "1", dig(got, "data", "result", 0, "values", 0, 1), text)
			require.Equal(t, float64(testAt.Unix()), dig(got, "data", "result", 0, "values", 0, 0), text)
			require.Equal(t, "9", dig(got, "data", "result", 0, "values", 1, 1), text)
		}},
		"instant": {path: "/loki/api/v1/query", query: url.Values{"query": {`sum(count_over_time({namespace="shop"}[5m]))`}, "time": {ns(testAt.Add(time.Minute))}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, "10", dig(got, "data", "result", 0, "value", 1), text)
			require.Equal(t, map[string]any{}, dig(got, "data", "result", 0, "metric"))
		}},
		"scalar": {path: "/loki/api/v1/query", query: url.Values{"query": {`1+1`}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, "scalar", dig(got, "data", "resultType"))
			require.Equal(t, "2", dig(got, "data", "result", 1))
		}},
		"labels": {path: "/loki/api/v1/labels", query: url.Values{"start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, []any{"job", "namespace", "pod"}, got["data"])
		}},
		"old labels": {path: "/loki/api/v1/label", query: url.Values{"since": {"1h"}}, check: func(t *testing.T, got map[string]any, text string) { require.Len(t, got["data"], 3) }},
		"label values": {path: "/loki/api/v1/label/pod/values", query: url.Values{"query": {`{namespace="shop"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, []any{"api-0", "api-1"}, got["data"])
		}},
		"no values":  {path: "/loki/api/v1/label/none/values", check: func(t *testing.T, got map[string]any, text string) { require.Equal(t, []any{}, got["data"], text) }},
		"series":     {path: "/loki/api/v1/series", query: url.Values{"match[]": {`{pod="api-1"}`, `{namespace="shop"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) { require.Len(t, got["data"], 2, text) }},
		"all series": {path: "/loki/api/v1/series", query: url.Values{"match[]": {`{}`}}, check: func(t *testing.T, got map[string]any, text string) { require.Len(t, got["data"], 2, text) }},
		"index stats": {path: "/loki/api/v1/index/stats", query: url.Values{"query": {`{namespace="shop"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"streams": 2., "chunks": 0., "entries": 10., "bytes": 220.}, got)
		}},
		"volume": {path: "/loki/api/v1/index/volume", query: url.Values{"query": {`{namespace="shop", pod=~".+"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"namespace": "shop", "pod": "api-0"}, dig(got, "data", "result", 0, "metric"), text)
			require.Equal(t, "110", dig(got, "data", "result", 0, "value", 1))
		}},
		"volume by label": {path: "/loki/api/v1/index/volume", query: url.Values{"query": {`{namespace="shop", pod=~".+"}`}, "aggregateBy": {"labels"}, "targetLabels": {"pod"}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"pod": ""}, dig(got, "data", "result", 0, "metric"), text)
			require.Equal(t, "220", dig(got, "data", "result", 0, "value", 1))
		}},
		"volume range": {path: "/loki/api/v1/index/volume_range", query: url.Values{"query": {`{}`}, "targetLabels": {"namespace"}, "step": {"60"}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"namespace": "shop"}, dig(got, "data", "result", 0, "metric"), text)
			require.Len(t, dig(got, "data", "result", 0, "values"), 2)
		}},
		"detected labels": {path: "/loki/api/v1/detected_labels", query: url.Values{"start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"label": "pod", "cardinality": 2.}, dig(got, "detectedLabels", 2), text)
		}},
		"detected fields": {path: "/loki/api/v1/detected_fields", query: url.Values{"query": {`{namespace="shop"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, map[string]any{"label": "n", "cardinality": 10., "type": "int", "parsers": []any{"json"}}, dig(got, "fields", 2), text)
		}},
		"detected values": {path: "/loki/api/v1/detected_field/level/values", query: url.Values{"query": {`{namespace="shop"}`}, "start": {start}, "end": {end}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, []any{"info"}, got["values"])
		}},
		"patterns": {path: "/loki/api/v1/patterns", query: url.Values{"query": {`{namespace="shop"}`}}, check: func(t *testing.T, got map[string]any, text string) { require.Equal(t, []any{}, got["data"]) }},
		"format": {path: "/loki/api/v1/format_query", query: url.Values{"query": {`sum(rate({a="b"}[5m]))by(c)`}}, check: func(t *testing.T, got map[string]any, text string) {
			require.Equal(t, `sum by (c) (rate({a="b"} [5m0s]))`, got["data"])
		}},
		"build": {path: "/loki/api/v1/status/buildinfo", check: func(t *testing.T, got map[string]any, text string) { require.Equal(t, apiVersion, got["version"]) }},
		"bad query": {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{a="b"} |= x`}}, status: 400, check: func(t *testing.T, _ map[string]any, text string) {
			require.Equal(t, "parse error at line 1, col 12: syntax error: unexpected x, expecting string\n", text)
		}},
		"no matcher":    {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{}`}}, status: 400},
		"instant lines": {path: "/loki/api/v1/query", query: url.Values{"query": {`{a="b"}`}}, status: 400},
		"bad time":      {path: "/loki/api/v1/query", query: url.Values{"query": {`vector(1)`}, "time": {"yesterday"}}, status: 400},
		"bad limit":     {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{a="b"}`}, "limit": {"-1"}}, status: 400},
		"large limit":   {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{a="b"}`}, "limit": {"5001"}}, status: 400},
		"bad step":      {path: "/loki/api/v1/query_range", query: url.Values{"query": {`vector(1)`}, "step": {"0"}}, status: 400},
		"bad order":     {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{a="b"}`}, "direction": {"sideways"}}, status: 400},
		"turned round":  {path: "/loki/api/v1/query_range", query: url.Values{"query": {`{a="b"}`}, "start": {end}, "end": {start}}, status: 400},
		"bad label":     {path: "/loki/api/v1/label/a-b/values", status: 400},
		"bad match":     {path: "/loki/api/v1/series", query: url.Values{"match[]": {`{`}}, status: 400},
		"rules":         {path: "/loki/api/v1/rules", status: 404},
		"deletion":      {path: "/loki/api/v1/delete", status: 404},
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			t.Run(name+" "+method, func(t *testing.T) {
				address, header, body := server.URL+c.path, c.header.Clone(), io.Reader(nil)
				if header == nil {
					header = http.Header{}
				}
				if method == http.MethodPost {
					header.Set("Content-Type", "application/x-www-form-urlencoded")
					body = strings.NewReader(c.query.Encode())
				} else {
					address += "?" + c.query.Encode()
				}
				status, got, text := do(t, method, address, header, body)
				if c.status == 0 {
					c.status = http.StatusOK
				}
				require.Equal(t, c.status, status, text)
				if c.check != nil {
					c.check(t, got, text)
				}
			})
		}
	}
	status, _, text := do(t, http.MethodGet, server.URL+"/ready", nil, nil)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "ready\n", text)
}

// field writes a field of a protobuf message.
func field(number protowire.Number, parts ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), bytes.Join(parts, nil))
}

func number(n protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), value)
}

// protoPush is a push of one line with metadata.
func protoPush(stream, line string, at time.Time) []byte {
	stamp := field(1, number(1, uint64(at.Unix())), number(2, uint64(at.Nanosecond())))
	entry := field(2, stamp, field(2, []byte(line)), field(3, field(1, []byte("trace_id")), field(2, []byte("abc"))))
	return field(1, field(1, []byte(stream)), entry, number(3, 77))
}

func gzipped(body []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(body)
	_ = w.Close()
	return b.Bytes()
}

// jsonBody is a push of one line.
func jsonBody(labels map[string]string, at time.Time, line string) []byte {
	body, _ := json.Marshal(map[string]any{"streams": []any{map[string]any{"stream": labels, "values": [][]any{{ns(at), line, map[string]string{"trace_id": "abc"}}}}}})
	return body
}

func TestPush(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		body, kind, encoding string
	}{
		"json":         {string(jsonBody(map[string]string{"app": "x"}, now, "hello")), "application/json; charset=utf-8", ""},
		"json gzip":    {string(gzipped(jsonBody(map[string]string{"app": "x"}, now, "hello"))), "application/json", "gzip"},
		"proto":        {string(snappy.Encode(nil, protoPush(`{app="x"}`, "hello", now))), "application/x-protobuf", ""},
		"proto snappy": {string(snappy.Encode(nil, protoPush(`{app="x"}`, "hello", now))), "application/x-protobuf", "snappy"},
		"proto gzip":   {string(gzipped(protoPush(`{app="x"}`, "hello", now))), "application/x-protobuf", "gzip"},
		"no type":      {string(snappy.Encode(nil, protoPush(`{app="x"}`, "hello", now))), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			server, store := serve(t)
			header := http.Header{"Content-Type": {c.kind}, "X-Scope-Orgid": {"tenant"}}
			if c.encoding != "" {
				header.Set("Content-Encoding", c.encoding)
			}
			status, _, text := do(t, http.MethodPost, server.URL+"/loki/api/v1/push", header, strings.NewReader(c.body))
			require.Equal(t, http.StatusNoContent, status, text)
			var got []logstore.Entry
			require.NoError(t, store.Select(t.Context(), logstore.Selector{}, func(e logstore.Entry) bool { got = append(got, e); return true }))
			require.Len(t, got, 1)
			require.Equal(t, "hello", got[0].Line)
			require.Equal(t, fields("app", "x", "job", "push", "source", "push"), got[0].Labels)
			require.Equal(t, fields("trace_id", "abc"), got[0].Metadata)
			require.True(t, now.Equal(got[0].Time))
		})
	}
}

// TestPushPretends has labels that are the platform's.
func TestPushPretends(t *testing.T) {
	server, store := serve(t)
	status, _, text := do(t, http.MethodPost, server.URL+"/loki/api/v1/push", http.Header{"Content-Type": {"application/json"}}, bytes.NewReader(jsonBody(map[string]string{
		"job": "events", "namespace": "kube-system", "pod": "p", "container": "c", "node": "n", "workload": "w", "stream": "stdout", "source": "polymesh",
	}, time.Now(), "Deployed")))
	require.Equal(t, http.StatusNoContent, status, text)
	series, err := store.Series(t.Context(), nil, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	require.NoError(t, err)
	require.Equal(t, [][]logstore.Field{fields("job", "push", "pushed_container", "c", "pushed_job", "events", "pushed_namespace", "kube-system", "pushed_node", "n", "pushed_pod", "p",
		"pushed_source", "polymesh", "pushed_stream", "stdout", "pushed_workload", "w", "source", "push")}, series)
}

func TestPushRefusals(t *testing.T) {
	server, store := serve(t)
	labels := map[string]string{}
	for i := range maxPushLabels + 1 {
		labels["l"+strconv.Itoa(i)] = "x"
	}
	bomb := gzipped(bytes.Repeat([]byte(" "), maxPush+1))
	long := binarySnappy(1 << 30)
	for want, c := range map[string]struct {
		body           []byte
		kind, encoding string
		status         int
	}{
		"too new":                               {body: jsonBody(map[string]string{"a": "b"}, time.Now().Add(time.Hour), "x"), status: 400},
		"15 labels":                             {body: jsonBody(labels, time.Now(), "x"), status: 400},
		"not a valid label name":                {body: jsonBody(map[string]string{"a b": "c"}, time.Now(), "x"), status: 400},
		"1500 bytes":                            {body: jsonBody(map[string]string{"a": strings.Repeat("x", 1500)}, time.Now(), "x"), status: 400},
		"a time is not a string of nanoseconds": {body: []byte(`{"streams":[{"stream":{"a":"b"},"values":[[1,"x"]]}]}`), status: 400},
		"not a time in nanoseconds":             {body: []byte(`{"streams":[{"stream":{"a":"b"},"values":[["now","x"]]}]}`), status: 400},
		"is not [time, line]":                   {body: []byte(`{"streams":[{"stream":{"a":"b"},"values":[["1"]]}]}`), status: 400},
		"not an object of strings":              {body: []byte(`{"streams":[{"stream":{"a":"b"},"values":[["1","x",{"a":{}}]]}]}`), status: 400},
		"unexpected end":                        {body: []byte(`{"streams":`), status: 400},
		"too many objects, arrays":              {body: []byte(`{"streams":[{"values":[` + strings.Repeat(`[],`, 2*maxEntries) + `[]]}]}`), status: 400},
		"arrays and fields":                     {body: snappy.Encode(nil, emptyMetadata(maxParts)), kind: "application/x-protobuf", status: 400},
		"neither application/json nor":          {body: []byte(`x`), kind: "text/plain", status: 400},
		"not supported":                         {body: []byte(`x`), encoding: "br", status: 400},
		"is not gzip":                           {body: []byte(`x`), encoding: "gzip", status: 400},
		"not compressed with snappy":            {body: []byte("\xff\xff\xff\xff\xff\xff"), kind: "application/x-protobuf", status: 400},
		"more than 4194304 bytes":               {body: bomb, encoding: "gzip", status: 413},
		"the push has more":                     {body: long, kind: "application/x-protobuf", status: 413},
		"the labels of a stream":                {body: snappy.Encode(nil, protoPush(`{a=`, "x", time.Now())), kind: "application/x-protobuf", status: 400},
		"not all like":                          {body: snappy.Encode(nil, protoPush(`{a=~"b"}`, "x", time.Now())), kind: "application/x-protobuf", status: 400},
		"of a kind that Loki does not have":     {body: snappy.Encode(nil, bytes.Repeat([]byte{0x0b}, 100_000)), kind: "application/x-protobuf", status: 400},
	} {
		t.Run(want, func(t *testing.T) {
			if c.kind == "" {
				c.kind = "application/json"
			}
			header := http.Header{"Content-Type": {c.kind}}
			if c.encoding != "" {
				header.Set("Content-Encoding", c.encoding)
			}
			status, _, text := do(t, http.MethodPost, server.URL+"/loki/api/v1/push", header, bytes.NewReader(c.body))
			require.Equal(t, c.status, status, text)
			require.Contains(t, text, want)
			require.Less(t, len(text), 500)
		})
	}
	require.Zero(t, store.Stats().Rows)

	// The others of a push are stored.
	body := fmt.Sprintf(`{"streams":[{"stream":{"a":"b"},"values":[[%q,"good"],[%q,"bad"]]}]}`, ns(time.Now()), ns(time.Now().Add(time.Hour)))
	status, _, text := do(t, http.MethodPost, server.URL+"/loki/api/v1/push", http.Header{"Content-Type": {"application/json"}}, strings.NewReader(body))
	require.Equal(t, http.StatusBadRequest, status)
	require.Contains(t, text, "1 lines were not stored")
	n := 0
	require.NoError(t, store.Select(t.Context(), logstore.Selector{}, func(logstore.Entry) bool { n++; return true }))
	require.Equal(t, 1, n)
}

// emptyMetadata is a push of lines that have more fields of metadata than n, and nothing else.
func emptyMetadata(n int) []byte {
	entry := field(2, bytes.Repeat(field(3), logstore.MaxMetadata))
	return field(1, field(1, []byte(`{a="b"}`)), bytes.Repeat(entry, n/logstore.MaxMetadata+1))
}

// pushAnswer is the answer to a push in JSON.
func pushAnswer(l *Loki, encoding string, body io.Reader) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/loki/api/v1/push", body)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Content-Encoding", encoding)
	w := httptest.NewRecorder()
	l.ServeHTTP(w, r)
	return w
}

// What is above the rate is not unpacked: a pod may send a few KB that are megabytes, as often as it likes.
func TestPushAboveTheRate(t *testing.T) {
	l := New(Options{Log: slog.New(slog.DiscardHandler)})
	require.True(t, l.rate.take(pushBurst, time.Now().Add(time.Hour)))
	line := strings.Repeat("x", maxPush-1000)
	for encoding, body := range map[string][]byte{
		"gzip":   gzipped(jsonBody(map[string]string{"a": "b"}, time.Now(), line)),
		"snappy": snappy.Encode(nil, jsonBody(map[string]string{"a": "b"}, time.Now(), line)),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		const pushes = 16
		for range pushes {
			w := pushAnswer(l, encoding, bytes.NewReader(body))
			require.Equal(t, http.StatusTooManyRequests, w.Code)
			require.Equal(t, "1", w.Header().Get("Retry-After"))
		}
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(pushes*maxPush/4), encoding)
	}
}

// However many pushes come, only some bytes of them are in memory. What has no room is to be sent again.
func TestPushesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(Options{Log: slog.New(slog.DiscardHandler)})
		push := func() int { return pushAnswer(l, "", strings.NewReader("{}")).Code }
		codes := make(chan int)
		var bodies []*io.PipeWriter
		for range arriving / maxPush {
			body, in := io.Pipe()
			bodies = append(bodies, in)
			go func() { codes <- pushAnswer(l, "", body).Code }()
		}
		// Those that have sent little keep nobody out.
		synctest.Wait()
		require.Equal(t, http.StatusNoContent, push())
		for _, in := range bodies {
			_, err := in.Write(make([]byte, maxPush))
			require.NoError(t, err)
		}
		synctest.Wait()
		w := pushAnswer(l, "", strings.NewReader("{}"))
		require.Equal(t, http.StatusServiceUnavailable, w.Code)
		require.Equal(t, "5", w.Header().Get("Retry-After"))
		for _, in := range bodies {
			require.NoError(t, in.CloseWithError(io.ErrUnexpectedEOF))
			require.Equal(t, http.StatusBadRequest, <-codes)
		}
		require.Equal(t, http.StatusNoContent, push())

		// Those that are being unpacked are few.
		for range unpacking {
			_, err := l.turn(t.Context())
			require.NoError(t, err)
		}
		begin := time.Now()
		require.Equal(t, http.StatusServiceUnavailable, push())
		require.Equal(t, patience, time.Since(begin))
		time.AfterFunc(patience/2, func() { l.unpacking.Release(1) })
		require.Equal(t, http.StatusNoContent, push())
	})
}

// binarySnappy says that it is as long as that.
func binarySnappy(length uint64) []byte { return append(protowire.AppendVarint(nil, length), 0) }

func TestRate(t *testing.T) {
	r := newRate(100, 1000)
	now := testAt
	require.True(t, r.take(1000, now))
	require.False(t, r.take(1, now))
	require.True(t, r.take(100, now.Add(time.Second)))
	require.False(t, r.take(1, now.Add(time.Second)))
	require.False(t, r.take(1001, now.Add(time.Hour)))
	require.True(t, r.take(1000, now.Add(time.Hour)))
}

func TestOTLP(t *testing.T) {
	server, _ := serve(t)
	status, _, _ := do(t, http.MethodPost, server.URL+"/otlp/v1/logs", nil, nil)
	require.Equal(t, http.StatusNotFound, status)
	var path string
	passing := httptest.NewServer(New(Options{Log: slog.New(slog.DiscardHandler), OTLP: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { path = r.URL.Path })}))
	defer passing.Close()
	status, _, _ = do(t, http.MethodPost, passing.URL+"/otlp/v1/logs", nil, nil)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "/v1/logs", path)
}

func TestParameters(t *testing.T) {
	for text, want := range map[string]time.Time{
		"1700000000":                     time.Unix(1_700_000_000, 0),
		"1700000000123456789":            time.Unix(1_700_000_000, 123_456_789),
		"1700000000.25":                  time.Unix(1_700_000_000, 250_000_000),
		"2023-11-14T22:13:20.5Z":         time.Unix(1_700_000_000, 500_000_000),
		"-5":                             earliest,
		"99999999999999999999999999.0e1": {},
		"NaN":                            {},
	} {
		got, err := parseTime(text)
		if want.IsZero() {
			require.Error(t, err, text)
			continue
		}
		require.NoError(t, err, text)
		require.True(t, want.Equal(got), "%s: %s", text, got)
	}
	for text, want := range map[string]time.Duration{"60": time.Minute, "0.5": time.Second / 2, "5m": 5 * time.Minute, "1d": 24 * time.Hour, "60000ms": time.Minute, "1.5h": 90 * time.Minute} {
		got, err := parseDuration(text)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, text := range []string{"1e300", "NaN", "x", ""} {
		_, err := parseDuration(text)
		require.Error(t, err, text)
	}
}
