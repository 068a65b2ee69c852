package imagestore

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/klauspost/compress/zstd"
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
