package scanner

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func executable(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	polymesh := executable(t, filepath.Join(dir, "opt", "polymesh"))
	link := filepath.Join(dir, "bin", "polymesh")
	if err := os.Mkdir(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(polymesh, link); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", filepath.Dir(link))
	if _, err := Find("polymesh", ""); err == nil || !strings.Contains(err.Error(), filepath.Dir(polymesh)+" or in PATH") || !strings.Contains(err.Error(), "make scanner") {
		t.Errorf("no program: %v", err)
	}
	inPath := executable(t, filepath.Join(dir, "bin", Program))
	want := func(self, path string) {
		t.Helper()
		s, err := Find(self, "db")
		if err != nil || s.path != path || !filepath.IsAbs(s.database) {
			t.Errorf("%s: %+v, %v, want %s", self, s, err, path)
		}
	}
	want("polymesh", inPath)
	want("no-such-program", inPath)
	beside := executable(t, filepath.Join(dir, "opt", Program))
	want("polymesh", beside) // through a link in PATH
	want(polymesh, beside)
}

func TestNoDatabase(t *testing.T) {
	s := &Scanner{path: "/no/such/program", database: filepath.Join(t.TempDir(), "none")}
	if _, err := s.Status(t.Context()); !errors.Is(err, ErrNoDatabase) || !strings.Contains(err.Error(), "polymesh image db import FILE") {
		t.Error(err)
	}
}

func TestCheckAge(t *testing.T) {
	built := time.Date(2030, time.March, 1, 12, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	for _, c := range []struct {
		age, max time.Duration
		want     string
	}{
		{time.Hour, MaxDatabaseAge, ""}, {5 * day, MaxDatabaseAge, ""}, {100 * day, 0, ""}, {30 * day, 31 * day, ""},
		{5*day + time.Second, MaxDatabaseAge, "of 2030-03-01, 5 days old"}, {day + time.Hour, day, "1 day old"}, {time.Minute, time.Second, "less than a day old"},
	} {
		err := CheckAge(Database{Built: built}, c.max, built.Add(c.age))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s, at most %s: %v, want %q", c.age, c.max, err, c.want)
		}
	}
}

func TestChecksum(t *testing.T) {
	file := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(file, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180-2, B.1
	for checksum, want := range map[string]string{
		"": "", "sha256:" + abc: "", "sha256:" + strings.ToUpper(abc): "",
		"sha256:00": "is damaged", abc: "is damaged",
	} {
		err := check(file, checksum)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", checksum, err, want)
		}
	}
	if err := check(file+".none", ""); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
