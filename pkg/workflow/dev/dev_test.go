package dev

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(time.Now().String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// watched is a folder to watch, without files named "ignored", and a file.
type watched struct {
	t      *testing.T
	dir    string
	broken bool
	*Watcher
}

func watch(t *testing.T, folders ...string) *watched {
	t.Helper()
	p := &watched{t: t, dir: t.TempDir()}
	for _, sub := range folders {
		if err := os.MkdirAll(filepath.Join(p.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, p.path("polymesh.yaml"))
	write(t, p.path("src/main.go"))
	var err error
	if p.Watcher, err = Watch(func(visit func(string)) error {
		visit(p.path("polymesh.yaml"))
		visit(p.path("later/file"))
		if p.broken {
			return errors.New("broken")
		}
		return filepath.WalkDir(p.path("src"), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.Name() == "ignored" {
				return fs.SkipDir
			}
			visit(path)
			return err
		})
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func (p *watched) path(name string) string { return filepath.Join(p.dir, name) }

// want waits for a change and compares its files.
func (p *watched) want(names ...string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 30*time.Second)
	defer cancel()
	files, err := p.Changed(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	var want []string
	for _, name := range names {
		want = append(want, p.path(name))
	}
	slices.Sort(want)
	if !slices.Equal(files, want) {
		p.t.Errorf("changed are %q, want %q", files, want)
	}
}

func TestChanged(t *testing.T) {
	p := watch(t, "src/deep", "src/ignored/x", "src/.git", "src/target")

	// Ignored files change first, so that the test would notice them.
	write(t, p.path("neighbour"))
	write(t, p.path("src/ignored/x/y"))
	write(t, p.path("src/.git/index"))
	write(t, p.path("src/.main.go.swp"))
	write(t, p.path("src/deep/main.go"))
	write(t, p.path("src/target/app.jar"))
	write(t, p.path("polymesh.yaml"))
	p.want("src/deep/main.go", "src/target/app.jar", "polymesh.yaml")

	// New folders are watched too.
	if err := os.Mkdir(p.path("src/fresh"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.want("src/fresh")
	write(t, p.path("src/fresh/a"))
	p.want("src/fresh/a")

	// Changes of a mode, of a link, and removals count.
	if err := os.Chmod(p.path("src/main.go"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.want("src/main.go")
	if err := os.Symlink("main.go", p.path("src/link")); err != nil {
		t.Fatal(err)
	}
	p.want("src/link")
	if err := os.RemoveAll(p.path("src/fresh")); err != nil {
		t.Fatal(err)
	}
	p.want("src/fresh", "src/fresh/a")

	// An editor that replaces a file with a new one.
	write(t, p.path("new"))
	if err := os.Rename(p.path("new"), p.path("src/main.go")); err != nil {
		t.Fatal(err)
	}
	p.want("src/main.go")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Changed(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

// TestChangedWhileBroken uses a list that first fails, as for a project with an invalid description, and then recovers.
func TestChangedWhileBroken(t *testing.T) {
	p := watch(t, "src")
	p.broken = true
	write(t, p.path("polymesh.yaml"))
	p.want("polymesh.yaml")
	p.broken = false
	write(t, p.path("polymesh.yaml"))
	p.want("polymesh.yaml")
	write(t, p.path("src/main.go"))
	p.want("src/main.go")
}

func TestWatchRefuses(t *testing.T) {
	failed := errors.New("no such project")
	if _, err := Watch(func(func(string)) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("error is %v", err)
	}
}
