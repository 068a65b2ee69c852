package journal

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/checkpoint"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
)

type machine struct {
	t     *testing.T
	dir   string
	store *logstore.Store
	opts  Options

	journal *Journal
	stop    func()
}

// saved is what the file says about how far was read.
func (m *machine) saved() state {
	st, _, err := checkpoint.New[state](m.opts.State, m.store).Load()
	require.NoError(m.t, err)
	return st
}

func newMachine(t *testing.T, names ...string) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, dir: dir, stop: func() {}}
	m.store = logstoretest.Open(t, rowstore.Options{Dir: filepath.Join(dir, "store")})
	m.opts = Options{Node: "node-1", Store: m.store, State: filepath.Join(dir, "places"), Kernel: filepath.Join(dir, "kmsg"), LinesPerSecond: 100_000, Log: slog.New(slog.DiscardHandler)}
	require.NoError(t, unix.Mkfifo(m.opts.Kernel, 0o600))
	for _, name := range names {
		m.opts.Files = append(m.opts.Files, File{Name: name, Path: m.path(name + ".log")})
	}
	t.Cleanup(func() { m.stop(); _ = m.store.Close() })
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) start() {
	m.t.Helper()
	j := New(m.opts)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- j.Run(ctx) }()
	m.journal = j
	m.stop = func() {
		cancel()
		require.NoError(m.t, <-done)
		m.stop = func() {}
	}
}

func (m *machine) write(name, text string) {
	m.t.Helper()
	f, err := os.OpenFile(m.path(name), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	require.NoError(m.t, err)
	_, err = io.WriteString(f, text)
	require.NoError(m.t, err)
	require.NoError(m.t, f.Close())
}

func (m *machine) lines(matchers ...logstore.Matcher) []logstore.Entry {
	m.t.Helper()
	var out []logstore.Entry
	require.NoError(m.t, m.store.Select(context.Background(), logstore.Selector{Matchers: matchers}, func(e logstore.Entry) bool {
		out = append(out, e)
		return true
	}))
	return out
}

func (m *machine) eventually(container string, want ...string) []logstore.Entry {
	m.t.Helper()
	var got []logstore.Entry
	var texts []string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		got, texts = m.lines(logstore.Matcher{Name: "container", Value: container}), nil
		for _, e := range got {
			texts = append(texts, e.Line)
		}
		if slices.Equal(want, texts) {
			return got
		}
	}
	require.Equal(m.t, want, texts)
	return nil
}

func TestFiles(t *testing.T) {
	m := newMachine(t, "server", "containerd")
	at := time.Now().UTC().Add(-time.Minute).Truncate(time.Millisecond)
	lines := []string{
		"time=" + at.Format(time.RFC3339Nano) + ` level=INFO msg="the node is ready"`,
		"panic: something",
		"\tgoroutine 1 [running]:",
		"I" + at.Add(time.Second).Local().Format("0102 15:04:05.000000") + `       1 controller.go:42] "Starting"`,
	}
	m.write("server.log", strings.Join(lines, "\n")+"\n\nhalf a li")
	m.start()
	got := m.eventually("server", lines...)
	require.Equal(t, []logstore.Field{{Name: "container", Value: "server"}, {Name: "job", Value: "polymesh"}, {Name: "node", Value: "node-1"}}, got[0].Labels)
	require.Equal(t, at, got[0].Time)
	require.Equal(t, at.Add(2), got[2].Time, "a line without a time belongs to the one before")
	require.Equal(t, at.Add(time.Second), got[3].Time)

	// The other log comes later; a line comes in two pieces.
	m.write("server.log", "ne\n")
	m.write("containerd.log", `time="`+at.Format(time.RFC3339Nano)+`" level=info msg="starting containerd"`+"\n")
	m.eventually("server", append(lines, "half a line")...)
	require.Equal(t, at, m.eventually("containerd", `time="`+at.Format(time.RFC3339Nano)+`" level=info msg="starting containerd"`)[0].Time)
	require.Empty(t, m.journal.Problem())
}

// numbered writes lines from to to.
func (m *machine) numbered(name string, from, to int) {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "time=%s n=%d\n", time.Now().UTC().Format(time.RFC3339Nano), i)
	}
	m.write(name, b.String())
}

func (m *machine) allNumbers(container string, n int) {
	m.t.Helper()
	var got []int
	want := make([]int, n)
	for i := range want {
		want[i] = i
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		got = nil
		for _, e := range m.lines(logstore.Matcher{Name: "container", Value: container}) {
			_, text, _ := strings.Cut(e.Line, "n=")
			i, err := strconv.Atoi(text)
			require.NoError(m.t, err)
			got = append(got, i)
		}
		if slices.Equal(want, got) {
			return
		}
	}
	require.Equal(m.t, want, got)
}

func TestRotation(t *testing.T) {
	m := newMachine(t, "server")
	m.numbered("server.log", 0, 1)
	m.start()
	m.allNumbers("server", 1)
	n := 1
	for i := range 6 {
		m.numbered("server.log", n, n+500)
		n += 500
		require.NoError(t, os.Rename(m.path("server.log"), m.path(fmt.Sprintf("server-2026-11-30T04-05-%02d.000.log", i))))
		// lumberjack has closed it; others still have it open for a moment.
		m.numbered(fmt.Sprintf("server-2026-11-30T04-05-%02d.000.log", i), n, n+5)
		n += 5
		m.numbered("server.log", n, n+1)
		n++
		m.allNumbers("server", n)
	}
}

func TestStoppedMeanwhile(t *testing.T) {
	m := newMachine(t, "server")
	m.numbered("server.log", 0, 1000)
	m.start()
	m.allNumbers("server", 1000)
	m.stop() // nothing is saved yet: the store remembers

	m.numbered("server.log", 1000, 1100)
	m.start()
	m.allNumbers("server", 1100)
	require.Eventually(t, func() bool { return m.saved().Files["server"].Offset > 0 }, 30*time.Second, 20*time.Millisecond)
	m.stop()

	m.numbered("server.log", 1100, 1200)
	require.NoError(t, os.Rename(m.path("server.log"), m.path("server-1.log")))
	m.numbered("server.log", 1200, 1300)
	m.start()
	m.allNumbers("server", 1300)
	m.stop()

	// Cut short by who moves logs away by copying.
	require.NoError(t, os.Truncate(m.path("server.log"), 0))
	m.numbered("server.log", 1300, 1310)
	m.start()
	m.allNumbers("server", 1310)
}

func TestHostileFiles(t *testing.T) {
	m := newMachine(t, "link", "pipe", "folder", "good", "long")
	require.NoError(t, os.WriteFile(m.path("secret"), []byte("secret\n"), 0o600))
	require.NoError(t, os.Symlink(m.path("secret"), m.path("link.log")))
	require.NoError(t, unix.Mkfifo(m.path("pipe.log"), 0o600))
	require.NoError(t, os.Mkdir(m.path("folder.log"), 0o700))
	m.write("good.log", "a\xffb\r\n")
	m.write("long.log", strings.Repeat("x", 3*readBytes)+"\nend\n")
	m.start()
	m.eventually("good", "a\uFFFDb")
	require.Eventually(t, func() bool {
		got := m.lines(logstore.Matcher{Name: "container", Value: "long"})
		return len(got) >= 4 && got[len(got)-1].Line == "end"
	}, 10*time.Second, 20*time.Millisecond)
	require.Len(t, m.lines(logstore.Matcher{Name: "container", Type: logstore.Regexp, Value: "link|pipe|folder"}), 0)
	require.Contains(t, m.journal.Problem(), "link.log")
}

func TestLimit(t *testing.T) {
	m := newMachine(t, "server")
	m.opts.LinesPerSecond = 100
	m.start()
	at := time.Now().Add(-10 * time.Second)
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "time=%s n=%d\n", at.Add(time.Duration(i)*time.Millisecond).UTC().Format(time.RFC3339Nano), i)
	}
	m.write("server.log", b.String())
	require.Eventually(t, func() bool { n := m.journal.Numbers(); return n["lines"]+n["dropped"] >= 5001 }, 20*time.Second, 20*time.Millisecond)
	require.InDelta(t, 200+5*100, m.journal.Numbers()["lines"], 20)
	var note string
	for _, e := range m.lines(logstore.Matcher{Name: "container", Value: "server"}) {
		if strings.Contains(e.Line, "were dropped") {
			note = e.Line
		}
	}
	require.Contains(t, note, "more than 100 a second")
}

// After the clock was ahead, lines count as before.
func TestLimitWhenTheClockGoesBack(t *testing.T) {
	const perSecond = 100
	j, now := &Journal{opts: Options{Node: "node-1"}, started: time.Now()}, time.Now()
	var place Place
	f := newFile(File{Name: "server"}, place, perSecond)
	write := func(from time.Time, every time.Duration, n int) int {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "time=%s n=%d\n", from.Add(time.Duration(i)*every).UTC().Format(time.RFC3339Nano), i)
		}
		entries, dropped := j.entries(f, []byte(b.String()), &place)
		require.Equal(t, int64(n-len(entries)), dropped)
		return len(entries)
	}
	require.InDelta(t, 2*perSecond+10*perSecond, write(now.Add(time.Hour), time.Millisecond, 10_000), 1, "ten times too many, an hour ahead")
	require.InDelta(t, 6000, write(now, 10*time.Millisecond, 6000), 2, "as many as may be")
}

const (
	oomKill  = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=cri-containerd-1.scope,mems_allowed=0,oom_memcg=/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0b6b1d3a_0000_4000_8000_000000000001.slice,task_memcg=/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0b6b1d3a_0000_4000_8000_000000000001.slice/cri-containerd-1.scope,task=api,pid=4242,uid=65532"
	killLine = "Memory cgroup out of memory: Killed process 4242 (api) total-vm:1234kB, anon-rss:1000kB, file-rss:0kB, shmem-rss:0kB, UID:65532 pgtables:100kB oom_score_adj:999"
)

// kmsg writes records as the kernel gives them: one for each read.
func (m *machine) kmsg(records ...string) {
	m.t.Helper()
	fd, err := unix.Open(m.opts.Kernel, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	require.NoError(m.t, err)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_DIRECT) // each write is one read's
	require.NoError(m.t, err)
	for _, r := range records {
		_, err := unix.Write(fd, []byte(r))
		require.NoError(m.t, err)
	}
	require.NoError(m.t, unix.Close(fd))
}

func TestKernel(t *testing.T) {
	m := newMachine(t)
	var mono unix.Timespec
	require.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono))
	since := (mono.Nano() - int64(time.Minute)) / 1000
	records := []string{
		fmt.Sprintf("6,100,%d,-;eth0: link up\n", since),
		fmt.Sprintf("4,101,%d,-;api invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=999\n SUBSYSTEM=x\n", since+1000),
		fmt.Sprintf("6,102,%d,-;%s\n", since+2000, oomKill),
		fmt.Sprintf("3,103,%d,-;%s\n", since+3000, killLine),
		// A program that may write to the kernel's log cannot pretend to be the kernel.
		fmt.Sprintf("12,104,%d,-;%s\n", since+4000, "Killed process 1 (systemd) by nobody"),
		"nonsense",
	}
	m.start()
	m.kmsg(records...)
	kernel := logstore.Matcher{Name: "job", Value: "kernel"}
	require.Eventually(t, func() bool { return len(m.lines(kernel)) == 3 }, 20*time.Second, 20*time.Millisecond)
	got := m.lines(kernel)
	require.Equal(t, oomKill, got[1].Line)
	require.Equal(t, killLine, got[2].Line)
	require.WithinDuration(t, time.Now().Add(-time.Minute), got[1].Time, 20*time.Second)
	require.ElementsMatch(t, []logstore.Field{{Name: MetaUID, Value: "0b6b1d3a-0000-4000-8000-000000000001"}, {Name: MetaPID, Value: "4242"}, {Name: MetaProcess, Value: "api"}}, got[1].Metadata)
	require.ElementsMatch(t, []logstore.Field{{Name: MetaPID, Value: "4242"}, {Name: MetaProcess, Value: "api"}}, got[2].Metadata)
	require.Equal(t, []logstore.Field{{Name: "job", Value: "kernel"}, {Name: "node", Value: "node-1"}}, got[0].Labels)

	// The kernel gives all of it again to who opens its log; nothing was saved yet.
	m.stop()
	m.start()
	m.kmsg(append(records, fmt.Sprintf("3,105,%d,-;%s\n", since+9_000_000, strings.ReplaceAll(killLine, "4242", "4343")))...)
	require.Eventually(t, func() bool { return len(m.lines(kernel)) == 4 }, 20*time.Second, 20*time.Millisecond)
	require.Eventually(t, func() bool { return m.saved().Kernel.Sequence == 106 }, 20*time.Second, 20*time.Millisecond)
	require.Len(t, m.lines(kernel), 4)
}

func TestNoKernelLog(t *testing.T) {
	m := newMachine(t, "server")
	m.opts.Kernel = m.path("none")
	m.write("server.log", "x\n")
	m.start()
	m.eventually("server", "x")
}

// TestRealKernelLog reads this machine's, if it may.
func TestRealKernelLog(t *testing.T) {
	m := newMachine(t, "server")
	m.opts.Kernel = "/dev/kmsg"
	m.write("server.log", "x\n")
	m.start()
	m.eventually("server", "x")
	t.Logf("problem: %q", m.journal.Problem())
}

func TestLineTime(t *testing.T) {
	now := time.Date(2027, 1, 1, 0, 0, 10, 0, time.Local)
	for line, want := range map[string]time.Time{
		`time=2026-11-30T04:05:06.123Z level=INFO msg=x`:              time.Date(2026, 11, 30, 4, 5, 6, 123e6, time.UTC),
		`time="2026-11-30T04:05:06.123456789+01:00" level=info msg=x`: time.Date(2026, 11, 30, 3, 5, 6, 123456789, time.UTC),
		`2026-11-30T04:05:06Z something`:                              time.Date(2026, 11, 30, 4, 5, 6, 0, time.UTC),
		`I0101 00:00:05.000001       1 x.go:1] y`:                     time.Date(2027, 1, 1, 0, 0, 5, 1000, time.Local),
		`E1231 23:59:59.500000       1 x.go:1] y`:                     time.Date(2026, 12, 31, 23, 59, 59, 500e6, time.Local),
	} {
		got, ok := lineTime(line, now)
		require.True(t, ok, line)
		require.True(t, want.Equal(got), "%s: %s", line, got)
	}
	for _, line := range []string{"", "x", "Info: something happened today", "time=now", "I9999 99:99:99.999999 x", "time="} {
		_, ok := lineTime(line, now)
		require.False(t, ok, line)
	}
}
