package page

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
)

// The guide's table of when to extend a cluster: docs/guide.md, 擴充觸發條件. Package rulefiles has the same limits as alerting rules.
const (
	cpuLimit     = 70.0 // percent
	memoryLimit  = 80.0
	pendingLimit = 5 * time.Minute
	serverLimit  = 1.0 // seconds
	// For how long they must be above their limits.
	cpuLasting, memoryLasting, serverLasting = 10 * time.Minute, 5 * time.Minute, 5 * time.Minute
)

// trigger is a row of that table, live.
type trigger struct {
	ID string `json:"id"` // cpu, memory, pending, evicted, apiserver
	// Firing means that it applies at the end of the period, since Since.
	Firing bool  `json:"firing"`
	Since  int64 `json:"since,omitempty"` // Unix milliseconds
	// Earlier means that it applied at the first time that was looked at, so it may have begun before.
	Earlier bool `json:"earlier,omitempty"`
	// Value is the highest one at the end, Limit what it is compared with. Known is false if nothing measures it.
	Value float64 `json:"value"`
	Limit float64 `json:"limit"`
	Known bool    `json:"known"`
	Lines []line  `json:"lines"`
	// About names what it applies to.
	About []string `json:"about"`

	// highest is the highest value of those that it applies to.
	highest float64
	// pods are those that wait for too long, if that is what it is about.
	pods []waitingPod
}

// waitingPod is a pod that is pending, since it was created.
type waitingPod struct {
	podKey
	since time.Time
}

// name sets the pods that it is about.
func (t *trigger) name(pods []waitingPod) {
	t.pods, t.About, t.Firing, t.Since = pods, []string{}, len(pods) > 0, 0
	for i, pod := range pods {
		t.About = append(t.About, pod.namespace+"/"+pod.pod)
		if at := pod.since.UnixMilli(); i == 0 || at < t.Since {
			t.Since = at
		}
	}
	slices.Sort(t.About)
}

// nodeRow is a node of the cluster.
type nodeRow struct {
	Name     string   `json:"name"`
	Ready    bool     `json:"ready"`
	Known    bool     `json:"known"` // whether it is ready
	Since    int64    `json:"since,omitempty"`
	Earlier  bool     `json:"earlier,omitempty"` // it may have begun before Since
	Pressure []string `json:"pressure"`          // conditions that should not be true
	Version  string   `json:"version,omitempty"`
	Kernel   string   `json:"kernel,omitempty"`
	OS       string   `json:"os,omitempty"`
	Address  string   `json:"address,omitempty"`
	Cordoned bool     `json:"cordoned,omitempty"`
	Pods     float64  `json:"pods"`
	MaxPods  float64  `json:"maxPods,omitempty"`
	CPUs     float64  `json:"cpus,omitempty"`
	CPU      *float64 `json:"cpu,omitempty"`    // percent
	Memory   *float64 `json:"memory,omitempty"` // percent
	Bytes    float64  `json:"bytes,omitempty"`  // of memory
	Disk     *float64 `json:"disk,omitempty"`   // percent of the fullest file system
}

// The use of CPU and memory in percent, by node: by the machine's own numbers or, for other nodes, by their kubelets'.
var (
	cpuUse = "100 * (1 - avg by (node) (rate(" + selector("node_cpu_seconds_total", ofNodes, is("mode", "idle")) + "[5m])))" +
		" or 100 * sum by (node) (rate(" + selector("node_cpu_usage_seconds_total", ofKubelets) + "[5m])) / sum by (node) (" + selector("kube_node_status_capacity", ofObjects, is("resource", "cpu")) + ")"
	memoryUse = "100 * (1 - sum by (node) (" + selector("node_memory_MemAvailable_bytes", ofNodes) + ") / sum by (node) (" + selector("node_memory_MemTotal_bytes", ofNodes) + "))" +
		" or 100 * sum by (node) (" + selector("node_memory_working_set_bytes", ofKubelets) + ") / sum by (node) (" + selector("kube_node_status_capacity", ofObjects, is("resource", "memory")) + ")"
	diskUse = "100 * max by (node) (1 - " + selector("node_filesystem_avail_bytes", ofNodes) + " / " + selector("node_filesystem_size_bytes", ofNodes) + ")"
	// pending has the pods that are pending, with the time of their creation: a pod is pending from then on.
	pending = "max by (namespace, pod) (" + selector("kube_pod_created", ofObjects) + " and on (namespace, pod, uid) (" + selector("kube_pod_status_phase", ofObjects, is("phase", "Pending")) + " == 1))"
	// serverTime is the 99th percentile of the API server's response times in seconds, without watches, whose clients choose their duration.
	serverTime = "histogram_quantile(0.99, sum by (le) (rate(" + selector("apiserver_request_duration_seconds_bucket", ofServer, `verb!~"WATCH|CONNECT"`) + "[5m])))"
)

// nodes answers with the nodes, and when to extend the cluster. Parameters: end, window.
func (s *server) nodes(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	triggers, err := s.triggers(r.Context(), p)
	if err != nil {
		return nil, err
	}
	rows, err := s.nodeRows(r.Context(), p)
	if err != nil {
		return nil, err
	}
	return struct {
		Start    int64     `json:"start"`
		End      int64     `json:"end"`
		Triggers []trigger `json:"triggers"`
		Nodes    []nodeRow `json:"nodes"`
	}{p.start.UnixMilli(), p.end.UnixMilli(), triggers, rows}, nil
}

// triggers evaluates the five rows over a period.
func (s *server) triggers(ctx context.Context, p period) ([]trigger, error) {
	step := p.step(chartPoints)
	var list []trigger
	for _, row := range []struct {
		id, expr string
		limit    float64
		lasting  time.Duration
	}{
		{"cpu", cpuUse, cpuLimit, cpuLasting},
		{"memory", memoryUse, memoryLimit, memoryLasting},
		{"apiserver", serverTime, serverLimit, serverLasting},
	} {
		longer := period{p.end.Add(-max(p.window(), 2*row.lasting)), p.end}
		now, lines, err := s.above(ctx, row.expr, row.limit, longer, step)
		if err != nil {
			return nil, err
		}
		t := trigger{ID: row.id, Limit: row.limit, Lines: []line{}, About: []string{}, Known: len(lines) > 0}
		for _, l := range lines {
			if n := len(l.Points); n > 0 && p.end.Sub(time.UnixMilli(int64(l.Points[n-1][0]))) <= step {
				t.Value = max(t.Value, l.Points[n-1][1])
			}
			l.Points = slices.DeleteFunc(l.Points, func(point [2]float64) bool { return point[0] < float64(p.start.UnixMilli()) })
			if len(l.Points) > 0 {
				t.Lines = append(t.Lines, l)
			}
		}
		for _, x := range now {
			t.Value = max(t.Value, x.value)
			if p.end.Sub(x.since) < row.lasting {
				continue
			}
			if name := x.labels["node"]; name != "" {
				t.About = append(t.About, name)
			}
			if !t.Firing || x.since.UnixMilli() < t.Since {
				t.Since, t.Earlier = x.since.UnixMilli(), x.earlier
			}
			t.Firing, t.highest = true, max(t.highest, x.value)
		}
		list = append(list, t)
	}

	// How many pods wait, and since when the one waits that has waited longest.
	waiting := trigger{ID: "pending", Limit: pendingLimit.Seconds()}
	var err error
	if waiting.Lines, err = s.over(ctx, "sum("+selector("kube_pod_status_phase", ofObjects, is("phase", "Pending"))+")", p, step); err != nil {
		return nil, err
	}
	waiting.Known = len(waiting.Lines) > 0
	each, err := s.instant(ctx, pending, p.end)
	if err != nil {
		return nil, err
	}
	waiting.Value = float64(len(each))
	var pods []waitingPod
	for _, sample := range each {
		if since := time.UnixMilli(int64(sample.F * 1000)); p.end.Sub(since) >= pendingLimit {
			pods = append(pods, waitingPod{podKey{sample.Metric.Get("namespace"), sample.Metric.Get("pod")}, since})
		}
	}
	waiting.name(pods)

	evicted := trigger{ID: "evicted", Known: true, Lines: []line{}, About: []string{}}
	list0, err := s.selectEvents(ctx, logstore.Selector{
		Matchers: []logstore.Matcher{equal("job", document.Events)}, Metadata: []logstore.Matcher{equal("source", document.Polymesh), equal("reason", "Evicted")},
		Start: p.end.Add(-max(p.window(), time.Hour)), End: p.end, Limit: maxNames, Newest: true,
	})
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, e := range list0 {
		if name := e.Namespace + "/" + e.Name; !seen[name] {
			seen[name] = true
			evicted.About = append(evicted.About, name)
			evicted.Firing, evicted.Since = true, e.Time
		}
	}
	evicted.Value = float64(len(evicted.About))
	// In the order of the guide.
	return []trigger{list[0], list[1], waiting, evicted, list[2]}, nil
}

// nodeRows returns the nodes of the cluster.
func (s *server) nodeRows(ctx context.Context, p period) ([]nodeRow, error) {
	rows := map[string]*nodeRow{}
	row := func(name string) *nodeRow {
		n := rows[name]
		if n == nil {
			n = &nodeRow{Name: name, Pressure: []string{}}
			rows[name] = n
		}
		return n
	}
	read := func(expr string, each func(get func(string) string, value float64)) error {
		vector, err := s.instant(ctx, expr, p.end)
		for _, sample := range vector {
			each(sample.Metric.Get, sample.F)
		}
		return err
	}
	percent := func(of func(*nodeRow) **float64) func(get func(string) string, value float64) {
		return func(get func(string) string, value float64) {
			if name := get("node"); name != "" {
				*of(row(name)) = &value
			}
		}
	}
	for _, query := range []struct {
		expr string
		each func(get func(string) string, value float64)
	}{
		{selector("kube_node_info", ofObjects), func(get func(string) string, _ float64) {
			n := row(get("node"))
			n.Version, n.Kernel, n.OS, n.Address = get("kubelet_version"), get("kernel_version"), get("os_image"), get("internal_ip")
		}},
		{selector("kube_node_status_condition", ofObjects, is("status", "true")), func(get func(string) string, value float64) {
			n := row(get("node"))
			switch condition := get("condition"); {
			case condition == "Ready":
				n.Known, n.Ready = true, value == 1
			case value == 1:
				n.Pressure = append(n.Pressure, condition)
			}
		}},
		{selector("kube_node_spec_unschedulable", ofObjects), func(get func(string) string, value float64) { row(get("node")).Cordoned = value == 1 }},
		{"sum by (node) (" + selector("kube_pod_info", ofObjects, `node!=""`) + ")", func(get func(string) string, value float64) { row(get("node")).Pods = value }},
		{selector("kube_node_status_allocatable", ofObjects, is("resource", "pods")), func(get func(string) string, value float64) { row(get("node")).MaxPods = value }},
		{selector("kube_node_status_capacity", ofObjects, is("resource", "cpu")), func(get func(string) string, value float64) { row(get("node")).CPUs = value }},
		{selector("kube_node_status_capacity", ofObjects, is("resource", "memory")), func(get func(string) string, value float64) { row(get("node")).Bytes = value }},
		{cpuUse, percent(func(n *nodeRow) **float64 { return &n.CPU })},
		{memoryUse, percent(func(n *nodeRow) **float64 { return &n.Memory })},
		{diskUse, percent(func(n *nodeRow) **float64 { return &n.Disk })},
	} {
		if err := read(query.expr, query.each); err != nil {
			return nil, err
		}
	}
	// Since when a node is not ready.
	away, _, err := s.above(ctx, selector("kube_node_status_condition", ofObjects, is("condition", "Ready"), is("status", "true"))+" == 0", -1, p, p.step(chartPoints))
	if err != nil {
		return nil, err
	}
	for _, x := range away {
		if n := rows[x.labels["node"]]; n != nil && n.Known && !n.Ready {
			n.Since, n.Earlier = x.since.UnixMilli(), x.earlier
		}
	}
	list := make([]nodeRow, 0, len(rows))
	for _, n := range rows {
		slices.Sort(n.Pressure)
		list = append(list, *n)
	}
	slices.SortFunc(list, func(a, b nodeRow) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return list, nil
}

// sentence returns what the trigger says, and what the guide advises.
func (t *trigger) sentence() (text, advice string) {
	about := listed(t.About, 3)
	switch t.ID {
	case "cpu":
		return fmt.Sprintf("%s uses %.0f %% of its CPUs.", about, t.highest), "Above 70 % for long, consider another node, or a larger one."
	case "memory":
		return fmt.Sprintf("%s uses %.0f %% of its memory.", about, t.highest), "Above 80 %, add a node or memory at once."
	case "pending":
		return fmt.Sprintf("%s waiting for more than 5 minutes: %s.", plural(len(t.About), "pod has been", "pods have been"), about), "See the events of these pods."
	case "evicted":
		return fmt.Sprintf("%s evicted: %s.", plural(len(t.About), "pod was", "pods were"), about), "Add a node or memory at once."
	}
	return fmt.Sprintf("The slowest of 100 requests to the API server takes %.1f s.", t.highest), "Check the control plane and its datastore."
}

// listed writes names one after the other, at most n of them.
func listed(names []string, n int) string {
	text := ""
	for i, name := range names {
		switch {
		case i == n:
			return text + fmt.Sprintf(" and %d more", len(names)-n)
		case i > 0:
			text += ", "
		}
		text += excerpt.Marked(name, 100)
	}
	return text
}
