package page

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
)

const (
	// chartPoints is about how many points a chart has.
	chartPoints = 120
	// A chart of everything has so many points, from fewestPoints on, that about chartSamples rates are calculated for it.
	chartSamples, fewestPoints = 2_000_000, 20
	// edgeRequests is how many of the last requests an edge shows, edgeLines how many lines of the log are read to find them.
	edgeRequests = 50
	edgeLines    = 5_000
)

// edgeAnswer is everything about the calls of one node to another.
type edgeAnswer struct {
	Start     int64     `json:"start"`
	End       int64     `json:"end"`
	Shortened bool      `json:"shortened"`
	Edge      graphEdge `json:"edge"` // Source and Target are indexes of Nodes
	Nodes     []node    `json:"nodes"`
	// Codes are the responses by code and flags, the most frequent first.
	Codes      []codeCount      `json:"codes"`
	Principals []principalCount `json:"principals"`
	// Rates are requests per second by class of code, Quantiles durations in milliseconds by quantile, Bytes by direction.
	Rates     []line         `json:"rates"`
	Quantiles []line         `json:"quantiles"`
	Bytes     []line         `json:"bytes"`
	Requests  []requestEntry `json:"requests"`
	// Logged says whose access log the requests are from: source, destination, or nothing if neither has one.
	Logged string `json:"logged,omitempty"`
}

type codeCount struct {
	Code     string  `json:"code"`
	GRPC     string  `json:"grpc,omitempty"`
	Flags    string  `json:"flags,omitempty"`
	Meaning  string  `json:"meaning,omitempty"`
	Requests float64 `json:"requests"`
	Failed   bool    `json:"failed"`
}

type principalCount struct {
	Source      string  `json:"source,omitempty"`
	Destination string  `json:"destination,omitempty"`
	Policy      string  `json:"policy"`
	Count       float64 `json:"count"` // requests and connections
}

// requestEntry is a request as a proxy logged it.
type requestEntry struct {
	Time      int64  `json:"time"` // Unix milliseconds
	Namespace string `json:"namespace"`
	Workload  string `json:"workload"`
	Pod       string `json:"pod"`
	accessLine
}

// edge answers with what one workload sent to another. Parameters: end, window, from-ns, from, to-ns, to, to-kind (workload, service or external).
func (s *server) edge(r *http.Request) (any, error) {
	requested, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	from, to := nodeKey{Kind: aWorkload}, nodeKey{Kind: aWorkload}
	for parameter, value := range map[string]*string{"from-ns": &from.Namespace, "from": &from.Name, "to-ns": &to.Namespace, "to": &to.Name} {
		if *value, err = nameOf(r, parameter); err != nil {
			return nil, err
		}
	}
	if from.Name == "" {
		from = nodeKey{Kind: anUnknown}
	}
	switch kind := nodeKind(r.URL.Query().Get("to-kind")); kind {
	case "", aWorkload:
	case aService, anExternal:
		to.Kind = kind
	default:
		return nil, invalid("to-kind must be workload, service or external")
	}
	if to.Name == "" {
		return nil, invalid("to is empty")
	}
	ctx := r.Context()
	p, err := s.recorded(ctx, requested)
	if err != nil {
		return nil, err
	}
	// All calls of the caller: those that reached a workload show where the failed ones were going.
	all, err := s.traffic(ctx, p, callerMatchers(from)...)
	if err != nil {
		return nil, err
	}
	c := all.edges[[2]nodeKey{from, to}]
	if c == nil {
		return nil, missing("no calls of this pair were recorded from %s to %s", p.start.UTC().Format(time.RFC3339), p.end.UTC().Format(time.RFC3339))
	}
	alone := &reducedGraph{graphOfCalls: *newGraphOfCalls(), of: map[nodeKey]nodeKey{from: from, to: to}, calls: 1}
	alone.edges[[2]nodeKey{from, to}] = c
	alone.nodes[from], alone.nodes[to] = all.nodes[from], all.nodes[to]
	q := edgeQuery{s: s, p: p, from: from, to: to, all: all}
	_, q.reporter = c.requests()
	if q.reporter == "" {
		_, q.reporter = c.streams()
	}
	a := &edgeAnswer{Start: p.start.UnixMilli(), End: p.end.UnixMilli(), Shortened: p.start.After(requested.start)}
	if err := q.addTo(ctx, a, alone); err != nil {
		return nil, err
	}
	problems, err := s.unready(ctx, p.end)
	if err != nil {
		return nil, err
	}
	weights, err := s.weights(ctx, p.end)
	if err != nil {
		return nil, err
	}
	var edges []graphEdge
	a.Nodes, edges = alone.answer(p.window().Seconds(), problems, weights)
	a.Edge = edges[0]
	a.Requests, a.Logged, err = s.lastRequests(ctx, p, from, to, all.nodes[to])
	return a, err
}

// callerMatchers select the calls of a node.
func callerMatchers(from nodeKey) []string {
	if from.Kind == anUnknown {
		return []string{oneOf("source_workload", "unknown", "")}
	}
	return []string{is("source_workload", from.Name), is("source_workload_namespace", from.Namespace)}
}

type edgeQuery struct {
	s        *server
	p        period
	from, to nodeKey
	reporter string
	all      *graphOfCalls
}

// selectors returns selectors of a metric for the edge, which have no series in common: the calls that reached the workload, and those that were for
// a service that only this workload serves, and did not.
func (q *edgeQuery) selectors(metric string, more ...string) []string {
	matchers := append(callerMatchers(q.from), append([]string{ofProxies}, more...)...)
	with := func(more ...string) string { return selector(metric, append(slices.Clone(matchers), more...)...) }
	unserved := oneOf("destination_workload", "unknown", "")
	switch q.to.Kind {
	case aWorkload:
		list := []string{with(is("destination_workload", q.to.Name), is("destination_workload_namespace", q.to.Namespace))}
		for service, behind := range q.all.serving {
			if len(behind) == 1 && behind[q.to] {
				list = append(list, with(unserved, is("destination_service_name", service[1]), is("destination_service_namespace", service[0])))
			}
		}
		slices.Sort(list[1:])
		return list
	case aService:
		return []string{with(unserved, is("destination_service_name", q.to.Name), is("destination_service_namespace", q.to.Namespace))}
	}
	return []string{
		with(unserved, is("destination_service_name", q.to.Name), oneOf("destination_service_namespace", "unknown", "")),
		with(unserved, oneOf("destination_service_name", "unknown", ""), is("destination_service", q.to.Name)),
	}
}

// expression applies a function to each selector, and joins the results.
func (q *edgeQuery) expression(metric string, apply func(string) string, more ...string) string {
	var parts []string
	for _, selected := range q.selectors(metric, more...) {
		parts = append(parts, apply(selected))
	}
	return "(" + strings.Join(parts, " or ") + ")"
}

func (q *edgeQuery) addTo(ctx context.Context, a *edgeAnswer, drawn *reducedGraph) error {
	grown := func(selected string) string { return q.s.grown(selected, q.p.window()) }
	step := q.p.step(chartPoints)
	rate := func(selected string) string {
		return "rate(" + selected + "[" + duration(max(4*step, time.Minute)) + "])"
	}
	own := is("reporter", q.reporter)

	var err error
	if a.Codes, err = q.codes(ctx); err != nil {
		return err
	}

	// Who called is only known to the called side.
	a.Principals = []principalCount{}
	for _, metric := range []string{"istio_requests_total", "istio_tcp_connections_opened_total"} {
		principals, err := q.s.instant(ctx, "sum by (source_principal, destination_principal, connection_security_policy) ("+q.expression(metric, grown, is("reporter", "destination"))+") > 0", q.p.end)
		if err != nil {
			return err
		}
		for _, sample := range principals {
			m := sample.Metric
			a.Principals = append(a.Principals, principalCount{
				Source: principal(m.Get("source_principal")), Destination: principal(m.Get("destination_principal")),
				Policy: m.Get("connection_security_policy"), Count: sample.F,
			})
		}
	}

	buckets, err := q.s.instant(ctx, "sum by ("+pairLabels+", le) ("+q.expression("istio_request_duration_milliseconds_bucket", grown, own)+")", q.p.end)
	if err != nil {
		return err
	}
	for _, sample := range buckets {
		q.all.observe(drawn, sample)
	}

	if a.Rates, err = q.s.over(ctx, byClass(q.expression("istio_requests_total", rate, own)), q.p, step); err != nil {
		return err
	}
	if a.Quantiles, err = q.s.quantiles(ctx, q.expression("istio_request_duration_milliseconds_bucket", rate, own), q.p, step); err != nil {
		return err
	}
	a.Bytes = []line{}
	for _, of := range []struct{ direction, http, tcp string }{
		{"sent", "istio_request_bytes_sum", "istio_tcp_received_bytes_total"},
		{"received", "istio_response_bytes_sum", "istio_tcp_sent_bytes_total"},
	} {
		lines, err := q.s.over(ctx, "sum("+q.expression(of.http, rate, own)+" or "+q.expression(of.tcp, rate, own)+")", q.p, step)
		if err != nil {
			return err
		}
		for _, l := range lines {
			l.Labels = map[string]string{"direction": of.direction}
			a.Bytes = append(a.Bytes, l)
		}
	}
	return nil
}

// codes returns the responses by code and flags, the most frequent first.
func (q *edgeQuery) codes(ctx context.Context) ([]codeCount, error) {
	grown := func(selected string) string { return q.s.grown(selected, q.p.window()) }
	vector, err := q.s.instant(ctx, "sum by (response_code, response_flags, grpc_response_status) ("+q.expression("istio_requests_total", grown, is("reporter", q.reporter))+") > 0", q.p.end)
	if err != nil {
		return nil, err
	}
	codes := []codeCount{}
	for _, sample := range vector {
		m := sample.Metric
		c := codeCount{Code: m.Get("response_code"), GRPC: m.Get("grpc_response_status"), Flags: m.Get("response_flags"), Requests: sample.F}
		if c.Flags == "-" {
			c.Flags = ""
		}
		c.Meaning = flagMeaning(c.Flags)
		c.Failed = outcomeOf(c.Code, c.GRPC) == failed
		codes = append(codes, c)
	}
	slices.SortFunc(codes, func(x, y codeCount) int {
		return cmp.Or(cmp.Compare(y.Requests, x.Requests), cmp.Compare(x.Code, y.Code), cmp.Compare(x.Flags, y.Flags))
	})
	return codes, nil
}

// principal leaves out what Istio writes for a caller without a certificate.
func principal(name string) string {
	if !known(name) {
		return ""
	}
	return name
}

// lastRequests returns the last requests of one node to another from the access log of the caller's proxy or, if it has none, of the called one.
func (s *server) lastRequests(ctx context.Context, p period, from, to nodeKey, target *nodeFacts) (list []requestEntry, logged string, err error) {
	list = []requestEntry{}
	services := sortedKeys(target.services)
	if to.Kind != aWorkload {
		services = []string{to.Name}
	}
	read := func(of nodeKey, filters []logstore.Filter, wanted func(*accessLine) bool) error {
		lines := 0
		return s.Logs.Select(ctx, logstore.Selector{
			Matchers: []logstore.Matcher{equal("job", "pods"), equal("namespace", of.Namespace), equal("workload", of.Name), equal("container", "istio-proxy")},
			Filters:  filters,
			Start:    p.start, End: p.end, Limit: edgeLines, Newest: true,
		}, func(e logstore.Entry) bool {
			lines++
			if a, ok := parseAccessLine(e.Line); ok && wanted(&a) && !a.probe() {
				list = append(list, requestOf(e, a))
			}
			return len(list) < edgeRequests
		})
	}
	if from.Kind == aWorkload {
		err = read(from, []logstore.Filter{{Text: "outbound"}}, func(a *accessLine) bool {
			return a.Direction == "outbound" && slices.ContainsFunc(services, func(service string) bool { return serves(a, service, to) })
		})
		if err != nil || len(list) > 0 {
			return list, "source", err
		}
	}
	if to.Kind != aWorkload {
		return list, "", nil
	}
	// The called side does not log the caller: its requests are only this caller's if there is no other caller. They are shown with that remark.
	err = read(to, []logstore.Filter{{Text: "inbound"}}, func(a *accessLine) bool { return a.Direction == "inbound" })
	if len(list) == 0 {
		return list, "", err
	}
	return list, "destination", err
}

// serves reports whether an outbound request was for a service of a node.
func serves(a *accessLine, service string, to nodeKey) bool {
	if to.Kind == anExternal || to.Namespace == "" {
		return a.Service == service
	}
	return a.Service == service || strings.HasPrefix(a.Service, service+"."+to.Namespace+".")
}

func requestOf(e logstore.Entry, a accessLine) requestEntry {
	return requestEntry{Time: e.Time.UnixMilli(), Namespace: label(e, "namespace"), Workload: label(e, "workload"), Pod: label(e, "pod"), accessLine: a}
}
