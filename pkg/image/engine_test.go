//go:build integration

package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// program is a static program for an image without anything else: it says what a file holds.
const program = `package main

import "os"

func main() {
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(text)
}
`

// TestEngines builds an image with each program that needs no server, in a storage of its own.
func TestEngines(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "go.mod", "module example.com/say\n")
	write(t, dir, "main.go", program)
	build := exec.Command("go", "build", "-o", "say", ".")
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	write(t, dir, "secret", "who knows\n")
	write(t, dir, "Dockerfile", `FROM scratch AS first
ARG WORD
COPY say /say
RUN ["/say", "/mounted"]
LABEL word=$WORD
FROM scratch AS second
COPY say /say
RUN ["/say", "/nothing"]
`)
	for _, name := range []string{"buildah", "podman"} {
		t.Run(name, func(t *testing.T) {
			storage := t.TempDir()
			write(t, storage, "storage.conf", fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n",
				filepath.Join(storage, "root"), filepath.Join(storage, "run")))
			t.Setenv("CONTAINERS_STORAGE_CONF", filepath.Join(storage, "storage.conf"))
			e, err := Find(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			const ref = "registry.example.com/team/say:1"
			has := func() bool {
				t.Helper()
				has, err := e.Has(t.Context(), ref)
				if err != nil {
					t.Error(err)
				}
				return has
			}
			if has() {
				t.Error("the image is there before it was built")
			}
			var log bytes.Buffer
			source := Source{Context: dir, Dockerfile: "Dockerfile", Target: "first", Args: map[string]string{"WORD": "hello"},
				Mounts: []string{filepath.Join(dir, "secret") + ":/mounted"}}
			if err := e.Build(t.Context(), ref, source, &log); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(log.String(), "who knows") {
				t.Errorf("the build did not see the mount:\n%s", &log)
			}
			if !has() {
				t.Error("the image is not there")
			}
			archive := filepath.Join(t.TempDir(), "say.tar")
			if err := e.Save(t.Context(), ref, archive, io.Discard); err != nil {
				t.Fatal(err)
			}
			if index := member(t, archive, "index.json"); !strings.Contains(index, `"`+ref+`"`) {
				t.Errorf("the archive does not say what it holds: %s", index)
			}

			source.Target = "second"
			var failed *BuildError
			if err := e.Build(t.Context(), ref, source, io.Discard); !errors.As(err, &failed) || !strings.Contains(err.Error(), "/nothing: no such file") {
				t.Errorf("a build that fails says %v", err)
			}
			if err := e.Push(t.Context(), "localhost:1/team/say:1", io.Discard); err == nil || !strings.Contains(err.Error(), name+" login localhost:1") {
				t.Errorf("a push to nowhere says %v", err)
			}
		})
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// member is a file of an archive.
func member(t *testing.T, archive, name string) string {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if err != nil {
			t.Fatalf("%s in %s: %v", name, archive, err)
		}
		if header.Name != name {
			continue
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}
