package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The program of this test is one that ships nothing, but was built as those that do: from this go.mod and go.sum.
func TestGoModules(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sums, err := readSums([]string{"."})
	if err != nil {
		t.Fatal(err)
	}
	parts, err := goModules([]string{self}, sums, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := judge(known(), parts); err != nil {
		t.Error(err)
	}
	found := map[string]component{}
	for _, p := range parts {
		found[p.name] = p
	}
	for name, license := range map[string]string{"std": "BSD-3-Clause", "github.com/google/licenseclassifier/v2": "Apache-2.0", "github.com/CycloneDX/cyclonedx-go": "Apache-2.0", "github.com/sergi/go-diff": "MIT"} {
		p, ok := found[name]
		if !ok {
			t.Errorf("%s is not found in the program", name)
			continue
		}
		if got := strings.Join(p.licenses, " "); got != license {
			t.Errorf("%s: the licence is %s, want %s", name, got, license)
		}
		if p.users[0] != filepath.Base(self) || p.version == "" || name != "std" && !strings.HasPrefix(p.h1, "h1:") {
			t.Errorf("%s: %+v", name, p)
		}
	}
	if text := found["github.com/CycloneDX/cyclonedx-go"].texts; len(text) != 2 || text[1].name != "NOTICE" {
		t.Errorf("Apache-2.0 wants the NOTICE passed on; found %d files", len(text))
	}
}

func TestGoModulesThatAreRefused(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := goModules([]string{self}, map[string]string{}, "", nil); err == nil || !strings.Contains(err.Error(), "has no hash in any go.sum") {
		t.Errorf("modules without a hash: %v", err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := goModules([]string{script}, nil, "", nil); err == nil {
		t.Error("a program whose parts are unknown is taken")
	}
	if _, err := readSums([]string{t.TempDir()}); err == nil {
		t.Error("a folder without go.sum is taken")
	}
}

// A program in C has the licence of the module that its source lies in.
func TestProgramsInC(t *testing.T) {
	sums, err := readSums([]string{"."})
	if err != nil {
		t.Fatal(err)
	}
	var source string
	for key := range sums {
		if strings.HasPrefix(key, "github.com/google/licenseclassifier/v2@") {
			source = key
		}
	}
	parts, err := goModules([]string{"somewhere/pause", "somewhere/envoy"}, sums, "pause="+source, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := judge(known(), parts); err != nil || len(parts) != 1 || parts[0].users[0] != "pause" || parts[0].licenses[0] != "Apache-2.0" {
		t.Errorf("got %+v, %v", parts, err)
	}
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]string{"github.com/BurntSushi/toml": "github.com/!burnt!sushi/toml", "example.com/lower": "example.com/lower", "v1.0.0-RC1": "v1.0.0-!r!c1"} {
		if got := escape(in); got != want {
			t.Errorf("escape(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestReadSums(t *testing.T) {
	dir := t.TempDir()
	content := "example.com/a v1.0.0 h1:aaa=\nexample.com/a v1.0.0/go.mod h1:bbb=\nexample.com/b v2.0.0+incompatible h1:ccc=\n"
	if err := os.WriteFile(filepath.Join(dir, "go.sum"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	sums, err := readSums([]string{dir})
	if err != nil || len(sums) != 2 || sums["example.com/a@v1.0.0"] != "h1:aaa=" || sums["example.com/b@v2.0.0+incompatible"] != "h1:ccc=" {
		t.Errorf("got %v, %v", sums, err)
	}
}
