package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/dirhash"
)

func TestCheck(t *testing.T) {
	cache, dir, other := t.TempDir(), t.TempDir(), t.TempDir()
	source := filepath.Join(cache, "example.com/!upper@v1.0.0", "a.go")
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(source, "package a\n")
	hash, err := dirhash.HashDir(filepath.Dir(source), "example.com/Upper@v1.0.0", dirhash.Hash1)
	if err != nil {
		t.Fatal(err)
	}
	sum := "example.com/Upper v1.0.0 " + hash + "\nexample.com/Upper v1.0.0/go.mod h1:other=\nexample.com/absent v1.0.0 h1:any=\n"
	write(filepath.Join(dir, "go.sum"), sum)
	write(filepath.Join(other, "go.sum"), sum)
	if err := check(cache, []string{dir, other, t.TempDir()}); err != nil {
		t.Error(err)
	}
	write(source, "package b\n")
	if err := check(cache, []string{dir}); err == nil || !strings.Contains(err.Error(), "example.com/Upper@v1.0.0") || !strings.Contains(err.Error(), "it was changed after the download") {
		t.Errorf("a changed module: %v", err)
	}
	write(filepath.Join(other, "go.sum"), "example.com/Upper v1.0.0 h1:other=\n")
	if err := check(cache, []string{dir, other}); err == nil || !strings.Contains(err.Error(), "in another go.sum") {
		t.Errorf("two hashes of a module: %v", err)
	}
	write(filepath.Join(other, "go.sum"), "example.com/Upper v1.0.0\n")
	if err := check(cache, []string{other}); err == nil || !strings.Contains(err.Error(), "is not a line of a go.sum") {
		t.Errorf("a damaged go.sum: %v", err)
	}
	if err := check(cache, []string{t.TempDir()}); err == nil || !strings.Contains(err.Error(), "no module to check") {
		t.Errorf("no go.sum: %v", err)
	}
}
