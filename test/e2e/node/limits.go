package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Limits limit a machine's resources: one cgroup contains all that runs on the node, the server, containerd, the shims and every pod.
// It is the node's own cgroup, in which the kubelet creates those of the pods, so `polymesh reset` removes it. What the kubelet reads
// from /proc is still the real machine: it does not evict pods when the cgroup's memory runs out.
type Limits struct {
	CPUs   float64 // 0: no limit
	Memory int64   // bytes, page cache included; 0: no limit
}

// Usage is what the limited cgroup of a node has used.
type Usage struct {
	Anonymous, Cache int64 // bytes, now
	Peak             int64 // bytes, the maximum; the kernel uses free memory as cache
	OOMKills         int   // processes that the kernel ended
}

const (
	cgroupMount = "/sys/fs/cgroup"
	cfsPeriod   = 100_000 // microseconds, the kernel's default
)

func unifiedCgroups() bool {
	_, err := os.Stat(filepath.Join(cgroupMount, "cgroup.controllers"))
	return err == nil
}

// limited returns the node's cgroup in the hierarchy of a controller.
func (n *Node) limited(controller string) string {
	if unifiedCgroups() {
		controller = ""
	}
	return filepath.Join(cgroupMount, controller, n.Layout().CgroupRoot())
}

// limit creates the cgroup, with one inside it for the server, and returns the files for the server's process id.
func (n *Node) limit() (procs []string, err error) {
	if n.opts.Limits == (Limits{}) {
		return nil, nil
	}
	quota := "-1"
	if n.opts.Limits.CPUs > 0 {
		quota = strconv.Itoa(int(n.opts.Limits.CPUs * cfsPeriod))
	}
	memory := "-1"
	if n.opts.Limits.Memory > 0 {
		memory = strconv.FormatInt(n.opts.Limits.Memory, 10)
	}
	values := [][3]string{{"memory", "memory.limit_in_bytes", memory}, {"cpu", "cpu.cfs_quota_us", quota}}
	if unifiedCgroups() {
		if err := os.WriteFile(filepath.Join(cgroupMount, "cgroup.subtree_control"), []byte("+cpu +memory"), 0o644); err != nil {
			return nil, fmt.Errorf("enable the cgroup controllers: %w", err)
		}
		most := func(value string) string { return strings.Replace(value, "-1", "max", 1) }
		values = [][3]string{{"memory", "memory.max", most(memory)}, {"cpu", "cpu.max", most(quota) + " " + strconv.Itoa(cfsPeriod)}}
	}
	for _, v := range values {
		inner := filepath.Join(n.limited(v[0]), "server")
		if err := os.MkdirAll(inner, 0o755); err != nil {
			return nil, fmt.Errorf("create the node's cgroup: %w", err)
		}
		if err := os.WriteFile(filepath.Join(n.limited(v[0]), v[1]), []byte(v[2]), 0o644); err != nil {
			return nil, fmt.Errorf("limit the node: %w", err)
		}
		if file := filepath.Join(inner, "cgroup.procs"); !slices.Contains(procs, file) {
			procs = append(procs, file)
		}
	}
	return procs, nil
}

// Usage returns what a node with Limits uses.
func (n *Node) Usage() (u Usage, err error) {
	dir := n.limited("memory")
	// Names in version 1 of cgroups and in version 2. A counter that the kernel lacks stays 0.
	anonymous, cache, peak, events := "total_rss", "total_cache", "memory.max_usage_in_bytes", "memory.oom_control"
	if unifiedCgroups() {
		anonymous, cache, peak, events = "anon", "file", "memory.peak", "memory.events"
	}
	for file, fields := range map[string]map[string]*int64{
		"memory.stat": {anonymous: &u.Anonymous, cache: &u.Cache},
		peak:          {"": &u.Peak},
	} {
		if err := counters(filepath.Join(dir, file), fields); err != nil {
			return u, err
		}
	}
	// Version 1 counts a kill in the cgroup of the process, version 2 also in those above.
	files := []string{filepath.Join(dir, events)}
	if !unifiedCgroups() {
		files = nil
		err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == events {
				files = append(files, path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // the pod has just ended
			}
			return err
		})
	}
	for _, file := range files {
		var kills int64
		err = errors.Join(err, counters(file, map[string]*int64{"oom_kill": &kills}))
		u.OOMKills += int(kills)
	}
	return u, err
}

// counters reads lines of "name value", or a file with one value.
func counters(path string, fields map[string]*int64) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			name, value = "", name
		}
		if field := fields[name]; field != nil {
			if *field, err = strconv.ParseInt(value, 10, 64); err != nil {
				return fmt.Errorf("read %s: %w", path, err)
			}
		}
	}
	return nil
}
