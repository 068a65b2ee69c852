package page

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/promql"

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
	CPU       float64  `json:"cpu"`      // cores, of all containers
	Memory    float64  `json:"memory"`   // bytes, of all containers
	// The containers that are nearest to their limits. Containers without a limit have no share of one, so they are left out.
	CPUNearest    *nearest `json:"cpuNearest,omitempty"`
	MemoryNearest *nearest `json:"memoryNearest,omitempty"`
	Rate          float64  `json:"rate"` // requests per second that it receives
	Errors        float64  `json:"errors"`
	Sent          float64  `json:"sent"` // requests per second that it sends
	Problem       *problem `json:"problem,omitempty"`
}

// nearest is the container that uses the largest share of its limit.
type nearest struct {
	Pod       string  `json:"pod"`
	Container string  `json:"container"`
	Use       float64 `json:"use"`
	Limit     float64 `json:"limit"`
}

// nearer returns the one of two that uses the larger share of its limit; either may be nil.
func nearer(a, b *nearest) *nearest {
	switch {
	case a == nil:
		return b
	case b == nil || a.Use/a.Limit >= b.Use/b.Limit:
		return a
	}
	return b
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

// used is what the containers of a pod use of a resource together, and the one that is nearest to its limit.
type used struct {
	total   float64
	nearest *nearest
}

// use evaluates what containers use of a resource and their limits, by pod. Both sides have the same containers: a limit is only compared with the
// use of its own container.
func (s *server) use(ctx context.Context, use, limits string, at time.Time) (map[podKey]used, error) {
	const byContainer = "max by (namespace, pod, container) "
	type container struct{ namespace, pod, name string }
	of := func(sample promql.Sample) container {
		return container{sample.Metric.Get("namespace"), sample.Metric.Get("pod"), sample.Metric.Get("container")}
	}
	limited := map[container]float64{}
	vector, err := s.instant(ctx, byContainer+"("+limits+")", at)
	if err != nil {
		return nil, err
	}
	for _, sample := range vector {
		limited[of(sample)] = sample.F
	}
	if vector, err = s.instant(ctx, byContainer+"("+use+")", at); err != nil {
		return nil, err
	}
	pods := map[podKey]used{}
	for _, sample := range vector {
		c := of(sample)
		u := pods[podKey{c.namespace, c.pod}]
		u.total += sample.F
		if limit := limited[c]; limit > 0 {
			u.nearest = nearer(u.nearest, &nearest{c.pod, c.name, sample.F, limit})
		}
		pods[podKey{c.namespace, c.pod}] = u
	}
	return pods, nil
}

// ofContainers selects a family of containers. It includes sidecars, which Kubernetes has among the init containers.
func ofContainers(family string, matchers ...string) string {
	return selector("", append([]string{matches("__name__", "kube_pod_(init_)?container_"+family), ofObjects}, matchers...)...)
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
	with := func(more ...string) []string { return append(slices.Clone(of), more...) }
	restarts, err := s.byPod(ctx, "increase("+ofContainers("status_restarts_total", of...)+"["+duration(p.window())+"])", p.end)
	if err != nil {
		return nil, err
	}
	cpu, err := s.use(ctx, "rate("+selector("container_cpu_usage_seconds_total", with(ofKubelets)...)+"[5m])", ofContainers("resource_limits", with(is("resource", "cpu"))...), p.end)
	if err != nil {
		return nil, err
	}
	memory, err := s.use(ctx, selector("container_memory_working_set_bytes", with(ofKubelets)...), ofContainers("resource_limits", with(is("resource", "memory"))...), p.end)
	if err != nil {
		return nil, err
	}
	received, err := s.requestsBy(ctx, p, "destination")
	if err != nil {
		return nil, err
	}
	sent, err := s.requestsBy(ctx, p, "source")
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
			row.Restarts += restarts[k]
			row.CPU += cpu[k].total
			row.CPUNearest = nearer(row.CPUNearest, cpu[k].nearest)
			row.Memory += memory[k].total
			row.MemoryNearest = nearer(row.MemoryNearest, memory[k].nearest)
		}
		k := nodeKey{aWorkload, w.Namespace, w.Name}
		row.Rate, row.Errors, row.Sent = received[k][0], received[k][1], sent[k][0]
		rows = append(rows, row)
	}
	return struct {
		Start     int64         `json:"start"`
		End       int64         `json:"end"`
		Workloads []workloadRow `json:"workloads"`
	}{p.start.UnixMilli(), p.end.UnixMilli(), rows}, nil
}

// requestsBy returns the requests and failures per second that each workload received (side is destination) or sent (source), as its own proxies
// counted them.
func (s *server) requestsBy(ctx context.Context, p period, side string) (map[nodeKey][2]float64, error) {
	vector, err := s.instant(ctx, "sum by ("+side+"_workload, "+side+"_workload_namespace, response_code, grpc_response_status) ("+
		s.grown(selector("istio_requests_total", ofProxies, is("reporter", side)), p.window())+") > 0", p.end)
	if err != nil {
		return nil, err
	}
	rates := map[nodeKey][2]float64{}
	for _, sample := range vector {
		m := sample.Metric
		k := nodeKey{aWorkload, m.Get(side + "_workload_namespace"), m.Get(side + "_workload")}
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
	Cut bool `json:"cut,omitempty"`
	// CPU is in cores and Memory in bytes, by pod and container, of the newest pods. Measured is how many pods these are.
	CPU      []line `json:"cpu"`
	Memory   []line `json:"memory"`
	Measured int    `json:"measured"`
	// Resources are what the containers of a pod request and may use.
	Resources []resource `json:"resources"`
	// Rates are requests per second by class of code, Quantiles their durations in milliseconds: those that it receives or, if it receives none, as
	// gateways, those that it sends.
	Sends     bool               `json:"sends,omitempty"`
	Rates     []line             `json:"rates"`
	Quantiles []line             `json:"quantiles"`
	Events    []event            `json:"events"`
	Rollouts  []document.Rollout `json:"rollouts"`
}

// resource is what a container requests of a resource, and may use.
type resource struct {
	Container string  `json:"container"`
	Resource  string  `json:"resource"`
	Request   float64 `json:"request,omitempty"`
	Limit     float64 `json:"limit,omitempty"`
}

// maxMeasured is how many pods of a workload are measured one by one: a chart of more is not read.
const maxMeasured = 40

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
	if err := s.addUsage(ctx, a, p, namespace); err != nil {
		return nil, err
	}
	if err := s.addTraffic(ctx, a, p, namespace, name); err != nil {
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

// addUsage adds what the containers use, request and may use.
func (s *server) addUsage(ctx context.Context, a *workloadAnswer, p period, namespace string) error {
	a.CPU, a.Memory, a.Resources = []line{}, []line{}, []resource{}
	names := make([]string, 0, maxMeasured)
	for _, pod := range a.Pods[:min(len(a.Pods), maxMeasured)] {
		names = append(names, pod.Name)
	}
	if a.Measured = len(names); len(names) == 0 {
		return nil
	}
	pods := []string{is("namespace", namespace), oneOf("pod", names...)}
	ofPods := func(metric string) string { return selector(metric, append(slices.Clone(pods), ofKubelets)...) }
	step := p.step(chartPoints)
	var err error
	if a.CPU, err = s.over(ctx, "max by (pod, container) (rate("+ofPods("container_cpu_usage_seconds_total")+"["+duration(max(2*step, 2*time.Minute))+"]))", p, step); err != nil {
		return err
	}
	if a.Memory, err = s.over(ctx, "max by (pod, container) ("+ofPods("container_memory_working_set_bytes")+")", p, step); err != nil {
		return err
	}
	requests, err := s.instant(ctx, "max by (container, resource) ("+ofContainers("resource_requests", pods...)+")", p.end)
	if err != nil {
		return err
	}
	limits, err := s.instant(ctx, "max by (container, resource) ("+ofContainers("resource_limits", pods...)+")", p.end)
	if err != nil {
		return err
	}
	type key struct{ container, resource string }
	all := map[key]resource{}
	add := func(vector promql.Vector, set func(*resource, float64)) {
		for _, sample := range vector {
			k := key{sample.Metric.Get("container"), sample.Metric.Get("resource")}
			r := all[k]
			r.Container, r.Resource = k.container, k.resource
			set(&r, sample.F)
			all[k] = r
		}
	}
	add(requests, func(r *resource, v float64) { r.Request = v })
	add(limits, func(r *resource, v float64) { r.Limit = v })
	a.Resources = slices.SortedFunc(maps.Values(all), func(x, y resource) int {
		return cmp.Or(strings.Compare(x.Container, y.Container), strings.Compare(x.Resource, y.Resource))
	})
	return nil
}

// addTraffic adds the requests that the workload receives or, if it receives none, those that it sends.
func (s *server) addTraffic(ctx context.Context, a *workloadAnswer, p period, namespace, name string) error {
	step := p.step(chartPoints)
	for _, side := range []string{"destination", "source"} {
		rate := func(metric string) string {
			return "rate(" + selector(metric, ofProxies, is("reporter", side), is(side+"_workload", name), is(side+"_workload_namespace", namespace)) + "[" + duration(max(4*step, time.Minute)) + "])"
		}
		rates, err := s.over(ctx, byClass(rate("istio_requests_total")), p, step)
		if err != nil {
			return err
		}
		if len(rates) == 0 && side == "source" {
			break
		}
		quantiles, err := s.quantiles(ctx, rate("istio_request_duration_milliseconds_bucket"), p, step)
		if err != nil {
			return err
		}
		a.Rates, a.Quantiles, a.Sends = rates, quantiles, side == "source"
		if len(rates) > 0 {
			break
		}
	}
	return nil
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
