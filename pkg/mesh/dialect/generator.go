package dialect

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	lru "github.com/hashicorp/golang-lru/v2"
	"istio.io/istio/pilot/pkg/model"
	"istio.io/istio/pilot/pkg/networking/core"
	"istio.io/istio/pilot/pkg/xds"
	v3 "istio.io/istio/pilot/pkg/xds/v3"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/monitoring"
)

// wrappedTypes are the resources that are sent to Envoy and can hold extensions. Proxyless gRPC has its own generators
// ("grpc/…"), which are not wrapped: those clients are not Envoys. Only endpoints come from the same generator; those clients
// get additional metadata that they do not read.
var wrappedTypes = []string{v3.ListenerType, v3.ClusterType, v3.RouteType, v3.EndpointType, v3.ExtensionConfigurationType}

// Istio exits the process when a metric is created after its exporter has started, and NewServer starts it. So these are
// package variables, as everywhere in istiod.
var (
	scope         = log.RegisterScope("dialect", "translation of Istio's Envoy extensions")
	typeLabel     = monitoring.CreateLabel("type")
	resourceLabel = monitoring.CreateLabel("resource_type")
	unknownTypes  = monitoring.NewSum("polymesh_dialect_unknown_types_total",
		"Extension types in generated configuration that neither Envoy nor the dialect supports.")
	refusedResources = monitoring.NewSum("polymesh_dialect_refused_resources_total",
		"Resources that were left untranslated, for Envoy to reject, because an extension could not be left out safely.")
)

// Wrap installs the dialect around the generators of a DiscoveryServer, and between them and their cache. Call it after
// bootstrap.NewServer and before Start. It returns an error if Istio's generators are not of the expected types.
func Wrap(server *xds.DiscoveryServer, t *Translator) error {
	r := newReporter()
	if err := wrapCache(server, t, r); err != nil {
		return err
	}
	for _, typ := range wrappedTypes {
		switch g := server.Generators[typ].(type) {
		case nil:
		case model.XdsDeltaResourceGenerator:
			server.Generators[typ] = &deltaGenerator{generator{g, t, r}, g}
		default:
			server.Generators[typ] = &generator{g, t, r}
		}
	}
	return nil
}

// wrapCache wraps the cache of clusters, routes and endpoints inside the generators. The cache of secrets is left alone.
func wrapCache(server *xds.DiscoveryServer, t *Translator, r *reporter) error {
	clusters, ok := server.Generators[v3.ClusterType].(*xds.CdsGenerator)
	if !ok {
		return fmt.Errorf("the generator for clusters is a %T, and not Istio's", server.Generators[v3.ClusterType])
	}
	routes, ok := server.Generators[v3.RouteType].(*xds.RdsGenerator)
	if !ok {
		return fmt.Errorf("the generator for routes is a %T, and not Istio's", server.Generators[v3.RouteType])
	}
	endpoints, ok := server.Generators[v3.EndpointType].(*xds.EdsGenerator)
	if !ok {
		return fmt.Errorf("the generator for endpoints is a %T, and not Istio's", server.Generators[v3.EndpointType])
	}
	builder, ok := clusters.ConfigGenerator.(*core.ConfigGeneratorImpl)
	if !ok || routes.ConfigGenerator != clusters.ConfigGenerator {
		return fmt.Errorf("the generators for clusters and routes have a %T and a %T, and not Istio's one", clusters.ConfigGenerator, routes.ConfigGenerator)
	}
	builder.Cache = &cache{builder.Cache, t, r}
	endpoints.Cache = &cache{endpoints.Cache, t, r}
	server.Cache.ClearAll() // entries added before are not translated
	return nil
}

// generator translates the output of another generator. istiod checks by type assertion whether a generator supports deltas, so
// there is a second type for those that do.
type generator struct {
	inner      model.XdsResourceGenerator
	translator *Translator
	reporter   *reporter
}

func (g *generator) Generate(proxy *model.Proxy, w *model.WatchedResource, req *model.PushRequest) (model.Resources, model.XdsLogDetails, error) {
	resources, details, err := g.inner.Generate(proxy, w, req)
	g.translate(resources)
	return resources, details, err
}

type deltaGenerator struct {
	generator
	delta model.XdsDeltaResourceGenerator
}

func (g *deltaGenerator) GenerateDeltas(proxy *model.Proxy, req *model.PushRequest, w *model.WatchedResource) (
	model.Resources, model.DeletedResources, model.XdsLogDetails, bool, error,
) {
	resources, removed, details, used, err := g.delta.GenerateDeltas(proxy, req, w)
	g.translate(resources)
	return resources, removed, details, used, err
}

// translate translates resources that did not come from the cache. They were made for this push, so the caller owns them.
func (g *generator) translate(resources model.Resources) {
	for _, res := range resources {
		if !translated(res) {
			translate(g.translator, g.reporter, res)
		}
	}
}

// reporter counts what could not be translated, and logs each case once, because every push repeats it. Type and resource names
// are chosen by authors of EnvoyFilters and similar, in any number, so both the logged cases and the metric's label values are
// bounded: evicted cases are logged again, and types beyond the bound are counted as one.
type reporter struct {
	logged *lru.Cache[string, struct{}]

	mu    sync.Mutex
	types map[string]bool
}

const (
	// maxLogged and maxTypes are far above the numbers in a mesh whose logs are read.
	maxLogged, maxTypes = 4096, 256
	// maxText is the length at which names are truncated in the log, in bytes.
	maxText = 1024
	// otherTypes is the label value for types beyond maxTypes.
	otherTypes = "other"
)

func newReporter() *reporter {
	logged, err := lru.New[string, struct{}](maxLogged)
	if err != nil {
		panic(err) // a size below one
	}
	return &reporter{logged: logged, types: map[string]bool{}}
}

func (r *reporter) report(res *discovery.Resource, result Result) {
	for _, name := range result.Unknown {
		unknownTypes.With(typeLabel.Value(r.counted(name))).Increment()
		if result.Refused == nil {
			r.once(name+" "+res.Name, "%s: removed the optional extension %s, which the proxy does not support", quoted(res.Name), quoted(name))
		}
	}
	if result.Refused != nil {
		refusedResources.With(resourceLabel.Value(string(res.Resource.MessageName()))).Increment()
		r.once("refused "+res.Name, "%s: not translated, the proxy will reject it and keep its last good configuration: %s; "+
			"remove the extension from the EnvoyFilter, WasmPlugin or setting that adds it", quoted(res.Name), quoted(result.Refused.Error()))
	}
}

// counted returns the label value for a type.
func (r *reporter) counted(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.types[name] {
		if len(name) > maxText || len(r.types) >= maxTypes {
			return otherTypes
		}
		r.types[name] = true
	}
	return name
}

func (r *reporter) once(key, format string, args ...any) {
	if !r.remember(key) {
		scope.Errorf(format, args...)
	}
}

// remember adds a case and reports whether it was already known.
func (r *reporter) remember(key string) bool {
	known, _ := r.logged.ContainsOrAdd(key, struct{}{})
	return known
}

// quoted returns user-supplied text in a form that is safe to log: on one line and of limited length.
func quoted(text string) string {
	if len(text) > maxText {
		text = text[:maxText] + "..."
	}
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
		return strconv.Quote(text)
	}
	return text
}
