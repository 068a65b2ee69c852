package dialect

import (
	mutation "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	mutate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// peerFilter takes the place of io.istio.http.peer_metadata. Nothing here reads its headers, and like Istio's it lets none
// through that someone has made up, neither to an app nor to the next proxy.
const peerFilter = "polymesh.peer_metadata"

// peerHeaders are those with which Istio's proxies introduce themselves
// (source/extensions/filters/http/peer_metadata/filter.h in Istio's Envoy).
var peerHeaders = []string{"x-envoy-peer-metadata", "x-envoy-peer-metadata-id"}

// translateHTTP gives an HTTP connection manager the metrics' loggers, and a filter against made-up headers before all others.
func translateHTTP(s *surroundings, e *edits, from, to int) error {
	manager := e.in[from:to]
	var first []byte
	filtered := false
	begin := len(e.scratch)
	for filter := range each(manager, httpFilters) {
		if !filtered {
			first, filtered = at(filter, httpFilterName), true
		}
		made, err := s.loggersFor(at(filter, filterTypedConfig), false)
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

// peerFilters are the filters that go before all others, encoded, with or without what brings the caller into the request's
// metadata.
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
