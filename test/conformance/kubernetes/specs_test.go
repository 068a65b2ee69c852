//go:build e2e

package kubernetes

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Specs is the contents of specs.yaml.
type Specs struct {
	Focus    string  `json:"focus"`
	Excluded []Group `json:"excluded"`
	Skipped  []Group `json:"skipped"`
	Failing  []Group `json:"failing"`
}

// Group is a list of specs, by their full names, with their common reason.
type Group struct {
	Reason string   `json:"reason"`
	Specs  []string `json:"specs"`
}

//go:embed specs.yaml
var specsFile []byte

// readSpecs reads specs.yaml, and checks it against the names of all conformance specs.
func readSpecs(text []byte, all []string) (Specs, error) {
	var s Specs
	if err := yaml.UnmarshalStrict(text, &s); err != nil {
		return s, fmt.Errorf("specs.yaml: %w", err)
	}
	if s.Focus == "" {
		return s, fmt.Errorf("specs.yaml: focus is empty")
	}
	seen := map[string]bool{}
	for _, g := range slices.Concat(s.Excluded, s.Skipped, s.Failing) {
		if g.Reason == "" {
			return s, fmt.Errorf("specs.yaml: a group has no reason: %q", g.Specs)
		}
		for _, name := range g.Specs {
			if !slices.Contains(all, name) {
				return s, fmt.Errorf("specs.yaml: upstream has no conformance spec %q", name)
			}
			if seen[name] {
				return s, fmt.Errorf("specs.yaml: %q is listed twice", name)
			}
			seen[name] = true
		}
	}
	return s, nil
}

// reason returns the reason of the group that contains the spec; empty if none does.
func reason(groups []Group, spec string) string {
	for _, g := range groups {
		if slices.Contains(g.Specs, spec) {
			return g.Reason
		}
	}
	return ""
}

// skip returns Ginkgo's regular expression for the specs that are not started; empty if all are.
func (s Specs) skip() string {
	var names []string
	for _, g := range s.Excluded {
		for _, name := range g.Specs {
			names = append(names, regexp.QuoteMeta(name))
		}
	}
	return strings.Join(names, "|")
}

// names parses the names in upstream's conformance.yaml.
func names(text []byte) ([]string, error) {
	var list []struct {
		Codename string `json:"codename"`
	}
	if err := yaml.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("upstream's list of conformance specs: %w", err)
	}
	var all []string
	for _, spec := range list {
		if spec.Codename != "" {
			all = append(all, spec.Codename)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("upstream's list of conformance specs is empty")
	}
	return all, nil
}
