package page

import (
	"fmt"
	"slices"
	"strconv"
	"testing"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/stretchr/testify/require"
)

// requestSample is a sum of istio_requests_total.
func requestSample(reporter, fromNS, from, toNS, to, service, code string, n float64) promql.Sample {
	policy := "mutual_tls"
	if reporter == "source" {
		policy = "unknown"
	}
	return promql.Sample{F: n, Metric: labels.FromStrings(
		"reporter", reporter, "source_workload_namespace", fromNS, "source_workload", from, "destination_workload_namespace", toNS, "destination_workload", to,
		"destination_service_namespace", toNS, "destination_service_name", service, "destination_service", service+"."+toNS+".svc.cluster.local",
		"request_protocol", "http", "response_code", code, "connection_security_policy", policy,
	)}
}

func graphFrom(samples ...promql.Sample) *graphOfCalls {
	g := newGraphOfCalls()
	g.learn(samples)
	for _, s := range samples {
		g.addRequests(s)
	}
	return g
}

// lost is a request that reached no workload.
func lost(fromNS, from, toNS, service string, n float64) promql.Sample {
	s := requestSample("source", fromNS, from, toNS, "unknown", service, "503", n)
	b := labels.NewBuilder(s.Metric)
	b.Set("destination_workload_namespace", "unknown")
	return promql.Sample{F: n, Metric: b.Labels()}
}

func TestNeverBothReporters(t *testing.T) {
	g := graphFrom(
		requestSample("source", "a", "web", "a", "api", "api", "200", 100),
		requestSample("destination", "a", "web", "a", "api", "api", "200", 99),
	)
	c := g.edges[[2]nodeKey{{aWorkload, "a", "web"}, {aWorkload, "a", "api"}}]
	n, reporter := c.requests()
	require.Equal(t, "source", reporter)
	require.Equal(t, 100.0, n.requests)
	require.Equal(t, "mtls", c.securityOf())
}

func TestRequestsThatReachedNoOne(t *testing.T) {
	web, api, canary := nodeKey{aWorkload, "a", "web"}, nodeKey{aWorkload, "a", "api"}, nodeKey{aWorkload, "a", "api-canary"}
	good := requestSample("source", "a", "web", "a", "api", "api", "200", 100)
	// One workload serves the service: they were for it.
	g := graphFrom(good, lost("a", "web", "a", "api", 5))
	require.Len(t, g.edges, 1)
	n, _ := g.edges[[2]nodeKey{web, api}].requests()
	require.Equal(t, 105.0, n.requests)
	require.Equal(t, 5.0, n.errors)
	// Two do: no one knows which one they were for.
	g = graphFrom(good, requestSample("source", "a", "web", "a", "api-canary", "api", "200", 10), lost("a", "web", "a", "api", 5))
	require.Contains(t, g.edges, [2]nodeKey{web, canary})
	n, _ = g.edges[[2]nodeKey{web, {aService, "a", "api"}}].requests()
	require.Equal(t, 5.0, n.errors)
	// A service of the same name in another namespace is another one.
	g = graphFrom(good, lost("a", "web", "b", "api", 5))
	require.Contains(t, g.edges, [2]nodeKey{web, {aService, "b", "api"}})
}

// A request for which a gateway has no route reaches no one: it is the gateway's own, and not one to a host outside of the cluster.
func TestRequestsWithoutARoute(t *testing.T) {
	gateway := nodeKey{aWorkload, "istio-system", "gateway"}
	b := labels.NewBuilder(requestSample("source", "istio-system", "gateway", "unknown", "unknown", "unknown", "404", 0).Metric)
	none := promql.Sample{F: 30, Metric: b.Set("destination_service", "unknown").Labels()}
	redirect := promql.Sample{F: 20, Metric: b.Set("response_code", "301").Labels()}
	g := graphFrom(redirect)
	nodes, _ := g.reduce(graphView{drawn: drawnNodes, most: mostNodes}).answer(10, nil, nil)
	require.Len(t, nodes, 1)
	require.Equal(t, 2.0, nodes[0].In)
	require.Zero(t, nodes[0].NoRoute, "a redirect is a route")
	a := &overviewAnswer{}
	a.addUnrouted(graphFrom(redirect, none), nil)
	require.Len(t, a.Statements, 1)
	require.Equal(t, "30 requests to gateway ended with 404 in its own proxy: no route has their host and path.", a.Statements[0].Text)
	require.Equal(t, note, a.Statements[0].Level)
	a = &overviewAnswer{}
	a.addUnrouted(graphFrom(redirect), nil)
	a.addUnrouted(graphFrom(none), []string{"other"})
	require.Empty(t, a.Statements)
	for what, samples := range map[string][]promql.Sample{
		"only such":  {none},
		"and others": {none, requestSample("source", "istio-system", "gateway", "a", "web", "web", "200", 60)},
	} {
		t.Run(what, func(t *testing.T) {
			g := graphFrom(samples...)
			require.Len(t, g.edges, len(samples)-1)
			drawn := g.reduce(graphView{drawn: drawnNodes, most: mostNodes})
			nodes, edges := drawn.answer(10, nil, nil)
			require.Len(t, nodes, len(samples))
			require.Len(t, edges, len(samples)-1)
			i := slices.IndexFunc(nodes, func(n node) bool { return n.nodeKey == gateway })
			require.Equal(t, 3.0, nodes[i].NoRoute)
			require.Equal(t, 3.0, nodes[i].In)
			require.Zero(t, nodes[i].InErrors)
			// Filters apply to it, too.
			nodes, _ = g.reduce(graphView{namespaces: []string{"other"}, drawn: drawnNodes, most: mostNodes}).answer(10, nil, nil)
			require.Empty(t, nodes)
			nodes, _ = g.reduce(graphView{failing: true, drawn: drawnNodes, most: mostNodes}).answer(10, nil, nil)
			require.Empty(t, nodes)
		})
	}
	// Where it went is known: to a host outside.
	outside := promql.Sample{F: 1, Metric: b.Set("destination_service", "example.com").Labels()}
	require.Contains(t, graphFrom(outside).edges, [2]nodeKey{gateway, {Kind: anExternal, Name: "example.com"}})
}

func TestOutcome(t *testing.T) {
	for _, row := range []struct {
		code, grpc string
		want       outcome
	}{
		{"200", "", succeeded}, {"200", "0", succeeded}, {"301", "", succeeded}, {"404", "", rejected}, {"429", "", rejected}, {"500", "", failed}, {"0", "", failed}, {"", "", failed},
		{"200", "14", failed}, {"200", "5", succeeded}, {"200", "13", failed}, {"200", "7", succeeded},
	} {
		require.Equal(t, row.want, outcomeOf(row.code, row.grpc), "%s %s", row.code, row.grpc)
	}
}

// thousand are the calls of 1,000 workloads in 40 namespaces.
func thousand() []promql.Sample {
	name := func(i int) (string, string) { return "team-" + strconv.Itoa(i%40), "service-" + strconv.Itoa(i) }
	var samples []promql.Sample
	for i := range 1000 {
		for j := 1; j <= 3; j++ {
			fromNS, from := name(i)
			toNS, to := name((i*7 + j*131) % 1000)
			for _, reporter := range []string{"source", "destination"} {
				samples = append(samples,
					requestSample(reporter, fromNS, from, toNS, to, to, "200", float64(100+i)),
					requestSample(reporter, fromNS, from, toNS, to, to, "503", float64(i%5)),
				)
			}
		}
	}
	return samples
}

func TestThousandServices(t *testing.T) {
	g := graphFrom(thousand()...)
	require.Len(t, g.nodes, 1000)

	r := g.reduce(graphView{drawn: drawnNodes, most: mostNodes})
	require.Len(t, r.nodes, 40, "a box for each namespace")
	nodes, edges := r.answer(900, nil, nil)
	requests := 0.0
	for _, e := range edges {
		require.NotEqual(t, e.Source, e.Target)
		requests += e.Requests
	}
	require.Equal(t, 25, nodes[0].Members)
	// Between namespaces nothing is lost, and nothing is counted twice.
	want := 0.0
	for ends, c := range g.edges {
		if ends[0].Namespace != ends[1].Namespace {
			n, _ := c.requests()
			want += n.requests
		}
	}
	require.InDelta(t, want, requests, 1)

	// An opened namespace shows its workloads, the others stay boxes.
	r = g.reduce(graphView{open: []string{"team-3"}, drawn: drawnNodes, most: mostNodes})
	require.Len(t, r.nodes, 39+25)
	// With all opened there is a limit, and the rest is counted.
	all := make([]string, 40)
	for i := range all {
		all[i] = "team-" + strconv.Itoa(i)
	}
	r = g.reduce(graphView{open: all, drawn: drawnNodes, most: mostNodes})
	require.LessOrEqual(t, len(r.nodes), mostNodes+40)
	members := 0
	for _, n := range r.nodes {
		members += len(n.members)
	}
	require.Equal(t, 1000, members)
	// Only one namespace and its neighbors.
	r = g.reduce(graphView{namespaces: []string{"team-3"}, drawn: drawnNodes, most: mostNodes})
	for ends := range r.edges {
		require.True(t, ends[0].Namespace == "team-3" || ends[1].Namespace == "team-3")
	}
	// A table has them all.
	r = g.reduce(graphView{drawn: tableNodes, most: tableNodes})
	require.Len(t, r.nodes, 1000)
	require.Equal(t, len(g.edges), r.calls)

	counts := g.namespaces(r)
	require.Len(t, counts, 40)
	require.True(t, slices.IsSortedFunc(counts, func(a, b namespaceCount) int { return len(a.Name) - len(b.Name) }) || counts[0].Name < counts[1].Name)
}

func BenchmarkThousandServices(b *testing.B) {
	samples := thousand()
	for b.Loop() {
		graphFrom(samples...).reduce(graphView{drawn: drawnNodes, most: mostNodes}).answer(900, nil, nil)
	}
}

func TestHostileNames(t *testing.T) {
	// Names with what others use as separators stay apart.
	g := graphFrom(
		requestSample("source", "a", "b/c", "x", "y", "y", "200", 1),
		requestSample("source", "a/b", "c", "x", "y", "y", "200", 1),
		requestSample("source", "a", "unknown", "x", "y", "y", "200", 1),
	)
	require.Len(t, g.nodes, 4)
	require.Len(t, g.edges, 3)
	require.Equal(t, "/edge/a%2Fb/%22%3E%3Cscript/-/%3F%23", edgeRoute(nodeKey{aWorkload, "a/b", `"><script`}, nodeKey{anExternal, "", "?#"})[:len("/edge/a%2Fb/%22%3E%3Cscript/-/%3F%23")])
	for _, value := range []string{`"`, `\`, "\n", "}", "`", "\xff"} {
		require.Equal(t, "a="+strconv.Quote(value), is("a", value))
	}
	require.Equal(t, fmt.Sprintf("a=~%q", `x\.y|\(`), oneOf("a", "x.y", "("))
}
