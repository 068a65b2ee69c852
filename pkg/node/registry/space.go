package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookBytes is how much of one layer is written between two looks at the free space.
	lookBytes = 4 << 20
	// maxMargin is how much more than the kubelet needs stays free, in bytes, or a twentieth of the disk if that is less.
	maxMargin = 2 << 30
)

// enoughSpace returns an error if the disk of images is nearly full, or would be with so many bytes more, at least 0: images of others must
// not evict this node's pods.
func (r *Registry) enoughSpace(more int64) error {
	free, all, err := r.disk()
	if err != nil {
		return err
	}
	keep := reserve(all, r.opts.EvictsBelow(all))
	if free >= keep+uint64(more) {
		return nil
	}
	layer := ""
	if more > 0 {
		layer = fmt.Sprintf(", too few for a layer of %d", more>>20)
	}
	return withStatus(http.StatusInsufficientStorage, "the node has only %d MiB of disk left, of which %d stay free%s: free some, or use another server", free>>20, keep>>20, layer)
}

// disk returns the free space and the size of the disk of images.
func (r *Registry) disk() (free, all uint64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(r.opts.ContentDir, &fs); err != nil {
		return 0, 0, fmt.Errorf("look for space in %s: %w", r.opts.ContentDir, err)
	}
	return fs.Bavail * uint64(fs.Bsize), fs.Blocks * uint64(fs.Bsize), nil
}

// reserve is how many bytes of a disk pushes and copies leave free: more than the kubelet needs, so that what all of them write between two
// looks evicts no pod.
func reserve(all, evicts uint64) uint64 { return evicts + min(maxMargin, all/20) }

const (
	// leastRate is how much another node sends at least, in bytes a second after slowTime; with less, it would hold up what comes next.
	leastRate = 16 << 10
	slowTime  = 2 * time.Minute
)

// errSlow means that a node sends too slowly.
var errSlow = errors.New("the node sends too slowly")

// incoming is content that another node sends. It ends when the disk is nearly full, or when it comes too slowly. Nil for space means that
// nothing is written here.
type incoming struct {
	io.ReadCloser
	space        func() error
	began        time.Time
	size, looked int64
}

// Read implements io.Reader.
func (i *incoming) Read(text []byte) (int, error) {
	if i.space != nil && i.size-i.looked >= lookBytes {
		i.looked = i.size
		if err := i.space(); err != nil {
			return 0, err
		}
	}
	n, err := i.ReadCloser.Read(text)
	i.size += int64(n)
	if err == nil && tooSlow(i.size, time.Since(i.began)) {
		err = fmt.Errorf("%w: only %d bytes have come in %s", errSlow, i.size, time.Since(i.began).Round(time.Second))
	}
	return n, err
}

// tooSlow reports whether too few bytes have come in a time.
func tooSlow(size int64, in time.Duration) bool {
	return in > slowTime && size < int64((in-slowTime).Seconds())*leastRate
}
