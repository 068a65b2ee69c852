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
