package image

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// file writes an archive with these members.
func file(t *testing.T, members ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, name := range members {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func noEngine(context.Context) (Engine, error) { return nil, errors.New("no engine") }

func TestReadFile(t *testing.T) {
	r := Reader{Engine: noEngine}
	layout := t.TempDir()
	if err := os.WriteFile(filepath.Join(layout, "oci-layout"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, form string }{
		{file(t, "blobs/x", "index.json", "oci-layout"), "oci-archive"},
		{file(t, "blobs/x", "manifest.json"), "docker-archive"},
		{file(t, "manifest.json", "oci-layout"), "oci-archive"},
		{layout, "oci-dir"},
	} {
		a, err := r.Read(t.Context(), c.path, "")
		if err != nil || a.Location != c.form+":"+c.path || a.From != FromArchive {
			t.Errorf("%s: %+v, %v, want %s", c.path, a, err, c.form)
			continue
		}
		// What is the user's stays.
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(c.path); err != nil {
			t.Error(err)
		}
	}
	for path, want := range map[string]string{
		file(t, "readme"): "neither oci-layout nor manifest.json", file(t): "neither", "/no/such.tar": "no such file",
	} {
		if _, err := r.Read(t.Context(), path, FromArchive); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

// store has the images that it lists.
type store []string

func (s store) Has(_ context.Context, ref string) (bool, error) {
	for _, has := range s {
		if has == ref {
			return true, nil
		}
	}
	return false, nil
}

func (s store) Export(_ context.Context, ref, file string) error {
	return os.WriteFile(file, []byte(ref), 0o600)
}

func TestReadName(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("shop", 0o755); err != nil { // a project's folder, not an image
		t.Fatal(err)
	}
	r := Reader{Node: store{"docker.io/library/shop:1"}, Engine: noEngine}
	a, err := r.Read(t.Context(), "shop:1", "")
	if err != nil || a.From != FromNode {
		t.Fatalf("%+v, %v", a, err)
	}
	form, path, _ := strings.Cut(a.Location, ":")
	if text, err := os.ReadFile(path); form != "oci-archive" || string(text) != "docker.io/library/shop:1" {
		t.Errorf("%s: %s, %v", a.Location, text, err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the copy is left")
	}
	if a, err := r.Read(t.Context(), "shop", ""); err != nil || a.Location != "registry:docker.io/library/shop:latest" {
		t.Errorf("%+v, %v", a, err)
	}
	for _, c := range []struct{ ref, from, want string }{
		{"Not A Name", "", "there is no such file"}, {"shop:1", "elsewhere", "is not one of archive, node, engine, registry"},
		{"shop:1", FromEngine, "no engine"}, {"shop:1", FromArchive, "no such file"},
	} {
		if _, err := r.Read(t.Context(), c.ref, c.from); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s from %s: %v, want %q", c.ref, c.from, err, c.want)
		}
	}
	if _, err := (Reader{Engine: noEngine}).Read(t.Context(), "shop:1", FromNode); err == nil || !strings.Contains(err.Error(), "no Polymesh server runs") {
		t.Error(err)
	}
}
