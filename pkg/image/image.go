// Package image builds the images of a project's services, without a Docker engine, and brings them to where a node gets
// them: into its containerd, or to a registry.
//
// Building is a program's work: buildah, podman or docker, whichever this machine has. The package owns the image's name: its
// tag holds a hash of all that the image is made of, so that what has not changed is not built, loaded or rolled out
// again (as ko and Skaffold do). pkg/deploy calls it.
package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// Source is what an image is built of.
type Source struct {
	Context    string // a folder
	Dockerfile string // relative to Context
	Target     string
	Args       map[string]string
	Mounts     []string // HOST:PATH
	// Network is one of Networks; NetworkPrivate if it is empty.
	Network string
	// Settings are those of Clients whose settings of this machine the build sees.
	Settings []string
}

// hashed is how many hex digits of the hash a tag holds: 48 bits.
const hashed = 12

// Fingerprint is a hash of the source: the Dockerfile, what the context holds less its .dockerignore, and the arguments.
// What the build downloads, and the image it starts from, are not part of it.
func (s Source) Fingerprint() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q\n", s.Dockerfile, s.Target)
	for _, key := range slices.Sorted(maps.Keys(s.Args)) {
		fmt.Fprintf(h, "%q=%q\n", key, s.Args[key])
	}
	ignore, err := s.ignored()
	if err != nil {
		return "", err
	}
	err = filepath.WalkDir(s.Context, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(s.Context, file)
		if err != nil {
			return err
		}
		if name == "." {
			return nil
		}
		skip, err := ignore.MatchesOrParentMatches(filepath.ToSlash(name))
		if err != nil {
			return err
		}
		// The Dockerfile is read even if it is not part of the context.
		if skip && name != filepath.Clean(s.Dockerfile) {
			if entry.IsDir() && !ignore.Exclusions() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		switch {
		case entry.IsDir():
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(file)
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "%q -> %q\n", name, to)
		case info.Mode().IsRegular():
			fmt.Fprintf(h, "%q %t %d\n", name, info.Mode()&0o111 != 0, info.Size())
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("read %s: %w", s.Context, err)
	}
	return hex.EncodeToString(h.Sum(nil))[:hashed], nil
}

// ignored matches what the build does not see. As in buildah and Docker, DOCKERFILE.dockerignore wins over
// .containerignore and .dockerignore.
func (s Source) ignored() (*patternmatcher.PatternMatcher, error) {
	for _, name := range []string{s.Dockerfile + ".dockerignore", ".containerignore", ".dockerignore"} {
		f, err := os.Open(filepath.Join(s.Context, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		patterns, err := ignorefile.ReadAll(f)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		return patternmatcher.New(patterns)
	}
	return patternmatcher.New(nil)
}

// Ref is an image's name in its two forms.
type Ref struct {
	// Short is what a manifest says: "my-registry/api:1.0.0-0123456789ab".
	Short string
	// Full is what containerd and the builders call it: "docker.io/my-registry/api:1.0.0-0123456789ab".
	Full string
}

// Name gives a built image its name: that of the manifest, below the registry if there is one, with the hash in the tag.
// "latest" says nothing about a version, so only the hash stays of it.
func Name(manifest, registry, fingerprint string) (Ref, error) {
	name, tag := Cut(manifest)
	if registry != "" {
		name = strings.TrimSuffix(registry, "/") + "/" + path.Base(name)
	}
	if tag == "" || tag == "latest" {
		tag = fingerprint
	} else {
		tag += "-" + fingerprint
	}
	short := name + ":" + tag
	full, err := reference.ParseDockerRef(short)
	if err != nil {
		return Ref{}, fmt.Errorf("image %s: %w", short, err)
	}
	return Ref{Short: short, Full: full.String()}, nil
}

// Cut splits a reference into name and tag, which may be empty. A digest is cut off and lost.
func Cut(ref string) (name, tag string) {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

// Engine is a program that builds images.
type Engine interface {
	// Name is the program's.
	Name() string
	// Has reports whether an image is in the engine's own storage.
	Has(ctx context.Context, ref string) (bool, error)
	// Build makes an image; log gets the program's output.
	Build(ctx context.Context, ref string, source Source, log io.Writer) error
	// Save writes an image to a file that containerd takes.
	Save(ctx context.Context, ref, file string, log io.Writer) error
	// Push sends an image to the registry in its name.
	Push(ctx context.Context, ref string, log io.Writer) error
}
