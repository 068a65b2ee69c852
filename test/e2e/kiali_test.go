//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"polymesh.dev/polymesh/test/e2e/node"
)

// The window in which both graphs count, and how far before the present it ends, so that what was scraped until then is stored.
const (
	kialiWindow = time.Minute
	kialiDelay  = 5 * time.Second
)

// TestKiali lets Kiali's back end draw the graph of a namespace from the store's APIs, and compares it with the page's.
func TestKiali(t *testing.T) {
	s := newScenario(t, "kiali")
	s.apply("access.yaml")
	s.jaegerAPI = s.serviceAddress("jaeger-query", 16686)
	stop := s.keepCalling()
	defer stop()
	byGRPC := s.startKiali(20101, map[string]any{"in_cluster_url": "http://" + s.serviceAddress("tracing", 16685) + "/jaeger", "use_grpc": true})
	byHTTP := s.startKiali(20102, map[string]any{"in_cluster_url": "http://" + s.serviceAddress("tracing", 80), "use_grpc": false})

	end := s.waitCounted()
	page := s.pageGraph(end)
	t.Run("graph", func(t *testing.T) { byGRPC.in(t).wantGraph(end, page) })
	t.Run("services", func(t *testing.T) { byGRPC.in(t).wantServices(end) })
	t.Run("metrics", func(t *testing.T) { byGRPC.in(t).wantMetrics(end, page) })
	t.Run("settings", func(t *testing.T) { byGRPC.in(t).wantSettings() })
	t.Run("traces by gRPC", func(t *testing.T) { byGRPC.in(t).wantTraces(end) })
	t.Run("traces by HTTP", func(t *testing.T) { byHTTP.in(t).wantTraces(end) })
	for _, k := range []*kiali{byGRPC, byHTTP} {
		k.wantNoErrors()
	}
}

// serviceAddress returns the address of a port of a Service in istio-system.
func (s *scenario) serviceAddress(name string, port int) string {
	s.t.Helper()
	return net.JoinHostPort(s.Kubectl(s.t, "get", "service", name, "-n", "istio-system", "-o", "jsonpath={.spec.clusterIP}"), strconv.Itoa(port))
}

// keepCalling makes a gRPC call and a TCP connection every few seconds, until it is stopped. What calls by HTTP is in the scenario's pods.
func (s *scenario) keepCalling() (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		every := time.NewTicker(5 * time.Second)
		defer every.Stop()
		for ctx.Err() == nil {
			for _, args := range [][]string{{"grpc", "back:9090"}, {"tcp", "back:9000", strings.Repeat("x", 1000)}} {
				if out, err := s.call("client", args...); err != nil && ctx.Err() == nil {
					s.t.Errorf("%s: %v: %s", args[0], err, out)
				}
			}
			select {
			case <-every.C:
			case <-ctx.Done():
			}
		}
	}()
	return func() { cancel(); <-done }
}

// kiali is a Kiali that runs on the node.
type kiali struct {
	*scenario
	address string
	log     string
}

func (k *kiali) in(t *testing.T) *kiali {
	part := *k
	part.scenario = k.scenario.in(t)
	return &part
}

// startKiali starts Kiali's back end on the node, as the scenario's service account, and waits until it answers.
func (s *scenario) startKiali(port int, tracing map[string]any) *kiali {
	t := s.t
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(top, ".build", "test", "kiali")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("no Kiali: run `make .build/test/kiali` (%v)", err)
	}
	dir := t.TempDir()
	// Its pages are not in the module.
	pages := filepath.Join(dir, "pages")
	if err := os.Mkdir(pages, 0o755); err != nil {
		t.Fatal(err)
	}
	tracing["enabled"] = true
	settings, err := json.Marshal(map[string]any{
		"auth":       map[string]any{"strategy": "anonymous"},
		"deployment": map[string]any{"cluster_wide_access": true, "remote_secret_path": s.kialiKubeconfig(dir), "view_only_mode": true},
		"in_cluster": true,
		"external_services": map[string]any{
			"prometheus": map[string]any{"url": "http://" + s.serviceAddress("prometheus", 9090)},
			"tracing":    tracing,
			"grafana":    map[string]any{"enabled": false},
		},
		"server": map[string]any{
			"address": "127.0.0.1", "port": port, "web_root": "/kiali", "static_content_root_directory": pages,
			"observability": map[string]any{"metrics": map[string]any{"enabled": false}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, settings, 0o600); err != nil {
		t.Fatal(err)
	}
	k := &kiali{scenario: s, address: fmt.Sprintf("127.0.0.1:%d", port), log: filepath.Join(dir, "log")}
	log, err := os.Create(k.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	cmd := s.Command(ctx, program, "-config", file)
	cmd.Env = append(cmd.Env, "LOG_FORMAT=json")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if t.Failed() {
			text, _ := os.ReadFile(k.log)
			t.Logf("the log of Kiali, %s:\n%s", k.address, text)
		}
	})
	s.Eventually(t, 2*time.Minute, func() (bool, string) {
		select {
		case <-ended:
			t.Fatal("Kiali has ended")
		default:
		}
		_, err := k.ask("/healthz", nil)
		return err == nil, fmt.Sprint(err)
	})
	return k
}

// kialiKubeconfig writes a kubeconfig with a token of the service account.
func (s *scenario) kialiKubeconfig(dir string) string {
	t := s.t
	t.Helper()
	admin, err := s.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	authority := admin.CAData
	if len(authority) == 0 {
		if authority, err = os.ReadFile(admin.CAFile); err != nil {
			t.Fatal(err)
		}
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["node"] = &clientcmdapi.Cluster{Server: admin.Host, CertificateAuthorityData: authority}
	config.AuthInfos["kiali"] = &clientcmdapi.AuthInfo{Token: strings.TrimSpace(s.Kubectl(t, "create", "token", "kiali", "-n", s.name))}
	config.Contexts["node"] = &clientcmdapi.Context{Cluster: "node", AuthInfo: "kiali"}
	config.CurrentContext = "node"
	file := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// ask returns what Kiali answers.
func (k *kiali) ask(path string, query url.Values) (string, error) {
	return readOK(k.Node, k.address, "/kiali"+path, query)
}

// get decodes what Kiali answers.
func (k *kiali) get(path string, query url.Values, answer any) {
	k.t.Helper()
	text, err := k.ask(path, query)
	if err != nil {
		k.t.Fatal(err)
	}
	// /api/crippled has its answer twice.
	if err := json.NewDecoder(strings.NewReader(text)).Decode(answer); err != nil {
		k.t.Fatalf("%s: %v: %s", path, err, text)
	}
}

// waitCounted waits until all series of the calls are in the store, and were at the start of the window. It returns the window's end.
func (s *scenario) waitCounted() time.Time {
	t := s.t
	t.Helper()
	var want []string
	for _, series := range []string{"client front 200", "front-v2 back 200", "client back 404", "client back 500", "client back grpc", "client back tcp"} {
		want = append(want, "source "+series, "destination "+series)
	}
	want = append(want, "source client empty 503")
	store := &store{s.Node}
	var end time.Time
	s.Eventually(t, 4*time.Minute, func() (bool, string) {
		end = time.Now().Add(-kialiDelay).Truncate(time.Second)
		var answer struct {
			Data struct {
				Result []struct{ Metric map[string]string }
			}
		}
		err := store.get("/api/v1/query", url.Values{
			"query": {fmt.Sprintf(`{__name__=~"istio_requests_total|istio_tcp_received_bytes_total",source_workload_namespace=%q,job="istio-proxy"}`, s.name)},
			"time":  {strconv.FormatInt(end.Add(-kialiWindow).Unix(), 10)},
		}, &answer)
		if err != nil {
			return false, err.Error()
		}
		found := map[string]bool{}
		for _, series := range answer.Data.Result {
			m := series.Metric
			kind := m["response_code"]
			if p := m["request_protocol"]; p != "http" {
				kind = p
			}
			found[strings.Join([]string{m["reporter"], m["source_workload"], m["destination_service_name"], kind}, " ")] = true
		}
		missing := slices.DeleteFunc(slices.Clone(want), func(series string) bool { return found[series] })
		return len(missing) == 0, fmt.Sprintf("at the window's start, the store did not have %q, but %q", missing, slices.Sorted(maps.Keys(found)))
	})
	return end
}

// calls are what one node of a graph sends to another, in a second.
type calls struct {
	rate, failed, rejected float64
	bytes                  float64 // of TCP
	mutual                 bool    // all of it by mutual TLS
	median                 float64 // of the durations, in milliseconds
}

// pageGraph returns the graph that the page has of the scenario's namespace: by caller and called workload, or by the Service for calls that reached none.
func (s *scenario) pageGraph(end time.Time) map[string]calls {
	t := s.t
	t.Helper()
	var answer struct {
		Shortened bool
		Nodes     []struct{ Kind, Namespace, Name string }
		Edges     []struct {
			Source, Target         int
			Rate, Errors, Rejected float64
			P50                    float64
			Security               string
			TCP                    struct{ Sent float64 }
		}
	}
	query := url.Values{"ns": {s.name}, "window": {"1m"}, "end": {strconv.FormatInt(end.UnixMilli(), 10)}}
	if err := (&store{s.Node}).get("/api/polymesh/v1/graph", query, &answer); err != nil {
		t.Fatal(err)
	}
	if answer.Shortened {
		t.Fatalf("the page has only a part of the window: %+v", answer)
	}
	name := func(i int) string {
		n := answer.Nodes[i]
		return strings.Join([]string{n.Kind, n.Namespace, n.Name}, "/")
	}
	graph := map[string]calls{}
	for _, e := range answer.Edges {
		graph[name(e.Source)+" to "+name(e.Target)] = calls{
			rate: e.Rate, failed: e.Errors, rejected: e.Rejected, bytes: e.TCP.Sent, mutual: e.Security == "mtls", median: e.P50,
		}
	}
	return graph
}

// graph returns Kiali's, by the same names. Kiali has an edge for each protocol.
func (k *kiali) graph(end time.Time) map[string]calls {
	t := k.t
	t.Helper()
	var answer struct {
		Duration int64
		Elements struct {
			Nodes []struct {
				Data struct{ ID, NodeType, Namespace, Workload, Service string }
			}
			Edges []struct {
				Data struct {
					Source, Target, IsMTLS, ResponseTime string
					Traffic                              struct {
						Protocol string
						Rates    map[string]string
					}
				}
			}
		}
	}
	k.get("/api/namespaces/graph", url.Values{
		"namespaces": {k.name}, "graphType": {"workload"}, "injectServiceNodes": {"false"}, "responseTime": {"50"},
		"duration": {"60s"}, "queryTime": {strconv.FormatInt(end.Unix(), 10)},
	}, &answer)
	names := map[string]string{}
	for _, n := range answer.Elements.Nodes {
		d := n.Data
		name := d.Workload
		if d.NodeType == "service" {
			name = d.Service
		}
		names[d.ID] = strings.Join([]string{d.NodeType, d.Namespace, name}, "/")
	}
	graph := map[string]calls{}
	number := func(text string) float64 {
		if text == "" {
			return 0
		}
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Errorf("a number is %q", text)
		}
		return f
	}
	for _, e := range answer.Elements.Edges {
		d := e.Data
		key := names[d.Source] + " to " + names[d.Target]
		c, seen := graph[key]
		rates := d.Traffic.Rates
		c.rate += number(rates["http"]) + number(rates["grpc"])
		c.failed += number(rates["http5xx"]) + number(rates["httpNoResponse"]) + number(rates["grpcErr"]) + number(rates["grpcNoResponse"])
		c.rejected += number(rates["http4xx"])
		c.bytes += number(rates["tcp"])
		c.mutual = (c.mutual || !seen) && number(d.IsMTLS) == 100
		c.median = max(c.median, number(d.ResponseTime))
		graph[key] = c
	}
	return graph
}

// near reports whether two rates of what happens in steps of a size are the same. Kiali rounds to hundredths. It takes the numbers of the called side and
// the page those of the caller, whose proxies are read at other times within the scrape interval: of what one has counted in the window, the other may
// have counted one more at each end. A tenth is for when the machine has stopped at such a time.
func near(kiali, page, step float64) bool {
	measured := (kialiWindow - 15*time.Second).Seconds()
	return math.Abs(kiali-page) <= 0.01+2*step/measured+max(kiali, page)/10
}

// wantGraph compares the two graphs with each other, and with what was called.
func (k *kiali) wantGraph(end time.Time, page map[string]calls) {
	t := k.t
	node := func(kind, name string) string { return kind + "/" + k.name + "/" + name }
	edge := func(from, kind, to string) string { return node("workload", from) + " to " + node(kind, to) }
	called := map[string]calls{
		edge("client", "workload", "front-v2"): {rate: 4},
		edge("front-v2", "workload", "back"):   {rate: 4},
		edge("client", "workload", "back"):     {rate: 2.2, failed: 1, rejected: 1, bytes: 200},
		edge("client", "service", "empty"):     {rate: 1, failed: 1},
	}
	drawn := k.graph(end)
	for _, key := range slices.Sorted(maps.Keys(drawn)) {
		t.Logf("%s: Kiali has %+v, the page %+v", key, drawn[key], page[key])
	}
	for _, graph := range []map[string]calls{drawn, page} {
		if got, want := slices.Sorted(maps.Keys(graph)), slices.Sorted(maps.Keys(called)); !slices.Equal(got, want) {
			t.Errorf("the edges are %q, want %q", got, want)
		}
	}
	for key, want := range called {
		a, b := drawn[key], page[key]
		for _, c := range []struct {
			what             string
			kiali, page, max float64
			step             float64
		}{
			{"requests", a.rate, b.rate, want.rate, 1}, {"failures", a.failed, b.failed, want.failed, 1},
			{"rejections", a.rejected, b.rejected, want.rejected, 1}, {"bytes", a.bytes, b.bytes, want.bytes, 1000},
		} {
			if !near(c.kiali, c.page, c.step) {
				t.Errorf("%s: %s in a second: Kiali has %g, the page %g", key, c.what, c.kiali, c.page)
			}
			// A busy machine calls less often, but never more often.
			if !near(c.page, c.max, c.step) && (c.page > c.max || c.page < c.max/2) {
				t.Errorf("%s: %s in a second: the page has %g of %g", key, c.what, c.page, c.max)
			}
		}
		if reached := strings.Contains(key, " to workload/"); a.mutual != reached || b.mutual != reached {
			t.Errorf("%s: mutual TLS: Kiali says %t, the page %t", key, a.mutual, b.mutual)
		}
		// Most are in the same bucket of the histogram, 100 to 250 ms.
		if want.rate == 4 && (math.Abs(a.median-b.median) > 50 || b.median < 150) {
			t.Errorf("%s: the median takes %g ms for Kiali, %g ms on the page", key, a.median, b.median)
		}
	}
}

// wantServices asks for the list of services with their health.
func (k *kiali) wantServices(end time.Time) {
	var answer struct {
		Services []struct {
			Name   string
			Health struct {
				Requests struct {
					Inbound map[string]map[string]float64
				}
			}
		}
	}
	// It leaves out the requests that reached no pod.
	k.get("/api/clusters/services", url.Values{
		"namespaces": {k.name}, "health": {"true"}, "rateInterval": {"60s"}, "queryTime": {strconv.FormatInt(end.Unix(), 10)},
	}, &answer)
	var names []string
	for _, s := range answer.Services {
		names = append(names, s.Name)
		in := s.Health.Requests.Inbound["http"]
		if s.Name == "back" && (in["200"] <= 0 || in["404"] <= 0 || in["500"] <= 0) || s.Name == "front" && in["200"] <= 0 {
			k.t.Errorf("the requests to %s: %v", s.Name, in)
		}
	}
	if slices.Sort(names); !slices.Equal(names, []string{"back", "empty", "front"}) {
		k.t.Errorf("the services are %q", names)
	}
}

// wantMetrics asks for the charts of a workload.
func (k *kiali) wantMetrics(end time.Time, page map[string]calls) {
	var answer map[string][]struct {
		Labels     map[string]string
		Datapoints [][2]any
		Stat       string
	}
	k.get("/api/namespaces/"+k.name+"/workloads/front-v2/metrics", url.Values{
		"filters[]": {"request_count", "request_duration_millis"}, "direction": {"inbound"}, "reporter": {"destination"}, "quantiles[]": {"0.5"},
		"queryTime": {strconv.FormatInt(end.Unix(), 10)}, "duration": {"30"}, "step": {"15"}, "rateInterval": {"60s"}, "rateFunc": {"rate"},
	}, &answer)
	last := func(chart string) float64 {
		if len(answer[chart]) == 0 || len(answer[chart][0].Datapoints) == 0 {
			k.t.Fatalf("nothing of %s: %v", chart, answer)
		}
		points := answer[chart][0].Datapoints
		text, _ := points[len(points)-1][1].(string)
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			k.t.Fatalf("%s: %v", chart, points)
		}
		return f
	}
	key := "workload/" + k.name + "/client to workload/" + k.name + "/front-v2"
	if rate := last("request_count"); !near(rate, page[key].rate, 1) {
		k.t.Errorf("front has %g requests in a second, on the page %g", rate, page[key].rate)
	}
	if last("request_duration_millis") <= 0 {
		k.t.Errorf("the durations are %v", answer["request_duration_millis"])
	}
}

// wantSettings asks what Kiali has found out about its sources.
func (k *kiali) wantSettings() {
	var config struct {
		Prometheus struct{ GlobalScrapeInterval, StorageTsdbRetention int64 }
	}
	k.get("/api/config", nil, &config)
	if got := config.Prometheus; got.GlobalScrapeInterval != 15 || got.StorageTsdbRetention != int64((7*24*time.Hour).Seconds()) {
		k.t.Errorf("Prometheus' settings are %+v", got)
	}
	var crippled map[string]bool
	k.get("/api/crippled", nil, &crippled)
	for feature, missing := range crippled {
		if missing {
			k.t.Errorf("metrics of %s are missing", feature)
		}
	}
	var components []struct{ Name, Status string }
	k.get("/api/istio/status", nil, &components)
	for _, c := range components {
		if (c.Name == "prometheus" || c.Name == "tracing") && c.Status != "Healthy" {
			k.t.Errorf("%s is %s", c.Name, c.Status)
		}
	}
}

// wantTraces asks for the traces of an app, and for one of them.
func (k *kiali) wantTraces(end time.Time) {
	t := k.t
	type trace struct {
		TraceID string
		Spans   []struct {
			SpanID, OperationName string
		}
	}
	var answer struct {
		Data               []trace
		Errors             []any
		TracingServiceName string
	}
	// Proxies send their spans every five seconds.
	query := url.Values{
		"startMicros": {strconv.FormatInt(end.Add(-kialiWindow).UnixMicro(), 10)}, "endMicros": {strconv.FormatInt(end.Add(-20*time.Second).UnixMicro(), 10)}, "limit": {"20"},
	}
	k.get("/api/namespaces/"+k.name+"/apps/front/traces", query, &answer)
	if len(answer.Data) < 20 || len(answer.Errors) > 0 || answer.TracingServiceName != "front."+k.name {
		t.Fatalf("%d traces of %s: %v", len(answer.Data), answer.TracingServiceName, answer.Errors)
	}
	found := answer.Data[0]
	ours, err := k.spans("traces/" + found.TraceID)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, span := range ordered(ours) {
		want = append(want, span.ID+" "+span.Name)
	}
	if len(want) != 4 {
		t.Errorf("the trace %s has the spans %q", found.TraceID, want)
	}
	slices.Sort(want)
	var one struct{ Data trace }
	k.get("/api/traces/"+found.TraceID, nil, &one)
	for _, got := range []trace{found, one.Data} {
		var spans []string
		for _, span := range got.Spans {
			spans = append(spans, span.SpanID+" "+span.OperationName)
		}
		if slices.Sort(spans); !slices.Equal(spans, want) {
			t.Errorf("Kiali's trace %s has %q, the store's %q", got.TraceID, spans, want)
		}
	}
	var ofWorkload struct{ Data []trace }
	k.get("/api/namespaces/"+k.name+"/workloads/front-v2/traces", query, &ofWorkload)
	if len(ofWorkload.Data) == 0 {
		t.Error("no traces of the workload")
	}
	var spans []any
	k.get("/api/namespaces/"+k.name+"/services/back/spans", query, &spans)
	if len(spans) == 0 {
		t.Error("no spans of the service")
	}
	var failed int
	k.get("/api/namespaces/"+k.name+"/apps/back/errortraces", url.Values{"duration": {"120"}}, &failed)
	if failed == 0 {
		t.Error("no traces with errors")
	}
}

// wantNoErrors reads Kiali's log.
func (k *kiali) wantNoErrors() {
	k.t.Helper()
	file, err := os.Open(k.log)
	if err != nil {
		k.t.Fatal(err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct{ Level, Message string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			continue // of a library
		}
		if line.Level == "error" || line.Level == "fatal" || line.Level == "panic" {
			k.t.Errorf("Kiali has logged: %s", line.Message)
		}
	}
	if err := lines.Err(); err != nil {
		k.t.Error(err)
	}
}
