package imagestore

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
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// upperdirLabel is the label with a layer's folder (plugins/snapshots/overlay in containerd, with upperdir_label).
const upperdirLabel = "containerd.io/snapshot/overlay.upperdir"

// Found is the result of checking the images.
type Found struct {
	// Rewritten are the damaged layers, with the first image that contains each.
	Rewritten []string
	// Lost are the images with missing or damaged content that cannot be restored from layers. Damaged content was
	// removed, so that an import can restore it.
	Lost []string
}

// Verify compares every layer that containerd has unpacked with its archive, and unpacks those again that
// differ. containerd itself never checks a recorded layer again, and an import assumes that an existing layer
// is intact, so there is no other way to repair one. No pod may use a layer while it is rewritten: after a power failure, none is running.
func (s *Store) Verify(ctx context.Context) (Found, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	var f Found
	snapshotService := s.client.SnapshotService(Snapshotter)
	all, err := s.client.ListImages(ctx)
	if err != nil {
		return f, fmt.Errorf("list images: %w", err)
	}
	seen := map[digest.Digest]bool{}
	var damaged []digest.Digest
	for _, image := range all {
		v := verification{store: s.client.ContentStore(), layers: snapshotService, image: image, seen: seen}
		if err := v.run(ctx); err != nil && !errdefs.IsNotFound(err) {
			return f, fmt.Errorf("check image %s: %w", image.Name(), err)
		} else if err != nil || len(v.damaged) > 0 {
			f.Lost = append(f.Lost, image.Name())
		}
		f.Rewritten = append(f.Rewritten, v.rewritten...)
		damaged = append(damaged, v.damaged...)
	}
	for _, d := range damaged {
		if err := s.client.ContentStore().Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			return f, fmt.Errorf("remove damaged content %s: %w", d, err)
		}
	}
	if len(damaged) == 0 {
		return f, nil
	}
	// An import assumes that removed content is intact while its file exists. The end of a lease triggers containerd's garbage
	// collection.
	lease, err := s.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = s.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
	}
	if err != nil {
		return f, fmt.Errorf("remove damaged content: %w", err)
	}
	return f, nil
}

// openBlob opens content. Content of which only the name is left is damaged.
func openBlob(ctx context.Context, store content.Store, d ocispec.Descriptor) (content.ReaderAt, error) {
	blob, err := store.ReaderAt(ctx, d)
	if errdefs.IsNotFound(err) || errors.Is(err, fs.ErrNotExist) {
		return nil, &damagedError{d.Digest}
	}
	return blob, err
}

// damagedError means that content is missing, or does not match its digest.
type damagedError struct{ digest digest.Digest }

func (e *damagedError) Error() string { return fmt.Sprintf("content %s is damaged", e.digest) }

// verification is the check of one image.
type verification struct {
	store  content.Store
	layers snapshots.Snapshotter
	image  containerd.Image
	seen   map[digest.Digest]bool // layers already checked for another image

	rewritten []string
	damaged   []digest.Digest
}

// run checks the image's documents, and then each layer. Without the documents nothing else can be checked.
func (v *verification) run(ctx context.Context) error {
	children := images.FilterPlatforms(images.ChildrenHandler(v.store), platforms.Default())
	err := images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if images.IsLayerType(d.MediaType) {
			return nil, nil
		}
		if err := verifyBlob(ctx, v.store, d); err != nil {
			return nil, err
		}
		return children(ctx, d)
	}), v.image.Target())
	if v.note(err) || err != nil {
		return notDamaged(err)
	}
	manifest, err := images.Manifest(ctx, v.store, v.image.Target(), platforms.Default())
	if err != nil {
		return err
	}
	diffIDs, err := v.image.RootFS(ctx)
	if err != nil {
		return err
	}
	if len(diffIDs) != len(manifest.Layers) {
		return fmt.Errorf("the manifest has %d layers, the configuration %d", len(manifest.Layers), len(diffIDs))
	}
	var parents []string // folders of the layers below, nearest first
	for i, layer := range manifest.Layers {
		chain := identity.ChainID(diffIDs[:i+1])
		info, err := v.layers.Stat(ctx, chain.String())
		if errdefs.IsNotFound(err) {
			return nil // not unpacked this far
		}
		if err != nil {
			return err
		}
		dir := info.Labels[upperdirLabel]
		if dir == "" {
			return fmt.Errorf("containerd has no folder for layer %s", chain)
		}
		if !v.seen[chain] {
			v.seen[chain] = true
			if err := v.layer(ctx, chain, layer, dir, parents); err != nil {
				return err
			}
		}
		parents = append([]string{dir}, parents...)
	}
	return nil
}

func (v *verification) layer(ctx context.Context, chain digest.Digest, layer ocispec.Descriptor, dir string, parents []string) error {
	same, err := sameAsLayer(ctx, v.store, layer, dir)
	if v.note(err) || err != nil || same {
		return notDamaged(err)
	}
	if err := rewriteLayer(ctx, v.store, layer, dir, parents); err != nil {
		return fmt.Errorf("rewrite layer %s: %w", chain, err)
	}
	v.rewritten = append(v.rewritten, fmt.Sprintf("%s of %s", chain, v.image.Name()))
	return nil
}

// note records damage, and reports whether err is about damage.
func (v *verification) note(err error) bool {
	damaged := (*damagedError)(nil)
	if !errors.As(err, &damaged) {
		return false
	}
	v.damaged = append(v.damaged, damaged.digest)
	return true
}

// notDamaged returns err, or nil if it is about damage, which note has recorded.
func notDamaged(err error) error {
	if damaged := (*damagedError)(nil); errors.As(err, &damaged) {
		return nil
	}
	return err
}

// verifyBlob reads content and compares it with its digest.
func verifyBlob(ctx context.Context, store content.Store, d ocispec.Descriptor) error {
	blob, err := openBlob(ctx, store, d)
	if err != nil {
		return err
	}
	defer blob.Close()
	verifier := d.Digest.Verifier()
	if _, err := io.Copy(verifier, content.NewReader(blob)); errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return &damagedError{d.Digest}
	} else if err != nil {
		return err
	}
	if !verifier.Verified() {
		return &damagedError{d.Digest}
	}
	return nil
}

// sameAsLayer reports whether the files in dir match the layer. A damaged layer is an error.
func sameAsLayer(ctx context.Context, store content.Store, layer ocispec.Descriptor, dir string) (bool, error) {
	if err := verifyBlob(ctx, store, layer); err != nil {
		return false, err
	}
	blob, err := openBlob(ctx, store, layer)
	if err != nil {
		return false, err
	}
	defer blob.Close()
	plain, err := compression.DecompressStream(content.NewReader(blob))
	if err != nil {
		return false, err
	}
	defer plain.Close()
	return sameAsArchive(ctx, tar.NewReader(plain), dir)
}

// whiteout is the prefix of an entry that hides one of a lower layer.
const whiteout = ".wh."

// sameAsArchive compares dir with an archive. It reads the content only of files that have a hole: a power failure loses
// the end of a file, or pages that then read as holes, and containerd writes no holes.
func sameAsArchive(ctx context.Context, r *tar.Reader, dir string) (bool, error) {
	differs := map[string]bool{} // a later entry replaces an earlier one of the same name
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
			return false, fmt.Errorf("check %s in %s: %w", name, dir, err)
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

// sameContent compares a file that has a hole with its expected content. A file without holes has all its pages.
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
	// A file system without support for holes returns an error; then the content must be compared, too.
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

// rewriteLayer empties the folder of a layer and unpacks the layer into it, as containerd did. The folder's name stays, so that
// higher layers, images and containers that use it remain valid.
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
	// For such a mount the applier writes to the upper folder and mounts nothing (core/diff/apply/apply_linux.go).
	options := []string{"upperdir=" + dir}
	if len(parents) > 0 {
		options = append(options, "lowerdir="+strings.Join(parents, ":"))
	}
	_, err = apply.NewFileSystemApplier(store).Apply(ctx, layer, []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, diff.WithSyncFs(true))
	return err
}
