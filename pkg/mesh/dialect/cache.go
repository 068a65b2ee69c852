package dialect

import (
	"hash/maphash"
	"sync"
	"unsafe"
	"weak"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	lru "github.com/hashicorp/golang-lru/v2"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// cache keeps translations, because istiod pushes what has not changed again and again. A nil translation means that the
// resource stays as it is.
type cache interface {
	translate(res *discovery.Resource, proxy workload.Workload, translate func() *discovery.Resource) *discovery.Resource
}

// shared keeps the translation of what does not depend on the proxy for as long as istiod keeps the resource: most
// clusters, routes and endpoints it makes once for all proxies, and hands out the same object with every push.
type shared struct {
	mu sync.RWMutex
	// by address, which is quicker to find than a weak pointer is to make. An address can be another object's by now.
	translations map[uintptr]translation
	// full is the number of translations at which those are dropped that are of nothing any more.
	full int
}

type translation struct {
	of weak.Pointer[discovery.Resource]
	is *discovery.Resource
}

// leastFull keeps a small mesh from looking for what to drop all the time.
const leastFull = 1024

func (c *shared) translate(res *discovery.Resource, _ workload.Workload, translate func() *discovery.Resource) *discovery.Resource {
	address := uintptr(unsafe.Pointer(res))
	c.mu.RLock()
	known, ok := c.translations[address]
	c.mu.RUnlock()
	if ok && known.of.Value() == res {
		return known.is
	}
	made := translation{weak.Make(res), translate()}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.translations) >= c.full {
		c.drop()
	}
	c.translations[address] = made
	return made.is
}

// drop forgets the translations of what istiod no longer has. So there are never more than twice as many as are in use.
func (c *shared) drop() {
	kept := make(map[uintptr]translation, len(c.translations))
	for address, t := range c.translations {
		if t.of.Value() != nil {
			kept[address] = t
		}
	}
	c.translations, c.full = kept, max(leastFull, 2*len(kept))
}

// recent keeps the last translations by content and proxy: istiod makes listeners anew for each push.
type recent struct {
	seed         maphash.Seed
	translations *lru.Cache[content, *discovery.Resource]
}

// content stands for the bytes of a resource; the length makes a collision of two hashes still less likely.
type content struct {
	name   string
	hash   uint64
	length int
	proxy  workload.Workload
}

// recentSize is some hundred proxies' listeners, a few kilobytes each.
const recentSize = 4096

func newRecent() *recent {
	translations, err := lru.New[content, *discovery.Resource](recentSize)
	if err != nil {
		panic(err) // a size below one
	}
	return &recent{maphash.MakeSeed(), translations}
}

func (c *recent) translate(res *discovery.Resource, proxy workload.Workload, translate func() *discovery.Resource) *discovery.Resource {
	key := content{res.Name, maphash.Bytes(c.seed, res.Resource.GetValue()), len(res.Resource.GetValue()), proxy}
	if known, ok := c.translations.Get(key); ok {
		return known
	}
	translation := translate()
	c.translations.Add(key, translation)
	return translation
}
