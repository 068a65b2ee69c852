package page

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
)

// workloadRow is a row of the list of workloads.
type workloadRow struct {
	Kind      string   `json:"kind"`
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Replicas  int32    `json:"replicas"`
	Ready     int32    `json:"ready"`
	Images    []string `json:"images"`
	Created   int64    `json:"created,omitempty"`
	Restarts  float64  `json:"restarts"` // in the window
	CPU       float64  `json:"cpu"`      // cores
	Memory    float64  `json:"memory"`   // bytes
	CPULimit  float64  `json:"cpuLimit,omitempty"`
	MemLimit  float64  `json:"memoryLimit,omitempty"`
	Rate      float64  `json:"rate"` // requests per second that it receives
	Errors    float64  `json:"errors"`
	Problem   *problem `json:"problem,omitempty"`
}

// podKey identifies a pod by name, as metrics do.
type podKey struct{ namespace, pod string }

// byPod evaluates an expression with a value for each pod.
func (s *server) byPod(ctx context.Context, expr string, at time.Time) (map[podKey]float64, error) {
	vector, err := s.instant(ctx, "sum by (namespace, pod) ("+expr+")", at)
	if err != nil {
		return nil, err
	}
	values := make(map[podKey]float64, len(vector))
	for _, sample := range vector {
		values[podKey{sample.Metric.Get("namespace"), sample.Metric.Get("pod")}] = sample.F
	}
	return values, nil
}

// workloads answers with all workloads at a time. Parameters: end, window, ns.
func (s *server) workloads(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	namespaces, err := namesOf(r, "ns")
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	states, err := s.latestWorkloads(ctx, p.end, inNamespaces(namespaces)...)
	if err != nil {
		return nil, err
	}
	var of []string
	if len(namespaces) > 0 {
		of = []string{oneOf("namespace", namespaces...)}
	}
	with := func(metric string, more ...string) string {
		return selector(metric, append(slices.Clone(of), more...)...)
	}
	numbers := map[string]map[podKey]float64{}
	for name, expr := range map[string]string{
		"cpu":         "rate(" + with("container_cpu_usage_seconds_total", ofKubelets) + "[5m])",
		"memory":      with("container_memory_working_set_bytes", ofKubelets),
		"restarts":    "increase(" + with("kube_pod_container_status_restarts_total", ofObjects) + "[" + duration(p.window()) + "])",
		"cpuLimit":    with("kube_pod_container_resource_limits", ofObjects, is("resource", "cpu")),
		"memoryLimit": with("kube_pod_container_resource_limits", ofObjects, is("resource", "memory")),
	} {
		if numbers[name], err = s.byPod(ctx, expr, p.end); err != nil {
			return nil, err
		}
	}
	rates, err := s.received(ctx, p)
	if err != nil {
		return nil, err
	}
	found, err := s.diagnosisAt(ctx, p.end)
	if err != nil {
		return nil, err
	}
	rows := make([]workloadRow, 0, len(states))
	for i := range states {
		w := &states[i]
		row := workloadRow{
			Kind: w.Kind, Namespace: w.Namespace, Name: w.Name, Replicas: w.Replicas, Ready: w.Ready, Images: []string{}, Problem: problemOf(w, found),
		}
		if !w.Created.IsZero() {
			row.Created = w.Created.UnixMilli()
		}
		for _, c := range w.Containers {
			row.Images = append(row.Images, c.Image)
		}
		for _, pod := range w.Pods {
			k := podKey{w.Namespace, pod.Name}
			row.CPU += numbers["cpu"][k]
			row.Memory += numbers["memory"][k]
			row.Restarts += numbers["restarts"][k]
			row.CPULimit += numbers["cpuLimit"][k]
			row.MemLimit += numbers["memoryLimit"][k]
		}
		traffic := rates[nodeKey{aWorkload, w.Namespace, w.Name}]
		row.Rate, row.Errors = traffic[0], traffic[1]
		rows = append(rows, row)
	}
	return struct {
		Start     int64         `json:"start"`
		End       int64         `json:"end"`
		Workloads []workloadRow `json:"workloads"`
	}{p.start.UnixMilli(), p.end.UnixMilli(), rows}, nil
}

// received returns the requests and failures per second that each workload received, as its own sidecars counted them.
func (s *server) received(ctx context.Context, p period) (map[nodeKey][2]float64, error) {
	vector, err := s.instant(ctx, "sum by (destination_workload, destination_workload_namespace, response_code, grpc_response_status) ("+
		s.grown(selector("istio_requests_total", ofProxies, is("reporter", "destination")), p.window())+") > 0", p.end)
	if err != nil {
		return nil, err
	}
	rates := map[nodeKey][2]float64{}
	for _, sample := range vector {
		m := sample.Metric
		k := nodeKey{aWorkload, m.Get("destination_workload_namespace"), m.Get("destination_workload")}
		r := rates[k]
		r[0] += sample.F / p.window().Seconds()
		if outcomeOf(m.Get("response_code"), m.Get("grpc_response_status")) == failed {
			r[1] += sample.F / p.window().Seconds()
		}
		rates[k] = r
	}
	return rates, nil
}

// podGeneration is a pod of a workload that was seen in a period, also if it is gone.
type podGeneration struct {
	document.Pod
	FirstSeen int64    `json:"firstSeen"` // Unix milliseconds
	LastSeen  int64    `json:"lastSeen"`
	Gone      bool     `json:"gone"`
	Restarts  int32    `json:"restarts"`
	Images    []string `json:"images"`
	Why       string   `json:"why,omitempty"` // it is not ready
}

// revision is a template that a workload had.
type revision struct {
	Time     int64    `json:"time"` // when it was first seen, Unix milliseconds
	Revision string   `json:"revision,omitempty"`
	Template string   `json:"template,omitempty"`
	Images   []string `json:"images"`
}

// workloadAnswer is everything about a workload.
type workloadAnswer struct {
	Start     int64              `json:"start"`
	End       int64              `json:"end"`
	State     document.Workload  `json:"state"`
	Problem   *problem           `json:"problem,omitempty"`
	Findings  []findings.Finding `json:"findings"`
	Pods      []podGeneration    `json:"pods"` // the newest first
	Revisions []revision         `json:"revisions"`
	// Cut means that the period has more snapshots than were read.
	Cut      bool               `json:"cut,omitempty"`
	CPU      []line             `json:"cpu"`      // cores, by pod
	Memory   []line             `json:"memory"`   // bytes, by pod
	Requests map[string]float64 `json:"requests"` // of one pod, by resource
	Limits   map[string]float64 `json:"limits"`
	// Rates are requests per second that it receives by class of code, Quantiles their durations in milliseconds.
	Rates     []line             `json:"rates"`
	Quantiles []line             `json:"quantiles"`
	Events    []event            `json:"events"`
	Rollouts  []document.Rollout `json:"rollouts"`
}

// workload answers with everything about a workload. Parameters: end, window, kind.
func (s *server) workload(r *http.Request) (any, error) {
	namespace, err := pathOf(r, "namespace")
	if err != nil {
		return nil, err
	}
	name, err := pathOf(r, "name")
	if err != nil {
		return nil, err
	}
	kind, err := nameOf(r, "kind")
	if err != nil {
		return nil, err
	}
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	a := &workloadAnswer{Start: p.start.UnixMilli(), End: p.end.UnixMilli(), Findings: []findings.Finding{}}
	of := []logstore.Matcher{equal("namespace", namespace), equal("workload", name)}
	found, err := s.diagnosisAt(ctx, p.end)
	if err != nil {
		return nil, err
	}
	if err := s.addGenerations(ctx, a, p, kind, found, of); err != nil {
		return nil, err
	}
	if a.State.Name == "" {
		return nil, missing("no workload %s in %s was recorded in this time", name, namespace)
	}
	if a.State.Deleted.IsZero() {
		a.Problem, a.Findings = problemOf(&a.State, found), found.of(keyOf(&a.State))
	}
	if err := s.addUsage(ctx, a, p, namespace, name); err != nil {
		return nil, err
	}
	a.Events, err = s.selectEvents(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", document.Events)}, of...), Start: p.start, End: p.end, Limit: 100, Newest: true,
	})
	if err != nil {
		return nil, err
	}
	if a.Rollouts, err = s.rolloutsIn(ctx, period{p.end.Add(-7 * 24 * time.Hour), p.end}, of...); err != nil {
		return nil, err
	}
	if a.Rollouts == nil {
		a.Rollouts = []document.Rollout{}
	}
	return a, s.explainRollouts(ctx, a.Rollouts, p.end)
}

// addGenerations reads the snapshots of a workload, the newest first, and adds its state, its pods and its templates.
func (s *server) addGenerations(ctx context.Context, a *workloadAnswer, p period, kind string, found *diagnosis, of []logstore.Matcher) error {
	index := map[string]int{}
	a.Pods, a.Revisions = []podGeneration{}, []revision{}
	sel := logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", document.Objects)}, of...), Start: p.start, End: p.end, Limit: maxHistory, Newest: true,
	}
	if p.window() < snapshotAge {
		sel.Start = p.end.Add(-snapshotAge)
	}
	if kind != "" {
		sel.Metadata = []logstore.Matcher{equal("kind", kind)}
	}
	read := 0
	err := s.Logs.Select(ctx, sel, func(e logstore.Entry) bool {
		read++
		var w document.Workload
		if json.Unmarshal([]byte(e.Line), &w) != nil || w.Name != label(e, "workload") || w.Namespace != label(e, "namespace") {
			return true
		}
		if a.State.Name == "" {
			a.State = w
		}
		if w.Kind != a.State.Kind {
			return true // another one with the same name
		}
		at := e.Time.UnixMilli()
		for _, pod := range w.Pods {
			i, ok := index[pod.UID]
			if !ok {
				i = len(a.Pods)
				index[pod.UID] = i
				g := podGeneration{Pod: pod, LastSeen: at, Images: []string{}, Gone: !slices.ContainsFunc(a.State.Pods, func(x document.Pod) bool { return x.UID == pod.UID && !x.Deleted })}
				if !pod.Ready && !g.Gone {
					g.Why = whyUnready(&pod, found.of(keyOf(&a.State)))
				}
				for _, c := range pod.Containers {
					g.Restarts += c.Restarts
					g.Images = append(g.Images, c.Image)
				}
				a.Pods = append(a.Pods, g)
			}
			a.Pods[i].FirstSeen = at
		}
		x := revision{Time: at, Revision: w.Revision, Images: []string{}}
		for _, c := range w.Containers {
			x.Images = append(x.Images, c.Image)
		}
		if n := len(a.Revisions); n > 0 && a.Revisions[n-1].Revision == x.Revision && slices.Equal(a.Revisions[n-1].Images, x.Images) {
			a.Revisions[n-1].Time = at
		} else {
			a.Revisions = append(a.Revisions, x)
		}
		return true
	})
	a.Cut = read == maxHistory
	slices.SortStableFunc(a.Pods, func(x, y podGeneration) int { return y.Created.Compare(x.Created.Time) })
	return err
}

// addUsage adds what the pods use, and what they receive.
func (s *server) addUsage(ctx context.Context, a *workloadAnswer, p period, namespace, name string) error {
	names := make([]string, 0, len(a.Pods))
	for _, pod := range a.Pods {
		if len(names) < maxNames {
			names = append(names, pod.Name)
		}
	}
	step := p.step(chartPoints)
	a.CPU, a.Memory, a.Requests, a.Limits = []line{}, []line{}, map[string]float64{}, map[string]float64{}
	if len(names) > 0 {
		pods := []string{is("namespace", namespace), oneOf("pod", names...)}
		with := func(metric string, more ...string) string {
			return selector(metric, append(slices.Clone(pods), more...)...)
		}
		var err error
		if a.CPU, err = s.over(ctx, "sum by (pod) (rate("+with("container_cpu_usage_seconds_total", ofKubelets)+"["+duration(max(2*step, 2*time.Minute))+"]))", p, step); err != nil {
			return err
		}
		if a.Memory, err = s.over(ctx, "sum by (pod) ("+with("container_memory_working_set_bytes", ofKubelets)+")", p, step); err != nil {
			return err
		}
		for metric, values := range map[string]map[string]float64{"kube_pod_container_resource_requests": a.Requests, "kube_pod_container_resource_limits": a.Limits} {
			vector, err := s.instant(ctx, "max by (resource) (sum by (pod, resource) ("+with(metric, ofObjects)+"))", p.end)
			if err != nil {
				return err
			}
			for _, sample := range vector {
				values[sample.Metric.Get("resource")] = sample.F
			}
		}
	}
	of := []string{ofProxies, is("reporter", "destination"), is("destination_workload", name), is("destination_workload_namespace", namespace)}
	rate := func(metric string) string {
		return "rate(" + selector(metric, of...) + "[" + duration(max(4*step, time.Minute)) + "])"
	}
	var err error
	if a.Rates, err = s.over(ctx, byClass(rate("istio_requests_total")), p, step); err != nil {
		return err
	}
	a.Quantiles, err = s.quantiles(ctx, rate("istio_request_duration_milliseconds_bucket"), p, step)
	return err
}

// byClass returns an expression for requests by the class of their code, 2xx to 5xx.
func byClass(rate string) string {
	return `sum by (class) (label_replace(` + rate + `, "class", "${1}xx", "response_code", "(.).*"))`
}

// quantiles returns the 50th, 95th and 99th percentile of a histogram in time.
func (s *server) quantiles(ctx context.Context, rate string, p period, step time.Duration) ([]line, error) {
	// The buckets are read once for all three.
	lines, err := s.over(ctx, "sum by (le) ("+rate+")", p, step)
	if err != nil {
		return nil, err
	}
	buckets := map[float64]map[float64]float64{} // by time and bound
	for _, l := range lines {
		bound, err := strconv.ParseFloat(l.Labels["le"], 64)
		if err != nil {
			continue
		}
		for _, point := range l.Points {
			if buckets[point[0]] == nil {
				buckets[point[0]] = map[float64]float64{}
			}
			buckets[point[0]][bound] = point[1]
		}
	}
	all := []line{}
	for _, quantile := range []float64{0.5, 0.95, 0.99} {
		l := line{Labels: map[string]string{"quantile": strconv.FormatFloat(quantile, 'f', -1, 64)}}
		for _, at := range slices.Sorted(maps.Keys(buckets)) {
			if value := percentile(quantile, buckets[at]); value != nil {
				l.Points = append(l.Points, [2]float64{at, *value})
			}
		}
		if len(l.Points) > 0 {
			all = append(all, l)
		}
	}
	return all, nil
}
