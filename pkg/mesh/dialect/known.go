package dialect

import (
	_ "embed"
	"strings"
)

// knownTypesFile is written by `go test ./pkg/mesh/dialect -run TestKnownTypes -update` from what the shipped Envoy says
// about itself (node.extensions of its first DiscoveryRequest). The same test compares the two when it runs without -update.
//
//go:embed known_types.txt
var knownTypesFile string

// KnownTypes is the set of message names that an Envoy accepts where an extension is configured.
type KnownTypes map[string]bool

// ShippedEnvoy returns the types that the shipped Envoy accepts.
func ShippedEnvoy() KnownTypes {
	known := KnownTypes{}
	for line := range strings.Lines(knownTypesFile) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			known[line] = true
		}
	}
	return known
}
