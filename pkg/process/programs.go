package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// linkPrograms points data/current to the unpacked payload. Running shims and containers use their programs
// through it, so an upgrade does not remove them.
func (p *Process) linkPrograms() error {
	current, id := string(p.Programs), filepath.Base(p.unpacked)
	target, err := os.Readlink(current)
	if err == nil && target == id {
		return nil
	}
	if err := atomicfile.Symlink(id, current); err != nil {
		return fmt.Errorf("link the unpacked programs: %w", err)
	}
	// Keep the previous version: its shims may still be using their files.
	if err := removeExcept(filepath.Dir(current), "current", id, target); err != nil {
		return fmt.Errorf("remove the programs of old versions: %w", err)
	}
	return nil
}

func removeExcept(dir string, keep ...string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
