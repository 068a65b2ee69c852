package dialect

import (
	mutation "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	mutate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// peerFilter replaces io.istio.http.peer_metadata. Nothing here reads the headers, but like Istio's filter it strips forged
// ones, before they reach an app or the next proxy.
const peerFilter = "polymesh.peer_metadata"

// peerHeaders are the headers in which Istio's proxies exchange their metadata
// (source/extensions/filters/http/peer_metadata/filter.h in Istio's Envoy).
var peerHeaders = []string{"x-envoy-peer-metadata", "x-envoy-peer-metadata-id"}

// translateHTTP adds the metrics loggers to an HTTP connection manager, and as first filter the one that strips forged headers.
func translateHTTP(s *surroundings, e *edits, from, to int) error {
	manager := e.in[from:to]
	var first []byte
	filtered := false
	begin := len(e.scratch)
	for filter := range valuesOf(manager, httpFilters) {
		if !filtered {
			first, filtered = valueAt(filter, httpFilterName), true
		}
		made, err := s.loggersFor(valueAt(filter, filterTypedConfig), false)
		if err != nil {
			return err
		}
		if made == nil {
			continue
		}
		for _, log := range made.logs {
			e.scratch = appendBytes(e.scratch, httpAccessLog, log)
		}
	}
	if added := e.scratch[begin:len(e.scratch):len(e.scratch)]; len(added) > 0 {
		e.change(to, 0, added)
	}
	if !filtered || string(first) == peerFilter {
		return nil
	}
	if asksForCaller(s, manager) {
		e.change(from, 0, s.parts.callerFilters)
	} else {
		e.change(from, 0, s.parts.peerFilters)
	}
	return nil
}

// peerFilters returns the filters that go before all others, encoded, optionally with the one that copies the caller into the
// request's metadata.
func peerFilters(caller bool) []byte {
	config := &mutate.HeaderMutation{Mutations: &mutate.Mutations{}}
	for _, name := range peerHeaders {
		config.Mutations.RequestMutations = append(config.Mutations.RequestMutations, &mutation.HeaderMutation{
			Action: &mutation.HeaderMutation_Remove{Remove: name},
		})
	}
	first := &hcm.HttpFilter{Name: peerFilter}
	filters := []*hcm.HttpFilter{first}
	if caller {
		filters = append(filters, bringCaller(config.Mutations))
	}
	first.ConfigType = &hcm.HttpFilter_TypedConfig{TypedConfig: mustPack(config)}
	var encoded []byte
	for _, filter := range filters {
		encoded = appendBytes(encoded, httpFilters, mustPack(filter).Value)
	}
	return encoded
}
