package process

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// restPercent is for a process that allocates little, such as an agent whose pods do not change. Its heap is mostly what programs
	// create before main, so a tenth of it is enough for garbage, and a collection is short.
	restPercent = 10
	// quietPercent is a quarter of Go's default. The control plane's heap is mostly caches: on an idle cluster this takes a
	// fifth off its memory and no measurable time, and memory is what small machines lack.
	quietPercent = 25
	// busyPercent is Go's default. Under load, a quarter of it means four times as many collections of all those caches.
	busyPercent = 100

	// Collections per second at quietPercent. Below the first, even those of a large heap take a few percent of a core.
	// An idle server with Istio is below the second.
	busyRate  = 0.5
	quietRate = busyRate / 3
	// A collection costs time in proportion to the heap, and so does what may be allocated before the next one: at a given percentage, each
	// allocated byte costs the same, however large the heap is. So the limits of restPercent are in bytes per second. At the first one,
	// collections at restPercent take less than half a percent of a core.
	restRate = 1 << 20
	wakeRate = 2 * restRate
	// restWindow is the time over which that rate is averaged. It covers the kubelet's periods of ten seconds.
	restWindow = 30 * time.Second
	// leastBase, in bytes, is what a smaller heap counts as for busyRate and quietRate: its collections may be frequent, because they are
	// short. Without it an agent that starts a few pods would double its heap, and what lives on would lie scattered over it.
	leastBase = 64 << 20
	// rateWindow is the time over which the rate is averaged. A single collection's worth of garbage, such as one large list,
	// does not reach busyRate; sustained load does within a second.
	rateWindow = 2 * time.Second
	// quietAfter is how long the rate must stay low. It bounds what a periodic load costs: one more collection in this time.
	quietAfter = 15 * time.Second

	samplePeriod = 500 * time.Millisecond
	// memoryReserve, in bytes, is what busyPercent leaves to others: the kubelet evicts pods below 100 MiB, and the programs
	// of the node need their pages in the page cache.
	memoryReserve = 256 << 20
)

// keepMemory gives back the memory of the start once settled is closed, and from then on that of each load, when the load has
// ended. Meanwhile it sets how much garbage Go lets lie, unless GOGC is set: that is the user's choice. It returns when ctx
// ends.
func keepMemory(ctx context.Context, settled <-chan struct{}, available func() (uint64, error), log *slog.Logger) {
	var ticks, again <-chan time.Time
	pacer := newGCPacer()
	own := os.Getenv("GOGC") == ""
	if own {
		debug.SetGCPercent(pacer.percent)
	}
	release := func() {
		if err := giveBack(); err != nil {
			log.Warn("memory that is no longer needed was not given back", "err", err)
		}
	}
	read := newHeapReader()
	left := func() uint64 {
		bytes, err := available()
		if err != nil {
			log.Debug("the machine's available memory is unknown: the garbage collector stays frugal", "err", err)
		}
		return bytes
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-settled:
			// The start needs a third more memory than the work that follows.
			settled = nil
			release()
			// The first pods start when everything is ready.
			again = time.After(quietAfter)
			if own {
				// Not before: what lives on from the start would lie scattered over a larger heap, which cannot be given back.
				ticker := time.NewTicker(samplePeriod)
				defer ticker.Stop()
				ticks = ticker.C
			}
		case <-again:
			release()
		case <-ticks:
			before := pacer.percent
			spent := pacer.next(read(), left)
			if pacer.percent != before {
				log.Debug("the garbage collector follows the load", "percent", pacer.percent, "collectionsPerSecond", pacer.rate, "bytesPerSecond", int64(pacer.bytes))
				debug.SetGCPercent(pacer.percent)
			}
			if spent {
				release()
			}
		}
	}
}

// heapSample is what the Go runtime reports about its heap at one time, in bytes.
type heapSample struct {
	at        time.Time
	allocated uint64 // since the process began
	live      uint64 // what the last collection left
	roots     uint64 // stacks and global variables
}

// newHeapReader returns a function that takes samples. It costs microseconds and stops nothing.
func newHeapReader() func() heapSample {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"}}
	return func() heapSample {
		metrics.Read(s)
		return heapSample{time.Now(), s[0].Value.Uint64(), s[1].Value.Uint64(), s[2].Value.Uint64() + s[3].Value.Uint64()}
	}
}

// gcPacer decides on Go's GC percentage. What collections cost depends on how often they are needed, which is the rate of
// allocation over what may be allocated between two of them: live heap and roots, times the percentage
// (https://go.dev/doc/gc-guide#GOGC).
type gcPacer struct {
	percent int
	rate    float64 // collections per second at quietPercent, averaged over rateWindow
	bytes   float64 // allocated per second, averaged over restWindow
	last    heapSample
	busy    bool
	loaded  time.Time // when the rate was last above quietRate
	short   time.Time // when memory last ran short
}

// newGCPacer returns a pacer for a process that has just started, which is not at rest.
func newGCPacer() gcPacer { return gcPacer{percent: quietPercent, bytes: wakeRate} }

// next takes a sample and sets the percentage. It reports whether memory is to be given back: a load has ended, rest has begun, or the
// machine runs short. The available memory, in bytes, is only requested under load.
func (p *gcPacer) next(s heapSample, available func() uint64) (spent bool) {
	last := p.last
	p.last = s
	elapsed := s.at.Sub(last.at)
	if last.at.IsZero() || elapsed <= 0 {
		return false
	}
	base := max(float64(s.live+s.roots), leastBase)
	bytes := float64(s.allocated-last.allocated) / elapsed.Seconds()
	p.bytes = average(p.bytes, bytes, elapsed, restWindow)
	p.rate = average(p.rate, bytes/(base*quietPercent/100), elapsed, rateWindow)
	if p.rate >= quietRate {
		p.loaded = s.at
	}
	switch {
	case p.rate >= busyRate:
		p.busy = true
	case p.busy && s.at.Sub(p.loaded) >= quietAfter:
		p.busy, p.percent = false, quietPercent
		return true
	}
	switch {
	case p.percent == restPercent && (p.busy || p.bytes >= wakeRate):
		p.percent = quietPercent
	case p.percent == quietPercent && !p.busy && p.bytes < restRate:
		p.percent = restPercent
		return true
	}
	if !p.busy {
		return false
	}
	left, more := float64(available()), base*(busyPercent-quietPercent)/100
	switch {
	case p.percent == busyPercent && left < memoryReserve:
		p.percent, p.short = quietPercent, s.at
		return true
	case p.percent == quietPercent && left >= memoryReserve+more && (p.short.IsZero() || s.at.Sub(p.short) >= quietAfter):
		p.percent = busyPercent
	}
	return false
}

// average moves an exponential average towards a value that was measured over a time.
func average(old, value float64, elapsed, window time.Duration) float64 {
	return old + (value-old)*(1-math.Exp(-elapsed.Seconds()/window.Seconds()))
}

// giveBack returns memory that is not needed now: the heap's free spans, and the pages of the program file that were used once, code and
// tables. The latter stay in the page cache, where the kernel can drop them, and are mapped again when they are used again.
func giveBack() error {
	debug.FreeOSMemory()
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer file.Close()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	clean, err := cleanMappings(file, program)
	if err != nil {
		return fmt.Errorf("read /proc/self/smaps: %w", err)
	}
	for _, m := range clean {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.from, m.to-m.from, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("unmap the program: %w", errno)
		}
	}
	return nil
}

// mapping is a range of addresses.
type mapping struct{ from, to uintptr }

// cleanMappings returns the mappings of a file that are as the file is: they cannot be written, and no page of them has been. The C startup
// code writes to parts of the read-only data before it protects them; those must stay.
func cleanMappings(smaps io.Reader, file string) ([]mapping, error) {
	var found []mapping
	var current *mapping
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) == 0:
		case !strings.HasSuffix(f[0], ":"):
			// address perms offset dev inode pathname, and then lines "name: value" (proc_pid_smaps(5)).
			current = nil
			if len(f) < 6 || f[5] != file || strings.Contains(f[1], "w") {
				continue
			}
			current = &mapping{}
			if _, err := fmt.Sscanf(f[0], "%x-%x", &current.from, &current.to); err != nil {
				return nil, err
			}
		case f[0] == "Anonymous:" && current != nil && len(f) > 1 && f[1] == "0":
			found = append(found, *current)
		}
	}
	return found, lines.Err()
}
