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

// wrappedTypes are the resources that go to an Envoy and can hold extensions. Proxyless gRPC has generators of its own
// ("grpc/…"), which stay as they are: those clients are no Envoys. Only endpoints come from the same generator, and have
// metadata more, which they do not read.
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

// Wrap puts the dialect around the generators of a DiscoveryServer and between them and their cache. It is called after
// bootstrap.NewServer and before Start. It fails if Istio's generators are not what they used to be.
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

// wrapCache reaches the cache of clusters, routes and endpoints where the generators have it. That of secrets stays as it is.
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
	server.Cache.ClearAll() // of what was put there before
	return nil
}

// generator translates what another one generates. istiod asks by type assertion whether a generator can do deltas, so
// there is a second type for those that can.
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

// translate translates what has not been in the cache: it was made for this push, so no one else has it.
func (g *generator) translate(resources model.Resources) {
	for _, res := range resources {
		if !translated(res) {
			translate(g.translator, g.reporter, res)
		}
	}
}

// reporter counts what could not be translated, and logs each case once: pushes repeat it without end. Names of types and resources
// are what authors of EnvoyFilters and the like chose, in any number, so both what was logged and what is counted apart are bounded:
// forgotten cases are logged again, and types beyond the bound are counted as one.
type reporter struct {
	said *lru.Cache[string, struct{}]

	mu    sync.Mutex
	types map[string]bool
}

const (
	// maxSaid and maxTypes are far more than there are in a mesh in which someone looks at the log.
	maxSaid, maxTypes = 4096, 256
	// maxText is where a text is cut in the log, in bytes.
	maxText = 1024
	// otherTypes is what types are counted as that are not counted apart.
	otherTypes = "other"
)

func newReporter() *reporter {
	said, err := lru.New[string, struct{}](maxSaid)
	if err != nil {
		panic(err) // a size below one
	}
	return &reporter{said: said, types: map[string]bool{}}
}

func (r *reporter) report(res *discovery.Resource, result Result) {
	for _, name := range result.Unknown {
		unknownTypes.With(typeLabel.Value(r.counted(name))).Increment()
		if result.Refused == nil {
			r.once(name+" "+res.Name, "%s: removed the optional extension %s, which the proxy does not know", quoted(res.Name), quoted(name))
		}
	}
	if result.Refused != nil {
		refusedResources.With(resourceLabel.Value(string(res.Resource.MessageName()))).Increment()
		r.once("refused "+res.Name, "%s: not translated, the proxy will reject it and keep its last good configuration: %s; "+
			"remove the extension from the EnvoyFilter, WasmPlugin or setting that adds it", quoted(res.Name), quoted(result.Refused.Error()))
	}
}

// counted is the name under which a type is counted.
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

// remember reports whether a case was remembered before.
func (r *reporter) remember(key string) bool {
	said, _ := r.said.ContainsOrAdd(key, struct{}{})
	return said
}

// quoted is a text that someone chose as it stands in a log: on one line, and of a length that can be read.
func quoted(text string) string {
	if len(text) > maxText {
		text = text[:maxText] + "..."
	}
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
		return strconv.Quote(text)
	}
	return text
}
