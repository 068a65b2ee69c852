package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func source(t *testing.T, files map[string]string) Source {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Source{Context: dir, Dockerfile: "Dockerfile"}
}

// fingerprint of the files, after a change.
func fingerprint(t *testing.T, change func(*Source)) string {
	t.Helper()
	s := source(t, map[string]string{"Dockerfile": "FROM scratch\n", "a": "1", "src/b": "2", "notes/c.md": "3", "notes/keep.md": "4", ".dockerignore": "notes\n!notes/keep.md\nDockerfile\n"})
	change(&s)
	print, err := s.Fingerprint()
	if err != nil {
		t.Fatal(err)
	}
	if len(print) != hashed {
		t.Errorf("fingerprint is %q", print)
	}
	return print
}

func TestFingerprint(t *testing.T) {
	put := func(name, text string) func(*Source) {
		return func(s *Source) {
			if err := os.WriteFile(filepath.Join(s.Context, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	mode := func(name string, mode os.FileMode) func(*Source) {
		return func(s *Source) {
			if err := os.Chmod(filepath.Join(s.Context, name), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	folder := func(name string) func(*Source) {
		return func(s *Source) {
			if err := os.Mkdir(filepath.Join(s.Context, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	same := fingerprint(t, func(*Source) {})
	for name, c := range map[string]struct {
		change  func(*Source)
		changes bool
	}{
		"nothing":                {func(*Source) {}, false},
		"a file":                 {put("src/b", "x"), true},
		"a new file":             {put("src/d", ""), true},
		"an ignored file":        {put("notes/c.md", "x"), false},
		"an exception":           {put("notes/keep.md", "x"), true},
		"the ignored Dockerfile": {put("Dockerfile", "FROM x\n"), true},
		"an argument":            {func(s *Source) { s.Args = map[string]string{"A": "1"} }, true},
		"the target":             {func(s *Source) { s.Target = "build" }, true},
		"executable":             {mode("a", 0o755), true},
		"readable by others":     {mode("a", 0o600), true},
		"setgid of a folder":     {mode("src", 0o755|os.ModeSetgid), true},
		"an empty folder":        {folder("empty"), true},
		"an ignored folder":      {folder("notes/empty"), false},
		"a base image":           {func(s *Source) { s.BaseIDs = map[string]string{"golang:1": "sha256:1"} }, true},
		"the id's file":          {func(s *Source) { s.IDFile = "/tmp/id" }, false},
		"a file becomes a link": {func(s *Source) {
			if err := errors.Join(os.Remove(filepath.Join(s.Context, "a")), os.Symlink("src/b", filepath.Join(s.Context, "a"))); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		if got := fingerprint(t, c.change); (got != same) != c.changes {
			t.Errorf("%s: changed is %v", name, got != same)
		}
	}
}

// TestFingerprintOfLinks has links where people put them: the context, the Dockerfile, what is mounted; and a Dockerfile outside
// of the context.
func TestFingerprintOfLinks(t *testing.T) {
	for name, c := range map[string]struct {
		make    func(dir string) Source
		change  string
		changes bool
	}{
		"the context is a link": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "link"), Dockerfile: "Dockerfile"}
		}, "context/msg.txt", true},
		"the Dockerfile is a link": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "linked"), Dockerfile: "Dockerfile"}
		}, "docker/go.Dockerfile", true},
		"the Dockerfile is elsewhere": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "context"), Dockerfile: "../docker/go.Dockerfile"}
		}, "docker/go.Dockerfile", true},
		"its ignore file": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "context"), Dockerfile: "../docker/go.Dockerfile"}
		}, "docker/go.Dockerfile.dockerignore", true},
		"what is mounted": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "context"), Dockerfile: "Dockerfile", Mounts: []string{filepath.Join(dir, "mounted") + ":/x"}}
		}, "outside/x", true},
		// A build gets the link, and nothing behind it that is outside of its context.
		"a link out of the context": {func(dir string) Source {
			return Source{Context: filepath.Join(dir, "context"), Dockerfile: "Dockerfile"}
		}, "outside/x", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := source(t, map[string]string{"context/Dockerfile": "FROM scratch\n", "context/msg.txt": "v1", "docker/go.Dockerfile": "FROM scratch\n",
				"docker/go.Dockerfile.dockerignore": "", "linked/a": "1", "outside/x": "1"}).Context
			for link, to := range map[string]string{"link": "context", "linked/Dockerfile": "../docker/go.Dockerfile", "context/out": "../outside",
				"context/loop": "loop", "context/none": "/no/such", "mounted": "outside"} {
				if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
					t.Fatal(err)
				}
			}
			s := c.make(dir)
			before, err := s.Fingerprint()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, c.change), []byte("FROM scratch\nENV A=b\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			after, err := s.Fingerprint()
			if err != nil || (after != before) != c.changes {
				t.Errorf("changed is %v, %v", after != before, err)
			}
		})
	}
}

func TestFingerprintRefuses(t *testing.T) {
	s := source(t, map[string]string{"Dockerfile": "FROM scratch\n", "closed/x": "", ".dockerignore": ""})
	if err := os.Symlink("round", filepath.Join(s.Context, "round")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		source Source
		want   string
	}{
		"a Dockerfile that is a loop":   {Source{Context: s.Context, Dockerfile: "round"}, "the Dockerfile: EvalSymlinks: too many links"},
		"a Dockerfile that is a folder": {Source{Context: s.Context, Dockerfile: "closed"}, "is not a file"},
		"no context":                    {Source{Context: filepath.Join(s.Context, "none"), Dockerfile: "Dockerfile"}, "the build's context"},
		"no mount":                      {Source{Context: s.Context, Dockerfile: "Dockerfile", Mounts: []string{"/no/such:/x"}}, "mount /no/such:/x"},
	} {
		if _, err := c.source.Fingerprint(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A pipe is not waited for, and a socket is one.
	if err := syscall.Mkfifo(filepath.Join(s.Context, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fingerprint(); err != nil {
		t.Error(err)
	}
	if os.Geteuid() == 0 {
		return // nothing is closed to root
	}
	closed := filepath.Join(s.Context, "closed")
	if err := os.Chmod(closed, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(closed, 0o755) })
	if _, err := s.Fingerprint(); err == nil || !strings.Contains(err.Error(), "name it in .dockerignore") {
		t.Errorf("a closed folder: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.Context, ".dockerignore"), []byte("closed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fingerprint(); err != nil {
		t.Errorf("a closed folder that is ignored: %v", err)
	}
}

func TestName(t *testing.T) {
	for _, c := range []struct{ manifest, registry, short, full string }{
		{"my-registry/api:1.0.0", "", "my-registry/api:1.0.0-abc", "docker.io/my-registry/api:1.0.0-abc"},
		{"api", "", "api:abc", "docker.io/library/api:abc"},
		{"api:latest", "", "api:abc", "docker.io/library/api:abc"},
		{"localhost:5000/x/api:1", "", "localhost:5000/x/api:1-abc", "localhost:5000/x/api:1-abc"},
		{"my-registry/api:1", "registry.example.com/team/", "registry.example.com/team/api:1-abc", "registry.example.com/team/api:1-abc"},
	} {
		ref, err := Name(c.manifest, c.registry, "abc")
		if err != nil || ref.Short != c.short || ref.Full != c.full {
			t.Errorf("%s: %+v, %v", c.manifest, ref, err)
		}
	}
	if _, err := Name("Not A Name", "", "abc"); err == nil {
		t.Error("a bad name is taken")
	}
}

func TestCut(t *testing.T) {
	const sum = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for ref, want := range map[string]struct {
		name, tag string
		floats    bool
	}{
		"api":                        {"api", "", true},
		"api:1.0":                    {"api", "1.0", false},
		"api:latest":                 {"api", "latest", true},
		"shop/api:1.0":               {"shop/api", "1.0", false},
		"docker.io/library/api":      {"docker.io/library/api", "", true},
		"localhost:5000/api":         {"localhost:5000/api", "", true},
		"localhost:5000/api:1.0":     {"localhost:5000/api", "1.0", false},
		"localhost:5000/api" + sum:   {"localhost:5000/api", "", false},
		"api:latest" + sum:           {"api", "latest", false},
		"Shop/API:1.0":               {"Shop/API:1.0", "", false}, // the kubelet reports it
		"registry.example.com/a b:1": {"registry.example.com/a b:1", "", false},
		"":                           {"", "", false},
	} {
		if name, tag := Cut(ref); name != want.name || tag != want.tag {
			t.Errorf("%q: name %q, tag %q", ref, name, tag)
		}
		if got := Floats(ref); got != want.floats {
			t.Errorf("%q: floats is %v", ref, got)
		}
	}
}
