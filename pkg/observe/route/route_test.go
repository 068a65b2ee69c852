package route

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes/fake"

	"polymesh.dev/polymesh/pkg/layout"
)

// as is a request that the API server has authenticated.
func as(r *http.Request, name string, groups ...string) *http.Request {
	return r.WithContext(request.WithUser(r.Context(), &user.DefaultInfo{Name: name, Groups: groups}))
}

// startStore serves a socket as the store does, and shows what it got.
func startStore(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Retry-After", "7")
		fmt.Fprintf(w, "%s %s %q %d", r.Method, r.URL, r.Header, len(body))
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return socket
}

func newRoute(socket string) *Route {
	return New(Options{Server: "server-1", Address: netip.MustParseAddrPort("192.0.2.1:6443"), Socket: socket, Log: slog.New(slog.DiscardHandler)})
}

func serve(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func push(body string) *http.Request {
	return httptest.NewRequest(http.MethodPost, layout.ObserveIngestPath+"?node=other", strings.NewReader(body))
}

func TestWhoSends(t *testing.T) {
	h := newRoute(startStore(t)).Ingest()
	forged := push("x")
	for name, value := range map[string]string{nodeHeader: "other", forHeader: "system:node:other", "X-Polymesh-User": "root", "X-Remote-User": "root", "Cookie": "c"} {
		forged.Header.Set(name, value)
	}
	const got = `POST /api/polymesh/v1/ingest map["Connection":["close"] "Content-Length":["1"] "Content-Type":["application/octet-stream"] "X-Polymesh-Node":["n2"]] 1`
	for what, tc := range map[string]struct {
		r    *http.Request
		code int
		text string
	}{
		"a node":                           {as(push("x"), "system:node:n2", "system:nodes"), 200, got},
		"a node that claims to be another": {as(forged, "system:node:n2", "system:nodes"), 200, got},
		"a node that is in no group":       {as(push("x"), "system:node:n2", "system:authenticated"), 403, "only the cluster's nodes"},
		"a user in the group":              {as(push("x"), "alice", "system:nodes"), 403, "only the cluster's nodes"},
		"an administrator":                 {as(push("x"), "system:admin", "system:masters"), 403, "only the cluster's nodes"},
		"a name that is none":              {as(push("x"), "system:node:N2", "system:nodes"), 403, "only the cluster's nodes"},
		"no name":                          {as(push("x"), "system:node:", "system:nodes"), 403, "only the cluster's nodes"},
		"nobody":                           {push("x"), 403, "only the cluster's nodes"},
		"another method":                   {as(httptest.NewRequest(http.MethodPut, layout.ObserveIngestPath, nil), "system:node:n2", "system:nodes"), 405, "use POST"},
		"too much":                         {as(push(strings.Repeat("x", maxPush+1)), "system:node:n2", "system:nodes"), 413, "not so large"},
		"a question":                       {as(httptest.NewRequest(http.MethodGet, layout.ObserveIngestPath, nil), "system:node:n2", "system:nodes"), 200, `{"server":"server-1"}`},
	} {
		w := serve(h, tc.r)
		if w.Code != tc.code || !strings.Contains(w.Body.String(), tc.text) {
			t.Errorf("%s: %d %s, want %d %s", what, w.Code, w.Body, tc.code, tc.text)
		}
	}
	passed := func(name string, groups ...string) *http.Request {
		r := as(push("x"), name, groups...)
		r.Header.Set(forHeader, "system%3Anode%3An3")
		return r
	}
	if w := serve(h, passed(serverUser, "system:masters")); w.Code != 200 || !strings.Contains(w.Body.String(), `"X-Polymesh-Node":["n3"]`) {
		t.Errorf("passed on by a server: %d %s", w.Code, w.Body)
	}
	for _, r := range []*http.Request{passed("system:admin", "system:masters"), passed(serverUser, "system:authenticated"), passed("system:node:n2", "system:nodes")} {
		if w := serve(h, r); strings.Contains(w.Body.String(), "n3") {
			t.Errorf("passed on by another: %d %s", w.Code, w.Body)
		}
	}
	two := passed(serverUser, "system:masters")
	two.Header.Add(forHeader, "system:node:n4")
	if w := serve(h, two); w.Code != 403 {
		t.Errorf("for two: %d %s", w.Code, w.Body)
	}
	away := newRoute(filepath.Join(t.TempDir(), "none")).Ingest()
	if w := serve(away, as(push("x"), "system:node:n2", "system:nodes")); w.Code != 503 || w.Header().Get("Retry-After") != "5" {
		t.Errorf("without a store: %d %s", w.Code, w.Body)
	}
}

func TestHowMuchIsSent(t *testing.T) {
	var s senders
	ctx, cancel := context.WithCancel(t.Context())
	for i := range maxSenders {
		if !s.begin(ctx, fmt.Sprint(i)) {
			t.Fatal("a node was refused: ", i)
		}
	}
	if s.begin(ctx, "more") {
		t.Error("too many at a time")
	}
	// The second push of a node waits for the end of the first, and a third does not.
	second := make(chan bool)
	go func() { second <- s.begin(ctx, "1") }()
	for waits := false; !waits; {
		s.lock.Lock()
		waits = s.waiting["1"]
		s.lock.Unlock()
	}
	if s.begin(ctx, "1") {
		t.Error("two pushes of a node at a time")
	}
	s.end("1")
	if !<-second {
		t.Error("the second push of a node is refused")
	}
	go func() { second <- s.begin(ctx, "2") }()
	cancel()
	if <-second {
		t.Error("two pushes of a node at a time")
	}
	ctx = t.Context()
	for i := range maxSenders {
		s.end(fmt.Sprint(i))
	}
	n := 0
	for s.begin(ctx, "n") {
		s.end("n")
		n++
	}
	if n < pushBurst || n > 2*pushBurst {
		t.Errorf("a node began %d times in a moment", n)
	}
	for i := range 3 * maxKnown {
		if node := fmt.Sprint("n", i); s.begin(ctx, node) {
			s.end(node)
		}
	}
	if len(s.rates) > maxKnown || len(s.busy)+len(s.waiting) > 0 {
		t.Errorf("%d nodes are known, %d send", len(s.rates), len(s.busy)+len(s.waiting))
	}
}

// A server without the store passes on, once, or says why not.
func TestWithoutStore(t *testing.T) {
	r := newRoute("")
	node := func(method string) *http.Request {
		return as(httptest.NewRequest(method, layout.ObserveIngestPath, strings.NewReader("x")), "system:node:n2", "system:nodes")
	}
	check := func(what string, r *Route, in *http.Request, code int, text string) {
		t.Helper()
		if w := serve(r.Ingest(), in); w.Code != code || !strings.Contains(w.Body.String(), text) || (code == 503) != (w.Header().Get("Retry-After") != "") {
			t.Errorf("%s: %d %s", what, w.Code, w.Body)
		}
	}
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		r.place.Store(nil)
		check("not known", r, node(method), 503, "not known yet")
		r.place.Store(&place{})
		check("none", r, node(method), 404, "no store")
	}
	r.place.Store(&place{"server-2", netip.MustParseAddrPort("127.0.0.1:1")})
	check("a question", r, node(http.MethodGet), 200, "server-2")
	passed := as(push("x"), serverUser, "system:masters")
	passed.Header.Set(forHeader, "system:node:n2")
	check("passed on before", r, passed, 503, "does not have the store")
	r.place.Store(&place{"server-1", netip.MustParseAddrPort("127.0.0.1:1")})
	check("to itself", r, node(http.MethodPost), 503, "does not have the store")
}

// The ConfigMap of the server with the store.
func TestRecord(t *testing.T) {
	ctx, client := t.Context(), fake.NewClientset()
	get := func() map[string]string {
		m, err := client.CoreV1().ConfigMaps("kube-system").Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil
		}
		return m.Data
	}
	set := func(data map[string]string) {
		t.Helper()
		_ = client.CoreV1().ConfigMaps("kube-system").Delete(ctx, name, metav1.DeleteOptions{})
		if _, err := client.CoreV1().ConfigMaps("kube-system").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	is := func(what string, got, want any) {
		t.Helper()
		a, _ := json.Marshal(got)
		b, _ := json.Marshal(want)
		if string(a) != string(b) {
			t.Errorf("%s: %s, want %s", what, a, b)
		}
	}
	own := map[string]string{"server": "server-1", "address": "192.0.2.1:6443"}
	other := map[string]string{"server": "server-2", "address": "192.0.2.2:6443"}

	without := newRoute("")
	without.o.Server = "server-3"
	if err := without.sync(ctx, client); err != nil || *without.place.Load() != (place{}) {
		t.Errorf("without a record: %v", err)
	}
	with := newRoute("/socket")
	for _, before := range []map[string]string{nil, own, {"server": "server-1", "address": "192.0.2.9:6443"}, other} {
		with.written = false
		if before != nil {
			set(before)
		}
		if err := with.sync(ctx, client); err != nil {
			t.Error(err)
		}
		is("the record", get(), own)
	}
	// Another server that says the same is not fought with.
	set(other)
	if err := with.sync(ctx, client); err == nil || !strings.Contains(err.Error(), `server "server-2" says`) {
		t.Errorf("two stores: %v", err)
	}
	is("the record", get(), other)

	if err := without.sync(ctx, client); err != nil || *without.place.Load() != (place{"server-2", netip.MustParseAddrPort("192.0.2.2:6443")}) {
		t.Errorf("%v %+v", err, without.place.Load())
	}
	for _, data := range []map[string]string{nil, {"server": "server-2"}, {"server": "server-2", "address": "evil.example:443"}, {"server": "Ä", "address": "192.0.2.2:6443"}, {"server": "s", "address": "192.0.2.2:0"}} {
		set(data)
		if err := without.sync(ctx, client); err == nil {
			t.Errorf("%v is a record", data)
		}
	}
	// A server that has no store any more.
	without.o.Server = "server-1"
	set(own)
	if err := without.sync(ctx, client); err != nil || get() != nil || *without.place.Load() != (place{}) {
		t.Errorf("%v, %v", err, get())
	}
}
