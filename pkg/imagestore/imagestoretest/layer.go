// Package imagestoretest provides a layer for tests that damage it and check whether it is repaired.
package imagestoretest

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// layerFiles are the files of the layer: a program, text, a link of each kind, zeros that are not a hole.
func layerFiles() []tar.Header {
	return []tar.Header{
		{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "usr/program", Typeflag: tar.TypeReg, Mode: 0o755, Size: 1 << 20},
		{Name: "usr/zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1 << 17},
		{Name: "usr/empty", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "usr/hard", Typeflag: tar.TypeLink, Linkname: "usr/program", Mode: 0o755},
		{Name: "soft", Typeflag: tar.TypeSymlink, Linkname: "usr/program"},
		{Name: ".wh.gone", Typeflag: tar.TypeReg, Mode: 0o644},
	}
}

// Layer returns an uncompressed archive of such a layer; always the same.
func Layer(t *testing.T) []byte {
	t.Helper()
	random := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(random)
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range layerFiles() {
		must(t, w.WriteHeader(&h))
		text := random
		if h.Name == "usr/zeros" {
			text = make([]byte, h.Size)
		}
		_, err := w.Write(text[:h.Size])
		must(t, err)
	}
	must(t, w.Close())
	return out.Bytes()
}

// Punch makes a hole, like pages lost in a power failure.
func Punch(path string, at, length int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, length), f.Close())
}

// Compare fails the test unless the folder has every file of the archive, with its contents.
func Compare(t *testing.T, dir string, archive []byte) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		must(t, err)
		if h.Typeflag != tar.TypeReg || h.Name == ".wh.gone" {
			continue
		}
		want, err := io.ReadAll(r)
		must(t, err)
		have, err := os.ReadFile(filepath.Join(dir, h.Name))
		if err != nil || !bytes.Equal(have, want) {
			t.Errorf("%s has %d bytes (%v), want %d", h.Name, len(have), err, len(want))
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
