package podlogs

import (
	"fmt"
	"hash/fnv"
)

// saved is the saved state of a file.
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

// state is the saved state of all files, by the folders of pod and container.
type state struct {
	Files map[string]map[string][]saved `json:"files"`
}

// find returns the saved state of a file.
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

// save saves how far each file was read.
func (t *Tailer) save() error {
	_, err := t.checkpoint.Save(func() *state {
		if !t.dirty {
			return nil
		}
		st := &state{Files: map[string]map[string][]saved{}}
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
		t.dirty = false
		return st
	})
	if err != nil {
		return fmt.Errorf("remembering how far the pods' logs were read: %w", err)
	}
	return nil
}

func (f *file) saved() saved {
	return saved{
		Restart: f.restart, Moved: f.moved, Dev: f.id.dev, Inode: f.id.inode,
		HeadSize: len(f.head), HeadHash: headHash(f.head), Place: f.place, Done: f.done,
	}
}
