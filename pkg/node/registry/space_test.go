package registry

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// On no disk do pushes and copies go on until the kubelet evicts pods, even if all write at once what they do between two looks.
func TestReserve(t *testing.T) {
	for _, all := range []uint64{10 << 30, 40 << 30, 2 << 40} {
		evicted := all * 5 / 100
		keep := reserve(all, evicted)
		if between := uint64(maxUploads+maxReceiving*imagestore.MaxParts) * lookBytes; keep < evicted+between {
			t.Errorf("of %d GiB, %d MiB stay free; the kubelet evicts with less than %d, and %d come between two looks", all>>30, keep>>20, evicted>>20, between>>20)
		}
	}
}

// A layer that another node sends ends when the disk is nearly full, however long it is.
func TestIncomingEndsOnAFullDisk(t *testing.T) {
	full := errors.New("full")
	written := 0
	from := &incoming{ReadCloser: io.NopCloser(bytes.NewReader(make([]byte, 8*lookBytes))), began: time.Now(), space: func() error {
		if written >= 3*lookBytes {
			return full
		}
		return nil
	}}
	part := make([]byte, 64<<10)
	for {
		n, err := from.Read(part)
		written += n
		if err == nil {
			continue
		}
		if !errors.Is(err, full) || written > 4*lookBytes {
			t.Errorf("%d bytes have come: %v", written, err)
		}
		return
	}
}

// A byte now and then does not keep a copy under way.
func TestTooSlow(t *testing.T) {
	for _, c := range []struct {
		size int64
		in   time.Duration
		want bool
	}{
		{0, slowTime, false}, {1, slowTime + time.Minute, true}, {60 * leastRate, slowTime + time.Minute, false}, {60, time.Hour, true}, {1 << 30, time.Hour, false},
	} {
		if got := tooSlow(c.size, c.in); got != c.want {
			t.Errorf("%d bytes in %s: %t", c.size, c.in, got)
		}
	}
}
