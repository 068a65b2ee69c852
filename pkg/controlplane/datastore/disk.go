package datastore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// probeInterval is the time between two test writes on a working disk.
	probeInterval = time.Minute
	// nearlyFull is the disk usage for a warning, in percent.
	nearlyFull = 90
	// reserve is the space that a database needs for its next transactions, in bytes. With less, the next one may be the last.
	reserve = 4 << 20
)

// disk is the disk of the database. SQLite keeps working for a while on a full disk, with its own free pages, so a full disk must
// be checked for explicitly.
type disk struct {
	dir string

	mu     sync.Mutex
	warned string
	failed error
	probed time.Time
}

// check returns an error if the disk does not accept writes. It checks the free space each time, and writes a page from time to
// time: only that detects a quota, a read-only mount or a broken disk.
func (d *disk) check(now time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.warned = ""
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return fmt.Errorf("check the disk of %s: %w", d.dir, err)
	}
	// The server runs as root, and can use the space that a file system reserves for root.
	if free := st.Bfree * uint64(st.Bsize); free < reserve {
		return fmt.Errorf("the disk of %s is full (%d kB free): writes fail until there is room; free some", d.dir, free>>10)
	}
	// As in df: space reserved for root is neither used nor free.
	used := st.Blocks - st.Bfree
	if percent := 100 * used / (used + st.Bavail); percent >= nearlyFull {
		d.warned = fmt.Sprintf("the disk of %s is %d %% full (%d MB free): free some before writes fail", d.dir, percent, st.Bavail*uint64(st.Bsize)>>20)
	}
	if d.failed != nil || now.Sub(d.probed) >= probeInterval {
		d.failed, d.probed = d.probe(), now
	}
	return d.failed
}

func (d *disk) warning() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.warned
}

// probe writes like the database.
func (d *disk) probe() (err error) {
	path := filepath.Join(d.dir, "probe")
	defer func() {
		// Remove the file even if writing failed: it may occupy the last page.
		err = errors.Join(err, ignoreMissing(os.Remove(path)))
		if err != nil {
			what := "does not accept writes"
			if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
				what = "is full: free some"
			}
			err = fmt.Errorf("the disk of %s %s: %w", d.dir, what, err)
		}
	}()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 4096))
	return errors.Join(err, f.Sync(), f.Close())
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
