package tracestore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	// DefaultSpansPerSecond is what 50 requests a second of 8 spans come to, twice as much as a small cluster has.
	DefaultSpansPerSecond = 200
	// maxStreams is how many services have streams of their own in a day. The spans of others are stored together.
	maxStreams = 500
	// dependencyPeriod is how often the counts of calls are stored.
	dependencyPeriod = time.Minute
	// loads is how many queries for whole spans run at a time.
	loads = 2
)

// Options say where the store is and what it may take. The first six are rowstore's.
type Options struct {
	Dir                    string
	Retention              time.Duration
	MaxBytes, MinFreeBytes int64
	ReadOnly               bool
	Temp                   string
	// SpansPerSecond is the limit above which only some traces are kept, as an average over a minute. 0 means DefaultSpansPerSecond, less is no limit.
	SpansPerSecond int
	// OnRemoved, if set, is called with what was removed because of the limit on bytes.
	OnRemoved func(rowstore.Removed)
	Log       *slog.Logger
}

// Result is the outcome of an Append.
type Result struct {
	Stored  int
	Sampled int // left off because too many came; whole traces
	Refused int // not stored for another reason
	// Reason is why spans were left off, for the client. It is empty when all are stored.
	Reason string
}

// Stats is the store as it is now.
type Stats struct {
	rowstore.Stats
	Stored, Sampled, Refused int64 // spans since Open
}

// Store is an open directory of spans. Its methods may be called from any goroutine.
type Store struct {
	opts   Options
	rows   *rowstore.Store
	sample *sampler
	calls  *dependencies
	log    *slog.Logger

	loads, own chan struct{} // own is for the privileged alone
	stop       context.CancelFunc
	done       sync.WaitGroup

	storing sync.RWMutex // held while counts become rows
	mu      sync.Mutex
	streams map[string]struct{} // services with streams of their own
	day     int64

	stored, sampled, refused atomic.Int64
}

// Open opens the store in opts.Dir. rowstore.LimitMemory has been called.
func Open(opts Options) (*Store, error) {
	if opts.SpansPerSecond == 0 {
		opts.SpansPerSecond = DefaultSpansPerSecond
	}
	rows, err := rowstore.Open(rowstore.Options{
		Dir: opts.Dir, Retention: opts.Retention, MaxBytes: opts.MaxBytes, MinFreeBytes: opts.MinFreeBytes, ReadOnly: opts.ReadOnly,
		Temp: opts.Temp, OnRemoved: opts.OnRemoved, Names: ownColumns(),
	})
	if err != nil {
		return nil, fmt.Errorf("opening the store of traces: %w", err)
	}
	now := time.Now()
	ctx, stop := context.WithCancel(context.Background())
	s := &Store{
		opts: opts, rows: rows, sample: newSampler(float64(max(0, opts.SpansPerSecond)), now), calls: newDependencies(now), log: opts.Log,
		loads: make(chan struct{}, loads), own: make(chan struct{}, 1), stop: stop, streams: map[string]struct{}{},
	}
	if !opts.ReadOnly {
		s.done.Go(func() { s.storeCalls(ctx) })
	}
	return s, nil
}

// Close stores what was counted and closes the files.
func (s *Store) Close() error {
	s.stop()
	s.done.Wait()
	return s.rows.Close()
}

// Append stores the valid spans that the limit allows. After an error of the store, the same spans may be sent again later. Spans that were
// dropped for another reason are in Result.
func (s *Store) Append(spans []Span) (Result, error) {
	now := time.Now()
	var r Result
	refuse := func(n int, reason string) {
		r.Refused += n
		if r.Reason == "" {
			r.Reason = reason
		}
	}
	rows := make([]rowstore.Row, 0, len(spans))
	keep := make([]Span, 0, len(spans))
	names := columns{}
	for i := range spans {
		if reason := check(&spans[i]); reason != "" {
			refuse(1, reason)
			continue
		}
		one, leftOff := bound(&spans[i])
		switch s.sample.decide(one.TraceID, size(&one), now) {
		case sampled:
			r.Sampled++
		case tooLong:
			refuse(1, fmt.Sprintf("a trace has more than %d spans", MaxTraceSpans))
		case kept:
			rows = append(rows, row(&one, leftOff, s.ownStream(one.Service, now), names))
			keep = append(keep, one)
		}
	}
	if r.Sampled > 0 {
		r.Reason = fmt.Sprintf("more than %d spans a second came: only some traces are kept, whole ones", s.opts.SpansPerSecond)
	}
	if len(rows) > 0 {
		err := s.rows.Append(rows)
		var rejected *rowstore.RejectedError
		switch {
		case errors.As(err, &rejected):
			refuse(rejected.Rows, rejected.Reason)
			r.Stored = len(rows) - rejected.Rows
		case err != nil:
			s.refused.Add(int64(len(spans)))
			return Result{}, fmt.Errorf("storing spans: %w", err)
		default:
			r.Stored = len(rows)
		}
		for i := range keep {
			s.calls.add(&keep[i], now)
		}
	}
	s.stored.Add(int64(r.Stored))
	s.sampled.Add(int64(r.Sampled))
	s.refused.Add(int64(r.Refused))
	return r, nil
}

// ownStream reports whether the service's spans have their own stream: there must be few streams, and clients choose the names.
func (s *Store) ownStream(service string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if day := now.Unix() / (24 * 60 * 60); day != s.day {
		clear(s.streams)
		s.day = day
	}
	if _, ok := s.streams[service]; ok {
		return true
	}
	if len(s.streams) >= maxStreams {
		return false
	}
	s.streams[service] = struct{}{}
	return true
}

// storeCalls stores what was counted about calls every minute, and when the store is closed.
func (s *Store) storeCalls(ctx context.Context) {
	ticker := time.NewTicker(dependencyPeriod)
	defer ticker.Stop()
	for open := true; open; {
		select {
		case <-ctx.Done():
			open = false
		case <-ticker.C:
		}
		if err := s.writeCalls(); err != nil {
			s.log.Warn("calls between services are not stored", "error", err)
		}
	}
}

func (s *Store) writeCalls() error {
	s.storing.Lock()
	defer s.storing.Unlock()
	rows := s.calls.take()
	if len(rows) == 0 {
		return nil
	}
	return s.rows.Append(rows)
}

// Stats says how much there is.
func (s *Store) Stats() Stats {
	return Stats{Stats: s.rows.Stats(), Stored: s.stored.Load(), Sampled: s.sampled.Load(), Refused: s.refused.Load()}
}
