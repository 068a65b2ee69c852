package registry

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// A layer that another node sends ends when the disk is nearly full, however long it is.
func TestIncomingEndsOnAFullDisk(t *testing.T) {
	full := errors.New("full")
	written := 0
	from := &incoming{ReadCloser: io.NopCloser(bytes.NewReader(make([]byte, 8*lookBytes))), space: func() error {
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
