package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrivateTemp(t *testing.T) {
	temp, uid := t.TempDir(), os.Geteuid()
	for range 2 {
		dir, err := privateTemp(temp, uid)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", info, err)
		}
	}
	for what, plant := range map[string]func(string) error{
		"that all can write": func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chmod(dir, 0o777)
		},
		"that is a link": func(dir string) error { return os.Symlink(t.TempDir(), dir) },
		"that is a file": func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
		"of another": func(dir string) error {
			if uid != 0 {
				return os.Symlink("/", dir)
			}
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chown(dir, 12345, -1)
		},
	} {
		temp := t.TempDir()
		dir := filepath.Join(temp, fmt.Sprintf("polymesh-%d", uid))
		if err := plant(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := privateTemp(temp, uid); err == nil || !strings.Contains(err.Error(), "is not this user's own folder") {
			t.Errorf("a folder %s: error is %v", what, err)
		}
	}
}

func TestPrivate(t *testing.T) {
	const nobody = 65534
	uid := os.Geteuid()
	base := t.TempDir()
	dir := func(mode os.FileMode, elem ...string) string {
		t.Helper()
		path := filepath.Join(append([]string{base}, elem...)...)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	own := dir(0o755, "own")
	open := dir(0o777, "open")
	sticky := dir(0o777|os.ModeSticky, "sticky")
	below := dir(0o700, "sticky", "below")
	link := filepath.Join(open, "link")
	if err := os.Symlink(own, link); err != nil {
		t.Fatal(err)
	}
	cases := map[string]string{
		own: own, filepath.Join(own, "not", "there"): filepath.Join(own, "not", "there"), below: below,
		open: "", filepath.Join(open, "x"): "", filepath.Join(sticky, "x"): "",
		// A link that another user can replace is not resolved twice.
		filepath.Join(link, "x"): filepath.Join(own, "x"),
	}
	if uid == 0 {
		theirs := dir(0o700, "theirs")
		if err := os.Chown(theirs, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		cases[theirs], cases[filepath.Join(theirs, "x")] = "", ""
	}
	for path, want := range cases {
		got, err := private(path, uid)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v, want %q", path, got, err, want)
		}
	}
}
