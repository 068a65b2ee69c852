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

func TestShare(t *testing.T) {
	if share(20<<30) != minShare || share(1<<40) != (1<<40)/10 {
		t.Errorf("%d, %d", share(20<<30), share(1<<40))
	}
}

// All copies of an agent together have no more than it may, whatever is asked for while they come and whenever one of them is done.
func TestBudget(t *testing.T) {
	c := newCopies(nil)
	kept, measured := int64(100), 0
	spend := func(b *budget, part int64) bool {
		return b.spend("b", part, 1000, func() (int64, error) { measured++; return kept, nil }) == nil
	}
	b, endFirst := c.budget("b")
	same, endSecond := c.budget("b")
	if other, end := c.budget("c"); b != same || other == b {
		t.Fatal("the copies of a node share no budget, or one with another node's")
	} else {
		end()
	}
	if !spend(b, 500) || spend(same, 401) || !spend(same, 300) || spend(b, 101) {
		t.Error("two copies have more together than they may")
	}
	// One is done, and the node asks about it again, before the other one goes on.
	c.receiving[offer{"b", "second"}] = &arriving{done: true}
	endSecond()
	delete(c.receiving, offer{"b", "second"})
	kept += 300
	if spend(b, 101) {
		t.Error("what a copy has that is done does not count")
	}
	third, endThird := c.budget("b")
	if spend(third, 101) || !spend(third, 100) || spend(third, 1) || spend(b, 1) {
		t.Error("a copy that begins later has more than is left")
	}
	third.refund(100)
	if spend(b, 101) || !spend(b, 100) {
		t.Error("what a copy had that failed is not given back")
	}
	endThird()
	endFirst()
	if measured != 1 || len(c.budgets) > 0 {
		t.Errorf("measured %d times, %d budgets are left", measured, len(c.budgets))
	}
	// The next one begins with what there is then.
	kept = 900
	b, end := c.budget("b")
	defer end()
	if spend(b, 101) || !spend(b, 100) {
		t.Error("what is kept does not count")
	}
	// What cannot be measured is not allowed.
	fresh := &budget{}
	if err := fresh.spend("b", 1, 1000, func() (int64, error) { return 0, errors.New("no answer") }); err == nil || fresh.measured {
		t.Errorf("without a measure: %v", err)
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
