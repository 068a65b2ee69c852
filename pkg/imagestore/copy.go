package imagestore

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// Copy is an image that two nodes keep, with the reason, which is the same on both: so it is released on both after the same deploys.
type Copy struct {
	// Name is the full name, with a tag, and Target what it means.
	Name   string             `json:"name"`
	Target ocispec.Descriptor `json:"target"`
	// Deployed, Project and Service are those of a deployed image; Imported is set if it stays until the user removes it.
	Deployed string `json:"deployed,omitempty"`
	Project  string `json:"project,omitempty"`
	Service  string `json:"service,omitempty"`
	Imported bool   `json:"imported,omitempty"`
	// Signature is set for a signature, which stays with its image.
	Signature bool `json:"signature,omitempty"`
	// Pushed is when the image came to this node in another way than a build or a pull.
	Pushed string `json:"-"`
	// From is the node that it was copied from; empty for an original. FromServer means that the node is a server.
	From       string `json:"-"`
	FromServer bool   `json:"-"`
}

// NewDeployed returns the copy of an image, by its full name, that is deployed now for a service of a project. It has no target yet.
func NewDeployed(name, project, service string) Copy {
	return Copy{Name: name, Deployed: deployedNow(), Project: project, Service: service}
}

// maxReason is the limit of a project's or service's name in labels, in bytes; containerd's is 4096 with the label's own.
const maxReason = 512

// Check returns an error for a copy that no node of ours sends. Another's text is only used after that.
func (c Copy) Check() error {
	named, err := reference.ParseNormalizedNamed(c.Name)
	if err != nil {
		return err
	}
	tagged, ok := named.(reference.Tagged)
	if _, digested := named.(reference.Digested); !ok || digested || named.String() != c.Name {
		return fmt.Errorf("%.300q is not the full name of an image with a tag", c.Name)
	}
	if SignatureTag.MatchString(tagged.Tag()) != c.Signature {
		return fmt.Errorf("%.300q is a signature or none", c.Name)
	}
	if reference.Domain(named) == ShippedRegistry && !c.Signature {
		return fmt.Errorf("%.300q is a name of an image that comes with Polymesh", c.Name)
	}
	if err := CheckTag(tagged.Tag()); err != nil {
		return fmt.Errorf("%.300q: %w", c.Name, err)
	}
	d := c.Target
	if c.Signature && (!images.IsManifestType(d.MediaType) || d.Size > maxSignature) {
		return fmt.Errorf("%.300q is a signature, and %d bytes of %.100q", c.Name, d.Size, d.MediaType)
	}
	if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != digest.SHA256 || !isDocument(d.MediaType) || d.Size <= 0 || d.Size > MaxManifest {
		return fmt.Errorf("%.300q is %d bytes of %.100q with the digest %.100q", c.Name, d.Size, d.MediaType, d.Digest)
	}
	if c.Deployed != "" {
		if _, err := time.Parse(deployedFormat, c.Deployed); err != nil {
			return fmt.Errorf("%.300q was deployed at %.100q", c.Name, c.Deployed)
		}
	}
	if len(c.Project) > maxReason || len(c.Service) > maxReason || strings.ContainsRune(c.Project+c.Service, 0) {
		return fmt.Errorf("the project or service of %.300q is too long", c.Name)
	}
	if (c.Deployed != "" || c.Imported) == c.Signature {
		return fmt.Errorf("%.300q is kept for no reason", c.Name)
	}
	return nil
}

// Built reports whether the tag is a hash of what the image is built from.
func (c Copy) Built() bool {
	_, tag, _ := strings.Cut(c.Name[strings.LastIndex(c.Name, "/")+1:], ":")
	return BuiltTag.MatchString(tag)
}

// Copies returns the images that this node and another one keep: those that were built here, pushed to it, or copied for that from another
// node, with their signatures.
func (s *Store) Copies(ctx context.Context) ([]Copy, error) {
	all, err := s.client.ImageService().List(namespaces.WithNamespace(ctx, Namespace))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var list []Copy
	for _, image := range all {
		l := image.Labels
		c := Copy{
			Name: image.Name, Target: plain(image.Target), Deployed: l[deployedLabel], Project: l[projectLabel], Service: l[serviceLabel],
			Imported: l[importedLabel] != "", Pushed: l[pushedLabel], From: l[fromLabel],
		}
		kept := c.Deployed != "" && c.Project != "" || c.Pushed != "" && (c.Deployed != "" || c.Imported)
		if !kept || c.Check() != nil {
			continue
		}
		list = append(list, c)
		if sign, ok := s.signatureOf(ctx, c); ok {
			list = append(list, sign)
		}
	}
	return list, nil
}

// CopiesFrom returns the number of images and signatures that this node has copied from another one.
func (s *Store) CopiesFrom(ctx context.Context, node string) (int, error) {
	n := 0
	for _, namespace := range []string{Namespace, signatureNamespace} {
		list, err := s.client.ImageService().List(namespaces.WithNamespace(ctx, namespace), copiedFrom(node))
		if err != nil {
			return 0, fmt.Errorf("list images: %w", err)
		}
		n += len(list)
	}
	return n, nil
}

// BytesFrom returns how many bytes the images and signatures have that this node has copied from another one. What they share counts once. It stops when it
// has counted more than limit.
func (s *Store) BytesFrom(ctx context.Context, node string, limit int64) (size int64, err error) {
	counted := map[digest.Digest]bool{}
	for _, namespace := range []string{Namespace, signatureNamespace} {
		ctx := namespaces.WithNamespace(ctx, namespace)
		list, err := s.client.ImageService().List(ctx, copiedFrom(node))
		if err != nil {
			return 0, fmt.Errorf("list images: %w", err)
		}
		for _, image := range list {
			queue := []ocispec.Descriptor{image.Target}
			for len(queue) > 0 && size <= limit {
				d := queue[0]
				queue = queue[1:]
				if counted[d.Digest] {
					continue
				}
				counted[d.Digest] = true
				size += max(d.Size, 0)
				if !isDocument(d.MediaType) {
					continue
				}
				children, err := images.Children(ctx, s.client.ContentStore(), d)
				if notFoundIsNil(err) != nil {
					return size, fmt.Errorf("read the content of image %s: %w", image.Name, err)
				}
				queue = append(queue, children...)
			}
		}
	}
	return size, nil
}

// Removed records which images were copied from nodes that are not known, because they were removed from the cluster: later deploys here release
// them (pins).
func (s *Store) Removed(ctx context.Context, known func(node string) bool) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	list, err := s.client.ImageService().List(ctx, fmt.Sprintf("labels.%q", fromLabel))
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	changed := false
	for _, image := range list {
		removed := ""
		if !known(image.Labels[fromLabel]) {
			removed = "true"
		}
		if image.Labels[removedLabel] == removed {
			continue
		}
		if err := s.label(ctx, image.Name, map[string]string{removedLabel: removed}); notFoundIsNil(err) != nil {
			return err
		}
		changed = true
	}
	if !changed {
		return nil
	}
	return s.Pin(ctx, Wanted{})
}

// copiedFrom is containerd's filter for what came from a node.
func copiedFrom(node string) string {
	return fmt.Sprintf("labels.%q==%s", fromLabel, strconv.Quote(node))
}

// HasSigned reports whether this node has the image that a signature is for, which is in its name.
func (s *Store) HasSigned(ctx context.Context, c Copy) (bool, error) {
	list, err := s.client.ImageService().List(namespaces.WithNamespace(ctx, Namespace), "target.digest=="+strconv.Quote(c.signed()))
	if err != nil {
		return false, fmt.Errorf("list images: %w", err)
	}
	return slices.ContainsFunc(list, func(image images.Image) bool { return signatureName(image.Name, image.Target.Digest) == c.Name }), nil
}

// signed is the digest in a signature's name.
func (c Copy) signed() string {
	_, tag, _ := strings.Cut(c.Name[strings.LastIndex(c.Name, "/")+1:], ":")
	return strings.TrimSuffix(strings.Replace(tag, "-", ":", 1), ".sig")
}

// DropSignatures removes the signatures that were copied from a node, of images that are not kept here any more.
func (s *Store) DropSignatures(ctx context.Context, node string) error {
	kept, err := s.client.ImageService().List(namespaces.WithNamespace(ctx, Namespace), fmt.Sprintf("labels.%q==%s", pinnedLabel, pinnedValue))
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	needed := map[string]bool{}
	for _, image := range kept {
		needed[signatureName(image.Name, image.Target.Digest)] = true
	}
	ctx = namespaces.WithNamespace(ctx, signatureNamespace)
	list, err := s.client.ImageService().List(ctx, copiedFrom(node))
	if err != nil {
		return fmt.Errorf("list signatures: %w", err)
	}
	for _, sign := range list {
		if needed[sign.Name] {
			continue
		}
		if err := s.client.ImageService().Delete(ctx, sign.Name, images.DeleteTarget(&sign.Target)); notFoundIsNil(err) != nil {
			return fmt.Errorf("remove the signature %s: %w", sign.Name, err)
		}
	}
	return nil
}

// signatureName returns the name of the signature of an image; empty for a name that is no image's.
func signatureName(image string, target digest.Digest) string {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return ""
	}
	return named.Name() + ":" + target.Algorithm().String() + "-" + target.Encoded() + ".sig"
}

// signatureOf returns the signature of an image.
func (s *Store) signatureOf(ctx context.Context, c Copy) (Copy, bool) {
	name := signatureName(c.Name, c.Target.Digest)
	image, err := s.client.ImageService().Get(namespaces.WithNamespace(ctx, signatureNamespace), name)
	if err != nil {
		return Copy{}, false
	}
	out := Copy{Name: name, Target: plain(image.Target), Signature: true, From: image.Labels[fromLabel]}
	return out, out.Check() == nil
}

// plain leaves out what others may have written into a descriptor.
func plain(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// ErrTaken means that another image has the name on this node.
var ErrTaken = fmt.Errorf("another image has the name: %w", errdefs.ErrAlreadyExists)

// HasCopy reports whether the node has a copy's name and content. Another image of the name is ErrTaken, unless it came from the same
// node, which may have built another one.
func (s *Store) HasCopy(ctx context.Context, c Copy) (bool, error) {
	ctx = namespaces.WithNamespace(ctx, c.namespace())
	image, err := s.client.ImageService().Get(ctx, c.Name)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for image %s: %w", c.Name, err)
	case image.Target.Digest != c.Target.Digest:
		if c.From != "" && image.Labels[fromLabel] == c.From {
			return false, nil
		}
		return false, ErrTaken
	}
	if _, err := s.client.ContentStore().Info(ctx, c.Target.Digest); err != nil {
		return false, notFoundIsNil(err)
	}
	return true, nil
}

// Renew records why an image that the node has is kept, unless it has been deployed later. An image that the node has pulled for a pod of its own
// becomes the copy of a server; to an agent, it is ErrTaken, so that another node keeps the copy.
func (s *Store) Renew(ctx context.Context, c Copy) error {
	if c.Signature {
		return nil
	}
	ctx = namespaces.WithNamespace(ctx, Namespace)
	image, err := s.client.ImageService().Get(ctx, c.Name)
	if err != nil {
		return fmt.Errorf("look for image %s: %w", c.Name, err)
	}
	l := image.Labels
	switch {
	case renews(l, c.From):
	case !pulled(l):
		return nil
	case !c.FromServer:
		return ErrTaken
	}
	if l[pushedLabel] != "" && l[deployedLabel] >= c.Deployed && (l[importedLabel] != "") == c.Imported && l[pinnedLabel] != "" {
		return nil
	}
	if c.Pushed == "" {
		c.Pushed = deployedNow()
	}
	if err := s.label(ctx, c.Name, c.labels()); err != nil {
		return err
	}
	return s.Pin(ctx, Wanted{})
}

// renews reports whether a node decides for how long an image with labels is kept here: its own copy, or an image that is kept for no reason.
// Another one has a reason of this node's own or of another one's, which it would lose.
func renews(labels map[string]string, node string) bool {
	if node != "" && labels[fromLabel] == node {
		return true
	}
	return !hasAny(labels, pinnedLabel, deployedLabel, payloadLabel, archiveLabel, importedLabel, pushedLabel, fromLabel)
}

// pulled reports whether an image with labels was only pulled from another node, for a pod: containerd keeps it as one of the last deploys.
func pulled(labels map[string]string) bool {
	return labels[deployedLabel] != "" && !hasAny(labels, projectLabel, payloadLabel, archiveLabel, importedLabel, pushedLabel, fromLabel)
}

func hasAny(labels map[string]string, names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return labels[name] != "" })
}

// MaxParts is how many parts of a copy come at a time.
const MaxParts = 4

// Receive gets a copy's content and keeps it. fetch gets a part, which is verified.
func (s *Store) Receive(ctx context.Context, c Copy, fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) (err error) {
	ctx = namespaces.WithNamespace(ctx, c.namespace())
	lease, err := s.client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return fmt.Errorf("make a lease: %w", err)
	}
	ctx = leases.WithLease(ctx, lease.ID)
	defer func() {
		var now []leases.DeleteOpt
		if err != nil {
			// What has come of a copy that failed must not stay on a disk that may be full until containerd collects garbage by itself.
			now = append(now, leases.SynchronousDelete)
		}
		_ = s.client.LeasesService().Delete(context.WithoutCancel(ctx), lease, now...)
	}()
	store := s.client.ContentStore()
	// What a document refers to is only fetched after it was checked.
	children := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if !isDocument(d.MediaType) {
			return nil, nil
		}
		blob, err := store.ReaderAt(ctx, d)
		if err != nil {
			return nil, err
		}
		defer blob.Close()
		text := make([]byte, min(blob.Size(), MaxManifest+1))
		if _, err := blob.ReadAt(text, 0); err != nil && err != io.EOF {
			return nil, err
		}
		if c.Signature {
			return SignatureParts(d.MediaType, text)
		}
		return Children(d.MediaType, text)
	})
	get := remotes.FetchHandler(store, remotes.FetcherFunc(fetch))
	if err := images.Dispatch(ctx, images.Handlers(get, children), semaphore.NewWeighted(MaxParts), c.Target); err != nil {
		return fmt.Errorf("get image %s: %w", c.Name, err)
	}
	if err := s.refer(ctx, c.Target); err != nil {
		return fmt.Errorf("label %s: %w", c.Target.Digest, err)
	}
	if c.Pushed == "" {
		c.Pushed = deployedNow()
	}
	if err := s.name(ctx, c); err != nil || c.Signature {
		return err
	}
	return s.Pin(ctx, Wanted{})
}

// name gives an image its name and labels. An image that has the name loses it, unless the new one is another node's: then HasCopy decides
// again, because the copy may have taken long.
func (s *Store) name(ctx context.Context, c Copy) error {
	s.naming.Lock()
	defer s.naming.Unlock()
	service := s.client.ImageService()
	image := images.Image{Name: c.Name, Target: c.Target, Labels: c.set()}
	_, err := service.Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		if c.From != "" {
			if has, err := s.HasCopy(ctx, c); err != nil {
				return err
			} else if has {
				return s.Renew(ctx, c)
			}
		}
		image.Labels = c.labels()
		paths := []string{"target"}
		for label := range image.Labels {
			paths = append(paths, "labels."+label)
		}
		_, err = service.Update(ctx, image, paths...)
	}
	if err != nil {
		return fmt.Errorf("name image %s: %w", c.Name, err)
	}
	return nil
}

func (c Copy) namespace() string {
	if c.Signature {
		return signatureNamespace
	}
	return Namespace
}

// set are the labels that a new image gets.
func (c Copy) set() map[string]string {
	set := c.labels()
	maps.DeleteFunc(set, func(_, value string) bool { return value == "" })
	return set
}

// labels are those that say why the image is kept; an empty value removes one.
func (c Copy) labels() map[string]string {
	if c.Signature {
		return map[string]string{fromLabel: c.From}
	}
	imported := ""
	if c.Imported {
		imported = "true"
	}
	return map[string]string{
		pushedLabel: c.Pushed, fromLabel: c.From, removedLabel: "", deployedLabel: c.Deployed, projectLabel: c.Project, serviceLabel: c.Service,
		importedLabel: imported, pinnedLabel: pinnedValue, releasedLabel: "",
		archiveLabel: "", archiveCountLabel: "",
	}
}
