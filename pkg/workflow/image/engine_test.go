//go:build integration

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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
			ownStorage(t)
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

// look is a static program for an image without anything else. It says what a build sees and reaches.
const look = `package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

func main() {
	if len(os.Args) > 2 { // in a process of its own, so that there are at least two
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			if pid, err := strconv.Atoi(e.Name()); err == nil {
				name, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
				fmt.Printf("process %d %s", pid, name)
			}
		}
		return
	}
	child := exec.Command(os.Args[0], os.Args[1], "processes")
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Run(); err != nil {
		panic(err)
	}
	connection, err := net.Dial("tcp", os.Args[1])
	fmt.Println("loopback", err)
	if err == nil {
		connection.Close()
	}
	for _, dir := range []string{"/root", "/etc", "/usr/local", "/dev"} {
		filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			switch {
			case err != nil:
			case info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0:
				fmt.Println("disk", path)
			case info.Mode().IsRegular():
				fmt.Println("file", path)
			}
			return nil
		})
	}
	fmt.Println("chroot", syscall.Chroot("/"))
	fmt.Println("argument", os.Getenv("WORD"))
}
`

// TestConfinement builds with each program and looks around from within a RUN.
func TestConfinement(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			connection.Close()
		}
	}()
	home := t.TempDir()
	t.Setenv("HOME", home)
	write(t, home, ".npmrc", "//registry.example.com/:_authToken=sesame\n")
	t.Setenv("PIP_INDEX_URL", "https://me:sesame@pip.example.com/simple")
	dir := t.TempDir()
	write(t, dir, "go.mod", "module example.com/look\n")
	write(t, dir, "main.go", look)
	build := exec.Command("go", "build", "-o", "look", ".")
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "HOME=/root")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	write(t, dir, "Dockerfile", fmt.Sprintf("FROM scratch\nARG WORD\nARG ROUND\nCOPY look /look\nRUN [\"/look\", %q]\n", listener.Addr()))
	for _, name := range []string{"buildah", "podman"} {
		t.Run(name, func(t *testing.T) {
			ownStorage(t)
			e, err := Find(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			round := 0
			see := func(network string, settings ...string) string {
				t.Helper()
				var log bytes.Buffer
				round++
				source := Source{Context: dir, Dockerfile: "Dockerfile", Network: network, Settings: settings, Args: map[string]string{"WORD": "hello", "ROUND": fmt.Sprint(round)}}
				if err := e.Build(t.Context(), "registry.example.com/team/look:1", source, &log); err != nil {
					t.Fatal(err)
				}
				return log.String()
			}
			shared := sharedMount(t)
			private := see("")
			if _, err := os.Stat(shared); err != nil {
				t.Errorf("the build has taken a mount of the machine away: %v", err)
			}
			for _, want := range []string{"process 1 " + name + "\n", "loopback dial tcp " + listener.Addr().String() + ": connect: connection refused\n",
				"chroot operation not permitted\n", "argument hello\n", "file /etc/ssl/certs/ca-certificates.crt\n"} {
				if !strings.Contains(private, want) {
					t.Errorf("without %q:\n%s", want, private)
				}
			}
			// Only the builder, what it starts RUN with, and the two programs of RUN.
			for _, line := range strings.Split(private, "\n") {
				if process, ok := strings.CutPrefix(line, "process "); ok {
					if _, comm, _ := strings.Cut(process, " "); comm != name && comm != "look" && !strings.HasPrefix(comm, "memfd:buildah") {
						t.Errorf("the build sees %s", process)
					}
				}
			}
			for _, bad := range []string{"npmrc", "pip", "disk "} {
				if strings.Contains(private, bad) {
					t.Errorf("the build sees %q:\n%s", bad, private)
				}
			}
			if none := see(NetworkNone); strings.Contains(none, "loopback <nil>") {
				t.Errorf("without a network a build reaches the machine:\n%s", none)
			}
			host := see(NetworkHost, "npm", "pip")
			for _, want := range []string{"loopback <nil>\n", "file /root/.npmrc\n", "file /root/.config/pip/pip.conf\n", "process 1 " + name + "\n"} {
				if !strings.Contains(host, want) {
					t.Errorf("asked for, and without %q:\n%s", want, host)
				}
			}
		})
	}
}

// A base image that is missing is named in one line, with the command that makes it; one that is in another storage is taken
// from there.
func TestProvide(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"buildah", "podman"} {
		t.Run(name, func(t *testing.T) {
			ownStorage(t)
			// No registry of this name answers.
			write(t, dir, "registries.conf", "[[registry]]\nprefix = \"docker.io\"\nlocation = \"127.0.0.1:1\"\ninsecure = true\n")
			t.Setenv(registriesVar, filepath.Join(dir, "registries.conf"))
			e, err := Find(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			write(t, dir, "Dockerfile", "FROM golang:1.26-bookworm\nCOPY Dockerfile /\n")
			s := Source{Context: dir, Dockerfile: "Dockerfile"}
			err = Provide(t.Context(), e, s, nil, func(string) {})
			if !errors.Is(err, ErrNoBase) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "golang:1.26-bookworm cannot be pulled; build it from Debian packages: `polymesh image bases --lang go`") {
				t.Errorf("got %v", err)
			}
			write(t, dir, "Dockerfile", "FROM nosuch:1\n")
			if err := Provide(t.Context(), e, s, nil, func(string) {}); !errors.Is(err, ErrNoBase) || !strings.Contains(err.Error(), name+" pull oci-archive:FILE") {
				t.Errorf("got %v", err)
			}

			// The node has it.
			write(t, dir, "base", "the base")
			write(t, dir, "Dockerfile", "FROM scratch\nCOPY base /base\n")
			const full = "docker.io/library/golang:1.26-bookworm"
			if err := e.Build(t.Context(), "registry.example.com/elsewhere:1", s, io.Discard); err != nil {
				t.Fatal(err)
			}
			archive := filepath.Join(t.TempDir(), "base.tar")
			if err := e.Save(t.Context(), "registry.example.com/elsewhere:1", archive, io.Discard); err != nil {
				t.Fatal(err)
			}
			write(t, dir, "Dockerfile", "FROM golang:1.26-bookworm\nCOPY Dockerfile /\n")
			var notes []string
			if err := Provide(t.Context(), e, s, stored{full: archive}, func(note string) { notes = append(notes, note) }); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(notes, []string{"taking " + full + " from this machine's node"}) {
				t.Errorf("it says %q", notes)
			}
			notes = nil
			if err := Provide(t.Context(), e, s, nil, func(note string) { notes = append(notes, note) }); err != nil || len(notes) > 0 {
				t.Errorf("what is there is brought again: %q, %v", notes, err)
			}
			if err := e.Build(t.Context(), "registry.example.com/team/app:1", s, io.Discard); err != nil {
				t.Error(err)
			}
		})
	}
}

// stored is a node's store, with the archives that its images are in.
type stored map[string]string

func (s stored) Has(_ context.Context, ref string) (bool, error) { return s[ref] != "", nil }

func (s stored) Export(_ context.Context, ref, file string) error { return os.Link(s[ref], file) }

// sharedMount is a file in a mount below a shared one, as all mounts of a machine with systemd are.
func sharedMount(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	inner := filepath.Join(dir, "inner")
	for _, mount := range []struct {
		target string
		flags  uintptr
	}{{dir, 0}, {dir, syscall.MS_SHARED}, {inner, 0}} {
		source, kind := "polymesh-test", "tmpfs"
		if mount.flags != 0 {
			source, kind = "", ""
		}
		if err := os.MkdirAll(mount.target, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount(source, mount.target, kind, mount.flags, ""); err != nil {
			t.Fatalf("mount %s: %v", mount.target, err)
		}
		if mount.flags == 0 {
			t.Cleanup(func() { syscall.Unmount(mount.target, syscall.MNT_DETACH) })
		}
	}
	write(t, inner, "file", "still here")
	return filepath.Join(inner, "file")
}

// ownStorage gives buildah and podman a storage of the test's own.
func ownStorage(t *testing.T) {
	t.Helper()
	storage := t.TempDir()
	write(t, storage, "storage.conf", fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n",
		filepath.Join(storage, "root"), filepath.Join(storage, "run")))
	t.Setenv("CONTAINERS_STORAGE_CONF", filepath.Join(storage, "storage.conf"))
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
