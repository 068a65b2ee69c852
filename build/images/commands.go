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

// busyboxProgram is where busybox-static has its program.
const busyboxProgram = "usr/bin/busybox"

// commands asks the packaged busybox itself which commands it has, as paths without the leading slash.
func (d debian) commands(ctx context.Context, t tree) ([]string, error) {
	program, ok := t[busyboxProgram]
	if !ok {
		return nil, fmt.Errorf("busybox-static has no /%s", busyboxProgram)
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
