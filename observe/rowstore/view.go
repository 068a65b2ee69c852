package rowstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// viewTries is how often a table is linked again because the writer has merged parts meanwhile.
const viewTries = 20

// view is a folder of links to the files of a store: the library opens only what is its own, and changes what it opens. Nothing in the store's
// directory is changed, not even a number of links.
//
// The files are held open, and the links go by the descriptors: the library opens a file when a query needs it first, and a store that has been started
// since then may have merged it away.
type view struct {
	dir   string
	files []*os.File
	// damaged says which days are left out.
	damaged error
}

// newView makes a view of what is on disk now, in a new folder in temp.
func newView(dir, temp string) (*view, error) {
	if _, err := os.Stat(filepath.Join(dir, partitionsDir)); err != nil {
		return nil, fmt.Errorf("there is no store: %w", err)
	}
	to, err := os.MkdirTemp(temp, "rows-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for links: %w", err)
	}
	v := &view{dir: to}
	if err := v.fill(dir); err != nil {
		return nil, errors.Join(err, v.close())
	}
	return v, nil
}

func (v *view) fill(dir string) error {
	if err := os.Mkdir(filepath.Join(v.dir, partitionsDir), 0o700); err != nil {
		return fmt.Errorf("making a folder for links: %w", err)
	}
	days, err := partitions(dir)
	if err != nil {
		return err
	}
	for _, day := range days {
		to := filepath.Join(v.dir, partitionsDir, day)
		damage := v.linkDay(filepath.Join(dir, partitionsDir, day), to)
		if damage == nil {
			damage = checkPartition(to)
		} else if !errors.Is(damage, errDamaged) && !errors.Is(damage, fs.ErrNotExist) {
			return fmt.Errorf("linking the rows of %s: %w", day, damage)
		}
		if damage != nil {
			v.damaged = errors.Join(v.damaged, fmt.Errorf("the rows of %s are damaged and left out: %w", day, damage))
			if err := os.RemoveAll(to); err != nil {
				return fmt.Errorf("leaving out damaged rows: %w", err)
			}
		}
	}
	return nil
}

// linkDay links the rows first: the index that is there afterwards has the names of all their streams.
func (v *view) linkDay(from, to string) error {
	for _, table := range []string{dataDir, indexDir} {
		if err := v.linkTable(filepath.Join(from, table), filepath.Join(to, table)); err != nil {
			return err
		}
	}
	return nil
}

// linkTable links the parts of a table. The writer merges parts at any time; then the list has changed, and another try finds what is there now.
func (v *view) linkTable(from, to string) error {
	for try := 1; ; try++ {
		held := len(v.files)
		err := v.linkParts(from, to)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || try == viewTries {
			return err
		}
		if err := errors.Join(os.RemoveAll(to), v.release(held)); err != nil {
			return err
		}
	}
}

func (v *view) linkParts(from, to string) error {
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
			if err := v.link(filepath.Join(from, name, f.Name()), filepath.Join(to, name, f.Name())); err != nil {
				return err
			}
		}
	}
	// A merge that ended meanwhile has deleted parts file by file: only an unchanged list says that all files were there.
	again, err := parts(from)
	if err != nil {
		return err
	}
	if !slices.Equal(names, again) {
		return fs.ErrNotExist
	}
	return writeParts(to, names)
}

func (v *view) link(from, to string) error {
	f, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	v.files = append(v.files, f)
	return os.Symlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), to)
}

// release closes the files from this one on.
func (v *view) release(from int) error {
	var err error
	for _, f := range v.files[from:] {
		err = errors.Join(err, f.Close())
	}
	v.files = v.files[:from]
	return err
}

func (v *view) close() error {
	if err := errors.Join(os.RemoveAll(v.dir), v.release(0)); err != nil {
		return fmt.Errorf("removing the folder of links %s: %w", v.dir, err)
	}
	return nil
}
