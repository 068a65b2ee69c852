// Package dev watches the files of a project and says when they change, for `polymesh dev`.
//
// It owns the watch only; what a change leads to is the caller's: pkg/command deploys again.
package dev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// quiet is for how long nothing may change before a change counts: an editor writes a file in several steps, and a branch
// that is switched changes many.
const quiet = 150 * time.Millisecond

// ignored are folders that tools write into, which no build reads.
var ignored = []string{".git", ".hg", ".idea", ".vscode", "node_modules", "target", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".gradle", "build", "dist"}

// Watcher watches folders and all below them.
type Watcher struct {
	notify *fsnotify.Watcher
	roots  []string
}

// Watch begins to watch files and folders. What changes before Changed is called is not lost.
func Watch(paths ...string) (*Watcher, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch files: %w", err)
	}
	w := &Watcher{notify: notify, roots: paths}
	for _, path := range paths {
		if err := w.add(path); err != nil {
			notify.Close()
			return nil, fmt.Errorf("watch %s: %w (if too many files are watched, raise fs.inotify.max_user_watches)", path, err)
		}
	}
	return w, nil
}

// Close ends the watch.
func (w *Watcher) Close() error { return w.notify.Close() }

// add watches a folder and those below it. A file is watched through its folder, because editors put a new file in place
// of the old one.
func (w *Watcher) add(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return w.notify.Add(filepath.Dir(path))
	}
	return filepath.WalkDir(path, func(dir string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && dir != path:
			return nil // gone again
		case err != nil:
			return err
		case !entry.IsDir():
			return nil
		case dir != path && slices.Contains(ignored, entry.Name()):
			return fs.SkipDir
		}
		return w.notify.Add(dir)
	})
}

// Changed waits for a change and for the quiet after it, and returns the files.
func (w *Watcher) Changed(ctx context.Context) ([]string, error) {
	var files []string
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case err := <-w.notify.Errors:
			return nil, fmt.Errorf("watch files: %w", err)
		case event, open := <-w.notify.Events:
			if !open {
				return nil, errors.New("watch files: closed")
			}
			if !w.counts(event) {
				continue
			}
			if event.Has(fsnotify.Create) {
				if info, err := os.Stat(event.Name); err == nil && info.IsDir() {
					if err := w.add(event.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
						return nil, err
					}
				}
			}
			if !slices.Contains(files, event.Name) {
				files = append(files, event.Name)
			}
			timer.Reset(quiet)
		case <-timer.C:
			return files, nil
		}
	}
}

// counts leaves out what is no change of content, what editors write beside a file, and neighbours of a watched file.
func (w *Watcher) counts(event fsnotify.Event) bool {
	if event.Op == fsnotify.Chmod {
		return false
	}
	name := filepath.Base(event.Name)
	if slices.Contains(ignored, name) || strings.HasSuffix(name, "~") || strings.HasPrefix(name, ".#") || strings.HasSuffix(name, ".swp") || strings.HasSuffix(name, ".swx") || name == "4913" {
		return false
	}
	return slices.ContainsFunc(w.roots, func(root string) bool {
		return event.Name == root || strings.HasPrefix(event.Name, root+string(filepath.Separator))
	})
}
