package dialect

import (
	"errors"
	"maps"
	"sync"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"istio.io/istio/pilot/pkg/model"
)

// Translator converts resources for Istio's Envoy into resources for upstream Envoy. It is safe for concurrent use.
type Translator struct {
	resources  map[protoreflect.FullName]*shape
	extensions map[string]*extension
	walkers    *sync.Pool
	memo       *memo
}

// extension is a type that Envoy supports, or that the dialect has a rule for.
type extension struct {
	label string
	rule  extensionRule
	// shape is nil if there is nothing to visit inside, or this program does not have the type.
	shape *shape
	// typedStruct is set for a wrapper that stands for the type named in it.
	typedStruct bool
}

// Endpoints returns the labels of the workloads behind a service, by address.
type Endpoints func(host, namespace string) map[string]map[string]string

// NewTranslator returns a Translator for an Envoy that accepts the given types. With nil endpoints, a client's metrics
// lack the peer's app and version.
func NewTranslator(known KnownTypes, endpoints Endpoints) *Translator {
	t := &Translator{resources: map[protoreflect.FullName]*shape{}, extensions: map[string]*extension{}, memo: newMemo()}
	around := surroundings{endpoints: endpoints, parts: newParts()}
	t.walkers = &sync.Pool{New: func() any { return &walker{Translator: t, around: around} }}
	all := shapes{}
	for _, name := range resources {
		if typ, err := protoregistry.GlobalTypes.FindMessageByName(name); err == nil {
			t.resources[name] = all.add(typ.Descriptor())
		}
	}
	accepted := maps.Clone(known)
	for name := range namedOnly {
		accepted[string(name)] = true
	}
	for name := range accepted {
		e := &extension{label: "[" + name + "]"}
		if typ, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name)); err == nil {
			e.shape = all.add(typ.Descriptor())
		}
		t.extensions[name] = e
	}
	all.prune()
	for _, e := range t.extensions {
		if e.shape != nil && e.shape.empty() {
			e.shape = nil
		}
	}
	for name, rule := range extensionRules {
		t.extensions[string(name)] = &extension{label: "[" + string(name) + "]", rule: rule}
	}
	for _, name := range []protoreflect.FullName{udpaTypedStruct, xdsTypedStruct} {
		t.extensions[string(name)] = &extension{label: "[" + string(name) + "]", typedStruct: true}
	}
	return t
}

// EndpointsOf returns Endpoints that read istiod's index.
func EndpointsOf(index *model.EndpointIndex) Endpoints {
	return func(host, namespace string) map[string]map[string]string {
		shards, ok := index.ShardsForService(host, namespace)
		if !ok {
			return nil
		}
		found := map[string]map[string]string{}
		shards.RLock()
		defer shards.RUnlock()
		for _, endpoints := range shards.Shards {
			for _, e := range endpoints {
				for _, address := range e.Addresses {
					found[address] = e.Labels
				}
			}
		}
		return found
	}
}

// Result is the translation of one resource.
type Result struct {
	// Resource is the input itself if nothing had to change.
	Resource *anypb.Any
	// Unknown are the extension types that neither Envoy nor the dialect supports, with duplicates.
	Unknown []string
	// Refused is the reason why the resource was left as Istio generated it. Envoy then rejects it and keeps the last good one, as
	// Istio's own proxy does with an unsupported extension. A filter that enforces security is never dropped.
	// `istioctl proxy-status` and pilot_total_xds_rejects show the rejection.
	Refused error
}

// Resource translates one LDS, CDS, RDS, EDS or ECDS resource. It never changes its input. The result may be shared and must not
// be changed. The translation is the same for all proxies.
func (t *Translator) Resource(res *anypb.Any) Result {
	s := t.resources[res.MessageName()]
	if s == nil {
		return Result{Resource: res}
	}
	walk := func() Result {
		w := t.walkers.Get().(*walker)
		defer t.walkers.Put(w)
		return w.resource(s, res)
	}
	if !s.remembers(res.Value) {
		return walk()
	}
	return t.memo.result(res, walk)
}

func (w *walker) resource(s *shape, res *anypb.Any) Result {
	w.reset()
	w.in, w.unknown, w.path = res.Value, nil, w.path[:0]
	v, err := w.message(s, 0, len(res.Value))
	switch {
	case err != nil:
		return Result{Resource: res, Unknown: w.unknown, Refused: err}
	case v == remove:
		// An ECDS resource whose extension has no upstream counterpart.
		return Result{Resource: res, Unknown: w.unknown, Refused: errors.New("its extension has no counterpart in upstream Envoy")}
	}
	out, changed := w.out()
	if !changed {
		return Result{Resource: res, Unknown: w.unknown}
	}
	return Result{Resource: &anypb.Any{TypeUrl: res.TypeUrl, Value: out}, Unknown: w.unknown}
}
