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

// Translator turns resources for Istio's Envoy into resources for the upstream one. It may be shared.
type Translator struct {
	resources  map[protoreflect.FullName]*shape
	extensions map[string]*extension
	walkers    *sync.Pool
	memo       *memo
}

// extension is a type that Envoy knows, or that the dialect has a rule for.
type extension struct {
	label string
	rule  extensionRule
	// shape is nil if nothing inside needs a look, or this program does not know the type.
	shape *shape
	// typedStruct: it stands for the type that it names.
	typedStruct bool
}

// Endpoints returns the labels of the workloads behind a service, by address.
type Endpoints func(host, namespace string) map[string]map[string]string

// NewTranslator returns a Translator for an Envoy that accepts the given types. Without endpoints (nil), a client's metrics
// do not know app and version of the other side.
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

// EndpointsOf asks istiod's own index.
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
	// Resource is the input itself where nothing had to change.
	Resource *anypb.Any
	// Unknown are the extension types, with repetition, that neither Envoy nor the dialect knows.
	Unknown []string
	// Refused says why the resource was left as Istio made it. Envoy then rejects it and keeps the last good one, as
	// Istio's own proxy does with an extension it does not know; a filter that enforces security is never dropped, and
	// `istioctl proxy-status` and pilot_total_xds_rejects show it.
	Refused error
}

// Resource translates one LDS, CDS, RDS, EDS or ECDS resource. It never changes its input, and no one may change what it
// returns. The translation is the same for all proxies.
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
