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
	// headBytes of a file are compared to recognise it.
	headBytes = 512
	// lingering is how long a rotated file is watched for its last lines: containerd opens the new one some time after
	// the kubelet has renamed the old one.
	lingering = 5 * time.Second
)

// fileID identifies a file, also after a rename.
type fileID struct{ dev, inode uint64 }

// Place is how far a file was read.
type Place struct {
	// Offset is the start of the first line that is incomplete or not stored.
	Offset int64 `json:"offset"`
	// Last is the time of the last line of each stream before Offset, in nanoseconds.
	Last [streamCount]int64 `json:"last"`
	// Skipping is set if a line's beginning was not read or was too long: reading continues after the next line feed.
	Skipping bool `json:"skipping,omitempty"`
	// Inside has a bit for each stream whose next lines in the file are the rest of a line of the app whose beginning was not read.
	Inside uint8 `json:"inside,omitempty"`
}

// file is one log.
type file struct {
	id         fileID
	restart    int
	moved      string // the time in its name after the kubelet has rotated it
	compressed bool
	size       int64  // when it was found
	head       []byte // its beginning

	file   *os.File     // nil if it is done or too many are open
	unpack *gzip.Reader // of a compressed file
	at     int64        // where reading continues

	place  Place // lines up to here are stored
	parsed Place // complete lines up to here were parsed
	rest   []byte
	parts  [streamCount]part

	removed, superseded bool // it has no name any more; there is a newer one
	done                bool // it was read completely and will not grow
	quiet               time.Time
}

// part is a line without an end yet.
type part struct {
	text  []byte
	at    time.Time
	start int64
	open  bool
}

// knownHead is how long a beginning must be to identify a file: it contains the time of the first line, to the nanosecond.
const knownHead = 40

// is reports whether a file that was found is this one. Renaming keeps the inode, compressing keeps the beginning. The inode of a removed file is
// soon reused.
func (f *file) is(id fileID, head []byte) bool {
	if f.file != nil && f.id == id {
		return true
	}
	if len(f.head) < knownHead {
		return f.id == id
	}
	return bytes.HasPrefix(head, f.head)
}

// seen records the beginning of the file, if it is not known yet.
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

// rewind goes back to the last stored line.
func (f *file) rewind() {
	f.at, f.parsed = f.place.Offset, f.place
	f.rest, f.parts, f.unpack, f.quiet = nil, [streamCount]part{}, nil, time.Time{}
}

// lookBack is how much is read before the place at which a history begins, to see which lines of the app have begun there: four parts of one.
const lookBack = 64 << 10

// startAt lets reading begin with the first line of the app that begins after an offset.
func (f *file) startAt(offset int64) {
	f.place = Place{Offset: offset, Skipping: true}
	if f.file != nil {
		from := max(0, offset-lookBack)
		text, skipped := make([]byte, offset-from+readBytes), offset-from
		n, err := f.file.ReadAt(text, from)
		// Up to the end of the line that is skipped.
		if (err == nil || errors.Is(err, io.EOF)) && int64(n) > skipped {
			end := max(0, bytes.IndexByte(text[skipped:n], '\n'))
			f.place.Inside = inside(text[:skipped+int64(end)])
		}
	}
	f.rewind()
}

// inside returns the bits of the streams of which a piece of a file ends within a line of the app.
func inside(text []byte) (bits uint8) {
	for line := range bytes.Lines(text) {
		l, ok := parseCRI(bytes.TrimSuffix(line, []byte("\n")))
		if !ok {
			continue
		}
		bits &^= 1 << l.stream
		if l.partial {
			bits |= 1 << l.stream
		}
	}
	return bits
}

func (f *file) close() {
	if f.file != nil {
		_ = f.file.Close()
		f.file = nil
	}
	f.rewind()
}

// finish closes a file for good.
func (f *file) finish() {
	f.done = true
	f.close()
}

// held returns how many bytes wait for the end of their line.
func (f *file) held() int {
	n := len(f.rest)
	for _, p := range f.parts {
		n += len(p.text)
	}
	return n
}

// readHead returns the beginning of a file.
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

// next reads the next bytes. It returns none at the end of the file, which may still grow.
func (f *file) next(buffer []byte) ([]byte, error) {
	if f.compressed {
		return f.nextUnpacked(buffer)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.file.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Size < f.at { // truncated: start again
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

// ended reports whether a file was read to its end and will not grow any more.
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

// parse returns the lines that a piece of the file completes, with time, text and the label stream, and advances parsed. A line longer than most
// is split.
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
			i = readBytes // containerd writes no such lines: the rest is skipped
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
	// After a restart, an incomplete line is read again from its beginning.
	for _, p := range f.parts {
		if p.open {
			f.parsed.Offset = min(f.parsed.Offset, p.start)
		}
	}
	return entries, malformed
}

// line returns the entries that a line in the file completes: usually one, none if it is a part.
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
	if bit := uint8(1) << l.stream; f.parsed.Inside&bit != 0 {
		if !l.partial {
			f.parsed.Inside &^= bit
		}
		return nil, ok
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

// leftover returns the incomplete line at the end of a file. containerd writes the rest of it into the next file.
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

// entry returns an entry with a time after the last one of its stream: containerd may write two lines with the same time, and their
// order would be lost.
func (f *file) entry(stream int, at time.Time, text string) logstore.Entry {
	nanos := at.UnixNano()
	if last := f.parsed.Last[stream]; nanos <= last && last-nanos < int64(time.Millisecond) {
		nanos = last + 1
	}
	f.parsed.Last[stream] = nanos
	return logstore.Entry{Time: time.Unix(0, nanos).UTC(), Labels: []logstore.Field{{Name: "stream", Value: streamNames[stream]}}, Line: text}
}
