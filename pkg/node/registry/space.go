package registry

import (
	"fmt"
	"io"
	"net/http"

	"golang.org/x/sys/unix"
)

const (
	// lookBytes is how much of one layer is written between two looks at the free space.
	lookBytes = 4 << 20
	// maxReserve is what uploads leave free on the disk, in bytes, or a twentieth of it if that is less.
	maxReserve = 2 << 30
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

// reserve is how many bytes of a disk stay free.
func reserve(all uint64) uint64 { return min(maxReserve, all/20) }

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
