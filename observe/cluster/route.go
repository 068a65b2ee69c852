package cluster

import (
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Limits of a route: whoever may write one can write a large one.
const (
	maxHosts        = 32
	maxDestinations = 64
)

// route is a VirtualService or an HTTPRoute with where it sends requests.
type route struct {
	metav1.ObjectMeta
	doc routeDocument
}

// routeDocument is the document of a route.
type routeDocument struct {
	Kind         string        `json:"kind"`
	Namespace    string        `json:"namespace"`
	Name         string        `json:"name"`
	UID          string        `json:"uid"`
	Created      moment        `json:"created,omitzero"`
	Deleted      moment        `json:"deleted,omitzero"`
	Hosts        []string      `json:"hosts,omitempty"`
	Destinations []destination `json:"destinations,omitempty"`
}

type destination struct {
	Host      string `json:"host"`
	Namespace string `json:"namespace,omitempty"` // of an HTTPRoute's service, if it is another one
	Subset    string `json:"subset,omitempty"`
	Port      int64  `json:"port,omitempty"`
	Weight    int64  `json:"weight"`
	Match     string `json:"match,omitempty"`
}

func newRoute(object any, kind string) (*route, *unstructured.Unstructured) {
	u, ok := object.(*unstructured.Unstructured)
	if !ok {
		return nil, nil
	}
	r := &route{ObjectMeta: metav1.ObjectMeta{Name: u.GetName(), Namespace: u.GetNamespace(), UID: u.GetUID()}}
	r.doc = routeDocument{Kind: kind, Namespace: u.GetNamespace(), Name: u.GetName(), UID: string(u.GetUID()), Created: moment{u.GetCreationTimestamp().Time}}
	return r, u
}

func (r *route) addHosts(hosts []any) {
	for _, host := range head(hosts, maxHosts) {
		if text, ok := host.(string); ok {
			r.doc.Hosts = append(r.doc.Hosts, clip(text, maxShort))
		}
	}
}

func (r *route) addDestination(d destination) {
	d.Host, d.Namespace, d.Subset, d.Match = clip(d.Host, maxShort), clip(d.Namespace, maxShort), clip(d.Subset, maxShort), clip(d.Match, maxShort)
	r.doc.Destinations = append(r.doc.Destinations, d)
}

// room returns how many more destinations can be added.
func (r *route) room() int { return maxDestinations - len(r.doc.Destinations) }

// readVirtualService reads spec.http, tls and tcp, each of which have a list of destinations with weights.
func readVirtualService(object any) *route {
	r, u := newRoute(object, kindVirtualService)
	if r == nil {
		return nil
	}
	spec := child(u.Object, "spec")
	r.addHosts(list(spec, "hosts"))
	for _, protocol := range []string{"http", "tls", "tcp"} {
		for _, rule := range head(list(spec, protocol), maxDestinations) {
			targets, match := list(rule, "route"), virtualServiceMatch(rule)
			for _, target := range head(targets, r.room()) {
				d := child(target, "destination")
				weight := number(target, "weight")
				// One alone gets everything, whatever its weight.
				if len(targets) == 1 {
					weight = 100
				}
				r.addDestination(destination{
					Host: text(d, "host"), Subset: text(d, "subset"), Port: number(child(d, "port"), "number"), Weight: weight, Match: match,
				})
			}
		}
	}
	return r
}

func virtualServiceMatch(rule any) string {
	var texts []string
	for _, m := range head(list(rule, "match"), maxHosts) {
		uri, _ := child(m, "uri").(map[string]any)
		for how, value := range uri {
			if s, ok := value.(string); ok && len(uri) == 1 {
				texts = append(texts, how+" "+clip(s, maxShort))
			}
		}
	}
	return strings.Join(texts, ", ")
}

// readHTTPRoute reads spec.rules, which have a list of services with weights.
func readHTTPRoute(object any) *route {
	r, u := newRoute(object, kindHTTPRoute)
	if r == nil {
		return nil
	}
	spec := child(u.Object, "spec")
	r.addHosts(list(spec, "hostnames"))
	for _, rule := range head(list(spec, "rules"), maxDestinations) {
		match := httpRouteMatch(rule)
		for _, target := range head(list(rule, "backendRefs"), r.room()) {
			weight := int64(1)
			if fields, ok := target.(map[string]any); ok && fields["weight"] != nil {
				weight = number(target, "weight")
			}
			r.addDestination(destination{Host: text(target, "name"), Namespace: text(target, "namespace"), Port: number(target, "port"), Weight: weight, Match: match})
		}
	}
	return r
}

func httpRouteMatch(rule any) string {
	var texts []string
	for _, m := range head(list(rule, "matches"), maxHosts) {
		if value := text(child(m, "path"), "value"); value != "" {
			texts = append(texts, text(child(m, "path"), "type")+" "+clip(value, maxShort))
		}
	}
	return strings.Join(texts, ", ")
}

// child, list, text and number read fields of JSON that can be anything.

func child(v any, name string) any {
	fields, _ := v.(map[string]any)
	return fields[name]
}

func list(v any, name string) []any {
	values, _ := child(v, name).([]any)
	return values
}

func text(v any, name string) string {
	s, _ := child(v, name).(string)
	return s
}

func number(v any, name string) int64 {
	switch n := child(v, name).(type) {
	case int64:
		return n
	case float64:
		return int64(n)
	case string:
		i, _ := strconv.ParseInt(n, 10, 64)
		return i
	}
	return 0
}

func (c *Cluster) routeChanged(old, now *route) {
	if o := either(old, now); o != nil {
		c.touchObject(key{o.doc.Kind, o.Namespace, o.Name}, object(old), object(now))
	}
}

func (c *Cluster) routeDocument(_ key, r *record) (any, bool) {
	o, ok := r.object.(*route)
	if !ok {
		return nil, false
	}
	doc := o.doc
	if !r.gone.IsZero() {
		doc.Deleted = moment{r.gone}
	}
	return doc, r.gone.IsZero()
}
