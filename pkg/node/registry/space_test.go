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

// An agent's images have a part of the disk, with what is under way, and no other node's count.
func TestShare(t *testing.T) {
	if share(20<<30) != minShare || share(1<<40) != (1<<40)/10 {
		t.Errorf("%d, %d", share(20<<30), share(1<<40))
	}
	c := newCopies(nil)
	began := time.Now()
	first, second := &arriving{}, &arriving{}
	c.receiving[offer{"b", "first"}], c.receiving[offer{"b", "second"}] = first, second
	c.receiving[offer{"b", "before"}] = &arriving{size: 1 << 40, done: true, at: began.Add(-time.Second)} // it is part of what is kept
	c.receiving[offer{"c", "other"}] = &arriving{size: 1 << 40}
	admit := func(a *arriving, size int64) bool { return c.admit(a, "b", size, 100, 1000, began) == nil }
	if !admit(first, 500) || admit(second, 401) || !admit(second, 300) || admit(first, 101) {
		t.Error("two copies have more together than they may")
	}
	second.done, second.at = true, time.Now()
	if admit(first, 101) || !admit(first, 100) {
		t.Error("what came meanwhile does not count")
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
