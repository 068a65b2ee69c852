package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// ObserveStore are the settings of this server's store of metrics, logs and traces.
type ObserveStore struct {
	// Disk is how many bytes the store may take; 0 for its default, which depends on the disk.
	Disk int64
	// Memory is how many bytes of memory the store may use.
	Memory int64
	// Retention is how long something is kept, if Disk is not reached before.
	Retention time.Duration
	// RemoteWrite lets pods write metrics.
	RemoteWrite bool
}

// The limits are those of the store (observe/config).
const (
	observeMinDisk      = 64 << 20
	observeMinMemory    = 150_000_000
	observeMaxMemory    = 1 << 40
	observeMinRetention = day
	observeMaxRetention = 3650 * day
)

const day = 24 * time.Hour

func (r *raw) checkObserve(o *ObserveStore) error {
	if r.observeDisk != "" {
		n, ok := bytesOf(r.observeDisk)
		if !ok {
			return fmt.Errorf("--observe-disk %q is not a number of bytes such as 2GiB", r.observeDisk)
		}
		if n < observeMinDisk {
			return fmt.Errorf("--observe-disk %s is less than %dMiB", r.observeDisk, observeMinDisk>>20)
		}
		o.Disk = n
	}
	memory, ok := bytesOf(r.observeMemory)
	if !ok {
		return fmt.Errorf("--observe-memory %q is not a number of bytes such as 512MiB", r.observeMemory)
	}
	if memory < observeMinMemory || memory > observeMaxMemory {
		return fmt.Errorf("--observe-memory %s is not between %dMB and %dTiB", r.observeMemory, observeMinMemory/1_000_000, observeMaxMemory>>40)
	}
	o.Memory = memory
	retention, ok := durationOf(r.observeRetention)
	if !ok {
		return fmt.Errorf("--observe-retention %q is not a time such as 7d or 36h", r.observeRetention)
	}
	if retention < observeMinRetention || retention > observeMaxRetention {
		return fmt.Errorf("--observe-retention %s is not between %dd and %dd", r.observeRetention, observeMinRetention/day, observeMaxRetention/day)
	}
	o.Retention, o.RemoteWrite = retention, r.observeRemoteWrite
	return nil
}

// bytesOf returns a number of bytes with one of Kubernetes' units, with or without the B: 2Gi, 2GiB, 2G, 2000000000.
func bytesOf(text string) (int64, bool) {
	number, unit := strings.TrimSuffix(text, "B"), int64(1)
	for _, u := range []struct {
		name  string
		bytes int64
	}{
		{"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}, {"T", 1e12}, {"G", 1e9}, {"M", 1e6}, {"k", 1e3}, {"K", 1e3},
	} {
		if digits, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = digits, u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || n > uint64(math.MaxInt64/unit) {
		return 0, false
	}
	return int64(n) * unit, true
}

// durationOf returns a Go duration, or a number of days: 7d.
func durationOf(text string) (time.Duration, bool) {
	if digits, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(digits, 10, 63)
		return time.Duration(n) * day, err == nil && n <= uint64(math.MaxInt64/day)
	}
	d, err := time.ParseDuration(text)
	return d, err == nil
}
