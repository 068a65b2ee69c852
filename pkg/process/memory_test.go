package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"polymesh.dev/polymesh/pkg/payload"
)

// phase is a part of a trace: a time with the same rate of allocation.
type phase struct {
	last  time.Duration
	rate  float64 // collections per second that quietPercent would need
	short bool    // the machine runs short of memory
}

// replay gives a trace to a pacer. It returns what happened, as "at: what".
func replay(base uint64, left uint64, trace []phase) (events []string) {
	p := gcPacer{quiet: quietPercent, percent: quietPercent}
	start := time.Unix(1000, 0)
	now, allocated := start, 0.0
	p.next(heapSample{at: now, live: base}, nil)
	for _, part := range trace {
		for end := now.Add(part.last); now.Before(end); {
			now = now.Add(samplePeriod)
			allocated += part.rate * samplePeriod.Seconds() * float64(base) * quietPercent / 100
			before := p.percent
			spent := p.next(heapSample{now, uint64(allocated), base - base/4, base / 4}, func() uint64 {
				if part.short {
					return memoryReserve - 1
				}
				return left - base*uint64(p.percent-quietPercent)/100
			})
			if p.percent != before {
				events = append(events, fmt.Sprintf("%s: %d %%", now.Sub(start), p.percent))
			}
			if spent {
				events = append(events, fmt.Sprintf("%s: give back", now.Sub(start)))
			}
		}
	}
	return events
}

func TestGCPacer(t *testing.T) {
	const mb = 1 << 20
	repeat := func(times int, p ...phase) []phase { return slices.Repeat(p, times) }
	for _, c := range []struct {
		name  string
		base  uint64 // live heap and roots
		left  uint64 // available at quietPercent
		trace []phase
		want  []string
	}{
		{"at rest", 100 * mb, 8192 * mb, []phase{{last: time.Hour, rate: 0.15}}, nil},
		{"a large list now and then, at rest", 100 * mb, 8192 * mb, repeat(50, phase{last: time.Minute, rate: 0.1}, phase{last: 500 * time.Millisecond, rate: 1.6}), nil},
		{"load", 100 * mb, 8192 * mb, []phase{{last: 10 * time.Second, rate: 0.1}, {last: time.Minute, rate: 5}, {last: time.Hour, rate: 0.1}},
			[]string{"10.5s: 100 %", "1m33.5s: 25 %", "1m33.5s: give back"}},
		{"little load stays as it is", 100 * mb, 8192 * mb, []phase{{last: time.Hour, rate: 0.4}}, nil},
		{"between the thresholds, busy stays busy", 100 * mb, 8192 * mb, []phase{{last: 10 * time.Second, rate: 2}, {last: time.Hour, rate: 0.3}}, []string{"1s: 100 %"}},
		{"pauses shorter than quietAfter do not end a load", 100 * mb, 8192 * mb,
			append(repeat(100, phase{last: 3 * time.Second, rate: 5}, phase{last: 12 * time.Second, rate: 0}), phase{last: time.Minute, rate: 0}),
			[]string{"500ms: 100 %", "25m9s: 25 %", "25m9s: give back"}},
		{"each of two loads far apart", 100 * mb, 8192 * mb, repeat(2, phase{last: 10 * time.Second, rate: 5}, phase{last: 50 * time.Second}),
			[]string{"500ms: 100 %", "31.5s: 25 %", "31.5s: give back", "1m0.5s: 100 %", "1m31.5s: 25 %", "1m31.5s: give back"}},
		{"too little memory for more, which is given back all the same", 100 * mb, memoryReserve + 50*mb, []phase{{last: time.Minute, rate: 5}, {last: time.Minute}},
			[]string{"1m21.5s: give back"}},
		{"just enough memory", 100 * mb, memoryReserve + 75*mb, []phase{{last: time.Minute, rate: 5}}, []string{"500ms: 100 %"}},
		{"memory runs short under load, and comes back", 100 * mb, 8192 * mb,
			[]phase{{last: 10 * time.Second, rate: 5}, {last: 2 * time.Second, rate: 5, short: true}, {last: time.Minute, rate: 5}},
			[]string{"500ms: 100 %", "10.5s: 25 %", "10.5s: give back", "25.5s: 100 %"}},
		{"memory that comes and goes costs one more collection each quietAfter", 100 * mb, 8192 * mb, repeat(40, phase{last: time.Second, rate: 5}, phase{last: time.Second, rate: 5, short: true})[:16],
			[]string{"500ms: 100 %", "1.5s: 25 %", "1.5s: give back"}},
		{"a small heap is collected more often before that is load", 25 * mb, 8192 * mb, []phase{{last: time.Minute, rate: 1.9}, {last: time.Minute, rate: 5}, {last: time.Minute, rate: 0.6}},
			[]string{"1m0.5s: 100 %", "2m23s: 25 %", "2m23s: give back"}},
		{"a heap below Go's least", 1024, 8192 * mb, []phase{{last: time.Minute, rate: 100}}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := replay(c.base, c.left, c.trace); !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

// A clock that stands still or a machine that slept must not look like load.
func TestGCPacerAfterSleep(t *testing.T) {
	p := gcPacer{quiet: quietPercent, percent: quietPercent}
	at := time.Unix(1000, 0)
	plenty := func() uint64 { return 1 << 40 }
	p.next(heapSample{at: at, live: 100 << 20}, plenty)
	for _, elapsed := range []time.Duration{0, 8 * time.Hour} {
		at = at.Add(elapsed)
		if p.next(heapSample{at: at, allocated: 1 << 30, live: 100 << 20}, plenty); p.percent != quietPercent {
			t.Errorf("after %s: %d %%", elapsed, p.percent)
		}
	}
}

func gcPercent() uint64 {
	s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

var garbage []byte

// allocate leaves a lot of garbage for the collector.
func allocate() {
	garbage = make([]byte, 256<<20)
	garbage = nil
}

// heap is what the process holds for its heap, garbage and free pages too, in bytes.
func heap() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() + s[1].Value.Uint64()
}

// keepGCPercent sets GOGC in the environment, and puts the percentage back after the test.
func keepGCPercent(t *testing.T, gogc string) {
	t.Setenv("GOGC", gogc)
	before := gcPercent()
	t.Cleanup(func() { debug.SetGCPercent(int(before)) })
}

// started is what a server whose start is over has.
func started() <-chan struct{} {
	settled := make(chan struct{})
	close(settled)
	return settled
}

// The loop against the real collector: only the clock and the machine's memory are the test's.
func TestKeepMemory(t *testing.T) {
	keepGCPercent(t, "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go keepMemory(ctx, started(), func() (uint64, error) { return 1 << 40, nil }, slog.New(slog.DiscardHandler))
		synctest.Wait()
		if got := gcPercent(); got != quietPercent {
			t.Fatalf("at first GOGC is %d, want %d", got, quietPercent)
		}
		for range 10 {
			allocate()
			time.Sleep(samplePeriod)
		}
		if got := gcPercent(); got != busyPercent {
			t.Fatalf("under load GOGC is %d, want %d", got, busyPercent)
		}
		time.Sleep(time.Minute)
		if got := gcPercent(); got != quietPercent {
			t.Fatalf("after the load GOGC is %d, want %d", got, quietPercent)
		}
		if got := heap(); got >= 256<<20 {
			t.Errorf("after the load the heap still has %d bytes", got)
		}
	})
}

func TestKeepMemoryUnknown(t *testing.T) {
	keepGCPercent(t, "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go keepMemory(ctx, started(), func() (uint64, error) { return 0, errors.New("no /proc") }, slog.New(slog.DiscardHandler))
		for range 10 {
			allocate()
			time.Sleep(samplePeriod)
			if got := gcPercent(); got != quietPercent {
				t.Fatalf("GOGC is %d though the available memory is unknown", got)
			}
		}
	})
}

func TestKeepMemoryUsersGOGC(t *testing.T) {
	keepGCPercent(t, "73")
	before := gcPercent()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		settled := make(chan struct{})
		go keepMemory(ctx, settled, func() (uint64, error) { return 1 << 40, nil }, slog.New(slog.DiscardHandler))
		for range 4 {
			allocate()
			time.Sleep(samplePeriod)
		}
		if got := gcPercent(); got != before {
			t.Errorf("GOGC is %d, was %d", got, before)
		}
		close(settled)
		synctest.Wait()
		// The memory of the start is given back all the same.
		if got := heap(); got >= 256<<20 {
			t.Errorf("after the start the heap still has %d bytes", got)
		}
	})
}

// The launcher's GOGC is the agent's rest, not a user's choice, and is not inherited.
func TestQuietGC(t *testing.T) {
	for _, c := range []struct {
		gogc, launchers string
		percent         int
		own             bool
	}{
		{"", "", quietPercent, true},
		{"10", "10", 10, true},
		{"73", "", quietPercent, false},
		{"73", "10", quietPercent, false},
		{"", "10", quietPercent, true},
		{"off", "off", quietPercent, false},
		{"400", "400", quietPercent, false},
	} {
		t.Setenv("GOGC", c.gogc)
		t.Setenv(payload.EnvGOGC, c.launchers)
		if percent, own := quietGC(); percent != c.percent || own != c.own {
			t.Errorf("%+v: %d, %v", c, percent, own)
		}
		if got := os.Getenv("GOGC"); c.own != (got == "") {
			t.Errorf("%+v: children inherit %q", c, got)
		}
		if got := os.Getenv(payload.EnvGOGC); got != "" {
			t.Errorf("%+v: children inherit %q", c, got)
		}
	}
}

func TestAvailableMemory(t *testing.T) {
	const (
		meminfo   = "MemTotal:        2048000 kB\nMemFree:          100000 kB\nMemAvailable:    1000000 kB\n"
		unlimited = "9223372036854771712\n"
	)
	for _, c := range []struct {
		name  string
		files map[string]string
		want  uint64
		fails bool
	}{
		{name: "no cgroups", files: map[string]string{"proc/meminfo": meminfo}, want: 1024000000},
		{name: "version 2, no limit", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/polymesh.service\n",
			"sys/fs/cgroup/system.slice/polymesh.service/memory.max": "max\n", "sys/fs/cgroup/system.slice/polymesh.service/memory.current": "1000\n",
			"sys/fs/cgroup/system.slice/polymesh.service/memory.stat": ""}, want: 1024000000},
		{name: "version 2, a limit above the group, page cache does not count", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/node/server\n",
			"sys/fs/cgroup/node/server/memory.max": "max\n", "sys/fs/cgroup/node/server/memory.current": "300\n", "sys/fs/cgroup/node/server/memory.stat": "",
			"sys/fs/cgroup/node/memory.max": "512000000\n", "sys/fs/cgroup/node/memory.current": "500000000\n",
			"sys/fs/cgroup/node/memory.stat": "anon 279000000\nfile 215000000\ninactive_file 150000000\nactive_file 60000000\nslab 5\n"}, want: 222000000},
		{name: "version 2, a container sees its own group as the root", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n",
			"sys/fs/cgroup/memory.max": "400\n", "sys/fs/cgroup/memory.current": "300\n", "sys/fs/cgroup/memory.stat": "inactive_file 0\n"}, want: 100},
		{name: "version 1", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "5:devices:/\n4:memory:/node/server\n0::/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": unlimited, "sys/fs/cgroup/memory/node/server/memory.limit_in_bytes": unlimited,
			"sys/fs/cgroup/memory/node/memory.limit_in_bytes": "512000000\n", "sys/fs/cgroup/memory/node/memory.usage_in_bytes": "500000000\n",
			"sys/fs/cgroup/memory/node/memory.stat": "inactive_file 7\ntotal_inactive_file 150000000\ntotal_active_file 60000000\n"}, want: 222000000},
		{name: "a group over its limit", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/a\n",
			"sys/fs/cgroup/a/memory.max": "400\n", "sys/fs/cgroup/a/memory.current": "500\n", "sys/fs/cgroup/a/memory.stat": "inactive_file 10\n"}, want: 0},
		{name: "more page cache than use, as counters lag", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/a\n",
			"sys/fs/cgroup/a/memory.max": "400\n", "sys/fs/cgroup/a/memory.current": "300\n", "sys/fs/cgroup/a/memory.stat": "inactive_file 400\n"}, want: 400},
		{name: "no MemAvailable", files: map[string]string{"proc/meminfo": "MemTotal: 5 kB\n"}, fails: true},
		{name: "no /proc", fails: true},
		{name: "a limit that is no number", files: map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "many\n"}, fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for name, content := range c.files {
				name = filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := availableMemory(root)
			if got != c.want || (err != nil) != c.fails {
				t.Errorf("availableMemory() = %d, %v; want %d", got, err, c.want)
			}
		})
	}
	t.Run("this machine", func(t *testing.T) {
		if got, err := availableMemory(""); err != nil || got == 0 {
			t.Errorf("availableMemory() = %d, %v", got, err)
		}
	})
}

func BenchmarkHeapReader(b *testing.B) {
	read := newHeapReader()
	for b.Loop() {
		runtime.KeepAlive(read())
	}
}

func BenchmarkAvailableMemory(b *testing.B) {
	for b.Loop() {
		if _, err := availableMemory(""); err != nil {
			b.Fatal(err)
		}
	}
}

// What the startup code has written to is not dropped, nor what may still be written.
func TestCleanMappings(t *testing.T) {
	const smaps = `00400000-05a68000 r-xp 00000000 fe:00 123                                /data/bin/polymesh
Size:              88840 kB
Rss:               17148 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
05a68000-0c346000 r--p 05668000 fe:00 123                                /data/bin/polymesh
Size:             107400 kB
Anonymous:             0 kB
0c346000-0c34c000 r--p 0bf46000 fe:00 123                                /data/bin/polymesh
Size:                 24 kB
Anonymous:             8 kB
0c34c000-0c53e000 rw-p 0bf4c000 fe:00 123                                /data/bin/polymesh
Size:               1992 kB
Anonymous:             0 kB
7f0000000000-7f0000100000 r--p 00000000 fe:00 456                        /data/bin/other
Anonymous:             0 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
Anonymous:             0 kB
`
	got, err := cleanMappings(strings.NewReader(smaps), "/data/bin/polymesh")
	if want := []mapping{{0x400000, 0x5a68000}, {0x5a68000, 0xc346000}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %x, want %x (%v)", got, want, err)
	}
}
