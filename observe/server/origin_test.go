package server

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSameOrigin(t *testing.T) {
	h := sameOrigin(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	const navigates, document = "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"
	for _, tc := range []struct {
		request string
		headers []string
		status  int
	}{
		{"GET /api/v1/query", nil, http.StatusOK},
		{"POST /api/v1/query", []string{"Sec-Fetch-Site: same-origin", "Origin: http://kiali:20001"}, http.StatusOK},
		{"GET /graph", []string{"Sec-Fetch-Site: none", navigates, document}, http.StatusOK},
		{"GET /graph", []string{"Sec-Fetch-Site: cross-site", navigates, document}, http.StatusOK}, // a link
		{"GET /graph", []string{"Sec-Fetch-Site: cross-site", navigates, "Sec-Fetch-Dest: iframe"}, http.StatusForbidden},
		{"GET /graph", []string{"Sec-Fetch-Site: cross-site"}, http.StatusForbidden},
		{"POST /graph", []string{"Sec-Fetch-Site: cross-site", navigates, document}, http.StatusForbidden}, // a form
		{"GET /api/v1/query", []string{"Sec-Fetch-Site: cross-site", navigates, document}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Sec-Fetch-Site: same-site"}, http.StatusForbidden}, // another port
		{"GET /api/v1/query", []string{"Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Origin: http://evil.example"}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Origin: http://kiali:20001", "Origin: http://evil.example"}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Origin: http://kiali:20002"}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Origin: null"}, http.StatusForbidden},
		{"GET /loki/api/v1/tail", []string{"Origin: http://kiali:20001@evil.example"}, http.StatusForbidden},
		{"POST /loki/api/v1/push", []string{"Origin: https://shop.example"}, http.StatusForbidden},
	} {
		method, path, _ := strings.Cut(tc.request, " ")
		r := httptest.NewRequest(method, "http://kiali:20001"+path, nil)
		for _, header := range tc.headers {
			name, value, _ := strings.Cut(header, ": ")
			r.Header.Add(name, value)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		require.Equal(t, tc.status, w.Code, "%s %q", tc.request, tc.headers)
	}
}

func TestAudit(t *testing.T) {
	part := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.NoError(t, r.ParseForm())
		fmt.Fprint(w, r.Form.Get("query")+r.Header.Get(userHeader))
	})
	ask := func(who func(*http.Request) string, level slog.Level, r *http.Request) (line, answer string) {
		var out bytes.Buffer
		w := httptest.NewRecorder()
		audited(who, slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level})), part).ServeHTTP(w, r)
		return out.String(), w.Body.String()
	}
	get := func(path, user string) *http.Request {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		if user != "" {
			r.Header.Set(userHeader, user)
		}
		return r
	}
	line, _ := ask(asker, slog.LevelDebug, get("/api/v1/query?query=up", url.QueryEscape("alice@example.org")))
	require.Contains(t, line, `user=alice@example.org path=/api/v1/query expression=up took=`)
	line, _ = ask(asker, slog.LevelDebug, get("/api/v1/query?query=up", ""))
	require.Contains(t, line, "user=root ")
	form := httptest.NewRequest(http.MethodPost, "/api/v1/query", strings.NewReader("query=sum(up)"))
	form.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	line, answer := ask(asker, slog.LevelDebug, form)
	require.Contains(t, line, "expression=sum(up) ")
	require.Equal(t, "sum(up)", answer, "the part gets it too")
	line, _ = ask(asker, slog.LevelDebug, get("/api/traces?service=shop", ""))
	require.Contains(t, line, `expression="service=shop"`)

	// A pod is nobody, whatever it says, and the parts do not hear of it.
	line, answer = ask(anyPod, slog.LevelDebug, get("/loki/api/v1/query?query=x", "alice"))
	require.Contains(t, line, `user="a pod"`)
	require.NotContains(t, line+answer, "alice")

	// What others choose is one line of a bounded length.
	line, _ = ask(asker, slog.LevelDebug, get("/api/v1/query?query="+url.QueryEscape("a\nlevel=ERROR "+strings.Repeat("é", 5000)), url.QueryEscape("b\nuser=root"+strings.Repeat("x", 5000))))
	require.Equal(t, 1, strings.Count(line, "\n"))
	require.Less(t, len(line), 3*maxAudited)

	for what, r := range map[string]*http.Request{
		"a file": get("/index.js", ""), "the page": get("/graph?query=x", ""), "a write": httptest.NewRequest(http.MethodPost, "/loki/api/v1/push", nil),
	} {
		line, _ = ask(asker, slog.LevelDebug, r)
		require.Empty(t, line, what)
	}
	line, _ = ask(asker, slog.LevelInfo, get("/api/v1/query?query=up", "alice"))
	require.Empty(t, line)
}
