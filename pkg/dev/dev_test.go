package dev

import (
	"context"
	"errors"
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

func TestChanged(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"src/deep", "src/node_modules/x", "k8s"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	single := filepath.Join(dir, "polymesh.yaml")
	write(t, single)
	w, err := Watch(filepath.Join(dir, "src"), single)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	changed := func() []string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		files, err := w.Changed(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return files
	}

	// What does not count comes first, so that it would be seen if it did.
	write(t, filepath.Join(dir, "neighbour"))
	write(t, filepath.Join(dir, "src", "node_modules", "x", "y"))
	write(t, filepath.Join(dir, "src", ".main.go.swp"))
	write(t, filepath.Join(dir, "src", "deep", "main.go"))
	write(t, single)
	if got, want := changed(), []string{filepath.Join(dir, "src", "deep", "main.go"), single}; !slices.Equal(got, want) {
		t.Errorf("changed are %q, want %q", got, want)
	}

	// A folder that is new is watched too.
	fresh := filepath.Join(dir, "src", "fresh")
	if err := os.Mkdir(fresh, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := changed(); !slices.Contains(got, fresh) {
		t.Errorf("changed are %q", got)
	}
	write(t, filepath.Join(fresh, "a"))
	if got := changed(); !slices.Contains(got, filepath.Join(fresh, "a")) {
		t.Errorf("changed are %q", got)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Changed(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

func TestWatchRefuses(t *testing.T) {
	if _, err := Watch(filepath.Join(t.TempDir(), "no-such")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
}
