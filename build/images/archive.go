package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	oci "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/build/compress"
)

// archive is an OCI image layout with several images; layers that they share are stored once.
// See https://github.com/opencontainers/image-spec/blob/main/image-layout.md.
type archive struct {
	stamp time.Time
	store compress.Store
	blobs map[digest.Digest][]byte
	index oci.Index
}

// layer is a blob of the archive with the hash of its uncompressed contents.
type layer struct {
	descriptor oci.Descriptor
	content    digest.Digest
	size       int
}

func newArchive(stamp time.Time, store compress.Store) *archive {
	return &archive{
		stamp: stamp,
		store: store,
		blobs: map[digest.Digest][]byte{},
		index: oci.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageIndex},
	}
}

func (a *archive) layer(ctx context.Context, t tree) (layer, error) {
	content, err := t.archive(a.stamp)
	if err != nil {
		return layer{}, err
	}
	frame, err := a.store.Frame(ctx, content)
	if err != nil {
		return layer{}, err
	}
	return layer{a.blob(oci.MediaTypeImageLayerZstd, frame), digest.FromBytes(content), len(content)}, nil
}

func (a *archive) blob(mediaType string, content []byte) oci.Descriptor {
	sum := digest.FromBytes(content)
	a.blobs[sum] = content
	return oci.Descriptor{MediaType: mediaType, Digest: sum, Size: int64(len(content))}
}

// add adds an image to the archive under a full reference, in the annotations that containerd's import reads.
func (a *archive) add(reference, tag string, config oci.ImageConfig, layers []layer) error {
	image := oci.Image{
		Created:  &a.stamp,
		Platform: oci.Platform{Architecture: "amd64", OS: "linux"},
		Config:   config,
		RootFS:   oci.RootFS{Type: "layers"},
	}
	manifest := oci.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: oci.MediaTypeImageManifest}
	for _, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.content)
		manifest.Layers = append(manifest.Layers, l.descriptor)
	}
	text, err := json.Marshal(image)
	if err != nil {
		return fmt.Errorf("encode the configuration of %s: %w", reference, err)
	}
	manifest.Config = a.blob(oci.MediaTypeImageConfig, text)
	if text, err = json.Marshal(manifest); err != nil {
		return fmt.Errorf("encode the manifest of %s: %w", reference, err)
	}
	descriptor := a.blob(oci.MediaTypeImageManifest, text)
	descriptor.Platform = &image.Platform
	descriptor.Annotations = map[string]string{
		"io.containerd.image.name": reference,
		oci.AnnotationRefName:      tag,
	}
	a.index.Manifests = append(a.index.Manifests, descriptor)
	return nil
}

func (a *archive) write(out io.Writer) error {
	index, err := json.Marshal(a.index)
	if err != nil {
		return fmt.Errorf("encode the index: %w", err)
	}
	layout, err := json.Marshal(oci.ImageLayout{Version: oci.ImageLayoutVersion})
	if err != nil {
		return fmt.Errorf("encode the layout: %w", err)
	}
	writer := tar.NewWriter(out)
	file := func(name string, content []byte) error {
		header := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: a.stamp, Format: tar.FormatUSTAR}
		if err := writer.WriteHeader(&header); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := io.Copy(writer, bytes.NewReader(content)); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		return nil
	}
	if err := file(oci.ImageLayoutFile, layout); err != nil {
		return err
	}
	if err := file(oci.ImageIndexFile, index); err != nil {
		return err
	}
	for _, sum := range slices.Sorted(maps.Keys(a.blobs)) {
		if err := file(oci.ImageBlobsDir+"/"+sum.Algorithm().String()+"/"+sum.Encoded(), a.blobs[sum]); err != nil {
			return err
		}
	}
	if err := writer.Close(); err != nil {
		return fmt.Errorf("end the archive: %w", err)
	}
	return nil
}
