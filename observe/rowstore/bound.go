package rowstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The limit on bytes. The library's own one drops whole days, and never today or yesterday, so a noisy day has no limit there. This drops parts:
// the files into which the library merges rows, each with the rows of some time. Nothing is rewritten, so it costs no space and no time.
const (
	// The limit is checked at this interval, and whenever rows of this share of it have arrived.
	boundPeriod = 10 * time.Second
	boundShare  = 32
	// Above trimAt, the oldest parts go until trimTo is reached. What is left is for the library, which writes a merged part before it
	// removes what it was merged from.
	trimAt, trimTo = 0.75, 0.65
	// removedDir is where parts and days go before they are deleted: a rename is all or nothing.
	removedDir = "removed"
)

// bound keeps the store within MaxBytes until Close.
func (s *Store) bound() {
	ticker := time.NewTicker(boundPeriod)
	defer ticker.Stop()
	for {
		select {
		case <-s.closed.Done():
			return
		case <-s.grown:
		case <-ticker.C:
		}
		s.dbMu.RLock()
		estimate := diskBytes(&s.libraryStats().PartitionStats)
		s.dbMu.RUnlock()
		// The library's figure leaves out what a file takes beyond its length, which is much of a small part.
		if estimate < s.opts.MaxBytes/4 {
			continue
		}
		used, err := diskUsage(s.opts.Dir)
		if err != nil || float64(used) < trimAt*float64(s.opts.MaxBytes) {
			continue // a file is being moved: the next check is soon
		}
		until, err := s.trim(used)
		if s.opts.OnRemoved != nil && (err != nil || !until.IsZero()) {
			s.opts.OnRemoved(Removed{Until: until, Bytes: used, Err: err})
		}
	}
}

// trim removes the oldest parts until trimTo is reached, and returns the time before which all rows are gone.
func (s *Store) trim(used int64) (until time.Time, err error) {
	// No query has a part open and no row is on its way while a day is taken out of the library and put back.
	s.dbMu.Lock()
	defer s.dbMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.db == nil {
		return time.Time{}, nil
	}
	excess := used - int64(trimTo*float64(s.opts.MaxBytes))
	// Unreadable days go first.
	damaged, err := diskUsage(filepath.Join(s.opts.Dir, damagedDir))
	if err == nil && damaged > 0 {
		if err := os.RemoveAll(filepath.Join(s.opts.Dir, damagedDir)); err != nil {
			return time.Time{}, fmt.Errorf("removing damaged rows: %w", err)
		}
		excess -= damaged
	}
	days := s.db.PartitionList()
	slices.Sort(days)
	for i, day := range days {
		if excess <= 0 {
			break
		}
		freed, newest, err := s.trimDay(day, excess, i == len(days)-1)
		excess -= freed
		if newest.After(until) {
			until = newest
		}
		if err != nil {
			return until, fmt.Errorf("removing the oldest rows of %s: %w", day, err)
		}
	}
	return until, os.RemoveAll(filepath.Join(s.opts.Dir, removedDir))
}

// trimDay removes the oldest parts of a day, or the day if none is left. The newest part of the last day stays.
func (s *Store) trimDay(day string, excess int64, last bool) (freed int64, newest time.Time, err error) {
	partition := filepath.Join(s.opts.Dir, partitionsDir, day)
	if err := s.db.PartitionDetach(day); err != nil {
		return 0, newest, err
	}
	gone := false
	defer func() {
		if !gone {
			err = errors.Join(err, s.db.PartitionAttach(day))
		}
	}()
	all, err := dataParts(partition)
	if err != nil {
		return 0, newest, err
	}
	keep := 0
	for keep < len(all) && freed < excess && !(last && keep == len(all)-1) {
		freed += all[keep].bytes
		newest = all[keep].newest
		keep++
	}
	if keep == len(all) && !last {
		gone = true
		return freed, newest, s.discard(partition)
	}
	if keep == 0 {
		return 0, newest, nil
	}
	var names []string
	for _, p := range all[keep:] {
		names = append(names, p.name)
	}
	// A part that is not listed does not count any more, even if the next step fails.
	if err := writeParts(filepath.Join(partition, dataDir), names); err != nil {
		return 0, newest, err
	}
	for _, p := range all[:keep] {
		if err := s.discard(filepath.Join(partition, dataDir, p.name)); err != nil {
			return freed, newest, err
		}
	}
	return freed, newest, nil
}

// discard moves a directory to removedDir, where it is deleted now or at the next Open.
func (s *Store) discard(path string) error {
	to := filepath.Join(s.opts.Dir, removedDir)
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(to, "")
	if err != nil {
		return err
	}
	return os.Rename(path, filepath.Join(tmp, filepath.Base(path)))
}
