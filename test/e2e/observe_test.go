//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// TestTracing sends the spans of three services to the store, in three formats, and asks Jaeger's API of it what has come.
func TestTracing(t *testing.T) {
	importJaeger(t, app(t)) // a workload of the scenario
	s := newScenario(t, "tracing")
	query := s.Kubectl(t, "get", "service", "jaeger-query", "-n", "istio-system", "-o", "jsonpath={.spec.clusterIP}")
	s.jaegerAPI = net.JoinHostPort(query, "16686")
	s.addProviders("jaeger.tracing.svc.cluster.local", "jaeger-collector.istio-system.svc.cluster.local")
	s.wantTracing()
}

// TestTracingToJaeger sends them to Jaeger itself.
func TestTracingToJaeger(t *testing.T) {
	n := app(t)
	long(t, "TestTracing compares the same spans in the store, TestPolyglot those of five languages in Jaeger")
	importJaeger(t, n)
	s := newScenario(t, "tracing")
	s.addProviders()
	s.wantTracing()
}

func (s *scenario) wantTracing() {
	t := s.t
	for _, provider := range []string{"otlp-grpc", "otlp-http", "zipkin"} {
		t.Run(provider, func(t *testing.T) {
			s := s.in(t)
			s.apply(provider + ".yaml")
			first, spans := s.traced(provider, provider == "zipkin")
			s.wantOneTrace(first, spans)
		})
	}
	t.Run("sampling", func(t *testing.T) { testSampling(t, s) })
	t.Run("tags", func(t *testing.T) { testTags(t, s) })
}

// traced calls until all proxies trace as they should: until there is a request that has made the four spans, in the
// order client, server, client, server. It returns what front has answered to that request.
func (s *scenario) traced(path string, b3 bool, flags ...string) (echoReply, []span) {
	s.t.Helper()
	answers := map[string]echoReply{}
	var answer echoReply
	var spans []span
	target := "http://front:8080/call?url=" + url.QueryEscape("http://back:8080/"+path)
	s.Eventually(s.t, 3*time.Minute, func() (bool, string) {
		out, err := s.call("client", append(append([]string{"get"}, flags...), target)...)
		if err != nil {
			return false, fmt.Sprintf("%s %v", out, err)
		}
		r, err := parseReply(out)
		if err != nil {
			return false, err.Error()
		}
		id, _ := r.traceContext(b3)
		answers[id] = r
		seen := map[string]int{}
		for id, r := range answers {
			if id == "" {
				continue
			}
			found, err := s.spans("traces/" + id)
			if err != nil {
				return false, err.Error()
			}
			seen[id] = len(found)
			if len(found) == 4 {
				answer, spans = r, ordered(found)
				return true, ""
			}
		}
		return false, fmt.Sprintf("traces and their numbers of spans: %v; the last answer: %s", seen, out)
	})
	return answer, spans
}

// wantOneTrace compares the spans of a request with Istio's documentation, and with what the apps received.
func (s *scenario) wantOneTrace(front echoReply, spans []span) {
	t := s.t
	t.Helper()
	if len(spans) != 4 {
		t.Fatalf("the spans are no chain: %+v", spans)
	}
	pods := map[string]string{"client": s.podIP("client"), "front": s.podIP("front"), "back": s.podIP("back")}
	back, err := parseReply(string(front.Called))
	if err != nil {
		t.Fatal(err)
	}
	b3 := front.header("x-b3-traceid") != ""
	for i, want := range []struct {
		service, host, kind, peer, upstream, canonical, revision string
	}{
		{"client", "front", "client", "client", "outbound|8080||front.tracing.svc.cluster.local", "client", "v1"},
		{"front", "front", "server", "client", "inbound|8080||", "shop", "blue"},
		{"front", "back", "client", "front", "outbound|8080||back.tracing.svc.cluster.local", "shop", "blue"},
		{"back", "back", "server", "front", "inbound|8080||", "back", "v3"},
	} {
		got := spans[i]
		if service := want.service + ".tracing"; got.Service != service {
			t.Errorf("span %d is of %s, want %s", i, got.Service, service)
		}
		if name := want.host + ".tracing.svc.cluster.local:8080/*"; got.Name != name {
			t.Errorf("span %d is called %s, want %s", i, got.Name, name)
		}
		seen := front
		if want.host == "back" {
			seen = back
		}
		tags := map[string]string{
			"component": "proxy", "span.kind": want.kind, "downstream_cluster": "-",
			"http.method": "GET", "http.protocol": "HTTP/1.1", "http.status_code": "200", "http.url": "http://" + seen.Host + seen.Path,
			"request_size": "0", "response_flags": "-", "user_agent": "Go-http-client/1.1",
			"guid:x-request-id": seen.header("x-request-id"), "peer.address": pods[want.peer],
			"upstream_cluster": want.upstream, "upstream_cluster.name": want.upstream + ";",
			"istio.canonical_service": want.canonical, "istio.canonical_revision": want.revision, "istio.namespace": "tracing",
			"istio.mesh_id": "cluster.local", "istio.cluster_id": "Kubernetes",
		}
		for name, value := range tags {
			if got.Tags[name] != value {
				t.Errorf("span %d: the tag %s is %q, want %q", i, name, got.Tags[name], value)
			}
		}
		for name, pattern := range map[string]string{
			"response_size": `[1-9]\d*`,
			"node_id":       `sidecar~` + regexp.QuoteMeta(pods[want.service]) + `~` + want.service + `[-a-z0-9]*\.tracing~tracing\.svc\.cluster\.local`,
		} {
			if !regexp.MustCompile("^" + pattern + "$").MatchString(got.Tags[name]) {
				t.Errorf("span %d: the tag %s is %q, want %s", i, name, got.Tags[name], pattern)
			}
			tags[name] = ""
		}
		// What describes the sender and not the request: Zipkin's local endpoint, OpenTelemetry's library.
		for _, name := range []string{"net.host.ip", "zone", "otel.scope.name", "otel.scope.version"} {
			tags[name] = ""
		}
		for name := range got.Tags {
			if _, ok := tags[name]; !ok {
				t.Errorf("span %d has a tag %s=%q that Istio's have not", i, name, got.Tags[name])
			}
		}
		// The app receives the span that called it.
		if id, parent := seen.traceContext(b3); want.kind == "server" && (id != got.Trace || parent != got.ID) {
			t.Errorf("%s received trace %s and span %s, Jaeger has %s and %s", want.host, id, parent, got.Trace, got.ID)
		}
	}
	if b3 && (front.header("x-b3-sampled") != "1" || back.header("x-b3-parentspanid") == "") {
		t.Errorf("B3's headers are %v and %v", front.Headers, back.Headers)
	}
}

// testSampling counts what Telemetry's randomSamplingPercentage lets through, and lets the caller decide instead.
func testSampling(t *testing.T, s *scenario) {
	const calls = 200
	// counted sends many calls. It returns how many of them were marked as traced at the servers, and checks that just
	// these reach Jaeger.
	counted := func(s *scenario, percentage string) int {
		var seen struct{ Traced int }
		path := "http://front:8080/sampled/" + percentage
		out, err := s.call("client", "get", "-n", strconv.Itoa(calls), "-c", "4", path)
		if err == nil {
			err = json.Unmarshal([]byte(out), &seen)
		}
		if err != nil {
			s.t.Fatalf("%s %v", out, err)
		}
		tags, _ := json.Marshal(map[string]string{"http.url": path})
		query := url.Values{"service": {"client.tracing"}, "limit": {"1000"}, "tags": {string(tags)}}
		s.Eventually(s.t, time.Minute, func() (bool, string) {
			spans, err := s.spans("traces?" + query.Encode())
			if err != nil {
				return false, err.Error()
			}
			traces := map[string]bool{}
			for _, span := range spans {
				traces[span.Trace] = true
			}
			return len(traces) == seen.Traced, fmt.Sprintf("Jaeger has %d traces of %d", len(traces), seen.Traced)
		})
		return seen.Traced
	}
	// marked waits until a call with these headers arrives at the server as traced, or not.
	marked := func(s *scenario, traced bool, flags ...string) {
		want := map[bool]string{true: "-01", false: "-00"}[traced]
		s.Eventually(s.t, time.Minute, func() (bool, string) {
			out, err := s.call("client", append(append([]string{"get"}, flags...), "http://front:8080/told")...)
			if err != nil {
				return false, fmt.Sprintf("%s %v", out, err)
			}
			r, err := parseReply(out)
			return err == nil && strings.HasSuffix(r.header("traceparent"), want), "traceparent is " + r.header("traceparent")
		})
	}
	// An app's decision, in W3C's header.
	decided := func(id, flag string) string { return "traceparent: 00-" + id + "-00f067aa0ba902b7-" + flag }

	t.Run("none", func(t *testing.T) {
		s := s.in(t)
		// Envoy writes its decision into x-request-id, which is passed on with the trace.
		s.apply("otlp-grpc.yaml")
		sampled, _ := s.traced("earlier", false)
		s.apply("sample-0.yaml")
		marked(s, false)
		const id = "4bf92f3577b34da6a3ce929d0e0e4736"
		out, err := s.call("client", "get", "-H", "x-request-id: "+sampled.header("x-request-id"), "-H", decided(id, "01"),
			"http://front:8080/call?url=http://back:8080/decided")
		if err != nil {
			t.Fatalf("%s %v", out, err)
		}
		var spans []span
		s.Eventually(t, time.Minute, func() (bool, string) {
			found, err := s.spans("traces/" + id)
			spans = ordered(found)
			return err == nil && len(found) == 4, fmt.Sprintf("Jaeger has %+v %v", found, err)
		})
		if len(spans) != 4 || spans[0].Trace != id || spans[0].Parent != "00f067aa0ba902b7" {
			t.Errorf("the trace that has begun is not continued: %+v", spans)
		}
		if n := counted(s, "0"); n != 0 {
			t.Errorf("%d of %d requests are traced", n, calls)
		}
	})
	t.Run("all", func(t *testing.T) {
		s := s.in(t)
		s.apply("otlp-grpc.yaml")
		marked(s, true)
		if n := counted(s, "100"); n != calls {
			t.Errorf("%d of %d requests are traced", n, calls)
		}
		marked(s, false, "-H", decided("4bf92f3577b34da6a3ce929d0e0e4737", "00"))
	})
	t.Run("half", func(t *testing.T) {
		s := s.in(t)
		s.apply("sample-50.yaml")
		marked(s, true)
		marked(s, false)
		// 5.6 standard deviations: once in fifty million runs.
		if n := counted(s, "50"); n < 60 || n > 140 {
			t.Errorf("%d of %d requests are traced", n, calls)
		}
	})
}

// testTags looks for the tags that Telemetry's customTags ask for, also for those about the other side of a call.
func testTags(t *testing.T, s *scenario) {
	s = s.in(t)
	s.apply("tags.yaml")
	own := map[string]string{"zone": "moon", "tenant": "blue", "pod.namespace": "tracing", "color": "none"}
	want := []map[string]string{
		{"istio.destination_workload": "front-v2", "istio.destination_canonical_service": "shop", "istio.destination_app_version": "v2"},
		{"istio.source_workload": "client", "istio.source_namespace": "tracing", "istio.source_canonical_revision": "v1", "istio.source_app_version": "v1"},
		{"istio.destination_workload": "back", "istio.destination_canonical_service": "back", "istio.destination_app_version": "v3"},
		{"istio.source_workload": "front-v2", "istio.source_namespace": "tracing", "istio.source_canonical_revision": "blue", "istio.source_app_version": "v2"},
	}
	// The servers' proxies keep their old filters on a connection that is there.
	s.Eventually(t, 3*time.Minute, func() (bool, string) {
		answer, spans := s.traced("tags", false, "-H", "x-tenant: blue", "-H", "x-polymesh-caller: mallory;tracing;mallory;v1;Kubernetes;mallory;v1")
		for i, span := range spans {
			for name, value := range want[i] {
				if span.Tags[name] != value {
					return false, fmt.Sprintf("span %d: the tag %s is %q, want %q", i, name, span.Tags[name], value)
				}
			}
			for name := range span.Tags {
				// A client's proxy does not know its caller, and a server's not its own server.
				if _, ok := want[i][name]; !ok && (strings.HasPrefix(name, "istio.source_") || strings.HasPrefix(name, "istio.destination_")) {
					return false, fmt.Sprintf("span %d has a tag %s=%q", i, name, span.Tags[name])
				}
			}
			for name, value := range own {
				if name == "tenant" && i > 1 {
					value = "nobody" // front does not pass the header on
				}
				if span.Tags[name] != value {
					return false, fmt.Sprintf("span %d: the tag %s is %q, want %q", i, name, span.Tags[name], value)
				}
			}
		}
		if caller := answer.header("x-polymesh-caller"); caller != "" {
			return false, "the app sees x-polymesh-caller: " + caller
		}
		return true, ""
	})
}

// TestAccessLogs compares the proxies' logs with Istio's default formats and asks Telemetry for less and for more.
func TestAccessLogs(t *testing.T) {
	s := newScenario(t, "access-logs")
	client, server := regexp.QuoteMeta(s.podIP("client")), regexp.QuoteMeta(s.podIP("server"))
	for _, path := range []string{"/plain", "/routed", "/nowhere"} {
		host := map[bool]string{true: "server", false: "empty"}[path == "/plain"]
		s.Eventually(t, time.Minute, func() (bool, string) {
			// The response is an error if the name has no endpoint; the log contains which one.
			out, err := s.call("client", "get", "http://"+host+":8080"+path)
			lines := s.logged("client", path)
			return len(lines) > 0 && (host == "empty" || err == nil), fmt.Sprintf("%s %v, logged: %q", out, err, lines)
		})
	}

	// https://istio.io/latest/docs/tasks/observability/logs/access-log/#default-access-log-format, one pattern for each field.
	const (
		number, address  = `\d+`, `(?:\d+\.){3}\d+:\d+`
		uuid             = `"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"`
		agent            = `"Go-http-client/1\.1"`
		sni, outbound    = `outbound_\.8080_\._\.server\.access-logs\.svc\.cluster\.local`, `outbound\|8080\|\|server\.access-logs\.svc\.cluster\.local`
		emptyAt, noroute = `outbound\|8080\|\|empty\.access-logs\.svc\.cluster\.local`, `-`
	)
	fields := []string{
		"START_TIME", "method, path, protocol", "RESPONSE_CODE", "RESPONSE_FLAGS", "RESPONSE_CODE_DETAILS",
		"CONNECTION_TERMINATION_DETAILS", "UPSTREAM_TRANSPORT_FAILURE_REASON", "BYTES_RECEIVED", "BYTES_SENT", "DURATION",
		"X-ENVOY-UPSTREAM-SERVICE-TIME", "X-FORWARDED-FOR", "USER-AGENT", "X-REQUEST-ID", ":AUTHORITY", "UPSTREAM_HOST",
		"UPSTREAM_CLUSTER_RAW", "UPSTREAM_LOCAL_ADDRESS", "DOWNSTREAM_LOCAL_ADDRESS", "DOWNSTREAM_REMOTE_ADDRESS",
		"REQUESTED_SERVER_NAME", "ROUTE_NAME",
	}
	start := `\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\]`
	for _, line := range []struct {
		name, side, path string
		patterns         []string
	}{
		{"at the client", "client", "/plain", []string{
			start, `"GET /plain HTTP/1\.1"`, "200", "-", "via_upstream", "-", `"-"`, "0", number, number, number, `"-"`, agent, uuid,
			`"server:8080"`, `"` + server + `:8080"`, outbound, client + `:\d+`, address, client + `:\d+`, "-", "default",
		}},
		{"at the server", "server", "/plain", []string{
			start, `"GET /plain HTTP/1\.1"`, "200", "-", "via_upstream", "-", `"-"`, "0", number, number, number, `"-"`, agent, uuid,
			`"server:8080"`, `"` + server + `:8080"`, `inbound\|8080\|\|`, `127\.0\.0\.6:\d+`, server + `:8080`, client + `:\d+`, sni, "default",
		}},
		{"no healthy upstream", "client", "/routed", []string{
			start, `"GET /routed HTTP/1\.1"`, "503", "UH", "no_healthy_upstream", "-", `"-"`, "0", number, number, "-", `"-"`, agent, uuid,
			`"empty:8080"`, `"-"`, emptyAt, "-", address, client + `:\d+`, "-", "-",
		}},
		{"no route", "client", "/nowhere", []string{
			start, `"GET /nowhere HTTP/1\.1"`, "404", "NR", "route_not_found", "-", `"-"`, "0", "0", number, "-", `"-"`, agent, uuid,
			`"empty:8080"`, `"-"`, noroute, "-", address, client + `:\d+`, "-", "-",
		}},
	} {
		t.Run("text/"+line.name, func(t *testing.T) {
			lines := s.in(t).loggedOnce(line.side, line.path)
			have := logField.FindAllString(lines, -1)
			if len(have) != len(fields) {
				t.Fatalf("%d fields, want %d: %s", len(have), len(fields), lines)
			}
			for i, name := range fields {
				if !regexp.MustCompile("^" + line.patterns[i] + "$").MatchString(have[i]) {
					t.Errorf("%s is %s, want %s", name, have[i], line.patterns[i])
				}
			}
		})
	}
	t.Run("JSON", func(t *testing.T) { testJSONLog(t, s) })
	t.Run("off", func(t *testing.T) { testLogOff(t, s) })
	t.Run("filter", func(t *testing.T) { testLogFilter(t, s) })
	t.Run("the other side", func(t *testing.T) { testLogPeers(t, s) })
}

// logField is a field of the default format: in brackets, in quotes, or without a space.
var logField = regexp.MustCompile(`\[[^\]]*\]|"[^"]*"|\S+`)

func testJSONLog(t *testing.T, s *scenario) {
	s = s.in(t)
	s.changeMesh(func(mesh map[string]any) { mesh["accessLogEncoding"] = "JSON" })
	// EnvoyJSONLogFormatIstio in istio.io/istio/pilot/pkg/model/telemetry_logging.go.
	want := []string{
		"authority", "bytes_received", "bytes_sent", "connection_termination_details", "downstream_local_address",
		"downstream_remote_address", "duration", "method", "path", "protocol", "request_id", "requested_server_name",
		"response_code", "response_code_details", "response_flags", "route_name", "start_time", "upstream_cluster", "upstream_host",
		"upstream_local_address", "upstream_service_time", "upstream_transport_failure_reason", "user_agent", "x_forwarded_for",
	}
	for _, side := range []string{"client", "server"} {
		line := s.loggedJSON(side, "json-"+side)
		if have := slices.Sorted(maps.Keys(line)); !slices.Equal(have, want) {
			t.Errorf("%s: the keys are %q, want %q", side, have, want)
		}
		// Numbers are numbers, and what is not there is null.
		for key, value := range map[string]any{
			"method": "GET", "protocol": "HTTP/1.1", "response_code": float64(200), "bytes_received": float64(0),
			"authority": "server:8080", "x_forwarded_for": nil, "response_flags": "-", "route_name": "default",
		} {
			if line[key] != value {
				t.Errorf("%s: %s is %v, want %v", side, key, line[key], value)
			}
		}
	}
}

// testLogOff: a line that is missing is missing for good when a later one of the same proxy is there.
func testLogOff(t *testing.T, s *scenario) {
	s = s.in(t)
	s.apply("off.yaml")
	try := 0
	s.Eventually(t, 3*time.Minute, func() (bool, string) {
		try++
		if out, err := s.call("client", "get", fmt.Sprintf("http://server:8080/off/%d", try)); err != nil {
			return false, fmt.Sprintf("%s %v", out, err)
		}
		later := fmt.Sprintf("/later/%d", try)
		if out, err := s.call("client", "get", "http://server:8080/call?url=http://client:8080"+later); err != nil {
			return false, fmt.Sprintf("%s %v", out, err)
		}
		s.Eventually(t, time.Minute, func() (bool, string) {
			return len(s.logged("server", later)) > 0, "the server's own call is not logged"
		})
		lines := s.logged("server", fmt.Sprintf("/off/%d", try))
		return len(lines) == 0, fmt.Sprintf("still logged: %q", lines)
	})
	// The other workload is as it was.
	if lines := s.logged("client", fmt.Sprintf("/off/%d", try)); len(lines) != 1 {
		t.Errorf("the client has logged %q", lines)
	}
}

// testLogFilter: where a failure is logged, a success just before it would be too. Until the filter is there, both are, and until the
// part before this one is over, neither.
func testLogFilter(t *testing.T, s *scenario) {
	s = s.in(t)
	s.apply("errors.yaml")
	for _, side := range []string{"client", "server"} {
		good := func(try int) string { return fmt.Sprintf("/good-%s/%d", side, try) }
		bad := func(try int) string { return fmt.Sprintf("/bad-%s/%d?status=418", side, try) }
		try := 0
		s.Eventually(t, 3*time.Minute, func() (bool, string) {
			try++
			if out, err := s.call("client", "get", "http://server:8080"+good(try)); err != nil {
				return false, fmt.Sprintf("%s %v", out, err)
			}
			if out, err := s.call("client", "get", "http://server:8080"+bad(try)); err == nil {
				return false, "no error: " + out
			}
			// Envoy writes its logs once a second, so the lines of this try may come later.
			for earlier := max(1, try-5); earlier <= try; earlier++ {
				if len(s.logged(side, bad(earlier))) == 1 && len(s.logged(side, good(earlier))) == 0 {
					return true, ""
				}
			}
			return false, fmt.Sprintf("of %d failures none is logged without the success before it", try)
		})
	}
}

// testLogPeers: a client's proxy knows whom it calls, a server's who calls it.
func testLogPeers(t *testing.T, s *scenario) {
	s = s.in(t)
	s.addProviders()
	s.apply("who.yaml")
	for side, want := range map[string]map[string]any{
		"client": {"code": float64(200), "called": "server v2", "caller": "- -"},
		"server": {"code": float64(200), "called": "- -", "caller": "client v1"},
	} {
		line := s.loggedJSON(side, "who-"+side)
		delete(line, "path")
		if !maps.Equal(line, want) {
			t.Errorf("the %s has logged %v, want %v", side, line, want)
		}
	}
}

// logged returns the lines of a proxy's log with a path in them.
func (s *scenario) logged(deployment, path string) []string {
	s.t.Helper()
	var lines []string
	end := regexp.MustCompile(regexp.QuoteMeta(path) + `[ "]`)
	for line := range strings.Lines(s.Kubectl(s.t, "logs", "-n", s.name, "deployment/"+deployment, "-c", "istio-proxy")) {
		if end.MatchString(line) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// loggedOnce waits for the line of a request that was made. Envoy writes its logs once a second.
func (s *scenario) loggedOnce(deployment, path string) string {
	s.t.Helper()
	var lines []string
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		lines = s.logged(deployment, path)
		return len(lines) > 0, "no line with " + path
	})
	return lines[len(lines)-1]
}

// loggedJSON calls the server until a proxy logs a call in JSON.
func (s *scenario) loggedJSON(deployment, path string) map[string]any {
	s.t.Helper()
	var found map[string]any
	s.Eventually(s.t, 3*time.Minute, func() (bool, string) {
		if out, err := s.call("client", "get", "http://server:8080/"+path); err != nil {
			return false, fmt.Sprintf("%s %v", out, err)
		}
		lines := s.logged(deployment, "/"+path)
		for _, line := range lines {
			if strings.HasPrefix(line, "{") {
				found = nil
				err := json.Unmarshal([]byte(line), &found)
				return err == nil, fmt.Sprintf("%s: %v", line, err)
			}
		}
		return false, fmt.Sprintf("no JSON in %q", lines)
	})
	return found
}

// span is a span as Jaeger reports it.
type span struct {
	Trace, ID, Parent string
	Service, Name     string
	Tags              map[string]string
}

// spans asks Jaeger's API; a trace that it does not know has no spans.
func (s *scenario) spans(query string) ([]span, error) {
	s.t.Helper()
	api := s.jaegerAPI
	if api == "" {
		api = net.JoinHostPort(s.podIP("jaeger"), "16686")
	}
	response, err := s.HTTPInside(false).Get("http://" + api + "/api/" + query)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusNotFound {
		return nil, nil
	}
	var result struct {
		Data []struct {
			Processes map[string]struct{ ServiceName string }
			Spans     []struct {
				TraceID, SpanID, OperationName, ProcessID string
				References                                []struct{ RefType, SpanID string }
				Tags                                      []struct {
					Key   string
					Value any
				}
			}
		}
	}
	if err := json.NewDecoder(response.Body).Decode(&result); err != nil || response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("Jaeger's answer to %s: %s, %w", query, response.Status, err)
	}
	var spans []span
	for _, trace := range result.Data {
		for _, found := range trace.Spans {
			one := span{
				Trace: found.TraceID, ID: found.SpanID, Name: found.OperationName, Service: trace.Processes[found.ProcessID].ServiceName,
				Tags: map[string]string{},
			}
			for _, reference := range found.References {
				if reference.RefType == "CHILD_OF" {
					one.Parent = reference.SpanID
				}
			}
			for _, tag := range found.Tags {
				one.Tags[tag.Key] = fmt.Sprint(tag.Value)
			}
			spans = append(spans, one)
		}
	}
	return spans, nil
}

// ordered puts the spans of a chain of calls in order, each after its parent. Spans that are no chain are left out.
func ordered(spans []span) []span {
	known := map[string]bool{}
	children := map[string]span{}
	for _, span := range spans {
		known[span.ID] = true
		children[span.Parent] = span
	}
	var chain []span
	for _, first := range spans {
		if known[first.Parent] {
			continue
		}
		for next, ok := first, true; ok && len(chain) <= len(spans); next, ok = children[next.ID] {
			chain = append(chain, next)
		}
	}
	return chain
}

// header returns a header that the app has seen.
func (r echoReply) header(name string) string { return http.Header(r.Headers).Get(name) }

// traceContext is the trace and the span that the app received, in B3's headers or in W3C's.
func (r echoReply) traceContext(b3 bool) (trace, span string) {
	if b3 {
		return r.header("x-b3-traceid"), r.header("x-b3-spanid")
	}
	if parts := strings.Split(r.header("traceparent"), "-"); len(parts) == 4 {
		return parts[1], parts[2]
	}
	return "", ""
}

// addProviders adds the providers in the scenario's mesh.yaml to the mesh configuration.
func (s *scenario) addProviders(oldnew ...string) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, "mesh.yaml"))
	if err != nil {
		s.t.Fatal(err)
	}
	var added struct{ ExtensionProviders []any }
	if err := yaml.Unmarshal([]byte(strings.NewReplacer(oldnew...).Replace(string(text))), &added); err != nil {
		s.t.Fatal(err)
	}
	s.changeMesh(func(mesh map[string]any) {
		providers, _ := mesh["extensionProviders"].([]any)
		mesh["extensionProviders"] = append(providers, added.ExtensionProviders...)
	})
}

// changeMesh changes the mesh configuration, as `kubectl edit configmap istio -n istio-system` does, and brings it back when the
// test ends, with the installer as its owner: else an upgrade would respect it as the user's (docs/mesh/install.md).
func (s *scenario) changeMesh(change func(mesh map[string]any)) {
	t := s.t
	t.Helper()
	configs := s.Client(t).CoreV1().ConfigMaps("istio-system")
	old, err := configs.Get(t.Context(), "istio", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mesh := map[string]any{}
	if err := yaml.Unmarshal([]byte(old.Data["mesh"]), &mesh); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.ExplainNow(t)
		before, err := json.Marshal(&corev1.ConfigMap{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
			ObjectMeta: metav1.ObjectMeta{Name: old.Name, Namespace: old.Namespace, Labels: old.Labels, Annotations: old.Annotations},
			Data:       old.Data,
		})
		if err == nil {
			force := true
			_, err = configs.Patch(context.Background(), old.Name, types.ApplyPatchType, before, metav1.PatchOptions{FieldManager: "istio-operator", Force: &force})
		}
		if err != nil {
			t.Errorf("bring back the mesh configuration: %v", err)
		}
	})
	change(mesh)
	text, err := yaml.Marshal(mesh)
	if err != nil {
		t.Fatal(err)
	}
	changed := old.DeepCopy()
	changed.Data["mesh"] = string(text)
	if _, err := configs.Update(t.Context(), changed, metav1.UpdateOptions{FieldManager: "kubectl-edit"}); err != nil {
		t.Fatal(err)
	}
}
