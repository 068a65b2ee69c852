//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/test/e2e/node"
)

// The store of metrics, logs and traces runs beside the server: it outlives it, comes back when it is killed, keeps what it has
// recorded, and ends in words.
func TestObserveStore(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{Observe: true, Args: []string{"--disable", "istio,metrics-server,local-storage", "--observe-disk", "256MiB", "--observe-cluster-access", "off"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	s := &store{n}
	first := s.pid(t)
	s.waitReady(t)

	for path, want := range map[string]os.FileMode{n.Layout().Observe(): 0o700, n.Layout().ObserveSocket(): 0o600, n.Layout().ObserveSockets(): 0o710} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %v", path, info, err, want)
		}
	}
	s.checkMemoryLimit(t, first)

	// What a pod writes is found, also when the pod and the server are gone.
	word := fmt.Sprintf("beside-%d", time.Now().UnixNano())
	n.Apply(t, fmt.Sprintf(speaker, busyboxImage(t, n), word))
	n.Eventually(t, 2*time.Minute, func() (bool, string) { return s.hasLine(t, word), "the pod's line is not in the store" })
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		return s.count(t, `count(up{job="node"} == 1)`) == 1 && s.count(t, `count(kube_pod_info)`) > 1, "metrics of the node and of pods are not in the store"
	})

	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := s.pid(t); got != first {
		t.Errorf("the store was process %d, and is %d without the server", first, got)
	}
	if !s.hasLine(t, word) {
		t.Error("the pod's line is gone with the server")
	}

	// The next server continues with it, and starts another one if it dies.
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	s.waitReady(t)
	if got := s.pid(t); got != first {
		t.Errorf("the store was process %d, and is %d with the next server", first, got)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.Eventually(t, time.Minute, func() (bool, string) {
		pid, _ := observe.Running(n.Layout())
		return pid != 0 && pid != first, "the killed store was not started again"
	})
	s.waitReady(t)
	if !s.hasLine(t, word) {
		t.Error("the pod's line is gone with the killed store")
	}

	// A reset ends it, and keeps what it has recorded on request. The next server has it.
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := s.pid(t)
	out, errOut, code := n.Polymesh(t, "reset", "--yes", "--keep-observe", "--kubeconfig", n.Kubeconfig())
	if code != 0 || !strings.Contains(out, fmt.Sprintf("the store of metrics, logs and traces, process %d", second)) {
		t.Fatalf("exit code %d: %s%s", code, out, errOut)
	}
	if pid, err := observe.Running(n.Layout()); pid != 0 || err != nil {
		t.Errorf("after the reset the store is process %d: %v", pid, err)
	}
	if entries, err := os.ReadDir(n.DataDir()); err != nil || len(entries) != 2 {
		t.Errorf("the reset has left %v: %v", entries, err)
	}
	// Of the cluster nothing is left, and what was recorded is on the page.
	var gone struct {
		Overview string
		Lines    []string
	}
	browse(t, n, &gone, "offline", "default", "speaker", word)
	if len(gone.Lines) == 0 || !strings.Contains(gone.Lines[0], word) || !strings.Contains(gone.Overview, "These are recorded files") {
		t.Errorf("the page of a cluster that is gone shows the lines %q and %s", gone.Lines, gone.Overview)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	s.waitReady(t)
	if !s.hasLine(t, word) {
		t.Error("the pod's line is gone, although the reset has kept the store")
	}

	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := n.Reset(t.Context()); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(n.Layout().Observe()); err == nil {
		t.Error("the reset without --keep-observe has kept the store")
	}
}

// With --disable observe, a node has nothing of it.
func TestObserveOff(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{Args: []string{"--disable", "istio,metrics-server,local-storage,coredns"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	for _, path := range []string{n.Layout().Observe(), n.Layout().ObserveSocket(), n.Layout().ObserveSockets(), n.Layout().Kubeconfig("observe")} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is there", path)
		}
	}
}

// store asks the node's store, as root of the machine.
type store struct{ node *node.Node }

func (s *store) pid(t *testing.T) int {
	t.Helper()
	pid, err := observe.Running(s.node.Layout())
	if err != nil || pid == 0 {
		t.Fatalf("the store does not run: %v", err)
	}
	return pid
}

func (s *store) get(path string, query url.Values, answer any) error {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.node.Layout().ObserveSocket())
		},
	}}
	response, err := client.Get("http://store" + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s: %w", path, response.Status, text, err)
	}
	return json.Unmarshal(text, answer)
}

// waitReady waits until the server reports that all parts of the store work.
func (s *store) waitReady(t *testing.T) {
	t.Helper()
	s.node.Eventually(t, 2*time.Minute, func() (bool, string) {
		report, err := s.node.Report(t.Context())
		if err != nil {
			return false, err.Error()
		}
		for _, c := range report.Components {
			if c.Name == "observe" {
				return c.State == "Ready", "observe: " + string(c.State) + ": " + c.Message
			}
		}
		return false, "the status has no observe"
	})
}

// hasLine reports whether a line with this word is in the store.
func (s *store) hasLine(t *testing.T, word string) bool {
	t.Helper()
	return len(s.lines(t, `{job="pods",pod="speaker"} |= "`+word+`"`)) > 0
}

// lines returns the lines of the last hour that a LogQL query finds, none if it fails.
func (s *store) lines(t *testing.T, query string) (lines []string) {
	t.Helper()
	var answer struct {
		Data struct {
			Result []struct {
				Values [][2]string `json:"values"`
			} `json:"result"`
		} `json:"data"`
	}
	start := strconv.FormatInt(time.Now().Add(-time.Hour).UnixNano(), 10)
	if err := s.get("/loki/api/v1/query_range", url.Values{"query": {query}, "start": {start}, "limit": {"5000"}}, &answer); err != nil {
		t.Log(err)
		return nil
	}
	for _, stream := range answer.Data.Result {
		for _, value := range stream.Values {
			lines = append(lines, value[1])
		}
	}
	return lines
}

// count returns the value of a PromQL expression that has one, -1 otherwise.
func (s *store) count(t *testing.T, expression string) float64 {
	t.Helper()
	return s.value(t, "/api/v1/query", expression)
}

// value returns what an expression of PromQL or LogQL has as its only value, -1 otherwise.
func (s *store) value(t *testing.T, path, expression string) float64 {
	t.Helper()
	var answer struct {
		Data struct {
			Result []struct {
				Value [2]any `json:"value"`
			} `json:"result"`
		} `json:"data"`
	}
	if err := s.get(path, url.Values{"query": {expression}}, &answer); err != nil {
		t.Log(err)
		return -1
	}
	if len(answer.Data.Result) != 1 {
		return -1
	}
	text, _ := answer.Data.Result[0].Value[1].(string)
	value, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return -1
	}
	return value
}

// checkMemoryLimit checks the limit of the process's own cgroup, where this machine's cgroups can be used.
func (s *store) checkMemoryLimit(t *testing.T, pid int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 || !strings.HasSuffix(fields[2], "-observe") {
			continue
		}
		for _, path := range []string{filepath.Join("/sys/fs/cgroup/memory", fields[2], "memory.limit_in_bytes"), filepath.Join("/sys/fs/cgroup", fields[2], "memory.max")} {
			limit, err := os.ReadFile(path)
			if err != nil {
				continue
			}
			if n, err := strconv.Atoi(strings.TrimSpace(string(limit))); err != nil || n > 150_000_000 {
				t.Errorf("%s is %s", path, limit)
			}
			return
		}
	}
	t.Errorf("the store has no memory limit:\n%s", text)
}

// speaker is a pod that writes a word.
const speaker = `apiVersion: v1
kind: Pod
metadata: {name: speaker, namespace: default}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: speaker
    image: %s
    command: [sh, -c, "echo %s; sleep 3600"]
`
