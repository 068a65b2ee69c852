package podlogs

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"

	"polymesh.dev/polymesh/observe/atomicfile"
)

// saved is what is remembered of a file.
type saved struct {
	Restart  int    `json:"restart"`
	Moved    string `json:"moved,omitempty"`
	Dev      uint64 `json:"dev"`
	Inode    uint64 `json:"inode"`
	HeadSize int    `json:"headSize"` // of its beginning
	HeadHash uint64 `json:"headHash"`
	Place    Place  `json:"place"`
	Done     bool   `json:"done,omitempty"`
}

// state is what is remembered of all files, by the folders of pod and container.
type state struct {
	Files map[string]map[string][]saved `json:"files"`
}

// loadState reads the state. found is false when there never was one.
func loadState(path string) (st *state, found bool, err error) {
	st = &state{}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return st, false, nil
	}
	if err != nil {
		return st, false, fmt.Errorf("reading how far the pods' logs were read: %w", err)
	}
	if err := json.Unmarshal(b, st); err != nil {
		return &state{}, false, fmt.Errorf("reading how far the pods' logs were read, in %s: %w", path, err)
	}
	return st, true, nil
}

// find gives what was remembered of a file that has been met.
func (st *state) find(dir, container string, f *file) (saved, bool) {
	for _, s := range st.Files[dir][container] {
		if s.Restart != f.restart {
			continue
		}
		if s.HeadSize < knownHead {
			if f.id == (fileID{s.Dev, s.Inode}) {
				return s, true
			}
		} else if s.HeadSize <= len(f.head) && s.HeadHash == headHash(f.head[:s.HeadSize]) {
			return s, true
		}
	}
	return saved{}, false
}

func headHash(head []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(head)
	return h.Sum64()
}

// checkpoint is a state that may be written when all lines up to a mark are on disk.
type checkpoint struct {
	mark uint64
	data []byte
}

// save writes the state of some moments ago, when the lines of then are on disk, and takes the next one.
func (t *Tailer) save() error {
	if t.saving == nil {
		data, err := t.snapshot()
		if err != nil || data == nil {
			return err
		}
		t.saving = &checkpoint{mark: t.opts.Store.Mark(), data: data}
	}
	if t.opts.Store.Durable() < t.saving.mark {
		return nil
	}
	if err := atomicfile.Write(t.opts.State, t.saving.data); err != nil {
		return fmt.Errorf("remembering how far the pods' logs were read: %w", err)
	}
	t.saving = nil
	return nil
}

// snapshot gives the state as it is, or nothing when it has not changed.
func (t *Tailer) snapshot() ([]byte, error) {
	if !t.dirty {
		return nil, nil
	}
	st := state{Files: map[string]map[string][]saved{}}
	for dir, p := range t.pods {
		containers := map[string][]saved{}
		for name, c := range p.containers {
			for _, f := range c.files {
				containers[name] = append(containers[name], f.saved())
			}
		}
		if len(containers) > 0 {
			st.Files[dir] = containers
		}
	}
	data, err := json.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("remembering how far the pods' logs were read: %w", err)
	}
	t.dirty = false
	return data, nil
}

func (f *file) saved() saved {
	return saved{
		Restart: f.restart, Moved: f.moved, Dev: f.id.dev, Inode: f.id.inode,
		HeadSize: len(f.head), HeadHash: headHash(f.head), Place: f.place, Done: f.done,
	}
}
