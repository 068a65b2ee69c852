//go:build integration

package node

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/imagestore/imagestoretest"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
)

// machine is a node with containerd and images, without the rest of a server.
type machine struct {
	*testing.T
	opts Options
	log  bytes.Buffer
	ctd  *Containerd
}

const testImage = "registry.polymesh.dev/pause:torn"

// newMachine returns a machine with one shipped image.
func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("containerd needs root")
	}
	built, err := filepath.Abs("../../.build")
	ok(t, err)
	if _, err := os.Stat(filepath.Join(built, "bin", "containerd")); err != nil {
		t.Fatalf("%v: make .build/bin/containerd", err)
	}
	// The path of a socket has 107 characters.
	dataDir, err := os.MkdirTemp("", "pm-")
	ok(t, err)
	t.Cleanup(func() {
		if err := errors.Join(os.RemoveAll(dataDir), os.RemoveAll(layout.DataDir(dataDir).Run())); err != nil {
			t.Error(err)
		}
	})
	cfg := settings(t, "-d", dataDir)
	shipped := payload.Dir(filepath.Join(dataDir, "data", "1"))
	ok(t, os.MkdirAll(shipped.Path("images"), 0o755))
	ok(t, os.Symlink(filepath.Join(built, "bin"), shipped.BinDir()))
	ok(t, os.WriteFile(shipped.Path("images/shipped.tar"), ociArchive(t, testImage, imagestoretest.Layer(t)), 0o644))
	m := &machine{T: t, opts: nodeOptions(cfg)}
	m.opts.Programs, m.opts.Manifest, m.opts.Log = shipped, &payload.Manifest{Images: []string{testImage}}, slog.New(slog.NewTextHandler(&m.log, nil))
	return m
}

// start starts containerd and imports the images.
func (m *machine) start() {
	m.Helper()
	m.opts.Session = NewSession(m.opts.Settings.DataDir)
	m.ctd = NewContainerd(m.opts)
	ctx, cancel := context.WithTimeout(m.Context(), time.Minute)
	defer cancel()
	ok(m.T, m.ctd.Start(ctx))
	m.Cleanup(func() { m.kill() })
	for err := m.ctd.Ready(ctx); err != nil; err = m.ctd.Ready(ctx) {
		if ctx.Err() != nil {
			m.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	images := NewImages(m.opts)
	ok(m.T, images.Start(ctx))
	for err := images.Ready(ctx); err != nil; err = images.Ready(ctx) {
		select {
		case err := <-images.Failed():
			m.Fatal(err)
		case <-ctx.Done():
			m.Fatal(err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// kill ends containerd without ending the session.
func (m *machine) kill() {
	m.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ok(m.T, m.ctd.child.Stop(ctx))
}

// powerCut ends everything as in a power failure; the test chooses the damage.
func (m *machine) powerCut(tear func()) {
	m.Helper()
	m.kill()
	ok(m.T, os.RemoveAll(m.opts.Settings.DataDir.Run()))
	tear()
}

// layers returns the folders of the existing layers.
func (m *machine) layers() []string {
	m.Helper()
	dirs, err := filepath.Glob(m.opts.Settings.DataDir.Agent("containerd", "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs"))
	ok(m.T, err)
	return dirs
}

func (m *machine) program() string { return filepath.Join(m.layers()[0], "usr", "program") }

// A shipped image is intact after a power failure, whatever was lost of it, and its layers keep their folders.
func TestImagesAfterAPowerCut(t *testing.T) {
	for how, tear := range map[string]func(m *machine){
		"nothing": func(*machine) {},
		"end of a program": func(m *machine) {
			ok(m.T, os.Truncate(m.program(), 1<<19))
		},
		"page of a program": func(m *machine) {
			ok(m.T, imagestoretest.Punch(m.program(), 1<<18, 1<<12))
		},
		"whole layer": func(m *machine) {
			ok(m.T, os.RemoveAll(filepath.Dir(m.layers()[0])))
		},
		"page of a program and of its archive": func(m *machine) {
			ok(m.T, imagestoretest.Punch(m.program(), 1<<18, 1<<12))
			m.eachBlob(func(path string, size int64) {
				if size > 1<<20 {
					ok(m.T, imagestoretest.Punch(path, 1<<18, 1<<12))
				}
			})
		},
		"archive": func(m *machine) {
			m.eachBlob(func(path string, size int64) { ok(m.T, os.Truncate(path, size/2)) })
		},
		"blobs": func(m *machine) {
			m.eachBlob(func(path string, _ int64) { ok(m.T, os.Remove(path)) })
		},
		"containerd's metadata": func(m *machine) {
			path := m.opts.Settings.DataDir.Agent("containerd", metadata[0])
			info, err := os.Stat(path)
			ok(m.T, err)
			ok(m.T, os.WriteFile(path, make([]byte, info.Size()), 0o600))
		},
		"the snapshotter's metadata": func(m *machine) {
			path := m.opts.Settings.DataDir.Agent("containerd", metadata[1])
			info, err := os.Stat(path)
			ok(m.T, err)
			ok(m.T, os.WriteFile(path, make([]byte, info.Size()), 0o600))
		},
		"what made the layer after it": func(m *machine) {
			// The folder was renamed, but is not in the database yet.
			ok(m.T, os.MkdirAll(filepath.Join(filepath.Dir(filepath.Dir(m.layers()[0])), "2", "fs"), 0o755))
		},
	} {
		t.Run(how, func(t *testing.T) {
			m := newMachine(t)
			m.start()
			imagestoretest.Compare(t, m.layers()[0], imagestoretest.Layer(t))
			m.powerCut(func() { tear(m) })
			m.start()
			if n := len(m.layers()); n != 1 {
				t.Fatalf("there are %d layers: %q", n, m.layers())
			}
			imagestoretest.Compare(t, m.layers()[0], imagestoretest.Layer(t))
			store, err := imagestore.Open(m.opts.Settings.DataDir.ContainerdSocket())
			ok(t, err)
			defer store.Close()
			if has, err := store.Has(t.Context(), testImage); err != nil || !has {
				t.Errorf("the image exists: %t (%v)", has, err)
			}
			// Everything is usable: a second check finds nothing, and another image gets its own layer.
			if f, err := store.Verify(t.Context()); err != nil || len(f.Rewritten)+len(f.Lost) != 0 {
				t.Errorf("a second check finds %+v (%v)", f, err)
			}
			archive := filepath.Join(t.TempDir(), "other.tar")
			ok(t, os.WriteFile(archive, ociArchive(t, "registry.polymesh.dev/test/other:1", smallLayer(t), imagestoretest.Layer(t)), 0o600))
			ok(t, store.Import(t.Context(), archive, nil))
			if logged := strings.Contains(m.log.String(), "was unpacked again"); logged != (how == "end of a program" || how == "page of a program" || how == "whole layer" || how == "page of a program and of its archive") {
				t.Errorf("a damaged layer is logged: %t\n%s", logged, m.log.String())
			}
			// After a kill nothing is checked, because nothing can have been lost.
			m.kill()
			m.log.Reset()
			m.start()
			if strings.Contains(m.log.String(), "checking all images") {
				t.Error("images are checked after a kill")
			}
		})
	}
}

// The kubelet's image service is containerd's, and has an image as soon as it is imported.
func TestImageGate(t *testing.T) {
	m := newMachine(t)
	m.start()
	connection, err := grpc.NewClient("unix://"+m.opts.Settings.DataDir.ImageSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	defer connection.Close()
	client := runtimeapi.NewImageServiceClient(connection)
	status, err := client.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: testImage}})
	if err != nil || !slices.Contains(status.GetImage().GetRepoTags(), testImage) || !status.GetImage().GetPinned() {
		t.Errorf("%v, %v", status, err)
	}
	list, err := client.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil || len(list.GetImages()) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if r, err := client.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "docker.io/library/none:1"}}); err != nil || r.GetImage() != nil {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := client.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(m.opts.Settings.DataDir.ImageSocket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

func smallLayer(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	ok(t, w.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}))
	ok(t, w.Close())
	return out.Bytes()
}

func (m *machine) eachBlob(f func(path string, size int64)) {
	m.Helper()
	root := m.opts.Settings.DataDir.Agent("containerd", "io.containerd.content.v1.content", "blobs")
	ok(m.T, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			f(path, info.Size())
		}
		return err
	}))
}

// ociArchive is an image with these layers, uncompressed.
func ociArchive(t *testing.T, name string, layers ...[]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, text []byte) {
		ok(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))}))
		_, err := w.Write(text)
		ok(t, err)
	}
	blob := func(mediaType string, content any) ocispec.Descriptor {
		text, raw := content.([]byte)
		if !raw {
			var err error
			text, err = json.Marshal(content)
			ok(t, err)
		}
		sum := sha256.Sum256(text)
		add("blobs/sha256/"+hex.EncodeToString(sum[:]), text)
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.NewDigestFromBytes(digest.SHA256, sum[:]), Size: int64(len(text))}
	}
	image := ocispec.Image{Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"}, RootFS: ocispec.RootFS{Type: "layers"}}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, layer := range layers {
		manifest.Layers = append(manifest.Layers, blob(ocispec.MediaTypeImageLayer, layer))
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, digest.FromBytes(layer))
	}
	manifest.Config = blob(ocispec.MediaTypeImageConfig, image)
	d := blob(ocispec.MediaTypeImageManifest, manifest)
	d.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: name[strings.LastIndex(name, ":")+1:]}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
	ok(t, err)
	add("index.json", index)
	add("oci-layout", fmt.Appendf(nil, `{"imageLayoutVersion":%q}`, ocispec.ImageLayoutVersion))
	ok(t, w.Close())
	return out.Bytes()
}
