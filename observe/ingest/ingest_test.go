package ingest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/journal"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/metrics"
	"polymesh.dev/polymesh/observe/nodemetrics"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/push"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/wire"
)

// bench is an Ingest with stores.
type bench struct {
	t       *testing.T
	opts    Options
	logs    *logstore.Store
	metrics *metrics.Metrics
	in      *Ingest
	encoder *wire.Encoder
	number  uint64
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir := t.TempDir()
	logs := logstoretest.Open(t, rowstore.Options{Dir: filepath.Join(dir, "logs")})
	encoder, err := wire.NewEncoder()
	require.NoError(t, err)
	b := &bench{t: t, opts: optionsFor(dir, logs), logs: logs, encoder: encoder}
	b.opts.Families = nodemetrics.Families()
	b.restart()
	return b
}

// withMetrics opens a store of metrics, which takes a moment.
func (b *bench) withMetrics() {
	b.t.Helper()
	m, err := metrics.Open(b.t.Context(), metrics.Options{Dir: filepath.Join(b.t.TempDir(), "metrics"), Retention: 7 * 24 * time.Hour, Log: slog.New(slog.DiscardHandler)})
	require.NoError(b.t, err)
	b.t.Cleanup(func() { _ = m.Close() })
	b.metrics, b.opts.Samples = m, m.Appendable()
	b.restart()
}

// restart is another run of the store, with what the last one has saved.
func (b *bench) restart() {
	b.t.Helper()
	in, err := New(b.opts)
	require.NoError(b.t, err)
	b.in = in
}

// text is a record as JSON, or anything else.
func text(records ...any) string {
	var all strings.Builder
	for _, r := range records {
		if s, ok := r.(string); ok {
			all.WriteString(s + "\n")
			continue
		}
		line, err := json.Marshal(r)
		if err != nil {
			panic(err)
		}
		all.WriteString(string(line) + "\n")
	}
	return all.String()
}

func (b *bench) body(h wire.Header, chunks ...string) []byte {
	b.t.Helper()
	if h.Version == 0 {
		h.Version = wire.Version
	}
	body, err := wire.AppendHeader(nil, h)
	require.NoError(b.t, err)
	for i, c := range chunks {
		body = b.encoder.Chunk(body, wire.Info{Number: h.First + uint64(i), Time: time.Now().UnixMilli(), Count: 1}, []byte(c))
	}
	return body
}

// send sends a push as it arrives at the socket.
func (b *bench) send(body []byte, nodes ...string) (int, http.Header, string) {
	b.t.Helper()
	r := httptest.NewRequest(http.MethodPost, Path, bytes.NewReader(body))
	for _, n := range nodes {
		r.Header.Add(NodeHeader, n)
	}
	w := httptest.NewRecorder()
	b.in.ServeHTTP(w, r)
	return w.Code, w.Header(), w.Body.String()
}

// push sends the next chunk of node n2, which is accepted.
func (b *bench) push(records ...any) wire.Answer {
	b.t.Helper()
	b.number++
	code, _, answer := b.send(b.body(wire.Header{Generation: "g", First: b.number, Oldest: 1}, text(records...)), "n2")
	require.Equal(b.t, http.StatusOK, code, answer)
	var a wire.Answer
	require.NoError(b.t, json.Unmarshal([]byte(answer), &a))
	return a
}

func (b *bench) entries() []logstore.Entry {
	b.t.Helper()
	var all []logstore.Entry
	require.NoError(b.t, b.logs.Select(context.Background(), logstore.Selector{}, func(e logstore.Entry) bool { all = append(all, e); return true }))
	return all
}

func (b *bench) status() NodeStatus {
	b.t.Helper()
	all := b.in.Nodes()
	require.Len(b.t, all, 1)
	return all[0]
}

// podLines is what the collector of n2 sends of its pod.
func podLines(times []int64, texts ...string) wire.Record {
	return wire.Record{Lines: &wire.Lines{
		Labels:   map[string]string{"job": podlogs.Job, "namespace": onePod.Namespace, "pod": onePod.Name, "container": "app", "stream": "stdout"},
		Metadata: map[string]string{"uid": onePodUID, "restart": "0"}, Times: times, Texts: texts,
	}}
}

func TestAccepted(t *testing.T) {
	b := newBench(t)
	now := time.Now().UTC().Truncate(time.Millisecond)
	at := func(ms int) int64 { return now.Add(time.Duration(ms) * time.Millisecond).UnixNano() }
	platform := wire.Record{Lines: &wire.Lines{Labels: map[string]string{"job": journal.JobPolymesh, "container": "containerd"}, Times: []int64{at(2)}, Texts: []string{"c"}}}
	kernel := wire.Record{Lines: &wire.Lines{
		Labels: map[string]string{"job": journal.JobKernel}, Times: []int64{at(3)}, Texts: []string{"Killed process 1 (x)"}, Metadata: map[string]string{"uid": onePodUID, "pid": "1", "process": "x"},
	}}
	a := b.push(podLines([]int64{at(0), at(1)}, "a", "b"), platform, kernel)
	require.Equal(t, wire.Answer{Position: 1}, a)
	field := func(pairs ...string) (all []logstore.Field) {
		for p := range slices.Chunk(pairs, 2) {
			all = append(all, logstore.Field{Name: p[0], Value: p[1]})
		}
		return all
	}
	of := field("container", "app", "job", "pods", "namespace", "shop", "node", "n2", "pod", onePod.Name, "stream", "stdout", "workload", "api")
	meta := field("restart", "0", "uid", onePodUID)
	got := b.entries()
	for i := range got {
		slices.SortFunc(got[i].Metadata, func(a, b logstore.Field) int { return strings.Compare(a.Name, b.Name) })
	}
	require.Equal(t, []logstore.Entry{
		{Time: now, Labels: of, Line: "a", Metadata: meta}, {Time: now.Add(time.Millisecond), Labels: of, Line: "b", Metadata: meta},
		{Time: now.Add(2 * time.Millisecond), Labels: field("container", "containerd", "job", "polymesh", "node", "n2"), Line: "c"},
		{Time: now.Add(3 * time.Millisecond), Labels: field("job", "kernel", "node", "n2"), Line: "Killed process 1 (x)", Metadata: field("pid", "1", "process", "x", "uid", onePodUID)},
	}, got)
	require.Equal(t, int64(4), b.status().Lines)
	require.Empty(t, b.in.Problem())

	// The position is remembered when the lines are on disk, and told.
	require.Eventually(t, func() bool { b.in.save(); return b.push().Durable >= 1 }, 30*time.Second, 100*time.Millisecond)
	text, err := os.ReadFile(b.opts.State)
	require.NoError(t, err)
	require.Contains(t, string(text), `"n2"`)
}

// A chunk that comes again, in the same run of the store or in the next one, is not stored again, however much the store has noted.
func TestRepeated(t *testing.T) {
	b := newBench(t)
	begin := time.Now().Add(-time.Hour).UnixNano()
	chunk := func(i int) string { return text(podLines([]int64{begin + int64(i)}, fmt.Sprint("line ", i))) }
	send := func(generation string, first, oldest uint64, chunks ...string) wire.Answer {
		t.Helper()
		code, _, answer := b.send(b.body(wire.Header{Generation: generation, First: first, Oldest: oldest}, chunks...), "n2")
		require.Equal(t, http.StatusOK, code, answer)
		var a wire.Answer
		require.NoError(t, json.Unmarshal([]byte(answer), &a))
		return a
	}
	lines := func() (all []string) {
		for _, e := range b.entries() {
			all = append(all, e.Line)
		}
		return all
	}
	require.Equal(t, uint64(2), send("g", 1, 1, chunk(1), chunk(2)).Position)
	require.Equal(t, uint64(2), send("g", 1, 1, chunk(1), chunk(2)).Position)
	require.Equal(t, uint64(3), send("g", 2, 1, chunk(2), chunk(3)).Position)
	require.Equal(t, []string{"line 1", "line 2", "line 3"}, lines())
	require.Zero(t, b.status().Repeated, "they were known by their numbers")

	// A push that does not follow.
	require.Equal(t, wire.Answer{Position: 3, Missing: true}, send("g", 5, 1, chunk(5)))
	require.Equal(t, uint64(5), send("g", 5, 5, chunk(5)).Position, "the node has nothing older")
	require.Equal(t, uint64(5), send("g", 4, 4, chunk(4)).Position, "which was on its way for long")

	// The store was killed before it has noted anything.
	require.NoFileExists(t, b.opts.State)
	b.restart()
	require.Equal(t, wire.Answer{Missing: true}, send("g", 6, 1, chunk(6)))
	require.Equal(t, uint64(6), send("g", 1, 1, chunk(1), chunk(2), chunk(3), chunk(4), chunk(5), chunk(6)).Position)
	require.Equal(t, []string{"line 1", "line 2", "line 3", "line 4", "line 5", "line 6"}, lines())
	require.Equal(t, int64(4), b.status().Repeated)

	// The collector was killed before it has noted how far it had read.
	require.Equal(t, uint64(2), send("h", 1, 1, chunk(6), chunk(7)).Position)
	require.Equal(t, uint64(6), send("g", 6, 6, chunk(6)).Position)
	require.Equal(t, []string{"line 1", "line 2", "line 3", "line 4", "line 5", "line 6", "line 7"}, lines())

	// The kernel's times are not the same with each reading.
	kernel := func(at int64) string {
		return text(wire.Record{Lines: &wire.Lines{Labels: map[string]string{"job": journal.JobKernel}, Times: []int64{at}, Texts: []string{"Killed process 7 (x)"}}})
	}
	send("i", 1, 1, kernel(begin+int64(time.Minute)))
	send("j", 1, 1, kernel(begin+int64(time.Minute)+int64(time.Millisecond)))
	require.Len(t, lines(), 8)

	// What a later run of the store has noted.
	require.Eventually(t, func() bool { b.in.save(); return send("j", 1, 1, kernel(0)).Durable == 1 }, 30*time.Second, 100*time.Millisecond)
	b.restart()
	require.Equal(t, wire.Answer{Position: 1, Durable: 1}, send("j", 1, 1, kernel(0)))
	require.Equal(t, wire.Answer{Position: 2, Durable: 2}, send("h", 1, 1, chunk(8)))
}

// platformLines are lines of one of n2's programs. Its collector does not look whether the times are in order.
func platformLines(container string, times ...time.Time) wire.Record {
	l := &wire.Lines{Labels: map[string]string{"job": journal.JobPolymesh, "container": container}}
	for i, at := range times {
		l.Times, l.Texts = append(l.Times, at.UnixNano()), append(l.Texts, fmt.Sprint("line ", i))
	}
	return wire.Record{Lines: l}
}

// settled makes a collector's run one whose lines are not looked for any more.
func (b *bench) settled(node string) *generation {
	g := b.in.nodes[node].generations[0]
	g.chunks, g.since = recognisedChunks, time.Now().Add(-recognised)
	return g
}

// A chunk is stored if anything is left of the budget. Whatever is in it, it overdraws the budget by a bounded amount, and nothing more is stored until
// that is paid.
func TestBudgetIsBounded(t *testing.T) {
	const most = wire.MaxRaw + wire.MaxValues*lineCost + maxLookups*lookupCost + maxRecall*lineCost
	b := newBench(t)
	// As many values as a chunk may have, in as many bytes.
	head, tail := fmt.Sprintf(`{"samples":{"time":%d,"values":[null`, time.Now().UnixMilli()), "]}}"
	values := strings.Repeat(",null", wire.MaxValues-wire.Values([]byte(head+tail)))
	full := head + values + strings.Repeat(" ", wire.MaxRaw-len(head+values+tail)) + tail
	n := newNode("n3")
	n.budget = budget{left: 1, last: time.Now()}
	b.in.nodes["n3"] = n
	push := func(first uint64, chunks ...string) (wire.Answer, http.Header) {
		t.Helper()
		code, h, text := b.send(b.body(wire.Header{Generation: "g", First: first, Oldest: 1}, chunks...), "n3")
		require.Equal(t, http.StatusOK, code, text)
		var a wire.Answer
		require.NoError(t, json.Unmarshal([]byte(text), &a))
		return a, h
	}
	a, h := push(1, full, full, full)
	require.Equal(t, uint64(1), a.Position, "one chunk, whatever is left")
	require.Greater(t, n.status.Rejected, int64(wire.MaxValues-10))
	require.Less(t, n.budget.left, -float64(wire.MaxRaw+(wire.MaxValues-10)*lineCost)+4*bytesPerSecond)
	require.GreaterOrEqual(t, n.budget.left, -float64(most))
	wait, err := strconv.Atoi(h.Get("Retry-After"))
	require.NoError(t, err)
	require.LessOrEqual(t, wait, most/bytesPerSecond+1)
	// It does not help to try again at once.
	before := n.budget.left
	a, _ = push(2, full)
	require.Equal(t, uint64(1), a.Position)
	require.GreaterOrEqual(t, n.budget.left, before)
}

// A chunk that comes again, because a pod of it is not known yet, costs its size each time.
func TestWaitingForPodsCosts(t *testing.T) {
	b := newBench(t)
	unknown := podLines([]int64{time.Now().UnixNano()}, strings.Repeat("x", 1<<20))
	unknown.Lines.Metadata["uid"] = "unknown"
	body := b.body(wire.Header{Generation: "g", First: 1, Oldest: 1}, text(unknown))
	tries := 0
	for ; ; tries++ {
		code, h, answer := b.send(body, "n2")
		require.Equal(t, http.StatusOK, code, answer)
		require.NotEmpty(t, h.Get("Retry-After"))
		if b.in.nodes["n2"].budget.left <= 0 {
			break
		}
		require.Less(t, tries, 1000)
	}
	// Ten seconds' worth, and what has come in meanwhile.
	require.GreaterOrEqual(t, tries, 10*bytesPerSecond>>20-1)
	b.in.nodes["n2"].budget = budget{left: -bytesPerSecond, last: time.Now()}
	b.send(body, "n2")
	require.GreaterOrEqual(t, b.in.nodes["n2"].budget.left, -float64(bytesPerSecond), "it is not read before that is paid")
}

// Whatever times a node sends, looking for what is stored already is bounded, and the node pays for it.
func TestLookingIsBounded(t *testing.T) {
	b := newBench(t)
	now := time.Now()
	const streams, each = 4, 20_000
	for s := range streams {
		var entries []logstore.Entry
		for i := range each {
			entries = append(entries, logstore.Entry{
				Time: now.Add(-time.Hour + time.Duration(i)*time.Millisecond), Line: fmt.Sprint("line ", i),
				Labels: []logstore.Field{{Name: "job", Value: journal.JobPolymesh}, {Name: "node", Value: "n2"}, {Name: "container", Value: fmt.Sprint("c", s)}},
			})
		}
		require.NoError(t, b.logs.Append(entries))
	}
	b.logs.Flush()
	cost := func(records ...any) (looked float64) {
		n := b.in.nodes["n2"]
		if n == nil {
			n = newNode("n2")
			b.in.nodes["n2"] = n
		}
		n.budget = budget{}
		b.push(records...)
		lines := 0
		for _, r := range records {
			lines += len(r.(wire.Record).Lines.Texts)
		}
		return 10*bytesPerSecond - n.budget.left - float64(len(text(records...))+lines*lineCost)
	}
	// Between two lines that are far apart, nothing is looked at.
	var apart []any
	for s := range streams {
		apart = append(apart, platformLines(fmt.Sprint("c", s), now, now.Add(-2*time.Hour)))
	}
	require.Equal(t, float64(2*streams*lookupCost), cost(apart...))
	require.Zero(t, b.status().Repeated)

	// There is much between these, but not all of it is looked at.
	var around []any
	for s := range streams {
		around = append(around, platformLines(fmt.Sprint("c", s), now.Add(-time.Hour), now.Add(-time.Hour-time.Minute), now.Add(-time.Hour+8*time.Minute)))
	}
	require.Equal(t, float64(3*lookupCost+maxRecall*lineCost), cost(around...))
	require.Contains(t, []int64{2, 3}, b.status().Repeated, "two streams were looked at to the end, one in part, and one not")

	// There are many places to look at, in one stream or in many.
	var times []time.Time
	for i := range maxLookups + 10 {
		times = append(times, now.Add(-time.Duration(i)*recallSpan-time.Duration(i)))
	}
	require.Equal(t, float64(maxLookups*lookupCost), cost(platformLines("wide", times...)))
	var many []any
	for i := range maxLookups + 10 {
		many = append(many, platformLines(fmt.Sprint("many", i), now))
	}
	require.Equal(t, float64(maxLookups*lookupCost), cost(many...))
	before := b.status().Repeated
	b.logs.Flush()
	cost(many[:maxLookups]...)
	require.Equal(t, int64(maxLookups), b.status().Repeated-before)

	b.settled("n2")
	require.Zero(t, cost(many...), "nothing is looked for any more")
}

// While one node's lines are looked for, another node's are stored.
func TestLookingHoldsUpNobody(t *testing.T) {
	b := newBench(t)
	decoding := make(chan struct{}, 1)
	b.opts.Pod = func(string) (Pod, bool, bool) { decoding <- struct{}{}; return onePod, true, true }
	b.restart()
	send := func(node string, first uint64, r wire.Record) int {
		code, _, _ := b.send(b.body(wire.Header{Generation: "g", First: first, Oldest: 1}, text(r)), node)
		return code
	}
	require.Equal(t, http.StatusOK, send("n3", 1, platformLines("agent", time.Now())))
	b.settled("n3")

	// As many questions as the store answers at a time, so that n2's waits.
	asked, release := make(chan struct{}), make(chan struct{})
	answered := make(chan error)
	const questions = 4
	for range questions {
		go func() {
			answered <- b.logs.Each(context.Background(), logstore.Selector{}, func(logstore.Entry) bool { asked <- struct{}{}; <-release; return false })
		}()
		<-asked
	}
	pushed, other := make(chan int), make(chan int)
	go func() { pushed <- send("n2", 1, podLines([]int64{time.Now().UnixNano()}, "line")) }()
	<-decoding
	go func() { other <- send("n3", 2, platformLines("agent", time.Now())) }()
	select {
	case code := <-other:
		require.Equal(t, http.StatusOK, code)
	case <-time.After(30 * time.Second):
		require.Fail(t, "the other node waits")
	}
	select {
	case <-pushed:
		require.Fail(t, "nothing was looked for")
	default:
	}
	close(release)
	for range questions {
		require.NoError(t, <-answered)
	}
	require.Equal(t, http.StatusOK, <-pushed)
}

// A chunk is stored in parts. When it comes again because one could not be, the others are recognised.
func TestStoredInParts(t *testing.T) {
	b := newBench(t)
	var times []time.Time
	for i := range 2*batchLines + 100 {
		times = append(times, time.Now().Add(-time.Minute+time.Duration(i)))
	}
	b.push(platformLines("agent", times...))
	b.logs.Flush()
	require.Len(t, b.entries(), len(times))
	g := b.settled("n2")
	b.in.torn(g)
	b.push(platformLines("agent", times...))
	b.logs.Flush()
	require.Len(t, b.entries(), len(times))
	require.Equal(t, int64(len(times)), b.status().Repeated)
	b.push(platformLines("agent", time.Now()))
	require.False(t, b.in.mayBeStored(g, time.Now()))
}

func TestSamples(t *testing.T) {
	b := newBench(t)
	b.withMetrics()
	now := time.Now().UnixMilli()
	sample := func(name string, value float64, pairs ...string) wire.Sample {
		s := wire.Sample{Name: name, Value: value}
		for p := range slices.Chunk(pairs, 2) {
			if s.Labels == nil {
				s.Labels = map[string]string{}
			}
			s.Labels[p[0]] = p[1]
		}
		return s
	}
	at := func(ms int64, values ...wire.Sample) wire.Record {
		return wire.Record{Samples: &wire.Samples{Time: ms, Values: values}}
	}
	get := func() map[string]float64 {
		q, err := b.metrics.Queryable().Querier(now-time.Hour.Milliseconds(), now+time.Hour.Milliseconds())
		require.NoError(t, err)
		defer q.Close()
		all := map[string]float64{}
		set := q.Select(t.Context(), true, nil, labels.MustNewMatcher(labels.MatchEqual, "job", "node"))
		for set.Next() {
			it := set.At().Iterator(nil)
			for it.Next() != 0 {
				_, v := it.At()
				all[set.At().Labels().String()] += v
			}
		}
		require.NoError(t, set.Err())
		return all
	}
	b.push(at(now, sample("node_load1", 1.5), sample("node_cpu_seconds_total", 7, "cpu", "0", "mode", "idle")))
	want := map[string]float64{
		`{__name__="node_load1", instance="n2", job="node", node="n2"}`:                                   1.5,
		`{__name__="node_cpu_seconds_total", cpu="0", instance="n2", job="node", mode="idle", node="n2"}`: 7,
	}
	require.Equal(t, want, get())
	require.Equal(t, int64(2), b.status().Samples)

	// The same again, with a new number, adds nothing.
	b.push(at(now, sample("node_load1", 1.5)))
	b.push(at(now, sample("node_load1", 9)))
	require.Equal(t, want, get())

	many := make([]wire.Sample, maxSamples+1)
	for i := range many {
		many[i] = sample("node_load1", 1)
	}
	devices := make([]wire.Sample, maxSamples)
	for i := range devices {
		devices[i] = sample("node_network_up", 1, "device", fmt.Sprint("eth", i))
	}
	for what, tc := range map[string]struct {
		record   wire.Record
		rejected int
		reason   string
	}{
		"another metric":     {at(now, sample("up", 1)), 1, `"up" is not a metric of a node`},
		"a metric of pods":   {at(now, sample("istio_requests_total", 1, "pod", "x")), 1, "is not a metric of a node"},
		"another node":       {at(now, sample("node_load1", 1, "node", "n1")), 1, "has other labels"},
		"another job":        {at(now, sample("node_network_up", 1, "device", "eth0", "job", "kube-state")), 1, "has other labels"},
		"another name":       {at(now, sample("node_load1", 1, "__name__", "up")), 1, "has other labels"},
		"a long label":       {at(now, sample("node_network_up", 1, "device", strings.Repeat("x", 257))), 1, "more than 256 bytes"},
		"the future":         {at(now+4*time.Minute.Milliseconds(), sample("node_load1", 1)), 1, "in the future"},
		"the past":           {at(now-8*24*time.Hour.Milliseconds(), sample("node_load1", 1)), 1, "older than the store keeps"},
		"older than others":  {at(now-2*time.Hour.Milliseconds(), sample("node_load1", 1)), 1, "older than the store accepts"},
		"too many at a time": {at(now, many...), len(many), "more than 2000 samples"},
	} {
		before := b.status().Rejected
		b.push(tc.record)
		require.Equal(t, before+int64(tc.rejected), b.status().Rejected, what)
		require.Contains(t, b.status().Reason, tc.reason, what)
		require.Equal(t, want, get(), what)
	}
	before := b.status()
	b.push(at(now, devices...))
	require.Equal(t, int64(maxSeries-2), b.status().Samples-before.Samples, "two series are there")
	require.Contains(t, b.status().Reason, "more than 2000 series")
}

// A node is believed about itself only.
func TestHostileLines(t *testing.T) {
	b := newBench(t)
	b.opts.Pod = func(uid string) (Pod, bool, bool) {
		switch uid {
		case onePodUID:
			return onePod, true, true
		case "other":
			return Pod{"shop", "other", "n3"}, true, true
		}
		return Pod{}, false, true
	}
	b.restart()
	now := time.Now()
	good := func(change func(*wire.Lines)) wire.Record {
		r := podLines([]int64{now.UnixNano()}, "line")
		change(r.Lines)
		return r
	}
	label := func(name, value string) wire.Record {
		return good(func(l *wire.Lines) { l.Labels[name] = value })
	}
	meta := func(name, value string) wire.Record {
		return good(func(l *wire.Lines) { l.Metadata[name] = value })
	}
	for what, tc := range map[string]struct {
		record any
		reason string
	}{
		"another node's pod": {good(func(l *wire.Lines) { l.Labels["pod"], l.Metadata["uid"] = "other", "other" }), "is not \"other\" in namespace \"shop\" on this node"},
		"another name":       {label("pod", "other"), "on this node"},
		"another namespace":  {label("namespace", "kube-system"), "on this node"},
		"another pod's UID":  {meta("uid", "other"), "on this node"},
		"no UID":             {good(func(l *wire.Lines) { delete(l.Metadata, "uid") }), "there is no pod"},
		"a long UID":         {meta("uid", strings.Repeat("u", 100)), "there is no pod"},
		"the label node":     {label("node", "n1"), "have 5 labels"},
		"a label of its own": {label("app", "x"), "have 5 labels"},
		"no stream":          {good(func(l *wire.Lines) { delete(l.Labels, "stream") }), "have 5 labels"},
		"another stream":     {label("stream", "x"), "not a stream"},
		"no container name":  {label("container", "App"), "not the name of a container"},
		"a long container":   {label("container", strings.Repeat("c", 64)), "not the name of a container"},
		"the objects' job":   {label("job", "objects"), "does not send lines with the job \"objects\""},
		"the events' job":    {label("job", "events"), "does not send lines"},
		"no job":             {good(func(l *wire.Lines) { delete(l.Labels, "job") }), "does not send lines"},
		"other metadata":     {meta("source", "polymesh"), "no metadata \"source\""},
		"a long value":       {meta("restart", strings.Repeat("1", 257)), "or not so long"},
		"no number":          {meta("restart", "one"), "is not a number"},
		"the future":         {good(func(l *wire.Lines) { l.Times[0] = now.Add(4 * time.Minute).UnixNano() }), "in the future"},
		"the past":           {good(func(l *wire.Lines) { l.Times[0] = now.Add(-8 * 24 * time.Hour).UnixNano() }), "older than the store keeps"},
		"before 1970":        {good(func(l *wire.Lines) { l.Times[0] = -1 }), "older than the store keeps"},
		"fewer times":        {good(func(l *wire.Lines) { l.Times = nil }), "as many times as lines"},
		"no lines":           {good(func(l *wire.Lines) { l.Times, l.Texts = nil, nil }), "as many times as lines"},
		"no labels":          {wire.Record{Lines: &wire.Lines{Times: []int64{1}, Texts: []string{"x"}}}, "does not send lines"},
		"no JSON":            {"x", "a record cannot be read"},
		"another form":       {`{"lines":{"labels":["x"]}}`, "a record cannot be read"},
	} {
		before := b.status0()
		b.push(tc.record)
		after := b.status()
		require.Equal(t, before.Rejected+1, after.Rejected, what)
		require.Contains(t, after.Reason, tc.reason, what)
		require.Empty(t, b.entries(), what)
	}
	require.Contains(t, b.in.Problem(), "of node n2 were rejected")

	// The pod in the kernel's line is left out if it is another node's.
	b.push(wire.Record{Lines: &wire.Lines{Labels: map[string]string{"job": journal.JobKernel}, Times: []int64{now.UnixNano()}, Texts: []string{"killed"}, Metadata: map[string]string{"uid": "other", "pid": "1"}}})
	require.Equal(t, []logstore.Field{{Name: "pid", Value: "1"}}, b.entries()[0].Metadata)

	// Streams are bounded, and what is before them in a chunk is stored.
	var records []any
	for i := range maxStreams + 5 {
		records = append(records, label("container", fmt.Sprint("c", i)))
	}
	stored := b.status().Lines
	b.push(records...)
	require.Equal(t, int64(maxStreams-2), b.status().Lines-stored, "the kernel's is one, and that of the lines with another time")
	require.Contains(t, b.status().Reason, "more than 4000 streams")
}

// status0 is the status of the only node, or of none.
func (b *bench) status0() NodeStatus {
	if all := b.in.Nodes(); len(all) == 1 {
		return all[0]
	}
	return NodeStatus{}
}

// slowly is a body that does not arrive until the connection's deadline.
type slowly struct{}

func (slowly) Read([]byte) (int, error) { return 0, os.ErrDeadlineExceeded }

func TestHostilePushes(t *testing.T) {
	b := newBench(t)
	fine := b.body(wire.Header{Generation: "g", First: 1, Oldest: 1}, "")
	gap := b.body(wire.Header{Generation: "g", First: 1, Oldest: 1}, "")
	gap = append(gap, b.encoder.Chunk(nil, wire.Info{Number: 3}, nil)...)
	for what, tc := range map[string]struct {
		nodes []string
		body  []byte
		code  int
		text  string
	}{
		"no node":               {nil, fine, 403, "only the server"},
		"two nodes":             {[]string{"n2", "n3"}, fine, 403, "only the server"},
		"no name":               {[]string{""}, fine, 403, "only the server"},
		"a name of another":     {[]string{"N2"}, fine, 403, "only the server"},
		"a long name":           {[]string{strings.Repeat("n", 254)}, fine, 403, "only the server"},
		"the store's own node":  {[]string{"n1"}, fine, 403, "itself"},
		"no body":               {[]string{"n2"}, nil, 400, "no header"},
		"another version":       {[]string{"n2"}, b.body(wire.Header{Version: 2, Generation: "g", First: 1, Oldest: 1}), 400, "the same version"},
		"cut off":               {[]string{"n2"}, fine[:len(fine)-1], 400, "no end"},
		"a gap within":          {[]string{"n2"}, gap, 400, "no gaps"},
		"too large":             {[]string{"n2"}, make([]byte, wire.MaxBody+1), 413, "at most"},
		"a header without end":  {[]string{"n2"}, bytes.Repeat([]byte(" "), wire.MaxBody), 400, "no header"},
		"nothing but a header":  {[]string{"n2"}, b.body(wire.Header{Generation: "g2", First: 1, Oldest: 1}), 200, `"position":0`},
		"a number near the end": {[]string{"n4"}, b.body(wire.Header{Generation: "g", First: 1<<64 - 1, Oldest: 1<<64 - 1}, ""), 200, `"position":18446744073709551615`},
	} {
		code, _, answer := b.send(tc.body, tc.nodes...)
		require.Equal(t, tc.code, code, what)
		require.Contains(t, answer, tc.text, what)
	}
	r := httptest.NewRequest(http.MethodGet, Path, nil)
	r.Header.Set(NodeHeader, "n2")
	w := httptest.NewRecorder()
	b.in.ServeHTTP(w, r)
	require.Equal(t, http.StatusMethodNotAllowed, w.Code)

	// One node does not push twice at a time, nor faster than it may.
	n, err := b.in.begin("n5")
	require.NoError(t, err)
	code, h, _ := b.send(fine, "n5")
	require.Equal(t, http.StatusTooManyRequests, code)
	require.Equal(t, "2", h.Get("Retry-After"))
	b.in.end(n)
	n.budget = budget{left: -3 * bytesPerSecond, last: time.Now()}
	code, h, answer := b.send(fine, "n5")
	require.Equal(t, http.StatusOK, code)
	require.Equal(t, "3", h.Get("Retry-After"))
	require.Contains(t, answer, `"position":0`)
	n.budget = budget{}
	code, h, answer = b.send(fine, "n5")
	require.Equal(t, http.StatusOK, code)
	require.Empty(t, h.Get("Retry-After"))
	require.Contains(t, answer, `"position":1`)

	// Nor does one that sends slowly try again at once.
	slow := httptest.NewRequest(http.MethodPost, Path, slowly{})
	slow.Header.Set(NodeHeader, "n8")
	w = httptest.NewRecorder()
	b.in.ServeHTTP(w, slow)
	require.Equal(t, http.StatusRequestTimeout, w.Code)
	code, h, answer = b.send(fine, "n8")
	require.Equal(t, http.StatusTooManyRequests, code)
	require.Contains(t, answer, "did not arrive in time")
	require.NotEmpty(t, h.Get("Retry-After"))
	b.in.nodes["n8"].barred = time.Now()
	code, _, _ = b.send(fine, "n8")
	require.Equal(t, http.StatusOK, code)

	// Nor do many have their pushes in memory at a time.
	for range maxPushes {
		b.in.pushes <- struct{}{}
	}
	code, h, _ = b.send(fine, "n6")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.NotEmpty(t, h.Get("Retry-After"))
	for range maxPushes {
		<-b.in.pushes
	}

	// Many nodes: those of long ago make room.
	b.in.nodes["n6"].status.Pushed = time.Now()
	for i := len(b.in.nodes); i < maxNodes; i++ {
		b.in.nodes[fmt.Sprint("old", i)] = newNode("old")
		b.in.nodes[fmt.Sprint("old", i)].status.Pushed = time.Now()
	}
	code, _, answer = b.send(fine, "n7")
	require.Equal(t, http.StatusServiceUnavailable, code, answer)
	b.in.nodes["old990"].status.Pushed = time.Now().Add(-forgotten - time.Hour)
	code, _, answer = b.send(fine, "n7")
	require.Equal(t, http.StatusOK, code, answer)

	// So do the runs of a collector.
	for i := range 3 * maxGenerations {
		code, _, _ := b.send(b.body(wire.Header{Generation: fmt.Sprint("g", i), First: 1, Oldest: 1}, ""), "n7")
		require.Equal(t, http.StatusOK, code)
	}
	require.Len(t, b.in.nodes["n7"].generations, maxGenerations)
}

// A pod of which the node knows before the store does.
func TestUnknownPod(t *testing.T) {
	b := newBench(t)
	known, final := false, false
	b.opts.Pod = func(string) (Pod, bool, bool) { return onePod, known, final }
	b.restart()
	record := text(podLines([]int64{time.Now().UnixNano()}, "line"))
	send := func() (int, string, string) {
		code, h, answer := b.send(b.body(wire.Header{Generation: "g", First: 1, Oldest: 1}, record), "n2")
		return code, h.Get("Retry-After"), answer
	}
	code, retry, _ := send()
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.NotEmpty(t, retry)
	final = true
	code, retry, answer := send()
	require.Equal(t, http.StatusOK, code)
	require.NotEmpty(t, retry)
	require.Contains(t, answer, `"position":0`)
	known = true
	_, retry, answer = send()
	require.Empty(t, retry)
	require.Contains(t, answer, `"position":1`)
	require.Len(t, b.entries(), 1)

	// One that does not become known, and many of them.
	known = false
	b.number = 1
	b.in.nodes["n2"].unknown["x"] = time.Now().Add(-podWait)
	unknown := podLines([]int64{1}, "line")
	unknown.Lines.Metadata["uid"] = "x"
	require.Equal(t, uint64(2), b.push(unknown).Position)
	require.Contains(t, b.status().Reason, "there is no pod")
	for i := range 2 * maxUnknown {
		unknown.Lines.Metadata["uid"] = fmt.Sprint("many", i)
		b.send(b.body(wire.Header{Generation: "h", First: 1, Oldest: 1}, text(unknown)), "n2")
	}
	require.Len(t, b.in.nodes["n2"].unknown, maxUnknown)

	// A new one is waited for again when those are old, and not before.
	last := func() string {
		unknown.Lines.Metadata["uid"] = "last"
		_, h, _ := b.send(b.body(wire.Header{Generation: "i", First: 1, Oldest: 1}, text(unknown)), "n2")
		return h.Get("Retry-After")
	}
	require.Empty(t, last())
	b.in.nodes["n2"].generations = nil
	for uid := range b.in.nodes["n2"].unknown {
		b.in.nodes["n2"].unknown[uid] = time.Now().Add(-unknownAge - time.Second)
	}
	require.NotEmpty(t, last())
	require.Len(t, b.in.nodes["n2"].unknown, 1)
}

// authority signs the certificates of a test, in the folder of the test.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) *authority {
	a := &authority{t: t, dir: dir}
	a.cert, a.key = a.sign("ca.crt", &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a *authority) sign(file string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	require.NoError(a.t, err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if !c.IsCA {
		private, err := x509.MarshalPKCS8PrivateKey(key)
		require.NoError(a.t, err)
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	}
	require.NoError(a.t, os.WriteFile(filepath.Join(a.dir, file), text, 0o600))
	signed, err := x509.ParseCertificate(der)
	require.NoError(a.t, err)
	return signed, key
}

// child is a process that can be killed and started again.
type child struct {
	t             *testing.T
	role, address string
	dir           string
	cmd           *exec.Cmd
}

func (c *child) start() {
	c.t.Helper()
	c.cmd = exec.Command(os.Args[0])
	c.cmd.Env = append(os.Environ(), roleVar+"="+c.role, dirVar+"="+c.dir, addressVar+"="+c.address)
	c.cmd.Stderr = os.Stderr
	require.NoError(c.t, c.cmd.Start())
}

func (c *child) kill() {
	if c.cmd != nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		c.cmd = nil
	}
}

// Whatever is killed, and however often, and though the store is away for a while: all lines arrive once, and in order.
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	dir := t.TempDir()
	ca := newAuthority(t, dir)
	ca.sign("server.pem", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	ca.sign("node.pem", &x509.Certificate{Subject: pkix.Name{CommonName: "system:node:n2"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addr().String()
	require.NoError(t, l.Close())
	store, collector := &child{t: t, role: "store", address: address, dir: dir}, &child{t: t, role: "collector", address: address, dir: dir}
	defer store.kill()
	defer collector.kill()

	logs := filepath.Join(dir, "pods", strings.Join([]string{onePod.Namespace, onePod.Name, onePodUID}, "_"), "app")
	require.NoError(t, os.MkdirAll(logs, 0o755))
	f, err := os.Create(filepath.Join(logs, "0.log"))
	require.NoError(t, err)
	defer f.Close()
	var want []string
	write := func(until time.Time) {
		for time.Now().Before(until) {
			for range 20 {
				want = append(want, fmt.Sprintf("line %d", len(want)))
				_, err := fmt.Fprintf(f, "%s stdout F %s\n", time.Now().UTC().Format(time.RFC3339Nano), want[len(want)-1])
				require.NoError(t, err)
			}
			time.Sleep(20 * time.Millisecond) // the rate of the lines
		}
	}
	store.start()
	collector.start()
	random := mathrand.New(mathrand.NewPCG(1, uint64(time.Now().UnixNano())))
	for i := range 10 {
		write(time.Now().Add(time.Duration(500+random.IntN(2500)) * time.Millisecond))
		switch which := []*child{collector, store}[i%2]; {
		case i == 5:
			store.kill()
			write(time.Now().Add(5 * time.Second))
			store.start()
		default:
			which.kill()
			which.start()
		}
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "node.pem"), filepath.Join(dir, "node.pem"))
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}
	var got []string
	var last stored
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		answer, err := client.Get("https://" + address + "/stored")
		if err != nil {
			continue
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		require.NoError(t, err)
		last, got = stored{}, nil
		require.NoError(t, json.Unmarshal(body, &last), string(body))
		for _, e := range last.Entries {
			got = append(got, e.Line)
		}
		if len(got) >= len(want) {
			break
		}
	}
	if !slices.Equal(want, got) {
		counts := map[string]int{}
		for _, line := range got {
			counts[line]++
		}
		missing, twice := 0, 0
		for _, line := range want {
			switch counts[line] {
			case 0:
				missing++
			case 1:
			default:
				twice++
			}
		}
		t.Fatalf("%d lines were written and %d are stored, %d are missing and %d there more than once: %+v", len(want), len(got), missing, twice, last.Nodes)
	}
	t.Logf("%d lines, %+v", len(want), last.Nodes)
}

// Who has no certificate of the cluster's does not get in, and a node with a new one is let in again.
func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir)
	ca.sign("server.pem", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	elsewhere := t.TempDir()
	newAuthority(t, elsewhere).sign("node.pem", &x509.Certificate{Subject: pkix.Name{CommonName: "system:node:n2"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	b := newBench(t)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	server, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.pem"))
	require.NoError(t, err)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set(NodeHeader, strings.TrimPrefix(r.TLS.PeerCertificates[0].Subject.CommonName, "system:node:"))
		b.in.ServeHTTP(w, r)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots}
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	defer s.Close()
	buffer, err := push.Open(push.Options{Dir: filepath.Join(dir, "buffer"), MaxBytes: 64 << 20, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer buffer.Close()
	wrong, err := os.ReadFile(filepath.Join(elsewhere, "node.pem"))
	require.NoError(t, err)
	cert := filepath.Join(dir, "node.pem")
	require.NoError(t, os.WriteFile(cert, wrong, 0o600))
	sender := push.NewSender(push.SenderOptions{URL: s.URL, CA: filepath.Join(dir, "ca.crt"), Cert: cert, Key: cert, Buffer: buffer, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- sender.Run(ctx) }()
	require.NoError(t, buffer.Append([]logstore.Entry{{Time: time.Now(), Line: "line", Labels: []logstore.Field{{Name: "job", Value: journal.JobPolymesh}, {Name: "container", Value: "agent"}}}}))
	require.Eventually(t, func() bool { return sender.Problem() != "" }, 30*time.Second, 10*time.Millisecond)
	require.Empty(t, b.in.Nodes())
	require.Zero(t, sender.Numbers()["pushed"])

	ca.sign("node.pem", &x509.Certificate{Subject: pkix.Name{CommonName: "system:node:n2"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	require.Eventually(t, func() bool { return len(b.entries()) == 1 }, time.Minute, 50*time.Millisecond)
	require.Eventually(t, func() bool { return sender.Problem() == "" }, time.Minute, 10*time.Millisecond)
	require.NotZero(t, sender.Numbers()["pushed"])
	cancel()
	require.NoError(t, <-done)
}
