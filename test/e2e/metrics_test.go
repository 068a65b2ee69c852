//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
)

const metricsTrust = "spiffe://cluster.local/ns/metrics/sa/"

// peers are the labels that both sides of a call from the scenario's client to its server have.
func peers() map[string]string {
	return map[string]string{
		"source_workload": "client", "source_workload_namespace": "metrics", "source_app": "client", "source_version": "v1",
		"source_canonical_service": "client", "source_canonical_revision": "v1", "source_cluster": "Kubernetes",
		"source_principal":     metricsTrust + "client",
		"destination_workload": "server-v2", "destination_workload_namespace": "metrics", "destination_app": "server",
		"destination_version": "v2", "destination_canonical_service": "shop", "destination_canonical_revision": "blue",
		"destination_cluster": "Kubernetes", "destination_principal": metricsTrust + "server",
		"destination_service": "server.metrics.svc.cluster.local", "destination_service_name": "server",
		"destination_service_namespace": "metrics", "response_flags": "-",
	}
}

// TestMetrics compares whole sets of labels with those of Istio's documentation.
func TestMetrics(t *testing.T) {
	s := newScenario(t, "metrics")
	for _, call := range [][]string{{"get", "-n", "3", "http://server:8080/"}, {"grpc", "server:9090"}, {"tcp", "server:9000", "some text"}} {
		s.Eventually(t, time.Minute, func() (bool, string) {
			out, err := s.call("client", call...)
			return err == nil, fmt.Sprintf("%v: %s %v", call, out, err)
		})
	}
	client, server := s.podIP("client"), s.podIP("server")
	for _, side := range []struct {
		name, address, policy string
	}{{"source", client, "unknown"}, {"destination", server, "mutual_tls"}} {
		for _, port := range []int{15020, 15090} {
			t.Run(fmt.Sprintf("%s/%d", side.name, port), func(t *testing.T) {
				want := func(more map[string]string) map[string]string {
					labels := peers()
					labels["reporter"], labels["connection_security_policy"] = side.name, side.policy
					maps.Copy(labels, more)
					return labels
				}
				http := want(map[string]string{"request_protocol": "http", "response_code": "200", "grpc_response_status": ""})
				grpc := want(map[string]string{"request_protocol": "grpc", "response_code": "200", "grpc_response_status": "0"})
				tcp := want(map[string]string{"request_protocol": "tcp"})
				for name, labels := range map[string][]map[string]string{
					"istio_requests_total":                {http, grpc},
					"istio_request_duration_milliseconds": {http, grpc},
					"istio_request_bytes":                 {http, grpc},
					"istio_response_bytes":                {http, grpc},
					"istio_request_messages_total":        {grpc},
					"istio_response_messages_total":       {grpc},
					"istio_tcp_connections_opened_total":  {tcp},
					"istio_tcp_connections_closed_total":  {tcp},
					"istio_tcp_sent_bytes_total":          {tcp},
					"istio_tcp_received_bytes_total":      {tcp},
				} {
					for _, l := range labels {
						s.Eventually(t, 30*time.Second, func() (bool, string) {
							families, _, err := s.scrape(side.address, port)
							if err != nil {
								return false, err.Error()
							}
							return hasSeries(families[name], l)
						})
					}
				}
			})
		}
	}
	t.Run("a connection that is open", func(t *testing.T) {
		count := func(address, metric string) float64 {
			families, _, err := s.scrape(address, 15020)
			if err != nil {
				t.Fatal(err)
			}
			sum := 0.0
			for _, m := range families[metric].GetMetric() {
				sum += m.GetCounter().GetValue()
			}
			return sum
		}
		const text = "a text that stays for a while"
		addresses := map[string]string{"client": client, "server": server}
		before := map[string]map[string]float64{}
		for name, address := range addresses {
			before[name] = map[string]float64{}
			for _, metric := range exposition.TCPMetrics {
				before[name][metric] = count(address, metric)
			}
		}
		wantMore := func(opened, closed int) {
			t.Helper()
			for name, address := range addresses {
				s.Eventually(t, time.Minute, func() (bool, string) {
					more := map[string]float64{}
					for _, metric := range exposition.TCPMetrics {
						more[metric] = count(address, metric) - before[name][metric]
					}
					ok := more["istio_tcp_connections_opened_total"] == float64(opened) && more["istio_tcp_connections_closed_total"] == float64(closed) &&
						more["istio_tcp_sent_bytes_total"] >= float64(len(text)) && more["istio_tcp_received_bytes_total"] >= float64(len(text))
					return ok, fmt.Sprintf("%s has counted %v more", name, more)
				})
			}
		}
		hold := s.PolymeshCommand(t.Context(), "kubectl", "exec", "-i", "-n", s.name, "deployment/client", "-c", "echo", "--", "/echo", "tcp", "-hold", "server:9000", text)
		end, err := hold.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var printed strings.Builder
		hold.Stdout, hold.Stderr = &printed, &printed
		if err := hold.Start(); err != nil {
			t.Fatal(err)
		}
		wantMore(1, 0)
		if err := end.Close(); err != nil {
			t.Fatal(err)
		}
		if err := hold.Wait(); err != nil {
			t.Fatalf("%v: %s", err, printed.String())
		}
		wantMore(1, 1)
	})
	t.Run("exposition", func(t *testing.T) {
		for _, port := range []int{15020, 15090} {
			families, text, err := s.scrape(server, port)
			if err != nil {
				t.Fatal(err)
			}
			// Envoy's own statistics keep their names.
			if families["envoy_server_live"] == nil && families["envoy_cluster_upstream_rq_total"] == nil && families["envoy_cluster_manager_active_clusters"] == nil {
				t.Errorf("port %d has no statistics of Envoy's own", port)
			}
			var istio strings.Builder
			for line := range strings.Lines(text) {
				if strings.Contains(line, "envoy_istio_") || strings.Contains(line, "polymesh_") {
					t.Errorf("port %d has %s", port, line)
				}
				if strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "istio_") {
					istio.WriteString(line)
				}
			}
			problems, err := promlint.New(strings.NewReader(istio.String())).Lint()
			if err != nil {
				t.Fatalf("promtool cannot read port %d: %v", port, err)
			}
			for _, p := range problems {
				// Istio's own name, and agent metrics are Istio's own altogether.
				if p.Metric != "istio_request_duration_milliseconds" && !strings.HasPrefix(p.Metric, "istio_agent_") && p.Metric != "istio_build" {
					t.Errorf("promtool reports for port %d: %s: %s", port, p.Metric, p.Text)
				}
			}
		}
	})
	t.Run("a forged header", func(t *testing.T) {
		var r echoReply
		s.Eventually(t, time.Minute, func() (bool, string) {
			out, err := s.call("stranger", "get", "-cert", "/certs/cert-chain.pem", "-key", "/certs/key.pem",
				"-H", "x-envoy-peer-metadata: forged", "-H", "x-envoy-peer-metadata-id: sidecar~10.0.0.1~client.metrics~metrics.svc.cluster.local",
				"https://server:8080/forged")
			if err == nil {
				r, err = parseReply(out)
			}
			return err == nil, fmt.Sprintf("%s %v", out, err)
		})
		var behind echoReply
		s.Eventually(t, time.Minute, func() (bool, string) {
			out, err := s.call("client", "get", "-H", "x-envoy-peer-metadata: forged", "http://server:8080/forged")
			if err == nil {
				behind, err = parseReply(out)
			}
			return err == nil, fmt.Sprintf("%s %v", out, err)
		})
		for from, reply := range map[string]echoReply{"a pod with a certificate": r, "an app behind a sidecar": behind} {
			for name := range reply.Headers {
				if strings.HasPrefix(strings.ToLower(name), "x-envoy-peer-metadata") {
					t.Errorf("the app sees %s of %s", name, from)
				}
			}
		}
		want := peers()
		want["reporter"], want["connection_security_policy"] = "destination", "mutual_tls"
		want["request_protocol"], want["response_code"], want["grpc_response_status"] = "http", "200", ""
		for label, value := range map[string]string{
			"workload": "stranger", "app": "stranger", "version": "v9", "canonical_service": "stranger", "canonical_revision": "v9",
			"principal": metricsTrust + "stranger",
		} {
			want["source_"+label] = value
		}
		s.Eventually(t, 30*time.Second, func() (bool, string) {
			families, _, err := s.scrape(server, 15020)
			if err != nil {
				return false, err.Error()
			}
			return hasSeries(families["istio_requests_total"], want)
		})
	})
	t.Run("Telemetry", func(t *testing.T) {
		s := s.in(t)
		s.apply("telemetry.yaml")
		want := peers()
		delete(want, "source_app")
		want["reporter"], want["connection_security_policy"], want["method"] = "destination", "mutual_tls", "PUT"
		want["request_protocol"], want["response_code"], want["grpc_response_status"] = "http", "200", ""
		want["destination_port"], want["caller"], want["tenant"], want["plan"] = "8080", want["source_workload"], "tenant blue", "unknown"
		s.Eventually(t, time.Minute, func() (bool, string) {
			if out, err := s.call("client", "get", "-X", "PUT", "-H", "x-tenant: blue", "http://server:8080/"); err != nil {
				return false, fmt.Sprintf("%s %v", out, err)
			}
			families, _, err := s.scrape(server, 15020)
			if err != nil {
				return false, err.Error()
			}
			return hasSeries(families["istio_requests_total"], want)
		})
		sizes := func() uint64 {
			families, _, err := s.scrape(server, 15020)
			if err != nil {
				t.Fatal(err)
			}
			count := uint64(0)
			for _, m := range families["istio_request_bytes"].GetMetric() {
				count += m.GetHistogram().GetSampleCount()
			}
			return count
		}
		// unchanged counts the requests that are counted as before the change.
		unchanged := func() uint64 {
			families, _, err := s.scrape(server, 15020)
			if err != nil {
				t.Fatal(err)
			}
			count := uint64(0)
			for _, m := range families["istio_requests_total"].GetMetric() {
				if !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == "method" }) {
					count += uint64(m.GetCounter().GetValue())
				}
			}
			return count
		}
		// Each thread of the caller's Envoy has a connection, which is counted as before until it has been used once more. And a
		// histogram's samples are shown some seconds after a counter's: those of before the change have to be there.
		s.Eventually(t, time.Minute, func() (bool, string) {
			before := unchanged()
			for range 4 {
				if out, err := s.call("client", "get", "-X", "PUT", "http://server:8080/"); err != nil {
					return false, fmt.Sprintf("%s %v", out, err)
				}
			}
			now, counted := unchanged(), sizes()
			return now == before && counted == now, fmt.Sprintf("%d sizes of %d requests, of which %d are new", counted, now, now-before)
		})
		before := sizes()
		for range 3 {
			if out, err := s.call("client", "get", "-X", "PATCH", "-H", "x-tenant: blue", "http://server:8080/"); err != nil {
				t.Fatalf("%s %v", out, err)
			}
		}
		// The requests are counted by now, and their sizes are not.
		want["method"] = "PATCH"
		s.Eventually(t, 30*time.Second, func() (bool, string) {
			families, _, err := s.scrape(server, 15020)
			if err != nil {
				return false, err.Error()
			}
			return hasSeries(families["istio_requests_total"], want)
		})
		if after := sizes(); after != before {
			t.Errorf("%d sizes of requests were counted though the metric is disabled", after-before)
		}
	})
}

// podIP is the address of the scenario's one pod with this label app.
func (s *scenario) podIP(app string) string {
	s.t.Helper()
	pods := listPods(s.t, s.Node, s.name, "app="+app)
	if len(pods) != 1 {
		s.t.Fatalf("%d pods of %s", len(pods), app)
	}
	return pods[0].Status.PodIP
}

// scrape queries a pod for its metrics as Prometheus does.
func (s *scenario) scrape(address string, port int) (map[string]*dto.MetricFamily, string, error) {
	response, err := s.HTTPInside(false).Get(fmt.Sprintf("http://%s:%d/stats/prometheus", address, port))
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("metrics of %s:%d: %s, %w", address, port, response.Status, err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(text)))
	if err != nil {
		return nil, "", fmt.Errorf("Prometheus cannot read the metrics of %s:%d: %w", address, port, err)
	}
	return families, string(text), nil
}

// hasSeries reports whether a metric has a series with exactly these labels and a value.
func hasSeries(f *dto.MetricFamily, want map[string]string) (bool, string) {
	var have []string
	for _, m := range f.GetMetric() {
		labels := map[string]string{}
		for _, l := range m.Label {
			labels[l.GetName()] = l.GetValue()
		}
		if m.GetCounter().GetValue()+float64(m.GetHistogram().GetSampleCount()) > 0 && maps.Equal(labels, want) {
			return true, ""
		}
		text, _ := json.Marshal(labels)
		have = append(have, string(text))
	}
	text, _ := json.Marshal(want)
	slices.Sort(have)
	return false, fmt.Sprintf("%s has no series\n%s\nonly\n%s", f.GetName(), text, strings.Join(have, "\n"))
}
