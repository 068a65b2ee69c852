// Package image builds the images of a project's services, without a Docker engine, and brings them to where nodes get them:
// into a containerd, or to a registry.
//
// A program of this machine builds: buildah, podman or docker. The package owns the image's name: its tag has a hash of all that the
// image is built from, so that what has not changed is not built, loaded or rolled out again (as with ko and Skaffold). It also
// opens the places from which images are read, and where they are signed. pkg/workflow/deploy and the commands of `polymesh image`
// call it.
package image

import (
	"context"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/distribution/reference"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// Ref is an image's name in its two forms.
type Ref struct {
	// Short is the name in a manifest: "my-registry/api:1.0.0-0123456789ab".
	Short string
	// Full is the name that containerd and the builders use: "docker.io/my-registry/api:1.0.0-0123456789ab".
	Full string
}

// Name returns the name of a built image: that of the manifest, below the registry if there is one, with the hash in the tag.
// imagestore.Latest is not a version, so the hash replaces it.
func Name(manifest, registry, fingerprint string) (Ref, error) {
	name, tag := Cut(manifest)
	if registry != "" {
		name = strings.TrimSuffix(registry, "/") + "/" + path.Base(name)
	}
	if !isVersion(tag) {
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

// Cut splits a reference, as it is written, into name and tag, which may be empty. A digest is omitted. A text that is not a
// reference is returned as the name.
func Cut(ref string) (name, tag string) {
	parsed, err := reference.Parse(ref)
	if err != nil {
		return ref, ""
	}
	if named, ok := parsed.(reference.Named); ok {
		name = named.Name()
	}
	if tagged, ok := parsed.(reference.Tagged); ok {
		tag = tagged.Tag()
	}
	return name, tag
}

// Floats reports whether a reference may refer to another image tomorrow: it has no digest, and no tag or the tag latest. The
// kubelet reports a text that is not a reference.
func Floats(ref string) bool {
	parsed, err := reference.Parse(ref)
	if err != nil {
		return false
	}
	if _, ok := parsed.(reference.Digested); ok {
		return false
	}
	_, tag := Cut(ref)
	return !isVersion(tag)
}

func isVersion(tag string) bool { return tag != "" && tag != imagestore.Latest }

// Engine is a program that builds images.
type Engine interface {
	// Name is the program's.
	Name() string
	// Has reports whether an image is in the engine's own storage.
	Has(ctx context.Context, ref string) (bool, error)
	// ID returns the id of an image in the engine's own storage; empty if there is none.
	ID(ctx context.Context, ref string) (string, error)
	// Build builds an image; log gets the program's output.
	Build(ctx context.Context, ref string, source Source, log io.Writer) error
	// Save writes an image to a file that containerd can import.
	Save(ctx context.Context, ref, file string, log io.Writer) error
	// Push sends an image to the registry in its name.
	Push(ctx context.Context, ref string, log io.Writer) error
}
