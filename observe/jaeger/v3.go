package jaeger

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/ptrace"

	"polymesh.dev/polymesh/observe/tracestore"
)

// errorV3 is the API v3's format of an error.
type errorV3 struct {
	Error struct {
		HTTPCode int    `json:"httpCode"`
		Message  string `json:"message"`
	} `json:"error"`
}

func (s *server) failV3(w http.ResponseWriter, err error) {
	var e errorV3
	e.Error.HTTPCode, e.Error.Message = s.status(err)
	writeJSON(w, e.Error.HTTPCode, e)
}

func (s *server) servicesV3(w http.ResponseWriter, req *http.Request) {
	names, err := s.Store.Services(req.Context(), time.Time{}, time.Time{})
	if err != nil {
		s.failV3(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"services": list(names)})
}

func (s *server) operationsV3(w http.ResponseWriter, req *http.Request) {
	query := req.URL.Query()
	all, err := s.listOperations(req.Context(), query.Get("service"), parameter(query, "span_kind"))
	if err != nil {
		s.failV3(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"operations": all})
}

func (s *server) dependenciesV3(w http.ResponseWriter, req *http.Request) {
	query := req.URL.Query()
	start, err := instant(query, "start_time")
	if err != nil {
		s.failV3(w, err)
		return
	}
	end, err := instant(query, "end_time")
	if err != nil {
		s.failV3(w, err)
		return
	}
	all, err := s.Store.Dependencies(req.Context(), start, end)
	if err != nil {
		s.failV3(w, err)
		return
	}
	type dependencyV3 struct {
		Parent    string `json:"parent"`
		Child     string `json:"child"`
		CallCount uint64 `json:"callCount,string"`
	}
	links := []dependencyV3{}
	for _, d := range all {
		links = append(links, dependencyV3{d.Parent, d.Child, d.Calls})
	}
	writeJSON(w, http.StatusOK, map[string]any{"dependencies": links})
}

func (s *server) traceV3(w http.ResponseWriter, req *http.Request) {
	t, err := s.Store.Trace(req.Context(), req.PathValue("id"))
	if err != nil {
		s.failV3(w, err)
		return
	}
	out := newStream(w, beforeV3)
	resources, err := resourceSpans(&t)
	if err != nil {
		s.failV3(w, err)
		return
	}
	out.addText(resources)
	out.end(afterV3)
}

// A result is a list of resources with their spans.
const (
	beforeV3 = `{"result":{"resourceSpans":[`
	afterV3  = "]}}\n"
)

func (s *server) searchV3(w http.ResponseWriter, req *http.Request) {
	query, err := parseQueryV3(req.URL.Query(), time.Now())
	if err != nil {
		s.failV3(w, err)
		return
	}
	out := newStream(w, beforeV3)
	err = s.Store.Walk(req.Context(), query, func(t tracestore.Trace) bool {
		resources, err := resourceSpans(&t)
		return err == nil && out.addText(resources)
	})
	switch {
	case out.begun:
		// An error after the start truncates the answer, which has no field for it.
		out.end(afterV3)
	case err != nil:
		s.failV3(w, err)
	default:
		var e errorV3
		e.Error.HTTPCode, e.Error.Message = http.StatusNotFound, "No traces found"
		writeJSON(w, http.StatusNotFound, e)
	}
}

// parameter returns a parameter of a request, under its own name or in camel case: there are clients of both kinds.
func parameter(query url.Values, name string) string {
	if text := query.Get(name); text != "" {
		return text
	}
	words := strings.Split(name, "_")
	for i := 1; i < len(words); i++ {
		words[i] = strings.ToUpper(words[i][:1]) + words[i][1:]
	}
	return query.Get(strings.Join(words, ""))
}

func instant(query url.Values, name string) (time.Time, error) {
	text := parameter(query, name)
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: malformed parameter %s: %w", tracestore.ErrQuery, name, err)
	}
	return t, nil
}

func parseQueryV3(query url.Values, now time.Time) (tracestore.Query, error) {
	bad := func(name string, err error) (tracestore.Query, error) {
		return tracestore.Query{}, fmt.Errorf("%w: malformed parameter %s: %w", tracestore.ErrQuery, name, err)
	}
	q := tracestore.Query{Service: parameter(query, "query.service_name"), Operation: parameter(query, "query.operation_name"), Limit: defaultLimit}
	var err error
	if q.Start, err = instant(query, "query.start_time_min"); err != nil {
		return q, err
	}
	if q.Start.IsZero() {
		q.Start = now.Add(-lookback)
	}
	if q.End, err = instant(query, "query.start_time_max"); err != nil {
		return q, err
	}
	for name, into := range map[string]*time.Duration{"query.duration_min": &q.MinDuration, "query.duration_max": &q.MaxDuration} {
		if text := parameter(query, name); text != "" {
			if *into, err = time.ParseDuration(text); err != nil {
				return bad(name, err)
			}
		}
	}
	for _, name := range []string{"query.num_traces", "query.search_depth"} {
		if text := parameter(query, name); text != "" {
			n, err := strconv.ParseUint(text, 10, 31)
			if err != nil {
				return bad(name, err)
			}
			if n > 0 {
				q.Limit = min(int(n), tracestore.MaxTraces)
			}
		}
	}
	if text := parameter(query, "query.attributes"); text != "" {
		if q.Tags, err = parseTags(text); err != nil {
			return bad("query.attributes", err)
		}
	}
	return q, nil
}

// resourceSpans is the elements of OpenTelemetry's list resourceSpans for a trace.
func resourceSpans(t *tracestore.Trace) ([]byte, error) {
	text, err := (&ptrace.JSONMarshaler{}).MarshalTraces(otlp(t))
	if err != nil {
		return nil, fmt.Errorf("writing trace %s: %w", t.ID, err)
	}
	inner, ok := bytes.CutPrefix(text, []byte(`{"resourceSpans":[`))
	inner, end := bytes.CutSuffix(inner, []byte("]}"))
	if !ok || !end {
		return nil, fmt.Errorf("writing trace %s: the library's JSON is not a list of resources", t.ID)
	}
	return inner, nil
}

// otlp is a trace in OpenTelemetry's form.
func otlp(t *tracestore.Trace) ptrace.Traces {
	out := ptrace.NewTraces()
	type place struct{ resource, scope string }
	known := map[place]ptrace.SpanSlice{}
	resources := map[string]ptrace.ResourceSpans{}
	for i := range t.Spans {
		s := &t.Spans[i]
		key := place{fmt.Sprintf("%q %q", s.Service, s.Resource), fmt.Sprintf("%q", s.Scope)}
		spans, ok := known[key]
		if !ok {
			resource, ok := resources[key.resource]
			if !ok {
				resource = out.ResourceSpans().AppendEmpty()
				resource.Resource().Attributes().PutStr("service.name", s.Service)
				put(resource.Resource().Attributes(), s.Resource)
				resources[key.resource] = resource
			}
			scope := resource.ScopeSpans().AppendEmpty()
			scope.Scope().SetName(s.Scope.Name)
			scope.Scope().SetVersion(s.Scope.Version)
			put(scope.Scope().Attributes(), s.Scope.Attributes)
			spans = scope.Spans()
			known[key] = spans
		}
		fill(spans.AppendEmpty(), s)
	}
	return out
}

func fill(out ptrace.Span, s *tracestore.Span) {
	out.SetTraceID(traceID(s.TraceID))
	out.SetSpanID(spanID(s.SpanID))
	out.SetParentSpanID(spanID(s.ParentID))
	out.SetName(s.Name)
	out.SetKind(ptrace.SpanKind(s.Kind))
	out.SetStartTimestamp(pcommon.NewTimestampFromTime(s.Start))
	out.SetEndTimestamp(pcommon.NewTimestampFromTime(s.Start.Add(s.Duration)))
	out.TraceState().FromRaw(s.TraceState)
	out.SetFlags(s.Flags)
	out.Status().SetCode(ptrace.StatusCode(s.Status))
	out.Status().SetMessage(s.StatusMessage)
	put(out.Attributes(), s.Attributes)
	if len(s.Warnings) > 0 {
		warnings := out.Attributes().PutEmptySlice("@jaeger@warnings")
		for _, w := range s.Warnings {
			warnings.AppendEmpty().SetStr(w)
		}
	}
	for _, e := range s.Events {
		event := out.Events().AppendEmpty()
		event.SetName(e.Name)
		event.SetTimestamp(pcommon.NewTimestampFromTime(e.Time))
		put(event.Attributes(), e.Attributes)
	}
	for _, l := range s.Links {
		link := out.Links().AppendEmpty()
		link.SetTraceID(traceID(l.TraceID))
		link.SetSpanID(spanID(l.SpanID))
		link.TraceState().FromRaw(l.TraceState)
		put(link.Attributes(), l.Attributes)
	}
}

func traceID(text string) (id pcommon.TraceID) {
	b, _ := hex.DecodeString(text)
	copy(id[:], b)
	return id
}

func spanID(text string) (id pcommon.SpanID) {
	b, _ := hex.DecodeString(text)
	copy(id[:], b)
	return id
}

func put(out pcommon.Map, attributes []tracestore.Attribute) {
	for _, a := range attributes {
		setValue(out.PutEmpty(a.Key), a.Value)
	}
}

// setValue sets a value of its type. A value that cannot be parsed becomes a text.
func setValue(out pcommon.Value, v tracestore.Value) {
	out.SetStr(v.Text)
	switch v.Type {
	case tracestore.Bool:
		out.SetBool(v.Text == "true")
	case tracestore.Int:
		if n, err := strconv.ParseInt(v.Text, 10, 64); err == nil {
			out.SetInt(n)
		}
	case tracestore.Float:
		if f, err := strconv.ParseFloat(v.Text, 64); err == nil {
			out.SetDouble(f)
		}
	case tracestore.Bytes:
		if b, err := base64.StdEncoding.DecodeString(v.Text); err == nil {
			out.SetEmptyBytes().FromRaw(b)
		}
	case tracestore.JSON:
		decoder := json.NewDecoder(strings.NewReader(v.Text))
		decoder.UseNumber()
		var raw any
		if decoder.Decode(&raw) == nil {
			setAny(out, raw)
		}
	}
}

// setAny sets what was decoded from JSON. It is as deep as package receive let it be.
func setAny(out pcommon.Value, raw any) {
	switch one := raw.(type) {
	case string:
		out.SetStr(one)
	case bool:
		out.SetBool(one)
	case json.Number:
		if n, err := one.Int64(); err == nil {
			out.SetInt(n)
		} else if f, err := one.Float64(); err == nil {
			out.SetDouble(f)
		}
	case []any:
		list := out.SetEmptySlice()
		list.EnsureCapacity(len(one))
		for _, e := range one {
			setAny(list.AppendEmpty(), e)
		}
	case map[string]any:
		object := out.SetEmptyMap()
		keys := make([]string, 0, len(one))
		for key := range one {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for _, key := range keys {
			setAny(object.PutEmpty(key), one[key])
		}
	default:
		out.FromRaw(nil)
	}
}
