package node

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// upperdirLabel says in which folder a layer lies (plugins/snapshots/overlay in containerd, with upperdir_label).
const upperdirLabel = "containerd.io/snapshot/overlay.upperdir"

// found is what a look at the images has found.
type found struct {
	// rewritten are the layers that were torn, by the image in which they came up first.
	rewritten []string
	// lost are the images of which something is missing or damaged that no layer can be made of. Their damaged content was
	// removed, so that an import brings it again.
	lost []string
}

// Verify compares every layer that containerd has unpacked with the archive that it came from, and writes those again that
// differ. containerd itself never looks again at what it has noted as unpacked, and an import takes a layer that is there
// for whole, so that no other way mends one. No pod must run on a layer that is written again: after a power cut, none does.
func (s *ImageStore) Verify(ctx context.Context) (found, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	var f found
	snapshotService := s.client.SnapshotService(snapshotter)
	// What a cut has left of a layer that was being made has the name that another one is to get ("failed to rename … file
	// exists").
	if cleaner, ok := snapshotService.(snapshots.Cleaner); ok {
		if err := cleaner.Cleanup(ctx); err != nil && !errdefs.IsNotImplemented(err) {
			return f, fmt.Errorf("remove half-made layers: %w", err)
		}
	}
	all, err := s.client.ListImages(ctx)
	if err != nil {
		return f, fmt.Errorf("list images: %w", err)
	}
	seen, removed := map[digest.Digest]bool{}, false
	for _, image := range all {
		rewritten, err := s.verifyImage(ctx, snapshotService, image, seen)
		f.rewritten = append(f.rewritten, rewritten...)
		damaged := (*damagedError)(nil)
		switch {
		case errors.As(err, &damaged):
			if err := s.client.ContentStore().Delete(ctx, damaged.digest); err != nil && !errdefs.IsNotFound(err) {
				return f, fmt.Errorf("remove damaged content of image %s: %w", image.Name(), err)
			}
			removed = true
			f.lost = append(f.lost, image.Name())
		case errdefs.IsNotFound(err):
			f.lost = append(f.lost, image.Name())
		case err != nil:
			return f, fmt.Errorf("check image %s: %w", image.Name(), err)
		}
	}
	if !removed {
		return f, nil
	}
	// An import takes the file of removed content for whole as long as it lies there. The end of a lease has containerd collect
	// what is no longer named.
	lease, err := s.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = s.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
	}
	if err != nil {
		return f, fmt.Errorf("remove damaged content: %w", err)
	}
	return f, nil
}

// openBlob opens content. One of which only the name is left is damaged.
func openBlob(ctx context.Context, store content.Store, d ocispec.Descriptor) (content.ReaderAt, error) {
	blob, err := store.ReaderAt(ctx, d)
	if errdefs.IsNotFound(err) || errors.Is(err, fs.ErrNotExist) {
		return nil, &damagedError{d.Digest}
	}
	return blob, err
}

// damagedError is content that is missing, or not what its name says.
type damagedError struct{ digest digest.Digest }

func (e *damagedError) Error() string { return fmt.Sprintf("content %s is damaged", e.digest) }

func (s *ImageStore) verifyImage(ctx context.Context, layers snapshots.Snapshotter, image containerd.Image, seen map[digest.Digest]bool) (rewritten []string, err error) {
	store := s.client.ContentStore()
	children := images.FilterPlatforms(images.ChildrenHandler(store), platforms.Default())
	documents := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if images.IsLayerType(d.MediaType) {
			return nil, nil
		}
		if err := verifyBlob(ctx, store, d); err != nil {
			return nil, err
		}
		return children.Handle(ctx, d)
	})
	if err := images.Walk(ctx, documents, image.Target()); err != nil {
		return nil, err
	}
	manifest, err := images.Manifest(ctx, store, image.Target(), platforms.Default())
	if err != nil {
		return nil, err
	}
	diffIDs, err := image.RootFS(ctx)
	if err != nil {
		return nil, err
	}
	if len(diffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("the manifest has %d layers, the configuration %d", len(manifest.Layers), len(diffIDs))
	}
	var parents []string // the folders of the layers below, the nearest first
	for i, layer := range manifest.Layers {
		chain := identity.ChainID(diffIDs[:i+1])
		info, err := layers.Stat(ctx, chain.String())
		if errdefs.IsNotFound(err) {
			return rewritten, nil // not unpacked this far
		}
		if err != nil {
			return rewritten, err
		}
		dir := info.Labels[upperdirLabel]
		if dir == "" {
			return rewritten, fmt.Errorf("containerd does not say where layer %s lies", chain)
		}
		if !seen[chain] {
			whole, err := sameAsLayer(ctx, store, layer, dir)
			if err != nil {
				return rewritten, err
			}
			if !whole {
				if err := rewriteLayer(ctx, store, layer, dir, parents); err != nil {
					return rewritten, fmt.Errorf("write layer %s again: %w", chain, err)
				}
				rewritten = append(rewritten, fmt.Sprintf("%s of %s", chain, image.Name()))
			}
			seen[chain] = true
		}
		parents = append([]string{dir}, parents...)
	}
	return rewritten, nil
}

// verifyBlob reads content and compares it with its name.
func verifyBlob(ctx context.Context, store content.Store, d ocispec.Descriptor) error {
	blob, err := openBlob(ctx, store, d)
	if err != nil {
		return err
	}
	defer blob.Close()
	verifier := d.Digest.Verifier()
	if _, err := io.Copy(verifier, content.NewReader(blob)); err != nil {
		return err
	}
	if !verifier.Verified() {
		return &damagedError{d.Digest}
	}
	return nil
}

// sameAsLayer reports whether the files in dir are those of the layer. A damaged layer is an error.
func sameAsLayer(ctx context.Context, store content.Store, layer ocispec.Descriptor, dir string) (bool, error) {
	blob, err := openBlob(ctx, store, layer)
	if err != nil {
		return false, err
	}
	defer blob.Close()
	verifier := layer.Digest.Verifier()
	raw := io.TeeReader(content.NewReader(blob), verifier)
	same := true
	plain, err := compression.DecompressStream(raw)
	if err == nil {
		same, err = sameAsArchive(ctx, tar.NewReader(plain), dir)
		if err == nil {
			_, err = io.Copy(io.Discard, plain)
		}
		plain.Close()
	}
	// What is behind the archive counts for the digest too, and damaged content fails somewhere on the way.
	if _, copyErr := io.Copy(io.Discard, raw); copyErr != nil {
		return false, copyErr
	}
	if !verifier.Verified() {
		return false, &damagedError{layer.Digest}
	}
	return same, err
}

// whiteout starts the name of an entry that hides one of a layer below.
const whiteout = ".wh."

// sameAsArchive compares dir with an archive. It reads the content of those files only that have a hole: what a power cut
// has taken of a file is its end, or pages that read as a hole, and containerd writes none.
func sameAsArchive(ctx context.Context, r *tar.Reader, dir string) (bool, error) {
	differs := map[string]bool{} // a later entry takes the place of an earlier one of the same name
	for {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return len(differs) == 0, nil
		}
		if err != nil {
			return false, err
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		name := path.Clean("/" + header.Name)
		if strings.HasPrefix(path.Base(name), whiteout) {
			continue
		}
		same, err := sameAsEntry(r, header, dir, filepath.Join(dir, filepath.FromSlash(name)))
		if err != nil {
			return false, fmt.Errorf("look at %s in %s: %w", name, dir, err)
		}
		if same {
			delete(differs, name)
		} else {
			differs[name] = true
		}
	}
}

func sameAsEntry(content io.Reader, header *tar.Header, dir, file string) (bool, error) {
	info, err := os.Lstat(file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	switch header.Typeflag {
	case tar.TypeReg:
		if !info.Mode().IsRegular() || info.Size() != header.Size {
			return false, nil
		}
		return sameContent(content, file, info.Size())
	case tar.TypeLink:
		return info.Mode()&fs.ModeType == 0 || info.Mode()&fs.ModeSymlink != 0, nil
	case tar.TypeSymlink:
		target, err := os.Readlink(file)
		return err == nil && target == header.Linkname, nil
	case tar.TypeDir:
		return info.IsDir(), nil
	}
	return true, nil
}

// sameContent compares a file that has a hole with what is to be in it. One without has all its pages.
func sameContent(want io.Reader, file string, size int64) (bool, error) {
	if size == 0 {
		return true, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	hole, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE)
	if err == nil && hole >= size {
		return true, nil
	}
	// A file system that does not know holes says so; then, too, only a look at the content tells.
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(want, a)
		m, err2 := io.ReadFull(f, b)
		if n != m || !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return true, nil
		case err != nil:
			return false, err
		case err2 != nil:
			return false, err2
		}
	}
}

// rewriteLayer empties the folder of a layer and unpacks the layer into it, as containerd did. Its name and those of the
// layers above stay, so that images and containers that are made of it stay too.
func rewriteLayer(ctx context.Context, store content.Store, layer ocispec.Descriptor, dir string, parents []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	// The applier writes to the upper folder of such a mount and mounts nothing (core/diff/apply/apply_linux.go).
	options := []string{"upperdir=" + dir}
	if len(parents) > 0 {
		options = append(options, "lowerdir="+strings.Join(parents, ":"))
	}
	_, err = apply.NewFileSystemApplier(store).Apply(ctx, layer, []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, diff.WithSyncFs(true))
	return err
}
