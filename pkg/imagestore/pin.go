package imagestore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// The kubelet removes images that no pod uses when the disk fills up, and pulls them again when needed. An image
// that is in no registry cannot be restored, so it is pinned while it may be needed. Labels of containerd's images record
// why; an image may be needed for more than one reason:
//
//	payload    it came with Polymesh: while the payload is this version's or the one before (their programs stay as long)
//	archive    it came from <data-dir>/agent/images: while the archive lies there as it was
//	deployed   `polymesh deploy` loaded it, here or on the node that this one keeps a copy for: while it is one of the last KeptDeploys
//	           of its service; or it was pushed, or came from another node (KeepLabels): while it is one of the last of its repository.
//	           If the node that this one keeps a copy for was removed, also later deploys here release it
//	imported   it was added without a registry in another way (`ctr images import`): until the user removes it
//
// Images that are no longer needed are released: the kubelet may then remove them when it needs space. Pulled images are
// left to the kubelet.
const (
	// pinnedLabel is CRI's label: the kubelet's garbage collection skips images that have it.
	pinnedLabel = "io.cri-containerd.pinned"
	pinnedValue = "pinned"

	// payloadLabel is the payload's id. It stays when the image is released: the image policy uses it to identify shipped images.
	payloadLabel = "polymesh.dev/payload"
	// archiveLabel is the archive's key, and archiveCountLabel its number of images. The latter is set once all are
	// unpacked, so that an interrupted import is repeated.
	archiveLabel      = "polymesh.dev/archive"
	archiveCountLabel = "polymesh.dev/archive-images"
	// importedLabel is "true".
	importedLabel = "polymesh.dev/imported"
	// deployedLabel is the time of the last deploy of the image (RFC 3339, UTC), for a service of a project.
	deployedLabel = "polymesh.dev/deployed"
	projectLabel  = "polymesh.dev/project"
	serviceLabel  = "polymesh.dev/service"
	// pushedLabel is when the image was pushed to this node, or was copied from another one so that two have it (Copy); fromLabel is the
	// other one's name then.
	pushedLabel = "polymesh.dev/pushed"
	fromLabel   = "polymesh.dev/copied-from"
	// removedLabel is "true" if that node is not in the cluster any more.
	removedLabel = "polymesh.dev/copied-from-removed"
	// releasedLabel is the digest that was released under this name. Another image with that name is a new one.
	releasedLabel = "polymesh.dev/released"
)

// KeptDeploys is the number of images per service of a project that stay pinned: the running one, and those for rollbacks.
const KeptDeploys = 3

// heldImage is the part of an image that matters for pinning.
type heldImage struct {
	name   string
	target digest.Digest
	labels map[string]string
	// pulled is set if containerd knows a registry that has the image.
	pulled bool
}

// Wanted holds the payloads (by id) and archives (by the key that ImportArchive returns) that still exist. Nil means
// unknown: all count as existing.
type Wanted struct{ Payloads, Archives map[string]bool }

// pins implements the rules: it returns the labels to change, by image name; an empty value removes a label.
func pins(all []heldImage, w Wanted) map[string]map[string]string {
	kept := keptDeploys(all)
	changes := map[string]map[string]string{}
	for _, image := range all {
		// CRI's own name of an image is handled with its other names.
		if strings.HasPrefix(image.name, "sha256:") {
			continue
		}
		have := image.labels
		next := map[string]string{}
		payload := have[payloadLabel] != "" && (w.Payloads == nil || w.Payloads[have[payloadLabel]])
		archive := have[archiveLabel] != "" && (w.Archives == nil || w.Archives[have[archiveLabel]])
		claimed := have[payloadLabel] != "" || have[archiveLabel] != "" || have[deployedLabel] != "" || have[importedLabel] != ""
		if !archive {
			next[archiveLabel], next[archiveCountLabel] = "", ""
		}
		if !kept[image.name] {
			next[deployedLabel], next[projectLabel], next[serviceLabel] = "", "", ""
			if have[importedLabel] == "" {
				next[pushedLabel], next[fromLabel], next[removedLabel] = "", "", ""
			}
		}
		switch {
		case payload || archive || kept[image.name] || have[importedLabel] != "":
			next[pinnedLabel], next[releasedLabel] = pinnedValue, ""
		case claimed || have[releasedLabel] == image.target.String():
			next[pinnedLabel], next[releasedLabel] = "", image.target.String()
		case !image.pulled && have[pinnedLabel] == "":
			next[importedLabel], next[pinnedLabel], next[releasedLabel] = "true", pinnedValue, ""
		}
		maps.DeleteFunc(next, func(label, value string) bool { return have[label] == value })
		if len(next) > 0 {
			changes[image.name] = next
		}
	}
	return changes
}

// keptDeploys returns the names of the last deployed images of each service. Another node decides only for how long its own images are kept.
// When it was removed from the cluster, it releases none of them any more: then this node's own ones do so, but never the other way round.
func keptDeploys(all []heldImage) map[string]bool {
	type service struct{ project, name, from string }
	deploys := map[service][]heldImage{}
	for _, image := range all {
		if image.labels[deployedLabel] != "" {
			s := service{image.labels[projectLabel], image.labels[serviceLabel], image.labels[fromLabel]}
			deploys[s] = append(deploys[s], image)
		}
	}
	kept := map[string]bool{}
	for s, list := range deploys {
		slices.SortFunc(list, func(a, b heldImage) int {
			if c := strings.Compare(b.labels[deployedLabel], a.labels[deployedLabel]); c != 0 {
				return c
			}
			return strings.Compare(a.name, b.name)
		})
		own := deploys[service{project: s.project, name: s.name}]
		for _, image := range list[:min(len(list), KeptDeploys)] {
			later := 0
			for _, o := range own {
				if o.labels[deployedLabel] > image.labels[deployedLabel] {
					later++
				}
			}
			kept[image.name] = image.labels[removedLabel] == "" || later < KeptDeploys
		}
	}
	return kept
}

// Deployed records that a service of a project now runs an image, given by its full name, and releases the service's
// older images beyond KeptDeploys. It is also called for images that existed already. project identifies the
// project; neither it nor the service's name is meant to be displayed.
func (s *Store) Deployed(ctx context.Context, ref, project, service string) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	err := s.label(ctx, ref, map[string]string{
		deployedLabel: deployedNow(), projectLabel: project, serviceLabel: service,
		// Until now it may have been labeled as imported by the user, or as another node's copy.
		pinnedLabel: pinnedValue, importedLabel: "", releasedLabel: "", fromLabel: "", removedLabel: "",
	})
	if err != nil {
		return err
	}
	return s.Pin(ctx, Wanted{})
}

// Pin updates the labels of all images.
func (s *Store) Pin(ctx context.Context, w Wanted) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	all, err := s.client.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	held := make([]heldImage, 0, len(all))
	for _, image := range all {
		h := heldImage{name: image.Name, target: image.Target.Digest, labels: image.Labels}
		// Queried only if it matters.
		if image.Labels[pinnedLabel] == "" && !strings.HasPrefix(image.Name, "sha256:") {
			if h.pulled, err = s.pulled(ctx, image); err != nil {
				return err
			}
		}
		held = append(held, h)
	}
	var failures []error
	for name, change := range pins(held, w) {
		// An image that was removed meanwhile needs no labels.
		if err := s.label(ctx, name, change); err != nil && !errdefs.IsNotFound(err) {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// pulled reports whether containerd has recorded a registry as the source of an image. If its content is missing the source is
// unknown, so it is not pinned.
func (s *Store) pulled(ctx context.Context, image images.Image) (bool, error) {
	info, err := s.client.ContentStore().Info(ctx, image.Target.Digest)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the content of image %s: %w", image.Name, err)
	}
	for label := range info.Labels {
		if strings.HasPrefix(label, labels.LabelDistributionSource) {
			return true, nil
		}
	}
	return false, nil
}

// label sets labels of one image and keeps its others; an empty value removes one.
func (s *Store) label(ctx context.Context, name string, set map[string]string) error {
	var paths []string
	for label := range set {
		paths = append(paths, "labels."+label)
	}
	if _, err := s.client.ImageService().Update(ctx, images.Image{Name: name, Labels: set}, paths...); err != nil {
		return fmt.Errorf("label image %s: %w", name, err)
	}
	return nil
}
