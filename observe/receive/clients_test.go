//go:build clients

package receive

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/jaeger"
	"polymesh.dev/polymesh/observe/logstore"
)

// sent is what a client says that it has sent.
type sent struct{ Kind, Service, Trace string }

// TestClients lets other people's libraries send what they have, in each protocol that they speak, and asks Jaeger's API what has come. It needs Python,
// Node.js and the package registries.
func TestClients(t *testing.T) {
	s := serve(t, nil)
	query := serveHTTP(t, jaeger.New(jaeger.Options{Store: s.traces, Log: slog.New(slog.DiscardHandler)}))
	for language, build := range map[string]func(t *testing.T, dir string) *exec.Cmd{
		"python": func(t *testing.T, dir string) *exec.Cmd {
			command(t, dir, "python3", "-m", "venv", "venv")
			command(t, dir, "venv/bin/pip", "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt")
			return exec.CommandContext(t.Context(), filepath.Join(dir, "venv/bin/python"), "main.py")
		},
		"node": func(t *testing.T, dir string) *exec.Cmd {
			command(t, dir, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
			return exec.CommandContext(t.Context(), "node", "main.js")
		},
		"go": func(t *testing.T, dir string) *exec.Cmd {
			command(t, dir, "go", "build", "-o", "clients", ".")
			return exec.CommandContext(t.Context(), filepath.Join(dir, "clients"))
		},
	} {
		t.Run(language, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata/clients", language))))
			run := build(t, dir)
			run.Dir = dir
			run.Env = append(os.Environ(), "GRPC="+s.grpc, "HTTP="+s.http, "ZIPKIN="+s.zipkin, "JAEGER="+s.jaeger)
			var out, errors bytes.Buffer
			run.Stdout, run.Stderr = &out, &errors
			require.NoError(t, run.Run(), "%s %s", &out, &errors)
			lines := bufio.NewScanner(&out)
			seen := 0
			for lines.Scan() {
				var one sent
				require.NoError(t, json.Unmarshal(lines.Bytes(), &one), lines.Text())
				t.Run(one.Service, func(t *testing.T) {
					if one.Kind == "log" {
						s.wantLog(t, one)
						return
					}
					wantTrace(t, query, one)
				})
				seen++
			}
			require.NotZero(t, seen)
			t.Logf("%s: %s", language, strings.TrimSpace(errors.String()))
		})
	}
}

func command(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
}

type jaegerTag struct {
	Key, Type string
	Value     any
}

type jaegerSpan struct {
	SpanID, OperationName, ProcessID string
	References                       []struct{ RefType, TraceID, SpanID string }
	Tags                             []jaegerTag
	Logs                             []struct{ Fields []jaegerTag }
}

func (s jaegerSpan) tag(key string) any {
	for _, t := range s.Tags {
		if t.Key == key {
			return t.Type + " " + fmt.Sprint(t.Value)
		}
	}
	return nil
}

func wantTrace(t *testing.T, query string, one sent) {
	var answer struct {
		Data []struct {
			Spans     []jaegerSpan
			Processes map[string]struct {
				ServiceName string
				Tags        []jaegerTag
			}
		}
	}
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		got, err := http.Get(query + "/api/traces/" + one.Trace)
		require.NoError(c, err)
		defer got.Body.Close()
		require.Equal(c, http.StatusOK, got.StatusCode)
		require.NoError(c, json.NewDecoder(got.Body).Decode(&answer))
		require.Len(c, answer.Data[0].Spans, 2)
	}, 30*time.Second, 100*time.Millisecond)
	trace := answer.Data[0]
	parent, child := trace.Spans[0], trace.Spans[1]
	if parent.OperationName != "parent" { // they may have started in the same microsecond
		parent, child = child, parent
	}
	require.Equal(t, "parent", parent.OperationName)
	require.Equal(t, "child", child.OperationName)
	require.Equal(t, one.Service, trace.Processes[parent.ProcessID].ServiceName)
	require.Equal(t, "CHILD_OF", child.References[0].RefType)
	require.Equal(t, parent.SpanID, child.References[0].SpanID)
	switch one.Kind {
	case "opentelemetry":
		require.Equal(t, "int64 503", parent.tag("http.response.status_code"))
		require.Equal(t, `string ä<&>"`, parent.tag("text"))
		require.Equal(t, "string server", parent.tag("span.kind"))
		require.Contains(t, trace.Processes[parent.ProcessID].Tags, jaegerTag{"host.name", "string", "node-1"})
		for key, value := range map[string]string{
			"yes": "bool true", "ratio": "float64 0.25", "list": `string ["a","b"]`, "numbers": "string [1,2]", "empty": "string ", "span.kind": "string client", "error": "bool true",
			"otel.status_code": "string ERROR", "otel.status_description": "string it broke", "otel.scope.name": "string clients", "otel.scope.version": "string 1.0",
		} {
			require.Equal(t, value, child.tag(key), key)
		}
		require.Equal(t, "FOLLOWS_FROM", child.References[1].RefType)
		require.Equal(t, "0af7651916cd43dd8448eb211c80319c", child.References[1].TraceID)
		require.Equal(t, []jaegerTag{{"event", "string", "retried"}, {"attempt", "int64", 2.0}}, child.Logs[0].Fields)
	case "otel-zipkin":
		require.Equal(t, "string 503", parent.tag("http.response.status_code"))
		require.Equal(t, "string server", parent.tag("span.kind"))
		require.Equal(t, "bool true", child.tag("error"))
		require.Equal(t, "string it broke", child.tag("otel.status_description"))
		require.Equal(t, []jaegerTag{{"event", "string", "retried"}}, child.Logs[0].Fields)
	case "jaeger":
		// Its numbers are JavaScript's.
		require.Contains(t, []any{"float64 503", "int64 503"}, parent.tag("http.status_code"))
		require.Equal(t, `string ä<&>"`, parent.tag("text"))
		require.Equal(t, "string server", parent.tag("span.kind"))
		require.Equal(t, "string client", child.tag("span.kind"))
		require.Equal(t, "bool true", child.tag("error"))
		require.Contains(t, trace.Processes[parent.ProcessID].Tags, jaegerTag{"host.name", "string", "node-1"})
		require.Equal(t, jaegerTag{"event", "string", "retried"}, child.Logs[0].Fields[0])
	case "zipkin":
		require.Equal(t, "string server", parent.tag("span.kind"))
		require.Equal(t, "string client", child.tag("span.kind"))
		fallthrough
	case "zipkin-local":
		require.Equal(t, "string 503", parent.tag("http.status_code"))
	default:
		t.Errorf("what is a trace of the kind %s?", one.Kind)
	}
}

func (s *stack) wantLog(t *testing.T, one sent) {
	var got []logstore.Entry
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		got = nil
		require.NoError(c, s.logs.Select(t.Context(), logstore.Selector{
			Matchers: []logstore.Matcher{{Name: "job", Value: Job}, {Name: "namespace", Value: "shop"}, {Name: "workload", Value: one.Service}},
			Start:    time.Now().Add(-time.Hour), End: time.Now().Add(time.Hour), Limit: 10,
		}, func(e logstore.Entry) bool { got = append(got, e); return true }))
		require.Len(c, got, 1)
	}, 30*time.Second, 100*time.Millisecond)
	require.Equal(t, "it is late", got[0].Line)
	require.Equal(t, "warn", logstore.Value(got[0].Metadata, "level"))
	require.Equal(t, "/a", logstore.Value(got[0].Metadata, "http_route"))
}
