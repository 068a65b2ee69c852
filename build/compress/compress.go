// Package compress compresses data by running zstd, at level 19 for releases, which the Go library does not support. It
// caches every frame in a directory under the hash of its input, so that unchanged data is not compressed
// again. build/images uses it for layers, build/payload for the members of the shipped file.
package compress

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Shipped is the level for releases.
const Shipped = 19

// Store is a directory of zstd frames.
type Store struct {
	Dir string
	// Level is zstd's level; 0 is Shipped. A lower one, for development, still uses an existing frame of level Shipped.
	Level int
}

// Frame returns content as one zstd frame. Multi-threaded zstd writes the same bytes for any number of threads.
func (s Store) Frame(ctx context.Context, content []byte) ([]byte, error) {
	sum := sha256.Sum256(content)
	level := cmp.Or(s.Level, Shipped)
	var path string
	for _, l := range []int{Shipped, level} {
		path = filepath.Join(s.Dir, fmt.Sprintf("%s-%d.zst", hex.EncodeToString(sum[:]), l))
		if frame, err := os.ReadFile(path); err == nil {
			return frame, nil
		}
	}

	command := exec.CommandContext(ctx, "zstd", fmt.Sprintf("-%d", level), "-T0", "--quiet", "--stdout")
	command.Stdin = bytes.NewReader(content)
	var frame, complaint bytes.Buffer
	command.Stdout, command.Stderr = &frame, &complaint
	if err := command.Run(); err != nil {
		return nil, fmt.Errorf("run zstd: %w: %s", err, complaint.String())
	}

	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the cache of compressed pieces: %w", err)
	}
	// Renamed into place: an interrupted build must not leave an incomplete frame under its final name.
	partial, err := os.CreateTemp(s.Dir, "partial-")
	if err != nil {
		return nil, fmt.Errorf("cache a compressed piece: %w", err)
	}
	defer os.Remove(partial.Name())
	if _, err := partial.Write(frame.Bytes()); err != nil {
		partial.Close()
		return nil, fmt.Errorf("cache a compressed piece: %w", err)
	}
	if err := partial.Close(); err != nil {
		return nil, fmt.Errorf("cache a compressed piece: %w", err)
	}
	if err := os.Rename(partial.Name(), path); err != nil {
		return nil, fmt.Errorf("cache a compressed piece: %w", err)
	}
	return frame.Bytes(), nil
}
