// Package logstore stores lines of logs in labelled streams, like Loki, on top of a rowstore.
//
// It owns the rules for a line (labels, sizes, valid text), the order of the lines that it returns, and the live tails. It parses neither queries
// nor lines: package logql and the readers do. Lines come from podlogs, journal, cluster, ingest, receive and
// Loki's push API; they are read by logql, loki and the page.
package logstore

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"polymesh.dev/polymesh/observe/rowstore"
)

// Field is one named value: a label, or metadata of a line.
type Field = rowstore.Field

// Entry is one line.
type Entry struct {
	Time time.Time
	// Labels name the stream. Entries of Select have them sorted.
	Labels []Field
	Line   string
	// Metadata belongs to this line alone: a pod's uid, a trace's id. It may have any number of different values.
	Metadata []Field
}

// Limits of an entry. A longer line is truncated, with Truncated in its metadata; an entry beyond another limit is refused.
const (
	MaxLineBytes     = 256 << 10
	MaxLabels        = 16
	MaxNameBytes     = 100
	MaxLabelBytes    = 1024
	MaxMetadata      = 64
	MaxMetadataBytes = 32 << 10
	// Truncated is the name of the metadata that holds the length of a line before it was cut.
	Truncated = "truncated"
)

// Options say where the lines are kept.
type Options struct {
	// Store is the rows' directory and its limits.
	Store rowstore.Options
	// MaxStreams is how many streams of the platform may get lines in a day, 20,000 when zero, and MaxForeignStreams how many of all clients together
	// (OTLP, Loki's push API), 2,000 when zero. Lines of further streams are refused: a stream costs memory and space in the index, and clients choose its labels.
	MaxStreams, MaxForeignStreams int
	// ForeignBytesPerSecond is how many bytes all clients together may send, 1 MiB when zero, with a burst of 16 seconds' worth. Lines above it are refused:
	// they would push the platform's out of the store.
	ForeignBytesPerSecond int
	Log                   *slog.Logger
}

// Store is an open store of lines. Its methods may be called from any goroutine.
type Store struct {
	rows    *rowstore.Store
	streams streams
	foreign *rate.Limiter // bytes of clients

	refused  atomic.Int64 // lines, by this package
	refusals refusals

	mu    sync.Mutex
	tails map[*tail]struct{}
}

// Open opens the store.
func Open(opts Options) (*Store, error) {
	if opts.MaxStreams == 0 {
		opts.MaxStreams = 20_000
	}
	if opts.MaxForeignStreams == 0 {
		opts.MaxForeignStreams = 2000
	}
	if opts.ForeignBytesPerSecond == 0 {
		opts.ForeignBytesPerSecond = 1 << 20
	}
	if opts.Store.OnRemoved == nil {
		opts.Store.OnRemoved = func(r rowstore.Removed) {
			if r.Err != nil {
				opts.Log.Error("keeping the logs within their limit", "error", r.Err)
				return
			}
			opts.Log.Info("old logs were removed to stay within the limit", "until", r.Until, "bytes", r.Bytes)
		}
	}
	rows, err := rowstore.Open(opts.Store)
	if err != nil {
		return nil, fmt.Errorf("opening the logs: %w", err)
	}
	return &Store{
		rows: rows, streams: newStreams(opts.MaxStreams, opts.MaxForeignStreams), tails: map[*tail]struct{}{},
		foreign: rate.NewLimiter(rate.Limit(opts.ForeignBytesPerSecond), max(16*opts.ForeignBytesPerSecond, largestEntry)),
	}, nil
}

// Close writes what was appended and ends all tails.
func (s *Store) Close() error {
	s.mu.Lock()
	for t := range s.tails {
		t.cancel()
	}
	s.tails = nil
	s.mu.Unlock()
	if err := s.rows.Close(); err != nil {
		return fmt.Errorf("closing the logs: %w", err)
	}
	return nil
}

// Flush makes appended lines visible. Queries nearly always do that themselves (see rowstore).
func (s *Store) Flush() { s.rows.Flush() }

// Stats returns how much is stored.
func (s *Store) Stats() rowstore.Stats { return s.rows.Stats() }

// Problem returns why lines are not stored, empty if they are.
func (s *Store) Problem() string {
	if st := s.rows.Stats(); st.Short {
		return "the disk is short of space: no lines are stored until there is more"
	}
	return s.refusals.problem(time.Now())
}

// Numbers returns how much is stored: rows, bytes on disk, days, and streams created and lines refused since Open.
func (s *Store) Numbers() map[string]int64 {
	st := s.rows.Stats()
	return map[string]int64{
		"lines": st.Rows, "bytes": st.Bytes, "days": int64(st.Partitions), "streams": st.Streams, "refused": st.Rejected + s.refused.Load(),
	}
}

// Mark is the number of lines accepted so far, and Durable the mark up to which they are on disk. A reader may save how far it has read
// once Durable has reached the Mark from after its Append.
func (s *Store) Mark() uint64    { return s.rows.Mark() }
func (s *Store) Durable() uint64 { return s.rows.Durable() }

// Append stores entries. With a *rowstore.RejectedError the other entries are stored, and trying again does not help; with any other error none is.
func (s *Store) Append(entries []Entry) error {
	rows := make([]rowstore.Row, 0, len(entries))
	clean := make([]Entry, 0, len(entries))
	refused := &rowstore.RejectedError{}
	refuse := func(n int, reason string) {
		if refused.Rows += n; refused.Reason == "" {
			refused.Reason = reason
		}
	}
	for i := range entries {
		e, reason := s.clean(entries[i])
		if reason != "" {
			refuse(1, reason)
			s.refused.Add(1)
			continue
		}
		clean = append(clean, e)
		rows = append(rows, e.row())
	}
	if len(rows) > 0 {
		err := s.rows.Append(rows)
		var some *rowstore.RejectedError
		if errors.As(err, &some) {
			refuse(some.Rows, some.Reason)
		} else if err != nil {
			return fmt.Errorf("storing %d lines: %w", len(rows), err)
		}
		s.toTails(clean)
	}
	if refused.Rows > 0 {
		return refused
	}
	return nil
}
