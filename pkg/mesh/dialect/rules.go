package dialect

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// extensionRule translates the configuration of one of Istio's extensions. Without a result, the extension is removed.
type extensionRule func(*anypb.Any) (*anypb.Any, error)

// lost is the rule for what upstream Envoy has no counterpart of; docs/mesh/dialect.md says what goes with it. Nothing
// that decides about a request may have this rule.
func lost(*anypb.Any) (*anypb.Any, error) { return nil, nil }

// extensionRules are the extensions that Istio emits and upstream Envoy does not have. Sources:
// istio.io/istio/pilot/pkg/xds/filters/filters.go and pilot/pkg/model/telemetry.go.
var extensionRules = map[protoreflect.FullName]extensionRule{
	"istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig": alpnFilter,
	"stats.PluginConfig":                                            lost, // by now an access logger, see stats.go
	"io.istio.http.peer_metadata.Config":                            lost,
	"envoy.tcp.metadataexchange.config.MetadataExchange":            lost,
	"envoy.extensions.network_filters.peer_metadata.Config":         lost,
	"envoy.extensions.network_filters.peer_metadata.UpstreamConfig": lost,
}

// surroundings are what a rule may know beside the message: the proxy, and what the walk has met on its way down.
type surroundings struct {
	proxy     workload.Workload
	endpoints Endpoints
	// inbound is set inside of a listener for traffic to the workload.
	inbound bool
}

// messageRule changes a message in place and reports whether it did.
type messageRule func(*surroundings, proto.Message) (bool, error)

// on makes a messageRule of a function on one type.
func on[M proto.Message](f func(*surroundings, M) (bool, error)) messageRule {
	return func(s *surroundings, m proto.Message) (bool, error) { return f(s, m.(M)) }
}

// messageRules are changes that no extension position asks for. They run before the message is walked.
var messageRules = map[protoreflect.FullName]messageRule{
	"envoy.config.listener.v3.Listener":                                                 on(noteDirection),
	"envoy.config.listener.v3.FilterChain":                                              on(translateTCPStats),
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager": on(translateHTTP),
	"envoy.config.cluster.v3.Cluster":                                                   on(translateCluster),
	"envoy.config.endpoint.v3.ClusterLoadAssignment":                                    on(nameEndpoints),
	"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext":                        on(withoutPeerExchange),
	"envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue":              on(upstreamFactory),
	"envoy.type.tracing.v3.CustomTag":                                                   on(translateTag),
	"envoy.config.core.v3.SubstitutionFormatString":                                     on(translateFormat),
	"opentelemetry.proto.common.v1.AnyValue":                                            translateAttribute,
	"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter":                   on(translateLogFilter),
}

// markers are what the message rules look for, as bytes: a resource without any of them and without unknown types is
// not unmarshalled. Keys are resource types.
var markers = map[protoreflect.FullName][][]byte{
	"envoy.config.listener.v3.Listener":              {[]byte(peerExchangeALPN), []byte(istioHashableString), []byte("HttpConnectionManager"), []byte("stream_peer")},
	"envoy.config.cluster.v3.Cluster":                {[]byte(istioALPN), []byte("services"), []byte("PassthroughCluster"), []byte("BlackHoleCluster"), []byte(istioHashableString)},
	"envoy.config.endpoint.v3.ClusterLoadAssignment": {[]byte("workload")},
	"envoy.config.core.v3.TypedExtensionConfig":      {[]byte(istioHashableString)},
}
