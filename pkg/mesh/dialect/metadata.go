package dialect

import (
	"fmt"
	"regexp"
	"strings"

	"istio.io/istio/pilot/pkg/model"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

const (
	istioMetadata = "istio"
	// ownMetadata is the filter metadata namespace that the dialect's filters and loggers read. Format strings
	// cannot index a list or cut a string, so Istio's own metadata is flattened into it.
	ownMetadata = "polymesh"

	// serviceKey is the key of a cluster's service: host;name;namespace.
	serviceKey = "service"
	// labelsKey is the key of the labels of an endpoint's workload, present if they differ from Istio's value under workloadKey in
	// its own namespace (workload.Workload's LabelsApart).
	labelsKey   = "labels"
	workloadKey = "workload"
)

// clusterMetadata returns the format string for a value written by translateCluster.
func clusterMetadata(key string) string {
	return fmt.Sprintf("%%METADATA(CLUSTER:%s:%s)%%", ownMetadata, key)
}

// endpointMetadata returns the format string for a value in an endpoint's metadata.
func endpointMetadata(namespace, key string) string {
	return fmt.Sprintf("%%METADATA(UPSTREAM_HOST:%s:%s)%%", namespace, key)
}

// unnamed are the clusters without a service; Istio's metrics use the cluster's name as service name
// (istio_stats.cc, populatePeerInfo).
var unnamed = map[string]bool{
	"BlackHoleCluster": true, "PassthroughCluster": true, "InboundPassthroughCluster": true,
	"InboundPassthroughClusterIpv4": true, "InboundPassthroughClusterIpv6": true,
}

// translateCluster adds the values that alpnFilter and the stats loggers read to a cluster's metadata.
func translateCluster(_ *surroundings, e *edits, from, to int) error {
	cluster := e.in[from:to]
	own := make([]keyText, 0, 2)
	if alpn := httpALPN(cluster); alpn != "" {
		own = append(own, keyText{alpnKey, alpn})
	}
	if service := serviceOf(cluster); service != "" {
		own = append(own, keyText{serviceKey, service})
	}
	e.addMetadata(from, to, clusterMetadataField, own...)
	return nil
}

// isHost matches the characters of service names and hosts. Others, such as the separator, would shift the neighboring values.
var isHost = regexp.MustCompile(`^[A-Za-z0-9*:._-]*$`)

// serviceOf returns the service of a cluster, in the format of serviceKey.
func serviceOf(cluster []byte) string {
	if name := valueAt(cluster, clusterName); unnamed[string(name)] {
		return ";" + string(name) + ";"
	}
	services, _ := mapEntry(filterMetadata(cluster, clusterMetadataField, istioMetadata), structFields, "services")
	for first := range valuesOf(valueAt(services, valueList), listValues) {
		service := valueAt(first, valueStruct)
		host, name := textIn(service, "host"), textIn(service, "name")
		if name == "" {
			name, _, _ = strings.Cut(host, ".")
		}
		namespace := textIn(service, "namespace")
		if !isHost.MatchString(host) || !isHost.MatchString(name) || !isHost.MatchString(namespace) {
			return ""
		}
		return host + ";" + name + ";" + namespace
	}
	return ""
}

// assignment is the service of a set of endpoints, and the labels of the workloads behind it, by address. All are in one
// namespace, except those that a ServiceEntry selects.
type assignment struct {
	host, namespace string
	asked           bool
	labels          map[string]map[string]string
}

func noteAssignment(s *surroundings, b []byte) ([]byte, bool, error) {
	name, _ := lastValue(b, assignmentCluster)
	_, _, host, _ := model.ParseSubsetKey(string(name))
	s.assignment = &assignment{host: string(host)}
	return b, false, nil
}

// nameEndpoint adds the labels app and version to an endpoint's metadata where Istio's value lacks them. Usually they match the
// defaults derived from the rest of the value, and the endpoint is left alone: a mesh has thousands. A value that does not consist
// of names is removed: istiod copies owner references and annotations, in which the author of a pod or WorkloadEntry can write
// anything, and it would appear in every client's metrics and logs.
func nameEndpoint(s *surroundings, e *edits, from, to int) error {
	endpoint := e.in[from:to]
	istio := filterMetadata(endpoint, lbEndpointMetadata, istioMetadata)
	text := valueAt(valueIn(istio, workloadKey), valueString)
	value, ok := workload.Split(text)
	if !ok && len(text) > 0 {
		e.replaceMetadata(to, lbEndpointMetadata, istioMetadata, withText(istio, workloadKey, ""))
	}
	if !ok || s.assignment == nil {
		return nil
	}
	of := s.assignment
	if s.endpoints != nil && (!of.asked || of.namespace != string(value.Namespace())) {
		of.namespace, of.asked = string(value.Namespace()), true
		of.labels = s.endpoints(of.host, of.namespace)
	}
	labels := of.labels[string(valueAt(endpoint, lbEndpoint, endpointAddress, addressSocket, socketAddress))]
	if apart := value.LabelsApart(labels["app"], labels["version"]); apart != "" {
		e.addMetadata(from, to, lbEndpointMetadata, keyText{labelsKey, apart})
	}
	return nil
}
