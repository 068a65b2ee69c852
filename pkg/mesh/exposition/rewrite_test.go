package exposition

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// self is the workload that the samples in testdata come from.
var self = workload.Workload{
	Name: "b", Namespace: "demo", CanonicalService: "b", CanonicalRevision: "v1", Cluster: "Kubernetes", App: "b", Version: "v1",
}

var update = flag.Bool("update", false, "write the golden files")

// TestRewrite compares the output for testdata/envoy.txt, written by Envoy with the dialect's tags, with testdata/istio.txt.
func TestRewrite(t *testing.T) {
	in, err := os.ReadFile(filepath.Join("testdata", "envoy.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Rewrite(&out, bytes.NewReader(in), self); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "istio.txt")
	if *update {
		if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(out.Bytes()))
	if err != nil {
		t.Fatalf("Prometheus cannot parse it: %v", err)
	}
	for name := range families {
		if strings.HasPrefix(name, "envoy_istio_") || strings.HasPrefix(name, "polymesh_") {
			t.Errorf("%s is left", name)
		}
	}
}

// TestFolded: folded tags give the same result as separate tags.
func TestFolded(t *testing.T) {
	in, err := os.ReadFile(filepath.Join("testdata", "envoy.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var apart, folded, want, got bytes.Buffer
	lines := 0
	for line := range strings.Lines(string(in)) {
		apart.WriteString(line)
		name, tags, number, err := parseSample(strings.TrimSpace(line))
		if err != nil || !strings.Contains(line, Reporter) {
			folded.WriteString(line)
			continue
		}
		into := HTTP
		if strings.HasPrefix(name, "envoy_istio_tcp_") {
			into = TCP
		}
		values := make([]string, len(Folded[into]))
		rest := []label{{into, ""}}
		for _, tag := range tags {
			if i := slices.Index(Folded[into], tag.name); i >= 0 {
				values[i] = tag.value
			} else {
				rest = append(rest, tag)
			}
		}
		rest[0].value = strings.Join(values, FoldedBy)
		// The dialect lists the removed labels; samples in the file lack more.
		missing := []string{}
		for _, name := range []string{"response_flags", "request_protocol", "response_code", "grpc_response_status"} {
			if !strings.Contains(line, name) {
				missing = append(missing, name)
			}
		}
		if i := slices.IndexFunc(rest, func(l label) bool { return l.name == Without }); i >= 0 {
			missing = append(missing, rest[i].value)
			rest = slices.Delete(rest, i, i+1)
		}
		rest = append(rest, label{Without, strings.Join(missing, ",")})
		folded.WriteString(name + render(rest) + " " + number + "\n")
		lines++
	}
	if lines == 0 {
		t.Fatal("no sample has such tags")
	}
	if err := Rewrite(&want, &apart, self); err != nil {
		t.Fatal(err)
	}
	if err := Rewrite(&got, &folded, self); err != nil {
		t.Fatal(err)
	}
	if got.String() != want.String() {
		t.Errorf("got\n%s\nwant\n%s", got.String(), want.String())
	}
}

// hostileTexts contain the separators of tags, and characters that end a label, a line or a list.
var hostileTexts = []string{
	"|", ";", ",", "%", "/", "=", " ", "\\n", `\"`, "\\\\", "\x00", "é", "x|y", "x;y", "q;evil;|;;;", "a|spiffe://cluster.local/ns/bank/sa/payments",
	"a;bank;payments;v1;Kubernetes;payments;v1|spiffe://cluster.local/ns/demo/sa/b|spiffe://cluster.local/ns/bank/sa/payments",
	"spiffe://cluster.local/ns/evil/sa/a,spiffe://cluster.local/ns/bank/sa/payments",
}

// A value chosen by a peer only appears in its own label, or becomes unknown: it never changes another label or names another workload.
func TestForgedPeers(t *testing.T) {
	const certificate, principal, own = "a;evil;a;v1;Kubernetes;a;v1", "spiffe://cluster.local/ns/evil/sa/a", "spiffe://cluster.local/ns/demo/sa/b"
	for _, reporter := range []string{"destination", "source"} {
		for _, text := range hostileTexts {
			for _, peers := range [][]string{
				{"", text, own, principal}, {"", text + ";evil;a;v1;Kubernetes;a;v1", own, principal}, {"", "a;evil;a;v1;Kubernetes;a;" + text, own, principal},
				{"", certificate, own, text}, {"", certificate, text, principal}, {text, certificate, own, principal}, {text + ";v1", certificate, own, principal},
			} {
				if peers[0] == "x;y" {
					continue // these are labels
				}
				tag := strings.Join(append([]string{reporter, "b.demo.svc.cluster.local;b;demo", "-", "200", ""}, peers...), "|")
				var out bytes.Buffer
				sample := `envoy_istio_requests_total{polymesh_http="` + tag + `",request_protocol="http"} 3`
				if err := Rewrite(&out, strings.NewReader("# TYPE envoy_istio_requests_total counter\n"+sample+"\n"), self); err != nil {
					t.Fatal(err)
				}
				parser := expfmt.NewTextParser(model.LegacyValidation)
				families, err := parser.TextToMetricFamilies(&out)
				if err != nil {
					t.Fatalf("%s: %v", sample, err)
				}
				if n := len(families["istio_requests_total"].GetMetric()); n != 1 {
					t.Fatalf("%s became %d samples", sample, n)
				}
				for _, l := range families["istio_requests_total"].Metric[0].Label {
					allowed := map[string][]string{
						"reporter": {reporter}, "response_code": {"200"}, "response_flags": {"-"}, "request_protocol": {"http"}, "grpc_response_status": {""},
						"destination_service": {"b.demo.svc.cluster.local"}, "destination_service_name": {"b"}, "destination_service_namespace": {"demo"},
						"source_principal": {principal, "unknown"}, "destination_principal": {own, "unknown"}, "connection_security_policy": {"mutual_tls", "unknown"},
					}[l.GetName()]
					other := map[string]string{"destination": "source_", "source": "destination_"}[reporter]
					if name, ok := strings.CutPrefix(l.GetName(), other); ok && allowed == nil {
						i := slices.Index(workload.Labels, name)
						allowed = []string{strings.Split(certificate, ";")[i], "unknown", "latest"}
					} else if allowed == nil {
						name = strings.TrimPrefix(strings.TrimPrefix(l.GetName(), "source_"), "destination_")
						allowed = []string{self.Values()[slices.Index(workload.Labels, name)]}
					}
					if !slices.Contains(allowed, l.GetValue()) {
						t.Errorf("%s: %s is %q, want one of %q", sample, l.GetName(), l.GetValue(), allowed)
					}
				}
			}
		}
	}
}

func TestBroken(t *testing.T) {
	for _, line := range []string{
		`envoy_istio_requests_total{a="b} 1`, `envoy_istio_requests_total{a=b} 1`, `envoy_istio_requests_total{a="b"}`,
		`envoy_istio_requests_total{a="b"} x`, `envoy_istio_requests_total{a="b"`,
	} {
		if err := Rewrite(&bytes.Buffer{}, strings.NewReader("# TYPE envoy_istio_requests_total counter\n"+line+"\n"), self); err == nil {
			t.Errorf("%s was accepted", line)
		}
	}
}

// FuzzRewrite: for any input, foreign statistics are unchanged, and parsed labels can be rendered again.
func FuzzRewrite(f *testing.F) {
	f.Add(`a="b"`)
	f.Add(`polymesh_peer="a;b;c;d;e;f;g",reporter="source",x="\\\""`)
	f.Fuzz(func(t *testing.T, labels string) {
		line := "envoy_istio_requests_total{" + labels + "} 1"
		if strings.ContainsAny(labels, "\r\n") {
			return
		}
		name, parsed, number, err := parseSample(line)
		if err == nil && (name != "envoy_istio_requests_total" || render(parsed) == "" != (len(parsed) == 0)) {
			t.Errorf("%q was read as %s %v %s", line, name, parsed, number)
		}
		const other = "# TYPE envoy_server_live gauge\nenvoy_server_live{} 1\n"
		var out bytes.Buffer
		if err := Rewrite(&out, strings.NewReader(other+"# TYPE envoy_istio_requests_total counter\n"+line+"\n"+other), self); err == nil &&
			(!strings.HasPrefix(out.String(), other) || !strings.HasSuffix(out.String(), other)) {
			t.Errorf("other statistics changed: %s", out.String())
		}
	})
}
