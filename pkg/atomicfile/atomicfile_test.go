package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestWriteReplacesWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "file")
	for _, c := range []struct {
		content string
		mode    fs.FileMode
	}{{"one", 0o600}, {"two, longer", 0o644}, {"", 0o600}} {
		if err := Write(path, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		have, err := os.ReadFile(path)
		if err != nil || string(have) != c.content {
			t.Errorf("the file holds %q (%v), want %q", have, err, c.content)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != c.mode {
			t.Errorf("the file is %v (%v), want mode %v", info, err, c.mode)
		}
	}
	if names := list(t, filepath.Dir(path)); len(names) != 1 {
		t.Errorf("other files are left: %q", names)
	}
}

// A failed write leaves the old contents and nothing else.
func TestDiscardKeepsTheOldContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("half of the ne"); err != nil {
		t.Fatal(err)
	}
	f.Discard()
	if have, err := os.ReadFile(path); err != nil || string(have) != "old" {
		t.Errorf("the file holds %q (%v)", have, err)
	}
	if names := list(t, filepath.Dir(path)); len(names) != 1 {
		t.Errorf("other files are left: %q", names)
	}
}

// A file cannot replace a folder; its temporary file must not be left behind.
func TestCommitThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "folder")
	if err := os.MkdirAll(filepath.Join(path, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x"), 0o600); err == nil {
		t.Fatal("a file has replaced a folder")
	}
	if names := list(t, dir); len(names) != 1 {
		t.Errorf("other files are left: %q", names)
	}
}

func TestSymlinkReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "current")
	// The leftovers of a crash.
	if err := os.Symlink("half", path+".new"); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"one", "two"} {
		if err := Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		if have, err := os.Readlink(path); err != nil || have != target {
			t.Errorf("the link is %q (%v), want %q", have, err, target)
		}
	}
	if _, err := os.Lstat(path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the next link is left: %v", err)
	}
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
