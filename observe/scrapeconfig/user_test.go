package scrapeconfig

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/discovery/kubernetes"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/scrape"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v2"
)

var origin = Origin{"shop", "prometheus-config"}

func texts(problems []Problem) []string {
	var s []string
	for _, p := range problems {
		s = append(s, p.Job+": "+p.Message)
	}
	return s
}

// The guide's ConfigMap, as it stands there.
func TestGuide(t *testing.T) {
	text, err := os.ReadFile("testdata/guide-configmap.yaml")
	require.NoError(t, err)
	var object struct {
		Data map[string]string `yaml:"data"`
	}
	require.NoError(t, yaml.Unmarshal(text, &object))
	u, problems := Merge([]byte(object.Data["prometheus.yml"]), origin, "/kubeconfig")
	require.Empty(t, problems)
	require.Len(t, u.Jobs, 2)
	require.Equal(t, "shop/prometheus-config/kubernetes-pods", u.Jobs[0].JobName)
	require.Equal(t, "shop/prometheus-config/istio-mesh", u.Jobs[1].JobName)
	require.Equal(t, model.Duration(15*time.Second), u.Jobs[0].ScrapeInterval)
	sd := u.Jobs[1].ServiceDiscoveryConfigs[0].(*kubernetes.SDConfig)
	require.Equal(t, "/kubeconfig", sd.KubeConfig)
	require.Equal(t, []string{"istio-system"}, sd.NamespaceDiscovery.Names)
	// The first has the same source as the store's own jobs, so pods are watched once.
	require.Equal(t, kubernetesSD(kubernetes.RolePod, "/kubeconfig"), u.Jobs[0].ServiceDiscoveryConfigs[0])

	got := target(t, u.Jobs[0], discovered("10.42.0.7:8000", pod{annotation("scrape"): "true", annotation("path"): "/stats/prometheus"}))
	require.Equal(t, "http://10.42.0.7:8000/stats/prometheus", got.URL().String())
	require.Nil(t, target(t, u.Jobs[0], discovered("10.42.0.7:8000", nil)))

	base, err := Base(all)
	require.NoError(t, err)
	own := len(base.ScrapeConfigs)
	joined, left := Join(base, []User{u})
	require.Empty(t, left)
	require.Len(t, joined.ScrapeConfigs, own+2)
	require.Len(t, base.ScrapeConfigs, own)
	_, err = joined.GetScrapeConfigs()
	require.NoError(t, err)
}

func job1(body string) string {
	return "scrape_configs:\n- job_name: x\n" + strings.TrimRight("  "+strings.ReplaceAll(body, "\n", "\n  "), " ") + "\n"
}

// What a user who may write a ConfigMap does not get. The job is left out, and the next one is used.
func TestHostile(t *testing.T) {
	for what, c := range map[string]struct{ body, problem string }{
		"a token file":              {"bearer_token_file: /etc/shadow", "credentials_file is not allowed"}, // Prometheus reads the old key as the new one
		"a credentials file":        {"authorization: {credentials_file: /var/lib/polymesh/server/token}", "authorization.credentials_file is not allowed"},
		"a password file":           {"basic_auth: {username: a, password_file: /etc/shadow}", "basic_auth.password_file is not allowed"},
		"a user's file":             {"basic_auth: {username_file: /etc/shadow, password: a}", "basic_auth.username_file is not allowed"},
		"the machine's certificate": {"tls_config: {cert_file: /tls/client.crt, key_file: /tls/client.key}", "tls_config.cert_file is not allowed"},
		"a CA file":                 {"tls_config: {ca_file: /etc/shadow}", "tls_config.ca_file is not allowed"},
		"a secret's name":           {"tls_config: {ca_ref: x}", "tls_config.ca_ref is not supported"},
		"headers from a file":       {"http_headers: {X-A: {files: [/etc/shadow]}}", "http_headers.X-A.files is not allowed"},
		"OAuth's secret in a file":  {"oauth2: {client_id: a, client_secret_file: /etc/shadow, token_url: 'http://127.0.0.1/'}", "oauth2 is not allowed"},
		"OAuth":                     {"oauth2: {client_id: a, client_secret: b, token_url: 'http://127.0.0.1:6443/'}", "oauth2 is not allowed"},
		"a proxy":                   {"proxy_url: http://127.0.0.1:3128", "proxy_url is not allowed"},
		"the machine's proxy":       {"proxy_from_environment: true", "proxy_from_environment is not allowed"},
		"targets in a file":         {"file_sd_configs: [{files: [/etc/x.yml]}]", "file_sd_configs is not allowed"},
		"targets by HTTP":           {"http_sd_configs: [{url: 'http://127.0.0.1:6443/'}]", "http_sd_configs is not allowed"},
		"a kubeconfig":              {"kubernetes_sd_configs: [{role: pod, kubeconfig_file: /etc/polymesh/admin.kubeconfig}]", "kubernetes_sd_configs.kubeconfig_file is not allowed"},
		"an API server":             {"kubernetes_sd_configs: [{role: pod, api_server: 'https://127.0.0.1:6443'}]", "kubernetes_sd_configs.api_server is not allowed"},
		"an API server and a token": {"kubernetes_sd_configs: [{role: pod, api_server: 'https://127.0.0.1:6443', authorization: {credentials_file: /t}}]", "kubernetes_sd_configs.authorization is not supported"},
		"loopback":                  {"static_configs: [{targets: ['127.0.0.1:10249']}]", "it is this machine's own"},
		"loopback, IPv6":            {"static_configs: [{targets: ['[::1]:10249']}]", "it is this machine's own"},
		"loopback, IPv4 in IPv6":    {"static_configs: [{targets: ['[::ffff:127.0.0.1]:10249']}]", "it is this machine's own"},
		"0":                         {"static_configs: [{targets: ['0.0.0.0:10249']}]", "it is this machine's own"},
		"localhost":                 {"static_configs: [{targets: ['LocalHost.:10249']}]", "it is this machine's own"},
		"this process":              {"static_configs: [{targets: ['node.polymesh.invalid']}]", "it is this machine's own"},
		"metadata":                  {"static_configs: [{targets: ['169.254.169.254']}]", "it is link-local"},
		"metadata, IPv6":            {"static_configs: [{targets: ['[fd00:ec2::254]:80']}]", "metadata"},
		"multicast":                 {"static_configs: [{targets: ['224.0.0.1:1']}]", "it is not one machine's"},
		"many targets":              {"static_configs: [{targets: [" + strings.Repeat("a, ", 300) + "a]}]", "more than 200 targets"},
		"many namespaces":           {"kubernetes_sd_configs: [{role: pod, namespaces: {names: [" + strings.Repeat("a, ", 30) + "a]}}]", "more than 20 namespaces"},
		"many names":                {"dns_sd_configs: [{names: [" + strings.Repeat("a, ", 30) + "a]}]", "more than 20 names"},
		"many sources":              {"dns_sd_configs: [" + strings.Repeat("{names: [a]}, ", 11) + "{names: [a]}]", "more than 10 sources"},
		"many rules":                {"relabel_configs: [" + strings.Repeat("{action: labeldrop, regex: a}, ", 100) + "{action: labeldrop, regex: a}]", "more than 100 rules"},
	} {
		t.Run(what, func(t *testing.T) {
			u, problems := Merge([]byte(job1(c.body)+"- job_name: good\n  static_configs: [{targets: ['10.1.2.3:80']}]\n"), origin, "/kubeconfig")
			require.NotEmpty(t, problems)
			require.Contains(t, strings.Join(texts(problems), "\n"), c.problem)
			for _, p := range problems {
				require.Equal(t, "x", p.Job)
				require.Contains(t, p.Message, "the job is not used")
			}
			require.Len(t, u.Jobs, 1)
			require.Equal(t, "shop/prometheus-config/good", u.Jobs[0].JobName)
		})
	}
}

// A file that Prometheus does not read is a problem, in bounded words.
func TestUnreadable(t *testing.T) {
	for what, c := range map[string]struct{ text, problem string }{
		"no YAML":         {"{", "Prometheus does not accept it"},
		"unknown":         {job1("consul_sd_configs: [{server: a}]"), "consul_sd_configs"},
		"twice":           {job1("") + "- job_name: x\n", "found multiple scrape configs"},
		"not relabelling": {job1("relabel_configs: [{regex: '('}]"), "missing closing"},
		"aliases":         {job1("params:\n  a: &a [x,x,x,x,x,x,x,x,x,x]\n  b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n  c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n  d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n  e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n  f: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]"), "Prometheus does not accept it"},
		"long":            {"# " + strings.Repeat("x", maxFile), "at most 262144"},
		"a long message":  {job1("scheme: [" + strings.Repeat("a", 10000) + "]\n" + strings.Repeat("a", 900) + ": b"), "…"},
		"deep":            {job1("params: " + strings.Repeat("[", 20000) + strings.Repeat("]", 20000)), "exceeded max depth"},
	} {
		t.Run(what, func(t *testing.T) {
			u, problems := Merge([]byte(c.text), origin, "/kubeconfig")
			require.Empty(t, u.Jobs)
			require.Len(t, problems, 1)
			require.Contains(t, problems[0].Message, c.problem)
			require.Less(t, len(problems[0].Message), 600)
		})
	}
	u, problems := Merge([]byte(job1("kubernetes_sd_configs: [{role: pod}]")), origin, "")
	require.Empty(t, u.Jobs)
	require.Contains(t, problems[0].Message, "no access to the cluster")
	u, problems = Merge(nil, origin, "")
	require.Empty(t, u.Jobs)
	require.Empty(t, problems)
}

// The environment may hold secrets, and Prometheus replaces variables in external labels.
func TestUnused(t *testing.T) {
	t.Setenv("OBSERVE_TEST_SECRET", "hunter2")
	u, problems := Merge([]byte(`
global: {external_labels: {a: "${OBSERVE_TEST_SECRET}"}, query_log_file: /tmp/q, scrape_failure_log_file: /tmp/f, evaluation_interval: 1m}
rule_files: [/etc/*.yml]
scrape_config_files: [/etc/*.yml]
remote_write: [{url: "http://127.0.0.1/"}]
remote_read: [{url: "http://127.0.0.1/"}]
storage: {tsdb: {out_of_order_time_window: 30m}}
runtime: {gogc: 10}
otlp: {}
tracing: {endpoint: "127.0.0.1:4317"}
alerting: {alert_relabel_configs: [{action: labeldrop, regex: a}]}
scrape_configs: [{job_name: x, static_configs: [{targets: ['10.1.2.3:80']}]}]
`), origin, "/kubeconfig")
	require.Len(t, u.Jobs, 1)
	require.Empty(t, u.Jobs[0].ScrapeFailureLogFile)
	all := strings.Join(texts(problems), "\n")
	require.NotContains(t, all, "hunter2")
	for _, s := range []string{"external_labels", "query_log_file", "scrape_failure_log_file", "rule_files", "scrape_config_files", "remote_write", "remote_read", "storage", "runtime", "otlp", "tracing", "alert_relabel_configs"} {
		require.Contains(t, all, s+" is not used")
	}
	require.NotContains(t, all, "evaluation_interval")
}

// What relabelling does at run time is taken back.
func TestRelabelling(t *testing.T) {
	u, problems := Merge([]byte(job1(`honor_labels: true
scrape_interval: 1s
scrape_timeout: 1s
sample_limit: 1000000
body_size_limit: 1GiB
enable_compression: true
static_configs:
- targets: ['10.1.2.3:80']
  labels: {__unix_socket__: /run/polymesh/observe.sock, job: istio-proxy, __scrape_interval__: 1ms}
relabel_configs:
- {target_label: __scrape_interval__, replacement: 1ms}
- {target_label: __scrape_timeout__, replacement: 1ms}
- {target_label: __unix_socket__, replacement: /run/containerd/containerd.sock}
- {target_label: job, replacement: istio-proxy}`)), origin, "/kubeconfig")
	require.Equal(t, []string{"x: its interval is 1s: 5s is used"}, texts(problems))
	j := u.Jobs[0]
	require.EqualValues(t, 10000, j.SampleLimit)
	require.EqualValues(t, 4<<20, j.BodySizeLimit)
	require.False(t, j.EnableCompression)
	set := model.LabelSet{model.AddressLabel: "10.1.2.3:80", scrape.UnixSocketLabel: "/run/polymesh/observe.sock", "job": "istio-proxy", "__scrape_interval__": "1ms"}
	got := target(t, j, set)
	require.Equal(t, "5s", got.GetValue(model.ScrapeIntervalLabel))
	require.Equal(t, "1s", got.GetValue(model.ScrapeTimeoutLabel))
	require.Empty(t, got.GetValue(scrape.UnixSocketLabel))
	require.Equal(t, "shop/prometheus-config/x", got.GetValue(model.JobLabel))
	require.Equal(t, `{instance="10.1.2.3:80", job="shop/prometheus-config/x"}`, got.Labels(labels.NewBuilder(labels.EmptyLabels())).String())

	// A target's own labels cannot say that they are one of the store's jobs, even if they are honoured.
	for _, name := range append(Local(), JobKubelet, JobCadvisor, JobProxies, JobWaypoints, JobPods, JobHostPods, JobIstiod) {
		_, ok := kept(j, "__name__", "istio_requests_total", "job", name)
		require.False(t, ok, name)
	}
	_, ok := kept(j, "__name__", "x", "job", "mysql")
	require.True(t, ok)
}

func TestJobNames(t *testing.T) {
	for name, want := range map[string]string{"a/b": "shop/prometheus-config/a/b", "$1 $$": "shop/prometheus-config/$1 $$"} {
		u, problems := Merge(fmt.Appendf(nil, "scrape_configs: [{job_name: %q, static_configs: [{targets: ['10.1.2.3:80']}]}]", name), origin, "")
		require.Empty(t, problems)
		require.Equal(t, want, u.Jobs[0].JobName)
		require.Equal(t, want, target(t, u.Jobs[0], model.LabelSet{model.AddressLabel: "10.1.2.3:80"}).GetValue(model.JobLabel))
	}
	for _, name := range []string{strings.Repeat("a", 200), "a\nb", "a\x1b[2J"} {
		u, problems := Merge(fmt.Appendf(nil, "scrape_configs: [{job_name: %q}]", name), origin, "")
		require.Empty(t, u.Jobs)
		require.Len(t, problems, 1)
	}
}

func TestOwnNamespace(t *testing.T) {
	u, problems := Merge([]byte(job1("kubernetes_sd_configs: [{role: pod, namespaces: {own_namespace: true, names: [a]}}]")), origin, "/kubeconfig")
	require.Empty(t, problems)
	require.Equal(t, []string{"a", "shop"}, u.Jobs[0].ServiceDiscoveryConfigs[0].(*kubernetes.SDConfig).NamespaceDiscovery.Names)
}

func TestAlertmanagers(t *testing.T) {
	u, problems := Merge([]byte(`
alerting:
  alertmanagers:
  - static_configs: [{targets: ["alertmanager.monitoring:9093"]}]
    path_prefix: /am
  - static_configs: [{targets: ["127.0.0.1:9093"]}]
  - static_configs: [{targets: ["a:9093"]}]
    basic_auth: {username: a, password_file: /etc/shadow}
  - static_configs: [{targets: ["a:9093"]}]
    sigv4: {region: a}
  - kubernetes_sd_configs: [{role: pod}]
    timeout: 1h
  - static_configs: [{targets: ["b:9093"]}]
`), origin, "/kubeconfig")
	require.Len(t, u.Alertmanagers, 2)
	require.Equal(t, "/am", u.Alertmanagers[0].PathPrefix)
	require.Equal(t, model.Duration(10*time.Second), u.Alertmanagers[1].Timeout)
	require.Len(t, problems, 4)
	all := strings.Join(texts(problems), "\n")
	for _, s := range []string{"it is this machine's own", "basic_auth is not supported", "sigv4 is not supported", "the first 5 are used"} {
		require.Contains(t, all, s)
	}
}

func TestMany(t *testing.T) {
	var b strings.Builder
	b.WriteString("scrape_configs:\n")
	for i := range 25 {
		fmt.Fprintf(&b, "- {job_name: x%d, static_configs: [{targets: ['10.1.2.3:80']}]}\n", i)
	}
	u, problems := Merge([]byte(b.String()), origin, "")
	require.Len(t, u.Jobs, 20)
	require.Len(t, problems, 1)

	base, err := Base(Options{})
	require.NoError(t, err)
	var users []User
	for i := range 7 {
		u, _ := Merge([]byte(b.String()), Origin{fmt.Sprintf("ns%d", i), "x"}, "")
		users = append([]User{u}, users...)
	}
	c, left := Join(base, users)
	require.Len(t, c.ScrapeConfigs, 100)
	require.Len(t, left, 2)
	require.Contains(t, left, Origin{"ns5", "x"})
	require.Contains(t, left, Origin{"ns6", "x"})
	require.Empty(t, base.ScrapeConfigs)
}

// Each different Kubernetes source is a copy of the cluster's objects in memory.
func TestManyWatches(t *testing.T) {
	base, err := Base(all)
	require.NoError(t, err)
	own := len(base.ScrapeConfigs)
	user := func(name, sources string) User {
		u, problems := Merge([]byte(job1("kubernetes_sd_configs: ["+sources+"]")), Origin{name, "c"}, all.Kubeconfig)
		require.Empty(t, problems)
		return u
	}
	selected := func(from, to int) string {
		var s []string
		for i := range to - from {
			s = append(s, fmt.Sprintf("{role: pod, selectors: [{role: pod, label: 'x!=y%d'}]}", from+i))
		}
		return strings.Join(s, ", ")
	}
	joined, problems := Join(base, []User{
		user("a", selected(0, 5)),
		user("b", selected(0, 5)),                          // the same ones
		user("c", "{role: pod}, {role: node}"),             // the store's own
		user("d", selected(4, 10)),                         // five more
		user("e", "{role: pod}, "+selected(5, 8)),          // three more
		user("f", selected(8, 9)+", "+selected(0, 1)),      // one more
		user("g", "{role: pod}, "+selected(7, 8)),          // known
		user("h", "{role: pod, namespaces: {names: [x]}}"), // one more
	})
	var names []string
	for _, j := range joined.ScrapeConfigs[own:] {
		names = append(names, j.JobName)
	}
	require.Equal(t, []string{"a/c/x", "b/c/x", "c/c/x", "e/c/x", "g/c/x"}, names)
	require.Len(t, problems, 3)
	for _, o := range []string{"d", "f", "h"} {
		got := problems[Origin{o, "c"}]
		require.Len(t, got, 1)
		require.Equal(t, "x", got[0].Job)
		require.Contains(t, got[0].Message, "more than 8 different kubernetes_sd_configs: the job is not used")
	}

	// Alertmanagers are found apart, and count, too.
	managers := func(sources string) User {
		u, problems := Merge([]byte("alerting: {alertmanagers: [{kubernetes_sd_configs: ["+sources+"]}]}"), Origin{"z", "c"}, all.Kubeconfig)
		require.Empty(t, problems)
		return u
	}
	_, problems = Join(base, []User{user("a", selected(0, 7)), managers("{role: pod}")})
	require.Empty(t, problems)
	joined, problems = Join(base, []User{user("a", selected(0, 8)), managers("{role: pod}")})
	require.Empty(t, joined.AlertingConfig.AlertmanagerConfigs)
	require.Contains(t, problems[Origin{"z", "c"}][0].Message, "these Alertmanagers are not used")

	// A namespace is watched once, whatever its order.
	u := user("a", "{role: pod, namespaces: {names: [b, a, b]}}, {role: pod, namespaces: {names: [a, b]}}")
	require.Equal(t, u.Jobs[0].ServiceDiscoveryConfigs[0], u.Jobs[0].ServiceDiscoveryConfigs[1])
}

func TestForbidden(t *testing.T) {
	for _, s := range []string{
		"127.0.0.1", "127.1.2.3", "0.0.0.0", "0.1.2.3", "::", "::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fe80::1%eth0",
		"224.0.0.1", "ff02::1", "255.255.255.255", "100.100.100.200", "168.63.129.16", "fd00:ec2::254",
	} {
		require.NotEmpty(t, Forbidden(netip.MustParseAddr(s)), s)
	}
	require.NotEmpty(t, Forbidden(netip.Addr{}))
	for _, s := range []string{"10.42.0.7", "192.0.2.1", "fd00::7", "::ffff:10.42.0.7", "8.8.8.8"} {
		require.Empty(t, Forbidden(netip.MustParseAddr(s)), s)
	}
}

// No file makes Merge panic or let through what would act as the machine.
func FuzzMerge(f *testing.F) {
	text, err := os.ReadFile("testdata/guide-configmap.yaml")
	require.NoError(f, err)
	f.Add(string(text))
	f.Add(job1("static_configs: [{targets: ['10.1.2.3:80']}]"))
	f.Add(job1("bearer_token_file: /etc/shadow"))
	f.Add("alerting: {alertmanagers: [{static_configs: [{targets: ['a']}]}]}")
	f.Fuzz(func(t *testing.T, text string) {
		u, _ := Merge([]byte(text), origin, "/kubeconfig")
		base, err := Base(Options{})
		require.NoError(t, err)
		c, _ := Join(base, []User{u})
		_, err = c.GetScrapeConfigs()
		require.NoError(t, err)
		for _, j := range u.Jobs {
			for _, f := range j.ServiceDiscoveryConfigs {
				if sd, ok := f.(*kubernetes.SDConfig); ok {
					require.Equal(t, "/kubeconfig", sd.KubeConfig)
					sd.KubeConfig = ""
				}
			}
			for _, r := range refusals(j, scrapeKeys) {
				require.Empty(t, r)
			}
		}
	})
}
