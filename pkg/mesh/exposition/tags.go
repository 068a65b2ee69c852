// Package exposition turns the Prometheus text of a proxy's Envoy into Istio's standard metrics.
//
// Envoy adds the prefix envoy_ to every name, and each tag of a statistic costs time per request. So the dialect uses
// few tags that hold several values (the constants here), and the agent next to Envoy unfolds them at scrape time and
// adds its own workload: Rewrite does the whole translation. Envoy logs TCP connections instead of counting them,
// and the agent counts them (Connections). Serve does both, in Envoy's place. pkg/mesh/dialect uses the constants, cmd/pilot-agent
// calls Serve. Envoy's own statistics pass through unchanged.
package exposition

// Tags of statistics that become several labels, or none. All others become labels unchanged.
const (
	// Peer is the workload of the peer (workload.Workload's String). At a client it lacks app and version, which are in PeerLabels
	// (LabelsApart).
	Peer       = "polymesh_peer"
	PeerLabels = "polymesh_peer_labels"
	// Service is host;name;namespace of the destination's service.
	Service = "polymesh_service"
	// Without lists the labels, separated by commas, that the Telemetry API removes and that are derived from the tags above.
	Without = "polymesh_without"
	// Messages is "requests,responses", the numbers of gRPC messages of a stream, as Envoy's grpc_stats filter writes its
	// state. The value of a counter with this tag is the number of streams with exactly these numbers.
	Messages = "polymesh_messages"
)

// HTTP and TCP are tags that hold several others, in the order of Folded: one tag is cheaper for Envoy than many, and needs
// less configuration.
const (
	HTTP = "polymesh_http"
	TCP  = "polymesh_tcp"
)

// Folded are the tags in HTTP and TCP, by name. Values from peers' certificates come last.
var Folded = map[string][]string{
	HTTP: {Reporter, Service, responseFlags, "response_code", grpcStatus, PeerLabels, Peer, DestinationPrincipal, SourcePrincipal},
	TCP:  {Reporter, Service, responseFlags, "request_protocol", PeerLabels, Peer, DestinationPrincipal, SourcePrincipal},
}

// FoldedBy separates the folded tags. Names cannot contain it. Values from peers may not be names (a certificate from outside
// the mesh), so if the number of values is wrong, none of the peers' values are trusted.
const FoldedBy = "|"

// Names of labels that rules here or in the dialect depend on.
const (
	Reporter                 = "reporter"
	SourcePrincipal          = "source_principal"
	DestinationPrincipal     = "destination_principal"
	DestinationService       = "destination_service"
	DestinationServiceName   = "destination_service_name"
	DestinationNamespace     = "destination_service_namespace"
	ConnectionSecurityPolicy = "connection_security_policy"
	responseFlags            = "response_flags"
	grpcStatus               = "grpc_response_status"
)

// order is the order in Istio's documentation (https://istio.io/latest/docs/reference/config/metrics/). Other labels follow.
var order = []string{
	Reporter,
	"source_workload", "source_workload_namespace", "source_canonical_service", "source_canonical_revision",
	SourcePrincipal, "source_app", "source_version", "source_cluster",
	"destination_workload", "destination_workload_namespace", "destination_canonical_service", "destination_canonical_revision",
	DestinationPrincipal, "destination_app", "destination_version", "destination_cluster",
	DestinationService, DestinationServiceName, DestinationNamespace,
	"request_protocol", "response_code", grpcStatus, responseFlags, ConnectionSecurityPolicy,
}

// help is the HELP text that promtool requires for each metric.
var help = map[string]string{
	"istio_requests_total":                "Requests.",
	"istio_request_duration_milliseconds": "Duration of requests.",
	"istio_request_bytes":                 "Size of request bodies and headers.",
	"istio_response_bytes":                "Size of response bodies and headers.",
	"istio_request_messages_total":        "gRPC messages from clients.",
	"istio_response_messages_total":       "gRPC messages from servers.",
	"istio_tcp_connections_opened_total":  "TCP connections opened.",
	"istio_tcp_connections_closed_total":  "TCP connections closed.",
	"istio_tcp_sent_bytes_total":          "Bytes sent in responses on TCP connections.",
	"istio_tcp_received_bytes_total":      "Bytes received in requests on TCP connections.",
}
