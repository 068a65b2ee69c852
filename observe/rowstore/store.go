package rowstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/VictoriaLogs/lib/logstorage"
	"golang.org/x/sys/unix"
)

const (
	// libraryFlush is how often the library looks for rows in memory to write. A batch of rows that it was given is on disk after at most two of
	// these and the time of writing.
	libraryFlush = time.Second
	// libraryAhead is how far in the future a row may be.
	libraryAhead = 24 * time.Hour
	// minFree is the least space that must be left: the library ends the process when a write fails.
	minFree = 32 << 20
	// maxPending is how many bytes of rows wait in this package before Append waits too.
	maxPending = 4 << 20
	// piece is how many bytes of rows the library is given at a time. It copies them into buffers that grow by a quarter, and keeps what they were before:
	// five times as much, twice.
	piece = 256 << 10
	// perRow and perField are what they take beside their texts.
	perRow, perField = 72, 32
	// inFlightPoll is how often to check whether the library has written everything.
	inFlightPoll = 200 * time.Millisecond
	// freePeriod is for how long the free space of the disk is cached.
	freePeriod = time.Second
)

// Store is an open directory of rows. Its methods may be called from any goroutine.
//
// Rows go through three stages: Append puts them into pending. After half of FlushInterval, or when there are many, or for a query, they are handed
// over to the library, which makes them visible and writes them within two of its own intervals. The library does not report when it has written
// which row, only that nothing is left in memory. So handing over pauses if that has not been observed for half of FlushInterval. Then Durable
// advances.
type Store struct {
	opts  Options
	batch time.Duration // half of FlushInterval
	view  *view         // of a store opened ReadOnly

	// dbMu is held for reading while db is used, so that Close waits for queries.
	dbMu   sync.RWMutex
	db     *logstorage.Storage // nil after Close
	stop   context.CancelFunc
	done   sync.WaitGroup
	closed context.Context

	queries chan struct{} // limits how many run at a time

	mu            sync.Mutex
	room          *sync.Cond // signalled when pending was handed over
	pending       []Row      // the caller's: they are copied when they are handed over
	pendingBytes  int
	pendingSince  time.Time
	pendingOldest int64  // the time of the oldest row in it, in nanoseconds
	pendingNewest int64  // and of the newest
	appended      uint64 // rows accepted by Append
	handed        uint64 // of these, given to the library
	durable       uint64 // of these, on disk
	flight        flight
	names         names
	freeChecked   time.Time
	short         bool // of disk, when last checked

	sinceBound int64 // bytes of rows since the limit was last looked at

	wake     chan struct{} // wakes the writing loop
	grown    chan struct{} // wakes the loop that bounds the store
	rejected atomic.Int64
	folded   atomic.Int64
}

// flight is what was handed over to the library and may not be written yet.
type flight struct {
	running bool
	since   time.Time // when the first of it was handed over
	last    time.Time // when the last of it was
	streams uint64    // the library's count of new streams before it
}

// Open opens the store in opts.Dir, for writing or, with ReadOnly, as it is on disk.
func Open(opts Options) (*Store, error) {
	if opts.Dir == "" {
		return nil, errors.New("opening a store of rows: no directory is named")
	}
	if opts.FlushInterval == 0 {
		opts.FlushInterval = 5 * time.Second
	}
	if opts.Retention == 0 {
		opts.Retention = 7 * 24 * time.Hour
	}
	opts.Retention = max(opts.Retention, 24*time.Hour)
	opts.FlushInterval = max(opts.FlushInterval, 4*libraryFlush)
	opts.MinFreeBytes = max(opts.MinFreeBytes, minFree)
	s := &Store{
		opts:    opts,
		batch:   opts.FlushInterval / 2,
		wake:    make(chan struct{}, 1),
		grown:   make(chan struct{}, 1),
		queries: make(chan struct{}, 4),
		names:   newNames(opts.Names),
	}
	s.room = sync.NewCond(&s.mu)
	s.closed, s.stop = context.WithCancel(context.Background())

	dir := opts.Dir
	retention := opts.Retention
	if opts.ReadOnly {
		v, err := newView(opts.Dir, opts.Temp)
		if err != nil {
			return nil, fmt.Errorf("reading the store in %s: %w", opts.Dir, err)
		}
		if v.damaged != nil && opts.OnRemoved != nil {
			opts.OnRemoved(Removed{Err: v.damaged})
		}
		s.view, dir = v, v.dir
		retention = 100 * 365 * 24 * time.Hour // the writer removes expired rows
	} else if err := prepare(opts); err != nil {
		return nil, fmt.Errorf("opening the store in %s: %w", opts.Dir, err)
	}
	db, err := openLibrary(dir, &logstorage.StorageConfig{
		Retention:              retention,
		DefaultParallelReaders: readers(),
		FlushInterval:          libraryFlush,
		FutureRetention:        libraryAhead,
	})
	if err != nil {
		if s.view != nil {
			err = errors.Join(err, s.view.close())
		}
		return nil, fmt.Errorf("opening the store in %s: %w", opts.Dir, err)
	}
	s.db = db
	if !opts.ReadOnly {
		s.done.Go(s.write)
		if opts.MaxBytes > 0 {
			s.done.Go(s.bound)
		}
	}
	return s, nil
}

// Close writes what was appended and closes the files. Queries that run are waited for.
func (s *Store) Close() error {
	s.stop()
	s.mu.Lock()
	s.room.Broadcast()
	s.mu.Unlock()
	s.done.Wait()

	s.dbMu.Lock()
	defer s.dbMu.Unlock()
	if s.db == nil {
		return ErrClosed
	}
	s.mu.Lock()
	s.handOver(time.Now())
	s.durable = s.handed
	s.mu.Unlock()
	s.db.MustClose()
	s.db = nil
	if s.view != nil {
		return s.view.close()
	}
	return nil
}

// Append stores rows, and keeps them: they must not be changed any more. They can be queried after Flush or about half of FlushInterval, and are on disk
// after FlushInterval. It waits while the disk is slower than the rows come.
func (s *Store) Append(rows []Row) error {
	if s.opts.ReadOnly {
		return fmt.Errorf("%w: it was opened to be read", ErrReadOnly)
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.pendingBytes > maxPending && s.closed.Err() == nil {
		s.room.Wait()
	}
	if s.closed.Err() != nil {
		return ErrClosed
	}
	if s.isShort(now) {
		return fmt.Errorf("%w: less than %d MiB are free at %s; free some space or lower the limit", ErrReadOnly, s.opts.MinFreeBytes>>20, s.opts.Dir)
	}
	refused := &RejectedError{}
	for i := range rows {
		size, reason := s.checkRow(&rows[i], now)
		if reason != "" {
			if refused.Rows++; refused.Reason == "" {
				refused.Reason = reason
			}
			continue
		}
		s.add(rows[i], size, now)
	}
	signal(s.wake)
	if s.opts.MaxBytes > 0 && s.sinceBound > s.opts.MaxBytes/boundShare {
		s.sinceBound = 0
		signal(s.grown)
	}
	if refused.Rows > 0 {
		s.rejected.Add(int64(refused.Rows))
		return refused
	}
	return nil
}

// CheckTime says why a row of that time cannot be stored now, or nothing.
func (s *Store) CheckTime(at, now time.Time) (reason string) {
	// The library would silently drop a row that is too old when it is handed over.
	if at.Before(now.Add(time.Minute - s.opts.Retention)) {
		return "its time " + at.UTC().Format(time.RFC3339) + " is older than what is kept"
	}
	if at.After(now.Add(libraryAhead)) {
		return "its time " + at.UTC().Format(time.RFC3339) + " is more than a day in the future"
	}
	return ""
}

// checkRow returns how many bytes a row's texts have, or says why it cannot be stored.
func (s *Store) checkRow(row *Row, now time.Time) (size int, reason string) {
	if reason := s.CheckTime(row.Time, now); reason != "" {
		return 0, reason
	}
	if n := len(row.Stream) + len(row.Fields); n > MaxFields {
		return 0, fmt.Sprintf("it has %d fields, more than %d", n, MaxFields)
	}
	for i, group := range [2][]Field{row.Stream, row.Fields} {
		for k, f := range group {
			if reason := checkField(f, i == 0); reason != "" {
				return 0, reason
			}
			// The library ends the process when it reads a stream that has a name twice.
			if i == 0 && has(group[:k], f.Name) {
				return 0, fmt.Sprintf("its stream has the field %s twice", f.Name)
			}
			size += len(f.Name) + len(f.Value)
		}
	}
	if size > MaxRowBytes {
		return 0, fmt.Sprintf("it has %d bytes, more than %d", size, MaxRowBytes)
	}
	return size, ""
}

// add puts a row into pending. s.mu is held.
func (s *Store) add(row Row, size int, now time.Time) {
	nanos := row.Time.UnixNano()
	if len(s.pending) == 0 {
		s.pendingSince, s.pendingOldest, s.pendingNewest = now, nanos, nanos
	}
	s.pendingOldest, s.pendingNewest = min(s.pendingOldest, nanos), max(s.pendingNewest, nanos)
	s.pending = append(s.pending, row)
	s.appended++
	s.pendingBytes += perRow + perField*(len(row.Stream)+len(row.Fields)) + size
	s.sinceBound += int64(size)
	// Many rows are handed over at once, so that the library can compress them while others come.
	if s.pendingBytes >= piece && s.mayHandOver(now) {
		s.handOver(now)
	}
}

// isShort says whether the disk has too little space left. s.mu is held.
func (s *Store) isShort(now time.Time) bool {
	if now.Sub(s.freeChecked) >= freePeriod {
		free, err := freeBytes(s.opts.Dir)
		// A disk that cannot be queried counts as full.
		s.short = err != nil || free < s.opts.MinFreeBytes
		s.freeChecked = now
	}
	return s.short
}

// Flush makes what was appended visible to queries. While the library is left alone with what it has (see Store), it waits for that. Queries do not
// wait then, and find such rows a second or two later.
func (s *Store) Flush() {
	s.dbMu.RLock()
	defer s.dbMu.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for mark := s.appended; s.handed < mark && s.closed.Err() == nil; {
		if s.show(); s.handed < mark {
			s.room.Wait()
		}
	}
}

// show makes what was appended visible, if that may be done now. s.mu is held, and s.db is open.
func (s *Store) show() {
	now := time.Now()
	if len(s.pending) > 0 && s.mayHandOver(now) {
		s.handOver(now)
		signal(s.wake)
	}
}

// Mark is the number of rows that Append has accepted.
func (s *Store) Mark() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.appended
}

// Durable is the Mark up to which rows are on disk, where neither kill -9 nor a power cut takes them.
func (s *Store) Durable() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.durable
}

// mayHandOver is false while the library has had rows for so long that it must be left alone until it has written them. s.mu is held.
func (s *Store) mayHandOver(now time.Time) bool {
	return !s.flight.running || now.Sub(s.flight.since) < s.batch
}

// handOver gives pending to the library. s.mu is held, and s.db is open.
func (s *Store) handOver(now time.Time) {
	if len(s.pending) == 0 {
		return
	}
	if !s.flight.running {
		s.flight = flight{running: true, since: now, streams: s.libraryStats().StreamsCreatedTotal}
	}
	s.flight.last = now
	var fields []logstorage.Field
	rows, size := logstorage.GetLogRows(nil, nil, nil, nil, ""), 0
	for i := range s.pending {
		row := &s.pending[i]
		fields = fields[:0]
		for _, group := range [2][]Field{row.Stream, row.Fields} {
			for _, f := range group {
				fields = append(fields, logstorage.Field(f))
				size += perField + len(f.Name) + len(f.Value)
			}
		}
		var folded int
		fields, folded = s.names.fold(fields, len(row.Stream), row.Foreign, now)
		s.folded.Add(int64(folded))
		rows.MustAdd(logstorage.TenantID{}, row.Time.UnixNano(), fields, len(row.Stream))
		*row = Row{}
		if size >= piece || i == len(s.pending)-1 {
			s.db.MustAddRows(rows)
			s.db.DebugFlush()
			rows.ResetKeepSettings()
			size = 0
		}
	}
	logstorage.PutLogRows(rows)
	s.pending, s.pendingBytes = nil, 0
	s.handed = s.appended
	s.room.Broadcast()
}

// land records whether the library has written everything. s.mu is held.
func (s *Store) land(now time.Time) {
	if !s.flight.running {
		return
	}
	st := s.libraryStats()
	if st.InmemoryRowsCount > 0 || st.PendingRows > 0 {
		return
	}
	// A new stream's name is written by the index, which does not say when: by its own intervals it has after three of them.
	if st.StreamsCreatedTotal != s.flight.streams && now.Sub(s.flight.last) < 3*libraryFlush {
		return
	}
	s.flight.running = false
	s.durable = s.handed
}

func (s *Store) libraryStats() *logstorage.StorageStats {
	var st logstorage.StorageStats
	s.db.UpdateStats(&st)
	return &st
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// write hands rows over until Close. It sleeps while there are none.
func (s *Store) write() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-s.closed.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
		timer.Reset(s.step(time.Now()))
	}
}

// step does what is due, and returns when to continue.
func (s *Store) step(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.land(now)
	if len(s.pending) > 0 && s.mayHandOver(now) {
		due := s.pendingSince.Add(s.batch)
		full := s.pendingBytes >= piece
		if full || !now.Before(due) {
			s.handOver(now)
		} else if !s.flight.running {
			return due.Sub(now)
		}
	}
	if s.flight.running {
		return inFlightPoll
	}
	return time.Hour
}

// Stats says how much there is.
func (s *Store) Stats() Stats {
	s.dbMu.RLock()
	defer s.dbMu.RUnlock()
	if s.db == nil {
		return Stats{}
	}
	st := s.libraryStats()
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := int64(s.appended - s.handed)
	short := s.isShort(time.Now())
	out := Stats{
		Rows:       int64(st.RowsCount()) + waiting,
		Bytes:      diskBytes(&st.PartitionStats),
		Partitions: int(st.PartitionsCount),
		Streams:    int64(st.StreamsCreatedTotal),
		Short:      short,
		ReadOnly:   s.opts.ReadOnly || short,
		Rejected:   s.rejected.Load(),
		Folded:     s.folded.Load(),
	}
	// Without rows on disk, the library returns the extreme times.
	if st.RowsCount() > 0 && st.MinTimestamp <= st.MaxTimestamp {
		out.Oldest, out.Newest = time.Unix(0, st.MinTimestamp).UTC(), time.Unix(0, st.MaxTimestamp).UTC()
	}
	if waiting > 0 && (out.Oldest.IsZero() || s.pendingOldest < out.Oldest.UnixNano()) {
		out.Oldest = time.Unix(0, s.pendingOldest).UTC()
	}
	if waiting > 0 && (out.Newest.IsZero() || s.pendingNewest > out.Newest.UnixNano()) {
		out.Newest = time.Unix(0, s.pendingNewest).UTC()
	}
	return out
}

func diskBytes(st *logstorage.PartitionStats) int64 {
	return int64(st.IndexdbSizeBytes + st.CompressedSmallPartSize + st.CompressedBigPartSize)
}

// prepare makes the directory, refuses when another process has it, and sets aside what cannot be read.
func prepare(opts Options) error {
	dir := opts.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making it: %w", err)
	}
	// The library makes the rest only when the directory itself is missing.
	if err := os.MkdirAll(filepath.Join(dir, partitionsDir), 0o700); err != nil {
		return fmt.Errorf("making it: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("opening its lock: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another process writes to it (%w); stop that one, or open it to be read", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, removedDir)); err != nil {
		return fmt.Errorf("deleting what was removed before: %w", err)
	}
	days, err := partitions(dir)
	if err != nil {
		return err
	}
	for _, day := range days {
		damage := checkPartition(filepath.Join(dir, partitionsDir, day))
		if damage == nil {
			continue
		}
		to, err := setAside(dir, day)
		if err != nil {
			return errors.Join(damage, err)
		}
		if opts.OnRemoved != nil {
			opts.OnRemoved(Removed{Err: fmt.Errorf("the rows of %s are damaged and were moved to %s: %w", day, to, damage)})
		}
	}
	return nil
}

// openLibrary opens the storage. The library panics when it cannot.
func openLibrary(dir string, cfg *logstorage.StorageConfig) (db *logstorage.Storage, err error) {
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("the storage library gave up: %v", r)
		}
	}()
	return logstorage.MustOpenStorage(dir, cfg), nil
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("asking for the free space at %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
