package page

import (
	"cmp"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/tracestore"
)

// spanView is a bar of the waterfall: a span, or a request as a proxy logged it if there are no spans.
type spanView struct {
	ID      string `json:"id"`
	Parent  string `json:"parent,omitempty"`
	TraceID string `json:"traceId,omitempty"`
	// Service is the name that the sender chose; Namespace, Workload and Pod are known for proxies and for apps that say so.
	Service    string       `json:"service"`
	Namespace  string       `json:"namespace,omitempty"`
	Pod        string       `json:"pod,omitempty"`
	Name       string       `json:"name"`
	Kind       string       `json:"kind,omitempty"`
	Proxy      bool         `json:"proxy"`
	Start      int64        `json:"start"`    // Unix microseconds
	Duration   int64        `json:"duration"` // microseconds
	Error      bool         `json:"error,omitempty"`
	Message    string       `json:"message,omitempty"`
	Attributes []namedValue `json:"attributes,omitempty"`
	Resource   []namedValue `json:"resource,omitempty"`
	Events     []spanEvent  `json:"events,omitempty"`
	Warnings   []string     `json:"warnings,omitempty"`
}

type namedValue struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type spanEvent struct {
	Time       int64        `json:"time"` // Unix microseconds
	Name       string       `json:"name"`
	Attributes []namedValue `json:"attributes,omitempty"`
}

func attribute(list []tracestore.Attribute, names ...string) string {
	for _, name := range names {
		for _, a := range list {
			if a.Key == name {
				return a.Value.Text
			}
		}
	}
	return ""
}

func namedValues(list []tracestore.Attribute) []namedValue {
	values := make([]namedValue, len(list))
	for i, a := range list {
		values[i] = namedValue{a.Key, a.Value.Text}
	}
	return values
}

func viewSpan(s *tracestore.Span) spanView {
	v := spanView{
		ID: s.SpanID, Parent: s.ParentID, TraceID: s.TraceID, Service: s.Service, Name: s.Name, Kind: s.Kind.String(),
		Start: s.Start.UnixMicro(), Duration: s.Duration.Microseconds(), Message: s.StatusMessage,
		Attributes: namedValues(s.Attributes), Resource: namedValues(s.Resource), Warnings: s.Warnings,
		Proxy:     attribute(s.Attributes, "component") == "proxy",
		Error:     failedSpan(s),
		Namespace: attribute(s.Resource, "k8s.namespace.name", "service.namespace"),
		Pod:       attribute(s.Resource, "k8s.pod.name"),
	}
	// A proxy's name is sidecar~10.42.0.7~api-5d9c.shop~shop.svc.cluster.local.
	if parts := strings.Split(attribute(s.Attributes, "node_id"), "~"); len(parts) == 4 {
		if i := strings.LastIndexByte(parts[2], '.'); i > 0 {
			v.Pod, v.Namespace, v.Proxy = parts[2][:i], parts[2][i+1:], true
		}
	}
	for _, e := range s.Events {
		v.Events = append(v.Events, spanEvent{e.Time.UnixMicro(), e.Name, namedValues(e.Attributes)})
	}
	return v
}

// failedSpan reports whether a span is an error. Envoy's tag error=true is stored as its status; a client also sets it for 4xx.
func failedSpan(s *tracestore.Span) bool {
	if s.Status == tracestore.StatusError {
		return true
	}
	code := attribute(s.Attributes, tracestore.StatusKeys...)
	return code != "" && outcomeOf(code, "") == failed
}

// traceSummary is a row of the search.
type traceSummary struct {
	ID        string         `json:"id"`
	RequestID string         `json:"requestId,omitempty"`
	Start     int64          `json:"start"`    // Unix microseconds
	Duration  int64          `json:"duration"` // microseconds
	Service   string         `json:"service"`  // of the first span
	Name      string         `json:"name"`
	Method    string         `json:"method,omitempty"`
	Path      string         `json:"path,omitempty"`
	Code      string         `json:"code,omitempty"`
	Spans     int            `json:"spans"`
	Errors    int            `json:"errors"`
	Services  []serviceCount `json:"services"`
}

type serviceCount struct {
	Name   string `json:"name"`
	Spans  int    `json:"spans"`
	Errors int    `json:"errors"`
}

func summarize(t *tracestore.Trace) traceSummary {
	sum := traceSummary{ID: t.ID, Start: t.Start().UnixMicro(), Duration: t.Duration().Microseconds(), Spans: len(t.Spans), Services: []serviceCount{}}
	index := map[string]int{}
	for i := range t.Spans {
		s := &t.Spans[i]
		at, ok := index[s.Service]
		if !ok {
			at = len(sum.Services)
			index[s.Service] = at
			sum.Services = append(sum.Services, serviceCount{Name: s.Service})
		}
		sum.Services[at].Spans++
		if failedSpan(s) {
			sum.Errors++
			sum.Services[at].Errors++
		}
		sum.RequestID = cmp.Or(sum.RequestID, attribute(s.Attributes, tracestore.RequestIDKeys...))
		sum.Method = cmp.Or(sum.Method, attribute(s.Attributes, "http.request.method", "http.method"))
		sum.Code = cmp.Or(sum.Code, attribute(s.Attributes, tracestore.StatusKeys...))
		if sum.Path == "" {
			sum.Path = pathOfURL(attribute(s.Attributes, tracestore.PathKeys...))
		}
	}
	if len(t.Spans) > 0 {
		root := &t.Spans[0]
		for i := range t.Spans {
			if t.Spans[i].ParentID == "" {
				root = &t.Spans[i]
				break
			}
		}
		sum.Service, sum.Name = root.Service, root.Name
	}
	slices.SortFunc(sum.Services, func(a, b serviceCount) int { return cmp.Or(cmp.Compare(b.Spans, a.Spans), cmp.Compare(a.Name, b.Name)) })
	return sum
}

// pathOfURL returns the path of a URL, or what it was given if that is a path.
func pathOfURL(text string) string {
	if _, rest, ok := strings.Cut(text, "://"); ok {
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			return rest[i:]
		}
		return "/"
	}
	return text
}

// traces searches. Parameters: end, window; service, operation, path, status (error, 503, 5xx), tag (repeated, name=value), min and max (milliseconds),
// slowest=1, limit. All are optional.
func (s *server) traces(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	q := tracestore.Query{Start: p.start, End: p.end, Slowest: r.URL.Query().Get("slowest") == "1"}
	for parameter, value := range map[string]*string{
		"service": &q.Service, "operation": &q.Operation, "path": &q.Path, "status": &q.Status, "request": &q.RequestID,
	} {
		if *value, err = nameOf(r, parameter); err != nil {
			return nil, err
		}
	}
	tags, err := namesOf(r, "tag")
	if err != nil {
		return nil, err
	}
	for _, tag := range tags {
		name, value, ok := strings.Cut(tag, "=")
		if !ok {
			return nil, invalid("a tag is name=value")
		}
		if q.Tags == nil {
			q.Tags = map[string]string{}
		}
		q.Tags[name] = value
	}
	if q.Limit, err = numberOf(r, "limit", 50, 1, 500); err != nil {
		return nil, err
	}
	for parameter, value := range map[string]*time.Duration{"min": &q.MinDuration, "max": &q.MaxDuration} {
		if text := r.URL.Query().Get(parameter); text != "" {
			ms, err := strconv.ParseFloat(text, 64)
			if err != nil || !(ms >= 0 && ms < 1e9) {
				return nil, invalid("%s must be a number of milliseconds", parameter)
			}
			*value = time.Duration(ms * float64(time.Millisecond))
		}
	}
	found, err := s.Traces.Find(r.Context(), q)
	if errors.Is(err, tracestore.ErrQuery) {
		return nil, invalid("%s", err)
	}
	if err != nil {
		return nil, err
	}
	services, err := s.Traces.Services(r.Context(), p.start, p.end)
	if err != nil {
		return nil, err
	}
	answer := struct {
		Start    int64          `json:"start"`
		End      int64          `json:"end"`
		Traces   []traceSummary `json:"traces"`
		Services []string       `json:"services"`
	}{p.start.UnixMilli(), p.end.UnixMilli(), make([]traceSummary, len(found)), services}
	for i := range found {
		answer.Traces[i] = summarize(&found[i])
	}
	return answer, nil
}

// trace answers with the spans of a trace.
func (s *server) trace(r *http.Request) (any, error) {
	id, err := pathOf(r, "id")
	if err != nil {
		return nil, err
	}
	t, err := s.Traces.Trace(r.Context(), id)
	switch {
	case errors.Is(err, tracestore.ErrNotFound):
		return nil, missing("no span of trace %q was recorded", id)
	case errors.Is(err, tracestore.ErrQuery):
		return nil, invalid("%s", err)
	case err != nil:
		return nil, err
	}
	answer := struct {
		traceSummary
		Bars       []spanView `json:"bars"`
		Incomplete string     `json:"incomplete,omitempty"`
	}{summarize(&t), make([]spanView, len(t.Spans)), t.Incomplete}
	for i := range t.Spans {
		answer.Bars[i] = viewSpan(&t.Spans[i])
	}
	return answer, nil
}
