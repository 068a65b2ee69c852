package dialect

import (
	"testing"

	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// TestFieldNumbers compares the numbers in wire.go with the descriptors of the messages.
func TestFieldNumbers(t *testing.T) {
	for _, c := range []struct {
		m      proto.Message
		fields map[protoreflect.Name]protowire.Number
	}{
		{&anypb.Any{}, map[protoreflect.Name]protowire.Number{"type_url": anyTypeURL, "value": anyValue}},
		{&cluster.Cluster{}, map[protoreflect.Name]protowire.Number{
			"name": clusterName, "transport_socket": clusterTransportSocket, "metadata": clusterMetadataField,
			"typed_extension_protocol_options": clusterProtocolOptions, "transport_socket_matches": clusterSocketMatches,
		}},
		{&cluster.Cluster_TransportSocketMatch{}, map[protoreflect.Name]protowire.Number{"transport_socket": socketMatchSocket}},
		{&core.TransportSocket{}, map[protoreflect.Name]protowire.Number{"typed_config": socketTypedConfig}},
		{&tls.UpstreamTlsContext{}, map[protoreflect.Name]protowire.Number{"common_tls_context": upstreamTLSCommon}},
		{&tls.CommonTlsContext{}, map[protoreflect.Name]protowire.Number{"alpn_protocols": commonTLSALPN}},
		{&upstreamhttp.HttpProtocolOptions{}, map[protoreflect.Name]protowire.Number{
			"explicit_http_config": httpOptionsExplicit, "use_downstream_protocol_config": httpOptionsDownstream,
		}},
		{&upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{}, map[protoreflect.Name]protowire.Number{"http2_protocol_options": explicitHTTP2}},
		{&endpoint.ClusterLoadAssignment{}, map[protoreflect.Name]protowire.Number{
			"cluster_name": assignmentCluster, "endpoints": assignmentEndpoints,
		}},
		{&endpoint.LocalityLbEndpoints{}, map[protoreflect.Name]protowire.Number{"lb_endpoints": localityEndpoints}},
		{&endpoint.LbEndpoint{}, map[protoreflect.Name]protowire.Number{"endpoint": lbEndpoint, "metadata": lbEndpointMetadata}},
		{&endpoint.Endpoint{}, map[protoreflect.Name]protowire.Number{"address": endpointAddress}},
		{&core.Address{}, map[protoreflect.Name]protowire.Number{"socket_address": addressSocket}},
		{&core.SocketAddress{}, map[protoreflect.Name]protowire.Number{"address": socketAddress}},
		{&core.Metadata{}, map[protoreflect.Name]protowire.Number{"filter_metadata": metadataFilter}},
		{&structpb.Struct{}, map[protoreflect.Name]protowire.Number{"fields": structFields}},
		{&structpb.Value{}, map[protoreflect.Name]protowire.Number{
			"string_value": valueString, "struct_value": valueStruct, "list_value": valueList,
		}},
		{&structpb.ListValue{}, map[protoreflect.Name]protowire.Number{"values": listValues}},
		{&listener.Listener{}, map[protoreflect.Name]protowire.Number{"traffic_direction": listenerTrafficDirection}},
		{&listener.FilterChain{}, map[protoreflect.Name]protowire.Number{"filters": chainFilters, "transport_socket": chainTransportSocket}},
		{&listener.Filter{}, map[protoreflect.Name]protowire.Number{"typed_config": filterTypedConfig}},
		{&hcm.HttpConnectionManager{}, map[protoreflect.Name]protowire.Number{"http_filters": httpFilters, "access_log": httpAccessLog}},
		{&hcm.HttpFilter{}, map[protoreflect.Name]protowire.Number{"name": httpFilterName, "typed_config": filterTypedConfig}},
		{&tcp.TcpProxy{}, map[protoreflect.Name]protowire.Number{
			"access_log": tcpAccessLog, "access_log_options": tcpOptions,
			"upstream_connect_mode": tcpConnectMode, "max_early_data_bytes": tcpMaxEarlyData,
		}},
		{&tcp.TcpProxy_TcpAccessLogOptions{}, map[protoreflect.Name]protowire.Number{
			"access_log_flush_interval": tcpOptionsInterval, "flush_access_log_on_connected": tcpOptionsOnConnected,
		}},
		{&accesslog.AccessLog{}, map[protoreflect.Name]protowire.Number{"filter": accessLogFilter}},
		{&accesslog.AccessLogFilter{}, map[protoreflect.Name]protowire.Number{"and_filter": andFilter}},
		{&accesslog.AndFilter{}, map[protoreflect.Name]protowire.Number{"filters": andFilters}},
	} {
		d := c.m.ProtoReflect().Descriptor()
		for name, want := range c.fields {
			if f := d.Fields().ByName(name); f == nil || f.Number() != want {
				t.Errorf("%s.%s is %v, not %d", d.FullName(), name, f, want)
			}
		}
	}
}
