package nodemetrics

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/excerpt"
)

// cpu reads /proc/stat.
func (c *Collector) cpu(e emitter) error {
	stat, err := c.fs.Stat()
	if err != nil {
		return err
	}
	for id, s := range stat.CPU {
		for _, m := range []struct {
			mode    string
			seconds float64
		}{
			{"user", s.User}, {"nice", s.Nice}, {"system", s.System}, {"idle", s.Idle},
			{"iowait", s.Iowait}, {"irq", s.IRQ}, {"softirq", s.SoftIRQ}, {"steal", s.Steal},
		} {
			e.counter("node_cpu_seconds_total", m.seconds, strconv.FormatInt(id, 10), m.mode)
		}
	}
	e.gauge("node_boot_time_seconds", float64(stat.BootTime))
	e.counter("node_context_switches_total", float64(stat.ContextSwitches))
	e.counter("node_intr_total", float64(stat.IRQTotal))
	e.counter("node_forks_total", float64(stat.ProcessCreated))
	e.gauge("node_procs_running", float64(stat.ProcessesRunning))
	e.gauge("node_procs_blocked", float64(stat.ProcessesBlocked))
	return nil
}

// memoryField is a field of /proc/meminfo, with its name in node_exporter.
type memoryField struct {
	name string
	of   func(*procfs.Meminfo) *uint64
}

func memoryFields() []memoryField {
	type m = procfs.Meminfo
	return []memoryField{
		{"MemTotal_bytes", func(i *m) *uint64 { return i.MemTotalBytes }},
		{"MemFree_bytes", func(i *m) *uint64 { return i.MemFreeBytes }},
		{"MemAvailable_bytes", func(i *m) *uint64 { return i.MemAvailableBytes }},
		{"Buffers_bytes", func(i *m) *uint64 { return i.BuffersBytes }},
		{"Cached_bytes", func(i *m) *uint64 { return i.CachedBytes }},
		{"Active_bytes", func(i *m) *uint64 { return i.ActiveBytes }},
		{"Inactive_bytes", func(i *m) *uint64 { return i.InactiveBytes }},
		{"Active_anon_bytes", func(i *m) *uint64 { return i.ActiveAnonBytes }},
		{"Inactive_anon_bytes", func(i *m) *uint64 { return i.InactiveAnonBytes }},
		{"AnonPages_bytes", func(i *m) *uint64 { return i.AnonPagesBytes }},
		{"Mapped_bytes", func(i *m) *uint64 { return i.MappedBytes }},
		{"Shmem_bytes", func(i *m) *uint64 { return i.ShmemBytes }},
		{"Slab_bytes", func(i *m) *uint64 { return i.SlabBytes }},
		{"SReclaimable_bytes", func(i *m) *uint64 { return i.SReclaimableBytes }},
		{"SUnreclaim_bytes", func(i *m) *uint64 { return i.SUnreclaimBytes }},
		{"KernelStack_bytes", func(i *m) *uint64 { return i.KernelStackBytes }},
		{"PageTables_bytes", func(i *m) *uint64 { return i.PageTablesBytes }},
		{"Dirty_bytes", func(i *m) *uint64 { return i.DirtyBytes }},
		{"Writeback_bytes", func(i *m) *uint64 { return i.WritebackBytes }},
		{"SwapTotal_bytes", func(i *m) *uint64 { return i.SwapTotalBytes }},
		{"SwapFree_bytes", func(i *m) *uint64 { return i.SwapFreeBytes }},
		{"SwapCached_bytes", func(i *m) *uint64 { return i.SwapCachedBytes }},
		{"CommitLimit_bytes", func(i *m) *uint64 { return i.CommitLimitBytes }},
		{"Committed_AS_bytes", func(i *m) *uint64 { return i.CommittedASBytes }},
		{"HugePages_Total", func(i *m) *uint64 { return i.HugePagesTotal }},
		{"HugePages_Free", func(i *m) *uint64 { return i.HugePagesFree }},
		{"Hugepagesize_bytes", func(i *m) *uint64 { return i.HugepagesizeBytes }},
	}
}

// memory reads /proc/meminfo; a field that this kernel does not have is missing.
func (c *Collector) memory(e emitter) error {
	info, err := c.fs.Meminfo()
	if err != nil {
		return err
	}
	for _, f := range memoryFields() {
		if v := f.of(&info); v != nil {
			e.gauge("node_memory_"+f.name, float64(*v))
		}
	}
	return nil
}

func (c *Collector) load(e emitter) error {
	load, err := c.fs.LoadAvg()
	if err != nil {
		return err
	}
	e.gauge("node_load1", load.Load1)
	e.gauge("node_load5", load.Load5)
	e.gauge("node_load15", load.Load15)
	return nil
}

// pressure reads how long tasks have waited. For a whole machine, CPUs have no "full", and interrupts only have "full".
func (c *Collector) pressure(e emitter) error {
	var errs []error
	for _, resource := range []string{"cpu", "io", "memory", "irq"} {
		stats, err := c.fs.PSIStatsForResource(resource)
		switch {
		// Since Linux 6.1, and only with CONFIG_IRQ_TIME_ACCOUNTING.
		case resource == "irq" && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP)):
			continue
		case errors.Is(err, unix.EOPNOTSUPP):
			return errors.New("the kernel was started without pressure information: start it with psi=1")
		case err != nil:
			errs = append(errs, err)
			continue
		}
		if stats.Some != nil && resource != "irq" {
			e.counter("node_pressure_"+resource+"_waiting_seconds_total", float64(stats.Some.Total)/1e6)
		}
		if stats.Full != nil && resource != "cpu" {
			e.counter("node_pressure_"+resource+"_stalled_seconds_total", float64(stats.Full.Total)/1e6)
		}
	}
	return errors.Join(errs...)
}

// vmstatFields are the kept fields of /proc/vmstat, which has more than a hundred.
func vmstatFields() []string {
	return []string{"oom_kill", "pgfault", "pgmajfault", "pgpgin", "pgpgout", "pswpin", "pswpout"}
}

func (c *Collector) vmstat(e emitter) error {
	text, err := os.ReadFile(filepath.Join(c.proc, "vmstat"))
	if err != nil {
		return err
	}
	kept := map[string]bool{}
	for _, name := range vmstatFields() {
		kept[name] = true
	}
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !kept[name] {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return fmt.Errorf("read %s of vmstat: %w", name, err)
		}
		e.untyped("node_vmstat_"+name, n)
	}
	return nil
}

// files reads how many files are open on the machine.
func (c *Collector) files(e emitter) error {
	n, err := c.fs.SysctlInts("fs/file-nr")
	if err != nil {
		return err
	}
	if len(n) != 3 {
		return fmt.Errorf("fs/file-nr has %d numbers, not 3", len(n))
	}
	e.gauge("node_filefd_allocated", float64(n[0]))
	e.gauge("node_filefd_maximum", float64(n[2]))
	return nil
}

func (c *Collector) uname(e emitter) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	text := func(b []byte) string { return label(unix.ByteSliceToString(b)) }
	e.gauge("node_uname_info", 1, text(u.Sysname[:]), text(u.Release[:]), text(u.Version[:]), text(u.Machine[:]), text(u.Nodename[:]), text(u.Domainname[:]))
	return nil
}

// maxLabel bounds the values of labels: users can choose the names of mounts.
const maxLabel = 256

func label(s string) string { return excerpt.Of(s, maxLabel) }
