package imagestore

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ShippedRegistry is the registry in the names of the images that came with Polymesh. It need not exist.
const ShippedRegistry = "registry.polymesh.dev"

// Payload is a payload's shipped images, in plain OCI archives on disk. Each can be imported alone, so that those that are needed first
// come first.
type Payload struct {
	id     string
	files  []*os.File
	blobs  map[digest.Digest]*io.SectionReader
	images map[string]ocispec.Descriptor
}

// OpenPayload opens the archives of the payload with this id, which the launcher has checked against payload.json. It reads their
// indexes, not their layers.
func OpenPayload(id string, archives []string) (*Payload, error) {
	p := &Payload{id: id, blobs: map[digest.Digest]*io.SectionReader{}, images: map[string]ocispec.Descriptor{}}
	for _, file := range archives {
		if err := p.open(file); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// Close closes the archives.
func (p *Payload) Close() error {
	var err error
	for _, f := range p.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

func (p *Payload) open(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	p.files = append(p.files, f)
	found := false
	// The reader seeks over members that are not read, and reads nothing ahead: a member's content begins where the file is.
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		content := io.NewSectionReader(f, at, header.Size)
		if header.Name != ocispec.ImageIndexFile {
			folder, hash := path.Split(header.Name)
			p.blobs[digest.NewDigestFromEncoded(digest.Algorithm(path.Base(folder)), hash)] = content
			continue
		}
		found = true
		var index ocispec.Index
		if err := json.NewDecoder(content).Decode(&index); err != nil {
			return fmt.Errorf("read %s in %s: %w", ocispec.ImageIndexFile, file, err)
		}
		for _, m := range index.Manifests {
			p.images[m.Annotations[images.AnnotationImageName]] = m
		}
	}
	if !found {
		return fmt.Errorf("%s has no %s", file, ocispec.ImageIndexFile)
	}
	return nil
}

// Missing returns those of the payload's images that are not in the store, unpacked and with the digest in the archives.
func (s *Store) Missing(ctx context.Context, p *Payload, refs []string) (missing []string, err error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	list, err := s.client.ListImages(ctx, fmt.Sprintf("labels.%q==%s", payloadLabel, p.id))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	have := map[string]bool{}
	for _, image := range list {
		if image.Target().Digest != p.images[image.Name()].Digest {
			continue
		}
		unpacked, err := image.IsUnpacked(ctx, Snapshotter)
		have[image.Name()] = err == nil && unpacked
	}
	for _, ref := range refs {
		if !have[ref] {
			missing = append(missing, ref)
		}
	}
	return missing, nil
}

// ImportShipped imports one of the payload's images.
func (s *Store) ImportShipped(ctx context.Context, p *Payload, ref string) error {
	manifest, ok := p.images[ref]
	if !ok {
		return fmt.Errorf("import %s: it is not in the archives of the shipped images: the polymesh file is damaged, copy it again", ref)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(p.write(w, manifest)) }()
	_, err := s.loadFrom(namespaces.WithNamespace(ctx, Namespace), r, map[string]string{pinnedLabel: pinnedValue, payloadLabel: p.id})
	// Ends the writer if containerd has not read everything.
	r.CloseWithError(errors.New("the import has ended"))
	if err != nil {
		return fmt.Errorf("import %s: %w", ref, err)
	}
	return nil
}

// write writes an OCI archive of one image.
func (p *Payload) write(to io.Writer, manifest ocispec.Descriptor) error {
	out := tar.NewWriter(to)
	add := func(name string, size int64, content io.Reader) error {
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		_, err := io.Copy(out, content)
		return err
	}
	addJSON := func(name string, value any) error {
		text, err := json.Marshal(value)
		if err != nil {
			return err
		}
		return add(name, int64(len(text)), bytes.NewReader(text))
	}
	if err := addJSON(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest}}
	if err := addJSON(ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	var image ocispec.Manifest
	blob, err := p.blob(manifest)
	if err != nil {
		return err
	}
	if err := json.NewDecoder(blob).Decode(&image); err != nil {
		return fmt.Errorf("read manifest %s: %w", manifest.Digest, err)
	}
	for _, d := range append([]ocispec.Descriptor{manifest, image.Config}, image.Layers...) {
		blob, err := p.blob(d)
		if err != nil {
			return err
		}
		if err := add(path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded()), blob.Size(), blob); err != nil {
			return err
		}
	}
	return out.Close()
}

// blob returns a reader of its own: several images have the same layers.
func (p *Payload) blob(d ocispec.Descriptor) (*io.SectionReader, error) {
	blob, ok := p.blobs[d.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s is missing", d.Digest)
	}
	return io.NewSectionReader(blob, 0, blob.Size()), nil
}
