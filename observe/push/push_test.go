package push

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/journal"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/wire"
)

var (
	_ podlogs.Store = (*Buffer)(nil)
	_ journal.Store = (*Buffer)(nil)
)

func open(t *testing.T, dir string, most int64) *Buffer {
	t.Helper()
	b, err := Open(Options{Dir: dir, MaxBytes: most, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return b
}

func line(i int, text string) logstore.Entry {
	return logstore.Entry{
		Time: time.Unix(0, int64(i)).UTC(), Line: text, Metadata: []logstore.Field{{Name: "uid", Value: "u"}},
		Labels: []logstore.Field{{Name: "job", Value: "pods"}, {Name: "node", Value: "n"}, {Name: "pod", Value: "p"}, {Name: "workload", Value: "w"}},
	}
}

// drain returns the texts of all chunks that wait, as a store that takes everything gets them.
func drain(t *testing.T, b *Buffer, durable bool) (texts []string, headers []wire.Header) {
	t.Helper()
	d, err := wire.NewDecoder()
	require.NoError(t, err)
	defer d.Close()
	for {
		batch, err := b.next(pushBytes)
		require.NoError(t, err)
		if batch == nil {
			return texts, headers
		}
		headers = append(headers, batch.header)
		for chunks := batch.chunks; len(chunks) > 0; {
			_, chunk, rest, err := wire.CutFrame(chunks)
			require.NoError(t, err)
			_, err = d.Records(chunk, func(r wire.Record) error {
				if r.Lines != nil {
					texts = append(texts, r.Lines.Texts...)
				}
				return nil
			})
			require.NoError(t, err)
			chunks = rest
		}
		a := wire.Answer{Position: batch.last}
		if durable {
			a.Durable = batch.last
		}
		b.answered(batch, a)
	}
}

func names(n int, text string) (all []string, entries []logstore.Entry) {
	for i := range n {
		all = append(all, fmt.Sprintf("%s %d", text, i))
		entries = append(entries, line(i, all[i]))
	}
	return all, entries
}

// What a run has kept is sent by the next one, as what it is.
func TestRuns(t *testing.T) {
	dir := t.TempDir()
	b := open(t, dir, 64<<20)
	first, entries := names(5000, strings.Repeat("first ", 30))
	for part := range slices.Chunk(entries, 100) {
		require.NoError(t, b.Append(part))
	}
	require.Equal(t, uint64(5000), b.Mark())
	require.NoError(t, b.Close())
	require.Equal(t, b.Mark(), b.Durable())

	b = open(t, dir, 64<<20)
	second, entries := names(10, "second")
	require.NoError(t, b.Append(entries))
	b.mu.Lock()
	require.NoError(t, b.write())
	b.mu.Unlock()
	require.NotZero(t, b.Numbers()["waiting"])
	got, headers := drain(t, b, false)
	require.Equal(t, append(first, second...), got)
	require.Zero(t, b.Numbers()["waiting"])
	require.Greater(t, len(headers), 1)
	for _, h := range headers[:len(headers)-1] {
		require.Equal(t, headers[0].Generation, h.Generation)
	}
	last := headers[len(headers)-1]
	require.NotEqual(t, headers[0].Generation, last.Generation)
	require.Equal(t, uint64(1), last.First)

	// Nothing was durable at the store: the next run sends it all again.
	require.NoError(t, b.Close())
	b = open(t, dir, 64<<20)
	got, _ = drain(t, b, true)
	require.Equal(t, append(first, second...), got)
	require.NoError(t, b.Append(entries[:1]))
	got, _ = drain(t, b, true)
	require.Empty(t, got, "not a chunk yet")
	require.NoError(t, b.Close())
	b = open(t, dir, 64<<20)
	defer b.Close()
	got, _ = drain(t, b, true)
	require.Equal(t, []string{"second 0"}, got)
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Empty(t, files)
}

// The form of a record: what the store sets itself is not sent.
func TestRecords(t *testing.T) {
	b := open(t, t.TempDir(), 64<<20)
	defer b.Close()
	other := line(3, "c")
	other.Metadata = append(slices.Clone(other.Metadata), logstore.Field{Name: "dropped", Value: "7"})
	long := line(4, strings.Repeat("x", logstore.MaxLineBytes+1))
	require.NoError(t, b.Append([]logstore.Entry{line(1, "a"), line(2, "b"), other, long}))
	b.mu.Lock()
	require.NoError(t, b.write())
	b.mu.Unlock()
	batch, err := b.next(pushBytes)
	require.NoError(t, err)
	d, err := wire.NewDecoder()
	require.NoError(t, err)
	defer d.Close()
	var got []wire.Record
	for chunks := batch.chunks; len(chunks) > 0; {
		_, chunk, rest, err := wire.CutFrame(chunks)
		require.NoError(t, err)
		_, err = d.Records(chunk, func(r wire.Record) error { got = append(got, r); return nil })
		require.NoError(t, err)
		chunks = rest
	}
	require.Len(t, got, 3)
	require.Len(t, got[2].Lines.Texts[0], logstore.MaxLineBytes)
	got[2].Lines.Texts[0] = "long"
	labels := map[string]string{"job": "pods", "pod": "p"}
	require.Equal(t, []wire.Record{
		{Lines: &wire.Lines{Labels: labels, Metadata: map[string]string{"uid": "u"}, Times: []int64{1, 2}, Texts: []string{"a", "b"}}},
		{Lines: &wire.Lines{Labels: labels, Metadata: map[string]string{"uid": "u", "dropped": "7"}, Times: []int64{3}, Texts: []string{"c"}}},
		{Lines: &wire.Lines{Labels: labels, Metadata: map[string]string{"uid": "u"}, Times: []int64{4}, Texts: []string{"long"}}},
	}, got)
}

// However short lines are, the store takes the chunks.
func TestManyShortLines(t *testing.T) {
	b := open(t, t.TempDir(), 64<<20)
	defer b.Close()
	const n = 100_000
	for _, each := range []int{n, 1000, 1} {
		entries := make([]logstore.Entry, n)
		for i := range entries {
			entries[i] = line(i, "")
			entries[i].Metadata = []logstore.Field{{Name: "restart", Value: fmt.Sprint(i / each)}}
		}
		require.NoError(t, b.Append(entries))
		b.mu.Lock()
		require.NoError(t, b.write())
		b.mu.Unlock()
		got, _ := drain(t, b, true)
		require.Len(t, got, n)
	}
}

func TestGather(t *testing.T) {
	r := prometheus.NewRegistry()
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "g", Help: "h"}, []string{"l"})
	r.MustRegister(g, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "c", Help: "h"}, func() float64 { return 3 }))
	g.WithLabelValues("a").Set(1.5)
	g.WithLabelValues("b").Set(math.NaN())
	b := open(t, t.TempDir(), 64<<20)
	defer b.Close()
	require.NoError(t, b.Gather(r))
	var got wire.Record
	require.NoError(t, json.Unmarshal(b.pending[0].text, &got))
	require.InDelta(t, time.Now().UnixMilli(), got.Samples.Time, 10_000)
	require.Equal(t, []wire.Sample{{Name: "c", Value: 3}, {Name: "g", Labels: map[string]string{"l": "a"}, Value: 1.5}}, got.Samples.Values)
	require.Equal(t, uint32(2), b.pending[0].count)
}

// A crash cuts a file off anywhere. What was whole is sent, and a new run does not continue the file.
func TestTorn(t *testing.T) {
	dir := t.TempDir()
	b := open(t, dir, 64<<20)
	texts, entries := names(3, "line")
	for i := range entries {
		require.NoError(t, b.Append(entries[i:i+1]))
		b.mu.Lock()
		require.NoError(t, b.write())
		b.mu.Unlock()
	}
	require.NoError(t, b.Close())
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	whole, err := os.ReadFile(files[0])
	require.NoError(t, err)
	for cut := 0; cut < len(whole); cut += 7 {
		dir := t.TempDir()
		path := filepath.Join(dir, filepath.Base(files[0]))
		require.NoError(t, os.WriteFile(path, whole[:cut], 0o600))
		b := open(t, dir, 64<<20)
		require.NoError(t, b.Append(entries[:1]))
		b.mu.Lock()
		require.NoError(t, b.write())
		b.mu.Unlock()
		got, _ := drain(t, b, true)
		require.NoError(t, b.Close())
		require.Equal(t, texts[0], got[len(got)-1])
		require.Equal(t, texts[:len(got)-1], got[:len(got)-1])
	}
}

// The oldest are dropped, and counted; what the store has is no loss.
func TestBound(t *testing.T) {
	const most = 3 * segmentBytes
	dir := t.TempDir()
	b := open(t, dir, most)
	random, source := make([]byte, 40_000), rand.New(rand.NewPCG(1, 2))
	appended := 0
	fill := func(n int) {
		for range n {
			for i := range random {
				random[i] = byte('0' + source.IntN(64))
			}
			require.NoError(t, b.Append([]logstore.Entry{line(appended, fmt.Sprintf("%d %s", appended, random))}))
			appended++
			b.mu.Lock()
			require.NoError(t, b.write())
			b.mu.Unlock()
		}
	}
	size := func() (n int64) {
		files, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, f := range files {
			info, err := f.Info()
			require.NoError(t, err)
			n += info.Size()
		}
		return n
	}
	for b.Numbers()["dropped"] == 0 && appended < 5000 {
		fill(10)
		require.LessOrEqual(t, size(), int64(most)+wire.MaxChunk)
	}
	dropped := b.Numbers()["dropped"]
	require.NotZero(t, dropped)
	require.Contains(t, b.Problem(), fmt.Sprintf("%d lines and samples were dropped", dropped))
	got, headers := drain(t, b, false)
	require.Len(t, got, appended-int(dropped))
	number, _, _ := strings.Cut(got[0], " ")
	require.Equal(t, fmt.Sprint(dropped), number)
	require.Equal(t, headers[0].First, headers[0].Oldest)
	require.Equal(t, uint64(dropped)+1, headers[0].First)

	// All of it is at the store, though not durable there.
	fill(appended)
	drain(t, b, false)
	require.Less(t, b.Numbers()["dropped"]-dropped, int64(appended/2))
	require.NoError(t, b.Close())

	// A smaller limit.
	b = open(t, dir, segmentBytes)
	defer b.Close()
	require.LessOrEqual(t, size(), int64(segmentBytes)+wire.MaxChunk)
}

// The store has less than was thought: it was started again. What is still there is sent again.
func TestRewind(t *testing.T) {
	b := open(t, t.TempDir(), 64<<20)
	defer b.Close()
	texts, entries := names(10, "line")
	for i := range entries {
		require.NoError(t, b.Append(entries[i:i+1]))
		b.mu.Lock()
		require.NoError(t, b.write())
		b.mu.Unlock()
	}
	first, err := b.next(1)
	require.NoError(t, err)
	require.Equal(t, uint64(1), first.last, "one chunk, though it is larger than the limit")
	b.answered(first, wire.Answer{Position: 1})
	drain(t, b, false)
	b.answered(&batch{header: first.header, last: 10}, wire.Answer{Position: 4, Missing: true})
	got, headers := drain(t, b, false)
	require.Equal(t, texts[4:], got)
	require.Equal(t, uint64(5), headers[0].First)
	// One that says that it has more than there is.
	b.answered(&batch{header: first.header, last: 10}, wire.Answer{Position: 1 << 60, Durable: 1 << 60})
	require.NoError(t, b.Append(entries[:1]))
	b.mu.Lock()
	require.NoError(t, b.write())
	b.mu.Unlock()
	got, _ = drain(t, b, false)
	require.Equal(t, texts[:1], got)
}

// A line is written after a second, and its place may be saved after five more.
func TestWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := open(t, t.TempDir(), 64<<20)
		require.NoError(t, b.Append([]logstore.Entry{line(1, "a")}))
		time.Sleep(flushPeriod - time.Millisecond)
		synctest.Wait()
		batch, err := b.next(pushBytes)
		require.NoError(t, err)
		require.Nil(t, batch)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		batch, err = b.next(pushBytes)
		require.NoError(t, err)
		require.NotNil(t, batch)
		require.Zero(t, b.Durable())
		time.Sleep(syncPeriod)
		synctest.Wait()
		require.Equal(t, uint64(1), b.Durable())
		require.NoError(t, b.Close())
	})
}

// A disk that takes nothing: nothing is lost, nothing grows, and it is told.
func TestDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "buffer")
	b := open(t, dir, 64<<20)
	defer b.Close()
	require.NoError(t, os.Rename(dir, dir+".away"))
	texts, entries := names(3000, strings.Repeat("line ", 60))
	require.NoError(t, b.Append(entries), "in memory, as it was not known")
	err := b.Append(entries[:1])
	require.ErrorIs(t, err, ErrDisk)
	require.Contains(t, b.Problem(), ErrDisk.Error())
	require.Equal(t, uint64(len(entries)), b.Mark())
	require.NoError(t, os.Rename(dir+".away", dir))
	require.NoError(t, b.Append(entries[:1]))
	b.mu.Lock()
	require.NoError(t, b.write())
	b.mu.Unlock()
	require.Empty(t, b.Problem())
	got, _ := drain(t, b, true)
	require.Equal(t, append(texts, texts[0]), got)
}
