package findings

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
)

// answering is a server's socket with an answer that can be changed.
type answering struct {
	socket string
	answer atomic.Pointer[string]
	status atomic.Int64
}

func newServer(t *testing.T) *answering {
	t.Helper()
	s := &answering{socket: filepath.Join(t.TempDir(), "s")}
	s.set(http.StatusOK, `{"findings":[]}`)
	l, err := net.Listen("unix", s.socket)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /findings", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(int(s.status.Load()))
		fmt.Fprint(w, *s.answer.Load())
	})
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(l) }() // until it is closed
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	return s
}

func (s *answering) set(status int, answer string) {
	s.status.Store(int64(status))
	s.answer.Store(&answer)
}

// kept returns what the store has, the oldest first.
func kept(t *testing.T, logs *logstore.Store) []logstore.Entry {
	t.Helper()
	logs.Flush()
	var all []logstore.Entry
	require.NoError(t, logs.Select(t.Context(), logstore.Selector{
		Matchers: []logstore.Matcher{{Name: "job", Value: Job}}, Start: time.Now().Add(-time.Hour), End: time.Now().Add(time.Hour), Limit: 1000,
	}, func(e logstore.Entry) bool {
		all = append(all, e)
		return true
	}))
	return all
}

const crash = `{"findings":[{"reason":"Crash","kind":"Deployment","namespace":"shop","name":"api","pod":"api-1","container":"app","message":"ended with exit code 3",
"advice":"its whole log","since":"2026-03-02T14:00:00Z","bad":true,"replicas":1},{"reason":"NodeNotReady","kind":"Node","name":"n1","message":"gone","advice":"start it","since":"2026-03-02T14:00:00Z","bad":true}],"more":2}`

func TestWhatChangesIsKept(t *testing.T) {
	s, logs := newServer(t), logstoretest.Open(t, rowstore.Options{Dir: t.TempDir(), Retention: 24 * time.Hour})
	c := New(Options{Socket: s.socket, Store: logs, Log: slog.New(slog.DiscardHandler)})
	c.round(t.Context())
	c.round(t.Context())
	all := kept(t, logs)
	require.Len(t, all, 1, "nothing is wrong, which is written once")
	require.JSONEq(t, `{"findings":0}`, all[0].Line)

	s.set(http.StatusOK, crash)
	c.round(t.Context())
	c.round(t.Context())
	all = kept(t, logs)
	require.Len(t, all, 4)
	require.JSONEq(t, `{"findings":2,"more":2}`, all[1].Line)
	for _, e := range all[1:] {
		require.Equal(t, all[1].Time, e.Time, "they are one survey")
	}
	byKind := map[string]logstore.Entry{}
	for _, e := range all[1:] {
		byKind[logstore.Value(e.Metadata, "kind")] = e
	}
	require.Equal(t, []logstore.Field{{Name: "job", Value: Job}, {Name: "namespace", Value: "shop"}, {Name: "workload", Value: "api"}}, byKind["Deployment"].Labels)
	require.Equal(t, []logstore.Field{{Name: "job", Value: Job}, {Name: "node", Value: "n1"}}, byKind["Node"].Labels)
	require.JSONEq(t, `{"reason":"Crash","kind":"Deployment","namespace":"shop","name":"api","pod":"api-1","container":"app","message":"ended with exit code 3",
		"advice":"its whole log","since":"2026-03-02T14:00:00Z","bad":true,"replicas":1}`, byKind["Deployment"].Line)
	require.Equal(t, map[string]int64{"findings": 2}, c.Numbers())

	// The end is written, too, and what stays is written each minute.
	s.set(http.StatusOK, `{"findings":[]}`)
	c.round(t.Context())
	require.Len(t, kept(t, logs), 5)
	c.written = c.written.Add(-Every)
	c.round(t.Context())
	require.Len(t, kept(t, logs), 6)
}

func TestServerThatDoesNotTell(t *testing.T) {
	s, logs := newServer(t), logstoretest.Open(t, rowstore.Options{Dir: t.TempDir(), Retention: 24 * time.Hour})
	c := New(Options{Socket: s.socket, Store: logs, Log: slog.New(slog.DiscardHandler)})
	c.round(t.Context())
	for answer, want := range map[string]string{
		"{":                  "unexpected end of JSON",
		`{"findings":"all"}`: "cannot unmarshal",
		"[" + strings.Repeat(" ", maxAnswer) + "]": "is too long",
	} {
		s.set(http.StatusOK, answer)
		_, err := c.ask(t.Context())
		require.ErrorContains(t, err, want)
	}
	s.set(http.StatusServiceUnavailable, `{"message":"the API server is away"}`)
	c.round(t.Context())
	require.Empty(t, c.Problem(), "it may be starting")
	c.answered = time.Now().Add(-silence)
	require.Contains(t, c.Problem(), "503 Service Unavailable the API server is away")
	require.Len(t, kept(t, logs), 1, "what is not known is not written")
	s.set(http.StatusOK, `{"findings":[]}`)
	c.round(t.Context())
	require.Empty(t, c.Problem())
	require.Len(t, kept(t, logs), 2, "from now on it is known again")
}

// Names and texts are anybody's.
func TestAnswerIsBounded(t *testing.T) {
	s := newServer(t)
	c := New(Options{Socket: s.socket, Log: slog.New(slog.DiscardHandler)})
	one := fmt.Sprintf(`{"reason":"%[1]s","kind":"%[1]s","namespace":"%[1]s","name":"%[1]s","message":"%[2]s\u0000","advice":"\ud800","ready":-1}`, strings.Repeat("n", 300), strings.Repeat("ä", 3000))
	s.set(http.StatusOK, `{"findings":[`+one+`],"more":-5}`)
	got, err := c.ask(t.Context())
	require.NoError(t, err)
	f := got.Findings[0]
	require.Len(t, f.Name, maxName)
	require.LessOrEqual(t, len(f.Message), maxText)
	require.Zero(t, got.More)
	require.Zero(t, f.Ready)
	logs := logstoretest.Open(t, rowstore.Options{Dir: t.TempDir(), Retention: 24 * time.Hour})
	require.NoError(t, logs.Append(got.Entries(time.Now())), "the store takes it")
	require.Len(t, kept(t, logs), 2)

	s.set(http.StatusOK, `{"findings":[`+strings.Repeat(`{"name":"a"},`, 999)+`{"name":"b"}]}`)
	got, err = c.ask(t.Context())
	require.NoError(t, err)
	require.Len(t, got.Findings, maxFindings)
	require.Equal(t, 1000-maxFindings, got.More)
}

func TestAsksUntilTheEnd(t *testing.T) {
	s, logs := newServer(t), logstoretest.Open(t, rowstore.Options{Dir: t.TempDir(), Retention: 24 * time.Hour})
	s.set(http.StatusOK, crash)
	c := New(Options{Socket: s.socket, Store: logs, Log: slog.New(slog.DiscardHandler)})
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.Run(t.Context()) }()
	require.Eventually(t, func() bool { return len(kept(t, logs)) == 3 }, 30*time.Second, 10*time.Millisecond)
	t.Cleanup(func() { <-ended })
}
