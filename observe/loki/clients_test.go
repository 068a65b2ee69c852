//go:build clients

package loki

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// results runs a program that uses other people's clients and returns what it shows, by name.
func results(t *testing.T, run *exec.Cmd, dir, address string) map[string]any {
	t.Helper()
	run.Dir = dir
	run.Env = append(os.Environ(), "LOKI="+address)
	var out, problems bytes.Buffer
	run.Stdout, run.Stderr = &out, &problems
	require.NoError(t, run.Run(), "%s %s", &out, &problems)
	shown := map[string]any{}
	lines := bufio.NewScanner(bytes.NewReader(out.Bytes()))
	for lines.Scan() {
		var one struct {
			What   string
			Result any
		}
		require.NoError(t, json.Unmarshal(lines.Bytes(), &one), lines.Text())
		shown[one.What] = one.Result
	}
	t.Logf("%s%s", &out, &problems)
	return shown
}

// client copies a program of testdata to where it can be built.
func client(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join("testdata/clients", name))))
	return dir
}

func command(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
}

// TestNode has winston-loki push in JSON and protobuf, and @myunisoft/loki push and query. It needs Node.js and npm's registry.
func TestNode(t *testing.T) {
	server, _ := serve(t)
	dir := client(t, "node")
	command(t, dir, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	got := results(t, exec.CommandContext(t.Context(), "node", "main.js"), dir, server.URL)
	require.Subset(t, got["labels"], []any{"app", "format", "job", "level", "part", "source"})
	require.Equal(t, []any{"myunisoft", "winston"}, got["values"])
	require.Len(t, got["series"], 4)
	require.Equal(t, 6., got["json"])
	require.Equal(t, 6., got["protobuf"])
	require.Equal(t, []any{map[string]any{"verb": "GET", "number": "1"}, map[string]any{"verb": "GET", "number": "2"}, map[string]any{"verb": "GET", "number": "3"}}, got["pattern"])
	require.Len(t, dig(got["streams"], 0, "values"), 2)
	require.ElementsMatch(t, []any{
		map[string]any{"labels": map[string]any{"part": "a"}, "last": "10"},
		map[string]any{"labels": map[string]any{"part": "b"}, "last": "2"},
	}, got["matrix"])
}

// TestPython has python-logging-loki push. It needs Python and its registry.
func TestPython(t *testing.T) {
	server, _ := serve(t)
	dir := client(t, "python")
	command(t, dir, "python3", "-m", "venv", "venv")
	command(t, dir, "venv/bin/pip", "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt")
	got := results(t, exec.CommandContext(t.Context(), filepath.Join(dir, "venv/bin/python"), "main.py"), dir, server.URL)
	require.Equal(t, []any{"error", "info"}, got["values"])
	require.Equal(t, []any{"order 0 shipped", "order 1 shipped", "order 2 shipped", "order 3 shipped", "order 4 shipped", "order 5 lost: ✗"}, got["lines"])
	require.NotEmpty(t, got["rate"])
}

// TestTelegraf has Telegraf's output loki push and its input logql query. It needs Go's module proxy.
func TestTelegraf(t *testing.T) {
	server, _ := serve(t)
	dir := client(t, "telegraf")
	command(t, dir, "go", "build", "-o", "clients", ".")
	got := results(t, exec.CommandContext(t.Context(), filepath.Join(dir, "clients")), dir, server.URL)
	require.ElementsMatch(t, []any{
		map[string]any{"fields": []any{"value=5"}, "tags": map[string]any{"gzip": "true"}},
		map[string]any{"fields": []any{"value=5"}, "tags": map[string]any{"gzip": "false"}},
	}, got["count"])
	require.Equal(t, []any{map[string]any{"fields": []any{"value=2"}, "tags": map[string]any{}}}, got["scalar"])
	require.Len(t, got["lines"], 2)
	require.Equal(t, "telegraf", dig(got["lines"], 0, "tags", "app_name"))
	require.NotEmpty(t, got["series"])
}
