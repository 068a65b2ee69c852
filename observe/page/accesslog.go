package page

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// accessLine is a line of a proxy's access log, in Istio's default text format or as JSON.
// https://istio.io/latest/docs/tasks/observability/logs/access-log/
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

// textFields are the fields of Istio's default format in their order. The request line is three of them in quotes.
var textFields = [...]func(*accessLine, string){
	func(a *accessLine, v string) { a.Start, _ = time.Parse(time.RFC3339Nano, v) },
	func(a *accessLine, v string) { a.request(v) },
	func(a *accessLine, v string) { a.Code, _ = strconv.Atoi(v) },
	func(a *accessLine, v string) { a.Flags = v },
	func(a *accessLine, v string) { a.Details = v },
	func(a *accessLine, v string) { a.Termination = v },
	func(a *accessLine, v string) { a.Failure = v },
	func(a *accessLine, v string) { a.Received, _ = strconv.ParseInt(v, 10, 64) },
	func(a *accessLine, v string) { a.Sent, _ = strconv.ParseInt(v, 10, 64) },
	func(a *accessLine, v string) { a.Duration, _ = strconv.ParseFloat(v, 64) },
	func(a *accessLine, v string) { a.ServiceTime = v },
	func(a *accessLine, v string) { a.ForwardedFor = v },
	func(a *accessLine, v string) { a.UserAgent = v },
	func(a *accessLine, v string) { a.RequestID = v },
	func(a *accessLine, v string) { a.Authority = v },
	func(a *accessLine, v string) { a.UpstreamHost = v },
	func(a *accessLine, v string) { a.UpstreamCluster = v },
	func(a *accessLine, v string) { a.UpstreamLocal = v },
	func(a *accessLine, v string) { a.Local = v },
	func(a *accessLine, v string) { a.Remote = v },
	func(a *accessLine, v string) { a.ServerName = v },
	func(a *accessLine, v string) { a.Route = v },
}

// maxAccessLine bounds what is read as one.
const maxAccessLine = 64 << 10

// parseAccessLine reads a line of a proxy. ok is false if it is not of an access log: the proxies write other things, too.
func parseAccessLine(text string) (line accessLine, ok bool) {
	switch {
	case len(text) > maxAccessLine:
		return accessLine{}, false
	case strings.HasPrefix(text, "["):
		ok = line.parseText(text)
	case strings.HasPrefix(text, "{"):
		ok = line.parseJSON(text)
	}
	if !ok {
		return accessLine{}, false
	}
	line.Meaning = flagMeaning(line.Flags)
	line.classify()
	return line, true
}

func (a *accessLine) parseText(text string) bool {
	tokens, ok := accessTokens(text)
	// A connection without HTTP has `- - -` as its request line. Formats with more fields at the end are read as far as they are known.
	if !ok || len(tokens) < len(textFields) {
		return false
	}
	for i, set := range textFields {
		if tokens[i] != "-" {
			set(a, tokens[i])
		}
	}
	return !a.Start.IsZero()
}

// accessTokens splits a line at spaces. Text in quotes or brackets is one token.
func accessTokens(text string) (tokens []string, ok bool) {
	for text = strings.TrimSpace(text); text != ""; text = strings.TrimLeft(text, " ") {
		end, rest := " ", 0
		switch text[0] {
		case '[':
			// Only the time is in brackets; IPv6 addresses are followed by a port.
			if len(tokens) == 0 {
				end, rest = "]", 1
			}
		case '"':
			end, rest = `"`, 1
		}
		text = text[rest:]
		token, after, found := strings.Cut(text, end)
		if !found && rest > 0 {
			return nil, false
		}
		// Envoy does not escape quotes in headers, so a quote only ends a token before a space or at the end.
		for rest > 0 && end == `"` && after != "" && after[0] != ' ' {
			more, next, found := strings.Cut(after, end)
			if !found {
				return nil, false
			}
			token, after = token+end+more, next
		}
		tokens = append(tokens, token)
		if len(tokens) > 2*len(textFields) {
			return nil, false
		}
		text = after
	}
	return tokens, true
}

// request reads "GET /path HTTP/1.1". The path may have spaces.
func (a *accessLine) request(text string) {
	method, rest, _ := strings.Cut(text, " ")
	path, protocol := rest, ""
	if i := strings.LastIndexByte(rest, ' '); i >= 0 {
		path, protocol = rest[:i], rest[i+1:]
	}
	clean := func(s string) string {
		if s == "-" {
			return ""
		}
		return s
	}
	a.Method, a.Path, a.Protocol = clean(method), clean(path), clean(protocol)
}

func (a *accessLine) parseJSON(text string) bool {
	var fields map[string]any
	if json.Unmarshal([]byte(text), &fields) != nil {
		return false
	}
	str := func(key string) string {
		switch v := fields[key].(type) {
		case string:
			return v
		case float64:
			return strconv.FormatFloat(v, 'f', -1, 64)
		}
		return ""
	}
	number := func(key string) float64 { v, _ := strconv.ParseFloat(str(key), 64); return v }
	// An app's own JSON line has some of these, but not the proxy's.
	if _, ok := fields["response_flags"]; !ok {
		return false
	}
	start, err := time.Parse(time.RFC3339Nano, str("start_time"))
	if err != nil {
		return false
	}
	*a = accessLine{
		Start: start, Method: str("method"), Path: str("path"), Protocol: str("protocol"), Code: int(number("response_code")), Flags: str("response_flags"),
		Details: str("response_code_details"), Termination: str("connection_termination_details"), Failure: str("upstream_transport_failure_reason"),
		Received: int64(number("bytes_received")), Sent: int64(number("bytes_sent")), Duration: number("duration"), ServiceTime: str("upstream_service_time"),
		ForwardedFor: str("x_forwarded_for"), UserAgent: str("user_agent"), RequestID: str("request_id"), TraceID: str("trace_id"), Authority: str("authority"),
		UpstreamHost: str("upstream_host"), UpstreamCluster: str("upstream_cluster"), UpstreamLocal: str("upstream_local_address"),
		Local: str("downstream_local_address"), Remote: str("downstream_remote_address"), ServerName: str("requested_server_name"), Route: str("route_name"),
	}
	if a.Flags == "-" {
		a.Flags = ""
	}
	return true
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

// probe reports whether it is a health check or a scrape, which no one looks for.
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
