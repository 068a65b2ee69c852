package page

import (
	"cmp"
	"context"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/promql"
)

// Limits of a drawing. Above drawnNodes the namespaces become boxes, but those that are opened; above mostNodes the rest of an opened namespace is
// one node. A table has room for tableNodes.
const (
	drawnNodes = 60
	mostNodes  = 150
	tableNodes = 3000
	// timedEdges is up to how many edges the latency is read for. A histogram has twenty times as many series as its counter.
	timedEdges = 600
)

// nodeKind is what a node of the graph stands for.
type nodeKind string

const (
	aWorkload  nodeKind = "workload"
	aService   nodeKind = "service"   // requests for it reached no workload
	anExternal nodeKind = "external"  // a host outside of the cluster
	anUnknown  nodeKind = "unknown"   // a caller without a sidecar
	aNamespace nodeKind = "namespace" // all workloads of one
	theRest    nodeKind = "rest"      // workloads, or namespaces, for which there is no room
)

// nodeKey identifies a node. The names are those of the metrics: anything.
type nodeKey struct {
	Kind      nodeKind `json:"kind"`
	Namespace string   `json:"namespace,omitempty"`
	Name      string   `json:"name"`
}

func (k nodeKey) compare(o nodeKey) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name), cmp.Compare(k.Kind, o.Kind))
}

// node is a node as the browser gets it. Rates are per second.
type node struct {
	nodeKey
	// Members is how many workloads a box stands for.
	Members   int      `json:"members,omitempty"`
	Services  []string `json:"services,omitempty"`
	In        float64  `json:"in"`
	InErrors  float64  `json:"inErrors"`
	Out       float64  `json:"out"`
	OutErrors float64  `json:"outErrors"`
	// NoRoute is the part of In that the proxy answered with 404, because it had no route: such requests reached no other node.
	NoRoute float64 `json:"noRoute,omitempty"`
	// Problem is a sentence if pods of it are not ready.
	Problem string `json:"problem,omitempty"`
}

// graphEdge is what one node sent to another one. Rates are per second, durations in milliseconds.
type graphEdge struct {
	Source    int      `json:"source"` // index in the nodes
	Target    int      `json:"target"`
	Protocols []string `json:"protocols"`
	Requests  float64  `json:"requests"` // in the window
	Rate      float64  `json:"rate"`
	Errors    float64  `json:"errors"`
	// Rejected are responses with 4xx: the caller's mistake, so not an error.
	Rejected float64  `json:"rejected"`
	P50      *float64 `json:"p50,omitempty"`
	P95      *float64 `json:"p95,omitempty"`
	P99      *float64 `json:"p99,omitempty"`
	TCP      *tcp     `json:"tcp,omitempty"`
	Security string   `json:"security"` // mtls, plain, mixed, unknown
	// Reporter is the source of the numbers: the caller's sidecar if there is one, because it knows requests that never arrived.
	Reporter string `json:"reporter"`
	// Weight is the share in percent of a rollout that is under way, with the target as canary or as what it replaces.
	Weight *int `json:"weight,omitempty"`
}

// tcp is the traffic of connections that no one parses, in bytes and connections per second, as the caller sees it.
type tcp struct {
	Sent        float64 `json:"sent"`
	Received    float64 `json:"received"`
	Connections float64 `json:"connections"`
}

// namespaceCount is a row of the namespace filter.
type namespaceCount struct {
	Name      string  `json:"name"`
	Workloads int     `json:"workloads"`
	Rate      float64 `json:"rate"`
	Errors    float64 `json:"errors"`
	Box       bool    `json:"box"` // it is drawn as one box
}

// graphAnswer is the graph of a period.
type graphAnswer struct {
	Start int64 `json:"start"` // of what was measured: the store may be younger than the window
	End   int64 `json:"end"`
	// Shortened means that the start is later than requested.
	Shortened  bool             `json:"shortened"`
	Nodes      []node           `json:"nodes"`
	Edges      []graphEdge      `json:"edges"`
	Namespaces []namespaceCount `json:"namespaces"`
	// Workloads and Calls are how many there are without filters and boxes.
	Workloads int `json:"workloads"`
	Calls     int `json:"calls"`
	// Untimed means that there were too many edges to read their latency.
	Untimed bool `json:"untimed,omitempty"`
}

// graph answers with the calls between workloads in a period. Parameters: end, window; ns (repeated: these namespaces and what they call or are
// called by), open (repeated: not as a box), errors=1 (only calls that fail), focus-ns and focus (one workload and its neighbors), table=1.
func (s *server) graph(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	var view graphView
	if view.namespaces, err = namesOf(r, "ns"); err != nil {
		return nil, err
	}
	if view.open, err = namesOf(r, "open"); err != nil {
		return nil, err
	}
	if view.focus.Name, err = nameOf(r, "focus"); err != nil {
		return nil, err
	}
	if view.focus.Namespace, err = nameOf(r, "focus-ns"); err != nil {
		return nil, err
	}
	view.focus.Kind = aWorkload
	view.failing = r.URL.Query().Get("errors") == "1"
	view.drawn, view.most = drawnNodes, mostNodes
	if r.URL.Query().Get("table") == "1" {
		view.drawn, view.most = tableNodes, tableNodes
	}
	return s.graphOf(r.Context(), p, view)
}

func (s *server) graphOf(ctx context.Context, requested period, view graphView) (*graphAnswer, error) {
	p, err := s.recorded(ctx, requested)
	if err != nil {
		return nil, err
	}
	all, err := s.traffic(ctx, p)
	if err != nil {
		return nil, err
	}
	drawn := all.reduce(view)
	answer := &graphAnswer{
		Start: p.start.UnixMilli(), End: p.end.UnixMilli(), Shortened: p.start.After(requested.start),
		Namespaces: all.namespaces(drawn), Workloads: len(all.nodes), Calls: len(all.edges),
	}
	answer.Untimed = drawn.calls > timedEdges
	if drawn.calls > 0 && !answer.Untimed {
		if err := s.addLatency(ctx, p, view, all, drawn); err != nil {
			return nil, err
		}
	}
	problems, err := s.unready(ctx, p.end)
	if err != nil {
		return nil, err
	}
	weights, err := s.weights(ctx, p.end)
	if err != nil {
		return nil, err
	}
	answer.Nodes, answer.Edges = drawn.answer(p.window().Seconds(), problems, weights)
	return answer, nil
}

// The labels by which calls are told apart.
const (
	pairLabels    = "reporter, source_workload, source_workload_namespace, destination_workload, destination_workload_namespace, destination_service, destination_service_name, destination_service_namespace"
	requestLabels = pairLabels + ", request_protocol, response_code, grpc_response_status, connection_security_policy"
)

// traffic reads all calls of a period.
func (s *server) traffic(ctx context.Context, p period, matchers ...string) (*graphOfCalls, error) {
	g := newGraphOfCalls()
	sum := func(by, metric string) (promql.Vector, error) {
		return s.instant(ctx, "sum by ("+by+") ("+s.grown(selector(metric, append([]string{ofProxies, matches("reporter", strings.Join(reporters[:], "|"))}, matchers...)...), p.window())+") > 0", p.end)
	}
	requests, err := sum(requestLabels, "istio_requests_total")
	if err != nil {
		return nil, err
	}
	connections := map[string]promql.Vector{}
	for _, metric := range []string{"istio_tcp_connections_opened_total", "istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"} {
		if connections[metric], err = sum(pairLabels+", connection_security_policy", metric); err != nil {
			return nil, err
		}
		g.learn(connections[metric])
	}
	g.learn(requests)
	for _, sample := range requests {
		g.addRequests(sample)
	}
	for metric, vector := range connections {
		for _, sample := range vector {
			g.addConnections(metric, sample)
		}
	}
	return g, nil
}

// graphOfCalls are calls between nodes.
type graphOfCalls struct {
	// serving has the workloads that were seen behind a service. Requests that reached no workload only have the service.
	serving map[[2]string]map[nodeKey]bool
	nodes   map[nodeKey]*nodeFacts
	edges   map[[2]nodeKey]*call
}

type nodeFacts struct {
	services map[string]bool
	answered float64          // requests that its proxy answered itself: redirects, and those without a route
	noRoute  float64          // of these, those without a route
	members  map[nodeKey]bool // of a box
}

// call is one edge, as each reporter counted it.
type call struct {
	by       map[string]*counts // by reporter
	security map[string]float64 // connections or requests by policy, as the called side counted them
	protocol map[string]bool
	buckets  map[float64]float64 // of the durations, by upper bound, as the best reporter counted them
}

type counts struct {
	requests, errors, rejected float64
	http                       bool
	connections                float64
	sent, received             float64
	tcp                        bool
}

func newGraphOfCalls() *graphOfCalls {
	return &graphOfCalls{serving: map[[2]string]map[nodeKey]bool{}, nodes: map[nodeKey]*nodeFacts{}, edges: map[[2]nodeKey]*call{}}
}

// known reports whether a label of Istio names something. Istio writes "unknown" for what it does not know.
func known(name string) bool { return name != "" && name != "unknown" }

// learn records which workloads are behind which service.
func (g *graphOfCalls) learn(vector promql.Vector) {
	for _, sample := range vector {
		m := sample.Metric
		if name := m.Get("destination_workload"); known(name) {
			service := [2]string{m.Get("destination_service_namespace"), m.Get("destination_service_name")}
			if g.serving[service] == nil {
				g.serving[service] = map[nodeKey]bool{}
			}
			g.serving[service][nodeKey{aWorkload, m.Get("destination_workload_namespace"), name}] = true
		}
	}
}

// ends returns the two nodes of a sample.
func (g *graphOfCalls) ends(m interface{ Get(string) string }) (from, to nodeKey) {
	from = nodeKey{Kind: anUnknown}
	if name := m.Get("source_workload"); known(name) {
		from = nodeKey{aWorkload, m.Get("source_workload_namespace"), name}
	}
	service, namespace := m.Get("destination_service_name"), m.Get("destination_service_namespace")
	switch name := m.Get("destination_workload"); {
	case known(name):
		to = nodeKey{aWorkload, m.Get("destination_workload_namespace"), name}
	case !known(service):
		host := m.Get("destination_service")
		if !known(host) {
			host = "unknown"
		}
		to = nodeKey{Kind: anExternal, Name: host}
	case !known(namespace):
		to = nodeKey{Kind: anExternal, Name: service}
	default:
		to = nodeKey{aService, namespace, service}
		// The requests that failed on the way belong to those that did not, if it is clear where they were going.
		if behind := g.serving[[2]string{namespace, service}]; len(behind) == 1 {
			for only := range behind {
				to = only
			}
		}
	}
	return from, to
}

// answeredByProxy reports whether a proxy answered a request itself: it names nothing to which it would have sent it. That is a request
// without a route (404), or a redirect.
func answeredByProxy(m interface{ Get(string) string }) bool {
	return m.Get("reporter") == "source" && known(m.Get("source_workload")) &&
		!known(m.Get("destination_workload")) && !known(m.Get("destination_service_name")) && !known(m.Get("destination_service"))
}

func (g *graphOfCalls) node(k nodeKey) *nodeFacts {
	n := g.nodes[k]
	if n == nil {
		n = &nodeFacts{services: map[string]bool{}, members: map[nodeKey]bool{}}
		g.nodes[k] = n
	}
	return n
}

func (g *graphOfCalls) edge(from, to nodeKey) *call {
	c := g.edges[[2]nodeKey{from, to}]
	if c == nil {
		g.node(from)
		g.node(to)
		c = newCall()
		g.edges[[2]nodeKey{from, to}] = c
	}
	return c
}

func newCall() *call {
	return &call{by: map[string]*counts{}, security: map[string]float64{}, protocol: map[string]bool{}, buckets: map[float64]float64{}}
}

func (c *call) of(reporter string) *counts {
	n := c.by[reporter]
	if n == nil {
		n = &counts{}
		c.by[reporter] = n
	}
	return n
}

func (g *graphOfCalls) addRequests(sample promql.Sample) {
	m := sample.Metric
	from, to := g.ends(m)
	if answeredByProxy(m) {
		g.node(from).answered += sample.F
		if m.Get("response_code") == "404" {
			g.node(from).noRoute += sample.F
		}
		return
	}
	e := g.edge(from, to)
	if service := m.Get("destination_service_name"); known(service) {
		g.node(to).services[service] = true
	}
	n := e.of(m.Get("reporter"))
	n.http = true
	n.requests += sample.F
	switch outcomeOf(m.Get("response_code"), m.Get("grpc_response_status")) {
	case failed:
		n.errors += sample.F
	case rejected:
		n.rejected += sample.F
	}
	if p := m.Get("request_protocol"); known(p) {
		e.protocol[p] = true
	}
	if m.Get("reporter") == "destination" {
		e.security[m.Get("connection_security_policy")] += sample.F
	}
}

func (g *graphOfCalls) addConnections(metric string, sample promql.Sample) {
	m := sample.Metric
	from, to := g.ends(m)
	e := g.edge(from, to)
	if service := m.Get("destination_service_name"); known(service) {
		g.node(to).services[service] = true
	}
	e.protocol["tcp"] = true
	n := e.of(m.Get("reporter"))
	n.tcp = true
	switch metric {
	case "istio_tcp_connections_opened_total":
		n.connections += sample.F
	// Istio counts from the called side: what it received is what the caller sent.
	case "istio_tcp_received_bytes_total":
		n.sent += sample.F
	case "istio_tcp_sent_bytes_total":
		n.received += sample.F
	}
	if m.Get("reporter") == "destination" {
		e.security[m.Get("connection_security_policy")] += sample.F
	}
}

// outcome is how a request ended.
type outcome int

const (
	succeeded outcome = iota
	rejected
	failed
)

// outcomeOf returns how a request with these labels ended, by the rule of `polymesh rollout`: 5xx, no response at all, and gRPC's UNKNOWN,
// DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and DATA_LOSS.
func outcomeOf(code, grpc string) outcome {
	switch grpc {
	case "2", "4", "12", "13", "14", "15":
		return failed
	}
	switch {
	case code == "" || code == "0" || strings.HasPrefix(code, "5"):
		return failed
	case strings.HasPrefix(code, "4"):
		return rejected
	}
	return succeeded
}

// reporters lists the trusted reporters, the best first. Only one is used for an edge, as each request is counted by both sides.
var reporters = [...]string{"source", "waypoint", "destination"}

// best returns the counts of the first reporter that has any of a kind.
func (c *call) best(has func(*counts) bool) (counts, string) {
	for _, reporter := range reporters {
		if n := c.by[reporter]; n != nil && has(n) {
			return *n, reporter
		}
	}
	return counts{}, ""
}

func (c *call) requests() (counts, string) { return c.best(func(n *counts) bool { return n.http }) }
func (c *call) streams() (counts, string)  { return c.best(func(n *counts) bool { return n.tcp }) }

// securityOf summarizes the policies that the called side saw. A caller's sidecar always reports unknown.
func (c *call) securityOf() string {
	mutual, plain := c.security["mutual_tls"], c.security["none"]
	switch {
	case mutual > 0 && plain > 0:
		return "mixed"
	case mutual > 0:
		return "mtls"
	case plain > 0:
		return "plain"
	}
	return "unknown"
}

// add adds the calls of another edge, when both are drawn as one. Each comes with the numbers of its own best reporter.
func (c *call) add(o *call) {
	n := c.of(reporters[0])
	requests, _ := o.requests()
	n.http = n.http || requests.http
	n.requests += requests.requests
	n.errors += requests.errors
	n.rejected += requests.rejected
	streams, _ := o.streams()
	n.tcp = n.tcp || streams.tcp
	n.connections += streams.connections
	n.sent += streams.sent
	n.received += streams.received
	for policy, v := range o.security {
		c.security[policy] += v
	}
	for p := range o.protocol {
		c.protocol[p] = true
	}
}

// volume orders nodes by importance: failures first.
func (c *call) volume() float64 {
	requests, _ := c.requests()
	streams, _ := c.streams()
	return requests.requests + 100*requests.errors + streams.connections + (streams.sent+streams.received)/1e4
}

// graphView selects the part of a graph that is drawn.
type graphView struct {
	namespaces  []string // only these, and their neighbors; all if empty
	open        []string // not as a box
	focus       nodeKey  // only it and its neighbors, if it has a name
	failing     bool
	drawn, most int
}

// reducedGraph is a graph in which several nodes may have become one.
type reducedGraph struct {
	graphOfCalls
	of    map[nodeKey]nodeKey // the drawn node of each node
	boxes map[string]bool     // the namespaces that are one box
	calls int                 // how many edges it stands for
}

// reduce returns the part of the graph that is drawn: first what was asked for, then, if that is too much, namespaces as boxes, then the busiest.
func (g *graphOfCalls) reduce(view graphView) *reducedGraph {
	kept := map[[2]nodeKey]*call{}
	nodes := map[nodeKey]bool{}
	for ends, c := range g.edges {
		inside := len(view.namespaces) == 0 || slices.Contains(view.namespaces, ends[0].Namespace) || slices.Contains(view.namespaces, ends[1].Namespace)
		near := view.focus.Name == "" || ends[0] == view.focus || ends[1] == view.focus
		requests, _ := c.requests()
		if inside && near && (!view.failing || requests.errors > 0) {
			kept[ends] = c
			nodes[ends[0]], nodes[ends[1]] = true, true
		}
	}
	for k, facts := range g.nodes {
		inside := len(view.namespaces) == 0 || slices.Contains(view.namespaces, k.Namespace)
		if facts.answered > 0 && inside && !view.failing && (view.focus.Name == "" || k == view.focus) {
			nodes[k] = true // also one that called no other
		}
	}
	r := &reducedGraph{graphOfCalls: *newGraphOfCalls(), of: map[nodeKey]nodeKey{}, boxes: map[string]bool{}}
	open := func(namespace string) bool {
		return slices.Contains(view.open, namespace) || slices.Contains(view.namespaces, namespace)
	}
	for k := range nodes {
		r.of[k] = k
		if len(nodes) > view.drawn && k.Namespace != "" && !open(k.Namespace) {
			r.of[k] = nodeKey{aNamespace, k.Namespace, k.Namespace}
			r.boxes[k.Namespace] = true
		}
	}
	// What is still too much becomes one node for each namespace, and one for all boxes.
	volume := map[nodeKey]float64{}
	for ends, c := range kept {
		for _, end := range ends {
			volume[r.of[end]] += c.volume()
		}
	}
	if len(volume) > view.most {
		order := make([]nodeKey, 0, len(volume))
		for k := range volume {
			order = append(order, k)
		}
		slices.SortFunc(order, func(a, b nodeKey) int { return cmp.Or(cmp.Compare(volume[b], volume[a]), a.compare(b)) })
		rest := map[nodeKey]bool{}
		for _, k := range order[view.most:] {
			rest[k] = true
		}
		for k, to := range r.of {
			switch {
			case !rest[to]:
			case to.Kind == aNamespace || to.Namespace == "" || !open(to.Namespace):
				r.of[k] = nodeKey{Kind: theRest}
			default:
				r.of[k] = nodeKey{Kind: theRest, Namespace: to.Namespace}
			}
		}
	}
	for k := range nodes {
		to := r.of[k]
		n := r.node(to)
		n.members[k] = true
		n.answered += g.nodes[k].answered
		n.noRoute += g.nodes[k].noRoute
		if to == k {
			for service := range g.nodes[k].services {
				n.services[service] = true
			}
		}
	}
	r.calls = len(kept)
	for ends, c := range kept {
		from, to := r.of[ends[0]], r.of[ends[1]]
		if from == ends[0] && to == ends[1] {
			r.edges[ends] = c
			continue
		}
		if from == to {
			continue // within a box
		}
		r.edge(from, to).add(c)
	}
	return r
}

// namespaces lists all namespaces for the filter.
func (g *graphOfCalls) namespaces(drawn *reducedGraph) []namespaceCount {
	byName := map[string]*namespaceCount{}
	for k := range g.nodes {
		if k.Namespace == "" {
			continue
		}
		n := byName[k.Namespace]
		if n == nil {
			n = &namespaceCount{Name: k.Namespace, Box: drawn.boxes[k.Namespace]}
			byName[k.Namespace] = n
		}
		n.Workloads++
	}
	for ends, c := range g.edges {
		if n := byName[ends[1].Namespace]; n != nil {
			requests, _ := c.requests()
			n.Rate += requests.requests
			n.Errors += requests.errors
		}
	}
	list := make([]namespaceCount, 0, len(byName))
	for _, n := range byName {
		list = append(list, *n)
	}
	slices.SortFunc(list, func(a, b namespaceCount) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// addLatency adds the histograms of the drawn edges. Buckets that have not grown are read too: they are the lower bound of the next one.
func (s *server) addLatency(ctx context.Context, p period, view graphView, all *graphOfCalls, drawn *reducedGraph) error {
	for _, matchers := range view.matchers() {
		selected := selector("istio_request_duration_milliseconds_bucket", append(matchers, ofProxies)...)
		vector, err := s.instant(ctx, "sum by ("+pairLabels+", le) ("+s.grown(selected, p.window())+")", p.end)
		if err != nil {
			return err
		}
		for _, sample := range vector {
			all.observe(drawn, sample)
		}
	}
	return nil
}

// matchers returns selectors for what can be drawn, which have no series in common.
func (v graphView) matchers() [][]string {
	namespaces := v.namespaces
	if v.focus.Name != "" {
		namespaces = []string{v.focus.Namespace}
	}
	if len(namespaces) == 0 {
		return [][]string{nil}
	}
	from := oneOf("source_workload_namespace", namespaces...)
	return [][]string{
		{from},
		{strings.Replace(from, "=~", "!~", 1), oneOf("destination_service_namespace", namespaces...)},
	}
}

// observe adds a bucket of a histogram to the drawn edge, if it is of the reporter whose numbers are those of the edge.
func (g *graphOfCalls) observe(drawn *reducedGraph, sample promql.Sample) {
	from, to := g.ends(sample.Metric)
	e := g.edges[[2]nodeKey{from, to}]
	if e == nil {
		return
	}
	shown := drawn.edges[[2]nodeKey{drawn.of[from], drawn.of[to]}]
	_, reporter := e.requests()
	bound, err := strconv.ParseFloat(sample.Metric.Get("le"), 64)
	if err != nil || shown == nil || sample.Metric.Get("reporter") != reporter {
		return
	}
	shown.buckets[bound] += sample.F
}

// quantile returns a percentile of the durations in milliseconds, nothing if there are none.
func (c *call) quantile(q float64) *float64 { return percentile(q, c.buckets) }

// percentile returns a percentile of a histogram, nothing if it is empty. Buckets are cumulative, by their upper bound.
func percentile(q float64, histogram map[float64]float64) *float64 {
	if len(histogram) == 0 {
		return nil
	}
	buckets := make(promql.Buckets, 0, len(histogram))
	for bound, n := range histogram {
		buckets = append(buckets, promql.Bucket{UpperBound: bound, Count: n})
	}
	value, _, _, _, _, _ := promql.BucketQuantile(q, buckets)
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return nil
	}
	return &value
}

// answer returns nodes and edges in a stable order.
func (r *reducedGraph) answer(seconds float64, problems map[nodeKey]string, weights map[nodeKey]int) ([]node, []graphEdge) {
	keys := make([]nodeKey, 0, len(r.nodes))
	for k := range r.nodes {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, nodeKey.compare)
	index := make(map[nodeKey]int, len(keys))
	nodes := make([]node, len(keys))
	for i, k := range keys {
		index[k] = i
		facts := r.nodes[k]
		nodes[i] = node{nodeKey: k, Services: sortedKeys(facts.services), Problem: problems[k], In: facts.answered / seconds, NoRoute: facts.noRoute / seconds}
		if k.Kind == aNamespace || k.Kind == theRest {
			nodes[i].Members = len(facts.members)
			bad := 0
			for member := range facts.members {
				if problems[member] != "" {
					bad++
				}
			}
			if bad > 0 {
				nodes[i].Problem = plural(bad, "workload is not ready", "workloads are not ready")
			}
		}
	}
	edges := make([]graphEdge, 0, len(r.edges))
	for ends, c := range r.edges {
		requests, reporter := c.requests()
		streams, streamReporter := c.streams()
		e := graphEdge{
			Source: index[ends[0]], Target: index[ends[1]], Protocols: sortedKeys(c.protocol),
			Requests: requests.requests, Rate: requests.requests / seconds, Errors: requests.errors / seconds, Rejected: requests.rejected / seconds,
			Security: c.securityOf(), Reporter: cmp.Or(reporter, streamReporter),
		}
		e.P50, e.P95, e.P99 = c.quantile(0.5), c.quantile(0.95), c.quantile(0.99)
		if streams.tcp {
			e.TCP = &tcp{Sent: streams.sent / seconds, Received: streams.received / seconds, Connections: streams.connections / seconds}
		}
		if weight, ok := weights[ends[1]]; ok {
			e.Weight = &weight
		}
		edges = append(edges, e)
		nodes[e.Source].Out += e.Rate
		nodes[e.Source].OutErrors += e.Errors
		nodes[e.Target].In += e.Rate
		nodes[e.Target].InErrors += e.Errors
	}
	slices.SortFunc(edges, func(a, b graphEdge) int {
		return cmp.Or(cmp.Compare(a.Source, b.Source), cmp.Compare(a.Target, b.Target))
	})
	return nodes, edges
}

func sortedKeys(set map[string]bool) []string {
	keys := make([]string, 0, len(set))
	for k := range set {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// weights returns the share in percent of each workload of a rollout that is under way.
func (s *server) weights(ctx context.Context, at time.Time) (map[nodeKey]int, error) {
	rollouts, err := s.latestRollouts(ctx, at)
	if err != nil {
		return nil, err
	}
	weights := map[nodeKey]int{}
	for _, r := range rollouts {
		if r.Phase == "Running" || r.Phase == "Promoting" {
			weights[nodeKey{aWorkload, r.Namespace, r.Name + "-canary"}] = r.Weight
			weights[nodeKey{aWorkload, r.Namespace, r.Name}] = 100 - r.Weight
		}
	}
	return weights, nil
}
