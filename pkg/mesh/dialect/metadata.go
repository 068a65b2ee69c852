package dialect

import (
	"fmt"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"istio.io/istio/pilot/pkg/model"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

const (
	istioMetadata = "istio"
	// ownMetadata is the namespace in filter metadata for what the dialect's filters and loggers read. Format strings
	// cannot index a list or cut a string, so Istio's own metadata is flattened into it.
	ownMetadata = "polymesh"

	// serviceKey is where a cluster's service stands: host;name;namespace.
	serviceKey = "service"
	// workloadKey is where an endpoint's workload stands (workload.Workload's String).
	workloadKey = "workload"
)

// clusterMetadata is the format string for a value that translateCluster wrote.
func clusterMetadata(key string) string {
	return fmt.Sprintf("%%METADATA(CLUSTER:%s:%s)%%", ownMetadata, key)
}

// endpointMetadata is the format string for a value that nameEndpoints wrote.
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
		own[serviceKey] = structpb.NewStringValue(";" + c.Name + ";")
	} else if services := c.GetMetadata().GetFilterMetadata()[istioMetadata].GetFields()["services"].GetListValue().GetValues(); len(services) > 0 {
		service := services[0].GetStructValue().GetFields()
		host := service["host"].GetStringValue()
		name := service["name"].GetStringValue()
		if name == "" {
			name, _, _ = strings.Cut(host, ".")
		}
		own[serviceKey] = structpb.NewStringValue(strings.Join([]string{host, name, service["namespace"].GetStringValue()}, ";"))
	}
	if err := setALPN(c, own); err != nil {
		return false, fmt.Errorf("cluster %s: %w", c.Name, err)
	}
	c.Metadata = addMetadata(c.Metadata, own)
	return len(own) > 0, nil
}

// nameEndpoints completes what Istio says about endpoints' workloads, where the labels app and version are missing.
func nameEndpoints(s *surroundings, a *endpoint.ClusterLoadAssignment) (bool, error) {
	_, _, host, _ := model.ParseSubsetKey(a.ClusterName)
	known := map[string]map[string]map[string]string{} // by namespace and address
	changed := false
	for _, locality := range a.Endpoints {
		for _, e := range locality.LbEndpoints {
			w, ok := workload.Parse(e.GetMetadata().GetFilterMetadata()[istioMetadata].GetFields()["workload"].GetStringValue())
			if !ok {
				continue
			}
			if s.endpoints != nil && known[w.Namespace] == nil {
				known[w.Namespace] = s.endpoints(string(host), w.Namespace)
			}
			labels := known[w.Namespace][e.GetEndpoint().GetAddress().GetSocketAddress().GetAddress()]
			w.App, w.Version = labels["app"], labels["version"]
			e.Metadata = addMetadata(e.Metadata, map[string]*structpb.Value{workloadKey: structpb.NewStringValue(w.String())})
			changed = true
		}
	}
	return changed, nil
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
