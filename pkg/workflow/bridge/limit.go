package bridge

import (
	"fmt"
	"slices"
	"strings"
)

// Limits for data from a registry. A registry is not trusted to be of a size that the API server and istiod can handle:
// anyone who may register can register a million instances.
const (
	maxServices  = 2000
	maxInstances = 10000
	maxOfService = 1000 // instances
	maxID        = 512  // bytes
	maxShort     = 256  // bytes of text in messages
)

// short truncates external text for a message.
func short(text string) string { return shorten(text, maxShort) }

func shorten(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// budget is the remaining capacity in one pass. Services that are already in the mesh go first, so that others cannot
// crowd them out.
type budget struct {
	of               int
	in               map[*name]bool
	left             int // remaining instances
	dropped, without int // services, instances
}

func newBudget(names []*name) *budget {
	b := &budget{of: len(names), in: make(map[*name]bool), left: maxInstances}
	byAge := slices.Clone(names)
	slices.SortStableFunc(byAge, func(a, b *name) int { return b.age() - a.age() })
	for _, n := range byAge[:min(len(byAge), maxServices)] {
		b.in[n] = true
	}
	// Instances that are in the mesh keep their places; new ones get what is left.
	for n := range b.in {
		b.left -= min(len(n.existing), maxOfService)
	}
	return b
}

// age is higher for names that are already in the mesh, or come from it.
func (n *name) age() int {
	switch {
	case n.offer != nil:
		return 2
	case n.entry != nil || len(n.existing) > 0:
		return 1
	}
	return 0
}

// service reports whether there is room for a service.
func (b *budget) service(n *name) bool {
	if !b.in[n] {
		b.dropped++
	}
	return b.in[n]
}

// instances adds the instances that do not fit to the ones left out.
func (b *budget) instances(n *name, members []Instance, out []LeftOut) ([]Instance, []LeftOut) {
	known := make(map[string]bool)
	for _, w := range n.existing {
		known[w.GetAnnotations()[instanceAnnotation]] = true
	}
	byAge := slices.Clone(members)
	slices.SortStableFunc(byAge, func(a, b Instance) int {
		switch {
		case known[a.ID] == known[b.ID]:
			return 0
		case known[a.ID]:
			return -1
		}
		return 1
	})
	in := make(map[string]bool)
	for i, m := range byAge {
		switch {
		case i >= maxOfService || !known[m.ID] && b.left <= 0:
			b.without++
			out = append(out, LeftOut{m.ID, "too many instances"})
		default:
			in[m.ID] = true
			if !known[m.ID] {
				b.left--
			}
		}
	}
	return slices.DeleteFunc(members, func(m Instance) bool { return !in[m.ID] }), out
}

// report reports what did not fit.
func (b *budget) report(p *plan) {
	if b.dropped > 0 {
		p.problem("", "the registry has %d services, the limit is %d: %d are left out", b.of, maxServices, b.dropped)
	}
	if b.without > 0 {
		p.problem("", "the limit is %d instances per registry and %d per service: %d are left out", maxInstances, maxOfService, b.without)
	}
}

// difference describes how the registry's copy of an advert differs. Service names in registries are case-insensitive, and not all
// registries keep an address besides the host.
func (a Advert) difference(want Advert) string {
	if strings.EqualFold(a.Service, want.Service) {
		a.Service = want.Service
	}
	if a.Address == "" {
		a.Address = want.Address
	}
	var parts []string
	for _, field := range []struct{ what, has, want string }{
		{"service", a.Service, want.Service}, {"id", a.ID, want.ID}, {"host", a.Host, want.Host}, {"address", a.Address, want.Address},
		{"port", fmt.Sprint(a.Port), fmt.Sprint(want.Port)}, {"owner", a.Owner, want.Owner}, {"besides", a.Besides, want.Besides},
	} {
		if field.has != field.want {
			parts = append(parts, fmt.Sprintf("%s %q instead of %q", field.what, short(field.has), field.want))
		}
	}
	return strings.Join(parts, ", ")
}
