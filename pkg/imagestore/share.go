package imagestore

import (
	"context"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxWalk limits how many documents of an image are read when content is looked for: an index has a few manifests.
const maxWalk = 512

// ownLabels is the prefix of the labels that say why an image is kept.
const ownLabels = "polymesh.dev/"

// Find returns an image of a repository that no registry has: one that came with Polymesh, was deployed, or was imported. With
// pulled, images from registries count too. ref is a tag or a digest; a digest may also be that of a manifest in an index. An image
// that is not here, or whose document is not, is errdefs.ErrNotFound. A signature is found by its tag (SignatureTag) and digest as in a
// registry.
func (s *Store) Find(ctx context.Context, repository, ref string, pulled bool) (ocispec.Descriptor, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	if want, err := digest.Parse(ref); err == nil {
		return s.FindContent(ctx, repository, want, pulled)
	}
	if SignatureTag.MatchString(ref) {
		image, err := s.client.ImageService().Get(namespaces.WithNamespace(ctx, signatureNamespace), repository+":"+ref)
		return image.Target, err
	}
	image, err := s.client.ImageService().Get(ctx, repository+":"+ref)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("look for image %s:%s: %w", repository, ref, err)
	}
	if shared, err := s.shared(ctx, image, pulled); err != nil {
		return ocispec.Descriptor{}, err
	} else if !shared {
		return ocispec.Descriptor{}, fmt.Errorf("image %s is a registry's: %w", image.Name, errdefs.ErrNotFound)
	}
	if _, err := s.client.ContentStore().Info(ctx, image.Target.Digest); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("look for the content of image %s: %w", image.Name, err)
	}
	return image.Target, nil
}

// FindContent returns content by its digest, if it belongs to an image of the repository that Find would return. So who may read
// these images reads nothing else of the store but signatures.
func (s *Store) FindContent(ctx context.Context, repository string, want digest.Digest, pulled bool) (ocispec.Descriptor, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	missing := fmt.Errorf("%s in %s: %w", want, repository, errdefs.ErrNotFound)
	// The algorithm's name and hex digits only; the repository is quoted for the filter's regular expression.
	list, err := s.client.ImageService().List(ctx, "name~="+strconv.Quote("^"+quoteMeta(repository)+"[:@]"))
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("list images of %s: %w", repository, err)
	}
	for _, image := range list {
		if shared, err := s.shared(ctx, image, pulled); err != nil {
			return ocispec.Descriptor{}, err
		} else if !shared {
			continue
		}
		found, err := s.within(ctx, image.Target, want)
		if err != nil || found.Digest == "" {
			continue // an image with missing documents does not hide another
		}
		if _, err := s.client.ContentStore().Info(ctx, want); err != nil {
			return ocispec.Descriptor{}, missing
		}
		return found, nil
	}
	ctx = namespaces.WithNamespace(ctx, signatureNamespace)
	if list, err = s.client.ImageService().List(ctx, "name~="+strconv.Quote("^"+quoteMeta(repository)+":")); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("list signatures of %s: %w", repository, err)
	}
	for _, image := range list {
		if found, err := s.within(ctx, image.Target, want); err == nil && found.Digest != "" {
			return found, nil
		}
	}
	return ocispec.Descriptor{}, missing
}

// quoteMeta is regexp.QuoteMeta for a repository's name, of whose characters only the dot has a meaning.
func quoteMeta(repository string) string { return strings.ReplaceAll(repository, ".", `[.]`) }

// within returns the descriptor of want in the tree below root; empty if it is not there.
func (s *Store) within(ctx context.Context, root ocispec.Descriptor, want digest.Digest) (found ocispec.Descriptor, err error) {
	store := s.client.ContentStore()
	queue := []ocispec.Descriptor{root}
	for n := 0; len(queue) > 0 && n < maxWalk; n++ {
		d := queue[0]
		queue = queue[1:]
		if d.Digest == want {
			return d, nil
		}
		if !images.IsManifestType(d.MediaType) && !images.IsIndexType(d.MediaType) {
			continue
		}
		children, err := images.Children(ctx, store, d)
		if err != nil && !errdefs.IsNotFound(err) {
			return found, err
		}
		queue = append(queue, children...)
	}
	return found, nil
}

// shared reports whether no registry has an image, or with pulled, whatever its source is.
func (s *Store) shared(ctx context.Context, image images.Image, pulled bool) (bool, error) {
	if pulled {
		return true, nil
	}
	for _, label := range []string{payloadLabel, archiveLabel, importedLabel, deployedLabel} {
		if image.Labels[label] != "" {
			return true, nil
		}
	}
	// One that was imported a moment ago has no label yet.
	registry, err := s.pulled(ctx, image)
	return !registry, err
}

// Content is content of the store. Close it.
type Content struct {
	*io.SectionReader
	io.Closer
}

// Read opens content that Find or FindContent has returned.
func (s *Store) Read(ctx context.Context, d ocispec.Descriptor) (*Content, error) {
	blob, err := s.client.ContentStore().ReaderAt(namespaces.WithNamespace(ctx, Namespace), d)
	if errdefs.IsNotFound(err) {
		blob, err = s.client.ContentStore().ReaderAt(namespaces.WithNamespace(ctx, signatureNamespace), d)
	}
	if err != nil {
		return nil, fmt.Errorf("open content %s: %w", d.Digest, err)
	}
	return &Content{io.NewSectionReader(blob, 0, blob.Size()), blob}, nil
}

// KeepLabels keeps the labels that say why images are kept, until ctx ends or containerd does. A pull of an image that exists
// replaces them all (createNewImage in containerd's client): an image of the same digest has its own again. came reports whether
// an image, by full name and digest, has just come from another node: it is kept as if it had been deployed here, each repository
// as one service. changed is called after an image was named, labeled or removed.
func (s *Store) KeepLabels(ctx context.Context, came func(name string, target digest.Digest) bool, changed func()) error {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, Namespace))
	defer cancel()
	changes, failed := s.client.EventService().Subscribe(ctx, `topic~="^/images/",namespace==`+Namespace)
	k := labelKeeper{store: s, came: came, known: map[string]heldImage{}}
	all, err := s.client.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	for _, image := range all {
		if err := k.see(ctx, image); err != nil {
			return err
		}
	}
	for {
		select {
		case err := <-failed:
			return err
		case change := <-changes:
			what, err := typeurl.UnmarshalAny(change.Event)
			if err != nil {
				continue
			}
			var name string
			switch e := what.(type) {
			case *events.ImageCreate:
				name = e.Name
			case *events.ImageUpdate:
				name = e.Name
			case *events.ImageDelete:
				delete(k.known, e.Name)
				changed()
				continue
			}
			image, err := s.client.ImageService().Get(ctx, name)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err == nil {
				err = k.see(ctx, image)
			}
			if err != nil {
				return err
			}
			changed()
		}
	}
}

type labelKeeper struct {
	store *Store
	came  func(name string, target digest.Digest) bool
	known map[string]heldImage
}

func (k labelKeeper) see(ctx context.Context, image images.Image) error {
	if strings.HasPrefix(image.Name, "sha256:") {
		return nil
	}
	own := maps.Clone(image.Labels)
	maps.DeleteFunc(own, func(label, value string) bool {
		return value == "" || !strings.HasPrefix(label, ownLabels) && label != pinnedLabel
	})
	had, ok := k.known[image.Name]
	hasOwn := len(own) > 1 || len(own) == 1 && own[pinnedLabel] == ""
	switch {
	case hasOwn:
		k.known[image.Name] = heldImage{name: image.Name, target: image.Target.Digest, labels: own}
		return nil
	case ok && had.target == image.Target.Digest:
		return notFoundIsNil(k.store.label(ctx, image.Name, had.labels))
	case k.came(image.Name, image.Target.Digest):
		named, err := reference.ParseNormalizedNamed(image.Name)
		if err != nil {
			return nil
		}
		return notFoundIsNil(k.store.label(ctx, image.Name, map[string]string{
			deployedLabel: deployedNow(), projectLabel: "", serviceLabel: named.Name(), pinnedLabel: pinnedValue, releasedLabel: "",
		}))
	}
	delete(k.known, image.Name)
	return nil
}

func notFoundIsNil(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// deployedFormat is that of deployedLabel: texts in the order of their times.
const deployedFormat = "2006-01-02T15:04:05.000000000Z"

// deployedNow is the value of deployedLabel for now.
func deployedNow() string { return time.Now().UTC().Format(deployedFormat) }
