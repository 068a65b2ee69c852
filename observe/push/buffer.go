// Package push sends what a node's collector reads to the store of another machine, and keeps it on disk until it is there.
//
// It owns the folder of the buffer. The tailers (podlogs, journal) write into a Buffer as into a logstore; a Sender posts its chunks to an API
// server, in the form of package wire. What it promises: a line is in the store once, whatever is killed on either side, as long as it has not
// been dropped here because the store was away for too long. For that, chunks are kept until they are on the store's disk, and lines that a new
// run of the collector reads again, because it was ahead of the places that it had saved, are recognised by the store (package ingest).
package push

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/wire"
)

const (
	// flushPeriod is how long lines wait for others, and chunkBytes how many bytes of records, before they become a chunk on disk.
	flushPeriod = time.Second
	chunkBytes  = 256 << 10
	// syncPeriod is how long a chunk may be written and not be safe from a power cut. The tailers save their places only after it.
	syncPeriod = 5 * time.Second
	// segmentBytes is how large a file of chunks becomes. What is dropped is dropped by whole files.
	segmentBytes = 2 << 20
	// minFree is how many bytes of the disk are left to others.
	minFree = 64 << 20
)

// ErrDisk means that nothing can be written. What was to be appended was not.
var ErrDisk = errors.New("the buffer for the store cannot be written")

// Options of a Buffer.
type Options struct {
	// Dir is the folder, which is this Buffer's alone.
	Dir string
	// MaxBytes bounds the files; the oldest are dropped first.
	MaxBytes int64
	Log      *slog.Logger
}

// Buffer is an open buffer. Its methods may be called from any goroutine.
type Buffer struct {
	opts       Options
	generation string
	more       chan struct{} // has a value when there are new chunks
	stop, done chan struct{}

	mu       sync.Mutex
	encoder  *wire.Encoder
	segments []*segment // oldest first; the last one is written, if file is open
	file     *os.File   // nil until there is something to write
	number   uint64     // of the last segment
	chunk    uint64     // number of the last chunk of the generation
	pending  []raw
	since    time.Time // when the first of pending came
	wake     *time.Timer
	unsynced time.Time // when the first chunk was written that is not synced
	marks    struct{ appended, written, synced uint64 }
	sent     place // up to here the store has the chunks
	hint     hint
	dropped  int64
	failure  string
}

// raw are records that become a chunk.
type raw struct {
	text   []byte // lines of JSON
	values int    // see wire.Values
	count  uint32
	mark   uint64 // of the last entry in it
}

// place is a chunk. The zero place is before all others.
type place struct {
	generation string
	number     uint64
}

// Open opens the buffer, and finds what an earlier run has left.
func Open(o Options) (*Buffer, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the buffer's folder: %w", err)
	}
	encoder, err := wire.NewEncoder()
	if err != nil {
		return nil, err
	}
	b := &Buffer{opts: o, encoder: encoder, generation: rand.Text(), more: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	if b.segments, err = readSegments(o.Dir, o.Log); err != nil {
		return nil, err
	}
	if len(b.segments) > 0 {
		b.number = b.segments[len(b.segments)-1].number
		b.tell()
	}
	b.wake = time.NewTimer(math.MaxInt64)
	b.mu.Lock()
	b.bound()
	b.mu.Unlock()
	go b.run()
	return b, nil
}

// run writes what has waited long enough, until Close.
func (b *Buffer) run() {
	defer close(b.done)
	for {
		select {
		case <-b.stop:
			return
		case now := <-b.wake.C:
			b.mu.Lock()
			if len(b.pending) > 0 && now.Sub(b.since) >= flushPeriod {
				_ = b.write() // the next Append returns the error
			}
			if !b.unsynced.IsZero() && now.Sub(b.unsynced) >= syncPeriod {
				b.sync()
			}
			b.schedule(now)
			b.mu.Unlock()
		}
	}
}

// schedule sets when run has to do something.
func (b *Buffer) schedule(now time.Time) {
	next := time.Duration(math.MaxInt64)
	if len(b.pending) > 0 {
		next = max(flushPeriod/10, b.since.Add(flushPeriod).Sub(now))
	}
	if !b.unsynced.IsZero() {
		next = min(next, max(flushPeriod/10, b.unsynced.Add(syncPeriod).Sub(now)))
	}
	b.wake.Reset(next)
}

// Close writes what was appended.
func (b *Buffer) Close() error {
	close(b.stop)
	<-b.done
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.write()
	b.sync()
	if b.file != nil {
		err = errors.Join(err, b.file.Close())
		b.file = nil
	}
	if err != nil {
		return fmt.Errorf("close the buffer: %w", err)
	}
	return nil
}

// add appends records, all or none.
func (b *Buffer) add(records []wire.Record, counts []uint32) error {
	texts := make([][]byte, len(records))
	for i, r := range records {
		text, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("write a record for the store: %w", err)
		}
		texts[i] = append(text, '\n')
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if b.failure != "" {
		if err := b.write(); err != nil {
			return err
		}
	}
	if len(b.pending) == 0 {
		b.since = now
	}
	full := false
	for i, text := range texts {
		b.marks.appended += uint64(counts[i])
		last := len(b.pending) - 1
		values := wire.Values(text)
		if last < 0 || len(b.pending[last].text)+len(text) > chunkBytes || b.pending[last].values+values > wire.MaxValues {
			full = last >= 0
			b.pending = append(b.pending, raw{})
			last++
		}
		p := &b.pending[last]
		p.text = append(p.text, text...)
		p.values += values
		p.count += counts[i]
		p.mark = b.marks.appended
	}
	if full {
		_ = b.write() // they are in memory; the next call returns the error
	}
	b.schedule(now)
	return nil
}

// write makes chunks of what is pending. What cannot be written stays pending.
func (b *Buffer) write() error {
	var err error
	for err == nil && len(b.pending) > 0 {
		if err = b.writeOne(b.pending[0]); err == nil {
			b.marks.written = b.pending[0].mark
			b.pending = slices.Delete(b.pending, 0, 1)
		}
	}
	text := ""
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrDisk, err)
		text = err.Error()
	}
	if text != "" && b.failure == "" {
		b.opts.Log.Warn("what is read for the store waits", "err", err)
	}
	b.failure = text
	return err
}

func (b *Buffer) writeOne(r raw) error {
	var disk unix.Statfs_t
	if err := unix.Statfs(b.opts.Dir, &disk); err == nil && int64(disk.Bavail)*disk.Bsize < minFree {
		return fmt.Errorf("less than %d MiB of the disk of %s are free", minFree>>20, b.opts.Dir)
	}
	if err := b.open(); err != nil {
		return err
	}
	s := b.segments[len(b.segments)-1]
	now := time.Now()
	frame := b.encoder.Chunk(nil, wire.Info{Number: b.chunk + 1, Time: now.UnixMilli(), Count: r.count}, r.text)
	if _, err := b.file.WriteAt(frame, s.size); err != nil {
		// A part of it is behind the end, and is written over.
		return err
	}
	b.chunk++
	if s.first == 0 {
		s.first = b.chunk
	}
	s.last, s.size = b.chunk, s.size+int64(len(frame))
	if b.unsynced.IsZero() {
		b.unsynced = now
	}
	b.tell()
	if s.size >= segmentBytes {
		b.sync()
		err := b.file.Close()
		b.file = nil
		if err != nil {
			b.opts.Log.Warn("close a file of the buffer", "err", err)
		}
	}
	b.bound()
	return nil
}

// open begins a segment, if none is open.
func (b *Buffer) open() error {
	if b.file != nil {
		return nil
	}
	s, file, err := createSegment(b.opts.Dir, b.number+1, b.generation)
	if err != nil {
		return err
	}
	b.number++
	b.file = file
	b.segments = append(b.segments, s)
	return nil
}

// sync makes what is written safe.
func (b *Buffer) sync() {
	if b.file != nil && !b.unsynced.IsZero() {
		if err := b.file.Sync(); err != nil {
			b.opts.Log.Warn("the buffer for the store is not safe from a power cut", "err", err)
			b.unsynced = time.Now()
			return
		}
	}
	b.unsynced = time.Time{}
	b.marks.synced = b.marks.written
}

// bound drops the oldest segments while there is too much.
func (b *Buffer) bound() {
	total := int64(0)
	for _, s := range b.segments {
		total += s.size
	}
	for total > b.opts.MaxBytes && len(b.segments) > 1 {
		s := b.segments[0]
		lost := int64(0)
		if !b.has(s) {
			lost = s.count(func(number uint64) bool { return b.sent.generation != s.generation || number > b.sent.number })
		}
		total -= s.size
		if lost > 0 {
			b.dropped += lost
			b.opts.Log.Warn("the store is away: what waited longest for it was dropped", "lines_and_samples", lost)
		}
		b.remove(1)
	}
}

// has reports whether the store has all of a segment.
func (b *Buffer) has(s *segment) bool {
	at := b.generationOf(b.sent)
	own := slices.Index(b.segments, s)
	return at >= 0 && (s.generation == b.sent.generation && s.last <= b.sent.number || own < at)
}

// generationOf is the index of the first segment of a place's generation, -1 if there is none.
func (b *Buffer) generationOf(p place) int {
	return slices.IndexFunc(b.segments, func(s *segment) bool { return s.generation == p.generation })
}

// remove removes the first segments.
func (b *Buffer) remove(n int) {
	for _, s := range b.segments[:n] {
		if err := os.Remove(s.path); err != nil {
			b.opts.Log.Warn("a file of the buffer stays", "err", err)
		}
	}
	b.segments = slices.Delete(b.segments, 0, n)
}

func (b *Buffer) tell() {
	select {
	case b.more <- struct{}{}:
	default:
	}
}

// Mark and Durable are as those of a logstore: whoever remembers how far he has read remembers it when Durable has reached the Mark that he saw
// after Append.
func (b *Buffer) Mark() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.marks.appended
}

// Durable is the mark up to which entries are on disk.
func (b *Buffer) Durable() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.marks.synced
}

// Problem says why nothing is kept, or what was lost.
func (b *Buffer) Problem() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.failure != "":
		return b.failure
	case b.dropped > 0:
		return fmt.Sprintf("%d lines and samples were dropped, because the store was away for too long", b.dropped)
	}
	return ""
}

// Numbers says how many bytes wait for the store, of how many that may, and how many lines and samples were dropped since Open.
func (b *Buffer) Numbers() map[string]int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	waiting := int64(0)
	for _, s := range b.segments {
		switch {
		case b.has(s):
		case b.hint.segment == s && b.hint.number == b.sent.number && s.generation == b.sent.generation:
			waiting += s.size - b.hint.offset
		default:
			waiting += s.size
		}
	}
	return map[string]int64{"waiting": waiting, "limit": b.opts.MaxBytes, "dropped": b.dropped}
}
