package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"
	"time"

	oci "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/build/compress"
)

var stamp = time.Unix(1_700_000_000, 0).UTC()

func entries(t *testing.T, content []byte) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	last := ""
	reader := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if !header.ModTime.Equal(stamp) {
			t.Errorf("%s has the time %s", header.Name, header.ModTime)
		}
		if header.Name < last {
			t.Errorf("%s comes after %s", header.Name, last)
		}
		last = header.Name
		if found[header.Name], err = io.ReadAll(reader); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLayerHasParentsAndDependsOnNothingElse(t *testing.T) {
	make := func() []byte {
		layer := tree{}
		layer.text("usr/share/a/file", "content")
		layer.link("bin/sh", "/bin/busybox")
		layer.directory("tmp", 0o1777)
		content, err := layer.archive(stamp)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	first := make()
	if !bytes.Equal(first, make()) {
		t.Error("two layers of the same tree differ")
	}
	found := entries(t, first)
	for _, name := range []string{"usr/", "usr/share/", "usr/share/a/", "usr/share/a/file", "bin/", "bin/sh", "tmp/"} {
		if _, ok := found[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestSharedLayerIsStoredOnce(t *testing.T) {
	a := newArchive(stamp, compress.Store{Dir: t.TempDir(), Level: 3})
	shared := tree{}
	shared.text("etc/passwd", accounts)
	base, err := a.layer(t.Context(), shared)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one", "two"} {
		if err := a.add("registry.test/"+name+":1", "1", oci.ImageConfig{Entrypoint: []string{"/" + name}}, []layer{base}); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := a.write(&out); err != nil {
		t.Fatal(err)
	}
	blobs, files := 0, map[string][]byte{}
	reader := tar.NewReader(&out)
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(reader); err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix([]byte(header.Name), []byte("blobs/")) {
			blobs++
		}
	}
	if blobs != 5 { // one layer, two configurations, two manifests
		t.Errorf("%d blobs, want 5", blobs)
	}
	var index oci.Index
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"registry.test/one:1", "registry.test/two:1"} {
		if got := index.Manifests[i].Annotations["io.containerd.image.name"]; got != want {
			t.Errorf("image %d is %q, want %q", i, got, want)
		}
	}
}
