package dialect

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httpstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// istioALPN is what Istio's clients offer in the TLS handshake: "mesh traffic, protocol not said".
	istioALPN = "istio"
	// peerExchangeALPN promises the preface of istio.metadata_exchange, which upstream Envoy cannot read or write.
	peerExchangeALPN = "istio-peer-exchange"
	// alpnKey is where the dialect keeps the ALPN list of a cluster for HTTP requests.
	alpnKey = "alpn"
	// alpnState overrides the ALPN of the upstream connection that a request takes
	// (Envoy docs/root/configuration/advanced/well_known_filter_state.rst).
	alpnState = "envoy.network.application_protocols"
)

// alpnFilter replaces istio.alpn. A server that sniffs (`auto` ports) tells HTTP from TCP by the ALPN that the client
// offers: istio-http/1.1 or istio-h2 for HTTP, istio for anything else. One cluster carries both, so the ALPN has to be
// chosen for each request. istio.alpn asks the cluster which protocol it speaks; here the answer stands in the cluster's
// metadata (httpALPN), and set_filter_state copies it. Clusters outside of the mesh have none, and keep their own ALPN.
func alpnFilter(*anypb.Any) (*anypb.Any, error) {
	return pack(&httpstate.Config{
		OnRequestHeaders: []*setstate.FilterStateValue{{
			Key: &setstate.FilterStateValue_ObjectKey{ObjectKey: alpnState},
			Value: &setstate.FilterStateValue_FormatString{FormatString: &core.SubstitutionFormatString{
				Format: &core.SubstitutionFormatString_TextFormatSource{TextFormatSource: &core.DataSource{
					Specifier: &core.DataSource_InlineString{InlineString: clusterMetadata(alpnKey)},
				}},
				OmitEmptyValues: true,
			}},
			SkipIfEmpty: true,
		}},
	})
}

// httpALPN is the ALPN list for HTTP requests to a cluster, empty if it is not reached by Istio's mutual TLS. The lists
// are those of istio.io/istio/pilot/pkg/xds/filters/filters.go (mtlsHTTP11ALPN, mtlsHTTP2ALPN). Where the protocol follows
// the downstream's, both Istio names stand in one list without h2 and http/1.1: the server then negotiates neither and
// reads the HTTP version from the first bytes.
func httpALPN(cluster []byte) string {
	if !offersIstioALPN(cluster) {
		return ""
	}
	packed, ok := entry(cluster, clusterProtocolOptions, httpProtocolOptions)
	if !ok {
		return "istio-http/1.1,istio,http/1.1"
	}
	options := at(packed, anyValue)
	if _, ok := last(options, httpOptionsDownstream); ok {
		return "istio-http/1.1,istio-h2,istio"
	}
	if _, ok := last(at(options, httpOptionsExplicit), explicitHTTP2); ok {
		return "istio-h2,istio,h2"
	}
	return "istio-http/1.1,istio,http/1.1"
}

const httpProtocolOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// upstreamTLS is the type of a client's TLS context.
const upstreamTLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"

// offersIstioALPN says whether a cluster uses Istio's mutual TLS, always or for the endpoints that have it.
func offersIstioALPN(cluster []byte) bool {
	offers := func(socket []byte) bool {
		config := at(socket, socketTypedConfig)
		if !isType(config, upstreamTLS) {
			return false
		}
		for protocol := range each(at(config, anyValue, upstreamTLSCommon), commonTLSALPN) {
			if string(protocol) == istioALPN {
				return true
			}
		}
		return false
	}
	if offers(at(cluster, clusterTransportSocket)) {
		return true
	}
	for match := range each(cluster, clusterSocketMatches) {
		if offers(at(match, socketMatchSocket)) {
			return true
		}
	}
	return false
}

// withoutPeerExchange takes istio-peer-exchange out of what a TLS context offers or accepts: agreed on with a proxy of
// Istio's, it would make that proxy wait for a preface. Matching on it in filter chains does no harm and stays.
func withoutPeerExchange(_ *surroundings, e *edits, from, to int) error {
	for f := range fields(e.in, from, to) {
		if f.number == commonTLSALPN && string(e.in[f.from:f.to]) == peerExchangeALPN {
			e.change(f.start, f.to-f.start, nil)
		}
	}
	return nil
}
