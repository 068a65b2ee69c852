package dialect

import (
	_ "embed"
	"strings"
)

// knownTypesFile is written by `go test ./pkg/mesh/dialect -run TestKnownTypes -update` from what the shipped Envoy reports
// (node.extensions of its first DiscoveryRequest). Without -update, the same test compares the two.
//
//go:embed known_types.txt
var knownTypesFile string

// KnownTypes is the set of message names that an Envoy accepts as extension configuration.
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
