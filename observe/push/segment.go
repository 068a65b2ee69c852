package push

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/wire"
)

// suffix ends the names of the files, which are numbers in the order in which they were written.
const suffix = ".chunks"

// segment is a file of chunks of one generation: a line of JSON that names it, and frames.
type segment struct {
	path       string
	number     uint64
	generation string
	begin      int64  // offset of the first frame
	size       int64  // of the complete frames
	first      uint64 // number of the first chunk; 0 if there is none
	last       uint64
}

// segmentHeader is the first line of a file.
type segmentHeader struct {
	Version    int    `json:"version"`
	Generation string `json:"generation"`
}

func createSegment(dir string, number uint64, generation string) (*segment, *os.File, error) {
	text, err := json.Marshal(segmentHeader{wire.Version, generation})
	if err != nil {
		return nil, nil, err
	}
	text = append(text, '\n')
	s := &segment{path: filepath.Join(dir, fmt.Sprintf("%016d%s", number, suffix)), number: number, generation: generation, begin: int64(len(text)), size: int64(len(text))}
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_RDWR|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("create a file of the buffer: %w", err)
	}
	if _, err := f.Write(text); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("begin a file of the buffer: %w", err), f.Close(), os.Remove(s.path))
	}
	return s, f, nil
}

// readSegments finds the files of earlier runs. Files without a complete chunk are removed.
func readSegments(dir string, log *slog.Logger) ([]*segment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the buffer: %w", err)
	}
	var all []*segment
	for _, e := range entries {
		text, ok := strings.CutSuffix(e.Name(), suffix)
		number, err := strconv.ParseUint(text, 10, 64)
		if !ok || err != nil {
			continue
		}
		s := &segment{path: filepath.Join(dir, e.Name()), number: number}
		err = s.inspect()
		if err == nil {
			all = append(all, s)
			continue
		}
		log.Warn("a file of the buffer has nothing that can be sent, and is removed", "file", s.path, "err", err)
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove a damaged file of the buffer: %w", err)
		}
	}
	slices.SortFunc(all, func(a, b *segment) int { return cmp.Compare(a.number, b.number) })
	return all, nil
}

// maxSegment is larger than any file, even if the last chunk has the largest size.
const maxSegment = segmentBytes + wire.MaxBody

// content reads the file.
func (s *segment) content() ([]byte, error) {
	f, err := os.OpenFile(s.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxSegment))
}

// inspect finds the complete chunks in a file of an earlier run: a crash may have cut off its end.
func (s *segment) inspect() error {
	text, err := s.content()
	if err != nil {
		return err
	}
	line, frames, ok := bytes.Cut(text, []byte("\n"))
	var h segmentHeader
	switch {
	case !ok || json.Unmarshal(line, &h) != nil || h.Generation == "" || len(h.Generation) > wire.MaxGeneration:
		return errors.New("it has no beginning")
	case h.Version != wire.Version:
		return fmt.Errorf("it was written by another version (%d, this one writes %d)", h.Version, wire.Version)
	}
	s.generation, s.begin = h.Generation, int64(len(line)+1)
	s.size = s.begin
	for len(frames) > 0 {
		info, _, rest, err := wire.CutFrame(frames)
		if err != nil || s.last != 0 && info.Number != s.last+1 {
			break
		}
		if s.first == 0 {
			s.first = info.Number
		}
		s.last = info.Number
		s.size += int64(len(frames) - len(rest))
		frames = rest
	}
	if s.first == 0 {
		return errors.New("it has no whole chunk")
	}
	return nil
}

// count returns the number of lines and samples in the chosen chunks.
func (s *segment) count(chosen func(number uint64) bool) (n int64) {
	text, err := s.content()
	if err != nil || int64(len(text)) < s.begin {
		return 0
	}
	for frames := text[s.begin:]; len(frames) > 0; {
		info, _, rest, err := wire.CutFrame(frames)
		if err != nil {
			break
		}
		if chosen(info.Number) {
			n += int64(info.Count)
		}
		frames = rest
	}
	return n
}

// hint is where a chunk ends, to find the next one without reading the file from its beginning.
type hint struct {
	segment *segment
	number  uint64
	offset  int64
}

// batch holds the chunks of one push.
type batch struct {
	header wire.Header
	chunks []byte
	last   uint64
}

// next returns the next chunks for the store, up to limit bytes but at least one; nil if there are none.
func (b *Buffer) next(limit int) (*batch, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		s := b.unsent()
		if s == nil {
			return nil, nil
		}
		out, err := b.read(s, limit)
		if out != nil || err != nil {
			return out, err
		}
		// Missing chunks are skipped, and the chunks after them are sent as the oldest.
		b.opts.Log.Error("a file of the buffer is damaged, and what is in it is lost", "file", s.path)
		b.dropped++
		b.sent = place{s.generation, s.last}
	}
}

// unsent returns the segment with the next chunk, nil if the store has all.
func (b *Buffer) unsent() *segment {
	begin := max(0, b.generationOf(b.sent))
	for _, s := range b.segments[begin:] {
		if s.first != 0 && !(s.generation == b.sent.generation && s.last <= b.sent.number) {
			return s
		}
	}
	return nil
}

// read returns chunks of a segment; nil if they cannot be read.
func (b *Buffer) read(s *segment, limit int) (*batch, error) {
	after := uint64(0)
	if s.generation == b.sent.generation {
		after = b.sent.number
	}
	offset := s.begin
	if b.hint.segment == s && b.hint.number == after {
		offset = b.hint.offset
	}
	f, err := os.OpenFile(s.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the buffer: %w", err)
	}
	defer f.Close()
	text := make([]byte, s.size-offset)
	if n, err := f.ReadAt(text, offset); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the buffer: %w", err)
	} else {
		text = text[:n]
	}
	out := &batch{header: wire.Header{Version: wire.Version, Generation: s.generation, Oldest: b.oldest(s.generation), Dropped: b.dropped}}
	for len(text) > 0 {
		info, _, rest, err := wire.CutFrame(text)
		if err != nil {
			break
		}
		size := len(text) - len(rest)
		offset += int64(size)
		if info.Number > after {
			if out.last != 0 && len(out.chunks)+size > limit {
				break
			}
			if out.last == 0 {
				out.header.First, out.header.Behind = info.Number, max(0, time.Now().UnixMilli()-info.Time)
			}
			out.chunks, out.last = append(out.chunks, text[:size]...), info.Number
			b.hint = hint{s, info.Number, offset}
		}
		text = rest
	}
	if out.last == 0 {
		return nil, nil
	}
	return out, nil
}

// oldest returns the number of the oldest chunk of a generation.
func (b *Buffer) oldest(generation string) uint64 {
	for _, s := range b.segments {
		if s.generation == generation && s.first != 0 {
			return s.first
		}
	}
	return 0
}

// answered records the store's answer to a batch.
func (b *Buffer) answered(of *batch, a wire.Answer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	newest := of.last
	for _, s := range b.segments {
		if s.generation == of.header.Generation {
			newest = max(newest, s.last)
		}
	}
	b.sent = place{of.header.Generation, min(a.Position, newest)}
	// A chunk only counts as on the store's disk if all before it are, also those of earlier generations.
	n := 0
	for i, s := range b.segments {
		open := b.file != nil && i == len(b.segments)-1
		if open || a.Durable == 0 || s.generation == of.header.Generation && (s.last > a.Durable || s.last > b.sent.number) {
			break
		}
		if at := b.generationOf(b.sent); i >= at && s.generation != of.header.Generation {
			break // a later generation
		}
		n = i + 1
	}
	b.remove(n)
}
