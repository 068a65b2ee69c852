package imagestore

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/imagestore/imagestoretest"
)

func ingest(t *testing.T, mediaType string, compressed []byte) (content.Store, ocispec.Descriptor) {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	ok(t, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(compressed), Size: int64(len(compressed))}
	ok(t, content.WriteBlob(t.Context(), store, "layer", bytes.NewReader(compressed), d))
	return store, d
}

// A layer damaged by a power failure is detected and repaired; no other layer is rewritten.
func TestTornLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked by root")
	}
	plain := imagestoretest.Layer(t)
	var gz, zst bytes.Buffer
	w := gzip.NewWriter(&gz)
	_, err := w.Write(plain)
	ok(t, errors.Join(err, w.Close()))
	z, err := zstd.NewWriter(&zst)
	ok(t, err)
	_, err = z.Write(plain)
	ok(t, errors.Join(err, z.Close()))
	for mediaType, blob := range map[string][]byte{
		ocispec.MediaTypeImageLayer: plain, ocispec.MediaTypeImageLayerGzip: gz.Bytes(), ocispec.MediaTypeImageLayerZstd: zst.Bytes(),
	} {
		for how, tear := range map[string]func(dir string) error{
			"nothing":            func(string) error { return nil },
			"zeros become holes": func(dir string) error { return imagestoretest.Punch(filepath.Join(dir, "usr/zeros"), 0, 1<<17) },
			"end missing":        func(dir string) error { return os.Truncate(filepath.Join(dir, "usr/program"), 1<<19) },
			"all missing":        func(dir string) error { return os.Truncate(filepath.Join(dir, "usr/program"), 0) },
			"page missing":       func(dir string) error { return imagestoretest.Punch(filepath.Join(dir, "usr/program"), 1<<18, 1<<12) },
			"file missing":       func(dir string) error { return os.Remove(filepath.Join(dir, "usr/empty")) },
			"link missing":       func(dir string) error { return os.Remove(filepath.Join(dir, "soft")) },
			"folder missing":     func(dir string) error { return os.RemoveAll(filepath.Join(dir, "usr")) },
			"layer missing":      os.RemoveAll,
		} {
			t.Run(filepath.Base(mediaType)+" "+how, func(t *testing.T) {
				store, d := ingest(t, mediaType, blob)
				dir := filepath.Join(t.TempDir(), "fs")
				ok(t, rewriteLayer(t.Context(), store, d, dir, nil))
				imagestoretest.Compare(t, dir, plain)
				ok(t, tear(dir))
				harmless := how == "nothing" || how == "zeros become holes"
				same, err := sameAsLayer(t.Context(), store, d, dir)
				if err != nil || same != harmless {
					t.Fatalf("the damaged layer is reported as intact: %t (%v)", same, err)
				}
				if harmless {
					return
				}
				ok(t, rewriteLayer(t.Context(), store, d, dir, nil))
				imagestoretest.Compare(t, dir, plain)
				if same, err := sameAsLayer(t.Context(), store, d, dir); err != nil || !same {
					t.Errorf("the rewritten layer is reported as intact: %t (%v)", same, err)
				}
			})
		}
	}
}

// Content that does not match its digest is not used for a layer.
func TestDamagedLayer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked by root")
	}
	root := t.TempDir()
	store, err := local.NewStore(root)
	ok(t, err)
	blob := imagestoretest.Layer(t)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	ok(t, content.WriteBlob(context.Background(), store, "layer", bytes.NewReader(blob), d))
	dir := filepath.Join(t.TempDir(), "fs")
	ok(t, rewriteLayer(t.Context(), store, d, dir, nil))
	path := filepath.Join(root, "blobs", "sha256", d.Digest.Encoded())
	ok(t, os.Chmod(path, 0o600))
	for how, tear := range map[string]func() error{
		"a page":  func() error { return imagestoretest.Punch(path, 1<<16, 1<<12) },
		"its end": func() error { return os.Truncate(path, 1<<16) },
	} {
		ok(t, tear())
		var damaged *damagedError
		if _, err := sameAsLayer(t.Context(), store, d, dir); !errors.As(err, &damaged) {
			t.Errorf("without %s: %v", how, err)
		}
		if err := verifyBlob(t.Context(), store, d); !errors.As(err, &damaged) {
			t.Errorf("without %s: %v", how, err)
		}
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
