package scrapeconfig

import (
	"flag"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/scrape"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v2"
)

var update = flag.Bool("update", false, "write the golden files")

var all = Options{
	Node: "node-1", Kubeconfig: "/data/observe.kubeconfig", Kubelets: TLSFiles{CA: "/tls/ca.crt", Cert: "/tls/client.crt", Key: "/tls/client.key"}, Local: Local(),
}

// The store's jobs, as the file that Prometheus would read.
func TestGolden(t *testing.T) {
	c, err := Base(all)
	require.NoError(t, err)
	got, err := yaml.Marshal(map[string]any{"scrape_configs": c.ScrapeConfigs})
	require.NoError(t, err)
	if *update {
		require.NoError(t, os.WriteFile("testdata/jobs.yaml", got, 0o644))
	}
	want, err := os.ReadFile("testdata/jobs.yaml")
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), "run with -update to accept")
	// Prometheus reads the file as the same jobs.
	again, err := load(string(got))
	require.NoError(t, err)
	second, err := yaml.Marshal(map[string]any{"scrape_configs": again.ScrapeConfigs})
	require.NoError(t, err)
	require.Equal(t, string(got), string(second))
}

func TestJobsFollowOptions(t *testing.T) {
	names := func(o Options) []string {
		c, err := Base(o)
		require.NoError(t, err)
		var names []string
		for _, j := range c.ScrapeConfigs {
			names = append(names, j.JobName)
		}
		return names
	}
	require.Empty(t, names(Options{}))
	require.Equal(t, []string{JobNode}, names(Options{Local: []string{JobNode}}))
	require.NotContains(t, names(Options{Kubeconfig: "k"}), JobKubelet)
	require.Contains(t, names(all), JobKubelet)
	_, err := Base(Options{Local: []string{"other"}})
	require.ErrorContains(t, err, `"other" is none of`)

	for _, name := range names(all) {
		require.NotEqual(t, slices.Contains(append(Local(), JobKubelet, JobCadvisor), name), Guarded(name), name)
	}
	require.True(t, Guarded("shop/prometheus-config/node"))
}

// pod is what discovery says of a container's port, before relabelling.
type pod map[model.LabelName]model.LabelValue

func discovered(address string, more pod) model.LabelSet {
	set := model.LabelSet{
		model.AddressLabel: model.LabelValue(address), podNamespace: "shop", podName: "api-5d9c7b4f6-x2x4z", podNode: "node-1", podIP: "10.42.0.7", podHostIP: "192.0.2.1",
		podPhase: "Running", podContainer: "api", podPort: "8000", podProtocol: "TCP", podOwnerKind: "ReplicaSet", podOwner: "api-5d9c7b4f6",
	}
	for k, v := range more {
		set[k] = v
	}
	return set
}

func jobNamed(t *testing.T, name string) *config.ScrapeConfig {
	c, err := Base(all)
	require.NoError(t, err)
	i := slices.IndexFunc(c.ScrapeConfigs, func(j *config.ScrapeConfig) bool { return j.JobName == name })
	return c.ScrapeConfigs[i]
}

// target relabels as Prometheus does. It is nil for a target that is dropped.
func target(t *testing.T, j *config.ScrapeConfig, set model.LabelSet) *scrape.Target {
	t.Helper()
	ls, err := scrape.PopulateLabels(labels.NewBuilder(labels.EmptyLabels()), j, set, nil)
	require.NoError(t, err)
	if ls.IsEmpty() {
		return nil
	}
	return scrape.NewTarget(ls, j, set, nil)
}

func TestTargets(t *testing.T) {
	scraped := func(more pod) pod {
		p := pod{annotation("scrape"): "true", annotation("port"): "8000", annotation("path"): "/metrics"}
		for k, v := range more {
			p[k] = v
		}
		return p
	}
	sidecar := func(more pod) pod {
		return scraped(pod{annotation("port"): "15020", annotation("path"): "/stats/prometheus", podContainer: "istio-proxy", podPort: "15090"}).with(more)
	}
	host := pod{podIP: "192.0.2.1"}
	for _, c := range []struct {
		what, job, address string
		more               pod
		want               string // URL, empty: dropped
	}{
		{"an app by its annotations", JobPods, "10.42.0.7:8000", scraped(nil), "http://10.42.0.7:8000/metrics"},
		{"another port than the declared", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "9100"}), "http://10.42.0.7:9100/metrics"},
		{"a container without ports", JobPods, "10.42.0.7", scraped(pod{annotation("port"): "9100", podPort: ""}), "http://10.42.0.7:9100/metrics"},
		{"no port anywhere", JobPods, "10.42.0.7", scraped(pod{annotation("port"): "", podPort: ""}), ""},
		{"the declared port", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): ""}), "http://10.42.0.7:8000/metrics"},
		{"UDP", JobPods, "10.42.0.7:53", scraped(pod{annotation("port"): "", podPort: "53", podProtocol: "UDP"}), ""},
		{"IPv6", JobPods, "[fd00::7]:8000", scraped(pod{podIP: "fd00::7", annotation("port"): "9100"}), "http://[fd00::7]:9100/metrics"},
		{"https and a path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("scheme"): "https", annotation("path"): "/actuator/prometheus"}), "https://10.42.0.7:8000/actuator/prometheus"},
		{"not annotated", JobPods, "10.42.0.7:8000", nil, ""},
		{"finished", JobPods, "10.42.0.7:8000", scraped(pod{podPhase: "Succeeded"}), ""},
		{"an app with a sidecar", JobPods, "10.42.0.7:8000", sidecar(pod{podContainer: "api"}), ""},
		{"istiod is a job of its own", JobPods, "10.42.0.7:15014", scraped(pod{podNamespace: "istio-system", podLabel("app"): "istiod"}), ""},

		{"a sidecar", JobProxies, "10.42.0.7:15090", sidecar(nil), "http://10.42.0.7:15020/stats/prometheus"},
		{"a sidecar, IPv6", JobProxies, "[fd00::7]:15090", sidecar(pod{podIP: "fd00::7"}), "http://[fd00::7]:15020/stats/prometheus"},
		{"a sidecar that does not merge", JobProxies, "10.42.0.7:15090", sidecar(pod{annotation("port"): "8000"}), "http://10.42.0.7:15090/stats/prometheus"},
		{"a sidecar without annotations", JobProxies, "10.42.0.7:15090", pod{podContainer: "istio-proxy", podPort: "15090"}, "http://10.42.0.7:15090/stats/prometheus"},
		{"a sidecar that starts first", JobProxies, "10.42.0.7:15090", sidecar(pod{podPhase: "Pending"}), "http://10.42.0.7:15020/stats/prometheus"},
		{"a waypoint is a job of its own", JobProxies, "10.42.0.7:15090", sidecar(pod{gatewayClass: "istio-waypoint"}), ""},
		{"a gateway is not", JobProxies, "10.42.0.7:15090", sidecar(pod{gatewayClass: "istio"}), "http://10.42.0.7:15020/stats/prometheus"},
		{"a waypoint", JobWaypoints, "10.42.0.7:15090", sidecar(pod{gatewayClass: "istio-waypoint"}), "http://10.42.0.7:15020/stats/prometheus"},
		{"no waypoint", JobWaypoints, "10.42.0.7:15090", sidecar(nil), ""},
		{"a gateway that is no waypoint", JobWaypoints, "10.42.0.7:15090", sidecar(pod{gatewayClass: "istio"}), ""},
		{"another port of a gateway", JobProxies, "10.42.0.7:8443", sidecar(pod{podPort: "8443"}), ""},
		{"the app's container", JobProxies, "10.42.0.7:15090", sidecar(pod{podContainer: "api"}), ""},

		{"istiod", JobIstiod, "10.42.0.7:15014", pod{podNamespace: "istio-system", podLabel("app"): "istiod", podPort: "15014"}, "http://10.42.0.7:15014/metrics"},
		{"istiod's other port", JobIstiod, "10.42.0.7:15012", pod{podNamespace: "istio-system", podLabel("app"): "istiod", podPort: "15012"}, ""},
		{"istiod elsewhere", JobIstiod, "10.42.0.7:15014", pod{podLabel("app"): "istiod", podPort: "15014"}, ""},

		// What an annotation cannot do.
		{"a host in the port", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "80@127.0.0.1:6443"}), ""},
		{"a path in the port", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "80/admin"}), ""},
		{"an address in the port", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "127.0.0.1:6443"}), ""},
		{"two ports", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "80;81"}), ""},
		{"a new line", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "80\n"}), ""},
		{"port 0", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "0"}), ""},
		{"port 65536", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "65536"}), ""},
		{"port 65535", JobPods, "10.42.0.7:8000", scraped(pod{annotation("port"): "65535"}), "http://10.42.0.7:65535/metrics"},
		{"a URL as path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "http://127.0.0.1/"}), "http://10.42.0.7:8000/metrics"},
		{"a query as path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "/metrics?a=b"}), "http://10.42.0.7:8000/metrics"},
		{"a host as path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "//127.0.0.1/x"}), "http://10.42.0.7:8000//127.0.0.1/x"},
		{"a path without a slash", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "@127.0.0.1/x"}), "http://10.42.0.7:8000/metrics"},
		{"a header in the path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "/ HTTP/1.1\r\nHost: x"}), "http://10.42.0.7:8000/metrics"},
		{"a long path", JobPods, "10.42.0.7:8000", scraped(pod{annotation("path"): "/" + model.LabelValue(strings.Repeat("a", 300))}), "http://10.42.0.7:8000/metrics"},
		{"another scheme", JobPods, "10.42.0.7:8000", scraped(pod{annotation("scheme"): "file"}), "http://10.42.0.7:8000/metrics"},
		{"another host for a sidecar", JobProxies, "10.42.0.7:15090", sidecar(pod{annotation("port"): "15020;127.0.0.1", annotation("path"): "//x"}), "http://10.42.0.7:15090/stats/prometheus"},

		// A pod in the machine's network.
		{"it is not in the first job", JobPods, "192.0.2.1:9100", scraped(host), ""},
		{"a declared port", JobHostPods, "192.0.2.1:9100", scraped(pod{annotation("port"): "9100", podPort: "9100"}.with(host)), "http://192.0.2.1:9100/metrics"},
		{"no annotated port", JobHostPods, "192.0.2.1:9100", scraped(pod{annotation("port"): "", podPort: "9100"}.with(host)), "http://192.0.2.1:9100/metrics"},
		{"a port of the machine's", JobHostPods, "192.0.2.1:9100", scraped(pod{annotation("port"): "10250", podPort: "9100"}.with(host)), ""},
		{"a port of the machine's, nothing declared", JobHostPods, "192.0.2.1", scraped(pod{annotation("port"): "10250", podPort: ""}.with(host)), ""},
		{"others are not in the second", JobHostPods, "10.42.0.7:8000", scraped(nil), ""},
	} {
		t.Run(c.job+"/"+c.what, func(t *testing.T) {
			got := target(t, jobNamed(t, c.job), discovered(c.address, c.more))
			if c.want == "" {
				require.Nil(t, got)
				return
			}
			require.NotNil(t, got)
			require.Equal(t, c.want, got.URL().String())
			want := c.job
			if want == JobWaypoints {
				want = JobProxies
			}
			require.Equal(t, want, got.GetValue(model.JobLabel))
		})
	}
}

const gatewayClass = meta + "pod_label_gateway_networking_k8s_io_gateway_class_name"

func (p pod) with(more pod) pod {
	for k, v := range more {
		p[k] = v
	}
	return p
}

// A proxy, or its app, reports what its own namespace sends and gets, and a waypoint what it passes on to there: nothing between
// two others, whatever it says that it is.
func TestReporters(t *testing.T) {
	for _, name := range []string{JobProxies, JobWaypoints} {
		j := jobNamed(t, name)
		for _, metric := range []string{"istio_requests_total", "istio_tcp_sent_bytes_total", "istio_request_duration_milliseconds_bucket", "istio_made_up"} {
			for _, reporter := range []string{"source", "destination", "waypoint", "x", "", "source;", "SOURCE", "destination|waypoint"} {
				for _, source := range []string{"shop", "evil", ""} {
					for _, destination := range []string{"bank", "evil", ""} {
						_, ok := kept(j, "__name__", metric, "namespace", "evil", "reporter", reporter, "source_workload_namespace", source,
							"destination_workload_namespace", destination, "__tmp_namespace", "evil")
						want := reporter == "source" && source == "evil" || reporter == "destination" && destination == "evil" ||
							reporter == "waypoint" && destination == "evil" && name == JobWaypoints
						require.Equal(t, want, ok, "%s: %s by %q from %q to %q", name, metric, reporter, source, destination)
					}
				}
			}
		}
	}
}

// A target's labels are these and no others, so that a pod's own labels make no series.
func TestLabels(t *testing.T) {
	p := pod{annotation("scrape"): "true", annotation("port"): "15020", podContainer: "istio-proxy", podPort: "15090", podLabel("pod_template_hash"): "5d9c7b4f6", podLabel("app"): "api-service", podLabel("x"): "y"}
	got := target(t, jobNamed(t, JobProxies), discovered("10.42.0.7:15090", p)).Labels(labels.NewBuilder(labels.EmptyLabels()))
	require.Equal(t, map[string]string{
		"job": "istio-proxy", "instance": "10.42.0.7:15020", "namespace": "shop", "pod": "api-5d9c7b4f6-x2x4z", "node": "node-1", "workload": "api", "service": "api-service",
	}, got.Map())

	for _, c := range []struct {
		kind, owner, pod model.LabelValue
		workload         string
	}{
		{"ReplicaSet", "api-5d9c7b4f6", "api-5d9c7b4f6-x2x4z", "api"},
		{"StatefulSet", "db", "db-0", "db"},
		{"DaemonSet", "agent", "agent-x2x4z", "agent"},
		{"Job", "backup-29311200", "backup-29311200-x2x4z", "backup"},
		{"Job", "migrate", "migrate-x2x4z", "migrate"},
		{"", "", "alone", "alone"},
	} {
		got := target(t, jobNamed(t, JobProxies), discovered("10.42.0.7:15090", p.with(pod{podOwnerKind: c.kind, podOwner: c.owner, podName: c.pod})))
		require.Equal(t, c.workload, got.GetValue("workload"), "%s %s", c.kind, c.owner)
	}
}

// kept relabels a sample's labels as Prometheus does. It is false for one that is dropped.
func kept(j *config.ScrapeConfig, ls ...string) (string, bool) {
	b := labels.NewBuilder(labels.FromStrings(ls...))
	ok := relabel.ProcessBuilder(b, j.MetricRelabelConfigs...)
	return b.Labels().String(), ok
}

func TestSamples(t *testing.T) {
	for _, c := range []struct {
		job  string
		in   []string
		want string // empty: dropped
	}{
		{JobProxies, []string{"__name__", "envoy_server_live", "namespace", "shop"}, `{__name__="envoy_server_live", namespace="shop"}`},
		{JobProxies, []string{"__name__", "envoy_cluster_upstream_rq", "namespace", "shop"}, ""},
		{JobProxies, []string{"__name__", "envoy_cluster_upstream_rq", "namespace", "shop", "__tmp_kept", "1"}, ""},
		{JobProxies, []string{"__name__", "istio_agent_go_goroutines", "namespace", "shop"}, ""},
		{JobProxies, []string{"__name__", "istio_agent_cert_expiry_seconds", "namespace", "shop"}, `{__name__="istio_agent_cert_expiry_seconds", namespace="shop"}`},
		{JobProxies, []string{"__name__", "my_orders_total", "namespace", "shop", "pod_template_hash", "x"}, `{__name__="my_orders_total", namespace="shop"}`},
		{JobProxies, []string{"__name__", "my_orders_total", "namespace", "shop", "reporter", "source"}, `{__name__="my_orders_total", namespace="shop", reporter="source"}`},
		{
			JobProxies, []string{"__name__", "istio_requests_total", "namespace", "shop", "reporter", "source", "source_workload_namespace", "shop", "destination_workload_namespace", "other"},
			`{__name__="istio_requests_total", destination_workload_namespace="other", namespace="shop", reporter="source", source_workload_namespace="shop"}`,
		},
		// A proxy, or its app, speaks for its own namespace only.
		{JobProxies, []string{"__name__", "istio_requests_total", "namespace", "shop", "reporter", "source", "source_workload_namespace", "other", "destination_workload_namespace", "shop"}, ""},
		{JobProxies, []string{"__name__", "istio_requests_total", "namespace", "shop", "reporter", "destination", "destination_workload_namespace", "other"}, ""},
		{JobProxies, []string{"__name__", "istio_requests_total", "namespace", "shop", "reporter", "destination"}, ""},
		{JobProxies, []string{"__name__", "istio_build", "namespace", "shop"}, `{__name__="istio_build", namespace="shop"}`},
		{JobPods, []string{"__name__", "istio_requests_total", "namespace", "shop", "reporter", "source", "source_workload_namespace", "shop"}, ""},
		{JobPods, []string{"__name__", "envoy_x", "namespace", "shop"}, `{__name__="envoy_x", namespace="shop"}`},

		{JobKubelet, []string{"__name__", "container_cpu_usage_seconds_total", "container", "api"}, `{__name__="container_cpu_usage_seconds_total", container="api"}`},
		{JobKubelet, []string{"__name__", "apiserver_request_total"}, ""},
		{JobCadvisor, []string{"__name__", "container_network_receive_bytes_total", "pod", "api", "id", "/x", "image", "pause", "name", "1234", "interface", "eth0"}, `{__name__="container_network_receive_bytes_total", interface="eth0", pod="api"}`},
		{JobCadvisor, []string{"__name__", "container_network_receive_bytes_total", "id", "/", "interface", "eth0"}, ""},
		{JobCadvisor, []string{"__name__", "container_oom_events_total", "pod", "api", "container", ""}, ""},
		{JobCadvisor, []string{"__name__", "container_oom_events_total", "pod", "api", "container", "api"}, `{__name__="container_oom_events_total", container="api", pod="api"}`},
		{JobCadvisor, []string{"__name__", "container_cpu_usage_seconds_total", "pod", "api", "container", "api"}, ""},
		{JobIstiod, []string{"__name__", "pilot_xds"}, `{__name__="pilot_xds"}`},
		{JobIstiod, []string{"__name__", "grpc_server_handled_total"}, ""},
		{JobSelf, []string{"__name__", "prometheus_tsdb_head_series"}, `{__name__="prometheus_tsdb_head_series"}`},
		{JobSelf, []string{"__name__", "prometheus_http_requests_total"}, ""},
	} {
		got, ok := kept(jobNamed(t, c.job), c.in...)
		if c.want == "" {
			require.False(t, ok, "%s %v", c.job, c.in)
			continue
		}
		require.True(t, ok, "%s %v", c.job, c.in)
		require.Equal(t, c.want, got)
	}
}

// What cAdvisor counts for a pod with two containers, one of them with a CPU limit, is 13 series of some hundred. It counts the pod's network
// once, with no container, and the same numbers for the pod's cgroup and for those of the machine.
func TestCadvisorSeries(t *testing.T) {
	each := strings.Fields(`container_blkio_device_usage_total container_cpu_load_average_10s container_cpu_usage_seconds_total container_cpu_user_seconds_total
		container_file_descriptors container_fs_inodes_total container_fs_usage_bytes container_last_seen container_memory_cache container_memory_failures_total
		container_memory_rss container_memory_usage_bytes container_memory_working_set_bytes container_oom_events_total container_processes
		container_spec_cpu_period container_spec_memory_limit_bytes container_start_time_seconds container_threads`)
	limited := []string{"container_cpu_cfs_periods_total", "container_cpu_cfs_throttled_periods_total", "container_cpu_cfs_throttled_seconds_total"}
	var network []string
	for _, way := range []string{"receive", "transmit"} {
		for _, what := range []string{"bytes", "errors", "packets", "packets_dropped"} {
			network = append(network, "container_network_"+way+"_"+what+"_total")
		}
	}
	j, all, got := jobNamed(t, JobCadvisor), 0, map[string]int{}
	count := func(names []string, pod, container string) {
		for _, name := range names {
			all++
			if _, ok := kept(j, "__name__", name, "id", "/x", "namespace", "shop", "pod", pod, "container", container); ok {
				got[name]++
			}
		}
	}
	count(append(each, limited...), "api", "api")
	count(each, "api", "istio-proxy")
	count(append(each, network...), "api", "") // the pod's sandbox and its cgroup
	count(append(each, network...), "", "")
	want := map[string]int{"container_memory_rss": 2, "container_oom_events_total": 2}
	for _, name := range limited {
		want[name] = 1
	}
	for _, name := range network {
		if !strings.Contains(name, "errors") {
			want[name] = 1
		}
	}
	require.Equal(t, want, got)
	require.Greater(t, all, 90)
}
