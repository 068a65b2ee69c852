//go:build e2e

package e2e

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/test/e2e/node"
)

// What floods the store harms nothing else: a pod that writes 5,000 lines a second, a target with 100,000 series, one with new series all the time,
// and a disk that fills up. Each is limited and reported, the process goes on, and no line of another pod is lost.
func TestObserveFloods(t *testing.T) {
	ownNodes(t, 1)
	long(t, "each limit has tests beside the code, on the real stores")
	disks := node.DisksForTest(t)
	n := node.ForTest(t, node.Options{
		Observe: true, Disk: disks.New(t, "ext4"), Args: []string{"--disable", "istio,metrics-server,local-storage", "--observe-cluster-access", "off"},
	})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	s := &store{n}
	s.waitReady(t)
	first := s.pid(t)
	n.Apply(t, strings.ReplaceAll(floods, "IMAGE", busyboxImage(t, n)))

	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		said := s.sentences(t)
		return strings.Contains(said, "log lines of loud in default were dropped"), "the overview says nothing of dropped lines:\n" + said
	})
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		said := s.targetError(t, "/metrics.txt")
		return strings.Contains(said, "sample limit exceeded"), fmt.Sprintf("the error of the target with 100,000 series is %q", said)
	})
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		said := s.sentences(t)
		return strings.Contains(said, "cannot be read"), "the overview says nothing of the target:\n" + said
	})
	n.Eventually(t, 5*time.Minute, func() (bool, string) {
		series := s.count(t, `prometheus_tsdb_head_series`)
		status, _ := n.Status(t)
		return s.count(t, `polymesh_observe_series_refused_total`) > 0 && strings.Contains(status, "new ones are refused"),
			fmt.Sprintf("there are %v series, and the status is\n%s", series, status)
	})
	if series := s.count(t, `prometheus_tsdb_head_series`); series > 22_000 {
		t.Errorf("there are %v series", series)
	}
	// The limit is for new series: those before go on.
	if age := s.count(t, `time() - timestamp(up{job="node"} == 1)`); age < 0 || age > 60 {
		t.Errorf("the node's metrics are %v seconds old", age)
	}
	// Lines of the last seconds may not be stored yet.
	if kept := s.value(t, "/loki/api/v1/query", `sum(count_over_time({job="pods",pod="loud",stream="stdout"}[30s] offset 10s))`); kept > 30*2200 || kept < 1000 {
		t.Errorf("%v lines of 30 seconds were kept", kept)
	}

	spare := fill(t, n, 400<<20)
	n.Eventually(t, time.Minute, func() (bool, string) {
		status, _ := n.Status(t)
		return full(status), "the status says nothing of the full disk:\n" + status
	})
	before := said(t, n)
	n.Kubectl(t, "create", "configmap", "written-meanwhile")
	n.Eventually(t, time.Minute, func() (bool, string) {
		now := said(t, n)
		return now > before+10, fmt.Sprintf("the pod wrote %d lines before the disk was full, and %d since", before, now)
	})
	if err := os.Remove(spare); err != nil {
		t.Fatal(err)
	}
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		status, _ := n.Status(t)
		return !strings.Contains(status, "nearly full") && !strings.Contains(status, "short of space"), "the status still says that the disk is full:\n" + status
	})

	// What the other pod wrote is complete, also of the time when the disk was full.
	last := said(t, n)
	var kept []int
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		kept = s.numbered(t, "quiet")
		return len(kept) >= last, fmt.Sprintf("of %d lines of the other pod %d are stored: %v", last, len(kept), kept)
	})
	for i, number := range kept[:last] {
		if number != i+1 {
			t.Fatalf("line %d of the other pod is %d", i+1, number)
		}
	}
	if pid := s.pid(t); pid != first {
		t.Errorf("the store was process %d, and is %d", first, pid)
	}
}

// floods are the pods, and the job for the one whose series never come again.
const floods = `apiVersion: v1
kind: Pod
metadata: {name: loud, namespace: default}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: loud
    image: IMAGE
    command: [sh, -c, "while :; do seq 6000; sleep 1; done"]
---
apiVersion: v1
kind: Pod
metadata: {name: quiet, namespace: default}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: quiet
    image: IMAGE
    command: [sh, -c, "i=0; while :; do i=$((i+1)); echo quiet $i; sleep 1; done"]
---
apiVersion: v1
kind: Pod
metadata:
  name: wide
  namespace: default
  labels: {app: wide}
  annotations: {prometheus.io/scrape: "true", prometheus.io/port: "9100", prometheus.io/path: /metrics.txt}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: wide
    image: IMAGE
    command:
    - sh
    - -c
    - |
      mkdir -p /tmp/www/cgi-bin
      awk 'BEGIN { for (i = 0; i < 100000; i++) print "wide{i=\"" i "\"} 1" }' >/tmp/www/metrics.txt
      cat >/tmp/www/cgi-bin/new <<'END'
      #!/bin/sh
      printf 'Content-Type: text/plain\r\n\r\n'
      awk -v now="$(date +%s)" 'BEGIN { for (i = 0; i < 9000; i++) print "new{i=\"" now "-" i "\"} 1" }'
      END
      chmod +x /tmp/www/cgi-bin/new
      exec httpd -f -p 9100 -h /tmp/www
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: new-series
  namespace: default
  labels: {polymesh.dev/observe: scrape}
data:
  prometheus.yml: |
    scrape_configs:
    - job_name: new
      scrape_interval: 5s
      sample_limit: 10000
      metrics_path: /cgi-bin/new
      kubernetes_sd_configs:
      - role: pod
      relabel_configs:
      - source_labels: [__meta_kubernetes_pod_label_app]
        regex: wide
        action: keep
      - source_labels: [__meta_kubernetes_pod_ip]
        target_label: __address__
        replacement: $1:9100
`

// fill leaves so many bytes of the node's disk, and returns the file to remove.
func fill(t *testing.T, n *node.Node, left uint64) string {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(n.DataDir(), &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(n.DataDir(), "..", "spare"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Blocks that are reserved for a file are used, although nothing is written.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail*uint64(fs.Bsize)-left)); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// said returns how many lines the pod quiet has written.
func said(t *testing.T, n *node.Node) int {
	t.Helper()
	last := strings.TrimSpace(n.Kubectl(t, "logs", "quiet", "--tail=1"))
	number, err := strconv.Atoi(strings.TrimPrefix(last, "quiet "))
	if err != nil {
		t.Fatalf("the pod quiet wrote %q", last)
	}
	return number
}

// full reports whether a status says that the disk has no room for the store.
func full(status string) bool {
	return strings.Contains(status, "nearly full") && strings.Contains(status, "short of space")
}

// sentences are those of the page's overview.
func (s *store) sentences(t *testing.T) string {
	t.Helper()
	var overview struct{ Statements []struct{ Text, Why string } }
	if err := s.get("/api/polymesh/v1/overview", url.Values{"window": {"1h"}}, &overview); err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, st := range overview.Statements {
		fmt.Fprintln(&b, st.Text, st.Why)
	}
	return b.String()
}

// targetError is why the last scrape of a path has failed.
func (s *store) targetError(t *testing.T, path string) string {
	t.Helper()
	var targets struct {
		Data struct {
			ActiveTargets []struct{ ScrapeURL, LastError string }
		}
	}
	if err := s.get("/api/v1/targets", url.Values{"state": {"active"}}, &targets); err != nil {
		return err.Error()
	}
	for _, target := range targets.Data.ActiveTargets {
		if strings.HasSuffix(target.ScrapeURL, path) {
			return target.LastError
		}
	}
	return "there is no such target"
}

// numbered are the numbers in the lines of a pod that writes its name and a number.
func (s *store) numbered(t *testing.T, pod string) (numbers []int) {
	t.Helper()
	for _, line := range s.lines(t, `{job="pods",pod="`+pod+`"}`) {
		number, err := strconv.Atoi(strings.TrimPrefix(line, pod+" "))
		if err != nil {
			t.Fatalf("a line of %s is %q", pod, line)
		}
		numbers = append(numbers, number)
	}
	slices.Sort(numbers)
	return numbers
}
