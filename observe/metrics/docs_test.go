package metrics

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/scrape"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v2"

	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// page reads docs/operate/metrics.md.
func page(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operate/metrics.md")
	require.NoError(t, err)
	return string(text)
}

// documented returns the ConfigMaps of the page.
func documented(t *testing.T) (users []UserConfig) {
	t.Helper()
	for i, part := range strings.Split(page(t), "```") {
		text, ok := strings.CutPrefix(part, "yaml\n")
		if i%2 == 0 || !ok {
			continue
		}
		var object struct {
			Kind     string `yaml:"kind"`
			Metadata struct {
				Name, Namespace string
				Labels          map[string]string
			} `yaml:"metadata"`
			Data map[string]string `yaml:"data"`
		}
		require.NoError(t, yaml.Unmarshal([]byte(text), &object), text)
		require.Equal(t, "ConfigMap", object.Kind)
		user := UserConfig{Namespace: object.Metadata.Namespace, Name: object.Metadata.Name}
		switch kind := object.Metadata.Labels["polymesh.dev/observe"]; kind {
		case "scrape":
			require.Len(t, object.Data, 1)
			user.Prometheus = []byte(object.Data["prometheus.yml"])
		case "rules":
			user.Rules = map[string][]byte{}
			for key, text := range object.Data {
				user.Rules[key] = []byte(text)
			}
		default:
			t.Fatalf("%s has the label %q", user.Name, kind)
		}
		users = append(users, user)
	}
	return users
}

// The examples of the page are used as they are written, and do what the page says.
func TestDocsExamples(t *testing.T) {
	s := open(t, Options{Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig")})
	users := documented(t)
	require.Len(t, users, 3)
	problems, err := s.Apply(t.Context(), users)
	require.NoError(t, err)
	require.Empty(t, problems)

	c, _, _ := s.current.get()
	jobs := map[string]*config.ScrapeConfig{}
	for _, j := range c.ScrapeConfigs {
		jobs[j.JobName] = j
	}
	require.Contains(t, jobs, "default/orders-jobs/database")
	orders := jobs["default/orders-jobs/orders"]
	require.NotNil(t, orders)
	for app, want := range map[string]string{"orders": "http://10.42.0.9:9102/metrics", "other": ""} {
		found := model.LabelSet{
			model.AddressLabel: "10.42.0.9:8000", "__meta_kubernetes_namespace": "default", "__meta_kubernetes_pod_label_app": model.LabelValue(app),
			"__meta_kubernetes_pod_phase": "Running", "__meta_kubernetes_pod_ip": "10.42.0.9", "__meta_kubernetes_pod_name": "orders-0",
		}
		ls, err := scrape.PopulateLabels(labels.NewBuilder(labels.EmptyLabels()), orders, found, nil)
		require.NoError(t, err)
		if want == "" {
			require.True(t, ls.IsEmpty())
			continue
		}
		require.Equal(t, want, scrape.NewTarget(ls, orders, found, nil).URL().String())
		require.Equal(t, "orders-0", ls.Get("pod"))
	}

	require.Len(t, c.AlertingConfig.AlertmanagerConfigs, 1)
	for service, kept := range map[string]bool{"alertmanager": true, "other": false} {
		b := labels.NewBuilder(labels.FromStrings("__meta_kubernetes_service_name", service, "__meta_kubernetes_endpointslice_port", "9093"))
		require.Equal(t, kept, relabel.ProcessBuilder(b, c.AlertingConfig.AlertmanagerConfigs[0].RelabelConfigs...), service)
	}

	var rules []string
	for _, g := range s.rules.RuleGroups() {
		for _, r := range g.Rules() {
			rules = append(rules, r.Name())
		}
	}
	require.Contains(t, rules, "service:istio_requests:rate5m")
	require.Contains(t, rules, "OrdersSlow")
}

// The page's table has the default rules, in their order.
func TestDocsRules(t *testing.T) {
	_, rest, ok := strings.Cut(page(t), "<!-- rules:")
	table, _, ok2 := strings.Cut(rest, "<!-- end of rules -->")
	require.True(t, ok && ok2, "the page has no markers for the table")
	var got []string
	for _, line := range strings.Split(table, "\n") {
		if cells := strings.Split(line, " | "); strings.HasPrefix(line, "| `") && len(cells) >= 5 {
			got = append(got, strings.Join([]string{strings.Trim(cells[0], "| `"), cells[1], strings.Trim(cells[3], "| "), strings.TrimSuffix(cells[4], " |")}, " | "))
		}
	}
	var want []string
	for _, r := range defaults(t) {
		lasting := "at once"
		if r.lasting != 0 {
			lasting = r.lasting.String()
		}
		want = append(want, strings.Join([]string{r.name, r.severity, lasting, r.action}, " | "))
	}
	require.Equal(t, want, got)
}

type defaultRule struct {
	name, expr, severity, action string
	lasting                      model.Duration
}

func defaults(t *testing.T) (list []defaultRule) {
	t.Helper()
	f, err := rulefiles.Default()
	require.NoError(t, err)
	for _, g := range f.Groups.Groups {
		for _, r := range g.Rules {
			list = append(list, defaultRule{r.Alert, r.Expr, r.Labels["severity"], r.Annotations["action"], r.For})
		}
	}
	return list
}

// The series that the default rules need are kept.
func TestDefaultRulesAreOnKeptSeries(t *testing.T) {
	base, err := scrapeconfig.Base(scrapeconfig.Options{Node: "n", Kubeconfig: "/k", Kubelets: scrapeconfig.TLSFiles{CA: "/a", Cert: "/b", Key: "/c"}, Local: scrapeconfig.Local()})
	require.NoError(t, err)
	jobs := map[string]*config.ScrapeConfig{}
	for _, j := range base.ScrapeConfigs {
		jobs[j.JobName] = j
	}
	n := 0
	for _, r := range defaults(t) {
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(r.expr)
		require.NoError(t, err)
		parser.Inspect(expr, func(node parser.Node, _ []parser.Node) error {
			v, ok := node.(*parser.VectorSelector)
			if !ok || v.Name == "up" {
				return nil
			}
			var job string
			names := []string{v.Name}
			for _, m := range v.LabelMatchers {
				switch {
				case m.Name == model.JobLabel && m.Type == labels.MatchEqual:
					job = m.Value
				case m.Name == model.MetricNameLabel && m.Type == labels.MatchRegexp:
					names = m.SetMatches()
				}
			}
			require.NotNil(t, jobs[job], "%s: %s is not of one of the store's own jobs, so that anybody could make it", r.name, v)
			require.NotEmpty(t, names, "%s: %s", r.name, v)
			for _, name := range names {
				n++
				b := labels.NewBuilder(labels.FromStrings(model.MetricNameLabel, name, "namespace", "shop", "pod", "a", "container", "a", "reporter", "source", "source_workload_namespace", "shop"))
				require.True(t, relabel.ProcessBuilder(b, jobs[job].MetricRelabelConfigs...), "%s: %s of %s is not kept", r.name, name, job)
			}
			return nil
		})
	}
	require.Greater(t, n, len(defaults(t)))
}

// Each rule about workloads and the platform finds what is wrong, and nothing else.
func TestDefaultRules(t *testing.T) {
	var n atomic.Int64
	bad := func(w http.ResponseWriter, r *http.Request) {
		grows := n.Add(10)
		text(fmt.Sprintf(`istio_requests_total{job="istio-proxy",reporter="source",destination_service_namespace="shop",destination_service_name="api",response_code="503"} %[1]d
istio_requests_total{job="istio-proxy",reporter="source",destination_service_namespace="shop",destination_service_name="api",response_code="200"} %[1]d
istio_requests_total{job="istio-proxy",reporter="source",destination_service_namespace="shop",destination_service_name="good",response_code="503"} 1
istio_requests_total{job="istio-proxy",reporter="source",destination_service_namespace="shop",destination_service_name="good",response_code="200"} %[1]d
istio_agent_cert_expiry_seconds{job="istio-proxy",namespace="shop",pod="api",resource_name="default"} 600
istio_agent_cert_expiry_seconds{job="istio-proxy",namespace="shop",pod="good",resource_name="default"} 40000
citadel_server_root_cert_expiry_seconds{job="istiod",namespace="istio-system"} 86400
kube_pod_container_status_waiting_reason{job="kube-state",namespace="shop",pod="api",uid="1",container="c",reason="CrashLoopBackOff"} 1
kube_pod_init_container_status_waiting_reason{job="kube-state",namespace="shop",pod="web",uid="2",container="i",reason="ImagePullBackOff"} 1
kube_pod_container_status_waiting_reason{job="kube-state",namespace="shop",pod="good",uid="3",container="c",reason="ContainerCreating"} 1
kube_pod_container_status_restarts_total{job="kube-state",namespace="shop",pod="api",uid="1",container="c"} %[1]d
kube_pod_container_status_last_terminated_reason{job="kube-state",namespace="shop",pod="api",uid="1",container="c",reason="OOMKilled"} 1
kube_pod_container_status_restarts_total{job="kube-state",namespace="shop",pod="good",uid="3",container="c"} 4
kube_pod_container_status_last_terminated_reason{job="kube-state",namespace="shop",pod="good",uid="3",container="c",reason="OOMKilled"} 1
node_filesystem_size_bytes{job="node",mountpoint="/"} 100
node_filesystem_avail_bytes{job="node",mountpoint="/"} 7
node_filesystem_readonly{job="node",mountpoint="/"} 0
node_filesystem_size_bytes{job="node",mountpoint="/cd"} 100
node_filesystem_avail_bytes{job="node",mountpoint="/cd"} 0
node_filesystem_readonly{job="node",mountpoint="/cd"} 1
node_filesystem_size_bytes{job="node",mountpoint="/data"} 100
node_filesystem_avail_bytes{job="node",mountpoint="/data"} 50
node_filesystem_readonly{job="node",mountpoint="/data"} 0
`, grows))(w, r)
	}
	address := target(t, "127.0.0.1", bad)
	closed := target(t, "127.0.0.1", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	s := open(t, Options{Base: addJobs(t, fast(t, scrapeconfig.Options{}), "scrape_configs: [{job_name: a, honor_labels: true, static_configs: [{targets: ["+address+"]}]}, {job_name: down, static_configs: [{targets: ["+closed+"]}]}]")})
	want := map[string]string{
		"ServiceErrors":           `{destination_service_name="api", destination_service_namespace="shop"} 50`,
		"ContainerCrashLoop":      `{container="c", namespace="shop", pod="api"} 1`,
		"ContainerOOMKilled":      `{container="c", namespace="shop", pod="api"}`,
		"ImagePullFailing":        `{container="i", namespace="shop", pod="web"} 1`,
		"TargetDown":              `{job="down"} 1`,
		"DiskNearlyFull":          `mountpoint="/"} 7`,
		"ProxyCertificateEnds":    `{namespace="shop", pod="api"} 600`,
		"MeshRootCertificateEnds": `{namespace="istio-system"} 86400`,
	}
	for _, r := range defaults(t) {
		if want[r.name] == "" {
			continue
		}
		var got []string
		s.eventually(fmt.Sprintf("%s: %s: %q", r.name, r.expr, got), func() bool {
			got = s.query(r.expr)
			return len(got) == 1 && strings.Contains(got[0], want[r.name])
		})
		delete(want, r.name)
	}
	require.Empty(t, want)
}
