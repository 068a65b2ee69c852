package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Archived is an image of an archive.
type Archived struct {
	// Name is the full name, Content what Cluster.Push takes.
	Name    string
	Content remote.Taggable
}

// OpenArchive returns the images in an archive of OCI's form or of `docker save`, with their full names. Call done afterwards.
func OpenArchive(file string) (list []Archived, done func(), err error) {
	form, err := archiveForm(file)
	if err != nil {
		return nil, nil, fmt.Errorf("%s is not an image's archive: %w", file, err)
	}
	done = func() {}
	if form == "docker-archive" {
		list, err = readDocker(file)
	} else {
		list, done, err = openLayout(file)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", file, err)
	}
	for i := range list {
		if list[i].Name, err = parseName(list[i].Name); err != nil {
			done()
			return nil, nil, fmt.Errorf("read %s: %w", file, err)
		}
	}
	if len(list) == 0 {
		done()
		return nil, nil, fmt.Errorf("%s has no image with a name", file)
	}
	return list, done, nil
}

// readDocker returns the images in an archive of `docker save`, with the names in it.
func readDocker(file string) (list []Archived, err error) {
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(file) })
	if err != nil {
		return nil, err
	}
	for _, d := range manifest {
		for _, text := range d.RepoTags {
			tag, err := name.NewTag(text, name.WeakValidation)
			if err != nil {
				return nil, err
			}
			content, err := tarball.ImageFromPath(file, &tag)
			if err != nil {
				return nil, err
			}
			list = append(list, Archived{text, content})
		}
	}
	return list, nil
}

// openLayout returns the images in an OCI archive, with the names in it, which may be empty. Call done afterwards.
func openLayout(file string) (list []Archived, done func(), err error) {
	dir, done, err := tempDir()
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	if err := extract(file, dir); err != nil {
		return nil, nil, err
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, nil, err
	}
	for _, d := range m.Manifests {
		a := Archived{Name: d.Annotations[images.AnnotationImageName]}
		if a.Name == "" {
			a.Name = d.Annotations[ocispec.AnnotationRefName]
		}
		if d.MediaType.IsIndex() {
			a.Content, err = index.ImageIndex(d.Digest)
		} else {
			a.Content, err = index.Image(d.Digest)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", d.Digest, err)
		}
		list = append(list, a)
	}
	return list, done, nil
}

// layoutMember matches what an OCI archive has, and that is read (https://github.com/opencontainers/image-spec/blob/main/image-layout.md).
var layoutMember = regexp.MustCompile(`^(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})$`)

// extract unpacks an OCI archive. Other files in it are left out.
func extract(file, dir string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		entry, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean(entry.Name), "./")
		if entry.Typeflag != tar.TypeReg || !layoutMember.MatchString(name) {
			continue
		}
		to := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return err
		}
		out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("it has %s twice", name)
		}
		if err != nil {
			return err
		}
		_, err = io.Copy(out, r)
		if err := errors.Join(err, out.Close()); err != nil {
			return err
		}
	}
}

// writeArchive writes an OCI archive of an image under a full name.
func writeArchive(content v1.Image, ref, file string) (err error) {
	dir, done, err := tempDir()
	if err != nil {
		return err
	}
	defer done()
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := to.AppendImage(content, layout.WithAnnotations(map[string]string{images.AnnotationImageName: ref, ocispec.AnnotationRefName: ref})); err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out := tar.NewWriter(f)
	if err := out.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	return out.Close()
}
