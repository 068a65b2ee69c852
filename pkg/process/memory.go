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
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/payload"
)

const (
	// quietPercent is a quarter of Go's default, for a server. The control plane's heap is mostly caches: on an idle cluster this takes a
	// fifth off its memory and no measurable time, and memory is what small machines lack.
	quietPercent = 25
	// busyPercent is Go's default. Under load, a quarter of it means four times as many collections of all those caches.
	busyPercent = 100

	// Collections per second at quietPercent. Below the first, even those of a large heap take a few percent of a core.
	// An idle server with Istio is below the second.
	busyRate  = 0.5
	quietRate = busyRate / 3
	// largeHeap, in bytes, is the live heap for which these rates are. Collections of a smaller one, as an agent's, cost less: more of them
	// are no load.
	largeHeap = 100 << 20
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
	quiet, own := quietGC()
	pacer := gcPacer{quiet: quiet, percent: quiet}
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
				log.Debug("the garbage collector follows the load", "percent", pacer.percent, "collectionsPerSecond", pacer.rate)
				debug.SetGCPercent(pacer.percent)
			}
			if spent {
				release()
			}
		}
	}
}

// quietGC returns the GC percentage of a process without load; own is false if the user has set another. An agent's is set by the
// launcher, so that it holds for what packages create before main, and is not inherited by child processes.
func quietGC() (percent int, own bool) {
	set, launchers := os.Getenv("GOGC"), os.Getenv(payload.EnvGOGC)
	_ = os.Unsetenv(payload.EnvGOGC)
	if set == "" {
		return quietPercent, true
	}
	percent, err := strconv.Atoi(launchers)
	if set != launchers || err != nil || percent <= 0 || percent >= busyPercent {
		return quietPercent, false
	}
	_ = os.Unsetenv("GOGC")
	return percent, true
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
	quiet   int // the percentage without load
	percent int
	rate    float64 // collections per second at quietPercent, averaged
	last    heapSample
	busy    bool
	loaded  time.Time // when the rate was last above quietRate
	short   time.Time // when memory last ran short
}

// next takes a sample and sets the percentage. It reports whether memory is to be given back: a load has ended, or the machine
// runs short. The available memory, in bytes, is only requested under load.
func (p *gcPacer) next(s heapSample, available func() uint64) (spent bool) {
	last := p.last
	p.last = s
	elapsed := s.at.Sub(last.at)
	if last.at.IsZero() || elapsed <= 0 {
		return false
	}
	// Go's least heap is 4 MiB at 100 %.
	base := max(float64(s.live+s.roots), 4<<20)
	rate := float64(s.allocated-last.allocated) / (base * quietPercent / 100) / elapsed.Seconds()
	p.rate += (rate - p.rate) * (1 - math.Exp(-elapsed.Seconds()/rateWindow.Seconds()))
	scale := max(1, largeHeap/base)
	if p.rate >= quietRate*scale {
		p.loaded = s.at
	}
	switch {
	case p.rate >= busyRate*scale:
		p.busy = true
	case p.busy && s.at.Sub(p.loaded) >= quietAfter:
		p.busy, p.percent = false, p.quiet
		return true
	}
	if !p.busy {
		return false
	}
	left, more := float64(available()), base*float64(busyPercent-p.quiet)/100
	switch {
	case p.percent == busyPercent && left < memoryReserve:
		p.percent, p.short = p.quiet, s.at
		return true
	case p.percent == p.quiet && left >= memoryReserve+more && (p.short.IsZero() || s.at.Sub(p.short) >= quietAfter):
		p.percent = busyPercent
	}
	return false
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
