package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// linkPrograms makes data/current point to the unpacked payload. Running shims and containers refer to their programs
// through it, so an upgrade does not pull them away.
func (s *server) linkPrograms(context.Context) error {
	current, id := string(s.programs), filepath.Base(s.unpacked)
	target, err := os.Readlink(current)
	if err == nil && target == id {
		return nil
	}
	if err := atomicfile.Symlink(id, current); err != nil {
		return fmt.Errorf("link the unpacked programs: %w", err)
	}
	// The version before stays: a shim that it started may still be at work with its files.
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
