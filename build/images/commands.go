package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// commands returns the commands of the packaged busybox, as it lists them itself, as paths without the leading slash.
func (d debian) commands(ctx context.Context, t tree) ([]string, error) {
	program, ok := t["bin/busybox"]
	if !ok {
		return nil, fmt.Errorf("busybox-static has no /bin/busybox")
	}
	dir, err := os.MkdirTemp("", "busybox-")
	if err != nil {
		return nil, fmt.Errorf("ask busybox for its commands: %w", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "busybox")
	if err := os.WriteFile(file, program.content, 0o700); err != nil {
		return nil, fmt.Errorf("ask busybox for its commands: %w", err)
	}
	var complaint bytes.Buffer
	command := exec.CommandContext(ctx, file, "--list-full")
	command.Stderr = &complaint
	out, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("ask busybox for its commands: %w: %s", err, complaint.String())
	}
	return strings.Fields(string(out)), nil
}
