package registry

import (
	"fmt"
	"io"
	"net/http"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/imagestore"
)

const (
	// lookBytes is how much of one layer is written between two looks at the free space.
	lookBytes = 4 << 20
	// maxMargin is how much more than the kubelet needs stays free, in bytes, or a twentieth of the disk if that is less.
	maxMargin = 2 << 30
)

// enoughSpace returns an error if the disk of images is nearly full, or would be with so many bytes more: images of others must not evict
// this node's pods.
func (r *Registry) enoughSpace(more int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(r.opts.ContentDir, &fs); err != nil {
		return fmt.Errorf("look for space in %s: %w", r.opts.ContentDir, err)
	}
	free, all := fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize)
	if free < reserve(all)+uint64(max(more, 0)) {
		return withStatus(http.StatusInsufficientStorage, "the node has only %d MiB of disk left, too little for %d more: free some, or use another server", free>>20, more>>20)
	}
	return nil
}

// reserve is how many bytes of a disk pushes and copies leave free: more than the kubelet needs, so that what all of them write between two
// looks evicts no pod.
func reserve(all uint64) uint64 { return all/100*imagestore.EvictionPercent + min(maxMargin, all/20) }

// incoming is content that another node sends. It ends when the disk is nearly full.
type incoming struct {
	io.ReadCloser
	space        func() error
	size, looked int64
}

// Read implements io.Reader.
func (i *incoming) Read(text []byte) (int, error) {
	if i.size-i.looked >= lookBytes {
		i.looked = i.size
		if err := i.space(); err != nil {
			return 0, err
		}
	}
	n, err := i.ReadCloser.Read(text)
	i.size += int64(n)
	return n, err
}
