package exposition

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"
)

// record returns an entry as Envoy sends it.
func record(kind string, id, sent, received int, tags ...*common.KeyValue) *logs.LogRecord {
	return &logs.LogRecord{Body: otlpText(fmt.Sprintf("%s|%d|%d|%d", kind, id, sent, received)), Attributes: tags}
}

func otlpText(text string) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: text}}
}

func otlpTag(name, value string) *common.KeyValue {
	return &common.KeyValue{Key: name, Value: otlpText(value)}
}

func post(t *testing.T, c *Connections, records ...*logs.LogRecord) int {
	t.Helper()
	body, err := proto.Marshal(&logs.LogsData{ResourceLogs: []*logs.ResourceLogs{{ScopeLogs: []*logs.ScopeLogs{{LogRecords: records}}}}})
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	c.ServeHTTP(w, httptest.NewRequest(http.MethodPost, ConnectionsPath, bytes.NewReader(body)))
	return w.Code
}

func everything(string) bool { return true }

func TestConnections(t *testing.T) {
	tag := otlpTag("t", "x")
	flagged := otlpTag("t", "UF")
	for _, c := range []struct {
		name    string
		records []*logs.LogRecord
		want    string // opened, closed, sent, received of t="x", then of t="UF"
	}{
		{"has its upstream", []*logs.LogRecord{record(upstreamConnected, 1, 0, 0, tag)}, "1 0 0 0, 0 0 0 0"},
		{"is open", []*logs.LogRecord{record(upstreamConnected, 1, 0, 0, tag), record(periodic, 1, 10, 20, tag), record(periodic, 1, 15, 20, tag)},
			"1 0 15 20, 0 0 0 0"},
		{"has ended", []*logs.LogRecord{record(upstreamConnected, 1, 0, 0, tag), record(periodic, 1, 10, 20, tag), record(connectionEnd, 1, 17, 21, tag)},
			"1 1 17 21, 0 0 0 0"},
		{"never had an upstream", []*logs.LogRecord{record(periodic, 1, 0, 5, tag), record(connectionEnd, 1, 0, 5, flagged)}, "0 0 0 0, 1 1 0 5"},
		{"ends with a flag", []*logs.LogRecord{record(upstreamConnected, 1, 0, 0, tag), record(periodic, 1, 10, 20, tag), record(connectionEnd, 1, 17, 21, flagged)},
			"1 0 10 20, 0 1 7 1"},
		{"two", []*logs.LogRecord{record(upstreamConnected, 1, 0, 0, tag), record(upstreamConnected, 2, 0, 0, tag), record(periodic, 2, 1, 1, tag), record(periodic, 1, 2, 2, tag)},
			"2 0 3 3, 0 0 0 0"},
		{"in another order", []*logs.LogRecord{record(connectionEnd, 1, 17, 21, tag), record(periodic, 1, 10, 20, tag), record(upstreamConnected, 1, 0, 0, tag)},
			"1 1 17 21, 0 0 0 0"},
		{"the end comes twice", []*logs.LogRecord{record(connectionEnd, 1, 17, 21, tag), record(connectionEnd, 1, 17, 21, tag)}, "1 1 17 21, 0 0 0 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// In a single request, and in one request per entry.
			for _, size := range []int{len(c.records), 1} {
				connections := NewConnections()
				for from := 0; from < len(c.records); from += size {
					if code := post(t, connections, c.records[from:from+size]...); code != http.StatusOK {
						t.Fatalf("status %d", code)
					}
				}
				var got [2][]string
				for i, tags := range []string{`{t="x"}`, `{t="UF"}`} {
					for _, metric := range TCPMetrics {
						got[i] = append(got[i], fmt.Sprint(connections.counters[metric][tags]))
					}
				}
				if got := strings.Join(got[0], " ") + ", " + strings.Join(got[1], " "); got != c.want {
					t.Errorf("got %s, want %s", got, c.want)
				}
			}
		})
	}
}

// The agent's counters and Envoy's have the same format: equal tags become equal labels.
func TestConnectionsText(t *testing.T) {
	list := func(metric string, tags ...*common.KeyValue) *common.KeyValue {
		return &common.KeyValue{Key: metric, Value: &common.AnyValue{
			Value: &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: tags}},
		}}
	}
	server := otlpTag(TCP, "destination|db.demo.svc.cluster.local;db;demo|-|tcp||a;demo;a;v1;Kubernetes;a;v1|spiffe://td/b|spiffe://td/a")
	plain := otlpTag(TCP, `destination|-|UF,"\|tcp||-|-|-`)
	connections := NewConnections()
	for _, r := range []*logs.LogRecord{
		record(connectionEnd, 1, 1, 2, server),
		record(connectionEnd, 2, 0, 0, plain),
		// The Telemetry API: one metric has an additional tag, the others are disabled.
		record(connectionEnd, 3, 4, 5, list(sent, server, otlpTag("zone", "-"), otlpTag("port", "5432"))),
	} {
		if code := post(t, connections, r); code != http.StatusOK {
			t.Fatalf("status %d", code)
		}
	}
	var out strings.Builder
	if err := Rewrite(&out, strings.NewReader(connections.text(everything)), self); err != nil {
		t.Fatal(err)
	}
	peers := `reporter="destination",source_workload="a",source_workload_namespace="demo",source_canonical_service="a",source_canonical_revision="v1",` +
		`source_principal="spiffe://td/a",source_app="a",source_version="v1",source_cluster="Kubernetes",destination_workload="b",` +
		`destination_workload_namespace="demo",destination_canonical_service="b",destination_canonical_revision="v1",destination_principal="spiffe://td/b",` +
		`destination_app="b",destination_version="v1",destination_cluster="Kubernetes",destination_service="db.demo.svc.cluster.local",` +
		`destination_service_name="db",destination_service_namespace="demo",request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls"`
	for _, want := range []string{
		"istio_tcp_connections_opened_total{" + peers + "} 1\n",
		"istio_tcp_received_bytes_total{" + peers + "} 2\n",
		"istio_tcp_sent_bytes_total{" + peers + `,zone="unknown",port="5432"} 4` + "\n",
		`source_workload="unknown"`, `response_flags="UF,\"\\",connection_security_policy="none"} 1` + "\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("missing %s in\n%s", want, out.String())
		}
	}
	if n := strings.Count(out.String(), `port="5432"`); n != 1 {
		t.Errorf("a disabled metric was counted:\n%s", out.String())
	}
	if text := connections.text(func(metric string) bool { return metric == sent }); strings.Count(text, "# TYPE") != 1 {
		t.Errorf("a single metric was requested:\n%s", text)
	}
}

func TestConnectionsRefuse(t *testing.T) {
	for _, body := range []string{"", "TcpPeriodic", "TcpPeriodic|x|1|2", "TcpPeriodic|1|x|2", "TcpPeriodic|1|1|x", "TcpPeriodic|1|1|2|3"} {
		if code := post(t, NewConnections(), &logs.LogRecord{Body: otlpText(body)}); code != http.StatusBadRequest {
			t.Errorf("%q: status %d", body, code)
		}
	}
	w := httptest.NewRecorder()
	NewConnections().ServeHTTP(w, httptest.NewRequest(http.MethodPost, ConnectionsPath, strings.NewReader("no protobuf")))
	if w.Code != http.StatusBadRequest {
		t.Errorf("not protobuf: status %d", w.Code)
	}
}

// The memory for connections is bounded, even if ends are lost.
func TestConnectionsForgotten(t *testing.T) {
	c := NewConnections()
	for id := range maxOpen + 10 {
		if err := c.count(record(upstreamConnected, id, 0, 0, otlpTag("t", "x"))); err != nil {
			t.Fatal(err)
		}
	}
	for id := range maxEnded + 10 {
		if err := c.count(record(connectionEnd, maxOpen*2+id, 0, 0, otlpTag("t", "x"))); err != nil {
			t.Fatal(err)
		}
	}
	if c.open.Len() > maxOpen || c.ended.Len() > maxEnded {
		t.Errorf("%d open, %d ended", c.open.Len(), c.ended.Len())
	}
}

// A tag's name, which can be any text, becomes one valid label.
func TestConnectionsLabelNames(t *testing.T) {
	for name, want := range map[string]string{
		"request_host": "request_host", `x="y"} 1` + "\n" + `istio_requests_total{a`: "x__y___1_istio_requests_total_a", "0": "_0", "": "_", "é": "_", "a.b-c": "a_b_c",
	} {
		c := NewConnections()
		if err := c.count(record(connectionEnd, 1, 1, 2, otlpTag(name, `v"}`+"\n"))); err != nil {
			t.Fatal(err)
		}
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(c.text(everything)))
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		labels := families[added+closed].GetMetric()[0].Label
		if len(families) != len(TCPMetrics) || len(labels) != 1 || labels[0].GetName() != want || labels[0].GetValue() != `v"}`+"\n" {
			t.Errorf("%q: %d metrics, labels %v", name, len(families), labels)
		}
	}
}

// The number of series is bounded, and the totals stay correct.
func TestConnectionsOverflow(t *testing.T) {
	c := NewConnections()
	const more = 10
	for id := range maxSeries + more {
		if err := c.count(record(connectionEnd, id, 1, 2, otlpTag("t", fmt.Sprint(id)))); err != nil {
			t.Fatal(err)
		}
	}
	for _, metric := range TCPMetrics {
		if n := len(c.counters[metric]); n != maxSeries+1 {
			t.Errorf("%s has %d series", metric, n)
		}
	}
	var out strings.Builder
	if err := Rewrite(&out, strings.NewReader(c.text(everything)), self); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("%s{%s=\"true\"} %d\n", closed, overflow, more), fmt.Sprintf("%s{%s=\"true\"} %d\n", received, overflow, 2*more), closed + `{t="0"} 1` + "\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("missing %s", want)
		}
	}
}
