package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	collect "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/datadir"
)

// client returns an HTTP client for a socket.
func client(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
}

func get(t *testing.T, c *http.Client, path string) (int, string) {
	t.Helper()
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	answer, err := c.Get("http://store" + path)
	require.NoError(t, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return answer.StatusCode, string(text)
}

// documentedPaths returns the paths of docs/operate/observe.md, by socket, and whether they are there.
func documentedPaths(t *testing.T) map[string]map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../../docs/operate/observe.md")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(text), "<!-- paths:")
	table, _, ok2 := strings.Cut(rest, "<!-- end of paths -->")
	require.True(t, ok && ok2, "the page has no table of paths")
	all := map[string]map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, " | ")
		if len(cells) != 3 || !strings.HasPrefix(line, "| `") {
			continue
		}
		paths := map[string]bool{}
		for i, cell := range cells[1:] {
			prefix := ""
			for j, name := range strings.Split(cell, "`") {
				switch path := strings.ReplaceAll(name, "NAME", "job"); {
				case j%2 == 0:
				case strings.HasSuffix(path, "/v1/"):
					prefix = path
				case strings.HasPrefix(path, "/"):
					paths[path] = i == 0
				default:
					paths[prefix+path] = i == 0
				}
			}
		}
		require.Greater(t, len(paths), 6, line)
		all[strings.Trim(cells[0], "| `")] = paths
	}
	require.Len(t, all, 3)
	return all
}

// ask requests a path with headers, and follows no redirect.
func ask(t *testing.T, c *http.Client, path string, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, "http://store"+path, nil)
	require.NoError(t, err)
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		r.Header.Add(name, value)
	}
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	answer, err := c.Do(r)
	require.NoError(t, err)
	answer.Body.Close()
	return answer
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func options(t *testing.T, args ...string) *config.Options {
	t.Helper()
	dir := t.TempDir()
	o, err := config.Parse(append([]string{"--data-dir", filepath.Join(dir, "data"), "--socket", filepath.Join(dir, "observe.sock")}, args...), nil)
	require.NoError(t, err)
	return o
}

func TestSockets(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "sockets")
	o := options(t, "--cluster-sockets", dir)
	// What a killed store has left is replaced.
	left, err := net.Listen("unix", o.Socket)
	require.NoError(t, err)
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Run(ctx, o, "1.2.3", discard()) }()
	root := client(o.Socket)
	var status Status
	eventually(t, "the store answers", func() bool {
		answer, err := root.Get("http://store" + StatusPath)
		if err != nil {
			return false
		}
		defer answer.Body.Close()
		require.NoError(t, json.NewDecoder(answer.Body).Decode(&status))
		return status.Components[len(status.Components)-1].State == Ready
	})
	require.Equal(t, "1.2.3", status.Version)
	require.Equal(t, os.Getpid(), status.PID)
	require.Equal(t, int64(7*24*3600), status.Retention)

	for path, want := range map[string]os.FileMode{o.Socket: 0o600, o.DataDir: 0o700} {
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, want, info.Mode().Perm(), path)
	}
	sockets := []string{"prometheus", "loki", "jaeger-query", "otlp-http", "zipkin", "jaeger-thrift", "kiali"}
	for _, name := range sockets {
		info, err := os.Stat(filepath.Join(dir, name+".sock"))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o660), info.Mode().Perm(), name)
		require.Equal(t, uint32(ClusterGID), info.Sys().(*syscall.Stat_t).Gid, name)
	}
	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o710), info.Mode().Perm())
	require.Equal(t, uint32(ClusterGID), info.Sys().(*syscall.Stat_t).Gid)

	// Each socket for programs has its own API, those for people have the page, and the status is only root's.
	people := []string{"prometheus", "jaeger-query", "kiali"}
	own := map[string]string{
		"prometheus": "/api/v1/query", "loki": "/loki/api/v1/labels", "jaeger-query": "/api/services", "otlp-http": "/v1/traces", "zipkin": "/api/v2/spans", "jaeger-thrift": "/api/traces", "kiali": "/graph",
	}
	for _, name := range sockets {
		c := client(filepath.Join(dir, name+".sock"))
		for other, path := range own {
			code, _ := get(t, c, path)
			if other == name {
				require.NotEqual(t, http.StatusNotFound, code, "%s%s", name, path)
			} else if !slices.Contains(people, name) { // the page answers every path
				require.Equal(t, http.StatusNotFound, code, "%s%s", name, path)
			}
		}
		code, text := get(t, c, StatusPath)
		require.NotContains(t, text, o.DataDir)
		require.NotEqual(t, http.StatusOK, code, name)
	}
	// `istioctl dashboard` opens these paths, in a browser.
	for name, way := range map[string][2]string{
		"prometheus": {"/", "/metrics"}, "jaeger-query": {"/", "/traces"}, "kiali": {"/kiali/console/graph", "/graph"},
	} {
		c := client(filepath.Join(dir, name+".sock"))
		answer := ask(t, c, way[0], "Accept: text/html")
		require.Equal(t, http.StatusFound, answer.StatusCode, name)
		require.Equal(t, way[1], answer.Header.Get("Location"), name)
		answer = ask(t, c, way[1], "Accept: text/html,*/*;q=0.8")
		require.Equal(t, http.StatusOK, answer.StatusCode, name)
		require.Contains(t, answer.Header.Get("Content-Type"), "text/html", name)
		require.Equal(t, http.StatusOK, ask(t, c, "/api/polymesh/v1/state", "Sec-Fetch-Site: same-origin").StatusCode, name)
		require.Equal(t, http.StatusForbidden, ask(t, c, "/api/polymesh/v1/state", "Sec-Fetch-Site: cross-site").StatusCode, name)
	}
	// As Istio's sample has Jaeger.
	code, text := get(t, client(filepath.Join(dir, "jaeger-query.sock")), "/jaeger/api/services")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, text, `"data":[`)
	require.Equal(t, http.StatusForbidden, ask(t, client(filepath.Join(dir, "loki.sock")), "/loki/api/v1/labels", "Origin: http://evil.example").StatusCode)
	for name, paths := range documentedPaths(t) {
		c := client(filepath.Join(dir, name+".sock"))
		for path, there := range paths {
			code, text := get(t, c, path)
			// Jaeger's API answers 404 in JSON if there are no traces.
			missing := code == http.StatusNotFound && !strings.HasPrefix(text, "{")
			require.Equal(t, there, !missing, "docs/operate/observe.md: %s%s: status %d", name, path, code)
		}
	}
	_, text = get(t, client(filepath.Join(dir, "prometheus.sock")), "/metrics")
	require.Contains(t, text, "\nprocess_resident_memory_bytes ", "a scraper gets numbers")

	// Spans by gRPC come on a socket of HTTP/2.
	connection, err := grpc.NewClient("unix://"+filepath.Join(dir, "otlp-grpc.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer connection.Close()
	for i := range byte(3) {
		_, err = collect.NewTraceServiceClient(connection).Export(t.Context(), &collect.ExportTraceServiceRequest{ResourceSpans: []*trace.ResourceSpans{{ScopeSpans: []*trace.ScopeSpans{{
			Spans: []*trace.Span{{TraceId: slices.Repeat([]byte{1}, 16), SpanId: slices.Repeat([]byte{i + 1}, 8), Name: strings.Repeat("x", 1000), StartTimeUnixNano: uint64(time.Now().UnixNano())}},
		}}}}}, grpc.UseCompressor(gzip.Name))
		require.NoError(t, err)
	}
	code, text = get(t, root, "/api/traces/"+strings.Repeat("01", 16))
	require.Equal(t, http.StatusOK, code, text)
	require.Equal(t, 3, strings.Count(text, `"spanID"`))

	// A second store is refused in one line.
	second := *o
	second.Socket = filepath.Join(t.TempDir(), "s")
	err = Run(t.Context(), &second, "", discard())
	var held *datadir.HeldError
	require.ErrorAs(t, err, &held)
	require.Equal(t, fmt.Sprintf("%s is used by process %d, which serves on %s", o.DataDir, os.Getpid(), o.Socket), err.Error())

	cancel()
	require.NoError(t, <-done)
	require.NoFileExists(t, o.Socket)
	require.DirExists(t, dir) // pods have it mounted
	d, err := datadir.Open(o.DataDir, "")
	require.NoError(t, err)
	d.Close()
}

// A part that is not there answers so, instead of refusing the connection.
func TestSlot(t *testing.T) {
	s := &slot{name: "traces"}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/api/services", nil))
	require.Equal(t, http.StatusServiceUnavailable, w.Code)
	require.Contains(t, w.Body.String(), "traces do not work yet")
	s.set(http.NotFoundHandler())
	w = httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	require.Equal(t, http.StatusNotFound, w.Code)
}

func TestBodyIsLimited(t *testing.T) {
	h := newFront(1, 1, 1, discard()).limited(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		fmt.Fprint(w, n)
	}))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/loki/api/v1/push", strings.NewReader(strings.Repeat("x", maxBody))))
	require.Equal(t, fmt.Sprint(maxBody), w.Body.String())
	w = httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/loki/api/v1/push", strings.NewReader(strings.Repeat("x", maxBody+1))))
	require.Equal(t, http.StatusRequestEntityTooLarge, w.Code)
}

// Queries that hang keep neither writes nor live logs out, and end.
func TestQueriesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFront(1, 1, 1, discard()).limited(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				<-r.Context().Done()
				http.Error(w, r.Context().Err().Error(), http.StatusGatewayTimeout)
			}
		}))
		ask := func(method, path string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
			return w
		}
		begin := time.Now()
		slow := make(chan *httptest.ResponseRecorder)
		go func() { slow <- ask(http.MethodGet, "/slow") }()
		synctest.Wait()
		require.Equal(t, http.StatusOK, ask(http.MethodPost, "/v1/traces").Code)
		require.Equal(t, http.StatusOK, ask(http.MethodGet, "/loki/api/v1/tail").Code)
		w := ask(http.MethodGet, "/api/v1/query")
		require.Equal(t, http.StatusServiceUnavailable, w.Code)
		require.Equal(t, "10", w.Header().Get("Retry-After"))
		require.Equal(t, queueTime, time.Since(begin))
		require.Equal(t, http.StatusGatewayTimeout, (<-slow).Code)
		require.Equal(t, queryTime, time.Since(begin))
		require.Equal(t, http.StatusOK, ask(http.MethodGet, "/api/v1/query").Code)
	})
}

// Clients that send spans or lines slowly, or none, keep nobody out.
func TestWritesArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arrived := 0
		h := newFront(1, 1, 1, discard()).limited(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			arrived++
			_, _ = io.Copy(io.Discard, r.Body)
		}))
		var silent []*io.PipeWriter
		for _, path := range []string{"/v1/traces", "/v1/logs", "/v1/metrics", "/api/v2/spans", "/api/traces", "/otlp/v1/logs", "/loki/api/v1/push", "/api/v1/write"} {
			body, in := io.Pipe()
			silent = append(silent, in)
			go h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, path, body))
			synctest.Wait()
		}
		require.Equal(t, len(silent), arrived)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/api/v1/write", nil))
		require.Equal(t, http.StatusServiceUnavailable, w.Code, "remote write has a gate")
		for _, in := range silent {
			in.Close()
		}
	})
}

// Live logs last, so they have places of their own. What only looks like them is a query.
func TestTailsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := map[string]chan struct{}{}
		for _, path := range []string{tailPath, "/tail", "/api/v1/label/x/tail", "/loki/api/v1%2Ftail"} {
			ended[path] = make(chan struct{})
		}
		h := newFront(1, 1, 1, discard()).limited(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-ended[r.URL.EscapedPath()]:
			case <-r.Context().Done():
			}
		}))
		ask := func(path string) int {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			return w.Code
		}
		began := time.Now()
		tail := make(chan int)
		go func() { tail <- ask(tailPath) }()
		synctest.Wait()
		require.Equal(t, http.StatusServiceUnavailable, ask(tailPath))
		require.Equal(t, queueTime, time.Since(began))
		// The others end with the time for queries, one after the other.
		for path := range ended {
			if path != tailPath {
				began = time.Now()
				require.Equal(t, http.StatusOK, ask(path))
				require.Equal(t, queryTime, time.Since(began), path)
			}
		}
		close(ended[tailPath])
		require.Equal(t, http.StatusOK, <-tail)
		require.Equal(t, http.StatusOK, ask(tailPath))
	})
}

func TestPanicEndsOneRequest(t *testing.T) {
	h := newFront(1, 1, 1, discard()).limited(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("unexpected") }))
	for range 3 { // the turn is given back
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
		require.Equal(t, http.StatusInternalServerError, w.Code)
		require.NotContains(t, w.Body.String(), "unexpected")
	}
}

// Connections above the limit wait, and get their turn when others end.
func TestConnectionsAreLimited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := listen(path, 0o600, -1)
	require.NoError(t, err)
	defer l.Close()
	accepted := make(chan net.Conn, maxConnections+1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	for range maxConnections + 1 {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		defer c.Close()
	}
	first := <-accepted
	for range maxConnections - 1 {
		<-accepted
	}
	require.Empty(t, accepted)
	require.NoError(t, first.Close())
	<-accepted
}
