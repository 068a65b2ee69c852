package journal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/logstore"
)

// KernelPlace is how far the kernel's log was read.
type KernelPlace struct {
	Boot     string `json:"boot"` // the kernel's id of this start of the machine
	Sequence uint64 `json:"sequence"`
}

// kernel is the kernel's log. A read returns one record: "priority,sequence,microseconds,flags;text", then lines with more, each after a space.
type kernel struct {
	path   string
	place  KernelPlace // records up to here were read, and stored if wanted
	fd     int         // -1 while it is not open
	absent bool        // it does not exist or may not be read, as in a container
}

func newKernel(path string, place KernelPlace) *kernel {
	k := &kernel{path: path, place: place, fd: -1}
	if boot := bootID(); boot != place.Boot {
		k.place = KernelPlace{Boot: boot}
	}
	return k
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (k *kernel) close() {
	if k.fd >= 0 {
		_ = unix.Close(k.fd)
		k.fd = -1
	}
}

const (
	// kernelRecord is larger than any record of the kernel.
	kernelRecord = 16 << 10
	// maxRecords is how many records are read at a time.
	maxRecords = 10_000
)

// readKernel stores the kernel's new records about killed processes.
func (j *Journal) readKernel(ctx context.Context) error {
	k := j.kernel
	if k.absent {
		return nil
	}
	if k.fd < 0 {
		fd, err := unix.Open(k.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != nil {
			k.absent = true
			return fmt.Errorf("reading the kernel's log: %w", &fs.PathError{Op: "open", Path: k.path, Err: err})
		}
		k.fd = fd
	}
	record := make([]byte, kernelRecord)
	for range maxRecords {
		n, err := unix.Read(k.fd, record)
		switch {
		case errors.Is(err, unix.EAGAIN) || err == nil && n == 0:
			return nil
		case errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR): // records were overwritten: the next read continues after them
			continue
		case err != nil:
			k.close()
			return fmt.Errorf("reading the kernel's log: %w", err)
		}
		r, ok := parseRecord(string(record[:n]))
		if !ok || r.sequence < k.place.Sequence {
			continue
		}
		if r.wanted() {
			if err := j.storeRecord(ctx, r); err != nil {
				// Start from the beginning; the place tells what was already stored.
				k.close()
				return fmt.Errorf("storing the kernel's log: %w", err)
			}
			j.dirty = true
		}
		k.place.Sequence = r.sequence + 1
	}
	return nil
}

func (j *Journal) storeRecord(ctx context.Context, r record) error {
	e := logstore.Entry{
		Time:     r.at(),
		Labels:   []logstore.Field{{Name: "job", Value: JobKernel}, {Name: "node", Value: j.opts.Node}},
		Line:     r.text,
		Metadata: r.metadata(),
	}
	if e.Time.Before(j.started) {
		known, err := j.known(ctx, e)
		if err != nil || known {
			return err
		}
	}
	return j.store([]logstore.Entry{e})
}

// record is a record of the kernel's log.
type record struct {
	sequence uint64
	since    time.Duration // since the start of the machine
	text     string
}

// parseRecord parses a record. It rejects records that a program has written into the kernel's log.
func parseRecord(raw string) (record, bool) {
	prefix, text, ok := strings.Cut(raw, ";")
	if !ok {
		return record{}, false
	}
	fields := strings.Split(prefix, ",")
	if len(fields) < 3 {
		return record{}, false
	}
	priority, err1 := strconv.ParseUint(fields[0], 10, 32)
	sequence, err2 := strconv.ParseUint(fields[1], 10, 64)
	micros, err3 := strconv.ParseInt(fields[2], 10, 64)
	if errors.Join(err1, err2, err3) != nil || priority>>3 != 0 || micros < 0 {
		return record{}, false
	}
	text, _, _ = strings.Cut(text, "\n")
	return record{sequence: sequence, since: time.Duration(micros) * time.Microsecond, text: text}, true
}

// at returns when it was written, by the current clock.
func (r record) at() time.Time {
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return time.Now()
	}
	return time.Now().Add(r.since - time.Duration(mono.Nano())).Round(time.Millisecond)
}

// wanted reports whether it is about a process that was killed because memory ran out.
func (r record) wanted() bool {
	return strings.Contains(r.text, "Killed process ") || strings.HasPrefix(r.text, "oom-kill:") || strings.Contains(r.text, " invoked oom-killer:")
}

var (
	podUID  = regexp.MustCompile(`task_memcg=[^,]*pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})`)
	killed  = regexp.MustCompile(`Killed process ([0-9]+) \((.{1,64}?)\)`)
	oomTask = regexp.MustCompile(`,task=(.{1,64}?),pid=([0-9]+),uid=[0-9]+$`)
)

func (r record) metadata() []logstore.Field {
	var out []logstore.Field
	add := func(name, value string) { out = append(out, logstore.Field{Name: name, Value: value}) }
	if m := podUID.FindStringSubmatch(r.text); m != nil {
		add(MetaUID, strings.ReplaceAll(m[1], "_", "-"))
	}
	if m := killed.FindStringSubmatch(r.text); m != nil {
		add(MetaPID, m[1])
		add(MetaProcess, m[2])
	} else if m := oomTask.FindStringSubmatch(r.text); m != nil {
		add(MetaPID, m[2])
		add(MetaProcess, m[1])
	}
	return out
}
