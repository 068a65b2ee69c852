// Package nodemetrics reads this machine's CPUs, memory, disks, filesystems and network for the store of metrics.
//
// The names, labels and types are node_exporter's, so that existing dashboards and rules work. There are about 120 series on a
// small machine, and no more with more pods: their network interfaces, mounts and loop devices are left out. The values
// are read with github.com/prometheus/procfs at each collection; only the list of mounts is cached for a minute. Package metrics
// collects, package server creates the Collector. It owns nothing on the machine, and writes nothing.
package nodemetrics

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/procfs"
	"github.com/prometheus/procfs/blockdevice"
)

// Collector is a prometheus.Collector of this machine. Several goroutines may collect at the same time.
type Collector struct {
	proc, sys string
	fs        procfs.FS
	disks     blockdevice.FS
	mounts    *mounts
	descs     map[string]*prometheus.Desc
	log       *slog.Logger

	mu     sync.Mutex
	failed map[string]string // the last error of a part, which is logged once
}

// New returns the Collector of this machine.
func New(log *slog.Logger) (*Collector, error) { return open("/proc", "/sys", log) }

func open(proc, sys string, log *slog.Logger) (*Collector, error) {
	fs, err := procfs.NewFS(proc)
	if err != nil {
		return nil, fmt.Errorf("open %s for the node's metrics: %w", proc, err)
	}
	disks, err := blockdevice.NewFS(proc, sys)
	if err != nil {
		return nil, fmt.Errorf("open %s and %s for the node's disks: %w", proc, sys, err)
	}
	c := &Collector{proc: proc, sys: sys, fs: fs, disks: disks, mounts: newMounts(fs), descs: map[string]*prometheus.Desc{}, log: log, failed: map[string]string{}}
	for _, f := range families() {
		c.descs[f.name] = prometheus.NewDesc(f.name, f.help, f.labels, nil)
	}
	return c, nil
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, desc := range c.descs {
		out <- desc
	}
}

// Collect implements prometheus.Collector. A part that cannot be read is missing, with node_scrape_collector_success 0, and the others
// are there.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	e := emitter{c.descs, out}
	for _, part := range []struct {
		name string
		read func(emitter) error
	}{
		{"cpu", c.cpu}, {"meminfo", c.memory}, {"loadavg", c.load}, {"pressure", c.pressure}, {"vmstat", c.vmstat}, {"filefd", c.files},
		{"filesystem", c.filesystems}, {"diskstats", c.diskstats}, {"netdev", c.network}, {"sockstat", c.sockets}, {"netstat", c.netstat},
		{"conntrack", c.conntrack}, {"uname", c.uname}, {"time", clock},
	} {
		err := part.read(e)
		e.gauge("node_scrape_collector_success", boolean(err == nil), part.name)
		c.report(part.name, err)
	}
}

// report logs a new error once: a missing kernel feature would otherwise be logged four times a minute.
func (c *Collector) report(part string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed[part] == text {
		return
	}
	c.failed[part] = text
	if text != "" {
		c.log.Warn("a part of the node's metrics cannot be read", "part", part, "err", text)
	}
}

// clock reports the machine's clock, to compare it with others.
func clock(e emitter) error {
	e.gauge("node_time_seconds", float64(time.Now().UnixNano())/1e9)
	return nil
}

// emitter sends samples of the families.
type emitter struct {
	descs map[string]*prometheus.Desc
	out   chan<- prometheus.Metric
}

func (e emitter) gauge(name string, value float64, labels ...string) {
	e.send(prometheus.GaugeValue, name, value, labels)
}

func (e emitter) counter(name string, value float64, labels ...string) {
	e.send(prometheus.CounterValue, name, value, labels)
}

func (e emitter) untyped(name string, value float64, labels ...string) {
	e.send(prometheus.UntypedValue, name, value, labels)
}

func (e emitter) send(kind prometheus.ValueType, name string, value float64, labels []string) {
	e.out <- prometheus.MustNewConstMetric(e.descs[name], kind, value, labels...)
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
