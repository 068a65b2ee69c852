package imagestore

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/signature"
)

// signatureNamespace is the containerd namespace for image signatures. In a separate namespace the kubelet does not treat
// them as images of pods, list them in the node's status, or collect them when the disk fills up.
const signatureNamespace = "polymesh-signatures"

// Signatures is a node's containerd as a store of images that are in no registry, and of their signatures.
type Signatures struct{ store *Store }

var _ signature.Place = Signatures{}

// OpenSignatures connects to the containerd at a socket. A missing socket is an error that wraps fs.ErrNotExist.
func OpenSignatures(socket string) (Signatures, error) {
	store, err := Open(socket)
	return Signatures{store}, err
}

// Signatures returns the store as a place for signatures.
func (s *Store) Signatures() Signatures { return Signatures{s} }

// String implements fmt.Stringer.
func (Signatures) String() string { return "the node" }

// Digest implements signature.Place. It adds the name by digest ("repository@digest"), as pulled images have it;
// a pod can use it to refer to exactly this image.
func (s Signatures) Digest(ctx context.Context, name string) (digest.Digest, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	store := s.store.client.ImageService()
	image, err := store.Get(ctx, name)
	if err != nil {
		return "", err
	}
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", err
	}
	image.Name = reference.TrimNamed(named).Name() + "@" + image.Target.Digest.String()
	// The tag keeps the image alive. When it moves to another image, this one may be collected.
	shipped := image.Labels[payloadLabel]
	image.Labels = map[string]string{releasedLabel: image.Target.Digest.String()}
	if shipped != "" {
		image.Labels[payloadLabel] = shipped
	}
	if _, err := store.Create(ctx, image); err != nil && !errdefs.IsAlreadyExists(err) {
		return "", fmt.Errorf("name image %s: %w", image.Name, err)
	}
	return image.Target.Digest, nil
}

// Copied implements signature.Place. containerd labels pulled images with their source.
func (s Signatures) Copied(ctx context.Context, image signature.Image) (bool, error) {
	info, err := s.store.client.ContentStore().Info(namespaces.WithNamespace(ctx, Namespace), image.Digest)
	if err != nil {
		return false, err
	}
	for label := range info.Labels {
		if strings.HasPrefix(label, labels.LabelDistributionSource) {
			return true, nil
		}
	}
	return false, nil
}

// ImageManifest implements signature.Place. Images and signatures are in namespaces of their own.
func (s Signatures) ImageManifest(ctx context.Context, name string) ([]byte, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := s.store.client.ImageService().Get(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", name, err)
	}
	text, err := content.ReadBlob(ctx, s.store.client.ContentStore(), image.Target)
	if err != nil {
		return nil, fmt.Errorf("read the manifest of %s: %w", name, err)
	}
	return text, nil
}

// Manifest implements signature.Place.
func (s Signatures) Manifest(ctx context.Context, name string) ([]byte, error) {
	ctx = namespaces.WithNamespace(ctx, signatureNamespace)
	image, err := s.store.client.ImageService().Get(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", name, err)
	}
	return s.Blob(ctx, name, image.Target)
}

// Blob implements signature.Place.
func (s Signatures) Blob(ctx context.Context, name string, blob ocispec.Descriptor) ([]byte, error) {
	text, err := content.ReadBlob(namespaces.WithNamespace(ctx, signatureNamespace), s.store.client.ContentStore(), blob)
	if err != nil {
		return nil, fmt.Errorf("read %s of %s: %w", blob.Digest, name, err)
	}
	return text, nil
}

// Put implements signature.Place.
func (s Signatures) Put(ctx context.Context, name string, manifest signature.Blob, blobs ...signature.Blob) (err error) {
	ctx = namespaces.WithNamespace(ctx, signatureNamespace)
	client := s.store.client
	// Unreferenced content is garbage to containerd; the lease keeps it until the name exists.
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	for _, b := range append(blobs, manifest) {
		if err := content.WriteBlob(ctx, client.ContentStore(), b.Digest.String(), bytes.NewReader(b.Content), b.Descriptor); err != nil {
			return fmt.Errorf("write %s: %w", b.Digest, err)
		}
	}
	// The labels through which the manifest keeps its references alive.
	if err := images.Dispatch(ctx, images.SetChildrenMappedLabels(client.ContentStore(), images.ChildrenHandler(client.ContentStore()), images.ChildGCLabels), nil, manifest.Descriptor); err != nil {
		return fmt.Errorf("label %s: %w", name, err)
	}
	s.store.naming.Lock()
	defer s.store.naming.Unlock()
	image := images.Image{Name: name, Target: manifest.Descriptor}
	_, err = client.ImageService().Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		// It may have been another node's, which decided for how long it stays, and may have replaced it.
		image.Labels = map[string]string{fromLabel: ""}
		_, err = client.ImageService().Update(ctx, image, "target", "labels."+fromLabel)
	}
	if err != nil {
		return fmt.Errorf("name %s: %w", name, err)
	}
	return nil
}

// Shipped reports whether an image with this full name came with Polymesh.
func (s Signatures) Shipped(ctx context.Context, name string) (bool, error) {
	image, err := s.store.client.ImageService().Get(namespaces.WithNamespace(ctx, Namespace), name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && image.Labels[payloadLabel] != "", err
}

// Close ends the connection.
func (s Signatures) Close() error { return s.store.Close() }
