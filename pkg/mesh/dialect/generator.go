package dialect

import (
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pkg/kube/labels"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/monitoring"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// wrappedTypes are the resources that go to an Envoy and can hold extensions. Proxyless gRPC has generators of its own
// ("grpc/…"), which stay as they are: those clients are no Envoys.
var wrappedTypes = []string{v3.ListenerType, v3.ClusterType, v3.RouteType, v3.EndpointType, v3.ExtensionConfigurationType}

// Istio ends the process when a metric is made after its exporter has started, and NewServer starts it, so these are
// variables of the package, as in all of istiod.
var (
	scope         = log.RegisterScope("dialect", "translation of Istio's Envoy extensions")
	typeLabel     = monitoring.CreateLabel("type")
	resourceLabel = monitoring.CreateLabel("resource_type")
	unknownTypes  = monitoring.NewSum("polymesh_dialect_unknown_types_total",
		"Extension types in generated configuration that neither Envoy nor the dialect knows.")
	refusedResources = monitoring.NewSum("polymesh_dialect_refused_resources_total",
		"Resources that were left untranslated, for Envoy to reject, because an extension could not be left out safely.")
)

// Wrap puts the dialect around the generators of a DiscoveryServer (its exported Generators map). It is called after
// bootstrap.NewServer and before Start.
func Wrap(generators map[string]model.XdsResourceGenerator, t *Translator) {
	r := &reporter{}
	for _, typ := range wrappedTypes {
		var c cache = &shared{}
		if typ == v3.ListenerType {
			c = newRecent()
		}
		inner := generators[typ]
		switch g := inner.(type) {
		case nil:
		case model.XdsDeltaResourceGenerator:
			generators[typ] = &deltaGenerator{generator{g, t, c, r}, g}
		default:
			generators[typ] = &generator{g, t, c, r}
		}
	}
}

// generator translates what another one generates. istiod asks by type assertion whether a generator can do deltas, so
// there is a second type for those that can.
type generator struct {
	inner      model.XdsResourceGenerator
	translator *Translator
	cache      cache
	reporter   *reporter
}

func (g *generator) Generate(proxy *model.Proxy, w *model.WatchedResource, req *model.PushRequest) (model.Resources, model.XdsLogDetails, error) {
	resources, details, err := g.inner.Generate(proxy, w, req)
	return g.translate(proxy, resources), details, err
}

type deltaGenerator struct {
	generator
	delta model.XdsDeltaResourceGenerator
}

func (g *deltaGenerator) GenerateDeltas(proxy *model.Proxy, req *model.PushRequest, w *model.WatchedResource) (
	model.Resources, model.DeletedResources, model.XdsLogDetails, bool, error,
) {
	resources, removed, details, used, err := g.delta.GenerateDeltas(proxy, req, w)
	return g.translate(proxy, resources), removed, details, used, err
}

// translate keeps the difference between nil ("nothing to push") and an empty list ("nothing is left"), and never writes
// to what it was given: istiod caches the resources and their bytes.
func (g *generator) translate(proxy *model.Proxy, in model.Resources) model.Resources {
	proxied := workloadOf(proxy)
	var out model.Resources
	for i, r := range in {
		translated := g.cache.translate(r, proxied, func() *discovery.Resource {
			result := g.translator.Resource(r.Resource, proxied)
			g.reporter.report(r, result)
			if result.Resource == r.Resource {
				return nil
			}
			return &discovery.Resource{
				Name: r.Name, ResourceName: r.ResourceName, Aliases: r.Aliases, Version: r.Version, Ttl: r.Ttl,
				CacheControl: r.CacheControl, Metadata: r.Metadata, Resource: result.Resource,
			}
		})
		if translated == nil {
			continue
		}
		if out == nil {
			out = append(make(model.Resources, 0, len(in)), in...)
		}
		out[i] = translated
	}
	if out == nil {
		return in
	}
	return out
}

// workloadOf is what Istio's metrics call the workload behind a proxy.
func workloadOf(proxy *model.Proxy) workload.Workload {
	if proxy == nil || proxy.Metadata == nil {
		return workload.Workload{}
	}
	service, revision := labels.CanonicalService(proxy.Labels, proxy.Metadata.WorkloadName)
	return workload.Workload{
		Name:              proxy.Metadata.WorkloadName,
		Namespace:         proxy.ConfigNamespace,
		App:               proxy.Labels["app"],
		Version:           proxy.Labels["version"],
		CanonicalService:  service,
		CanonicalRevision: revision,
		Cluster:           string(proxy.Metadata.ClusterID),
	}
}

// reporter counts what could not be translated, and logs each case once: pushes repeat it without end.
type reporter struct {
	said sync.Map
}

func (r *reporter) report(res *discovery.Resource, result Result) {
	for _, name := range result.Unknown {
		unknownTypes.With(typeLabel.Value(name)).Increment()
		if result.Refused == nil {
			r.once(name+" "+res.Name, "%s: removed the optional extension %s, which the proxy does not know", res.Name, name)
		}
	}
	if result.Refused != nil {
		refusedResources.With(resourceLabel.Value(string(res.Resource.MessageName()))).Increment()
		r.once("refused "+res.Name, "%s: not translated, the proxy will reject it and keep its last good configuration: %v; "+
			"remove the extension from the EnvoyFilter, WasmPlugin or setting that adds it", res.Name, result.Refused)
	}
}

func (r *reporter) once(key, format string, args ...any) {
	if _, said := r.said.LoadOrStore(key, true); !said {
		scope.Errorf(format, args...)
	}
}
