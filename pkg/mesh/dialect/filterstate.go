package dialect

import (
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
)

const istioHashableString = "istio.hashable_string"

// upstreamFactory replaces Istio's factory for hashable strings, used by HBONE listeners (connect_authority), with
// upstream Envoy's equivalent.
func upstreamFactory(_ *surroundings, v *setstate.FilterStateValue) (bool, error) {
	if v.FactoryKey != istioHashableString {
		return false, nil
	}
	v.FactoryKey = "envoy.hashable_string"
	return true, nil
}
