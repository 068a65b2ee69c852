// Package checkpoint remembers on disk how far something was read, and never further than what was read is stored: after a crash, some of it is read
// again, and nothing is missed.
package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"polymesh.dev/polymesh/observe/atomicfile"
)

// Store says what of its contents is on disk: a logstore.Store, or a push.Buffer.
type Store interface {
	// Mark stands for what was appended until now. It is on disk when Durable is as high.
	Mark() uint64
	Durable() uint64
}

// File has the last state of type T. It is not for several goroutines.
type File[T any] struct {
	path  string
	store Store
	// next is written when the store has all up to a mark on disk; nil if there is nothing to write.
	next *T
	mark uint64
}

// New returns a File, which need not exist on disk.
func New[T any](path string, store Store) *File[T] { return &File[T]{path: path, store: store} }

// Load reads the state. found is false if there never was one.
func (f *File[T]) Load() (state T, found bool, err error) {
	text, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return state, false, nil
	}
	if err != nil {
		return state, false, err
	}
	var whole T
	if err := json.Unmarshal(text, &whole); err != nil {
		return state, false, fmt.Errorf("read %s: %w", f.path, err)
	}
	return whole, true, nil
}

// Save takes the state from changed, which returns nil if there is nothing new, and writes it in this or a later call: when what was appended until
// then is on disk. It returns the state that it wrote, nil for none.
func (f *File[T]) Save(changed func() *T) (written *T, err error) {
	if f.next == nil {
		if f.next = changed(); f.next == nil {
			return nil, nil
		}
		// Not before the state: all that it says is stored must be below the mark.
		f.mark = f.store.Mark()
	}
	if f.store.Durable() < f.mark {
		return nil, nil
	}
	text, err := json.Marshal(f.next)
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", f.path, err)
	}
	if err := atomicfile.Write(f.path, text); err != nil {
		return nil, err
	}
	written, f.next = f.next, nil
	return written, nil
}
