package page

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }

// do answers a request.
func do(h http.Handler, method, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

// get answers a request of the API, and decodes the result.
func get[T any](t *testing.T, h http.Handler, path string) T {
	t.Helper()
	w := do(h, http.MethodGet, "/api/polymesh/v1/"+path)
	require.Equal(t, http.StatusOK, w.Code, "%s: %s", path, w.Body.String())
	var v T
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &v))
	return v
}

// nodesByName are the indexes of a graph's nodes.
func nodesByName(g graphAnswer) map[string]int {
	index := map[string]int{}
	for i, n := range g.Nodes {
		index[n.Namespace+"/"+n.Name] = i
	}
	return index
}

func edgeOf(t *testing.T, g graphAnswer, from, to string) graphEdge {
	t.Helper()
	index := nodesByName(g)
	require.Contains(t, index, from)
	require.Contains(t, index, to)
	for _, e := range g.Edges {
		if e.Source == index[from] && e.Target == index[to] {
			return e
		}
	}
	require.Fail(t, "no such edge", "%s to %s", from, to)
	return graphEdge{}
}

// TestAfternoon asks about all that happens in the made-up afternoon.
func TestAfternoon(t *testing.T) {
	s := newStores(t)
	s.afternoon(t)
	h := s.page(t)
	pair := url.Values{"from-ns": {app}, "from": {"node-service"}, "to-ns": {app}, "to": {"rust-service"}}

	t.Run("graph", func(t *testing.T) {
		g := get[graphAnswer](t, h, "graph")
		require.Len(t, g.Edges, 9)
		require.False(t, g.Shortened)

		// The caller's numbers: with those of the called side each request would count twice. What never arrived is on the same edge.
		e := edgeOf(t, g, app+"/node-service", app+"/rust-service")
		require.Equal(t, "source", e.Reporter)
		require.InDelta(t, 0.1, e.Errors/e.Rate, 0.01) // 12 % for 12 of 15 minutes
		require.InDelta(t, 4.6, e.Rate, 0.3)
		require.Equal(t, "mtls", e.Security, "only the called side knows")
		require.Greater(t, *e.P99, *e.P95)
		require.Greater(t, *e.P95, *e.P50)
		require.Contains(t, g.Nodes[e.Target].Problem, "1 of 2 pods are ready: container app ends again and again")

		// A caller without a sidecar is only known to the called side.
		e = edgeOf(t, g, "/", app+"/rust-service")
		require.Equal(t, "destination", e.Reporter)
		require.Equal(t, "plain", e.Security)

		e = edgeOf(t, g, app+"/java-service", "data/postgres")
		require.Equal(t, []string{"tcp"}, e.Protocols)
		require.Greater(t, e.TCP.Received, e.TCP.Sent, "answers are longer than questions")
		require.Zero(t, e.Rate)

		e = edgeOf(t, g, "istio-system/istio-ingressgateway", app+"/fastapi-service-canary")
		require.Equal(t, 25, *e.Weight)
		require.Equal(t, 75, *edgeOf(t, g, "istio-system/istio-ingressgateway", app+"/fastapi-service").Weight)
	})

	t.Run("graph of another time", func(t *testing.T) {
		q := url.Values{"end": {fmt.Sprint(rolledBack.UnixMilli())}, "window": {"5m"}}
		g := get[graphAnswer](t, h, "graph?"+q.Encode())
		edgeOf(t, g, app+"/fastapi-service", app+"/java-service-canary")
		require.NotContains(t, nodesByName(g), app+"/fastapi-service-canary")
		require.Zero(t, edgeOf(t, g, app+"/node-service", app+"/rust-service").Errors)
	})

	t.Run("graph with filters", func(t *testing.T) {
		g := get[graphAnswer](t, h, "graph?ns=data")
		require.Len(t, g.Edges, 2)
		require.Len(t, g.Namespaces, 3, "the filter lists all")
		g = get[graphAnswer](t, h, "graph?errors=1")
		require.Len(t, g.Edges, 3)
		g = get[graphAnswer](t, h, "graph?focus=go-service&focus-ns="+app)
		require.Len(t, g.Edges, 2)
	})

	t.Run("edge", func(t *testing.T) {
		a := get[edgeAnswer](t, h, "edge?"+pair.Encode())
		require.Equal(t, "200", a.Codes[0].Code)
		require.Equal(t, "503", a.Codes[1].Code)
		require.Equal(t, "UF,URX", a.Codes[1].Flags)
		require.Contains(t, a.Codes[1].Meaning, "the connection to the pod failed")
		require.InDelta(t, a.Edge.Requests, a.Codes[0].Requests+a.Codes[1].Requests+a.Codes[2].Requests, 1)
		require.Equal(t, "spiffe://cluster.local/ns/"+app+"/sa/node-service", a.Principals[0].Source)
		require.Equal(t, "source", a.Logged)
		require.Len(t, a.Requests, edgeRequests)
		require.Equal(t, "/round", a.Requests[0].Path)
		require.NotEmpty(t, a.Requests[0].RequestID)
		require.Len(t, a.Quantiles, 3)
		require.Len(t, a.Bytes, 2)
	})

	t.Run("request", func(t *testing.T) {
		a := get[requestAnswer](t, h, "request/"+firstRequest)
		require.False(t, a.FromLogs)
		require.Len(t, a.Bars, 15)
		require.Len(t, a.Lines, 15) // five services: two of each proxy but one of the gateway's and of the last one's, and one of each app
		require.Len(t, a.Traces, 1)
		bars := map[string]spanView{}
		for _, b := range a.Bars {
			bars[b.ID] = b
		}
		for _, l := range a.Lines {
			require.Contains(t, l.Line, firstRequest)
			require.NotEmpty(t, l.Bar, l.Line)
			require.Equal(t, l.Pod, bars[l.Bar].Pod)
			require.Equal(t, l.Access != nil, bars[l.Bar].Proxy)
		}
		// By the id of its trace there is the same.
		b := get[requestAnswer](t, h, "request/"+a.Traces[0])
		require.Len(t, b.Bars, 15)
		require.Len(t, b.Lines, 15)
		require.Equal(t, []string{firstRequest}, b.Requests)
	})

	t.Run("request without spans", func(t *testing.T) {
		a := get[requestAnswer](t, h, "request/"+untraced)
		require.True(t, a.FromLogs)
		require.Len(t, a.Bars, 10)
		parents, roots := map[string]string{}, 0
		services := map[string]string{}
		for _, b := range a.Bars {
			parents[b.ID] = b.Parent
			services[b.ID] = b.Service + " " + b.Kind
			if b.Parent == "" {
				roots++
			}
		}
		require.Equal(t, 1, roots)
		// From the last one up to the gateway.
		var chain []string
		for _, b := range a.Bars {
			if b.Service == "rust-service" {
				for id := b.ID; id != ""; id = parents[id] {
					chain = append(chain, services[id])
				}
			}
		}
		require.Equal(t, []string{
			"rust-service server", "node-service client", "node-service server", "java-service client", "java-service server", "fastapi-service client", "fastapi-service server", "istio-ingressgateway client",
		}, chain)
		for _, l := range a.Lines {
			require.NotEmpty(t, l.Bar, l.Line)
		}
	})

	t.Run("nothing about a request", func(t *testing.T) {
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, "/api/polymesh/v1/request/00000000-0000-4000-8000-000000000000").Code)
		require.Equal(t, http.StatusBadRequest, do(h, http.MethodGet, "/api/polymesh/v1/request/"+url.PathEscape(`x" | delete`)).Code)
	})

	t.Run("overview", func(t *testing.T) {
		a := get[overviewAnswer](t, h, "overview")
		require.Equal(t, bad, a.Verdict)
		texts := map[string]statement{}
		for _, st := range a.Statements {
			texts[st.Text] = st
		}
		find := func(part string) statement {
			for text, st := range texts {
				if strings.Contains(text, part) {
					return st
				}
			}
			require.Fail(t, "no such sentence", "%s in %v", part, a.Statements)
			return statement{}
		}
		st := find("of the requests from node-service to rust-service fail")
		require.Contains(t, st.Why, "Most end with 503 (the connection to the pod failed")
		require.WithinDuration(t, failing, time.UnixMilli(st.Since), 10*time.Minute)
		require.Equal(t, "/edge/polyglot-services/node-service/polyglot-services/rust-service", st.Link)
		st = find("node-1 uses 7")
		require.WithinDuration(t, fixtureNow.Add(-30*time.Minute), time.UnixMilli(st.Since), 6*time.Minute)
		for text := range texts {
			require.NotContains(t, text, "waiting for more than 5 minutes", "the diagnosis says why this pod waits")
		}
		st = find("node-service in polyglot-services was killed at its memory limit")
		require.True(t, st.Once)
		require.Equal(t, note, find("of your own scrape jobs cannot be read").Level)
		st = find("was rolled back")
		require.Contains(t, st.Why, "error rate 3.4 %")
		require.Equal(t, note, find("is under way: 25 % of the requests").Level)
		// What the server's diagnosis has found, in the words of the cluster.
		st = find("rust-service in polyglot-services: 1 of 2 pods are ready: container app ends again and again.")
		require.Equal(t, warn, st.Level)
		require.Contains(t, st.Why, "Container app of pod rust-service-")
		require.Contains(t, st.Why, "ended with exit code 101 (6 restarts), its last output: thread 'main' panicked at src/main.rs:42.")
		require.Contains(t, st.Advice, "Its whole log: `kubectl logs")
		require.Equal(t, failing.UnixMilli(), st.Since)
		require.Equal(t, "/workloads/polyglot-services/rust-service", st.Link)
		st = find("report in polyglot-services: 0 of 1 pod is ready: a pod waits for a node.")
		require.Equal(t, bad, st.Level)
		require.Contains(t, st.Advice, "lower the requests")
		require.Equal(t, a.Numbers.Workloads-1, a.Numbers.ReadyWorkloads, "a Job is ready when it has ended")
		require.Equal(t, 2, a.Numbers.ReadyNodes)
		for _, m := range a.Changes {
			require.NotEqual(t, "not by Polymesh", m.Text, "a user's event is no mark")
		}
	})

	t.Run("overview of an earlier time", func(t *testing.T) {
		for at, want := range map[time.Time][]string{
			failing.Add(-time.Minute): nil,
			failing.Add(time.Minute):  {"rust-service in "},
			fixtureNow:                {"report in ", "rust-service in "},
		} {
			a := get[overviewAnswer](t, h, fmt.Sprintf("overview?end=%d", at.UnixMilli()))
			var got []string
			for _, st := range a.Statements {
				for _, w := range []string{"report in ", "rust-service in "} {
					if strings.HasPrefix(st.Text, w) {
						got = append(got, w)
					}
				}
			}
			require.Equal(t, want, got, at)
		}
		a := get[overviewAnswer](t, h, "overview?ns=data")
		for _, st := range a.Statements {
			require.NotContains(t, st.Text, "report in", "it is in another namespace")
		}
	})

	t.Run("findings about a workload", func(t *testing.T) {
		a := get[workloadAnswer](t, h, "workloads/"+app+"/rust-service?window=2h")
		require.Len(t, a.Findings, 1)
		require.Equal(t, "Crash", a.Findings[0].Reason)
		require.Equal(t, failing, a.Problem.Since.UTC())
		reasons := map[string]int{}
		for _, p := range a.Pods {
			reasons[p.Why]++
		}
		require.Equal(t, 1, reasons["container app ends again and again"], reasons)
		require.Empty(t, get[workloadAnswer](t, h, "workloads/"+app+"/go-service").Findings)
	})

	t.Run("workloads", func(t *testing.T) {
		list := get[struct{ Workloads []workloadRow }](t, h, "workloads").Workloads
		require.Len(t, list, len(fixtureWorkloads))
		a := get[workloadAnswer](t, h, "workloads/"+app+"/go-service?window=2h")
		require.Len(t, a.Pods, 4, "two of each generation")
		gone := 0
		for _, p := range a.Pods {
			if p.Gone {
				gone++
				require.WithinDuration(t, deployed, time.UnixMilli(p.LastSeen), 6*time.Minute)
			}
		}
		require.Equal(t, 2, gone)
		require.Len(t, a.Revisions, 2)
		require.Equal(t, []string{"polyglot/go-service:1.4.0"}, a.Revisions[0].Images)
		require.NotEmpty(t, a.CPU)
		require.False(t, a.Sends)
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, "/api/polymesh/v1/workloads/"+app+"/nothing").Code)

		// No sidecar sees what a gateway receives: it has what it sends.
		gateway := list[slices.IndexFunc(list, func(w workloadRow) bool { return w.Name == "istio-ingressgateway" })]
		require.Zero(t, gateway.Rate)
		require.Greater(t, gateway.Sent, 1.0)
		a = get[workloadAnswer](t, h, "workloads/istio-system/istio-ingressgateway?window=1h")
		require.True(t, a.Sends)
		require.NotEmpty(t, a.Rates)
		require.Len(t, a.Quantiles, 3)
	})

	t.Run("rollout", func(t *testing.T) {
		a := get[struct {
			Rollout document.Rollout
			History []rolloutHistory
			Errors  []line
		}](t, h, "rollouts/"+app+"/java-service?window=1d")
		require.Equal(t, "RolledBack", a.Rollout.Phase)
		require.Len(t, a.History, 5)
		require.Len(t, a.Errors, 2)
		require.Len(t, get[struct{ Rollouts []document.Rollout }](t, h, "rollouts?window=1d").Rollouts, 2)
	})

	t.Run("nodes", func(t *testing.T) {
		a := get[struct {
			Triggers []trigger
			Nodes    []nodeRow
		}](t, h, "nodes")
		firing := map[string]bool{}
		for _, x := range a.Triggers {
			firing[x.ID] = x.Firing
			require.True(t, x.Known, x.ID)
		}
		require.Equal(t, map[string]bool{"cpu": true, "memory": false, "pending": true, "evicted": false, "apiserver": false}, firing)
		require.Len(t, a.Nodes, 2)
		require.NotNil(t, a.Nodes[1].CPU, "of another machine by its kubelet")

		// What was so at the first time that was looked at may have begun before.
		require.True(t, a.Triggers[0].Earlier)
		require.Equal(t, fixtureNow.Add(-2*cpuLasting).UnixMilli(), a.Triggers[0].Since)
		at := fixtureNow.Add(-10 * time.Minute)
		cpu := get[struct{ Triggers []trigger }](t, h, fmt.Sprintf("nodes?end=%d", at.UnixMilli())).Triggers[0]
		require.True(t, cpu.Firing)
		require.False(t, cpu.Earlier)
		require.Greater(t, cpu.Since, at.Add(-2*cpuLasting+time.Minute).UnixMilli())
	})

	t.Run("traces", func(t *testing.T) {
		a := get[struct{ Traces []traceSummary }](t, h, "traces?status=error&path=/orders&slowest=1&limit=5")
		require.Len(t, a.Traces, 5)
		for i, x := range a.Traces {
			require.Positive(t, x.Errors)
			require.Equal(t, "/orders", x.Path)
			require.NotEmpty(t, x.RequestID)
			if i > 0 {
				require.LessOrEqual(t, x.Duration, a.Traces[i-1].Duration)
			}
		}
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, "/api/polymesh/v1/trace/"+strings.Repeat("ab", 16)).Code)
	})

	t.Run("lines around a line", func(t *testing.T) {
		q := url.Values{"labels": {`{"job":"pods","namespace":"` + app + `","pod":"` + workloadPod("java-service") + `","container":"app"}`}, "at": {fmt.Sprint(fixtureNow.Add(-time.Minute).UnixNano())}, "n": {"3"}}
		a := get[struct{ Before, After []struct{ Time, Line string } }](t, h, "line?"+q.Encode())
		require.Len(t, a.Before, 3)
		require.Len(t, a.After, 3)
		require.Less(t, a.Before[2].Time, a.After[0].Time)
	})

	t.Run("extent and marks", func(t *testing.T) {
		a := get[extentAnswer](t, h, "extent")
		require.WithinDuration(t, fixtureStart, time.UnixMilli(a.Start), 2*time.Minute)
		require.NotEmpty(t, a.Requests[0].Points)
		require.Len(t, get[struct{ Marks []mark }](t, h, "marks?window=2h").Marks, 11)
		require.Len(t, get[struct{ Marks []mark }](t, h, "marks?window=2h&ns="+app+"&workload=node-service").Marks, 4)
	})

	t.Run("queries of others' APIs", func(t *testing.T) {
		w := do(h, http.MethodGet, "/api/v1/query?query=up&time="+fmt.Sprint(fixtureNow.Unix()))
		require.Equal(t, http.StatusOK, w.Code, w.Body.String())
		w = do(h, http.MethodGet, "/loki/api/v1/query_range?"+url.Values{"query": {`{job="pods"} |= "` + firstRequest + `"`}, "start": {fmt.Sprint(fixtureStart.UnixNano())}, "end": {fmt.Sprint(fixtureNow.UnixNano())}}.Encode())
		require.Equal(t, http.StatusOK, w.Code, w.Body.String())
		require.Contains(t, w.Body.String(), "/round")
	})
}

// TestSlowCalls has durations that are all in one bucket of the histogram: the ones below have not grown, and bound it nevertheless.
func TestSlowCalls(t *testing.T) {
	s := newStores(t)
	of := func(name string, more ...string) labels.Labels {
		return labels.FromStrings(append([]string{
			"__name__", name, "job", scrapeconfig.JobProxies, "instance", "10.42.0.9:15020", "reporter", "source", "request_protocol", "http", "response_code", "200",
			"source_workload", "web", "source_workload_namespace", "a", "destination_workload", "api", "destination_workload_namespace", "a",
			"destination_service", "api.a.svc.cluster.local", "destination_service_name", "api", "destination_service_namespace", "a",
		}, more...)...)
	}
	all := []*series{
		{labels: labels.FromStrings("__name__", "up", "job", scrapeconfig.JobProxies, "instance", "10.42.0.9:15020"), value: steady(1)},
		{labels: of("istio_requests_total"), rate: steady(4)},
	}
	for le, rate := range map[string]float64{"50": 0, "100": 0, "250": 4, "500": 4, "+Inf": 4} {
		all = append(all, &series{labels: of("istio_request_duration_milliseconds_bucket", "le", le), rate: steady(rate)})
	}
	s.record(t, all, fixtureNow.Add(-30*time.Minute), fixtureNow)
	h := s.page(t)
	e := edgeOf(t, get[graphAnswer](t, h, "graph"), "a/web", "a/api")
	require.InDelta(t, 175, *e.P50, 1)
	pair := url.Values{"from-ns": {"a"}, "from": {"web"}, "to-ns": {"a"}, "to": {"api"}}
	require.InDelta(t, 175, *get[edgeAnswer](t, h, "edge?"+pair.Encode()).Edge.P50, 1)
}

// TestNow is about what holds at a time, and not shortly before.
func TestNow(t *testing.T) {
	s := newStores(t)
	state := []string{"job", scrapeconfig.JobState, "instance", "node-1"}
	var all []*series
	add := func(x series, name string, more ...string) {
		x.labels = labels.FromStrings(append([]string{"__name__", name}, more...)...)
		all = append(all, &x)
	}
	gone := fixtureNow.Add(-2 * time.Minute)
	pod := func(name, phase string, from, until time.Time) {
		of := append([]string{"namespace", "shop", "pod", name, "uid", name}, state...)
		add(series{value: steady(1), from: from, until: until}, "kube_pod_status_phase", append([]string{"phase", phase}, of...)...)
		add(series{value: steady(float64(from.Unix())), from: from, until: until}, "kube_pod_created", of...)
	}
	pod("gone", "Pending", fixtureNow.Add(-20*time.Minute), gone)
	pod("short", "Pending", fixtureNow.Add(-4*time.Minute), gone)
	pod("young", "Pending", fixtureNow.Add(-4*time.Minute), time.Time{})
	pod("explained", "Pending", fixtureNow.Add(-9*time.Minute), time.Time{})
	pod("sibling", "Pending", fixtureNow.Add(-9*time.Minute), time.Time{})
	pod("waits", "Pending", fixtureNow.Add(-7*time.Minute), time.Time{})
	pod("runs", "Running", fixtureNow.Add(-time.Hour), time.Time{})
	add(series{value: func(at time.Time) float64 {
		return map[bool]float64{true: 1}[at.Before(fixtureNow.Add(-10*time.Minute))]
	}}, "up", "job", scrapeconfig.JobKubelet, "instance", "node-1:10250")
	add(series{value: steady(0), until: gone}, "up", "job", scrapeconfig.JobNode, "instance", "node-2")
	add(series{value: steady(1), until: gone}, "ALERTS", "alertname", "Over", "alertstate", "firing")
	add(series{value: steady(1)}, "ALERTS", "alertname", "Lasts", "alertstate", "firing")
	// A node is busy for less than the rule waits, and another one for longer.
	for node, idle := range map[string]struct {
		from time.Time
		rate float64
	}{"busy": {fixtureNow.Add(-30 * time.Minute), 0.1}, "briefly": {fixtureNow.Add(-11 * time.Minute), 0.02}} {
		add(series{rate: func(at time.Time) float64 { return map[bool]float64{true: idle.rate, false: 0.9}[at.After(idle.from)] }},
			"node_cpu_seconds_total", "job", scrapeconfig.JobNode, "instance", node, "node", node, "cpu", "0", "mode", "idle")
	}
	restarted := fixtureNow.Add(-9 * time.Minute)
	add(series{value: func(at time.Time) float64 { return map[bool]float64{true: 1}[!at.Before(restarted)] }}, "kube_pod_container_status_restarts_total",
		append([]string{"namespace", "shop", "pod", "again-1", "uid", "again-1", "container", "app"}, state...)...)
	s.record(t, all, fixtureNow.Add(-time.Hour), fixtureNow)

	workload := func(name string, pods ...document.Pod) document.Workload {
		return document.Workload{Kind: "Deployment", Namespace: "shop", Name: name, Replicas: 1, Ready: 1, Pods: pods}
	}
	ended := func(reason string, code int32) document.Pod {
		return document.Pod{Name: "again-1", Phase: "Running", Ready: true, Containers: []document.State{{Name: "app", Ready: true, Last: &document.End{Reason: reason, ExitCode: code, Finished: document.At(restarted)}}}}
	}
	objects := func(at time.Time, again document.Pod) {
		var list []logstore.Entry
		for _, w := range []document.Workload{workload("api", document.Pod{Name: "explained", Phase: "Pending"}, document.Pod{Name: "sibling", Phase: "Pending"}), workload("again", again)} {
			list = append(list, logstore.Entry{Time: at, Labels: fields("job", document.Objects, "namespace", w.Namespace, "workload", w.Name), Metadata: fields("kind", w.Kind), Line: asJSON(w)})
		}
		require.NoError(t, s.logs.Append(list))
	}
	objects(fixtureNow.Add(-3*time.Minute), document.Pod{Name: "again-1", Phase: "Running", Ready: true, Containers: []document.State{{Name: "app", Ready: true}}})
	objects(fixtureNow.Add(-2*time.Minute), ended("Completed", 0))
	objects(fixtureNow.Add(-time.Minute), ended("Error", 2))
	image := findings.Finding{Reason: "ImagePull", Kind: "Deployment", Namespace: "shop", Name: "api", Pod: "explained", Container: "app", Message: "x: not found", Replicas: 2}
	require.NoError(t, s.logs.Append((&findings.Survey{Findings: []findings.Finding{image}}).Entries(fixtureNow.Add(-time.Second))))
	s.logs.Flush()
	h := s.page(t)
	at := func(at time.Time) map[string]statement {
		texts := map[string]statement{}
		for _, st := range get[overviewAnswer](t, h, fmt.Sprintf("overview?end=%d", at.UnixMilli())).Statements {
			texts[st.Text] = st
		}
		return texts
	}
	now := at(fixtureNow)
	require.Equal(t, fixtureNow.Add(-7*time.Minute).UnixMilli(), now["1 pod has been waiting for more than 5 minutes: shop/waits."].Since, "%v", now)
	const target = "1 target of kubelet cannot be read: node-1:10250. Without that, its metrics are missing."
	require.WithinDuration(t, fixtureNow.Add(-10*time.Minute), time.UnixMilli(now[target].Since), time.Minute, "%v", now)
	require.Contains(t, now, "Alert Lasts is firing.")
	require.Contains(t, now, "busy uses 90 % of its CPUs.", "the other one was busy for less than the time of the rule")
	for text := range now {
		for _, over := range []string{"gone", "short", "young", "explained", "sibling", "node-2", "Over", "briefly"} {
			require.NotContains(t, text, over)
		}
	}
	before := at(gone.Add(-time.Second))
	require.Contains(t, before, "3 pods have been waiting for more than 5 minutes: shop/explained, shop/gone, shop/sibling.", "%v", before)
	for minutes, why := range map[time.Duration]string{
		-150: "How it ended was not recorded.", -90: "The last time, it ended by itself, without an error (exit code 0).", 0: "The last time, it ended with exit code 2 (Error).",
	} {
		st, ok := at(fixtureNow.Add(minutes * time.Second))["again in shop was restarted once."]
		require.True(t, ok)
		require.Equal(t, why, st.Why)
		require.WithinDuration(t, restarted, time.UnixMilli(st.Since), 30*time.Second)
	}
}

// TestTriggersAreTheRules compares how long they wait.
func TestTriggersAreTheRules(t *testing.T) {
	f, err := rulefiles.Default()
	require.NoError(t, err)
	waits := map[string]time.Duration{}
	for _, r := range f.Groups.Groups[0].Rules {
		waits[r.Labels["trigger"]] = time.Duration(r.For)
	}
	require.Equal(t, map[string]time.Duration{"cpu": cpuLasting, "memory": memoryLasting, "apiserver": serverLasting, "pending": 0, "evicted": 0}, waits)
	require.Contains(t, f.Groups.Groups[0].Rules[2].Expr, fmt.Sprintf("> %d", int(pendingLimit.Seconds())), "its pods wait since their creation")
}

// TestRolloutsSayWhy is about rollouts whose canary's pods do not become ready.
func TestRolloutsSayWhy(t *testing.T) {
	s := newStores(t)
	started, over := fixtureNow.Add(-10*time.Minute), fixtureNow.Add(-5*time.Minute)
	rollout := func(at time.Time, r document.Rollout) {
		require.NoError(t, s.logs.Append([]logstore.Entry{{Time: at, Labels: fields("job", document.Rollouts, "namespace", r.Namespace, "workload", r.Name), Line: asJSON(r)}}))
	}
	r := document.Rollout{Name: "go-service", Namespace: "shop", Image: "x:2", Started: document.At(started), Phase: "Starting", Step: -1}
	rollout(started, r)
	finding := findings.Finding{Reason: "Pending", Kind: "Deployment", Namespace: "shop", Name: "go-service-canary", Pod: "go-service-canary-1", Message: "0/1 nodes are available: 1 Insufficient cpu", Replicas: 1}
	for at := started.Add(time.Minute); at.Before(over); at = at.Add(time.Minute) {
		require.NoError(t, s.logs.Append((&findings.Survey{Findings: []findings.Finding{finding}}).Entries(at)))
	}
	require.NoError(t, s.logs.Append((&findings.Survey{}).Entries(over.Add(-10*time.Second))))
	r.Phase, r.Ended = "Aborted", document.At(over)
	rollout(over, r)
	// One that was promoted, and one with a reason of its own, are as they were.
	rollout(over, document.Rollout{Name: "go-service", Namespace: "shop", Started: document.At(started.Add(-time.Hour)), Phase: "RolledBack", Reason: "error rate 3 %", Ended: document.At(over)})
	s.logs.Flush()
	h := s.page(t)
	type list struct{ Rollouts []document.Rollout }
	const why = "Pod go-service-canary-1: 0/1 nodes are available: 1 Insufficient cpu."
	for at, want := range map[time.Time]string{
		started.Add(time.Second):     "",
		started.Add(2 * time.Minute): "The canary is not ready. " + why,
		fixtureNow:                   "The canary was not ready. " + why,
	} {
		got := get[list](t, h, fmt.Sprintf("rollouts?end=%d&window=1h", at.UnixMilli())).Rollouts
		require.Equal(t, want, got[0].Reason, at)
		one := get[struct{ Rollout document.Rollout }](t, h, fmt.Sprintf("rollouts/shop/go-service?end=%d&window=1h&started=%d", at.UnixMilli(), started.UnixMilli()))
		require.Equal(t, want, one.Rollout.Reason, at)
	}
	require.Equal(t, "error rate 3 %", get[list](t, h, "rollouts?window=1h").Rollouts[1].Reason)
}

// The overview names whose lines are missing, the most first, and reads no numbers that nobody can have counted.
func TestDroppedLines(t *testing.T) {
	s := newStores(t)
	report := func(workload, dropped string, ago time.Duration) logstore.Entry {
		return logstore.Entry{
			Time: fixtureNow.Add(-ago),
			Labels: []logstore.Field{
				{Name: "container", Value: "app"}, {Name: "job", Value: podlogs.Job}, {Name: "namespace", Value: "default"}, {Name: "node", Value: "node-1"},
				{Name: "pod", Value: workload + "-0"}, {Name: "stream", Value: podlogs.StreamPolymesh}, {Name: "workload", Value: workload},
			},
			Line: dropped + " lines of this container were dropped", Metadata: []logstore.Field{{Name: podlogs.MetaDropped, Value: dropped}},
		}
	}
	require.NoError(t, s.logs.Append([]logstore.Entry{
		report("early", "7", 90*time.Minute),
		report("some", "1", 3*time.Minute),
		report("loud", "30000", 5*time.Minute), report("loud", "31000", 4*time.Minute),
		report("liar", "-3", time.Minute), report("liar", "99999999999999999999", time.Minute), report("liar", "many", time.Minute),
	}))
	s.logs.Flush()
	h := s.page(t)
	var got []string
	for _, st := range get[overviewAnswer](t, h, "overview?window=1h").Statements {
		if strings.Contains(st.Text, "log line") {
			require.Equal(t, warn, st.Level)
			got = append(got, fmt.Sprintf("%s %v %s", st.Text, fixtureNow.Sub(time.UnixMilli(st.Since)), st.Link))
		}
	}
	require.Equal(t, []string{
		"61000 log lines of loud in default were dropped. 5m0s /workloads/default/loud",
		"1 log line of some in default was dropped. 3m0s /workloads/default/some",
	}, got)
	for _, st := range get[overviewAnswer](t, h, "overview?window=1h&ns=other").Statements {
		require.NotContains(t, st.Text, "log line")
	}
}

// What containers use is compared with the limits of the same containers: not with those of others in the pod, nor are those without one part of it.
func TestUseAndLimits(t *testing.T) {
	s := newStores(t)
	const mib, ns = 1 << 20, "shop"
	var all []*series
	limit := map[string]string{"app": "kube_pod_container_resource_limits", "istio-proxy": "kube_pod_init_container_resource_limits"}
	container := func(pod, name string, mebibytes, limitMebibytes float64) {
		of := []string{"namespace", ns, "pod", pod, "container", name}
		add := func(x *series, metric, job string, more ...string) {
			x.labels = labels.FromStrings(slices.Concat([]string{"__name__", metric, "job", job, "instance", "node-1"}, of, more)...)
			all = append(all, x)
		}
		// What a user's job says does not count.
		for job, times := range map[string]float64{scrapeconfig.JobKubelet: 1, "default/prometheus-config/kubelet": 2} {
			add(&series{value: steady(times * mebibytes * mib)}, "container_memory_working_set_bytes", job)
			add(&series{rate: steady(times * mebibytes / 1000)}, "container_cpu_usage_seconds_total", job)
		}
		if limitMebibytes > 0 {
			add(&series{value: steady(limitMebibytes * mib)}, limit[name], scrapeconfig.JobState, "resource", "memory")
			add(&series{value: steady(limitMebibytes / 1000)}, limit[name], scrapeconfig.JobState, "resource", "cpu")
		}
	}
	container("limited-1", "app", 100, 200)
	container("limited-1", "istio-proxy", 500, 0)
	container("sidecar-1", "app", 500, 0)
	container("sidecar-1", "istio-proxy", 50, 1000)
	container("two-1", "app", 100, 200)
	container("two-2", "app", 190, 200)
	container("two-2", "istio-proxy", 100, 1000)
	container("free-1", "app", 100, 0)
	s.record(t, all, fixtureNow.Add(-10*time.Minute), fixtureNow)
	for name, pods := range map[string][]string{"limited": {"limited-1"}, "sidecar": {"sidecar-1"}, "two": {"two-1", "two-2"}, "free": {"free-1"}} {
		w := document.Workload{Kind: "Deployment", Namespace: ns, Name: name}
		for _, pod := range pods {
			w.Pods = append(w.Pods, document.Pod{Name: pod, UID: pod, Phase: "Running", Ready: true})
		}
		require.NoError(t, s.logs.Append([]logstore.Entry{{
			Time: fixtureNow.Add(-time.Minute), Labels: fields("job", document.Objects, "namespace", ns, "workload", name), Metadata: fields("kind", w.Kind), Line: asJSON(w),
		}}))
	}
	s.logs.Flush()
	h := s.page(t)
	rows := get[struct{ Workloads []workloadRow }](t, h, "workloads").Workloads
	require.Len(t, rows, 4)
	for _, w := range rows {
		want := map[string]struct {
			total   float64
			nearest *nearest
		}{
			"limited": {600, &nearest{"limited-1", "app", 100, 200}},
			"sidecar": {550, &nearest{"sidecar-1", "istio-proxy", 50, 1000}},
			"two":     {390, &nearest{"two-2", "app", 190, 200}},
			"free":    {100, nil},
		}[w.Name]
		require.Equal(t, want.total, w.Memory/mib, w.Name)
		require.InDelta(t, want.total/1000, w.CPU, 1e-6, w.Name)
		if want.nearest == nil {
			require.Nil(t, w.MemoryNearest, w.Name)
			require.Nil(t, w.CPUNearest, w.Name)
			continue
		}
		require.Equal(t, &nearest{want.nearest.Pod, want.nearest.Container, want.nearest.Use * mib, want.nearest.Limit * mib}, w.MemoryNearest, w.Name)
		require.NotNil(t, w.CPUNearest, w.Name)
		require.Equal(t, want.nearest.Container, w.CPUNearest.Container, w.Name)
		require.InDelta(t, want.nearest.Use/want.nearest.Limit, w.CPUNearest.Use/w.CPUNearest.Limit, 1e-6, w.Name)
	}

	a := get[workloadAnswer](t, h, "workloads/shop/two")
	require.Equal(t, 2, a.Measured)
	require.Equal(t, []resource{
		{Container: "app", Resource: "cpu", Limit: 0.2}, {Container: "app", Resource: "memory", Limit: 200 * mib},
		{Container: "istio-proxy", Resource: "cpu", Limit: 1}, {Container: "istio-proxy", Resource: "memory", Limit: 1000 * mib},
	}, a.Resources)
	var measured []string
	for _, l := range a.Memory {
		measured = append(measured, l.Labels["pod"]+" "+l.Labels["container"])
		require.NotEmpty(t, l.Points)
	}
	require.ElementsMatch(t, []string{"two-1 app", "two-2 app", "two-2 istio-proxy"}, measured)
}

// A period with more samples than the engine holds is evaluated in parts, with the same result.
func TestOverInParts(t *testing.T) {
	s := newStores(t)
	s.record(t, meshSeries(story), fixtureNow.Add(-30*time.Minute), fixtureNow)
	s.page(t)
	evaluate := func(samples int, expr string) ([]line, error) {
		engine := promql.NewEngine(promql.EngineOpts{Logger: slog.New(slog.DiscardHandler), MaxSamples: samples, Timeout: time.Minute, LookbackDelta: 5 * time.Minute})
		t.Cleanup(func() { require.NoError(t, engine.Close()) })
		return (&server{Options: Options{Engine: engine, Queryable: s.metrics.Queryable()}}).over(t.Context(), expr, period{fixtureNow.Add(-20 * time.Minute), fixtureNow}, 35*time.Second)
	}
	const expr = `sum by (reporter) (rate(istio_requests_total[1m]))`
	want, err := evaluate(1_000_000, expr)
	require.NoError(t, err)
	require.Len(t, want, 2)
	require.Len(t, want[0].Points, 35)
	for _, samples := range []int{700, 200, 100} {
		got, err := evaluate(samples, expr)
		require.NoError(t, err, "%d samples", samples)
		require.Equal(t, want, got, "%d samples", samples)
	}
	// One step has too many.
	_, err = evaluate(20, expr)
	require.ErrorContains(t, err, "too many samples")
}

// TestEmpty asks stores in which there is nothing.
func TestEmpty(t *testing.T) {
	h := newStores(t).page(t)
	for _, path := range []string{"overview", "graph", "workloads", "rollouts", "events", "nodes", "marks", "extent", "traces", "state"} {
		get[any](t, h, path)
	}
	require.False(t, get[overviewAnswer](t, h, "overview").Recorded)
}

// TestReadOnly is about what the page must not offer.
func TestReadOnly(t *testing.T) {
	h := newStores(t).page(t)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch, "PROPFIND"} {
		for _, path := range []string{"/", "/api/polymesh/v1/graph", "/api/v1/query", "/api/v1/write", "/loki/api/v1/push", "/api/v1/admin/tsdb/delete_series"} {
			require.Equal(t, http.StatusMethodNotAllowed, do(h, method, path).Code, "%s %s", method, path)
		}
	}
	for _, path := range []string{"/loki/api/v1/push", "/loki/api/v1/delete", "/api/v1/admin/tsdb/snapshot", "/api/v1/write", "/api/v1/read", "/api/v1/status/config", "/api/v1/status/flags", "/api/polymesh/v1/nothing", "/debug/pprof/"} {
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, path).Code, path)
	}
	for _, path := range []string{"/", "/graph", "/edge/a/b/c/d", "/request/x", "/api/polymesh/v1/state", "/nothing", "/api/nothing"} {
		w := do(h, http.MethodGet, path)
		require.Equal(t, policy, w.Header().Get("Content-Security-Policy"), path)
		require.Equal(t, "nosniff", w.Header().Get("X-Content-Type-Options"))
	}
	require.Equal(t, http.StatusOK, do(h, http.MethodHead, "/graph").Code)
}

// TestParameters sends what no browser of the page does.
func TestParameters(t *testing.T) {
	h := newStores(t).page(t)
	long := strings.Repeat("x", maxNameBytes+1)
	for _, path := range []string{
		"graph?window=forever", "graph?window=1s", "graph?window=10y", "graph?end=-1", "graph?end=99999999999999999999", "graph?ns=" + long, "graph?ns=%ff", "graph?" + strings.Repeat("ns=a&", maxNames+1),
		"edge", "edge?to=x&to-kind=namespace", "request/a", "line", "line?labels=[]&at=1", `line?labels={"job":"pods"}&at=x`, `line?labels={"a%20b":"pods"}&at=1`, "traces?limit=0", "traces?min=x", "traces?min=NaN", "traces?tag=x",
		"rollouts/a/b?started=x",
	} {
		w := do(h, http.MethodGet, "/api/polymesh/v1/"+path)
		require.Equal(t, http.StatusBadRequest, w.Code, "%s: %s", path, w.Body.String())
		require.Contains(t, w.Body.String(), `"error"`)
	}
	// Names that are parts of queries elsewhere.
	for _, name := range []string{`a"} or up{x="`, "a|b", ".*", `\`, "\n", "{{", `"`, "`"} {
		q := url.QueryEscape(name)
		for _, path := range []string{"graph?ns=" + q, "overview?ns=" + q, "workloads?ns=" + q, "marks?ns=" + q, "events?ns=" + q + "&text=" + q, "traces?service=" + q + "&path=" + q} {
			require.Equal(t, http.StatusOK, do(h, http.MethodGet, "/api/polymesh/v1/"+path).Code, path)
		}
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, "/api/polymesh/v1/edge?to="+q+"&from="+q).Code)
		require.Equal(t, http.StatusNotFound, do(h, http.MethodGet, "/api/polymesh/v1/workloads/"+url.PathEscape(name)+"/x").Code)
	}
}
