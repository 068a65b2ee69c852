package image

import (
	"os"
	"path/filepath"
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
		"executable": {func(s *Source) {
			if err := os.Chmod(filepath.Join(s.Context, "a"), 0o755); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		if got := fingerprint(t, c.change); (got != same) != c.changes {
			t.Errorf("%s: changed is %v", name, got != same)
		}
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
