package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Last returns the newest snapshot in this server's folder, by the files' names; nil if there is none. It reads no snapshot.
func (s *Snapshots) Last() (*Info, error) {
	entries, err := os.ReadDir(s.o.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the snapshots: %w", err)
	}
	var last *Info
	for _, e := range entries {
		p, ok := parse(e.Name())
		if !ok || !e.Type().IsRegular() || last != nil && !p.created.After(last.Created) {
			continue
		}
		file, err := e.Info()
		if err != nil {
			continue // it has just been removed
		}
		info := p.info(Local, filepath.Join(s.o.Dir, e.Name()), file.Size())
		last = &info
	}
	return last, nil
}

// Failure returns why the last scheduled snapshot failed; nil if it did not.
func (c *Component) Failure() error {
	if err := c.last.Load(); err != nil {
		return *err
	}
	return nil
}
