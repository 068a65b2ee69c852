package podlogs

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/logstore"
)

const (
	// readBytes is how much of a file is read at a time, and how long a line in it may be: containerd writes 16 KiB at most.
	readBytes = 256 << 10
	// headBytes are looked at to know a file again.
	headBytes = 512
	// lingering is how long a file that will not grow any more is watched for its last lines: containerd opens the new one some moments after
	// the kubelet has moved the old one away.
	lingering = 5 * time.Second
)

// fileID tells a file from others, also when its name changes.
type fileID struct{ dev, inode uint64 }

// Place is how far a file was read.
type Place struct {
	// Offset is the start of the first line that is not complete, or not stored.
	Offset int64 `json:"offset"`
	// Last is the time of the last line of each stream before Offset, in nanoseconds.
	Last [streamCount]int64 `json:"last"`
	// Skipping is set where a line's beginning was not read, or was too long: it goes on after the next line feed.
	Skipping bool `json:"skipping,omitempty"`
}

// file is one log.
type file struct {
	id         fileID
	restart    int
	moved      string // the time in its name since the kubelet moved it away
	compressed bool
	size       int64  // when it was met
	head       []byte // its beginning

	file   *os.File     // nil when it is done, or too many are open
	unpack *gzip.Reader // of a compressed file
	at     int64        // where reading goes on

	place  Place // up to here lines are stored
	parsed Place // up to here complete lines were seen
	rest   []byte
	parts  [streamCount]part

	removed, superseded bool // no name any more; there is a newer one
	done                bool // nothing will come any more
	quiet               time.Time
}

// part is a line whose end has not come yet.
type part struct {
	text  []byte
	at    time.Time
	start int64
	open  bool
}

// knownHead is from where on a beginning tells a file from others: it has the time of its first line in it, to the nanosecond.
const knownHead = 40

// is says whether a file that was met is this one. Moving keeps the inode, packing the beginning; and the inode of a file that was removed is
// soon another's.
func (f *file) is(id fileID, head []byte) bool {
	if f.file != nil && f.id == id {
		return true
	}
	if len(f.head) < knownHead {
		return f.id == id
	}
	return bytes.HasPrefix(head, f.head)
}

// seen notes what was read at an offset, if the beginning is not known yet.
func (f *file) seen(offset int64, chunk []byte) {
	if n := headBytes - len(f.head); n > 0 && offset == int64(len(f.head)) {
		f.head = append(f.head, chunk[:min(n, len(chunk))]...)
	}
}

func (f *file) name() string {
	name := strconv.Itoa(f.restart) + ".log"
	if f.moved != "" {
		name += "." + f.moved
	}
	if f.compressed {
		name += ".gz"
	}
	return name
}

// rewind goes back to where lines are stored.
func (f *file) rewind() {
	f.at, f.parsed = f.place.Offset, f.place
	f.rest, f.parts, f.unpack, f.quiet = nil, [streamCount]part{}, nil, time.Time{}
}

func (f *file) close() {
	if f.file != nil {
		_ = f.file.Close()
		f.file = nil
	}
	f.rewind()
}

// finish ends the work on a file.
func (f *file) finish() {
	f.done = true
	f.close()
}

// held is how many bytes wait for the end of their line.
func (f *file) held() int {
	n := len(f.rest)
	for _, p := range f.parts {
		n += len(p.text)
	}
	return n
}

// readHead gives the beginning of a file.
func readHead(r io.ReaderAt, compressed bool) ([]byte, error) {
	head := make([]byte, headBytes)
	var from io.Reader = io.NewSectionReader(r, 0, 1<<40)
	if compressed {
		z, err := gzip.NewReader(from)
		if err != nil {
			return nil, fmt.Errorf("unpacking a log: %w", err)
		}
		from = z
	}
	n, err := io.ReadFull(from, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("reading the beginning of a log: %w", err)
	}
	return head[:n], nil
}

// next reads on. Nothing and no error is the end, for now.
func (f *file) next(buffer []byte) ([]byte, error) {
	if f.compressed {
		return f.nextUnpacked(buffer)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.file.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Size < f.at { // cut short by somebody: it begins again
		f.place, f.head = Place{Last: f.place.Last}, nil
		f.rewind()
	}
	if st.Size == f.at {
		return nil, nil
	}
	n, err := f.file.ReadAt(buffer, f.at)
	f.seen(f.at, buffer[:n])
	f.at += int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buffer[:n], err
}

func (f *file) nextUnpacked(buffer []byte) ([]byte, error) {
	if f.unpack == nil {
		z, err := gzip.NewReader(io.NewSectionReader(f.file, 0, 1<<40))
		if err != nil {
			return nil, err
		}
		if _, err := io.CopyN(io.Discard, z, f.at); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		f.unpack = z
	}
	n, err := io.ReadFull(f.unpack, buffer)
	f.seen(f.at, buffer[:n])
	f.at += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return buffer[:n], err
}

// ended says that a file was read to its end and will not grow any more.
func (f *file) ended(now time.Time) bool {
	if f.compressed {
		return true
	}
	if !f.removed && !f.superseded {
		f.quiet = time.Time{}
		return false
	}
	if f.quiet.IsZero() {
		f.quiet = now
	}
	return now.Sub(f.quiet) >= lingering
}

// parse gives the lines that a piece of the file completes, with time, text and the label stream, and moves parsed on. A line longer than most
// comes in pieces.
func (f *file) parse(chunk []byte, most int) (entries []logstore.Entry, malformed int64) {
	start := f.at - int64(len(chunk)) - int64(len(f.rest))
	data := chunk
	if len(f.rest) > 0 {
		data = append(f.rest, chunk...)
	}
	for {
		i := bytes.IndexByte(data[:min(len(data), readBytes)], '\n')
		whole := i >= 0
		if !whole {
			if len(data) <= readBytes {
				break
			}
			i = readBytes // containerd writes no such lines: the rest of it is left out
		}
		line := data[:i]
		if !f.parsed.Skipping {
			e, ok := f.line(line, start, most)
			if !ok || !whole {
				malformed++
			}
			entries = append(entries, e...)
		}
		f.parsed.Skipping = !whole
		n := i
		if whole {
			n++
		}
		data, start = data[n:], start+int64(n)
		f.parsed.Offset = start
	}
	f.rest = append([]byte(nil), data...)
	// A line whose end has not come is read again from its beginning after a restart.
	for _, p := range f.parts {
		if p.open {
			f.parsed.Offset = min(f.parsed.Offset, p.start)
		}
	}
	return entries, malformed
}

// line gives the entries that a line in the file completes: mostly one, none when it is a part.
func (f *file) line(raw []byte, start int64, most int) (out []logstore.Entry, ok bool) {
	if len(raw) == 0 {
		return nil, true
	}
	l, ok := parseCRI(raw)
	if !ok {
		l = criLine{stream: unknown, text: raw, at: time.Now()}
		if last := max(f.parsed.Last[stdout], f.parsed.Last[stderr], f.parsed.Last[unknown]); last > 0 {
			l.at = time.Unix(0, last+1)
		}
	}
	p := &f.parts[l.stream]
	if !p.open {
		p.open, p.at, p.start = true, l.at, start
	}
	p.text = append(p.text, l.text...)
	for len(p.text) > most {
		out = append(out, f.entry(l.stream, p.at, string(p.text[:most])))
		p.text = append([]byte(nil), p.text[most:]...)
		p.start = start
	}
	if !l.partial {
		out = append(out, f.entry(l.stream, p.at, string(p.text)))
		*p = part{text: p.text[:0]}
		if cap(p.text) > 4<<10 {
			p.text = nil
		}
	}
	return out, ok
}

// leftover gives what has no end at the end of a file. containerd writes the rest of such a line into the next file.
func (f *file) leftover() []logstore.Entry {
	var out []logstore.Entry
	for stream, p := range f.parts {
		if p.open && len(p.text) > 0 {
			out = append(out, f.entry(stream, p.at, string(p.text)))
		}
	}
	if len(f.rest) > 0 && !f.parsed.Skipping {
		e, _ := f.line(f.rest, f.at-int64(len(f.rest)), len(f.rest))
		out = append(out, e...)
	}
	f.parsed.Offset = f.at
	return out
}

// entry makes one with a time after the last one's of its stream: containerd's clock may give two lines the same, and then nothing would say which
// came first.
func (f *file) entry(stream int, at time.Time, text string) logstore.Entry {
	nanos := at.UnixNano()
	if last := f.parsed.Last[stream]; nanos <= last && last-nanos < int64(time.Millisecond) {
		nanos = last + 1
	}
	f.parsed.Last[stream] = nanos
	return logstore.Entry{Time: time.Unix(0, nanos).UTC(), Labels: []logstore.Field{{Name: "stream", Value: streamNames[stream]}}, Line: text}
}
