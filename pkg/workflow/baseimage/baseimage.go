// Package baseimage builds the base images of services where there is no registry to pull them from: from Debian's
// packages and the machine's own toolchains, under the names used in Dockerfiles.
//
// It owns build.sh and the Containerfiles next to it. pkg/command calls Make for `polymesh image bases`, and pkg/workflow/image calls
// Lang to identify base images; examples/polyglot/images.sh runs the same script.
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

// languages are the languages with base images, and these images: the FROM lines of pkg/workflow/scaffold's Dockerfiles, with
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

// Languages returns the values of --lang.
func Languages() []string {
	var names []string
	for _, l := range languages {
		names = append(names, l.name)
	}
	return names
}

// Images returns the base images of a language, with registries.
func Images(lang string) []string {
	for _, l := range languages {
		if l.name == lang {
			return slices.Clone(l.images)
		}
	}
	return nil
}

// Lang returns the first language that uses an image, given by its full name; empty if Make does not build it.
func Lang(image string) string {
	for _, l := range languages {
		if slices.Contains(l.images, image) {
			return l.name
		}
	}
	return ""
}

// Make builds the base images of languages in the environment's buildah storage, by default that of the current
// user. It returns the names of the built images; the others existed already. Existing images of the same name from another
// source are kept. force rebuilds all of its own. made is called with the name of each image when it is ready.
//
// The error of a failure contains the last lines of the programs' output.
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
	// An interrupt also ends the script's children.
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
		return nil, fmt.Errorf("build the base images: %w", err)
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
		return all, fmt.Errorf("build the base images: %w: %s", err, lastLines(tail.String(), 5))
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
