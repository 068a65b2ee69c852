package rowstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// viewsDir holds the readers' folders of links.
	viewsDir = "readers"
	// viewLock is held by the reader for as long as it lives.
	viewLock = "reader.lock"
	// viewTries is how often a table is linked again because the writer has merged parts meanwhile.
	viewTries = 20
)

// view is a folder of links to the files of a store: the library opens only what is its own, and changes what it opens. Files of parts never
// change, so links to them are a copy that takes no space.
type view struct {
	dir  string
	lock *os.File
}

// newView links what is on disk now. On a disk that cannot be written it makes a folder of symbolic links elsewhere.
func newView(dir string) (*view, error) {
	if _, err := os.Stat(filepath.Join(dir, partitionsDir)); err != nil {
		return nil, fmt.Errorf("there is no store: %w", err)
	}
	link := os.Link
	views := filepath.Join(dir, viewsDir)
	err := os.MkdirAll(views, 0o700)
	if err == nil {
		// Who was killed before left his folder: a link to what is deleted otherwise takes space.
		err = sweepViews(dir)
	}
	var to string
	if err == nil {
		to, err = os.MkdirTemp(views, "")
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOSPC) {
		if dir, err = filepath.Abs(dir); err != nil {
			return nil, err
		}
		link = os.Symlink
		to, err = os.MkdirTemp("", "rows-")
	}
	if err != nil {
		return nil, fmt.Errorf("making a folder for links: %w", err)
	}
	v := &view{dir: to}
	if err := v.fill(dir, link); err != nil {
		return nil, errors.Join(err, v.close())
	}
	return v, nil
}

func (v *view) fill(dir string, link func(from, to string) error) error {
	var err error
	if v.lock, err = os.OpenFile(filepath.Join(v.dir, viewLock), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return fmt.Errorf("making a lock: %w", err)
	}
	if err := unix.Flock(int(v.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("locking a folder of links: %w", err)
	}
	if err := os.Mkdir(filepath.Join(v.dir, partitionsDir), 0o700); err != nil {
		return fmt.Errorf("making a folder for links: %w", err)
	}
	days, err := partitions(dir)
	if err != nil {
		return err
	}
	for _, day := range days {
		from, to := filepath.Join(dir, partitionsDir, day), filepath.Join(v.dir, partitionsDir, day)
		// The rows first: the index that is there afterwards has the names of all their streams.
		for _, table := range []string{dataDir, indexDir} {
			if err := linkTable(filepath.Join(from, table), filepath.Join(to, table), link); err != nil {
				return fmt.Errorf("linking the rows of %s: %w", day, err)
			}
		}
	}
	return nil
}

// linkTable links the parts of a table. The writer merges parts at any time; then the list has changed, and another try finds what is there now.
func linkTable(from, to string, link func(from, to string) error) error {
	for try := 1; ; try++ {
		err := linkParts(from, to, link)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || try == viewTries {
			return err
		}
		if err := os.RemoveAll(to); err != nil {
			return err
		}
	}
}

func linkParts(from, to string, link func(from, to string) error) error {
	names, err := parts(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, name := range names {
		files, err := os.ReadDir(filepath.Join(from, name))
		if err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(to, name), 0o700); err != nil {
			return err
		}
		for _, f := range files {
			if !f.Type().IsRegular() {
				continue
			}
			if err := link(filepath.Join(from, name, f.Name()), filepath.Join(to, name, f.Name())); err != nil {
				return err
			}
		}
	}
	// A merge that ended meanwhile has deleted parts file by file: only an unchanged list says that all files were there.
	again, err := parts(from)
	if err != nil {
		return err
	}
	if len(again) != len(names) {
		return fs.ErrNotExist
	}
	for i := range names {
		if names[i] != again[i] {
			return fs.ErrNotExist
		}
	}
	return writeParts(to, names)
}

func (v *view) close() error {
	err := os.RemoveAll(v.dir)
	if v.lock != nil {
		err = errors.Join(err, v.lock.Close())
	}
	if err != nil {
		return fmt.Errorf("removing the folder of links %s: %w", v.dir, err)
	}
	return nil
}

// sweepViews removes the folders of readers that do not live any more.
func sweepViews(dir string) error {
	views := filepath.Join(dir, viewsDir)
	entries, err := os.ReadDir(views)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for readers' folders: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(views, e.Name())
		lock, err := os.Open(filepath.Join(path, viewLock))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is just being made, or there was no time to link anything
		}
		if err != nil {
			return fmt.Errorf("looking for readers' folders: %w", err)
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = os.RemoveAll(path)
		}
		if err = errors.Join(err, lock.Close()); err != nil {
			return fmt.Errorf("removing a reader's folder: %w", err)
		}
	}
	return nil
}
