// Package jaeger implements Jaeger's query service for the spans of tracestore: HTTP with the JSON of its UI, which Grafana and Kiali read, the
// API v3 with OpenTelemetry's JSON, and gRPC's api_v2.
//
// It owns these formats and nothing else. It goes beyond Jaeger in one point: a search may omit the service. Times are returned as they were sent;
// Jaeger shifts spans whose clocks seem to differ, here they get a warning.
package jaeger

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/tracestore"
)

const (
	// lookback is the default time span of a search.
	lookback = 48 * time.Hour
	// defaultLimit is the default number of traces of a search.
	defaultLimit = 100
	// maxIDs is how many traces may be requested by their ids at once.
	maxIDs = 100
	// writeTime is how long a client may take to read a part of an answer, which has up to writeBytes. callTime is the time for all of it.
	writeTime  = 10 * time.Second
	writeBytes = 64 << 10
	callTime   = 2 * time.Minute
)

// Options of the servers.
type Options struct {
	Store *tracestore.Store
	Log   *slog.Logger
}

type server struct {
	Options
}

// New returns the HTTP API, at /api/ and, as some configure their Jaeger, at /jaeger/api/.
func New(o Options) http.Handler {
	s := &server{o}
	api := http.NewServeMux()
	api.HandleFunc("GET /api/services", s.services)
	api.HandleFunc("GET /api/services/{service}/operations", s.operationNames)
	api.HandleFunc("GET /api/operations", s.operations)
	api.HandleFunc("GET /api/traces", s.search)
	api.HandleFunc("GET /api/traces/{id}", s.trace)
	api.HandleFunc("GET /api/dependencies", s.dependencies)
	api.HandleFunc("GET /api/v3/services", s.servicesV3)
	api.HandleFunc("GET /api/v3/operations", s.operationsV3)
	api.HandleFunc("GET /api/v3/traces", s.searchV3)
	api.HandleFunc("GET /api/v3/traces/{id}", s.traceV3)
	api.HandleFunc("GET /api/v3/dependencies", s.dependenciesV3)
	mux := http.NewServeMux()
	mux.Handle("/", api)
	mux.Handle("/jaeger/", http.StripPrefix("/jaeger", api))
	return mux
}

// response is an answer of the UI's API.
type response struct {
	Data   any             `json:"data"`
	Total  int             `json:"total"`
	Limit  int             `json:"limit"`
	Offset int             `json:"offset"`
	Errors []responseError `json:"errors"`
}

type responseError struct {
	Code    int    `json:"code,omitempty"`
	Msg     string `json:"msg"`
	TraceID string `json:"traceID,omitempty"`
}

func (s *server) services(w http.ResponseWriter, req *http.Request) {
	names, err := s.Store.Services(req.Context(), time.Time{}, time.Time{})
	if err != nil {
		s.fail(w, err)
		return
	}
	writeJSON(w, http.StatusOK, response{Data: list(names), Total: len(names)})
}

func (s *server) operationNames(w http.ResponseWriter, req *http.Request) {
	operations, err := s.Store.Operations(req.Context(), req.PathValue("service"), nil, time.Time{}, time.Time{})
	if err != nil {
		s.fail(w, err)
		return
	}
	var names []string
	for _, o := range operations { // sorted by name
		if len(names) == 0 || names[len(names)-1] != o.Name {
			names = append(names, o.Name)
		}
	}
	writeJSON(w, http.StatusOK, response{Data: list(names), Total: len(names)})
}

type operation struct {
	Name     string `json:"name"`
	SpanKind string `json:"spanKind"`
}

func (s *server) operations(w http.ResponseWriter, req *http.Request) {
	all, err := s.listOperations(req.Context(), req.FormValue("service"), req.FormValue("spanKind"))
	if err != nil {
		s.fail(w, err)
		return
	}
	writeJSON(w, http.StatusOK, response{Data: all, Total: len(all)})
}

// listOperations lists a service's operations, of one kind if that is not empty.
func (s *server) listOperations(ctx context.Context, service, kind string) ([]operation, error) {
	if service == "" {
		return nil, fmt.Errorf("%w: the parameter 'service' is required", tracestore.ErrQuery)
	}
	var only *tracestore.Kind
	if kind != "" {
		k, ok := tracestore.ParseKind(strings.ToLower(kind))
		if !ok {
			return nil, fmt.Errorf("%w: %.40q is not a kind of spans", tracestore.ErrQuery, kind)
		}
		only = &k
	}
	operations, err := s.Store.Operations(ctx, service, only, time.Time{}, time.Time{})
	if err != nil {
		return nil, err
	}
	all := make([]operation, 0, len(operations))
	for _, o := range operations {
		all = append(all, operation{o.Name, o.Kind.String()})
	}
	return all, nil
}

func (s *server) trace(w http.ResponseWriter, req *http.Request) {
	t, err := s.Store.Trace(req.Context(), req.PathValue("id"))
	if err != nil {
		s.fail(w, err)
		return
	}
	writeJSON(w, http.StatusOK, response{Data: []trace{traceOf(&t)}})
}

func (s *server) search(w http.ResponseWriter, req *http.Request) {
	if err := req.ParseForm(); err != nil {
		s.fail(w, fmt.Errorf("%w: %w", tracestore.ErrQuery, err))
		return
	}
	out := newStream(w, `{"data":[`)
	var lacking []responseError
	each := func(t tracestore.Trace) bool { return out.add(traceOf(&t)) }
	err := func() error {
		if ids := req.Form["traceID"]; len(ids) > 0 {
			var err error
			lacking, err = s.byID(req.Context(), ids, each)
			return err
		}
		query, err := parseQuery(req.Form, time.Now())
		if err != nil {
			return err
		}
		return s.Store.Walk(req.Context(), query, each)
	}()
	if err != nil {
		if !out.begun {
			s.fail(w, err)
			return
		}
		lacking = append(lacking, responseError{Code: http.StatusInternalServerError, Msg: err.Error()})
	}
	failures, err := json.Marshal(lacking)
	if err != nil {
		failures = []byte("null")
	}
	out.end(`],"total":0,"limit":0,"offset":0,"errors":` + string(failures) + "}\n")
}

// byID calls each for the traces with these ids, and returns which are not there.
func (s *server) byID(ctx context.Context, ids []string, each func(tracestore.Trace) bool) ([]responseError, error) {
	if len(ids) > maxIDs {
		return nil, fmt.Errorf("%w: %d traces are asked for, more than %d", tracestore.ErrQuery, len(ids), maxIDs)
	}
	var lacking []responseError
	for _, id := range ids {
		t, err := s.Store.Trace(ctx, id)
		switch {
		case errors.Is(err, tracestore.ErrNotFound):
			lacking = append(lacking, responseError{Msg: "trace not found", TraceID: id})
		case err != nil:
			return nil, err
		case !each(t):
			return lacking, nil
		}
	}
	return lacking, nil
}

type dependency struct {
	Parent    string `json:"parent"`
	Child     string `json:"child"`
	CallCount uint64 `json:"callCount"`
}

func (s *server) dependencies(w http.ResponseWriter, req *http.Request) {
	end, err := unixTime(req.FormValue("endTs"), time.Millisecond, time.Now())
	if err != nil {
		s.fail(w, err)
		return
	}
	back := 24 * time.Hour
	if text := req.FormValue("lookback"); text != "" {
		millis, err := strconv.ParseInt(text, 10, 64)
		if err != nil || millis < 0 || millis > int64(1<<62/time.Millisecond) {
			s.fail(w, fmt.Errorf("%w: unable to parse param 'lookback': %.40q is not a number of milliseconds", tracestore.ErrQuery, text))
			return
		}
		back = time.Duration(millis) * time.Millisecond
	}
	all, err := s.Store.Dependencies(req.Context(), end.Add(-back), end)
	if err != nil {
		s.fail(w, err)
		return
	}
	service := req.FormValue("service")
	links := []dependency{}
	for _, d := range all {
		if service == "" || d.Parent == service || d.Child == service {
			links = append(links, dependency{d.Parent, d.Child, d.Calls})
		}
	}
	writeJSON(w, http.StatusOK, response{Data: links})
}

// parseQuery reads the parameters of a search. requestID, path, status and order=slowest are ours.
func parseQuery(form url.Values, now time.Time) (tracestore.Query, error) {
	bad := func(name string, err error) (tracestore.Query, error) {
		return tracestore.Query{}, fmt.Errorf("%w: unable to parse param '%s': %w", tracestore.ErrQuery, name, err)
	}
	q := tracestore.Query{
		Service: form.Get("service"), Operation: form.Get("operation"), Limit: defaultLimit, Tags: map[string]string{},
		RequestID: form.Get("requestID"), Path: form.Get("path"), Status: form.Get("status"), Slowest: form.Get("order") == "slowest",
	}
	// The UI sends the start beside "custom" or the time that was chosen in words.
	back := lookback
	if d, err := time.ParseDuration(form.Get("lookback")); err == nil && d > 0 {
		back = d
	}
	var err error
	if q.End, err = unixTime(form.Get("end"), time.Microsecond, now); err != nil {
		return bad("end", err)
	}
	if q.Start, err = unixTime(form.Get("start"), time.Microsecond, now.Add(-back)); err != nil {
		return bad("start", err)
	}
	for name, into := range map[string]*time.Duration{"minDuration": &q.MinDuration, "maxDuration": &q.MaxDuration} {
		if text := form.Get(name); text != "" {
			if *into, err = time.ParseDuration(text); err != nil {
				return bad(name, err)
			}
		}
	}
	if q.MinDuration > 0 && q.MaxDuration > 0 && q.MaxDuration < q.MinDuration {
		return tracestore.Query{}, fmt.Errorf("%w: 'maxDuration' should be greater than 'minDuration'", tracestore.ErrQuery)
	}
	if text := form.Get("limit"); text != "" {
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return bad("limit", err)
		}
		if n < 0 {
			return bad("limit", errors.New("it is less than nothing"))
		}
		q.Limit = cmp.Or(min(int(n), tracestore.MaxTraces), defaultLimit)
	}
	for _, tag := range form["tag"] {
		key, value, ok := strings.Cut(tag, ":")
		if !ok {
			return bad("tag", fmt.Errorf("expecting key:value, received %.40q", tag))
		}
		q.Tags[key] = value
	}
	for _, text := range form["tags"] {
		tags, err := parseTags(text)
		if err != nil {
			return bad("tags", err)
		}
		maps.Copy(q.Tags, tags)
	}
	return q, nil
}

// parseTags parses an object of texts. Unlike Jaeger's, it also accepts numbers and booleans.
func parseTags(text string) (map[string]string, error) {
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &object); err != nil {
		return nil, fmt.Errorf("it is not a JSON object: %w", err)
	}
	tags := make(map[string]string, len(object))
	for key, raw := range object {
		var value string
		if json.Unmarshal(raw, &value) != nil {
			value = string(raw)
		}
		tags[key] = value
	}
	return tags, nil
}

// unixTime reads a number of units since 1970.
func unixTime(text string, unit time.Duration, otherwise time.Time) (time.Time, error) {
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n > int64((1<<63-1)/unit) || n < 0 {
		return time.Time{}, fmt.Errorf("%w: %.40q is not a time since 1970", tracestore.ErrQuery, text)
	}
	return time.Unix(0, n*int64(unit)), nil
}

// fail answers with an error in Jaeger's format.
func (s *server) fail(w http.ResponseWriter, err error) {
	code, message := s.status(err)
	writeJSON(w, code, response{Errors: []responseError{{Code: code, Msg: message}}})
}

func (s *server) status(err error) (int, string) {
	switch {
	case errors.Is(err, tracestore.ErrNotFound):
		return http.StatusNotFound, "trace not found"
	case errors.Is(err, tracestore.ErrQuery):
		return http.StatusBadRequest, err.Error()
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return http.StatusServiceUnavailable, err.Error()
	}
	s.Log.Warn("a question about traces is not answered", "error", err)
	return http.StatusInternalServerError, err.Error()
}

// list is never null in JSON.
func list[T any](in []T) []T { return append([]T{}, in...) }

func writeJSON(w http.ResponseWriter, code int, v any) {
	text, err := json.Marshal(v)
	if err != nil { // our own types marshal
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_ = (&parts{w, time.Now().Add(callTime)}).send(append(text, '\n'))
}

// parts sends an answer to a client that has to read it.
type parts struct {
	http.ResponseWriter
	until time.Time
}

func (p *parts) send(text []byte) error {
	for part := range slices.Chunk(text, writeBytes) {
		deadline := time.Now().Add(writeTime)
		if deadline.After(p.until) {
			deadline = p.until
		}
		// Not every server can set it.
		_ = http.NewResponseController(p.ResponseWriter).SetWriteDeadline(deadline)
		if _, err := p.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// stream writes a list one by one, so that no more than some traces of it are in memory.
type stream struct {
	parts
	before string // the text before the list
	begun  bool
}

func newStream(w http.ResponseWriter, before string) *stream {
	return &stream{parts: parts{w, time.Now().Add(callTime)}, before: before}
}

// add writes an element, and reports whether the client still reads.
func (s *stream) add(v any) bool {
	text, err := json.Marshal(v)
	if err != nil {
		return false
	}
	return s.addText(text)
}

func (s *stream) addText(text []byte) bool {
	separator := ","
	if !s.begun {
		s.begin()
		separator = ""
	}
	return s.send(append([]byte(separator), text...)) == nil
}

func (s *stream) begin() {
	s.begun = true
	s.Header().Set("Content-Type", "application/json")
	s.Header().Set("X-Content-Type-Options", "nosniff")
	_ = s.send([]byte(s.before))
}

func (s *stream) end(after string) {
	if !s.begun {
		s.begin()
	}
	_ = s.send([]byte(after))
}
