// Package atomicfile replaces files so that a reader, and a start after a crash or a power failure, finds either the complete old
// contents or the complete new ones. When a function returns, the file and its name are on disk.
//
// All important files of the server are written through it. It knows nothing about their contents.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Write replaces a file. Missing folders are created, with mode 0755.
func Write(path string, content []byte, mode fs.FileMode) error {
	f, err := Create(path, mode)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Commit()
}

// File is the new version of a file, which does not have its name yet.
type File struct {
	*os.File
	path string
}

// Prefix is the name prefix of incomplete files. A killed process leaves them behind.
const Prefix = ".new-"

// Create starts replacing the file at path. Missing folders are created, with mode 0755.
func Create(path string, mode fs.FileMode) (*File, error) {
	if err := MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), Prefix+"*")
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(mode); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return &File{f, path}, nil
}

// Commit syncs the contents, gives the file its name, and returns when the name is on disk.
func (f *File) Commit() error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return Rename(f.Name(), f.path)
}

// Discard removes an uncommitted file. It does nothing after Commit.
func (f *File) Discard() {
	if f.Close() == nil {
		_ = os.Remove(f.Name())
		return
	}
	// Commit has closed it, but may have failed to rename it.
	if _, err := os.Lstat(f.Name()); err == nil {
		_ = os.Remove(f.Name())
	}
}

// Rename renames, replacing an existing file, and returns when both names are on disk.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if filepath.Dir(from) != filepath.Dir(to) {
		if err := SyncDir(filepath.Dir(from)); err != nil {
			return err
		}
	}
	return SyncDir(filepath.Dir(to))
}

// Symlink creates a link, replacing an existing one, and returns when it is on disk.
func Symlink(target, path string) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, next); err != nil {
		return err
	}
	return Rename(next, path)
}

// MkdirAll is os.MkdirAll, and returns when the names of the new folders are on disk.
func MkdirAll(path string, mode fs.FileMode) error {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, mode); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, mode); err != nil {
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return nil
		}
		return err
	}
	return SyncDir(parent)
}

// SyncDir returns when the names in a folder are on disk.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	// Some file systems do not support syncing a folder, and return one of these errors.
	if err := dir.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOTSUP) {
		return fmt.Errorf("sync the folder %s: %w", path, err)
	}
	return nil
}

// SyncFilesystem returns when everything that was written to the file system of path is on disk.
func SyncFilesystem(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", path, err)
	}
	return nil
}
