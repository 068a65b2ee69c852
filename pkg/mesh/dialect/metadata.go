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

// isHost is what names and hosts of services are made of. Others would move the values beside them.
var isHost = regexp.MustCompile(`^[A-Za-z0-9*:._-]*$`)

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
		namespace := textIn(service, "namespace")
		if !isHost.MatchString(host) || !isHost.MatchString(name) || !isHost.MatchString(namespace) {
			return ""
		}
		return host + ";" + name + ";" + namespace
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
// they are what the rest of the text lets expect, and the endpoint stays as it is: a mesh has them by the thousand. A text that is not
// made of names is taken away: istiod copies owner references and annotations, in which a pod's or a WorkloadEntry's author may write
// anything, and every client's metrics and logs would have it.
func nameEndpoint(s *surroundings, e *edits, from, to int) error {
	endpoint := e.in[from:to]
	istio := filterMetadata(endpoint, lbEndpointMetadata, istioMetadata)
	text := at(valueIn(istio, workloadKey), valueString)
	said, ok := workload.Split(text)
	if !ok && len(text) > 0 {
		e.replaceMetadata(to, lbEndpointMetadata, istioMetadata, withText(istio, workloadKey, ""))
	}
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
		e.addMetadata(from, to, lbEndpointMetadata, keyText{labelsKey, apart})
	}
	return nil
}
