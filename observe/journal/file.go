package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"polymesh.dev/polymesh/observe/logstore"
)

const (
	// readBytes is how much of a file is read at a time, and the longest line. Longer ones are split.
	readBytes = 64 << 10
	// history is how much of a file is read if there is no saved place.
	history = 8 << 20
	// maxSiblings is how many names beside a log are checked to find it after its rotation.
	maxSiblings = 1000
)

// Place is how far a file was read.
type Place struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Offset int64  `json:"offset"`
	// Last is the time of the last line before, in nanoseconds.
	Last int64 `json:"last"`
}

// file is one program's log.
type file struct {
	File
	place Place // lines up to here are stored

	file   *os.File
	moved  time.Time // when another file was first seen under the log's name
	limit  *rate.Limiter
	recall *recall
	// dropped counts lines since the last report about them.
	dropped  int64
	reported time.Time
}

const (
	// reportPeriod is how often dropped lines are reported.
	reportPeriod = 10 * time.Second
	// clockSlack is how far out of order lines may be.
	clockSlack = 2 * time.Second
)

func newFile(f File, place Place, perSecond int) *file {
	return &file{File: f, place: place, limit: rate.NewLimiter(rate.Limit(perSecond), 2*perSecond)}
}

func (f *file) close() {
	if f.file != nil {
		_ = f.file.Close()
		f.file = nil
	}
}

func identity(st *unix.Stat_t) (dev, inode uint64) { return uint64(st.Dev), st.Ino }

// openLog opens a regular file without following a link: its folder may belong to a user.
func openLog(path string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, st, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, st, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return nil, st, &fs.PathError{Op: "open", Path: path, Err: errors.New("it is not a regular file")}
	}
	return os.NewFile(uintptr(fd), path), st, nil
}

// open opens the file that was read last, which may have been renamed, or else the current one.
func (f *file) open() error {
	opened, st, err := openLog(f.Path)
	if err != nil {
		return err
	}
	dev, inode := identity(&st)
	switch {
	case f.place.Inode == 0:
		f.place = Place{Dev: dev, Inode: inode, Offset: max(0, st.Size-history)}
	case f.place.Dev != dev || f.place.Inode != inode:
		if moved := f.findMoved(); moved != nil {
			f.file = moved
			return opened.Close()
		}
		f.place = Place{Dev: dev, Inode: inode, Last: f.place.Last}
	case st.Size < f.place.Offset: // it was cut short
		f.place.Offset = 0
	}
	f.file = opened
	return nil
}

// findMoved looks for the file that was read last beside the current one: a rotated file keeps its inode.
func (f *file) findMoved() *os.File {
	dir, base := filepath.Split(f.Path)
	stem := strings.TrimSuffix(base, filepath.Ext(base))
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, err := d.Readdirnames(maxSiblings)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	for _, name := range names {
		if name == base || !strings.HasPrefix(name, stem) {
			continue
		}
		opened, st, err := openLog(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		if dev, inode := identity(&st); dev == f.place.Dev && inode == f.place.Inode && st.Size >= f.place.Offset {
			return opened
		}
		_ = opened.Close()
	}
	return nil
}

// readFile stores the new lines of a file. full means that there are more.
func (j *Journal) readFile(ctx context.Context, f *file) (full bool, err error) {
	if f.file == nil {
		err := f.open()
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("reading the log of %s: %w", f.Name, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.file.Fd()), &st); err != nil {
		return false, fmt.Errorf("reading the log of %s: %w", f.Name, err)
	}
	if st.Size < f.place.Offset { // it was cut short
		f.place.Offset = 0
	}
	n, err := f.file.ReadAt(j.buffer, f.place.Offset)
	if err != nil && !errors.Is(err, io.EOF) {
		f.close()
		return false, fmt.Errorf("reading the log of %s: %w", f.Name, err)
	}
	chunk := j.buffer[:n]
	end := bytes.LastIndexByte(chunk, '\n') + 1
	if end == 0 {
		switch {
		case n == len(j.buffer): // a line that is too long
			end = n
		case f.replaced():
			end = n // the end of a rotated file
		default:
			return false, nil
		}
	}
	if end == 0 {
		// It was read to its end, and there is a new file: continue with that.
		f.close()
		f.place, f.moved = Place{Last: f.place.Last}, time.Time{}
		if opened, st, err := openLog(f.Path); err == nil {
			f.place.Dev, f.place.Inode = identity(&st)
			f.file = opened
			return true, nil
		}
		return false, nil
	}
	place := f.place
	entries, dropped := j.entries(f, chunk[:end], &place)
	if entries, err = j.fresh(ctx, f, entries); err == nil {
		err = j.store(entries)
	}
	if err != nil {
		return false, fmt.Errorf("storing the log of %s: %w", f.Name, err)
	}
	place.Offset += int64(end)
	f.place, j.dirty = place, true
	f.dropped += dropped
	j.count(0, dropped, 0)
	if err := j.reportDropped(f); err != nil {
		return false, err
	}
	return n == len(j.buffer), nil
}

// lingering is how long a rotated log is watched: its writer may still add lines before it opens the new one.
const lingering = 2 * time.Second

// replaced reports whether another file has the log's name, and this one has had time to get its last lines.
func (f *file) replaced() bool {
	var st unix.Stat_t
	if err := unix.Lstat(f.Path, &st); err != nil {
		return false
	}
	if dev, inode := identity(&st); dev == f.place.Dev && inode == f.place.Inode {
		f.moved = time.Time{}
		return false
	}
	if f.moved.IsZero() {
		f.moved = time.Now()
	}
	return time.Since(f.moved) >= lingering
}

// entries makes entries from lines, and drops lines above the limit.
func (j *Journal) entries(f *file, chunk []byte, place *Place) (entries []logstore.Entry, dropped int64) {
	labels := j.labels(f)
	for line := range bytes.Lines(chunk) {
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			continue
		}
		// A line without a time, such as one of a stack trace, belongs to the line before.
		at, ok := lineTime(string(line[:min(len(line), 128)]), j.started)
		nanos := at.UnixNano()
		if !ok {
			nanos = place.Last + 1
			if place.Last == 0 {
				nanos = time.Now().UnixNano()
			}
		}
		if nanos <= place.Last && place.Last-nanos < int64(time.Millisecond) {
			nanos = place.Last + 1
		}
		// The clock was set back: without this, the limit would drop all lines until it reaches the old time again.
		if place.Last-nanos > int64(clockSlack) {
			f.limit.SetLimitAt(time.Unix(0, nanos), f.limit.Limit())
		}
		place.Last = nanos
		at = time.Unix(0, nanos).UTC()
		if !f.limit.AllowN(at, 1) {
			dropped++
			continue
		}
		entries = append(entries, logstore.Entry{Time: at, Labels: labels, Line: string(line)})
	}
	return entries, dropped
}

func (j *Journal) labels(f *file) []logstore.Field {
	return []logstore.Field{{Name: "container", Value: f.Name}, {Name: "job", Value: JobPolymesh}, {Name: "node", Value: j.opts.Node}}
}

func (j *Journal) reportDropped(f *file) error {
	now := time.Now()
	if f.dropped == 0 || now.Sub(f.reported) < reportPeriod {
		return nil
	}
	text := fmt.Sprintf("%d lines of this log were dropped: there were more than %d a second", f.dropped, j.opts.LinesPerSecond)
	if err := j.store([]logstore.Entry{{Time: now, Labels: j.labels(f), Line: text}}); err != nil {
		return fmt.Errorf("storing the log of %s: %w", f.Name, err)
	}
	f.dropped, f.reported = 0, now
	return nil
}

// lineTime parses the time in a line of Go's slog or logrus (time=…) or klog (I1130 04:05:06.123456, without a year and in the machine's zone).
func lineTime(line string, now time.Time) (time.Time, bool) {
	if rest, ok := strings.CutPrefix(line, "time="); ok {
		word, _, _ := strings.Cut(rest, " ")
		at, err := time.Parse(time.RFC3339Nano, strings.Trim(word, `"`))
		return at, err == nil
	}
	const klog = "0102 15:04:05.000000"
	if len(line) > len(klog) && strings.IndexByte("IWEF", line[0]) >= 0 {
		at, err := time.ParseInLocation(klog, line[1:1+len(klog)], time.Local)
		if err != nil {
			return time.Time{}, false
		}
		at = at.AddDate(now.Year()-at.Year(), 0, 0)
		if at.Sub(now) > 24*time.Hour {
			at = at.AddDate(-1, 0, 0)
		}
		return at, true
	}
	word, _, _ := strings.Cut(line, " ")
	at, err := time.Parse(time.RFC3339Nano, word)
	return at, err == nil
}
