package bridge

import (
	"fmt"
	"slices"
	"strings"
)

// Bounds of what is taken from a registry into the mesh. A registry is not trusted to be of a size that the API server and
// istiod can bear: whoever may register may register a million instances.
const (
	maxServices  = 2000
	maxInstances = 10000
	maxOfService = 1000 // instances
	maxID        = 512  // bytes
	maxShort     = 256  // bytes of text in messages
)

// short is text from outside, bounded for a message.
func short(text string) string { return shorten(text, maxShort) }

func shorten(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// budget is what is left of the bounds in one pass. Services that are in the mesh already go first, so that others cannot
// crowd them out.
type budget struct {
	of               int
	in               map[*name]bool
	left             int // instances that may still come
	dropped, without int // services, instances
}

func newBudget(names []*name) *budget {
	b := &budget{of: len(names), in: make(map[*name]bool), left: maxInstances}
	byAge := slices.Clone(names)
	slices.SortStableFunc(byAge, func(a, b *name) int { return b.age() - a.age() })
	for _, n := range byAge[:min(len(byAge), maxServices)] {
		b.in[n] = true
	}
	// Instances that are in the mesh keep their places: what is left is for new ones.
	for n := range b.in {
		b.left -= min(len(n.existing), maxOfService)
	}
	return b
}

// age is higher for names that are in the mesh, or come from it.
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

// instances are those that there is room for, and those that are left out with the others.
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
			out = append(out, LeftOut{m.ID, "there are too many instances"})
		default:
			in[m.ID] = true
			if !known[m.ID] {
				b.left--
			}
		}
	}
	return slices.DeleteFunc(members, func(m Instance) bool { return !in[m.ID] }), out
}

// say reports what there was no room for.
func (b *budget) say(p *plan) {
	if b.dropped > 0 {
		p.problem("", "the registry has %d services, and the mesh takes %d: %d are left out", b.of, maxServices, b.dropped)
	}
	if b.without > 0 {
		p.problem("", "the mesh takes %d instances of a registry, and %d of one service: %d are left out", maxInstances, maxOfService, b.without)
	}
}

// difference says what of an advert the registry shows otherwise. Registries do not tell upper from lower case in the names of
// services, and not all of them know an address beside the host.
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
