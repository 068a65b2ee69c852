package imagestore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// The kubelet removes images that no pod uses when the disk fills up, and pulls them again when one is needed. An image
// that no registry has cannot come back, so it is pinned while anything may want it. Labels of containerd's images say who
// wants one; an image may be wanted for more than one reason:
//
//	payload    it came with Polymesh: while the payload is this version's or the one before (their programs stay as long)
//	archive    it came from <data-dir>/agent/images: while the archive lies there as it was
//	deployed   `polymesh deploy` loaded it: while it is one of the last KeptDeploys of its service
//	imported   it came another way without a registry (`ctr images import`): until the user removes it
//
// What is no longer wanted is released: the kubelet may then remove it when it needs room. What was pulled is the kubelet's.
const (
	// pinnedLabel is CRI's: the kubelet's garbage collection leaves images alone that have it.
	pinnedLabel = "io.cri-containerd.pinned"
	pinnedValue = "pinned"

	// payloadLabel has the payload's id. It stays when the image is released: the image policy knows shipped ones by it.
	payloadLabel = "polymesh.dev/payload"
	// archiveLabel has the archive's key, and archiveCountLabel how many images it has. The latter is set once all are
	// unpacked, so that what was cut off is imported again.
	archiveLabel      = "polymesh.dev/archive"
	archiveCountLabel = "polymesh.dev/archive-images"
	// importedLabel is "true".
	importedLabel = "polymesh.dev/imported"
	// deployedLabel is when the image was deployed last (RFC 3339, UTC), of a service of a project.
	deployedLabel = "polymesh.dev/deployed"
	projectLabel  = "polymesh.dev/project"
	serviceLabel  = "polymesh.dev/service"
	// releasedLabel has the digest of what was released under this name. Another image of that name is a new one.
	releasedLabel = "polymesh.dev/released"
)

// KeptDeploys is how many images of each service of a project stay pinned: what runs, and what a rollback goes back to.
const KeptDeploys = 3

// heldImage is an image as far as pinning goes.
type heldImage struct {
	name   string
	target digest.Digest
	labels map[string]string
	// pulled says that containerd knows a registry that has it.
	pulled bool
}

// Wanted holds the payloads (by id) and archives (by the key that ImportArchive returns) that are still there. Nil means not
// known: all count.
type Wanted struct{ Payloads, Archives map[string]bool }

// pins is the whole rule: it returns the labels that change, by the image's name; an empty value removes a label.
func pins(all []heldImage, w Wanted) map[string]map[string]string {
	kept := keptDeploys(all)
	changes := map[string]map[string]string{}
	for _, image := range all {
		// CRI's own name of an image goes by the others.
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

// keptDeploys are the names of the images that were deployed last, of each service.
func keptDeploys(all []heldImage) map[string]bool {
	type service struct{ project, name string }
	deploys := map[service][]heldImage{}
	for _, image := range all {
		if image.labels[deployedLabel] != "" {
			s := service{image.labels[projectLabel], image.labels[serviceLabel]}
			deploys[s] = append(deploys[s], image)
		}
	}
	kept := map[string]bool{}
	for _, list := range deploys {
		slices.SortFunc(list, func(a, b heldImage) int {
			if c := strings.Compare(b.labels[deployedLabel], a.labels[deployedLabel]); c != 0 {
				return c
			}
			return strings.Compare(a.name, b.name)
		})
		for _, image := range list[:min(len(list), KeptDeploys)] {
			kept[image.name] = true
		}
	}
	return kept
}

// Deployed notes that an image, by its full name, is what a service of a project now runs, and releases the service's
// images before the last KeptDeploys. It is called for images that were there already, too. project is what tells projects
// apart; neither it nor the service's name is for people to read.
func (s *Store) Deployed(ctx context.Context, ref, project, service string) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	err := s.label(ctx, ref, map[string]string{
		deployedLabel: time.Now().UTC().Format("2006-01-02T15:04:05.000000000Z"), projectLabel: project, serviceLabel: service,
		// Until now it may have looked like one that the user had imported.
		pinnedLabel: pinnedValue, importedLabel: "", releasedLabel: "",
	})
	if err != nil {
		return err
	}
	return s.Pin(ctx, Wanted{})
}

// Pin brings the labels of all images up to date.
func (s *Store) Pin(ctx context.Context, w Wanted) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	all, err := s.client.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	held := make([]heldImage, 0, len(all))
	for _, image := range all {
		h := heldImage{name: image.Name, target: image.Target.Digest, labels: image.Labels}
		// Asked only where it matters.
		if image.Labels[pinnedLabel] == "" && !strings.HasPrefix(image.Name, "sha256:") {
			if h.pulled, err = s.pulled(ctx, image); err != nil {
				return err
			}
		}
		held = append(held, h)
	}
	var failures []error
	for name, change := range pins(held, w) {
		// One that was removed meanwhile needs none.
		if err := s.label(ctx, name, change); err != nil && !errdefs.IsNotFound(err) {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// pulled reports whether containerd has noted a registry as the source of an image. Of one whose content is gone nothing is
// known, so it is not ours to keep.
func (s *Store) pulled(ctx context.Context, image images.Image) (bool, error) {
	info, err := s.client.ContentStore().Info(ctx, image.Target.Digest)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the content of image %s: %w", image.Name, err)
	}
	for label := range info.Labels {
		if strings.HasPrefix(label, labels.LabelDistributionSource) {
			return true, nil
		}
	}
	return false, nil
}

// label sets labels of one image and leaves its others alone; an empty value removes one.
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
