// Package dev is `polymesh dev`: it watches the files that a deploy of a project reads, and has the project deployed again when
// they change. How it is deployed is the caller's choice.
package dev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settleTime is how long there must be no further change before changes are reported: an editor writes a file in several steps, and
// switching a branch changes many files.
const settleTime = 150 * time.Millisecond

// ephemeral are folders that tools write to all the time, even if no file is edited; like those of Tilt and Docker
// Compose.
var ephemeral = []string{".git", ".hg", ".svn", ".idea", ".vscode"}

// List visits the files and folders to watch, a folder before its contents. A path need not exist yet.
type List func(visit func(path string)) error

// Watcher watches the files of a list.
type Watcher struct {
	notify *fsnotify.Watcher
	list   List
	known  map[string]state
}

// state is used to detect changes of a file.
type state struct {
	mode fs.FileMode
	link string
	size int64
	time time.Time
}

// Watch starts watching. Changes before the first call of Changed are not lost.
func Watch(list List) (*Watcher, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch files: %w", err)
	}
	w := &Watcher{notify: notify, list: list}
	if w.known, err = w.scan(); err != nil {
		notify.Close()
		return nil, err
	}
	return w, nil
}

// Close stops watching.
func (w *Watcher) Close() error { return w.notify.Close() }

// scan lists the files again and watches their folders. A file is watched through its folder, because editors
// replace files.
func (w *Watcher) scan() (map[string]state, error) {
	found := map[string]state{}
	skipped := map[string]bool{}
	var failed error
	err := w.list(func(path string) {
		info, err := os.Lstat(path)
		if skipped[filepath.Dir(path)] || err == nil && info.IsDir() && slices.Contains(ephemeral, filepath.Base(path)) {
			skipped[path] = true
			return
		}
		if temporary(path) {
			return
		}
		folder := filepath.Dir(path)
		if err == nil && info.IsDir() {
			folder = path
		}
		// Watching a folder before listing it misses nothing.
		if err := w.notify.Add(folder); err != nil && !errors.Is(err, fs.ErrNotExist) && failed == nil {
			failed = fmt.Errorf("watch %s: %w (if too many files are watched, raise fs.inotify.max_user_watches)", folder, err)
		}
		if err != nil {
			return // does not exist, or not any more
		}
		s := state{mode: info.Mode()}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			s.link, _ = os.Readlink(path)
		case info.Mode().IsRegular():
			s.size, s.time = info.Size(), info.ModTime()
		}
		found[path] = s
	})
	return found, errors.Join(failed, err)
}

// temporary reports whether a file is one that editors create next to another.
func temporary(path string) bool {
	name := filepath.Base(path)
	return strings.HasSuffix(name, "~") || strings.HasPrefix(name, ".#") || strings.HasSuffix(name, ".swp") || strings.HasSuffix(name, ".swx") || name == "4913"
}

// Changed waits for changes until none has happened for settleTime, and returns the files. If listing fails, because a change
// broke the project, it returns the files with events, and lists again at the next change.
func (w *Watcher) Changed(ctx context.Context) ([]string, error) {
	touched := map[string]bool{}
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case err := <-w.notify.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				timer.Reset(settleTime) // event queue overflow: listing again finds lost changes
				continue
			}
			return nil, fmt.Errorf("watch files: %w", err)
		case event, open := <-w.notify.Events:
			if !open {
				return nil, errors.New("watch files: closed")
			}
			if temporary(event.Name) || slices.Contains(ephemeral, filepath.Base(event.Name)) {
				continue
			}
			// A write may keep size and time, so events count too; a change of mode is found by listing.
			if event.Op != fsnotify.Chmod {
				touched[event.Name] = true
			}
			timer.Reset(settleTime)
		case <-timer.C:
			if files := w.changed(touched); len(files) > 0 {
				return files, nil
			}
			clear(touched)
		}
	}
}

// changed lists again and compares. touched are the files with events.
func (w *Watcher) changed(touched map[string]bool) []string {
	now, err := w.scan()
	files := map[string]bool{}
	for path := range touched {
		_, was := w.known[path]
		_, is := now[path]
		if was || is || err != nil {
			files[path] = true
		}
	}
	if err == nil {
		for path, s := range now {
			if w.known[path] != s {
				files[path] = true
			}
		}
		for path := range w.known {
			if _, is := now[path]; !is {
				files[path] = true
			}
		}
		w.known = now
	}
	return slices.Sorted(maps.Keys(files))
}
