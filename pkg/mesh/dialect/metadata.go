package dialect

import (
	"fmt"
	"strings"

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

// endpointMetadata is the format string for a value that nameEndpoint wrote.
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
func translateCluster(_ *surroundings, e *edits, from, to int) error {
	cluster := e.in[from:to]
	own := make([]text, 0, 2)
	if alpn := httpALPN(cluster); alpn != "" {
		own = append(own, text{alpnKey, alpn})
	}
	if service := serviceOf(cluster); service != "" {
		own = append(own, text{serviceKey, service})
	}
	e.addMetadata(from, to, clusterMetadataField, own...)
	return nil
}

// serviceOf is the service that a cluster stands for, as serviceKey has it.
func serviceOf(cluster []byte) string {
	if name := at(cluster, clusterName); unnamed[string(name)] {
		return ";" + string(name) + ";"
	}
	services, _ := entry(filterMetadata(cluster, clusterMetadataField, istioMetadata), structFields, "services")
	for first := range each(at(services, valueList), listValues) {
		service := at(first, valueStruct)
		host, name := textIn(service, "host"), textIn(service, "name")
		if name == "" {
			name, _, _ = strings.Cut(host, ".")
		}
		return host + ";" + name + ";" + textIn(service, "namespace")
	}
	return ""
}

// assignment is the service of some endpoints, and the labels of the workloads behind it, by address: all in one namespace,
// but for some that a ServiceEntry selects.
type assignment struct {
	host, namespace string
	asked           bool
	labels          map[string]map[string]string
}

func noteAssignment(s *surroundings, b []byte) ([]byte, bool, error) {
	name, _ := last(b, assignmentCluster)
	_, _, host, _ := model.ParseSubsetKey(string(name))
	s.assignment = &assignment{host: string(host)}
	return b, false, nil
}

// nameEndpoint completes what Istio says about an endpoint's workload, where the labels app and version are missing.
func nameEndpoint(s *surroundings, e *edits, from, to int) error {
	endpoint := e.in[from:to]
	w, ok := workload.Parse(textIn(filterMetadata(endpoint, lbEndpointMetadata, istioMetadata), "workload"))
	if !ok || s.assignment == nil {
		return nil
	}
	of := s.assignment
	if s.endpoints != nil && (!of.asked || of.namespace != w.Namespace) {
		of.labels = s.endpoints(of.host, w.Namespace)
		of.namespace, of.asked = w.Namespace, true
	}
	labels := of.labels[string(at(endpoint, lbEndpoint, endpointAddress, addressSocket, socketAddress))]
	w.App, w.Version = labels["app"], labels["version"]
	e.addMetadata(from, to, lbEndpointMetadata, text{workloadKey, w.String()})
	return nil
}
