package dialect

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"istio.io/istio/pilot/pkg/model"
)

// cache translates resources as istiod's generators add them to istiod's cache, so that cache hits are already translated.
// A generator adds a resource to the cache and sends the same object, so one translation serves both.
type cache struct {
	model.XdsCache
	translator *Translator
	reporter   *reporter
}

// Add implements model.XdsCache. Until it returns, only the caller has the resource.
func (c *cache) Add(entry model.XdsCacheEntry, request *model.PushRequest, res *discovery.Resource) {
	if res != nil && !translated(res) {
		translate(c.translator, c.reporter, res)
	}
	c.XdsCache.Add(entry, request, res)
}

// translatedMark marks a translated resource: an empty but non-nil alias list, where istiod leaves it nil.
var translatedMark = []string{}

// translated reports whether a resource was already translated.
func translated(res *discovery.Resource) bool { return res.Aliases != nil && len(res.Aliases) == 0 }

// translate replaces a resource with its translation. Only the caller may hold the resource.
func translate(t *Translator, r *reporter, res *discovery.Resource) {
	if res.Resource == nil {
		return
	}
	result := t.Resource(res.Resource)
	r.report(res, result)
	res.Resource = result.Resource
	if res.Aliases == nil {
		res.Aliases = translatedMark
	}
}
