package rollout

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	// stablePrefix and canaryPrefix are the prefixes of a rollout's subsets. After them comes the subset that a route named, if it
	// named one.
	stablePrefix = "polymesh-stable"
	canaryPrefix = "polymesh-canary"
	// canarySuffix follows the version of the canary's pods; a label's value has at most maxLabel characters.
	canarySuffix = "-canary"
	maxLabel     = 63
)

// versionLabels are the labels that may distinguish the pods of two versions; the first one that exists does. Istio uses the
// first one (https://istio.io/latest/docs/ops/deployment/application-requirements/), Kubernetes recommends the second.
var versionLabels = []string{"version", "app.kubernetes.io/version"}

// versionOf returns the label that distinguishes the canary's pods from the others, and its value. All other labels stay the same:
// policies that select the Deployment's pods must also apply to the canary.
func versionOf(d *appsv1.Deployment) (label, value string, err error) {
	for _, label := range versionLabels {
		if value := d.Spec.Template.Labels[label]; value != "" {
			return label, value, nil
		}
	}
	return "", "", fmt.Errorf("the pods of %s have no label version, by which the mesh distinguishes the canary from them: add `version: v1` to spec.template.metadata.labels and deploy that first",
		deploymentID(d.Namespace, d.Name))
}

func canaryMark(version string) string {
	version = version[:min(len(version), maxLabel-len(canarySuffix))]
	return strings.TrimRight(version, "-_.") + canarySuffix
}

// containerOf returns the index of the container that gets the image.
func containerOf(d *appsv1.Deployment, name string) (int, error) {
	containers := d.Spec.Template.Spec.Containers
	var names []string
	for i, c := range containers {
		if c.Name == name || name == "" && len(containers) == 1 {
			return i, nil
		}
		names = append(names, c.Name)
	}
	if name == "" {
		return 0, fmt.Errorf("%s has several containers: choose one with --container, one of %s", deploymentID(d.Namespace, d.Name), strings.Join(names, ", "))
	}
	return 0, fmt.Errorf("%s has no container %s: it has %s", deploymentID(d.Namespace, d.Name), name, strings.Join(names, ", "))
}

// replicasFor returns how many pods a share of the requests needs, in percent, if all requests need this many.
func replicasFor(all int32, weight int) int32 {
	return max(1, (all*int32(weight)+99)/100)
}

// canaryDeployment returns the canary: a copy of the stable Deployment with the new image, another version and this many pods. It is
// removed with the stable one, and belongs to no project.
func canaryDeployment(stable *appsv1.Deployment, s *State, replicas int32) *appsv1.Deployment {
	mark := map[string]string{rolloutLabel: s.Name}
	canary := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{
			Name: s.canary(), Namespace: s.Namespace, Labels: mark,
			OwnerReferences: []metav1.OwnerReference{ownerOf(stable)},
		},
		Spec: *stable.Spec.DeepCopy(),
	}
	canary.Spec.Replicas, canary.Spec.Paused = &replicas, false
	canary.Spec.Selector = &metav1.LabelSelector{MatchLabels: mark}
	labels := maps.Clone(stable.Spec.Template.Labels)
	labels[rolloutLabel], labels[s.VersionLabel] = s.Name, s.canaryMark()
	canary.Spec.Template.Labels = labels
	for i := range canary.Spec.Template.Spec.Containers {
		if c := &canary.Spec.Template.Spec.Containers[i]; c.Name == s.Container {
			c.Image = s.Image
		}
	}
	return canary
}

func ownerOf(stable *appsv1.Deployment) metav1.OwnerReference {
	return metav1.OwnerReference{APIVersion: "apps/v1", Kind: "Deployment", Name: stable.Name, UID: stable.UID}
}

// subset is one of a DestinationRule.
type subset struct {
	labels map[string]string
	policy map[string]any // its trafficPolicy, if it has one
}

// host is a Service whose requests are split.
type host struct {
	service string
	// subsets are those that routes to it name, "" for a route without one.
	subsets map[string]subset
	// exportTo and policy are copied to the rollout's DestinationRule from the one that applies without it.
	exportTo []any
	policy   map[string]any
	// own means that the mesh has no route to it, so the rollout creates one. tcp are its ports that are not HTTP.
	own bool
	tcp []int32
}

// ownName is the name of the rollout's DestinationRule and VirtualService for a Service.
func ownName(service string) string { return service + "-canary" }

// side returns the name of a subset in the rollout's DestinationRule.
func side(prefix, of string) string {
	if of == "" {
		return prefix
	}
	return prefix + "-" + of
}

// unside returns the subset that a route named.
func unside(prefix, name string) (of string, ok bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok || rest != "" && rest[0] != '-' {
		return "", false
	}
	return strings.TrimPrefix(rest, "-"), true
}

// ownObject returns an object of Istio that the rollout owns.
func ownObject(kind, name string, s *State, owner metav1.OwnerReference, spec map[string]any) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "networking.istio.io/v1", "kind": kind, "spec": spec}}
	u.SetName(name)
	u.SetNamespace(s.Namespace)
	u.SetLabels(map[string]string{rolloutLabel: s.Name})
	u.SetOwnerReferences([]metav1.OwnerReference{owner})
	return u
}

// destinationRule returns a rule with a subset for each version. Istio merges it with the rule for the same Service that the
// namespace has: it adds the subsets, and the traffic policy stays that rule's.
func (h *host) destinationRule(s *State, owner metav1.OwnerReference) *unstructured.Unstructured {
	var subsets []any
	for _, name := range slices.Sorted(maps.Keys(h.subsets)) {
		for _, of := range []struct{ prefix, version string }{{stablePrefix, s.Version}, {canaryPrefix, s.canaryMark()}} {
			labels := map[string]any{}
			for key, value := range h.subsets[name].labels {
				labels[key] = value
			}
			labels[s.VersionLabel] = of.version
			entry := map[string]any{"name": side(of.prefix, name), "labels": labels}
			if policy := h.subsets[name].policy; policy != nil {
				entry["trafficPolicy"] = policy
			}
			subsets = append(subsets, entry)
		}
	}
	spec := map[string]any{"host": h.service, "subsets": subsets}
	if h.policy != nil {
		spec["trafficPolicy"] = h.policy
	}
	if h.exportTo != nil {
		spec["exportTo"] = h.exportTo
	}
	return ownObject("DestinationRule", ownName(h.service), s, owner, spec)
}

// virtualService returns a route of the mesh to a Service that has none.
func (h *host) virtualService(s *State, owner metav1.OwnerReference) *unstructured.Unstructured {
	route := func() []any {
		return []any{map[string]any{"destination": map[string]any{"host": h.service}}}
	}
	spec := map[string]any{"hosts": []any{h.service}, "http": []any{map[string]any{"route": route()}}}
	var tcp []any
	for _, port := range h.tcp {
		tcp = append(tcp, map[string]any{"match": []any{map[string]any{"port": int64(port)}}, "route": route()})
	}
	if tcp != nil {
		spec["tcp"] = tcp
	}
	return ownObject("VirtualService", ownName(h.service), s, owner, spec)
}

// routeKinds are the fields of a VirtualService that hold routes with destinations.
var routeKinds = []string{"http", "tls", "tcp"}

// leads returns the Service of the rollout that a destination of a VirtualService in a namespace refers to, or nil.
type leads func(namespace, host string) *host

// setWeight sets the canary's share, in percent, of all requests that a VirtualService sends to a Service of the rollout.
func setWeight(vs *unstructured.Unstructured, to leads, weight int64) error {
	return editRoutes(vs, func(entries []any) ([]any, bool) {
		together, was := unsplit(entries, vs.GetNamespace(), to)
		apart, is := split(together, vs.GetNamespace(), to, weight)
		return apart, was || is
	})
}

// removeWeights restores the routes.
func removeWeights(vs *unstructured.Unstructured, to leads) error {
	return editRoutes(vs, func(entries []any) ([]any, bool) { return unsplit(entries, vs.GetNamespace(), to) })
}

// editRoutes edits the destinations of each route.
func editRoutes(vs *unstructured.Unstructured, edit func([]any) ([]any, bool)) error {
	for _, kind := range routeKinds {
		routes, found, err := unstructured.NestedSlice(vs.Object, "spec", kind)
		if err != nil || !found {
			continue
		}
		changed := false
		for _, r := range routes {
			route, _ := r.(map[string]any)
			entries, ok := route["route"].([]any)
			if !ok {
				continue
			}
			if edited, did := edit(entries); did {
				route["route"], changed = edited, true
			}
		}
		if changed {
			if err := unstructured.SetNestedSlice(vs.Object, routes, "spec", kind); err != nil {
				return err
			}
		}
	}
	return nil
}

// destinations visits the destinations of each route of a VirtualService.
func destinations(vs *unstructured.Unstructured, visit func(host, subset string)) error {
	return editRoutes(vs, func(entries []any) ([]any, bool) {
		for _, e := range entries {
			host, subset, _ := destination(e)
			visit(host, subset)
		}
		return entries, false
	})
}

// destination returns where an entry of a route leads, and its weight.
func destination(entry any) (host, subset string, weight int64) {
	e, _ := entry.(map[string]any)
	to, _ := e["destination"].(map[string]any)
	host, _ = to["host"].(string)
	subset, _ = to["subset"].(string)
	switch w := e["weight"].(type) {
	case int64:
		weight = w
	case float64:
		weight = int64(w)
	}
	return host, subset, weight
}

// withDestination returns an entry with another subset and weight; a weight below 0 is none.
func withDestination(entry any, subset string, weight int64) map[string]any {
	e := maps.Clone(entry.(map[string]any))
	to, _ := e["destination"].(map[string]any)
	to = maps.Clone(to)
	delete(to, "subset")
	if subset != "" {
		to["subset"] = subset
	}
	e["destination"] = to
	delete(e, "weight")
	if weight >= 0 {
		e["weight"] = weight
	}
	return e
}

// parts is the factor of the weights in a split route, so that they can be joined exactly. A single entry without a weight counts
// as 1.
const parts = 100

// split replaces each entry that leads to a Service of the rollout with two.
func split(entries []any, namespace string, to leads, canary int64) ([]any, bool) {
	var out []any
	did := false
	for _, e := range entries {
		name, sub, weight := destination(e)
		if len(entries) == 1 && weight == 0 {
			weight = 1
		}
		h := to(namespace, name)
		if h != nil {
			_, known := h.subsets[sub]
			if !known {
				h = nil // another version, which is not changed
			}
		}
		if h == nil {
			out = append(out, withDestination(e, sub, weight*parts))
			continue
		}
		did = true
		out = append(out,
			withDestination(e, side(stablePrefix, sub), weight*(parts-canary)),
			withDestination(e, side(canaryPrefix, sub), weight*canary))
	}
	if !did {
		return entries, false
	}
	return out, true
}

// unsplit is the inverse of split. It also joins a pair of which a user has removed or changed a half.
func unsplit(entries []any, namespace string, to leads) ([]any, bool) {
	type joined struct {
		entry  any
		subset string
		weight int64
	}
	var out []joined
	did := false
	for _, e := range entries {
		name, sub, weight := destination(e)
		if to(namespace, name) != nil {
			if of, ok := unside(stablePrefix, sub); ok {
				did, sub = true, of
			} else if of, ok := unside(canaryPrefix, sub); ok {
				did, sub = true, of
				// The canary's half comes after the stable one.
				if last := len(out) - 1; last >= 0 && out[last].subset == of && sameButSubset(out[last].entry, e) {
					out[last].weight += weight
					continue
				}
			}
		}
		out = append(out, joined{e, sub, weight})
	}
	if !did {
		return entries, false
	}
	// Each is a multiple of parts, unless a user has changed weights.
	factor := int64(parts)
	if slices.ContainsFunc(out, func(j joined) bool { return j.weight%parts != 0 }) {
		factor = 1
	}
	result := make([]any, len(out))
	for i, j := range out {
		j.weight /= factor
		if len(out) == 1 && j.weight <= 1 {
			j.weight = -1
		}
		result[i] = withDestination(j.entry, j.subset, j.weight)
	}
	return result, true
}

func sameButSubset(a, b any) bool {
	return equality.Semantic.DeepEqual(withDestination(a, "", -1), withDestination(b, "", -1))
}
