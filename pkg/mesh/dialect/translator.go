package dialect

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"istio.io/istio/pilot/pkg/model"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// Translator turns resources for Istio's Envoy into resources for the upstream one. It has no state and may be shared.
type Translator struct {
	known     KnownTypes
	endpoints Endpoints
}

// Endpoints returns the labels of the workloads behind a service, by address.
type Endpoints func(host, namespace string) map[string]map[string]string

// NewTranslator returns a Translator for an Envoy that accepts the given types. Without endpoints (nil), a client's metrics
// do not know app and version of the other side.
func NewTranslator(known KnownTypes, endpoints Endpoints) *Translator {
	return &Translator{known: known, endpoints: endpoints}
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

// Resource translates one LDS, CDS, RDS, EDS or ECDS resource for the proxy beside a workload. It never changes its input,
// which istiod caches. Only listeners depend on the proxy.
func (t *Translator) Resource(res *anypb.Any, proxy workload.Workload) Result {
	if !t.concerns(res) {
		return Result{Resource: res}
	}
	around := surroundings{proxy: proxy, endpoints: t.endpoints}
	if translated, ok, err := t.shallow(&around, res); ok {
		return Result{Resource: translated, Refused: err}
	}
	w := &walker{Translator: t, around: around}
	refused := func(err error) Result {
		return Result{Resource: res, Unknown: w.unknown, Refused: err}
	}
	// A fresh message: nothing of the cached one is reachable from it.
	m, err := res.UnmarshalNew()
	if err != nil {
		return refused(fmt.Errorf("unmarshal: %w", err))
	}
	changed, v, err := w.message(m.ProtoReflect())
	switch {
	case err != nil:
		return refused(err)
	case v == remove:
		// An ECDS resource whose extension has no upstream counterpart.
		return refused(errors.New("its extension has no counterpart in upstream Envoy"))
	case !changed:
		return Result{Resource: res, Unknown: w.unknown}
	}
	out, err := pack(m)
	if err != nil {
		return refused(err)
	}
	return Result{Resource: out, Unknown: w.unknown}
}

// shallow translates clusters and endpoints of which the message itself is all that changes: most of them, by the thousand.
// It reports false for the others, which have to be walked.
func (t *Translator) shallow(s *surroundings, res *anypb.Any) (*anypb.Any, bool, error) {
	if !t.onlyKnown(res) || bytes.Contains(res.Value, []byte(peerExchangeALPN)) || bytes.Contains(res.Value, []byte(istioHashableString)) {
		return nil, false, nil
	}
	switch res.MessageName() {
	case "envoy.config.cluster.v3.Cluster":
		c := &cluster.Cluster{}
		if err := res.UnmarshalTo(c); err != nil {
			return res, true, fmt.Errorf("unmarshal: %w", err)
		}
		before := c.GetMetadata().GetFilterMetadata()[ownMetadata]
		if changed, err := translateCluster(s, c); err != nil || !changed || proto.Equal(before, c.Metadata.FilterMetadata[ownMetadata]) {
			return res, true, err
		}
		// What follows a message on the wire is merged into it: the metadata gets one entry more.
		added, err := pack(&cluster.Cluster{Metadata: &core.Metadata{FilterMetadata: map[string]*structpb.Struct{
			ownMetadata: c.Metadata.FilterMetadata[ownMetadata],
		}}})
		if err != nil {
			return res, true, err
		}
		return &anypb.Any{TypeUrl: res.TypeUrl, Value: slices.Concat(res.Value, added.Value)}, true, nil
	case "envoy.config.endpoint.v3.ClusterLoadAssignment":
		a := &endpoint.ClusterLoadAssignment{}
		if err := res.UnmarshalTo(a); err != nil {
			return res, true, fmt.Errorf("unmarshal: %w", err)
		}
		if changed, err := nameEndpoints(s, a); err != nil || !changed {
			return res, true, err
		}
		out, err := pack(a)
		if err != nil {
			return res, true, err
		}
		return out, true, nil
	}
	return nil, false, nil
}

const typePrefix = "type.googleapis.com/"

// concerns is the cheap check that spares most resources the walk: does the resource name a type that Envoy does not
// know, or hold one of the byte sequences that a rule looks for? It may say yes too often, never too seldom.
func (t *Translator) concerns(res *anypb.Any) bool {
	for _, marker := range markers[res.MessageName()] {
		if bytes.Contains(res.Value, marker) {
			return true
		}
	}
	return !t.onlyKnown(res)
}

// onlyKnown reports whether a resource names no type that Envoy does not know.
func (t *Translator) onlyKnown(res *anypb.Any) bool {
	rest := res.Value
	for {
		i := bytes.Index(rest, []byte(typePrefix))
		if i < 0 {
			return true
		}
		name := rest[i+len(typePrefix):]
		// The length of the string stands before it (protobuf wire format, one byte below 128).
		if i > 0 && int(rest[i-1]) >= len(typePrefix) && rest[i-1] < 128 && int(rest[i-1])-len(typePrefix) <= len(name) {
			name = name[:int(rest[i-1])-len(typePrefix)]
		} else {
			name = name[:len(name)-len(bytes.TrimLeft(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_."))]
		}
		if !t.plain(string(name)) {
			return false
		}
		rest = rest[i+len(typePrefix):]
	}
}

// plain says that a type needs no look by itself. A TypedStruct names its own type, which the scan sees too.
func (t *Translator) plain(name string) bool {
	return t.known[name] || namedOnly[protoreflect.FullName(name)] || name == string(udpaTypedStruct) || name == string(xdsTypedStruct)
}
