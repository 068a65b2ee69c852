package dialect

import (
	mutation "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	mutate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// peerFilter takes the place of io.istio.http.peer_metadata. Nothing here reads its headers, and like Istio's it lets none
// through that somebody has made up, neither to an app nor to the next proxy.
const peerFilter = "polymesh.peer_metadata"

// peerHeaders are those with which Istio's proxies introduce themselves
// (source/extensions/filters/http/peer_metadata/filter.h in Istio's Envoy).
var peerHeaders = []string{"x-envoy-peer-metadata", "x-envoy-peer-metadata-id"}

func translateHTTP(s *surroundings, m *hcm.HttpConnectionManager) (bool, error) {
	changed, err := translateHTTPStats(s, m)
	if err != nil {
		return false, err
	}
	if len(m.HttpFilters) == 0 || m.HttpFilters[0].Name == peerFilter {
		return changed, nil
	}
	config := &mutate.HeaderMutation{Mutations: &mutate.Mutations{}}
	for _, name := range peerHeaders {
		config.Mutations.RequestMutations = append(config.Mutations.RequestMutations, &mutation.HeaderMutation{
			Action: &mutation.HeaderMutation_Remove{Remove: name},
		})
	}
	filters := []*hcm.HttpFilter{{Name: peerFilter}}
	if asksForCaller(s, m) {
		filter, err := bringCaller(config.Mutations)
		if err != nil {
			return false, err
		}
		filters = append(filters, filter)
	}
	packed, err := pack(config)
	if err != nil {
		return false, err
	}
	filters[0].ConfigType = &hcm.HttpFilter_TypedConfig{TypedConfig: packed}
	m.HttpFilters = append(filters, m.HttpFilters...)
	return true, nil
}
