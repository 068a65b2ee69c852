package dialect

import (
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// extensionRule translates the configuration of one of Istio's extensions. A nil result removes the extension.
type extensionRule func(*anypb.Any) (*anypb.Any, error)

// noCounterpart is the rule for extensions without an upstream counterpart; docs/mesh/dialect.md lists what is lost. It must
// not be used for extensions that affect access decisions.
func noCounterpart(*anypb.Any) (*anypb.Any, error) { return nil, nil }

// extensionRules cover the extensions that Istio generates and upstream Envoy lacks. Sources:
// istio.io/istio/pilot/pkg/xds/filters/filters.go and pilot/pkg/model/telemetry.go.
var extensionRules = map[protoreflect.FullName]extensionRule{
	"istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig": alpnFilter,
	"stats.PluginConfig":                                            noCounterpart, // already converted to an access logger, see stats.go
	"io.istio.http.peer_metadata.Config":                            noCounterpart,
	"envoy.tcp.metadataexchange.config.MetadataExchange":            noCounterpart,
	"envoy.extensions.network_filters.peer_metadata.Config":         noCounterpart,
	"envoy.extensions.network_filters.peer_metadata.UpstreamConfig": noCounterpart,
}

// surroundings is the context of a rule outside its message, including what the walk has met on the way down.
type surroundings struct {
	endpoints Endpoints
	parts     *parts
	within
}

// within is context that applies inside a message but not to its siblings.
type within struct {
	// inbound is set inside of a listener for traffic to the workload.
	inbound bool
	// exclusion is an encoded filter that keeps the existing loggers of a tcp_proxy from logging the entries added for metrics.
	exclusion []byte
	// tcp are the metrics loggers for the tcp_proxy of the filter chain.
	tcp *loggers
	// assignment is the service of the endpoints in this message.
	assignment *assignment
}

// messageRule changes a message in place and reports whether it changed.
type messageRule func(*surroundings, proto.Message) (bool, error)

// forType adapts a function on one message type to a messageRule.
func forType[M proto.Message](f func(*surroundings, M) (bool, error)) messageRule {
	return func(s *surroundings, m proto.Message) (bool, error) { return f(s, m.(M)) }
}

// messageRules are changes outside extension positions. They run before the message is walked.
var messageRules = map[protoreflect.FullName]messageRule{
	"envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue": forType(upstreamFactory),
	"envoy.type.tracing.v3.CustomTag":                                      forType(translateTag),
	"envoy.config.core.v3.SubstitutionFormatString":                        forType(translateFormat),
	"opentelemetry.proto.common.v1.AnyValue":                               translateAttribute,
	"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter":      forType(translateLogFilter),
}

// markers are the byte strings that the message rules search for: a message without its marker is not decoded.
var markers = map[protoreflect.FullName]string{
	"envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue": istioHashableString,
	"envoy.type.tracing.v3.CustomTag":                                      anyPeer,
	"envoy.config.core.v3.SubstitutionFormatString":                        anyPeer,
	"opentelemetry.proto.common.v1.AnyValue":                               anyPeer,
	"envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter":      anyPeer,
}

// wireRule is a rule for message types that are numerous: it works on the wire format. Either part may be nil.
type wireRule struct {
	// enter is called before the contents are walked. It may record something in the surroundings, and may return a replacement
	// to be walked instead.
	enter func(*surroundings, []byte) ([]byte, bool, error)
	// leave is called afterwards, to edit fields that the walk does not visit. The message is in[from:to].
	leave func(s *surroundings, e *edits, from, to int) error
}

var wireRules = map[protoreflect.FullName]wireRule{
	"envoy.config.listener.v3.Listener":                                                 {enter: noteDirection},
	"envoy.config.listener.v3.FilterChain":                                              {enter: noteTCPStats, leave: oneIdentity},
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy":                            {enter: noteTCPLogs, leave: addTCPLogs},
	"envoy.config.accesslog.v3.AccessLog":                                               {enter: excludeFiltered, leave: excludeUnfiltered},
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
