package dialect

import (
	"fmt"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	istioMetadata = "istio"
	// ownMetadata is the namespace in filter metadata for what the dialect's filters and loggers read. Format strings
	// cannot index a list or cut a string, so Istio's own metadata is flattened into it.
	ownMetadata = "polymesh"

	serviceHost       = "service_host"
	serviceName       = "service_name"
	serviceNamespace  = "service_namespace"
	workloadName      = "workload"
	workloadNamespace = "namespace"
	canonicalService  = "canonical_service"
	canonicalRevision = "canonical_revision"
	clusterID         = "cluster"
)

// clusterMetadata is the format string for a value that translateCluster wrote.
func clusterMetadata(key string) string {
	return fmt.Sprintf("%%METADATA(CLUSTER:%s:%s)%%", ownMetadata, key)
}

// endpointMetadata is the format string for a value that flattenEndpoint wrote.
func endpointMetadata(key string) string {
	return fmt.Sprintf("%%METADATA(UPSTREAM_HOST:%s:%s)%%", ownMetadata, key)
}

// unnamed are the clusters that stand for no service; their names are the service's in Istio's metrics
// (istio_stats.cc, populatePeerInfo).
var unnamed = map[string]bool{
	"BlackHoleCluster": true, "PassthroughCluster": true, "InboundPassthroughCluster": true,
	"InboundPassthroughClusterIpv4": true, "InboundPassthroughClusterIpv6": true,
}

// translateCluster adds to a cluster's metadata what alpnFilter and the stats loggers read.
func translateCluster(_ *surroundings, c *cluster.Cluster) (bool, error) {
	own := map[string]*structpb.Value{}
	if unnamed[c.Name] {
		own[serviceName] = structpb.NewStringValue(c.Name)
	} else if services := c.GetMetadata().GetFilterMetadata()[istioMetadata].GetFields()["services"].GetListValue().GetValues(); len(services) > 0 {
		service := services[0].GetStructValue().GetFields()
		host := service["host"].GetStringValue()
		name := service["name"].GetStringValue()
		if name == "" {
			name, _, _ = strings.Cut(host, ".")
		}
		setString(own, serviceHost, host)
		setString(own, serviceName, name)
		setString(own, serviceNamespace, service["namespace"].GetStringValue())
	}
	if err := setALPN(c, own); err != nil {
		return false, fmt.Errorf("cluster %s: %w", c.Name, err)
	}
	c.Metadata = addMetadata(c.Metadata, own)
	return len(own) > 0, nil
}

// flattenEndpoint splits what Istio says about an endpoint's workload into one value for each label. The text is
// workload;namespace;canonical service;canonical revision;cluster
// (istio.io/istio/pilot/pkg/networking/util/util.go, AppendLbEndpointMetadata).
func flattenEndpoint(_ *surroundings, e *endpoint.LbEndpoint) (bool, error) {
	text := e.GetMetadata().GetFilterMetadata()[istioMetadata].GetFields()["workload"].GetStringValue()
	parts := strings.Split(text, ";")
	if len(parts) < 5 {
		return false, nil
	}
	own := map[string]*structpb.Value{}
	for i, key := range []string{workloadName, workloadNamespace, canonicalService, canonicalRevision, clusterID} {
		setString(own, key, parts[i])
	}
	if parts[3] == "" {
		setString(own, canonicalRevision, "latest") // the value that Istio does not send
	}
	e.Metadata = addMetadata(e.Metadata, own)
	return len(own) > 0, nil
}

func setString(fields map[string]*structpb.Value, key, value string) {
	if value != "" {
		fields[key] = structpb.NewStringValue(value)
	}
}

func addMetadata(m *core.Metadata, own map[string]*structpb.Value) *core.Metadata {
	if len(own) == 0 {
		return m
	}
	if m == nil {
		m = &core.Metadata{}
	}
	if m.FilterMetadata == nil {
		m.FilterMetadata = map[string]*structpb.Struct{}
	}
	m.FilterMetadata[ownMetadata] = &structpb.Struct{Fields: own}
	return m
}
