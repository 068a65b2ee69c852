package bridge

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/validation"
)

// plan is the list of actions of one pass, and its report.
type plan struct {
	apply, remove []*unstructured.Unstructured

	register      []Advert
	seen          map[string]bool // ids of the mesh's own instances that the registry shows
	altered       map[string]bool // those that were modified in the registry
	hold, release []reference
	withdraw      []reference

	services   []ServiceReport
	advertised []AdvertReport
	problems   []Problem
	holding    *Holding
}

// reference identifies an instance in the registry.
type reference struct {
	service, id string
	advert      string // the advert that takes it over
	again       bool   // already requested before: registries serve cached data
}

// name is one service name, with the state of both sides.
type name struct {
	label    string
	service  Service // in the registry; the zero value if only the mesh has it
	offer    *offer  // of the mesh
	entry    *unstructured.Unstructured
	existing map[string]*unstructured.Unstructured // WorkloadEntries by their names
	held     map[string]bool                       // ids that were hidden from callers outside, as of the last pass
}

// plan compares both sides. It makes all decisions but has no side effects.
func (o Options) plan(services []Service, v view, owner string, now time.Time, last Report) (p plan) {
	p = plan{seen: make(map[string]bool), altered: make(map[string]bool)}
	names := o.names(services, v, last, &p)
	stale := o.staleBefore(services)
	left := newBudget(names)
	defer func() { left.report(&p) }()

	desired := make(map[string]bool) // WorkloadEntries
	var lost []*unstructured.Unstructured
	total := 0
	for _, n := range names {
		o.planOffer(n, owner, &p)
		report := ServiceReport{Name: cmp.Or(n.service.Name, n.label), Host: o.host(n.label)}
		outside := n.outside(owner)
		if len(outside) == 0 && n.offer == nil && len(n.existing) == 0 {
			if n.entry != nil {
				p.remove = append(p.remove, n.entry)
			}
			continue
		}
		if !left.service(n) {
			continue
		}
		if taken := v.taken(o, n); taken != "" {
			p.problem(report.Name, "%s is %s already, so %s is not written to the mesh: use another --domain, or remove one of them", report.Host, taken, report.Name)
			p.services = append(p.services, report)
			continue
		}
		members, leftOut := o.members(n, outside, stale, v.own)
		members, leftOut = left.instances(n, members, leftOut)
		protocol := o.protocol(n, members)
		members = slices.DeleteFunc(members, func(i Instance) bool {
			other := i.TLS != (protocol == "TLS")
			if other {
				leftOut = append(leftOut, LeftOut{i.ID, "it only accepts TLS, unlike other instances of the service"})
			}
			return other
		})
		// A service that has vanished keeps its entry until its instances are gone.
		if want := o.entry(n, protocol); (len(outside) > 0 || n.offer != nil) && !same(want, n.entry) {
			p.apply = append(p.apply, want)
		}
		takes := p.takesOver(n, owner)
		for _, m := range members {
			held := n.isHeld(o, m.ID)
			switch {
			case m.Owner != "":
				held = false // another bridge's: hiding each other's would leave no instance
			case takes && m.State == Up:
				p.hold = append(p.hold, reference{n.service.Name, m.ID, n.offer.advert.Service, held})
				held = true
			case !takes && held && m.State == OutOfService:
				p.release = append(p.release, reference{service: n.service.Name, id: m.ID})
			case !takes:
				held = false
			}
			want := o.workload(n, m, protocol, held)
			desired[want.GetName()] = true
			if !same(want, n.existing[want.GetName()]) {
				p.apply = append(p.apply, want)
			}
			report.Instances = append(report.Instances, m.ID)
		}
		for _, i := range outside {
			if i.State == OutOfService && n.isHeld(o, i.ID) || slices.ContainsFunc(p.hold, func(r reference) bool { return r.service == n.service.Name && r.id == i.ID }) {
				report.Held = append(report.Held, i.ID)
			}
		}
		report.LeftOut = leftOut
		for _, w := range sorted(n.existing) {
			total++
			if desired[w.GetName()] {
				continue
			}
			// Instances that the registry itself marks as down go at once; only missing ones may be a mistake.
			if instance := n.find(w); instance != nil && !stale.is(*instance) {
				p.remove = append(p.remove, w)
				continue
			}
			lost = append(lost, w)
		}
		p.services = append(p.services, report)
	}
	o.guard(&p, lost, total, now, last)
	p.orderWithdrawals()
	return p
}

// guard decides about instances that have vanished or missed their heartbeats. A few are removed. Too many at once are kept for a while,
// and so is anything missing in the first response after an outage: a registry that has lost its data recovers it within
// a few heartbeats. Once started, this lasts until all are back, or the time is over.
func (o Options) guard(p *plan, lost []*unstructured.Unstructured, total int, now time.Time, last Report) {
	doubtful := len(lost)*100 > o.MaxLoss*total || last.silent() || last.Holding != nil
	since := now
	if last.Holding != nil {
		since = last.Holding.Since
	}
	until := since.Add(o.Guard)
	if len(lost) == 0 || !doubtful || !now.Before(until) {
		p.remove = append(p.remove, lost...)
		return
	}
	p.holding = &Holding{Since: since, Until: until}
	for _, w := range lost {
		p.holding.Instances = append(p.holding.Instances, w.GetAnnotations()[instanceAnnotation])
	}
}

// names joins the names of both sides. If two names map to the same host name, the one that is already in the mesh stays.
func (o Options) names(services []Service, v view, last Report, p *plan) []*name {
	byLabel := make(map[string]*name)
	get := func(l string) *name {
		if byLabel[l] == nil {
			byLabel[l] = &name{label: l, existing: make(map[string]*unstructured.Unstructured), held: make(map[string]bool)}
		}
		return byLabel[l]
	}
	for _, e := range v.entries {
		if v.ours(e) {
			get(e.GetLabels()[serviceLabel]).entry = e
		}
	}
	for _, w := range v.workloads {
		if v.ours(w) {
			get(w.GetLabels()[serviceLabel]).existing[w.GetName()] = w
		}
	}
	services = slices.SortedFunc(slices.Values(services), func(a, b Service) int { return strings.Compare(a.Name, b.Name) })
	for _, s := range services {
		l, err := label(s.Name)
		if err == nil {
			err = o.checkHost(l)
		}
		if err != nil {
			p.problem(s.Name, "the service is not written to the mesh: %v", err)
			continue
		}
		n := get(l)
		other := n.service.Name
		if other == "" {
			n.service = s
			continue
		}
		// The registry distinguishes them, a host name would not.
		loser := s.Name
		if n.entry != nil && n.entry.GetAnnotations()[nameAnnotation] == s.Name {
			loser, n.service = other, s
		}
		p.problem(loser, "%s and %s are both %s in the mesh, so %s is not written: rename one of them", other, s.Name, o.host(l), loser)
	}
	for i := range v.offers {
		f := &v.offers[i]
		l, err := label(f.name)
		if err != nil {
			p.problem(f.name, "Service %s is not advertised: %v", f.service, err)
			continue
		}
		n := get(l)
		if n.offer != nil {
			p.problem(f.name, "Services %s and %s both claim the name %s in the registry: the first one gets it", n.offer.service, f.service, f.name)
			continue
		}
		n.offer = f
	}
	for _, r := range last.Services {
		if l, err := label(r.Name); err == nil && byLabel[l] != nil {
			for _, id := range r.Held {
				byLabel[l].held[id] = true
			}
		}
	}
	return slices.SortedFunc(maps.Values(byLabel), func(a, b *name) int { return strings.Compare(a.label, b.label) })
}

// planOffer decides whether the mesh's Service of this name is added to the registry.
func (o Options) planOffer(n *name, owner string, p *plan) {
	registered, altered := false, ""
	for _, i := range n.service.Instances {
		if n.isOwn(i, owner) {
			p.seen[i.ID] = true
			if n.offer != nil && n.offer.advert.ID == i.ID {
				registered = true
				altered = i.Shown.difference(n.offer.advert)
				continue
			}
			p.withdraw = append(p.withdraw, reference{service: n.service.Name, id: i.ID})
		}
	}
	f := n.offer
	if f == nil {
		return
	}
	report := AdvertReport{Name: f.name, Service: f.service.String(), TakesOver: f.takesOver}
	defer func() { p.advertised = append(p.advertised, report) }()
	_, holds := o.Registry.(Holder)
	_, advertises := o.Registry.(Advertiser)
	outside := len(n.outside(owner))
	switch {
	case !advertises:
		p.problem(f.name, "Service %s is not advertised: this registry is read-only", f.service)
	case f.problem != "":
		// An existing registration stays: a gateway that briefly has no address will have one again.
		p.problem(f.name, "Service %s is not advertised again: %s", f.service, f.problem)
	case f.takesOver && !holds:
		p.problem(f.name, "Service %s is not advertised: instances in this registry cannot be taken over", f.service)
	case outside > 0 && !f.takesOver && !registered:
		p.problem(f.name, "Service %s is not advertised: the registry has %s already, with %d instances. To let the mesh answer in their place: kubectl annotate service -n %s %s %s=true",
			f.service, f.name, outside, f.service.Namespace, f.service.Name, takesOverAnnotation)
	default:
		if other := p.sameAddress(f.advert); other != "" {
			p.problem(f.name, "Service %s is not advertised: callers could not distinguish it from %s, which has the same address and port. Set --advertise-domain, or the annotation %s or %s of the Service",
				f.service, other, hostAnnotation, portAnnotation)
			return
		}
		report.Address = joinPort(f.advert.Host, f.advert.Port)
		p.register = append(p.register, f.advert)
		if altered != "" {
			p.altered[f.advert.ID] = true
			p.problem(f.name, "the registry's entry for Service %s was modified (%s) and has been restored. If this continues, another program is changing it", f.service, altered)
		}
		if outside > 0 && !f.takesOver {
			p.problem(f.name, "%s is served by Service %s and by %d instances outside: callers outside reach either", f.name, f.service, outside)
		}
	}
}

// sameAddress returns the name of another advert with the same address and port.
func (p *plan) sameAddress(a Advert) string {
	for _, other := range p.register {
		if other.Host == a.Host && other.Port == a.Port {
			return other.Service
		}
	}
	return ""
}

// takesOver reports whether the mesh hides the name's other instances from callers outside.
func (p *plan) takesOver(n *name, owner string) bool {
	if n.offer == nil || !n.offer.takesOver || !slices.ContainsFunc(p.register, func(a Advert) bool { return a.ID == n.offer.advert.ID }) {
		return false
	}
	if slices.ContainsFunc(n.service.Instances, func(i Instance) bool { return i.Owner != "" && i.Owner != owner }) {
		p.problem(n.offer.name, "another bridge has also registered %s: its instances are left alone", n.offer.name)
	}
	return true
}

// orderWithdrawals keeps an instance of the mesh in the registry until callers outside can see the old ones again.
func (p *plan) orderWithdrawals() {
	waiting := make(map[string]bool)
	for _, r := range p.release {
		waiting[r.service] = true
	}
	p.withdraw = slices.DeleteFunc(p.withdraw, func(r reference) bool { return waiting[r.service] })
}

// outside returns the instances that are not ours.
func (n *name) outside(owner string) []Instance {
	return slices.DeleteFunc(slices.Clone(n.service.Instances), func(i Instance) bool { return n.isOwn(i, owner) })
}

// isOwn reports whether an instance is this bridge's: by its mark, or by the id of an advert, in case the mark was
// removed.
func (n *name) isOwn(i Instance, owner string) bool {
	return i.Owner == owner || n.offer != nil && n.offer.advert.ID != "" && n.offer.advert.ID == i.ID
}

// find returns the instance that a WorkloadEntry was written for, if it is still in the registry.
func (n *name) find(w *unstructured.Unstructured) *Instance {
	for i := range n.service.Instances {
		if n.service.Instances[i].ID == w.GetAnnotations()[instanceAnnotation] {
			return &n.service.Instances[i]
		}
	}
	return nil
}

// members splits a service's instances into those that can be called from the mesh, and the others, with the reason.
func (o Options) members(n *name, outside []Instance, stale staleness, own []ownRange) (in []Instance, out []LeftOut) {
	ids := make(map[string]bool)
	for _, i := range outside {
		held := n.isHeld(o, i.ID)
		address, err := netip.ParseAddr(i.Address)
		address = address.Unmap()
		reason := ""
		switch {
		case i.ID == "" || len(i.ID) > maxID:
			reason = fmt.Sprintf("its id is empty or longer than %d bytes", maxID)
		case ids[i.ID]:
			reason = "another instance of the service has the same id"
		case i.State == OutOfService && !held:
			reason = "it is out of service"
		case i.State == Down:
			reason = "it is down, or still starting"
		case stale.is(i):
			reason = "the registry has received no heartbeat for longer than " + o.StaleAfter.String()
		case i.Port < 1 || i.Port > 65535:
			reason = "it has no port"
		case err != nil:
			reason = fmt.Sprintf("%q is not an IP address", short(i.Address))
		default:
			reason = o.refuse(address, own)
		}
		ids[i.ID] = true
		if reason != "" {
			out = append(out, LeftOut{short(i.ID), reason})
			continue
		}
		i.Address = address.String()
		in = append(in, i)
	}
	return in, out
}

// staleness is the oldest acceptable time of an instance's last heartbeat. It is measured by the registry's clock, from the
// newest heartbeat: a registry that pauses, or serves cached data, makes nothing stale.
type staleness time.Time

func (o Options) staleBefore(services []Service) staleness {
	var newest time.Time
	for _, s := range services {
		for _, i := range s.Instances {
			if i.Renewed.After(newest) {
				newest = i.Renewed
			}
		}
	}
	if o.StaleAfter == 0 || newest.IsZero() {
		return staleness{}
	}
	return staleness(newest.Add(-o.StaleAfter))
}

func (s staleness) is(i Instance) bool { return !i.Renewed.IsZero() && i.Renewed.Before(time.Time(s)) }

// protocol returns the protocol of a service in the mesh. A service that currently has no instances keeps its protocol.
func (o Options) protocol(n *name, members []Instance) string {
	if len(members) == 0 {
		if n.entry != nil {
			ports, _, _ := unstructured.NestedSlice(n.entry.Object, "spec", "ports")
			if len(ports) > 0 {
				if port, ok := ports[0].(map[string]any); ok && port["protocol"] == "TLS" {
					return "TLS"
				}
			}
		}
		return "HTTP"
	}
	if slices.ContainsFunc(members, func(i Instance) bool { return !i.TLS }) {
		return "HTTP"
	}
	return "TLS"
}

func (o Options) host(label string) string { return label + "." + o.Domain }

// checkHost rejects a name that is too long including the domain: it becomes a host name and an object name.
func (o Options) checkHost(label string) error {
	if bad := validation.IsDNS1123Subdomain(o.host(label)); len(bad) > 0 {
		return fmt.Errorf("%q is not a host name: %s", o.host(label), bad[0])
	}
	return nil
}

// workloadName returns the name of an instance's WorkloadEntry. Ids can be any text.
func (o Options) workloadName(n *name, id string) string {
	sum := sha256.Sum256([]byte(o.Name + "\x00" + n.service.Name + "\x00" + id))
	return n.label + "-" + hex.EncodeToString(sum[:5])
}

// entry returns the ServiceEntry of a service.
func (o Options) entry(n *name, protocol string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
		"metadata": map[string]any{
			"name": o.host(n.label), "namespace": o.Namespace, "labels": o.labels(n),
			"annotations": map[string]any{nameAnnotation: cmp.Or(n.service.Name, n.label)},
		},
		"spec": map[string]any{
			"hosts": []any{o.host(n.label)}, "location": "MESH_EXTERNAL", "resolution": "STATIC",
			"ports":            []any{map[string]any{"number": int64(o.Port), "name": portName(protocol), "protocol": protocol}},
			"workloadSelector": map[string]any{"labels": map[string]any{registryLabel: o.Name, serviceLabel: n.label}},
		},
	}}
}

// workload returns the WorkloadEntry of an instance.
func (o Options) workload(n *name, i Instance, protocol string, held bool) *unstructured.Unstructured {
	labels := map[string]any{
		registryLabel: o.Name, serviceLabel: n.label,
		// The name in metrics and Kiali.
		"app": n.label, "service.istio.io/canonical-name": n.label,
	}
	if i.Version != "" && len(validation.IsValidLabelValue(i.Version)) == 0 {
		labels["version"] = i.Version
	}
	annotations := map[string]any{instanceAnnotation: i.ID}
	if held {
		annotations[heldAnnotation] = "true"
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
		"metadata": map[string]any{
			"name": o.workloadName(n, i.ID), "namespace": o.Namespace, "labels": o.labels(n), "annotations": annotations,
		},
		"spec": map[string]any{
			"address": i.Address, "ports": map[string]any{portName(protocol): int64(i.Port)}, "labels": labels,
		},
	}}
}

func portName(protocol string) string { return strings.ToLower(protocol) }

func (o Options) labels(n *name) map[string]any {
	return map[string]any{managedByLabel: managedBy, registryLabel: o.Name, serviceLabel: n.label}
}

func (p *plan) problem(service, format string, args ...any) {
	p.problems = append(p.problems, Problem{short(service), fmt.Sprintf(format, args...)})
}

// isHeld reports whether this bridge has hidden the instance from callers outside. This is recorded in its WorkloadEntry before
// it is hidden, and afterwards in the report, which outlives the WorkloadEntry.
func (n *name) isHeld(o Options, id string) bool {
	w := n.existing[o.workloadName(n, id)]
	return n.held[id] || w != nil && w.GetAnnotations()[heldAnnotation] == "true"
}

func sorted(objects map[string]*unstructured.Unstructured) []*unstructured.Unstructured {
	return slices.SortedFunc(maps.Values(objects), func(a, b *unstructured.Unstructured) int { return strings.Compare(a.GetName(), b.GetName()) })
}
