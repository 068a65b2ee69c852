package imagestore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/signature"
)

// Paths of the API server that take images of users without a node. Below both follows the registry in the image's name, and then a
// registry's own path: BuildsPath + "docker.io" + "/v2/shop/api/manifests/TAG".
const (
	// BuildsPath takes images with a tag that is a hash of what they are built from, and signatures: none that a registry has.
	BuildsPath = "/polymesh/v1/builds/"
	// ImagesPath takes every tag.
	ImagesPath = "/polymesh/v1/images/"
	// DeploysPath is between a repository and a tag: a POST there sends a Deploy of the image, as JSON.
	DeploysPath = "/deploys/"
	// PushRole is the ClusterRole for BuildsPath.
	PushRole = "system:polymesh:image-push"
)

// Deploy is for which service of which project an image was deployed. Both are identities, and are not displayed.
type Deploy struct {
	Project string `json:"project"`
	Service string `json:"service"`
}

const (
	// MaxManifest is the limit of a manifest, in bytes: containerd's.
	MaxManifest = 4 << 20
	// MaxBlob is the limit of a layer, in bytes.
	MaxBlob = 64 << 30
	// maxSignature is the limit of a signature's manifest, and MaxPayloads that of all that it refers to, in bytes. One signature in cosign's
	// format is a payload of some hundred bytes, and at most some kilobytes of certificates in the manifest.
	maxSignature = 1 << 20
	MaxPayloads  = 256 << 10
	// uploadPrefix is the prefix of containerd's names of uploads.
	uploadPrefix = "polymesh-upload-"
	// leaseTime is how long content is kept that no image refers to, if this process ends before it does: longer than a layer takes.
	leaseTime = 24 * time.Hour
)

// Lease keeps content until an image refers to it. End it.
type Lease string

// NewLease makes a lease.
func (s *Store) NewLease(ctx context.Context) (Lease, error) {
	l, err := s.client.LeasesService().Create(namespaces.WithNamespace(ctx, Namespace), leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return "", fmt.Errorf("make a lease: %w", err)
	}
	return Lease(l.ID), nil
}

// EndLease releases what a lease keeps.
func (s *Store) EndLease(ctx context.Context, l Lease) error {
	err := s.client.LeasesService().Delete(namespaces.WithNamespace(ctx, Namespace), leases.Lease{ID: string(l)})
	return notFoundIsNil(err)
}

// Keep makes a lease keep content, which is an error if it is not there.
func (s *Store) Keep(ctx context.Context, l Lease, d digest.Digest) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	err := s.client.LeasesService().AddResource(ctx, leases.Lease{ID: string(l)}, leases.Resource{ID: d.String(), Type: "content"})
	if err == nil {
		_, err = s.client.ContentStore().Info(ctx, d)
	}
	return err
}

// Upload opens an upload, by a name of lower-case letters and digits, to write where it has ended. Commit verifies the digest, and the lease
// keeps the content from then on. It waits for the request before, whose end containerd may notice late.
func (s *Store) Upload(ctx context.Context, l Lease, name string) (content.Writer, error) {
	ctx = leases.WithLease(namespaces.WithNamespace(ctx, Namespace), string(l))
	return content.OpenWriter(ctx, s.client.ContentStore(), content.WithRef(uploadPrefix+name))
}

// AbortUpload removes what an upload has written.
func (s *Store) AbortUpload(ctx context.Context, name string) error {
	return notFoundIsNil(s.client.ContentStore().Abort(namespaces.WithNamespace(ctx, Namespace), uploadPrefix+name))
}

// AbortUploads removes what uploads have written that an earlier process has left.
func (s *Store) AbortUploads(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	list, err := s.client.ContentStore().ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("list uploads: %w", err)
	}
	for _, upload := range list {
		if name, ok := strings.CutPrefix(upload.Ref, uploadPrefix); ok {
			err = errors.Join(err, s.AbortUpload(ctx, name))
		}
	}
	return err
}

// Discard removes what pulls have written of content that is not complete: a pull would go on with it.
func (s *Store) Discard(ctx context.Context, d digest.Digest) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	list, err := s.client.ContentStore().ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("list what is being pulled: %w", err)
	}
	for _, pull := range list {
		// remotes.MakeRefKey: what it is, and its digest.
		if strings.HasSuffix(pull.Ref, "-"+d.String()) {
			err = errors.Join(err, notFoundIsNil(s.client.ContentStore().Abort(ctx, pull.Ref)))
		}
	}
	return err
}

// ContentSize returns the size of content, in bytes. Content that is not there is errdefs.ErrNotFound.
func (s *Store) ContentSize(ctx context.Context, d digest.Digest) (int64, error) {
	info, err := s.client.ContentStore().Info(namespaces.WithNamespace(ctx, Namespace), d)
	return info.Size, err
}

// errManifest is about a manifest that no builder makes.
func errManifest(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errdefs.ErrInvalidArgument}, args...)...)
}

// Children returns what a manifest or index refers to. One that different programs would read in different ways is an error
// (https://github.com/opencontainers/image-spec/security/advisories/GHSA-77vh-xpmg-72qh), and one that has its layers elsewhere.
func Children(mediaType string, text []byte) ([]ocispec.Descriptor, error) {
	var m struct {
		MediaType string              `json:"mediaType"`
		Config    *ocispec.Descriptor `json:"config"`
		Layers    parts               `json:"layers"`
		Manifests parts               `json:"manifests"`
		FSLayers  json.RawMessage     `json:"fsLayers"`
	}
	if len(text) > MaxManifest {
		return nil, errManifest("the manifest has %d bytes, more than %d", len(text), MaxManifest)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, errManifest("the manifest cannot be read: %v", err)
	}
	if m.MediaType != "" && m.MediaType != mediaType {
		return nil, errManifest("the manifest is %.100q, and is sent as %.100q", m.MediaType, mediaType)
	}
	var children []ocispec.Descriptor
	switch {
	case m.FSLayers != nil:
		return nil, errManifest("manifests of schema 1 are not supported")
	case images.IsIndexType(mediaType) && m.Config == nil && m.Layers == nil:
		children = m.Manifests
	case images.IsManifestType(mediaType) && mediaType != images.MediaTypeDockerSchema1Manifest && m.Config != nil && m.Manifests == nil:
		children = append([]ocispec.Descriptor{*m.Config}, m.Layers...)
	default:
		return nil, errManifest("%.100q is neither a manifest nor an index, or the content is another", mediaType)
	}
	if len(children) > maxWalk {
		return nil, errManifest("%d parts, more than %d", len(children), maxWalk)
	}
	for _, d := range children {
		if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != digest.SHA256 {
			return nil, errManifest("%.100q is not a SHA-256 digest", d.Digest)
		}
		if len(d.URLs) > 0 || d.Size <= 0 || d.Size > MaxBlob || isDocument(d.MediaType) && d.Size > MaxManifest {
			return nil, errManifest("%s has %d bytes or is elsewhere", d.Digest, d.Size)
		}
		// An index's parts are manifests, and a manifest's are not.
		if isDocument(d.MediaType) != images.IsIndexType(mediaType) {
			return nil, errManifest("%s is %.100q", d.Digest, d.MediaType)
		}
	}
	return children, nil
}

// parts are at most maxWalk descriptors. In memory, a manifest of nothing but empty ones would have a hundred times its size.
type parts []ocispec.Descriptor

// UnmarshalJSON implements json.Unmarshaler.
func (p *parts) UnmarshalJSON(text []byte) error {
	*p = nil
	if string(text) == "null" {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if open, err := d.Token(); err != nil || open != json.Delim('[') {
		return errors.New("the parts are not a list")
	}
	list := parts{}
	for d.More() {
		if len(list) == maxWalk {
			return fmt.Errorf("more than %d parts", maxWalk)
		}
		var part ocispec.Descriptor
		if err := d.Decode(&part); err != nil {
			return err
		}
		list = append(list, part)
	}
	*p = list
	return nil
}

// SignatureParts is Children, for the manifest of a signature (pkg/signature): few and small parts, which are read as a whole.
func SignatureParts(mediaType string, text []byte) ([]ocispec.Descriptor, error) {
	if !images.IsManifestType(mediaType) {
		return nil, errManifest("a signature is a manifest, not %.100q", mediaType)
	}
	if len(text) > maxSignature {
		return nil, errManifest("the signature has %d bytes, more than %d", len(text), maxSignature)
	}
	children, err := Children(mediaType, text)
	if err != nil {
		return nil, err
	}
	if layers := len(children) - 1; layers > signature.MaxSignatures {
		return nil, errManifest("%d signatures of one image, more than %d", layers, signature.MaxSignatures)
	}
	size := int64(0)
	for _, d := range children {
		if size += d.Size; size > MaxPayloads {
			return nil, errManifest("the parts of a signature have more than %d bytes", MaxPayloads)
		}
	}
	return children, nil
}

func isDocument(mediaType string) bool {
	return images.IsManifestType(mediaType) || images.IsIndexType(mediaType)
}

// PutManifest writes a manifest or index, whose parts are there, and returns it. The lease keeps it.
func (s *Store) PutManifest(ctx context.Context, l Lease, mediaType string, text []byte) (ocispec.Descriptor, error) {
	ctx = leases.WithLease(namespaces.WithNamespace(ctx, Namespace), string(l))
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
	store := s.client.ContentStore()
	if err := content.WriteBlob(ctx, store, remotes.MakeRefKey(ctx, d), bytes.NewReader(text), d); err != nil {
		return d, fmt.Errorf("write %s: %w", d.Digest, err)
	}
	if err := s.refer(ctx, d); err != nil {
		return d, fmt.Errorf("label %s: %w", d.Digest, err)
	}
	return d, nil
}

// refer sets the labels through which a document keeps what it refers to.
func (s *Store) refer(ctx context.Context, d ocispec.Descriptor) error {
	store := s.client.ContentStore()
	return images.Dispatch(ctx, images.SetChildrenMappedLabels(store, images.ChildrenHandler(store), images.ChildGCLabels), nil, d)
}

// Pushed names an image, whose content is there, by its full name, and keeps it: one with a hash in its tag like a deployed one, each
// repository as one service, any other until the user removes it.
func (s *Store) Pushed(ctx context.Context, name string, target ocispec.Descriptor) error {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return err
	}
	c := Copy{Name: name, Target: target, Pushed: deployedNow()}
	if tagged, ok := named.(reference.Tagged); ok && BuiltTag.MatchString(tagged.Tag()) {
		c.Deployed, c.Service = c.Pushed, named.Name()
	} else {
		c.Imported = true
	}
	if err := s.name(namespaces.WithNamespace(ctx, Namespace), c); err != nil {
		return err
	}
	return s.Pin(ctx, Wanted{})
}

// PushedSignature names a signature, whose content is there, by its full name.
func (s *Store) PushedSignature(ctx context.Context, name string, manifest []byte) error {
	children, err := SignatureParts(ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	var blobs []signature.Blob
	for _, d := range children {
		text, err := s.small(ctx, d)
		if err != nil {
			return err
		}
		blobs = append(blobs, signature.Blob{Descriptor: d, Content: text})
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	return s.Signatures().Put(ctx, name, signature.Blob{Descriptor: d, Content: manifest}, blobs...)
}

// small reads content of the size that its descriptor says.
func (s *Store) small(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	blob, err := s.Read(ctx, d)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	return io.ReadAll(io.LimitReader(blob, d.Size))
}
