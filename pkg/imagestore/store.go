// Package imagestore is the interface to a node's containerd as the store of images and their signatures.
//
// It owns the choice of containerd's namespaces and snapshotter, import and export of archives, pinning of images
// against the kubelet's garbage collection, the check of unpacked layers after a power failure, and what clients and nodes must agree on to
// send images: paths, bodies, and the rules about tags. The node imports and pins
// through it, `polymesh deploy` loads built images, and the image policy looks up digests and signatures. It is the only
// package that the platform and the workflow share.
package imagestore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"golang.org/x/sync/errgroup"
)

// Namespace is the containerd namespace for everything that the kubelet runs (CRI's constant).
const Namespace = "k8s.io"

// Snapshotter is the containerd snapshotter for images of pods.
const Snapshotter = "overlayfs"

// Store is the image store of a node's containerd.
type Store struct {
	client *containerd.Client
	// naming is held while it is decided which image has a name.
	naming sync.Mutex
}

// Open connects to the containerd at a socket. A missing socket is an error that wraps fs.ErrNotExist.
func Open(socket string) (*Store, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, err
	}
	client, err := containerd.New(socket, containerd.WithDefaultNamespace(Namespace))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	return &Store{client: client}, nil
}

// Close ends the connection.
func (s *Store) Close() error { return s.client.Close() }

// Has reports whether an image, by its full name (docker.io/library/x:1), exists and is ready to run.
func (s *Store) Has(ctx context.Context, ref string) (bool, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := s.client.GetImage(ctx, ref)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for image %s: %w", ref, err)
	}
	unpacked, err := image.IsUnpacked(ctx, Snapshotter)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("look for image %s: %w", ref, err)
	}
	return err == nil && unpacked, nil
}

// Unpacked is Has, for an image that may have been pushed or copied to this node and never run here: it is unpacked.
func (s *Store) Unpacked(ctx context.Context, ref string) (bool, error) {
	if has, err := s.Has(ctx, ref); err != nil || has {
		return has, err
	}
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := s.client.GetImage(ctx, ref)
	if err != nil {
		return false, notFoundIsNil(err)
	}
	err = image.Unpack(ctx, Snapshotter, containerd.WithUnpackApplyOpts(diff.WithSyncFs(true)))
	if err == nil || errdefs.IsNotFound(err) {
		return err == nil, nil // content may be missing
	}
	return false, fmt.Errorf("unpack image %s: %w", ref, err)
}

// Names returns the names of all images with a tag, as a user types them: "shop/api:1.0.0".
func (s *Store) Names(ctx context.Context) ([]string, error) {
	all, err := s.client.ImageService().List(namespaces.WithNamespace(ctx, Namespace))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var names []string
	for _, image := range all {
		named, err := reference.ParseNormalizedNamed(image.Name)
		if err != nil || strings.HasPrefix(image.Name, "sha256:") {
			continue // the last is CRI's own name for it
		}
		if _, ok := named.(reference.Tagged); ok {
			names = append(names, reference.FamiliarString(named))
		}
	}
	return names, nil
}

// Export writes an image, by its full name, to a file, as an OCI archive for this machine's platform.
func (s *Store) Export(ctx context.Context, ref, path string) (err error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := s.client.ImageService().Get(ctx, ref)
	if err != nil {
		return fmt.Errorf("look for image %s: %w", ref, err)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := s.client.Export(ctx, f, archive.WithImages([]images.Image{image}), archive.WithPlatform(platforms.DefaultStrict())); err != nil {
		return fmt.Errorf("export image %s: %w", ref, err)
	}
	return nil
}

// Import loads one OCI or Docker archive, plain or compressed, into containerd and unpacks its images. Each layer is on disk
// before containerd records it, because containerd never checks existing layers again. Labels, unless nil, replace
// those of an existing image with the same name.
func (s *Store) Import(ctx context.Context, path string, labels map[string]string) error {
	_, err := s.load(namespaces.WithNamespace(ctx, Namespace), path, labels)
	return err
}

// Load imports an archive as Import does, for a user who names its images: they stay until the user removes them.
func (s *Store) Load(ctx context.Context, path string) error {
	return s.Import(ctx, path, Copy{Imported: true, Pushed: deployedNow()}.set())
}

func (s *Store) load(ctx context.Context, path string, labels map[string]string) ([]images.Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := decompress(path, bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer r.Close()
	imported, err := s.loadFrom(ctx, r, labels)
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", path, err)
	}
	return imported, nil
}

func (s *Store) loadFrom(ctx context.Context, r io.Reader, labels map[string]string) ([]images.Image, error) {
	imported, err := s.client.Import(ctx, r, containerd.WithImageLabels(labels))
	if err != nil {
		return nil, err
	}
	var g errgroup.Group
	g.SetLimit(4)
	for _, image := range imported {
		g.Go(func() error {
			if err := containerd.NewImage(s.client, image).Unpack(ctx, Snapshotter, containerd.WithUnpackApplyOpts(diff.WithSyncFs(true))); err != nil {
				return fmt.Errorf("unpack image %s: %w", image.Name, err)
			}
			return nil
		})
	}
	return imported, g.Wait()
}
