package podlogs

import (
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/checkpoint"
	"polymesh.dev/polymesh/observe/disktest"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
)

// machine is a folder of pods' logs, a store, and what reads the first into the second.
type machine struct {
	t     *testing.T
	dir   string
	root  string
	store *logstore.Store
	opts  Options

	tailer *Tailer
	stop   func()
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, dir: dir, root: filepath.Join(dir, "pods"), stop: func() {}}
	require.NoError(t, os.Mkdir(m.root, 0o700))
	m.openStore()
	t.Cleanup(func() { m.stop(); _ = m.store.Close() })
	return m
}

func (m *machine) openStore() {
	m.t.Helper()
	m.store = logstoretest.Open(m.t, rowstore.Options{Dir: filepath.Join(m.dir, "logs")})
	m.opts = options(m.dir, m.store)
}

func (m *machine) start() {
	m.t.Helper()
	tailer := New(m.opts)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tailer.Run(ctx) }()
	m.tailer = tailer
	m.stop = func() {
		cancel()
		require.NoError(m.t, <-done)
		m.stop = func() {}
	}
}

// lines gives what is stored of a pod, in order.
func (m *machine) lines(pod string) []logstore.Entry {
	m.t.Helper()
	var out []logstore.Entry
	sel := logstore.Selector{Matchers: []logstore.Matcher{{Name: "pod", Value: pod}}}
	require.NoError(m.t, m.store.Select(context.Background(), sel, func(e logstore.Entry) bool {
		out = append(out, e)
		return true
	}))
	return out
}

func texts(entries []logstore.Entry) []string {
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.Line)
	}
	return out
}

// eventually waits until a pod has these lines.
func (m *machine) eventually(pod string, want ...string) []logstore.Entry {
	m.t.Helper()
	var got []logstore.Entry
	if !assertEventually(func() bool { got = m.lines(pod); return slices.Equal(want, texts(got)) }) {
		require.Equal(m.t, want, texts(got))
	}
	return got
}

func assertEventually(condition func() bool) bool {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	return false
}

func (m *machine) path(elem ...string) string {
	return filepath.Join(append([]string{m.root}, elem...)...)
}

// write appends to a log, making the folders.
func (m *machine) write(file, text string) {
	m.t.Helper()
	require.NoError(m.t, os.MkdirAll(filepath.Dir(m.path(file)), 0o755))
	f, err := os.OpenFile(m.path(file), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	require.NoError(m.t, err)
	_, err = io.WriteString(f, text)
	require.NoError(m.t, err)
	require.NoError(m.t, f.Close())
}

func cri(at time.Time, stream, tag, text string) string {
	return at.UTC().Format(time.RFC3339Nano) + " " + stream + " " + tag + " " + text + "\n"
}

func now() string { return cri(time.Now(), "stdout", "F", "x") }

const uid = "0b6b1d3a-0000-4000-8000-000000000001"

func TestLinesOfAPod(t *testing.T) {
	m := newMachine(t)
	m.opts.Workload = func(namespace, pod, id string) (string, bool) {
		return "web", namespace == "shop" && pod == "web-7d4b9c6f5d-x2x9z" && id == uid
	}
	at := time.Now().UTC().Add(-time.Minute).Round(0)
	log := "shop_web-7d4b9c6f5d-x2x9z_" + uid + "/app/0.log"
	m.write(log, cri(at, "stdout", "F", "before the start"))
	m.start()
	m.eventually("web-7d4b9c6f5d-x2x9z", "before the start")
	m.write(log, cri(at.Add(1), "stderr", "F", "second")+cri(at.Add(2), "stdout", "P", "a long ")+cri(at.Add(3), "stderr", "F", "between"))
	m.write(log, cri(at.Add(4), "stdout", "P", "li")+cri(at.Add(5), "stdout", "F", "ne"))
	m.write(log, cri(at.Add(6), "stdout", "F", "")+cri(at.Add(7), "stdout", "F:tag", "  spaces  stay "))
	got := m.eventually("web-7d4b9c6f5d-x2x9z", "before the start", "second", "a long line", "between", "", "  spaces  stay ")
	require.Equal(t, at, got[0].Time)
	require.Equal(t, []logstore.Field{
		{Name: "container", Value: "app"}, {Name: "job", Value: "pods"}, {Name: "namespace", Value: "shop"}, {Name: "node", Value: "node-1"},
		{Name: "pod", Value: "web-7d4b9c6f5d-x2x9z"}, {Name: "stream", Value: "stdout"}, {Name: "workload", Value: "web"},
	}, got[0].Labels)
	require.ElementsMatch(t, []logstore.Field{{Name: MetaUID, Value: uid}, {Name: MetaRestart, Value: "0"}}, got[0].Metadata)
	require.Equal(t, "stderr", logstore.Value(got[1].Labels, "stream"))

	// A line that is only half written is not a line yet.
	text := cri(at.Add(8), "stdout", "F", "written in two pieces")
	m.write(log, text[:50])
	m.write(log, text[50:])
	// The container is restarted, another one comes.
	m.write(strings.Replace(log, "0.log", "1.log", 1), cri(at.Add(9), "stdout", "F", "again"))
	m.write(strings.Replace(log, "app", "istio-proxy", 1), cri(at.Add(10), "stdout", "F", "side"))
	got = m.eventually("web-7d4b9c6f5d-x2x9z", "before the start", "second", "a long line", "between", "", "  spaces  stay ",
		"written in two pieces", "again", "side")
	require.Equal(t, "1", logstore.Value(got[7].Metadata, MetaRestart))
	require.Equal(t, "istio-proxy", logstore.Value(got[8].Labels, "container"))
	require.Equal(t, int64(9), m.tailer.counts().lines)
	require.Empty(t, m.tailer.Problem())
}

func TestEqualTimesKeepTheirOrder(t *testing.T) {
	m := newMachine(t)
	at := time.Now().UTC().Add(-time.Minute)
	var text strings.Builder
	var want []string
	for i := range 100 {
		want = append(want, fmt.Sprint(99-i))
		text.WriteString(cri(at, "stdout", "F", want[i]))
	}
	m.write("shop_web_"+uid+"/app/0.log", text.String())
	m.start()
	m.eventually("web", want...)
}

func TestDeletedPod(t *testing.T) {
	m := newMachine(t)
	m.start()
	log := "shop_job-x_" + uid + "/app/0.log"
	m.write(log, now())
	m.eventually("job-x", "x")
	// Its last words come right before the end.
	m.write(log, cri(time.Now(), "stdout", "F", "last"))
	require.NoError(t, os.RemoveAll(m.path("shop_job-x_"+uid)))
	m.eventually("job-x", "x", "last")
	require.True(t, assertEventually(func() bool { return m.tailer.counts().pods == 0 && m.tailer.counts().files == 0 }), "and it is forgotten")
}

// TestShortPod is one that is gone before its workload could be known.
func TestShortPod(t *testing.T) {
	m := newMachine(t)
	m.opts.Workload = func(string, string, string) (string, bool) { return "", false }
	m.start()
	m.write("shop_api-7d4b9c6f5d-x2x9z_"+uid+"/app/0.log", now())
	require.True(t, assertEventually(func() bool { return m.tailer.counts().files == 1 }))
	require.NoError(t, os.RemoveAll(m.path("shop_api-7d4b9c6f5d-x2x9z_"+uid)))
	got := m.eventually("api-7d4b9c6f5d-x2x9z", "x")
	require.Equal(t, "api", logstore.Value(got[0].Labels, "workload"))
}

func TestRootComesAndGoes(t *testing.T) {
	m := newMachine(t)
	require.NoError(t, os.Remove(m.root))
	m.start()
	m.write("shop_a_"+uid+"/app/0.log", now())
	m.eventually("a", "x")
	require.NoError(t, os.RemoveAll(m.root))
	require.True(t, assertEventually(func() bool { return m.tailer.counts().pods == 0 }))
	m.write("shop_b_"+uid+"/app/0.log", now())
	m.eventually("b", "x")
}

// containerd writes a log as containerd does, and the kubelet rotates it.
type containerd struct {
	m    *machine
	dir  string
	file *os.File
	next int
}

func newContainerd(m *machine, dir string) *containerd {
	require.NoError(m.t, os.MkdirAll(m.path(dir), 0o755))
	c := &containerd{m: m, dir: dir}
	c.reopen()
	return c
}

func (c *containerd) reopen() {
	f, err := os.OpenFile(c.m.path(c.dir, "0.log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	require.NoError(c.m.t, err)
	if c.file != nil {
		require.NoError(c.m.t, c.file.Close())
	}
	c.file = f
}

// log writes numbered lines, some of them in parts.
func (c *containerd) log(n int) {
	var b strings.Builder
	for range n {
		text := strconv.Itoa(c.next)
		if c.next%10 == 0 {
			b.WriteString(cri(time.Now(), "stdout", "P", text[:1]))
			text = text[1:]
		}
		b.WriteString(cri(time.Now(), "stdout", "F", text))
		c.next++
	}
	_, err := c.file.WriteString(b.String())
	require.NoError(c.m.t, err)
}

// rotate moves the log away as of some time; between lines are written in the moment before containerd opens the new one.
func (c *containerd) rotate(at time.Time, between int) string {
	name := "0.log." + at.Format("20060102-150405")
	require.NoError(c.m.t, os.Rename(c.m.path(c.dir, "0.log"), c.m.path(c.dir, name)))
	c.log(between)
	c.reopen()
	return name
}

// pack compresses a log that was moved away.
func (c *containerd) pack(name string) {
	in, err := os.ReadFile(c.m.path(c.dir, name))
	require.NoError(c.m.t, err)
	out, err := os.Create(c.m.path(c.dir, name+".tmp"))
	require.NoError(c.m.t, err)
	z := gzip.NewWriter(out)
	_, err = z.Write(in)
	require.NoError(c.m.t, err)
	require.NoError(c.m.t, z.Close())
	require.NoError(c.m.t, out.Close())
	require.NoError(c.m.t, os.Rename(c.m.path(c.dir, name+".tmp"), c.m.path(c.dir, name+".gz")))
	require.NoError(c.m.t, os.Remove(c.m.path(c.dir, name)))
}

func (m *machine) numbers(pod string, n int) {
	m.t.Helper()
	want := make([]string, n)
	for i := range want {
		want[i] = strconv.Itoa(i)
	}
	var got []string
	ok := assertEventually(func() bool { got = texts(m.lines(pod)); return slices.Equal(want, got) })
	if ok {
		return
	}
	seen := map[string]int{}
	for _, l := range got {
		seen[l]++
	}
	lost, twice := 0, 0
	for _, w := range want {
		switch {
		case seen[w] == 0:
			lost++
		case seen[w] > 1:
			twice++
		}
	}
	m.t.Fatalf("of %d lines %d are lost and %d stored twice; %d in all", n, lost, twice, len(got))
}

// TestRotationUnderLoad: 5,000 lines a second for some seconds, the log is moved away every 700 ms and compressed after the next move.
func TestRotationUnderLoad(t *testing.T) {
	m := newMachine(t)
	m.start()
	c := newContainerd(m, "shop_noisy_"+uid+"/app")
	at := time.Now()
	last := ""
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	var kept []string
	for i := range 500 {
		<-ticker.C
		c.log(50)
		if i%70 == 69 {
			at = at.Add(time.Second)
			name := c.rotate(at, 30)
			if last != "" {
				c.pack(last)
				kept = append(kept, last+".gz")
			}
			last = name
			if len(kept) > 3 {
				require.NoError(t, os.Remove(m.path(c.dir, kept[0])))
				kept = kept[1:]
			}
		}
	}
	m.numbers("noisy", c.next)
	n := m.tailer.counts()
	require.Equal(t, int64(c.next), n.lines)
	require.Zero(t, n.dropped+n.malformed+n.refused)
}

// TestStoppedMeanwhile: everything that can happen to a file happens while nobody reads.
func TestStoppedMeanwhile(t *testing.T) {
	m := newMachine(t)
	c := newContainerd(m, "shop_web_"+uid+"/app")
	at := time.Now()
	m.start()
	c.log(1000)
	m.numbers("web", c.next)
	require.True(t, assertEventually(func() bool { _, err := os.Stat(m.opts.State); return err == nil }))
	m.stop()

	c.log(500)
	first := c.rotate(at.Add(time.Second), 5)
	c.log(500)
	m.start()
	m.numbers("web", c.next)
	waitSaved(m, "0.log")
	m.stop()

	c.log(500)
	second := c.rotate(at.Add(2*time.Second), 5)
	c.log(500)
	c.rotate(at.Add(3*time.Second), 0)
	c.pack(first)
	c.pack(second) // read up to its middle
	c.log(500)
	m.write(filepath.Join(c.dir, "1.log"), cri(time.Now(), "stdout", "F", strconv.Itoa(c.next)))
	c.next++
	m.write("shop_new_"+uid+"/app/0.log", now())
	m.start()
	m.numbers("web", c.next)
	m.eventually("new", "x")
}

// waitSaved waits until the place in a file is saved as its size.
func waitSaved(m *machine, name string) {
	m.t.Helper()
	require.True(m.t, assertEventually(func() bool {
		st, _, err := checkpoint.New[state](m.opts.State, m.store).Load()
		if err != nil {
			return false
		}
		for dir, containers := range st.Files {
			for c, files := range containers {
				for _, s := range files {
					f := file{restart: s.Restart, moved: s.Moved}
					if f.name() != name {
						continue
					}
					info, err := os.Stat(m.path(dir, c, name))
					return err == nil && info.Size() == s.Place.Offset
				}
			}
		}
		return false
	}))
}

// TestKilled kills the reader many times while lines come; none is lost and none is there twice.
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("runs for half a minute")
	}
	m := newMachine(t)
	require.NoError(t, m.store.Close())
	c := newContainerd(m, "shop_web_"+uid+"/app")
	at := time.Now()
	for round := range 4 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+m.dir)
		child.Stderr = os.Stderr
		require.NoError(t, child.Start())
		ticker := time.NewTicker(10 * time.Millisecond)
		for i := range 400 + rand.IntN(400) {
			<-ticker.C
			c.log(2)
			if i == 200 && round > 0 {
				at = at.Add(time.Second)
				c.rotate(at, 3)
			}
		}
		ticker.Stop()
		require.NoError(t, child.Process.Kill())
		require.Error(t, child.Wait())
	}
	m.openStore()
	before := len(m.lines("web"))
	m.start()
	m.numbers("web", c.next)
	t.Logf("%d lines, of which %d were stored when the last one was killed", c.next, before)
	require.Greater(t, before, 0)
}

// TestLostPlaces: without the file that remembers the places, the store does.
func TestLostPlaces(t *testing.T) {
	m := newMachine(t)
	c := newContainerd(m, "shop_web_"+uid+"/app")
	m.start()
	c.log(3000)
	m.numbers("web", c.next)
	m.stop()
	require.NoError(t, os.WriteFile(m.opts.State, []byte("{"), 0o600))
	c.log(100)
	m.start()
	m.numbers("web", c.next)
}

// A history that begins in the middle of a file has no half line of the app, wherever that is.
func TestHistoryBeginsWithALine(t *testing.T) {
	dir := t.TempDir()
	// Lines of two streams, in one to three parts, whose parts of both streams alternate now and then.
	var text strings.Builder
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	write := func(stream, tag, s string) {
		at = at.Add(1234567 * time.Nanosecond)
		text.WriteString(cri(at, stream, tag, s))
	}
	for i := range 60 {
		name := fmt.Sprintf("<%d", i)
		switch i % 4 {
		case 0:
			write("stdout", "F", name+">")
		case 1:
			write("stdout", "P", name)
			write("stderr", "F", name+"e>")
			write("stdout", "P", "-")
			write("stdout", "F", ">")
		case 2:
			write("stderr", "P", name+"e")
			write("stdout", "P", name)
			write("stderr", "F", ">")
			write("stdout", "F", ">")
		case 3:
			write("stderr", "F", name+"e>")
		}
	}
	path := filepath.Join(dir, "0.log")
	require.NoError(t, os.WriteFile(path, []byte(text.String()), 0o600))
	opened, err := os.Open(path)
	require.NoError(t, err)
	defer opened.Close()
	for offset := range int64(text.Len()) {
		f := &file{file: opened}
		f.startAt(offset)
		f.at = int64(text.Len())
		entries, malformed := f.parse([]byte(text.String()[offset:]), 1000)
		require.Zero(t, malformed)
		for _, e := range entries {
			require.Regexp(t, `^<[0-9]+-?e?-?>$`, e.Line, "offset %d", offset)
		}
		require.Zero(t, f.parsed.Inside)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	m := newMachine(t)
	m.opts.History = 100_000
	c := newContainerd(m, "shop_web_"+uid+"/app")
	at := time.Now()
	c.log(2000)
	c.pack(c.rotate(at, 0))
	c.log(2000)
	c.rotate(at.Add(time.Second), 0)
	c.log(1000)
	m.start()
	var got []string
	// Lines that were stored later may be found before earlier ones.
	require.True(t, assertEventually(func() bool {
		got = texts(m.lines("web"))
		return len(got) > 1500 && got[len(got)-1] == strconv.Itoa(c.next-1)
	}))
	require.Less(t, len(got), 2500)
	for i := range got {
		require.Equal(t, strconv.Itoa(c.next-len(got)+i), got[i])
	}
}

func TestLimitPerPod(t *testing.T) {
	m := newMachine(t)
	m.opts.LinesPerSecond = 200
	m.start()
	// 5,000 lines a second for four seconds, by the lines' own clock; a quiet pod beside it.
	at := time.Now().Add(-4 * time.Second)
	for i := range 4 {
		var b strings.Builder
		for j := range 5000 {
			b.WriteString(cri(at.Add(time.Duration(i)*time.Second+time.Duration(j)*200*time.Microsecond), "stdout", "F", fmt.Sprint(i, " ", j)))
		}
		m.write("shop_noisy_"+uid+"/app/0.log", b.String())
		m.write("shop_quiet_"+uid+"/app/0.log", cri(at.Add(time.Duration(i)*time.Second), "stdout", "F", fmt.Sprint(i)))
	}
	m.eventually("quiet", "0", "1", "2", "3")
	require.True(t, assertEventually(func() bool { n := m.tailer.counts(); return n.lines+n.dropped >= 20_004 }))
	n := m.tailer.counts()
	require.InDelta(t, 400+4*200, n.lines, 60, "the burst and four seconds")
	var notes []logstore.Entry
	sum := int64(0)
	require.True(t, assertEventually(func() bool {
		notes, sum = nil, 0
		for _, e := range m.lines("noisy") {
			if logstore.Value(e.Labels, "stream") == StreamPolymesh {
				notes = append(notes, e)
				d, err := strconv.ParseInt(logstore.Value(e.Metadata, MetaDropped), 10, 64)
				require.NoError(t, err)
				sum += d
			}
		}
		return sum == m.tailer.counts().dropped
	}), "lines of their own say how many")
	require.Contains(t, notes[0].Line, "lines of this container were dropped: its pod wrote more than 200 lines or 102400 bytes a second")
}

// After the clock was ahead, and after a node's pods were read in another order, lines count as before.
func TestLimitWhenTheClockGoesBack(t *testing.T) {
	const perSecond = 100
	var l limit
	now := time.Now()
	write := func(from time.Time, every time.Duration, n int) (kept int) {
		for i := range n {
			if l.allow(from.Add(time.Duration(i)*every), 0, perSecond) {
				kept++
			}
		}
		return kept
	}
	require.InDelta(t, 2*perSecond+10*perSecond, write(now.Add(time.Hour), time.Millisecond, 10_000), 1, "ten times too many, an hour ahead")
	require.InDelta(t, 6000, write(now, 10*time.Millisecond, 6000), 2, "as many as may be")
	require.InDelta(t, 10*perSecond, write(now.Add(time.Minute), time.Millisecond, 10_000), 2, "too many again")
	require.LessOrEqual(t, write(now.Add(69*time.Second), time.Millisecond, 1000), 1, "another container's lines of the same second")
}

// Long lines are limited by their bytes, short ones by their number, and none is longer than what is ever kept.
func TestLimitOnBytes(t *testing.T) {
	const perSecond, seconds = 100, 60
	for size, want := range map[int]int{
		0: (2 + seconds) * perSecond, lineBytes / 2: (2 + seconds) * perSecond, 2 * lineBytes: (2 + seconds) * perSecond / 2, lineBytes * perSecond: 2 + seconds,
		10 * lineBytes * perSecond: 1 + seconds/10,
	} {
		var l limit
		now, kept := time.Now(), 0
		for i := range seconds * 1000 {
			if l.allow(now.Add(time.Duration(i)*time.Millisecond), size, perSecond) {
				kept++
			}
		}
		require.InDelta(t, want, kept, 2, "lines of %d bytes", size)
	}
}

func TestHostileFolder(t *testing.T) {
	m := newMachine(t)
	secret := filepath.Join(m.dir, "secret")
	require.NoError(t, os.MkdirAll(filepath.Join(secret, "app"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(secret, "app", "0.log"), []byte(now()), 0o644))
	good := "shop_good_" + uid
	m.write(good+"/app/0.log", now())
	// Links in the place of a pod, a container, a file.
	require.NoError(t, os.Symlink(secret, m.path("shop_link-pod_"+uid)))
	require.NoError(t, os.MkdirAll(m.path("shop_link-container_"+uid), 0o755))
	require.NoError(t, os.Symlink(filepath.Join(secret, "app"), m.path("shop_link-container_"+uid, "app")))
	require.NoError(t, os.MkdirAll(m.path("shop_link-file_"+uid, "app"), 0o755))
	require.NoError(t, os.Symlink(filepath.Join(secret, "app", "0.log"), m.path("shop_link-file_"+uid, "app", "0.log")))
	require.NoError(t, os.MkdirAll(m.path("shop_inside_"+uid, "app"), 0o755))
	require.NoError(t, os.Symlink("../../"+good+"/app/0.log", m.path("shop_inside_"+uid, "app", "0.log")))
	// A second name of another file, a pipe that nobody writes to, a device, a folder.
	require.NoError(t, os.MkdirAll(m.path("shop_odd_"+uid, "app"), 0o755))
	require.NoError(t, os.Link(filepath.Join(secret, "app", "0.log"), m.path("shop_odd_"+uid, "app", "0.log")))
	require.NoError(t, unix.Mkfifo(m.path("shop_odd_"+uid, "app", "1.log"), 0o644))
	require.NoError(t, os.Mkdir(m.path("shop_odd_"+uid, "app", "2.log"), 0o755))
	if os.Geteuid() == 0 {
		require.NoError(t, unix.Mknod(m.path("shop_odd_"+uid, "app", "3.log"), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))))
	}
	// Names that are no pod's.
	for _, name := range []string{"a_b", "shop_pod_" + uid + "_more", "Shop_pod_" + uid, "shop_po d_" + uid, "shop_pod_../x", `shop_"} or {pod=~".*_` + uid, "shop_\n_" + uid,
		"shop_" + strings.Repeat("p", 240) + "_u", "..x", "shop_.._" + uid} {
		dir := m.path(strings.ReplaceAll(name, "/", "-"))
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "app"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "app", "0.log"), []byte(now()), 0o644))
	}
	for _, name := range []string{"APP", "a_b", strings.Repeat("c", 64), "a\nb", "-"} {
		m.write(good+"/"+name+"/0.log", now())
	}
	for _, name := range []string{"0.log.gz", "x.log", "0.log.20261130-101010.gz.tmp", "9999999999.log", "0.log.lock", "0.logx"} {
		m.write(good+"/app/"+name, now())
	}
	m.start()
	m.eventually("good", "x")
	m.write(good+"/app/0.log", now())
	m.eventually("good", "x", "x")
	var all []logstore.Entry
	require.NoError(t, m.store.Each(context.Background(), logstore.Selector{}, func(e logstore.Entry) bool { all = append(all, e); return true }))
	require.Len(t, all, 2)
	require.Equal(t, int64(10), m.tailer.counts().ignored)
	require.NotEmpty(t, m.tailer.Problem())
}

func TestTextThatIsNoCRI(t *testing.T) {
	m := newMachine(t)
	at := time.Now().UTC().Add(-time.Minute).Round(0)
	m.write("shop_web_"+uid+"/app/0.log", cri(at, "stdout", "F", "a")+
		"no time stdout F x\n"+
		"\n"+
		at.Format(time.RFC3339Nano)+" stdin F x\n"+
		at.Format(time.RFC3339Nano)+" stdout Q x\n"+
		"\x00\xff\xfe\n"+
		cri(at.Add(time.Second), "stdout", "F", "z"))
	m.start()
	got := m.eventually("web", "a", "no time stdout F x", at.Format(time.RFC3339Nano)+" stdin F x", at.Format(time.RFC3339Nano)+" stdout Q x", "\x00\uFFFD", "z")
	require.Equal(t, "unknown", logstore.Value(got[1].Labels, "stream"))
	require.Equal(t, int64(4), m.tailer.counts().malformed)
}

func TestLongLines(t *testing.T) {
	m := newMachine(t)
	at := time.Now().Add(-time.Minute)
	whole := strings.Repeat("0123456789abcdef", 40_000) // 640 KB
	var b strings.Builder
	for i := 0; i < len(whole); i += 16 << 10 {
		tag := "P"
		if i+16<<10 >= len(whole) {
			tag = "F"
		}
		b.WriteString(cri(at.Add(time.Duration(i)), "stdout", tag, whole[i:min(len(whole), i+16<<10)]))
	}
	b.WriteString(cri(at.Add(time.Second), "stdout", "F", "next"))
	// A line that containerd would not write: what does not fit is left out, and the next one is read.
	b.WriteString(cri(at.Add(2*time.Second), "stdout", "F", strings.Repeat("y", 1<<20)))
	b.WriteString(cri(at.Add(3*time.Second), "stdout", "F", "end"))
	m.write("shop_web_"+uid+"/app/0.log", b.String())
	m.start()
	var got []string
	require.True(t, assertEventually(func() bool { got = texts(m.lines("web")); return len(got) > 0 && got[len(got)-1] == "end" }))
	i := slices.Index(got, "next")
	require.Equal(t, whole, strings.Join(got[:i], ""), "it comes in pieces")
	require.Equal(t, 3, i)
	require.Len(t, got[i+1:], 2)
	require.Less(t, len(got[i+1]), 300_000)
}

// TestEndlessLines: many containers write without a line feed; what waits in memory is bounded.
func TestEndlessLines(t *testing.T) {
	m := newMachine(t)
	at := time.Now().Add(-time.Minute)
	part := strings.Repeat("x", 16<<10)
	for p := range 50 {
		var b strings.Builder
		for i := range 15 {
			b.WriteString(cri(at.Add(time.Duration(i)), "stdout", "P", part))
		}
		m.write(fmt.Sprintf("shop_p%d_%s/app/0.log", p, uid), b.String())
	}
	m.start()
	// Some 16 of them may wait, the others come in shorter pieces.
	require.True(t, assertEventually(func() bool { return m.tailer.counts().lines >= 30*14 }))
	for p := range 50 {
		m.write(fmt.Sprintf("shop_p%d_%s/app/0.log", p, uid), cri(at.Add(2*time.Second), "stdout", "F", "end"))
	}
	for p := range 50 {
		pod := fmt.Sprint("p", p)
		require.True(t, assertEventually(func() bool {
			return strings.Join(texts(m.lines(pod)), "") == strings.Repeat(part, 15)+"end"
		}))
	}
}

func TestFullDiskWaits(t *testing.T) {
	disk := disktest.Mount(t, "96m")
	m := newMachine(t)
	require.NoError(t, m.store.Close())
	store := logstoretest.Open(t, rowstore.Options{Dir: filepath.Join(disk, "logs"), MinFreeBytes: 40 << 20})
	m.store, m.opts.Store = store, store
	big := filepath.Join(disk, "big")
	require.NoError(t, os.WriteFile(big, make([]byte, 60<<20), 0o600))
	c := newContainerd(m, "shop_web_"+uid+"/app")
	m.start()
	c.log(1000)
	require.True(t, assertEventually(func() bool { return strings.Contains(m.tailer.Problem(), "40 MiB") }))
	c.rotate(time.Now(), 10)
	c.log(1000)
	require.Empty(t, m.lines("web"))
	require.NoError(t, os.Remove(big))
	m.numbers("web", c.next)
	require.True(t, assertEventually(func() bool { return m.tailer.Problem() == "" }))
}

func TestManyPodsAtOnce(t *testing.T) {
	m := newMachine(t)
	m.start()
	var wg sync.WaitGroup
	const pods, each = 40, 200
	for p := range pods {
		wg.Go(func() {
			c := newContainerd(m, fmt.Sprintf("shop_p%d_%s/app", p, uid))
			for i := range each / 10 {
				c.log(10)
				if i == 10 {
					c.rotate(time.Now(), 0)
				}
			}
		})
	}
	wg.Wait()
	require.True(t, assertEventually(func() bool { return m.tailer.counts().lines == pods*each }))
	m.numbers("p7", each)
}

func TestWorkloadNames(t *testing.T) {
	for pod, want := range map[string]string{
		"api-7d4b9c6f5d-x2x9z":            "api",
		"my-app-5f6d-abcde":               "my-app-5f6d-abcde",
		"my-app-5f6d-bcdfg":               "my-app",
		"kube-proxy-x2x9z":                "kube-proxy",
		"redis-0":                         "redis",
		"coredns":                         "coredns",
		"a-b-c":                           "a-b-c",
		"istio-ingressgateway-65b8c-4wz7": "istio-ingressgateway-65b8c-4wz7",
	} {
		require.Equal(t, want, GuessWorkload(pod), pod)
	}
}

func TestParseCRI(t *testing.T) {
	at := time.Date(2026, 11, 30, 4, 5, 6, 123456789, time.UTC)
	for line, want := range map[string]criLine{
		"2026-11-30T04:05:06.123456789Z stdout F hello":         {at: at, stream: stdout, text: []byte("hello")},
		"2026-11-30T05:05:06.123456789+01:00 stderr P hel lo ":  {at: at, stream: stderr, partial: true, text: []byte("hel lo ")},
		"2026-11-30T04:05:06.123456789Z stdout F":               {at: at, stream: stdout},
		"2026-11-30T04:05:06.123456789Z stdout F:x:y \ttab":     {at: at, stream: stdout, text: []byte("\ttab")},
		"2026-11-30T04:05:06.123456789Z stdout P:F not the end": {at: at, stream: stdout, partial: true, text: []byte("not the end")},
	} {
		got, ok := parseCRI([]byte(line))
		require.True(t, ok, line)
		require.True(t, want.at.Equal(got.at))
		got.at, want.at = time.Time{}, time.Time{}
		require.Equal(t, want.stream, got.stream)
		require.Equal(t, want.partial, got.partial)
		require.Equal(t, string(want.text), string(got.text))
	}
	for _, line := range []string{"", " ", "x", "2026-11-30T04:05:06Z", "2026-11-30T04:05:06Z stdout", "2026-11-30T04:05:06Z stdout X y", "2026-11-30T04:05:06Z std F y",
		strings.Repeat("2", 1000) + " stdout F x", "yesterday stdout F x"} {
		_, ok := parseCRI([]byte(line))
		require.False(t, ok, line)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(cri(time.Unix(0, 0), "stdout", "P", "a")+cri(time.Unix(1, 0), "stderr", "F", "b")), 7)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		// Read in two pieces or in one, the lines are the same, and nothing is read beyond the end.
		whole := &file{at: int64(len(data))}
		want, _ := whole.parse(data, 1000)
		cut = max(0, min(cut, len(data)))
		pieces := &file{at: int64(cut)}
		got, _ := pieces.parse(data[:cut], 1000)
		pieces.at = int64(len(data))
		more, _ := pieces.parse(data[cut:], 1000)
		got = append(got, more...)
		require.Equal(t, len(want), len(got))
		for i := range want {
			require.Equal(t, want[i].Line, got[i].Line)
		}
		require.LessOrEqual(t, whole.parsed.Offset, int64(len(data)))
		require.Equal(t, whole.parsed.Offset, pieces.parsed.Offset)
	})
}
