package dialect

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
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

// surroundings are what a rule may know beside the message, and what the walk has met on its way down.
type surroundings struct {
	endpoints Endpoints
	parts     *parts
	within
}

// within is what holds inside of a message and not beside it.
type within struct {
	// inbound is set inside of a listener for traffic to the workload.
	inbound bool
	// quiet is a filter, encoded, for the loggers of a tcp_proxy that must not log all that it now logs.
	quiet []byte
	// tcp are the loggers for the tcp_proxy of the filter chain.
	tcp *loggers
	// assignment is the service whose endpoints these are.
	assignment *assignment
}

// messageRule changes a message in place and reports whether it did.
type messageRule func(*surroundings, proto.Message) (bool, error)

// on makes a messageRule of a function on one type.
func on[M proto.Message](f func(*surroundings, M) (bool, error)) messageRule {
	return func(s *surroundings, m proto.Message) (bool, error) { return f(s, m.(M)) }
}

// messageRules are changes that no extension position asks for. They run before the message is walked.
var messageRules = map[protoreflect.FullName]messageRule{
	"envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue": on(upstreamFactory),
	"envoy.type.tracing.v3.CustomTag":                                      on(translateTag),
	"envoy.config.core.v3.SubstitutionFormatString":                        on(translateFormat),
	"opentelemetry.proto.common.v1.AnyValue":                               translateAttribute,
	"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter":      on(translateLogFilter),
}

// markers are what the message rules look for, as bytes: a message without its marker is not decoded.
var markers = map[protoreflect.FullName]string{
	"envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue": istioHashableString,
	"envoy.type.tracing.v3.CustomTag":                                      anyPeer,
	"envoy.config.core.v3.SubstitutionFormatString":                        anyPeer,
	"opentelemetry.proto.common.v1.AnyValue":                               anyPeer,
	"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter":      anyPeer,
}

// wireRule is a messageRule for what there is much of: it works on the wire format. Either part may be nil.
type wireRule struct {
	// enter is called before what is inside is walked. It may note something in the surroundings, and may return another message
	// to be walked in this one's place.
	enter func(*surroundings, []byte) ([]byte, bool, error)
	// leave is called afterwards, to edit what is no member of the walk: the message is in[from:to].
	leave func(s *surroundings, e *edits, from, to int) error
}

var wireRules = map[protoreflect.FullName]wireRule{
	"envoy.config.listener.v3.Listener":                                                 {enter: noteDirection},
	"envoy.config.listener.v3.FilterChain":                                              {enter: noteTCPStats, leave: oneIdentity},
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy":                            {enter: noteTCPLogs, leave: addTCPLogs},
	"envoy.config.accesslog.v3.AccessLog":                                               {enter: quietFiltered, leave: quietUnfiltered},
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager": {leave: translateHTTP},
	"envoy.config.cluster.v3.Cluster":                                                   {leave: translateCluster},
	"envoy.config.endpoint.v3.ClusterLoadAssignment":                                    {enter: noteAssignment},
	"envoy.config.endpoint.v3.LbEndpoint":                                               {leave: nameEndpoint},
	"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext":                        {leave: withoutPeerExchange},
}

// resources are the types of LDS, CDS, RDS, EDS and ECDS.
var resources = []protoreflect.FullName{
	"envoy.config.listener.v3.Listener", "envoy.config.cluster.v3.Cluster", "envoy.config.route.v3.RouteConfiguration",
	"envoy.config.endpoint.v3.ClusterLoadAssignment", "envoy.config.core.v3.TypedExtensionConfig",
}
