package dialect

import (
	"bytes"
	"hash/maphash"
	"sync"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"google.golang.org/protobuf/types/known/anypb"
)

// memo caches translations by input: istiod regenerates most resources for each push, and most are unchanged or identical to
// those of another proxy.
type memo struct {
	seed    maphash.Seed
	mu      sync.Mutex
	entries *simplelru.LRU[uint64, memoized]
	size    int // bytes of all entries
}

// memoized is a resource and its translation. The result has no Resource if nothing had to change.
type memoized struct {
	in     *anypb.Any
	result Result
}

// memoSize is enough for the listeners and clusters of several thousand services, in bytes.
const memoSize = 32 << 20

func newMemo() *memo {
	m := &memo{seed: maphash.MakeSeed()}
	// Entries are bounded by size, not by number.
	entries, err := simplelru.NewLRU(1<<31-1, func(_ uint64, e memoized) { m.size -= e.bytes() })
	if err != nil {
		panic(err) // only for a size below one
	}
	m.entries = entries
	return m
}

// result returns the cached translation of res, or calls walk and caches its result.
func (m *memo) result(res *anypb.Any, walk func() Result) Result {
	key := maphash.Bytes(m.seed, res.Value)
	m.mu.Lock()
	known, ok := m.entries.Get(key)
	m.mu.Unlock()
	if ok && known.in.TypeUrl == res.TypeUrl && bytes.Equal(known.in.Value, res.Value) {
		if known.result.Resource == nil {
			known.result.Resource = res
		}
		return known.result
	}
	result := walk()
	m.add(key, memoized{res, result})
	return result
}

func (m *memo) add(key uint64, e memoized) {
	if e.result.Resource == e.in {
		e.result.Resource = nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries.Remove(key)
	m.entries.Add(key, e)
	for m.size += e.bytes(); m.size > memoSize; {
		m.entries.RemoveOldest()
	}
}

func (e memoized) bytes() int { return len(e.in.Value) + len(e.result.Resource.GetValue()) }

// remembers reports whether translations of a resource are worth caching. Those of endpoints also depend on labels, and no two
// workloads share inbound listeners.
func (s *shape) remembers(resource []byte) bool {
	switch s.name {
	case "envoy.config.endpoint.v3.ClusterLoadAssignment":
		return false
	case "envoy.config.listener.v3.Listener":
		return varint(resource, listenerTrafficDirection) != uint64(core.TrafficDirection_INBOUND)
	}
	return true
}
