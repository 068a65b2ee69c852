package imagestore

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportArchive imports an archive of the user, unless again is not set and all its images exist from an earlier start. The key
// identifies the archive's current contents.
func (s *Store) ImportArchive(ctx context.Context, path string, again bool) (key string, err error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %d %d", filepath.Base(path), info.Size(), info.ModTime().UnixNano()))
	key = hex.EncodeToString(sum[:16])
	list, err := s.client.ListImages(ctx, fmt.Sprintf("labels.%q==%s", archiveLabel, key))
	if err != nil {
		return key, fmt.Errorf("list images: %w", err)
	}
	unpacked := 0
	for _, image := range list {
		if ok, err := image.IsUnpacked(ctx, Snapshotter); err == nil && ok && image.Labels()[archiveCountLabel] == strconv.Itoa(len(list)) {
			unpacked++
		}
	}
	if len(list) > 0 && unpacked == len(list) && !again {
		return key, nil
	}
	imported, err := s.load(ctx, path, map[string]string{pinnedLabel: pinnedValue, archiveLabel: key})
	if err != nil {
		return key, err
	}
	names := map[string]bool{}
	for _, image := range imported {
		names[image.Name] = true
	}
	for name := range names {
		if err := s.label(ctx, name, map[string]string{archiveCountLabel: strconv.Itoa(len(names))}); err != nil {
			return key, err
		}
	}
	return key, nil
}

// HasPayload reports whether every shipped image of exactly this payload is in containerd, unpacked, and has the digest in
// the archives, which the launcher has checked against payload.json.
func (s *Store) HasPayload(ctx context.Context, id string, names, archives []string) (bool, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	list, err := s.client.ListImages(ctx, fmt.Sprintf("labels.%q==%s", payloadLabel, id))
	if err != nil {
		return false, fmt.Errorf("list images: %w", err)
	}
	digests := map[string]digest.Digest{}
	for _, path := range archives {
		if err := readIndex(path, digests); err != nil {
			return false, err
		}
	}
	for _, ref := range names {
		at := slices.IndexFunc(list, func(image containerd.Image) bool { return image.Name() == ref })
		if at < 0 || list[at].Target().Digest != digests[ref] {
			return false, nil
		}
		if unpacked, err := list[at].IsUnpacked(ctx, Snapshotter); err != nil || !unpacked {
			return false, nil
		}
	}
	return true, nil
}

// ImportPayload imports a shipped archive of the payload with this id.
func (s *Store) ImportPayload(ctx context.Context, id, path string) error {
	return s.Import(ctx, path, map[string]string{pinnedLabel: pinnedValue, payloadLabel: id})
}

// readIndex adds the digests of the images in an OCI archive, by their names.
func readIndex(path string, digests map[string]digest.Digest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// The reader seeks over members that are not read.
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return fmt.Errorf("%s has no %s", path, ocispec.ImageIndexFile)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if header.Name != ocispec.ImageIndexFile {
			continue
		}
		var index ocispec.Index
		if err := json.NewDecoder(archive).Decode(&index); err != nil {
			return fmt.Errorf("read %s in %s: %w", ocispec.ImageIndexFile, path, err)
		}
		for _, m := range index.Manifests {
			digests[m.Annotations[images.AnnotationImageName]] = m.Digest
		}
		return nil
	}
}

var archiveSuffixes = []string{".tar", ".tar.gz", ".tgz", ".tar.zst"}

// IsArchive reports whether a file with this name is treated as an image archive.
func IsArchive(name string) bool {
	return slices.ContainsFunc(archiveSuffixes, func(s string) bool { return strings.HasSuffix(name, s) })
}

func decompress(path string, r io.Reader) (io.ReadCloser, error) {
	switch {
	case strings.HasSuffix(path, "gz"):
		return gzip.NewReader(r)
	case strings.HasSuffix(path, ".zst"):
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}
