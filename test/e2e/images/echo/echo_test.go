package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

func TestEcho(t *testing.T) {
	request := httptest.NewRequest(http.MethodPut, "/a/b?c=d", strings.NewReader("text"))
	request.Header.Set("X-Test", "1")
	recorder := httptest.NewRecorder()
	newServer().handler().ServeHTTP(recorder, request)
	var got reply
	if err := json.Unmarshal(recorder.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Method != http.MethodPut || got.Path != "/a/b?c=d" || got.Body != "text" || got.Headers["X-Test"][0] != "1" {
		t.Errorf("got %+v", got)
	}
}

func TestPaths(t *testing.T) {
	handler := newServer().handler()
	file := filepath.Join(t.TempDir(), "f")
	for _, step := range []struct {
		method, target, body string
		status               int
		answer               string
	}{
		{http.MethodGet, "/healthz", "", http.StatusOK, "ok"},
		{http.MethodGet, "/fail", "", http.StatusOK, "NOT_SERVING"},
		{http.MethodGet, "/healthz", "", http.StatusServiceUnavailable, "failing"},
		{http.MethodGet, "/ok", "", http.StatusOK, "SERVING"},
		{http.MethodGet, "/healthz", "", http.StatusOK, "ok"},
		{http.MethodGet, "/alloc?mb=1", "", http.StatusOK, "took 1 MiB"},
		{http.MethodGet, "/alloc?mb=x", "", http.StatusBadRequest, "mb must be a number"},
		{http.MethodGet, "/exit", "", http.StatusBadRequest, "code must be a number"},
		{http.MethodGet, "/file?path=" + file, "", http.StatusNotFound, "no such file"},
		{http.MethodPost, "/file?path=" + file, "written", http.StatusOK, ""},
		{http.MethodGet, "/file?path=" + file, "", http.StatusOK, "written"},
		{http.MethodGet, "/any?status=503", "", http.StatusServiceUnavailable, `"path":"/any?status=503"`},
		{http.MethodGet, "/any?status=1", "", http.StatusBadRequest, "status must be a number"},
		{http.MethodGet, "/any?delay=x", "", http.StatusBadRequest, "delay must be a duration"},
		{http.MethodGet, "/any?delay=1ms", "", http.StatusOK, `"path":"/any?delay=1ms"`},
		{http.MethodGet, "/any?status=503&id=a", "", http.StatusBadRequest, "an id needs first"},
		{http.MethodGet, "/any?status=503&first=1&id=a", "", http.StatusServiceUnavailable, `"attempt":1`},
		{http.MethodGet, "/any?status=503&first=1&id=a", "", http.StatusOK, `"attempt":2`},
		{http.MethodGet, "/set?status=500&delay=1ms", "", http.StatusOK, "answers 500 after 1ms"},
		{http.MethodGet, "/any", "", http.StatusInternalServerError, `"path":"/any"`},
		{http.MethodGet, "/healthz", "", http.StatusOK, "ok"},
		{http.MethodGet, "/set", "", http.StatusOK, "answers 200 after 0s"},
		{http.MethodGet, "/any", "", http.StatusOK, `"path":"/any"`},
	} {
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, httptest.NewRequest(step.method, step.target, strings.NewReader(step.body)))
		if recorder.Code != step.status || !strings.Contains(recorder.Body.String(), step.answer) {
			t.Errorf("%s %s: got %d %q, want %d %q", step.method, step.target, recorder.Code, recorder.Body, step.status, step.answer)
		}
	}
}

// Who calls on behalf of a request passes on its trace, and nothing else of it.
func TestCall(t *testing.T) {
	next := httptest.NewServer(newServer().handler())
	defer next.Close()
	request := httptest.NewRequest(http.MethodGet, "/call?url="+next.URL+"/next", nil)
	for _, name := range append(traceHeaders, "authorization") {
		request.Header.Set(name, "v-"+name)
	}
	recorder := httptest.NewRecorder()
	newServer().handler().ServeHTTP(recorder, request)
	var first, second reply
	if err := json.Unmarshal(recorder.Body.Bytes(), &first); err != nil {
		t.Fatalf("%v: %s", err, recorder.Body)
	}
	if err := json.Unmarshal(first.Called, &second); err != nil || second.Path != "/next" {
		t.Fatalf("called %+v, %v", second, err)
	}
	for _, name := range traceHeaders {
		if got := http.Header(second.Headers).Get(name); got != "v-"+name {
			t.Errorf("%s arrived as %q", name, got)
		}
	}
	if got := http.Header(second.Headers).Get("authorization"); got != "" {
		t.Errorf("passed on authorization: %s", got)
	}
	recorder = httptest.NewRecorder()
	newServer().handler().ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/call?url="+next.URL+"/?status=503", nil))
	if recorder.Code != http.StatusBadGateway {
		t.Errorf("a failure behind it came as %d %s", recorder.Code, recorder.Body)
	}
}
