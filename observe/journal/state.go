package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"polymesh.dev/polymesh/observe/atomicfile"
)

// state is what is remembered.
type state struct {
	Files  map[string]Place `json:"files"`
	Kernel KernelPlace      `json:"kernel"`
}

func loadState(path string) (*state, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &state{}, nil
	}
	if err != nil {
		return &state{}, fmt.Errorf("reading how far the platform's logs were read: %w", err)
	}
	st := &state{}
	if err := json.Unmarshal(b, st); err != nil {
		return &state{}, fmt.Errorf("reading how far the platform's logs were read, in %s: %w", path, err)
	}
	return st, nil
}

// checkpoint is a state that may be written when all lines up to a mark are on disk.
type checkpoint struct {
	mark uint64
	data []byte
}

// save writes the state of some moments ago, when the lines of then are on disk, and takes the next one.
func (j *Journal) save() error {
	if j.saving == nil {
		if !j.dirty {
			return nil
		}
		st := state{Files: map[string]Place{}, Kernel: j.kernel.place}
		for _, f := range j.files {
			st.Files[f.Name] = f.place
		}
		data, err := json.Marshal(st)
		if err != nil {
			return fmt.Errorf("remembering how far the platform's logs were read: %w", err)
		}
		j.dirty = false
		j.saving = &checkpoint{mark: j.opts.Store.Mark(), data: data}
	}
	if j.opts.Store.Durable() < j.saving.mark {
		return nil
	}
	if err := atomicfile.Write(j.opts.State, j.saving.data); err != nil {
		return fmt.Errorf("remembering how far the platform's logs were read: %w", err)
	}
	j.saving = nil
	return nil
}
