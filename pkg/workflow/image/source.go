package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// Source is what an image is built from.
type Source struct {
	Context    string // a folder
	Dockerfile string // relative to Context
	Target     string
	Args       map[string]string
	Mounts     []string // HOST:PATH
	// Network is one of Networks; NetworkPrivate if it is empty.
	Network string
	// Settings are the Clients whose settings on this machine the build gets.
	Settings []string
	// BaseIDs are the ids of the base images in the storage of the program that builds, by their names as Bases returns them. A
	// missing one has none.
	BaseIDs map[string]string
	// IDFile is a file for the id of the built image; empty for none. It is not part of the fingerprint.
	IDFile string
}

// hashed is how many hex digits of the hash are in a tag: 128 bits.
const hashed = 32

// Fingerprint returns a hash of all that a build reads: the Dockerfile, the context without what .dockerignore excludes, with modes
// and empty folders, the arguments, the mounts, and the base images. What the build downloads is not part of it.
func (s Source) Fingerprint() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %q\n", s.Dockerfile, s.Target, s.Network)
	for _, values := range []map[string]string{s.Args, s.BaseIDs} {
		for _, key := range slices.Sorted(maps.Keys(values)) {
			fmt.Fprintf(h, "%q=%q\n", key, values[key])
		}
		fmt.Fprintln(h)
	}
	err := s.Walk(func(f File) error {
		// Every text is quoted, so that no name can be mistaken for what comes after it. The mode includes setuid and sticky.
		fmt.Fprintf(h, "%q %o %q ", f.Name, uint32(f.Mode), f.Link)
		return f.content(h)
	})
	if err != nil {
		return "", err
	}
	if err := s.hashSettings(h); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil))[:hashed], nil
}

// hashSettings adds which package managers' settings the build gets.
func (s Source) hashSettings(h hash.Hash) error {
	mounts, cleanup, err := settings(s.Settings)
	if err != nil {
		return err
	}
	defer cleanup()
	for _, mount := range mounts {
		here, there, _ := strings.Cut(mount, ":")
		text, err := os.ReadFile(here)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "settings %q %x\n", there, sha256.Sum256(text))
	}
	return nil
}

// File is a file, folder or link that a build reads.
type File struct {
	// Name identifies the file: the path in the context, or "Dockerfile" or "mount N" and the path below it.
	Name string
	// Path is its place on this machine.
	Path string
	// Mode is that of fs.FileInfo. Link is the target of a link; a build gets the link itself, and never anything outside of its
	// context.
	Mode fs.FileMode
	Link string
}

// content hashes the content and the size of a regular file.
func (f File) content(h hash.Hash) error {
	if !f.Mode.IsRegular() {
		fmt.Fprintln(h)
		return nil
	}
	// It must not block if the file has become a pipe.
	file, err := os.OpenFile(f.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s changes while it is read", f.Path)
	}
	sum := sha256.New()
	n, err := io.Copy(sum, file)
	if err != nil {
		return err
	}
	fmt.Fprintf(h, "%d %x\n", n, sum.Sum(nil))
	return nil
}

// Walk visits all that a build reads on this machine, always in the same order. The fingerprint and `polymesh dev` use it.
func (s Source) Walk(visit func(File) error) error {
	folder, err := filepath.EvalSymlinks(s.Context)
	if err != nil {
		return fmt.Errorf("the build's context: %w", err)
	}
	dockerfile, err := s.dockerfile(folder)
	if err != nil {
		return err
	}
	if err := visit(dockerfile); err != nil {
		return fmt.Errorf("read %s: %w", dockerfile.Path, err)
	}
	ignore, file, err := s.ignored(folder)
	if err != nil {
		return err
	}
	if file != "" {
		if err := visit(File{Name: "ignore file", Path: file}); err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
	}
	if err := walk(folder, "", ignore, visit); err != nil {
		return err
	}
	for i, mount := range s.Mounts {
		from, _, _ := strings.Cut(mount, ":")
		real, err := filepath.EvalSymlinks(from)
		if err != nil {
			return fmt.Errorf("mount %s: %w", mount, err)
		}
		if err := walk(real, fmt.Sprintf("mount %d/", i), nil, visit); err != nil {
			return fmt.Errorf("mount %s: %w", mount, err)
		}
	}
	return nil
}

// dockerfile returns the Dockerfile, which may be a link, or outside of the context.
func (s Source) dockerfile(folder string) (File, error) {
	path, err := filepath.EvalSymlinks(filepath.Join(folder, s.Dockerfile))
	if err != nil {
		return File{}, fmt.Errorf("the Dockerfile: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return File{}, fmt.Errorf("the Dockerfile: %w", err)
	}
	if !info.Mode().IsRegular() {
		return File{}, fmt.Errorf("the Dockerfile %s is not a file (%s)", path, info.Mode().Type())
	}
	// Its mode does not matter for a build.
	return File{Name: "Dockerfile", Path: path}, nil
}

func visitOne(name, path string, visit func(File) error) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	f := File{Name: name, Path: path, Mode: info.Mode()}
	if f.Mode&fs.ModeSymlink != 0 {
		if f.Link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	return visit(f)
}

// walk visits a file, or a folder with its content that is not ignored.
func walk(root, prefix string, ignore *patternmatcher.PatternMatcher, visit func(File) error) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		name, relErr := filepath.Rel(root, path)
		if relErr != nil {
			return relErr
		}
		skip := false
		if ignore != nil && name != "." {
			var matchErr error
			if skip, matchErr = ignore.MatchesOrParentMatches(filepath.ToSlash(name)); matchErr != nil {
				return matchErr
			}
		}
		switch {
		case skip && (entry == nil || entry.IsDir()) && !ignore.Exclusions():
			return fs.SkipDir // even if it cannot be read
		case errors.Is(err, fs.ErrPermission):
			return fmt.Errorf("%w: let this user read it, or name it in .dockerignore if the build does not need it", err)
		case err != nil:
			return err
		case skip:
			return nil
		}
		if err := visitOne(prefix+name, path, visit); err != nil {
			if errors.Is(err, fs.ErrPermission) {
				return fmt.Errorf("%w: let this user read it, or name it in .dockerignore if the build does not need it", err)
			}
			return err
		}
		return nil
	})
}

// ignored returns the patterns of what the build does not see, and the file that has them, if any. As in buildah and Docker,
// DOCKERFILE.dockerignore has precedence over .containerignore and .dockerignore
// (https://github.com/containers/buildah, pkg/parse, ContainerIgnoreFile).
func (s Source) ignored(folder string) (*patternmatcher.PatternMatcher, string, error) {
	for _, name := range []string{s.Dockerfile + ".dockerignore", s.Dockerfile + ".containerignore", ".containerignore", ".dockerignore"} {
		f, err := os.Open(filepath.Join(folder, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", err
		}
		defer f.Close()
		real, err := filepath.EvalSymlinks(f.Name())
		if err != nil {
			return nil, "", err
		}
		patterns, err := ignorefile.ReadAll(f)
		if err != nil {
			return nil, "", fmt.Errorf("read %s: %w", f.Name(), err)
		}
		matcher, err := patternmatcher.New(patterns)
		if err != nil {
			return nil, "", fmt.Errorf("read %s: %w", f.Name(), err)
		}
		return matcher, real, nil
	}
	matcher, err := patternmatcher.New(nil)
	return matcher, "", err
}

// ReadBases sets BaseIDs to the ids of the base images that the engine has. Unless note is nil, missing ones are provided first, as
// for a build; if that is not possible, the build reports it.
func (s *Source) ReadBases(ctx context.Context, e Engine, from Store, note func(string)) error {
	names, err := s.Bases()
	if err != nil {
		return err
	}
	read := func() error {
		s.BaseIDs = map[string]string{}
		for _, name := range names {
			id, err := e.ID(ctx, name)
			if err != nil {
				return err
			}
			if id != "" {
				s.BaseIDs[name] = id
			}
		}
		return nil
	}
	if err := read(); err != nil || len(s.BaseIDs) == len(names) || note == nil {
		return err
	}
	if err := Provide(ctx, e, *s, from, note); ctx.Err() != nil {
		return context.Cause(ctx)
	} else if err != nil {
		return nil
	}
	return read()
}
