package dialect

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"istio.io/istio/pilot/pkg/model"
)

// cache translates what istiod's generators put into istiod's cache of resources, so that what comes out of it costs nothing
// more. A generator makes a resource, gives it to the cache and sends the same object, so one translation is for both.
type cache struct {
	model.XdsCache
	translator *Translator
	reporter   *reporter
}

// Add implements model.XdsCache. No one but the caller has the resource yet.
func (c *cache) Add(entry model.XdsCacheEntry, request *model.PushRequest, res *discovery.Resource) {
	if res != nil && !translated(res) {
		translate(c.translator, c.reporter, res)
	}
	c.XdsCache.Add(entry, request, res)
}

// mark is a list of aliases without any, where istiod has none: the same to everyone but to translated.
var mark = []string{}

// translated says whether a resource is as it is sent.
func translated(res *discovery.Resource) bool { return res.Aliases != nil && len(res.Aliases) == 0 }

// translate puts the translation into a resource that no one else has.
func translate(t *Translator, r *reporter, res *discovery.Resource) {
	if res.Resource == nil {
		return
	}
	result := t.Resource(res.Resource)
	r.report(res, result)
	res.Resource = result.Resource
	if res.Aliases == nil {
		res.Aliases = mark
	}
}
