// Package push sends what a node's collector reads to the store of another machine, and keeps it on disk until it has arrived.
//
// It owns the folder of the buffer. The tailers (podlogs, journal) write into a Buffer as into a logstore; a Sender posts its chunks to an API
// server, in the format of package wire. Each line is stored exactly once, whatever is killed on either side, unless it was
// dropped here because the store was away for too long. Chunks are kept until they are on the store's disk, and the store
// (package ingest) recognises lines that a new run of the collector reads again because their places were not saved.
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
	// Records become a chunk on disk after flushPeriod, or when they have chunkBytes.
	flushPeriod = time.Second
	chunkBytes  = 256 << 10
	// syncPeriod is how long a written chunk may stay unsynced. The tailers save their places only after the sync.
	syncPeriod = 5 * time.Second
	// segmentBytes is the size of a file of chunks. Chunks are dropped by whole files.
	segmentBytes = 2 << 20
	// minFree is how many bytes of the disk stay free.
	minFree = 64 << 20
)

// ErrDisk means that nothing can be written. The entries were not appended.
var ErrDisk = errors.New("the buffer for the store cannot be written")

// Options of a Buffer.
type Options struct {
	// Dir is the folder, which only this Buffer uses.
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
	sent     place // the store has the chunks up to here
	hint     hint
	dropped  int64
	failure  string
}

// raw holds the records of the next chunk.
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

// Open opens the buffer with the chunks of earlier runs.
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

// run writes pending records when they are due, until Close.
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

// schedule sets when run has to act.
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

// write writes pending records as chunks. They stay pending after an error.
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
		// The partial frame after the end will be overwritten.
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

// sync syncs the written chunks to disk.
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

// bound drops the oldest segments while the buffer is too large.
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

// Mark and Durable are like those of a logstore: a reader saves how far it has read once Durable has reached the Mark from
// after its Append.
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

// Problem says why nothing is stored, or what was lost.
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

// Numbers returns how many bytes wait for the store, the limit, and how many lines and samples were dropped since Open.
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
