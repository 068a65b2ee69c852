package dialect

import (
	"slices"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httpstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
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
func httpALPN(c *cluster.Cluster) (string, error) {
	mesh, err := offersIstioALPN(c)
	if err != nil || !mesh {
		return "", err
	}
	packed := c.TypedExtensionProtocolOptions[httpProtocolOptions]
	if packed == nil {
		return "istio-http/1.1,istio,http/1.1", nil
	}
	options := &upstreamhttp.HttpProtocolOptions{}
	if err := packed.UnmarshalTo(options); err != nil {
		return "", err
	}
	switch {
	case options.GetUseDownstreamProtocolConfig() != nil:
		return "istio-http/1.1,istio-h2,istio", nil
	case options.GetExplicitHttpConfig().GetHttp2ProtocolOptions() != nil:
		return "istio-h2,istio,h2", nil
	default:
		return "istio-http/1.1,istio,http/1.1", nil
	}
}

const httpProtocolOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// offersIstioALPN says whether a cluster uses Istio's mutual TLS, always or for the endpoints that have it.
func offersIstioALPN(c *cluster.Cluster) (bool, error) {
	sockets := []*core.TransportSocket{c.TransportSocket}
	for _, match := range c.TransportSocketMatches {
		sockets = append(sockets, match.TransportSocket)
	}
	for _, s := range sockets {
		ctx := &tls.UpstreamTlsContext{}
		if !s.GetTypedConfig().MessageIs(ctx) {
			continue
		}
		if err := s.GetTypedConfig().UnmarshalTo(ctx); err != nil {
			return false, err
		}
		if slices.Contains(ctx.GetCommonTlsContext().GetAlpnProtocols(), istioALPN) {
			return true, nil
		}
	}
	return false, nil
}

// withoutPeerExchange takes istio-peer-exchange out of what a TLS context offers or accepts: agreed on with a proxy of
// Istio's, it would make that proxy wait for a preface. Matching on it in filter chains does no harm and stays.
func withoutPeerExchange(_ *surroundings, c *tls.CommonTlsContext) (bool, error) {
	n := len(c.AlpnProtocols)
	c.AlpnProtocols = slices.DeleteFunc(c.AlpnProtocols, func(p string) bool { return p == peerExchangeALPN })
	return len(c.AlpnProtocols) != n, nil
}

func setALPN(c *cluster.Cluster, own map[string]*structpb.Value) error {
	alpn, err := httpALPN(c)
	if alpn != "" {
		own[alpnKey] = structpb.NewStringValue(alpn)
	}
	return err
}
