package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	collectmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	otlp "go.opentelemetry.io/proto/otlp/metrics/v1"
	"google.golang.org/protobuf/proto"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/tracestore"
)

// child is a running program and a client for its socket.
type child struct {
	t    *testing.T
	cmd  *exec.Cmd
	said bytes.Buffer
	http http.Client
}

// startChild starts the program, and waits until its status answers.
func startChild(t *testing.T, socket string, args ...string) *child {
	t.Helper()
	return startProgram(t, socket, program(append(args, "--socket", socket)...))
}

func startProgram(t *testing.T, socket string, cmd *exec.Cmd) *child {
	t.Helper()
	c := &child{t: t, cmd: cmd}
	c.cmd.Stderr = &c.said
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	require.NoError(t, c.cmd.Start())
	t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	until(t, "the status answers", func() bool {
		answer, err := c.http.Get("http://store/api/polymesh/v1/status")
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	})
	return c
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		require.True(t, time.Now().Before(end), "not in time: %s", what)
	}
}

func (c *child) do(method, path, kind string, body []byte) (int, string) {
	c.t.Helper()
	r, err := http.NewRequest(method, "http://store"+path, bytes.NewReader(body))
	require.NoError(c.t, err)
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	answer, err := c.http.Do(r)
	require.NoError(c.t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(c.t, err)
	return answer.StatusCode, string(text)
}

func (c *child) get(path string) string {
	c.t.Helper()
	code, text := c.do(http.MethodGet, path, "", nil)
	require.Equal(c.t, http.StatusOK, code, "%s: %s", path, text)
	return text
}

// state is everything about a folder that a program can change, but for the times of reading.
func state(t *testing.T, dir string) string {
	t.Helper()
	sum := sha256.New()
	require.NoError(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(sum, "%q %o %d %d %d %d %v %v\n", path, st.Mode, st.Nlink, st.Uid, st.Gid, st.Size, st.Mtim, st.Ctim)
		if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
			return nil
		}
		text, err := os.ReadFile(path)
		sum.Write(text)
		return err
	}))
	return fmt.Sprintf("%x", sum.Sum(nil))
}

const traceID = "0af7651916cd43dd8448eb211c80319c"

// send sends one of each signal.
func send(t *testing.T, c *child, at time.Time) {
	t.Helper()
	gauge := &collectmetrics.ExportMetricsServiceRequest{ResourceMetrics: []*otlp.ResourceMetrics{{ScopeMetrics: []*otlp.ScopeMetrics{{Metrics: []*otlp.Metric{{
		Name: "fuel", Data: &otlp.Metric_Gauge{Gauge: &otlp.Gauge{DataPoints: []*otlp.NumberDataPoint{{
			TimeUnixNano: uint64(at.UnixNano()), Value: &otlp.NumberDataPoint_AsInt{AsInt: 42},
		}}}},
	}}}}}}}
	message, err := proto.Marshal(gauge)
	require.NoError(t, err)
	span := fmt.Sprintf(`{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"java-service"}}]},"scopeSpans":[{"spans":[
		{"traceId":%q,"spanId":"b7ad6b7169203331","name":"GET /orders","kind":2,"startTimeUnixNano":"%d","endTimeUnixNano":"%d"}]}]}]}`, traceID, at.UnixNano(), at.UnixNano()+5e6)
	line := fmt.Sprintf(`{"streams":[{"stream":{"app":"shop"},"values":[["%d","the last words"]]}]}`, at.UnixNano())
	for _, signal := range []struct{ path, kind, body string }{
		{"/v1/metrics", "application/x-protobuf", string(message)}, {"/v1/traces", "application/json", span}, {"/loki/api/v1/push", "application/json", line},
	} {
		until(t, signal.path, func() bool { // its part may not work yet
			code, text := c.do(http.MethodPost, signal.path, signal.kind, []byte(signal.body))
			require.Contains(t, []int{http.StatusOK, http.StatusNoContent, http.StatusServiceUnavailable}, code, text)
			return code != http.StatusServiceUnavailable
		})
	}
}

// onDisk waits until kill -9 takes neither the line nor the span.
func onDisk(t *testing.T, dir string) {
	t.Helper()
	until(t, "the line and the span are on disk", func() bool {
		logs, err := logstore.Open(logstore.Options{Store: rowstore.Options{Dir: filepath.Join(dir, "logs"), ReadOnly: true, Temp: t.TempDir()}, Log: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		defer logs.Close()
		traces, err := tracestore.Open(tracestore.Options{Dir: filepath.Join(dir, "traces"), ReadOnly: true, Temp: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		defer traces.Close()
		lines := 0
		require.NoError(t, logs.Each(t.Context(), logstore.Selector{Matchers: []logstore.Matcher{{Name: "app", Value: "shop"}}}, func(logstore.Entry) bool { lines++; return true }))
		_, err = traces.Trace(t.Context(), traceID)
		return lines == 1 && err == nil
	})
}

// The files of a store that was killed answer everything, as of the last record, and stay as they are.
func TestReadOnly(t *testing.T) {
	temp := t.TempDir()
	dir, sockets := filepath.Join(temp, "data"), filepath.Join(temp, "s")
	at := time.Now()
	store := startChild(t, filepath.Join(temp, "observe.sock"), "--data-dir", dir, "--log", filepath.Join(temp, "log"))
	send(t, store, at)
	onDisk(t, dir)
	require.NoError(t, store.cmd.Process.Kill())
	require.Error(t, store.cmd.Wait())

	before := state(t, dir)
	require.NoError(t, os.Mkdir(sockets, 0o700))
	reader := startChild(t, filepath.Join(sockets, "observe.sock"), "--read-only", "--data-dir", dir)

	var known struct {
		Reachable, Offline bool
		Since              time.Time
		Now                int64
	}
	require.NoError(t, json.Unmarshal([]byte(reader.get("/api/polymesh/v1/state")), &known))
	require.True(t, known.Offline)
	require.False(t, known.Reachable)
	require.WithinRange(t, known.Since, at.Truncate(time.Millisecond), time.Now())
	require.Equal(t, known.Since.UnixMilli(), known.Now, "the page is at the time of the last record")
	overview := reader.get("/api/polymesh/v1/overview")
	require.Contains(t, overview, "These are recorded files")
	require.NotContains(t, overview, "does not respond")
	require.Contains(t, reader.get("/"), "<!doctype html>")
	require.Contains(t, reader.get("/api/polymesh/v1/trace/"+traceID), "GET /orders")
	require.Contains(t, reader.get("/api/v1/query?query=fuel&time="+fmt.Sprint(at.Unix()+1)), `"42"`)
	require.Contains(t, reader.get("/api/v1/label/__name__/values"), "fuel")
	require.Contains(t, reader.get("/loki/api/v1/query_range?"+url.Values{
		"query": {`{app="shop"}`}, "start": {fmt.Sprint(at.Add(-time.Minute).UnixNano())}, "end": {fmt.Sprint(at.Add(time.Minute).UnixNano())},
	}.Encode()), "the last words")
	require.Contains(t, reader.get("/api/services"), "java-service")
	require.Contains(t, reader.get("/api/traces/"+traceID), "GET /orders")
	require.Contains(t, reader.get("/api/polymesh/v1/status"), `"state":"Ready"`)
	for _, path := range []string{"/v1/traces", "/v1/metrics", "/v1/logs", "/api/v2/spans", "/loki/api/v1/push", "/otlp/v1/logs", "/api/v1/write", "/api/v1/admin/tsdb/delete_series"} {
		code, text := reader.do(http.MethodPost, path, "application/json", []byte("{}"))
		require.Contains(t, []int{http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed}, code, "%s: %s", path, text)
	}
	// Two may read at a time, and who reads does not keep the store from starting.
	require.NoError(t, os.Mkdir(sockets+"2", 0o700))
	second := startChild(t, filepath.Join(sockets+"2", "observe.sock"), "--read-only", "--data-dir", dir)
	require.NoError(t, second.cmd.Process.Kill())
	require.Error(t, second.cmd.Wait())

	require.NoError(t, reader.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, reader.cmd.Wait(), reader.said.String())
	require.NotContains(t, reader.said.String(), "level=ERROR")
	require.Equal(t, before, state(t, dir))
	left, err := os.ReadDir(sockets)
	require.NoError(t, err)
	require.Empty(t, left, "what was copied is gone")

	again := startChild(t, filepath.Join(temp, "observe.sock"), "--data-dir", dir, "--log", filepath.Join(temp, "log"))
	until(t, "it works again", func() bool {
		code, _ := again.do(http.MethodGet, "/api/services", "", nil)
		return code == http.StatusOK
	})
}

// Whoever opens what cannot be read learns why in one line.
func TestReadOnlyFails(t *testing.T) {
	temp := t.TempDir()
	dir := filepath.Join(temp, "data")
	fails := func() string {
		text, err := program("--read-only", "--data-dir", dir, "--socket", filepath.Join(temp, "s")).CombinedOutput()
		require.Error(t, err)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return lines[len(lines)-1]
	}
	require.Contains(t, fails(), "is not the folder of a store")
	require.NoDirExists(t, dir)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "meta"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "meta", "format"), []byte("1\n"), 0o600))
	before := state(t, dir)
	require.Regexp(t, `^polymesh-observe: .*(no store|no such file)`, fails())
	require.Equal(t, before, state(t, dir))
}
