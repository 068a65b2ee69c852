package page

import (
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/accesslog"
)

// accessLine is a line of a proxy's access log. Callers choose the path, user agent and request id, which can be anything.
type accessLine struct {
	Start    time.Time `json:"start,omitzero"`
	Method   string    `json:"method,omitempty"`
	Path     string    `json:"path,omitempty"`
	Protocol string    `json:"protocol,omitempty"`
	Code     int       `json:"code"`
	Flags    string    `json:"flags,omitempty"`
	// Meaning is what the flags stand for.
	Meaning         string  `json:"meaning,omitempty"`
	Details         string  `json:"details,omitempty"`
	Termination     string  `json:"termination,omitempty"`
	Failure         string  `json:"failure,omitempty"` // of the transport to the called side
	Received        int64   `json:"received"`          // bytes
	Sent            int64   `json:"sent"`
	Duration        float64 `json:"duration"` // in milliseconds
	ServiceTime     string  `json:"serviceTime,omitempty"`
	ForwardedFor    string  `json:"forwardedFor,omitempty"`
	UserAgent       string  `json:"userAgent,omitempty"`
	RequestID       string  `json:"requestId,omitempty"`
	TraceID         string  `json:"traceId,omitempty"`
	Authority       string  `json:"authority,omitempty"`
	UpstreamHost    string  `json:"upstreamHost,omitempty"`
	UpstreamCluster string  `json:"upstreamCluster,omitempty"`
	UpstreamLocal   string  `json:"upstreamLocal,omitempty"`
	Local           string  `json:"local,omitempty"`
	Remote          string  `json:"remote,omitempty"`
	ServerName      string  `json:"serverName,omitempty"`
	Route           string  `json:"route,omitempty"`
	// Direction is what this request was for the proxy: inbound (for its own pod), outbound (of its own pod), or empty.
	Direction string `json:"direction,omitempty"`
	// Service and Port are those that an outbound request is for, from the name of the cluster.
	Service string `json:"service,omitempty"`
	Port    string `json:"port,omitempty"`
}

// parseAccessLine reads a line of a proxy. ok is false if it is not of an access log: the proxies write other things, too.
func parseAccessLine(text string) (line accessLine, ok bool) {
	f, ok := accesslog.Parse(text)
	if !ok {
		return accessLine{}, false
	}
	start, err := time.Parse(time.RFC3339Nano, f["start_time"])
	if err != nil {
		return accessLine{}, false
	}
	line = accessLine{
		Start: start, Method: f["method"], Path: f["path"], Protocol: f["protocol"], Code: int(f.Number("response_code")), Flags: f["response_flags"],
		Meaning: flagMeaning(f["response_flags"]), Details: f["response_code_details"], Termination: f["connection_termination_details"],
		Failure: f["upstream_transport_failure_reason"], Received: int64(f.Number("bytes_received")), Sent: int64(f.Number("bytes_sent")),
		Duration: f.Number("duration"), ServiceTime: f["upstream_service_time"], ForwardedFor: f["x_forwarded_for"], UserAgent: f["user_agent"],
		RequestID: f["request_id"], TraceID: f["trace_id"], Authority: f["authority"], UpstreamHost: f["upstream_host"],
		UpstreamCluster: f["upstream_cluster"], UpstreamLocal: f["upstream_local_address"], Local: f["downstream_local_address"],
		Remote: f["downstream_remote_address"], ServerName: f["requested_server_name"], Route: f["route_name"],
	}
	line.classify()
	return line, true
}

// classify reads the name of the cluster, "outbound|8080||api.shop.svc.cluster.local" or "inbound|8080||".
func (a *accessLine) classify() {
	parts := strings.Split(a.UpstreamCluster, "|")
	// istiod also writes names with semicolons, with "outbound_." for routes by SNI.
	if len(parts) != 4 {
		parts = strings.Split(a.UpstreamCluster, ";")
	}
	switch {
	case len(parts) == 4 && parts[0] == "inbound":
		a.Direction = "inbound"
	case len(parts) == 4 && strings.HasPrefix(parts[0], "outbound"):
		a.Direction, a.Port, a.Service = "outbound", parts[1], parts[3]
	case a.UpstreamCluster == "InboundPassthroughCluster":
		a.Direction = "inbound"
	case a.UpstreamCluster == "PassthroughCluster" || a.UpstreamCluster == "BlackHoleCluster":
		a.Direction, a.Service = "outbound", a.UpstreamCluster
	case strings.HasPrefix(a.ServerName, "outbound_."):
		a.Direction = "inbound"
	}
}

// failed reports whether a response counts as an error, as in the graph.
func (a *accessLine) failed() bool {
	return a.Method != "" && outcomeOf(strconv.Itoa(a.Code), "") == failed || a.Method == "" && a.Flags != ""
}

// probe reports whether it is a health check or a scrape, which are not of interest.
func (a *accessLine) probe() bool {
	return strings.HasPrefix(a.UserAgent, "kube-probe/") || strings.HasPrefix(a.UserAgent, "Prometheus/")
}

// flagMeanings are Envoy's response flags in words.
// https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage#command-operators
var flagMeanings = map[string]string{
	"UH":    "no healthy pod was there",
	"UF":    "the connection to the pod failed",
	"UO":    "too many requests at a time: a circuit breaker was open",
	"NR":    "no route matches the request",
	"NC":    "the service is not known to the proxy",
	"URX":   "gave up after all retries",
	"DC":    "the caller closed the connection",
	"LH":    "the health check of the own pod failed",
	"UT":    "the pod did not respond in time",
	"LR":    "the connection was reset by the proxy",
	"UR":    "the pod reset the connection",
	"UC":    "the pod closed the connection",
	"DI":    "a delay was injected",
	"FI":    "a fault was injected",
	"RL":    "a rate limit was reached",
	"UAEX":  "an authorization service rejected the request",
	"RLSE":  "the rate limit service failed",
	"IH":    "a header of the request is not valid",
	"SI":    "the stream was idle for too long",
	"DPE":   "the request is not valid HTTP",
	"UPE":   "the response is not valid HTTP",
	"UMSDR": "it took longer than the maximum duration of a stream",
	"OM":    "the proxy was short of memory",
	"DF":    "the name could not be resolved",
	"DO":    "requests are dropped on purpose",
	"DT":    "the connection lasted too long",
	"NFCF":  "no filter configuration was found",
	"UDO":   "the response was larger than allowed",
}

// flagMeaning returns what flags stand for, empty if there are none.
func flagMeaning(flags string) string {
	if flags == "" || flags == "-" {
		return ""
	}
	var words []string
	for flag := range strings.SplitSeq(flags, ",") {
		if meaning := flagMeanings[flag]; meaning != "" {
			words = append(words, meaning)
		}
	}
	return strings.Join(words, "; ")
}
