// Package baseimage makes the images that services start from where there is no registry to pull them from: of Debian's
// packages and of the machine's own toolchains, under the names that Dockerfiles ask for.
//
// It owns build.sh and the Containerfiles beside it. pkg/command calls Make for `polymesh image bases`, and pkg/workflow/image asks
// Lang which of them an image is; examples/polyglot/images.sh runs the script as it stands here.
package baseimage

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

//go:embed build.sh */*
var files embed.FS

// languages are those that have base images, and which these are: the FROM lines of pkg/workflow/scaffold's Dockerfiles, with their
// registries.
var languages = []struct {
	name   string
	images []string
}{
	{"go", []string{"docker.io/library/golang:1.26-bookworm", "gcr.io/distroless/static-debian12:latest"}},
	{"java", []string{"docker.io/library/maven:3.8-openjdk-17-slim", "docker.io/library/debian:bookworm-slim"}},
	{"node", []string{"docker.io/library/node:20-slim", "gcr.io/distroless/nodejs20-debian12:latest"}},
	{"python", []string{"docker.io/library/python:3.11-slim"}},
	{"rust", []string{"docker.io/library/rust:1.95-slim", "gcr.io/distroless/static-debian12:latest"}},
}

// Languages are what --lang takes.
func Languages() []string {
	var names []string
	for _, l := range languages {
		names = append(names, l.name)
	}
	return names
}

// Images are the base images of a language, by their whole names.
func Images(lang string) []string {
	for _, l := range languages {
		if l.name == lang {
			return slices.Clone(l.images)
		}
	}
	return nil
}

// Lang is the first language that an image is made for, given by its whole name; empty if Make does not make it.
func Lang(image string) string {
	for _, l := range languages {
		if slices.Contains(l.images, image) {
			return l.name
		}
	}
	return ""
}

// Make makes the base images of languages in the storage of buildah that the environment names, by default that of the user
// who runs the program. It returns the names of those that it made; the others were there. An image of such a name that came
// from elsewhere stays. force makes all of its own again. made is called with the name of each image as soon as it is there.
//
// Of a failure the error has the last lines that the programs printed.
func Make(ctx context.Context, langs []string, force bool, made func(ref string)) (all []string, err error) {
	for _, lang := range langs {
		if Images(lang) == nil {
			return nil, fmt.Errorf("--lang %q is not one of %s", lang, strings.Join(Languages(), ", "))
		}
	}
	dir, err := os.MkdirTemp("", "polymesh-bases-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.CopyFS(dir, files); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "bash", append([]string{filepath.Join(dir, "build.sh")}, langs...)...)
	cmd.Env = os.Environ()
	if force {
		cmd.Env = append(cmd.Env, "FORCE=1")
	}
	// An interrupt ends the script's children too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var tail bytes.Buffer
	cmd.Stderr = &tail
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make the base images: %w", err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		all = append(all, lines.Text())
		made(lines.Text())
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return all, context.Cause(ctx)
	case err != nil:
		return all, fmt.Errorf("make the base images: %w: %s", err, lastLines(tail.String(), 5))
	}
	return all, nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n    ")
}
