package dialect_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protojson"
	"istio.io/api/envoy/extensions/stats"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// TestExpressions: Envoy accepts every expression that a label can be set to, and the label has the expected value. PORT is the
// listener's.
func TestExpressions(t *testing.T) {
	const times = `timestamp("2020-02-03T04:05:06.007Z")`
	cases := []struct{ expression, want string }{
		// From Istio's documentation.
		{`string(destination.port)`, "PORT"},
		{`request.host`, "example.com"},
		{`has(request.host) ? request.host : "unknown"`, "example.com"},
		{`istio_operationId`, "unknown"},
		// String literals.
		{`"blue"`, "blue"},
		{`'blue'`, "blue"},
		{`"100%"`, "100%"},
		{`'a)% b'`, "a)% b"},
		{`request.method + ":" + request.url_path`, "GET:/a"},
		{`"code " + string(response.code + 1)`, "code 201"},
		{`request.headers['x-tenant'] + request.method`, "blueGET"},
		// Attributes.
		{`string(response.code)`, "200"},
		{`response.code`, "200"},
		{`request.headers['x-tenant']`, "blue"},
		{`request.headers["none"]`, "unknown"},
		{`connection.mtls`, "false"},
		{`node.id`, "the-node"},
		{`xds.node.id`, "the-node"},
		{`listener_direction`, "2"},
		// Operators and functions.
		{`response.code == 200`, "true"},
		{`response.code != 200 || !(response.code > 5 && response.code >= 5)`, "false"},
		{`response.code < 5 && response.code <= 5`, "false"},
		{`(response.code)%7`, "4"},
		{`-(response.code / 10 - 3 * 2)`, "-14"},
		{`response.code in [404, 200]`, "true"},
		{`request.headers['x-tenant'] in ['a):3%', ')%', '100%', 'blue'] ? 'yes' : string(1)`, "yes"},
		{`"x-none" in request.headers ? request.headers["x-none"] : string(response.code)`, "200"},
		{`int(request.headers['x-number']) * 2`, "42"},
		{`uint(request.headers['x-number'])`, "21"},
		{`double(request.headers['x-number']) / 2.0`, "10.5"},
		{`size(request.method)`, "3"},
		{`request.method.size()`, "3"},
		{`request.headers['x-tenant'].startsWith('bl') && request.method.endsWith("T") && request.host.contains('.')`, "true"},
		{`request.url_path.matches('^/[a-z]$')`, "true"},
		{`request.url_path.matches('^/(a|api/v[0-9]+/(orders|items)/[^/]+)$')`, "true"},
		{`request.url_path.matches('/' + request.host)`, "unknown"},
		{`re.extract(request.url_path, '^/(.)', r'\1')`, "a"},
		{`re.capture(request.url_path, '^/(.)')`, "a"},
		{times + `.getFullYear() + ` + times + `.getMonth() + ` + times + `.getDate() + ` + times + `.getDayOfMonth()`, "2026"},
		{times + `.getDayOfWeek() + ` + times + `.getDayOfYear() + ` + times + `.getHours()`, "38"},
		{times + `.getMinutes() + ` + times + `.getSeconds() + ` + times + `.getMilliseconds()`, "18"},
		{`duration("90s").getSeconds()`, "90"},
		// The peer, which is unknown here.
		{`filter_state.upstream_peer.workload`, "unknown"},
		{`filter_state["upstream_peer"].version == "v1"`, "unknown"},
		// What Envoy cannot compile.
		{`string(response.code) == "200"`, "unknown"},
		{`request.host.lowerAscii()`, "unknown"},
		{`[1].map(x, x)`, "unknown"},
		{`[1, 2].exists(x, x == response.code)`, "unknown"},
		{`nosuch(1)`, "unknown"},
		{`re.nosuch(1)`, "unknown"},
		{`1 +`, "unknown"},
		{`size()`, "unknown"},
		{`size(request.host, 1)`, "unknown"},
		{`request.host.int()`, "unknown"},
		{`request.host.contains()`, "unknown"},
		{`matches(request.host, "a")`, "unknown"},
		{`re.extract(request.host, "a")`, "unknown"},
		{"request.headers.`x-tenant`", "unknown"},
		{strings.Repeat("-(", 60) + `response.code` + strings.Repeat(")", 60), "unknown"},
		{`{"a": 1}`, "unknown"},
		{`Type{a: 1}`, "unknown"},
		{`request.url_path.matches('(')`, "unknown"},
		{`request.url_path.matches('` + strings.Repeat("(abc|d[ef])?", 40) + `')`, "unknown"},
		{`request.url_path.matches('` + strings.Repeat(`\\pL`, 20) + `')`, "unknown"},
		// Expressions that fail only at evaluation.
		{`request.url_path.matches(request.headers["none"])`, "unknown"},
		{`int(request.host)`, "unknown"},
		{`timestamp("yesterday").getHours()`, "unknown"},
		{`duration("long").getHours()`, "unknown"},
		{`int("one")`, "unknown"},
		{`re.extract(request.host, "(", "a")`, "unknown"},
		{`re.extract(request.host, "a", "\\9")`, "unknown"},
		{`re.capture(request.host, '` + strings.Repeat("(abc|d[ef])?", 40) + `')`, "unknown"},
		{`[1] + [2]`, "unknown"},
		{`request.host.getHours("nowhere")`, "unknown"},
		{`"a".b`, "unknown"},
		{`size(1)`, "unknown"},
		{`1 / 0`, "unknown"},
	}
	overrides := &stats.MetricConfig{Name: "requests_total", Dimensions: map[string]string{}}
	for i, c := range cases {
		overrides.Dimensions[fmt.Sprintf("label_%d", i)] = c.expression
	}
	direct := &route.Route{
		Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
		Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{Status: http.StatusOK}},
	}
	manager := &hcm.HttpConnectionManager{
		StatPrefix: "http",
		RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{VirtualHosts: []*route.VirtualHost{{
			Name: "all", Domains: []string{"*"}, Routes: []*route.Route{direct},
		}}}},
		HttpFilters: []*hcm.HttpFilter{
			{Name: "istio.stats", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: toAny(t, &stats.PluginConfig{Metrics: []*stats.MetricConfig{overrides}})}},
			{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: toAny(t, &router.Router{})}},
		},
	}
	l := &listener.Listener{
		Name:             "l",
		TrafficDirection: core.TrafficDirection_OUTBOUND,
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "127.0.0.1", PortSpecifier: &core.SocketAddress_PortValue{},
		}}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: toAny(t, manager)},
		}}}},
	}
	translated := &hcm.HttpConnectionManager{}
	firstFilter(t, toAny(t, l), translated)
	l.FilterChains[0].Filters[0].ConfigType = &listener.Filter_TypedConfig{TypedConfig: toAny(t, translated)}
	js, err := protojson.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	admin := socketDir(t) + "/admin"
	envoy := runEnvoy(t, fmt.Sprintf(`{"node": {"id": "the-node", "cluster": "c"}, "admin": {"address": {"pipe": {"path": %q}}}, "static_resources": {"listeners": [%s]}}`,
		admin, js), admin, nil)

	var listeners struct {
		Statuses []struct {
			LocalAddress struct {
				SocketAddress struct {
					Port int `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(envoy.get(t, "/listeners?format=json"), &listeners); err != nil || len(listeners.Statuses) != 1 {
		t.Fatalf("listeners: %+v %v", listeners, err)
	}
	port := listeners.Statuses[0].LocalAddress.SocketAddress.Port
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://example.com/a?b=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Tenant", "blue")
	req.Header.Set("X-Number", "21")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("%v\n%s", err, envoy.log)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()

	var family *dto.MetricFamily
	waitFor(t, envoy, "the request in istio_requests_total", func() bool {
		var text bytes.Buffer
		if err := exposition.Rewrite(&text, bytes.NewReader(envoy.get(t, "/stats/prometheus")), workload.Workload{}); err != nil {
			t.Fatal(err)
		}
		p := expfmt.NewTextParser(model.LegacyValidation)
		families, err := p.TextToMetricFamilies(&text)
		if err != nil {
			t.Fatal(err)
		}
		family = families["istio_requests_total"]
		return family != nil
	})
	have := map[string]string{}
	for _, l := range family.Metric[0].Label {
		have[l.GetName()] = l.GetValue()
	}
	for i, c := range cases {
		want := strings.ReplaceAll(c.want, "PORT", fmt.Sprint(port))
		if got := have[fmt.Sprintf("label_%d", i)]; got != want {
			t.Errorf("%s is %q, want %q", c.expression, got, want)
		}
	}
}
