package imagestore

import (
	"errors"
	"regexp"
)

// BuiltTag matches the tags that `polymesh deploy` gives images: they end in a hash of all that the image is built from
// (pkg/workflow/image).
var BuiltTag = regexp.MustCompile(`^(.+-)?[0-9a-f]{32}$`)

// SignatureTag matches the tags of signatures (pkg/signature).
var SignatureTag = regexp.MustCompile(`^sha256-[0-9a-f]{64}[.]sig$`)

// Latest is the tag of an image without a version: it means another image later, and on each node.
const Latest = "latest"

// CheckTag returns an error for a tag under which nodes do not give images to each other. Latest is K3s's exception, too
// (https://docs.k3s.io/installation/registry-mirror).
func CheckTag(tag string) error {
	if tag == Latest {
		return errors.New("nodes do not give each other the tag latest, whose meaning changes: use a version")
	}
	return nil
}
