package journal

import "fmt"

// state is what is saved.
type state struct {
	Files  map[string]Place `json:"files"`
	Kernel KernelPlace      `json:"kernel"`
}

// save saves how far each log was read.
func (j *Journal) save() error {
	_, err := j.checkpoint.Save(func() *state {
		if !j.dirty {
			return nil
		}
		st := &state{Files: map[string]Place{}, Kernel: j.kernel.place}
		for _, f := range j.files {
			st.Files[f.Name] = f.place
		}
		j.dirty = false
		return st
	})
	if err != nil {
		return fmt.Errorf("remembering how far the platform's logs were read: %w", err)
	}
	return nil
}
