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
	// labelsKey is where the labels of an endpoint's workload stand, if Istio's text, under workloadKey in its own metadata, does not
	// say them (workload.Workload's LabelsApart).
	labelsKey   = "labels"
	workloadKey = "workload"
)

// clusterMetadata is the format string for a value that translateCluster wrote.
func clusterMetadata(key string) string {
	return fmt.Sprintf("%%METADATA(CLUSTER:%s:%s)%%", ownMetadata, key)
}

// endpointMetadata is the format string for a value in an endpoint's metadata.
func endpointMetadata(namespace, key string) string {
	return fmt.Sprintf("%%METADATA(UPSTREAM_HOST:%s:%s)%%", namespace, key)
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

// nameEndpoint completes what Istio says about an endpoint's workload, where the labels app and version are missing. Mostly
// they are what the rest of the text lets expect, and the endpoint stays as it is: a mesh has them by the thousand.
func nameEndpoint(s *surroundings, e *edits, from, to int) error {
	endpoint := e.in[from:to]
	said, ok := workload.Split(at(valueIn(filterMetadata(endpoint, lbEndpointMetadata, istioMetadata), workloadKey), valueString))
	if !ok || s.assignment == nil {
		return nil
	}
	of := s.assignment
	if s.endpoints != nil && (!of.asked || of.namespace != string(said.Namespace())) {
		of.namespace, of.asked = string(said.Namespace()), true
		of.labels = s.endpoints(of.host, of.namespace)
	}
	labels := of.labels[string(at(endpoint, lbEndpoint, endpointAddress, addressSocket, socketAddress))]
	if apart := said.LabelsApart(labels["app"], labels["version"]); apart != "" {
		e.addMetadata(from, to, lbEndpointMetadata, text{labelsKey, apart})
	}
	return nil
}
