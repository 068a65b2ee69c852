package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/distribution/reference"
)

// Where an image can be read from.
const (
	FromNode     = "node"     // the containerd of this machine's node: what runs
	FromEngine   = "engine"   // the storage of the program that builds
	FromArchive  = "archive"  // a file, or a folder of the OCI layout
	FromRegistry = "registry" // the one in its name
)

// Origins returns where Read searches, in this order.
func Origins() []string { return []string{FromArchive, FromNode, FromEngine, FromRegistry} }

// CheckOrigin returns an error if from is neither empty nor one of Origins.
func CheckOrigin(from string) error {
	if from != "" && !slices.Contains(Origins(), from) {
		return fmt.Errorf("--from %q is not one of %s", from, strings.Join(Origins(), ", "))
	}
	return nil
}

// Store is a node's containerd, for reading images.
type Store interface {
	Has(ctx context.Context, ref string) (bool, error)
	// Export writes an OCI archive.
	Export(ctx context.Context, ref, file string) error
}

// Archive is an image in a place where other programs can read it.
type Archive struct {
	// Ref is the name that the user gave.
	Ref string
	// From is one of Origins.
	From string
	// Location is a form and a path or name: "oci-archive:/tmp/x/image.tar", "registry:docker.io/library/x:1". The forms are
	// Skopeo's, which other programs use too.
	Location string
	dir      string
}

// Close removes what was written.
func (a *Archive) Close() error {
	if a.dir == "" {
		return nil
	}
	return os.RemoveAll(a.dir)
}

// Reader reads images from their origins.
type Reader struct {
	// Node is nil on a machine without one.
	Node Store
	// Engine finds the program that builds; it is called when needed.
	Engine func(context.Context) (Engine, error)
}

// Read makes an image readable: from is one of Origins, or empty for the first that has it.
func (r Reader) Read(ctx context.Context, ref, from string) (*Archive, error) {
	if err := CheckOrigin(from); err != nil {
		return nil, err
	}
	if from == "" || from == FromArchive {
		location, err := fileLocation(ref)
		if err == nil {
			return &Archive{Ref: filepath.Base(ref), From: FromArchive, Location: location}, nil
		}
		if from == FromArchive || !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w, and there is no such file", ref, err)
	}
	a := &Archive{Ref: ref, From: from}
	if a.From == "" {
		if a.From, err = r.find(ctx, named.String()); err != nil {
			return nil, err
		}
	}
	switch a.From {
	case FromNode:
		if r.Node == nil {
			return nil, fmt.Errorf("%w: use sudo, or another --from", ErrNoNode)
		}
		err = a.write(func(file string) (string, error) { return "oci-archive", r.Node.Export(ctx, named.String(), file) })
	case FromEngine:
		var e Engine
		if e, err = r.Engine(ctx); err != nil {
			return nil, err
		}
		err = a.write(func(file string) (string, error) {
			form := "oci-archive"
			if e.Name() == "docker" {
				form = "docker-archive"
			}
			return form, e.Save(ctx, named.String(), file, io.Discard)
		})
	default:
		a.Location = "registry:" + named.String()
	}
	if err != nil {
		if from == "" {
			err = fmt.Errorf("%w (there is no file %s either)", err, ref)
		}
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// find returns where an image is: in its registry, if it is nowhere on this machine.
func (r Reader) find(ctx context.Context, ref string) (string, error) {
	if r.Node != nil {
		if has, err := r.Node.Has(ctx, ref); err != nil || has {
			return FromNode, err
		}
	}
	// A machine without a builder is not an error: it may only run images.
	if e, err := r.Engine(ctx); err == nil {
		if has, err := e.Has(ctx, ref); err != nil || has {
			return FromEngine, err
		}
	}
	return FromRegistry, nil
}

func (a *Archive) write(save func(file string) (form string, err error)) (err error) {
	if a.dir, err = os.MkdirTemp("", "polymesh-image-"); err != nil {
		return err
	}
	file := filepath.Join(a.dir, "image.tar")
	form, err := save(file)
	a.Location = form + ":" + file
	return err
}

// fileLocation returns the location of a file or folder; its error wraps fs.ErrNotExist if there is none.
func fileLocation(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	if info.IsDir() {
		// The folder may only have the same name as the image, such as the project's own.
		if _, err := os.Stat(filepath.Join(path, "oci-layout")); err != nil {
			return "", err
		}
		return "oci-dir:" + path, nil
	}
	form, err := archiveForm(path)
	if err != nil {
		return "", fmt.Errorf("%s is not an image's archive: %w", path, err)
	}
	return form + ":" + path, nil
}

// archiveForm returns whether an archive is OCI's or one of `docker save`. One that is both, as newer Dockers write it, is OCI's.
func archiveForm(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	form := ""
	for r := tar.NewReader(f); ; {
		entry, err := r.Next()
		switch {
		case errors.Is(err, io.EOF) && form != "":
			return form, nil
		case errors.Is(err, io.EOF):
			return "", errors.New("it has neither oci-layout nor manifest.json")
		case err != nil:
			return "", err
		case entry.Name == "oci-layout":
			return "oci-archive", nil
		case entry.Name == "manifest.json":
			form = "docker-archive"
		}
	}
}
