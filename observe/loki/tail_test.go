package loki

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logql"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
)

// tailLines reads messages of a tail until there are as many lines, and returns their texts.
func tailLines(t *testing.T, conn *websocket.Conn, n int) (lines []string, messages []tailAnswer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for len(lines) < n {
		_, text, err := conn.Read(ctx)
		require.NoError(t, err)
		var message tailAnswer
		require.NoError(t, json.Unmarshal(text, &message))
		messages = append(messages, message)
		for _, s := range message.Streams {
			for _, v := range s.Values {
				lines = append(lines, v[1].(string))
			}
		}
	}
	return lines, messages
}

func TestTail(t *testing.T) {
	server, store := serve(t)
	labels := fields("job", "pods", "pod", "a")
	add := func(line string) {
		require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: labels, Line: line}}))
	}
	for i := range 5 {
		add(fmt.Sprintf("level=info n=%d", i))
	}
	address := "ws" + strings.TrimPrefix(server.URL, "http") + "/loki/api/v1/tail?" + url.Values{"query": {`{job="pods"} | logfmt | n!="6" | line_format "{{.n}}"`}, "limit": {"3"}}.Encode()
	conn, _, err := websocket.Dial(t.Context(), address, &websocket.DialOptions{HTTPHeader: http.Header{"X-Loki-Response-Encoding-Flags": {"categorize-labels"}}})
	require.NoError(t, err)
	defer conn.CloseNow() //nolint:errcheck // the end in any case
	lines, messages := tailLines(t, conn, 3)
	require.Equal(t, []string{"2", "3", "4"}, lines, "the last ones, the oldest first")
	require.Equal(t, []string{categorizeLabels}, messages[0].EncodingFlags)
	require.Equal(t, map[string]string{"job": "pods", "pod": "a"}, messages[0].Streams[0].Stream)
	for i := 5; i < 8; i++ {
		add(fmt.Sprintf("level=info n=%d", i))
	}
	add("level=error n=8")
	lines, messages = tailLines(t, conn, 3)
	require.Equal(t, []string{"5", "7", "8"}, lines)
	last := messages[len(messages)-1].Streams[0].Values
	require.Contains(t, fmt.Sprint(last[len(last)-1]), "detected_level:error")

	// A push arrives too, and what it says about itself.
	status, _, text := do(t, http.MethodPost, server.URL+"/loki/api/v1/push", http.Header{"Content-Type": {"application/json"}},
		bytes.NewReader(jsonBody(map[string]string{"job": "pods"}, time.Now(), "n=9")))
	require.Equal(t, http.StatusNoContent, status, text)
	add("n=10")
	lines, _ = tailLines(t, conn, 1)
	require.Equal(t, []string{"10"}, lines, "a pushed line is in no stream of the platform")
}

// The lines before a tail are few bytes, however many are asked for, and a tail that waits for them misses none that come meanwhile.
func TestTailHistory(t *testing.T) {
	store := logstoretest.Open(t, rowstore.Options{Dir: t.TempDir()})
	l := New(Options{Store: store, Log: slog.New(slog.DiscardHandler)})
	server := httptest.NewServer(l)
	t.Cleanup(server.Close)
	labels := fields("job", "push")
	for i := range 24 {
		line := fmt.Sprintf("%d %s", i, strings.Repeat("x", 255<<10))
		require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: labels, Line: line}}))
	}
	require.NoError(t, l.looking.Acquire(t.Context(), histories))
	address := server.URL + "/loki/api/v1/tail?" + url.Values{"query": {`{job="push"}`}, "limit": {"5000"}}.Encode()
	conn, _, err := websocket.Dial(t.Context(), address, nil)
	require.NoError(t, err, "it is accepted before its turn comes")
	defer conn.CloseNow() //nolint:errcheck // the end in any case
	conn.SetReadLimit(2 * maxBatchBytes)
	for i := range 3 {
		require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: labels, Line: fmt.Sprint("meanwhile ", i)}}))
	}
	l.looking.Release(histories)
	lines, messages := tailLines(t, conn, 6)
	require.Len(t, messages, 1)
	require.LessOrEqual(t, len(strings.Join(lines, "")), maxBatchBytes)
	require.Equal(t, "meanwhile 2", lines[len(lines)-1])
	require.True(t, strings.HasPrefix(lines[len(lines)-4], "23 "))

	// Those that come in great size are sent in parts.
	for i := range 12 {
		line := fmt.Sprintf("%d %s", i, strings.Repeat("x", 255<<10))
		require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: labels, Line: line}}))
		lines, messages = tailLines(t, conn, 1)
		require.Len(t, lines, 1)
		require.True(t, strings.HasPrefix(lines[0], fmt.Sprint(i)+" "), "each once")
		require.Len(t, messages, 1)
	}
}

// Tails without the lines before them go on if these are too much to look for.
func TestTailWithoutHistory(t *testing.T) {
	store := logstoretest.Open(t, rowstore.Options{Dir: t.TempDir()})
	server := httptest.NewServer(New(Options{Store: store, Limits: logql.Limits{Read: 1}, Log: slog.New(slog.DiscardHandler)}))
	t.Cleanup(server.Close)
	add := func(line string) {
		require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: fields("job", "a"), Line: line}}))
	}
	for range 3 {
		add("before")
	}
	conn, _, err := websocket.Dial(t.Context(), server.URL+"/loki/api/v1/tail?"+url.Values{"query": {`{job="a"}`}}.Encode(), nil)
	require.NoError(t, err)
	defer conn.CloseNow() //nolint:errcheck // the end in any case
	add("after")
	lines, _ := tailLines(t, conn, 1)
	require.Equal(t, []string{"after"}, lines)
}

func TestTailRefusals(t *testing.T) {
	server, _ := serve(t)
	for query, header := range map[string]http.Header{
		`query={`:                           nil,
		`query=vector(1)`:                   nil,
		`query={job="x"}&delay_for=6`:       nil,
		`query={job="x"}&limit=many`:        nil,
		`query={job="x"}&limit=100000`:      nil,
		`query={job="x"}&start=tomorrow`:    nil,
		`query={job="x"}&start=1`:           nil,
		`query=rate({job="x"}[5m])`:         nil,
		`query={job="x"}&page of elsewhere`: {"Origin": {"http://elsewhere.example"}},
	} {
		values, err := url.ParseQuery(query)
		require.NoError(t, err)
		_, response, err := websocket.Dial(t.Context(), server.URL+"/loki/api/v1/tail?"+values.Encode(), &websocket.DialOptions{HTTPHeader: header})
		require.Error(t, err, query)
		want := http.StatusBadRequest
		if header != nil {
			want = http.StatusForbidden
		}
		require.Equal(t, want, response.StatusCode, query)
	}
}
