package dialect

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httpstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// istioALPN is what Istio's clients offer in the TLS handshake for mesh traffic of unspecified protocol.
	istioALPN = "istio"
	// peerExchangeALPN announces the preface of istio.metadata_exchange, which upstream Envoy can neither read nor write.
	peerExchangeALPN = "istio-peer-exchange"
	// alpnKey is the metadata key of a cluster's ALPN list for HTTP requests.
	alpnKey = "alpn"
	// alpnState overrides the ALPN of the upstream connection for one request (Envoy
	// docs/root/configuration/advanced/well_known_filter_state.rst).
	alpnState = "envoy.network.application_protocols"
)

// alpnFilter replaces istio.alpn. A server that sniffs the protocol (`auto` ports) distinguishes HTTP from TCP by the client's
// ALPN: istio-http/1.1 or istio-h2 for HTTP, istio for anything else. One cluster carries both, so the ALPN must be chosen per
// request. istio.alpn asks the cluster for its protocol; here set_filter_state copies the answer from the cluster's metadata
// (httpALPN). Clusters outside the mesh have no such metadata and keep their own ALPN.
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

// httpALPN returns the ALPN list for HTTP requests to a cluster, or "" if the cluster does not use Istio's mutual TLS. The lists
// are those of istio.io/istio/pilot/pkg/xds/filters/filters.go (mtlsHTTP11ALPN, mtlsHTTP2ALPN). Where the upstream protocol
// follows the downstream's, the list holds both Istio names but not h2 and http/1.1: the server then negotiates neither and
// detects the HTTP version from the first bytes.
func httpALPN(cluster []byte) string {
	if !offersIstioALPN(cluster) {
		return ""
	}
	packed, ok := mapEntry(cluster, clusterProtocolOptions, httpProtocolOptions)
	if !ok {
		return "istio-http/1.1,istio,http/1.1"
	}
	options := valueAt(packed, anyValue)
	if _, ok := lastValue(options, httpOptionsDownstream); ok {
		return "istio-http/1.1,istio-h2,istio"
	}
	if _, ok := lastValue(valueAt(options, httpOptionsExplicit), explicitHTTP2); ok {
		return "istio-h2,istio,h2"
	}
	return "istio-http/1.1,istio,http/1.1"
}

const httpProtocolOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// upstreamTLS is the type of a client's TLS context.
const upstreamTLS = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"

// offersIstioALPN reports whether a cluster uses Istio's mutual TLS, for all endpoints or for those that support it.
func offersIstioALPN(cluster []byte) bool {
	offers := func(socket []byte) bool {
		config := valueAt(socket, socketTypedConfig)
		if !isType(config, upstreamTLS) {
			return false
		}
		for protocol := range valuesOf(valueAt(config, anyValue, upstreamTLSCommon), commonTLSALPN) {
			if string(protocol) == istioALPN {
				return true
			}
		}
		return false
	}
	if offers(valueAt(cluster, clusterTransportSocket)) {
		return true
	}
	for match := range valuesOf(cluster, clusterSocketMatches) {
		if offers(valueAt(match, socketMatchSocket)) {
			return true
		}
	}
	return false
}

// withoutPeerExchange removes istio-peer-exchange from the ALPN list of a TLS context. If it were negotiated, one of Istio's
// proxies would wait for a preface that never comes. Matching on it in filter chains is harmless and stays.
func withoutPeerExchange(_ *surroundings, e *edits, from, to int) error {
	for f := range fields(e.in, from, to) {
		if f.number == commonTLSALPN && string(e.in[f.from:f.to]) == peerExchangeALPN {
			e.change(f.start, f.to-f.start, nil)
		}
	}
	return nil
}
