// Package scrapeconfig configures what Prometheus' scraper reads, how often, and what it keeps.
//
// It owns the jobs of the store (Base) and what a user's own prometheus.yml may add to them (Merge). Its functions turn settings
// into Prometheus' configuration types; package metrics runs them.
//
// Targets in the cluster that are not the store's own are reached through a dialer that refuses this machine's addresses:
// see Guarded.
package scrapeconfig

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/units"
	commonconfig "github.com/prometheus/common/config"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/discovery"
	_ "github.com/prometheus/prometheus/discovery/dns" // dns_sd_configs of users
	_ "github.com/prometheus/prometheus/discovery/file"
	_ "github.com/prometheus/prometheus/discovery/http" // file and http are only parsed to be refused with a reason
	"github.com/prometheus/prometheus/discovery/kubernetes"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"github.com/prometheus/prometheus/model/relabel"
)

// The names of the store's jobs, which are the label "job" of their samples. A user's job always has two slashes in its name.
const (
	// JobProxies reads sidecars and gateways, including the metrics of their apps.
	JobProxies = "istio-proxy"
	// JobWaypoints reads waypoints, through which others' requests pass. Their samples have the label job of JobProxies.
	JobWaypoints = "istio-waypoint"
	// JobPods reads the other pods that have Prometheus' annotations, and JobHostPods those in the machine's network.
	JobPods     = "pods"
	JobHostPods = "host-pods"
	// JobIstiod reads Istio's control plane.
	JobIstiod = "istiod"
	// JobKubelet reads the use of CPU and memory from the kubelets, and JobCadvisor their other metrics of containers.
	JobKubelet  = "kubelet"
	JobCadvisor = "cadvisor"
	// These are read in this process.
	JobNode   = "node"
	JobState  = "kube-state"
	JobSelf   = "polymesh-observe"
	JobServer = "polymesh-server"
)

// Local lists the jobs that are read in this process.
func Local() []string { return []string{JobNode, JobState, JobSelf, JobServer} }

// guarded lists the store's jobs with addresses that others can influence: by a pod's annotation, or a redirect.
var guarded = []string{JobProxies, JobWaypoints, JobPods, JobHostPods, JobIstiod}

// Guarded reports whether others can influence the addresses of a job, so that it must not reach this machine's own services.
// They cannot for kubelets and for jobs in this process.
func Guarded(job string) bool { return strings.Contains(job, "/") || slices.Contains(guarded, job) }

// OfKubelet reports whether a job reads kubelets, which may be compromised like their nodes.
func OfKubelet(job string) bool { return job == JobKubelet || job == JobCadvisor }

// localDomain is the domain of the addresses of jobs in this process. RFC 6761 ensures that it is never resolved.
const localDomain = ".polymesh.invalid"

// LocalAddress returns the address of a job in this process. Package metrics connects to it without a socket.
func LocalAddress(job string) string { return job + localDomain + ":80" }

// Options of the store's own jobs.
type Options struct {
	// Node is the name of this machine's node, the label "instance" of jobs in this process.
	Node string
	// Kubeconfig lets discovery see pods and nodes. It may not exist yet.
	Kubeconfig string
	// Kubelets are the credentials for kubelets. Without a CA, kubelets are not read.
	Kubelets TLSFiles
	// MeshNamespace is where istiod runs. Empty means istio-system.
	MeshNamespace string
	// Local lists the enabled jobs in this process.
	Local []string
	// Series is how many series the store has room for, 20,000 or more. The limits on targets and samples of the store's own jobs follow it.
	Series int
	// Interval between two readings of a target. 0 means 15 s. Kubelets and objects are read half as often.
	Interval time.Duration
}

// TLSFiles are PEM files: the authority to trust, and the client's certificate and key. They are read again when they change.
type TLSFiles struct{ CA, Cert, Key string }

const (
	defaultInterval = 15 * time.Second
	// evaluation is how often rules are evaluated.
	evaluation = 30 * time.Second
	// maxTimeout of one reading.
	maxTimeout = 10 * time.Second
	// maxBody is the largest answer. An answer is in memory as a whole while it is read. Answers of a large gateway, a kubelet with many
	// pods or all objects of a cluster may be larger.
	maxBody      = 4 * units.MiB
	maxLargeBody = 16 * units.MiB
	// The labels of a sample, with those of its target. A proxy's have some 40. See metrics for all labels of a series.
	maxLabels     = 64
	maxLabelName  = 128
	maxLabelValue = 512
)

// DefaultSeries is the number of series for which the store's limits on metrics are made.
const DefaultSeries = 20_000

// Scaled returns what a limit for DefaultSeries is with room for so many; fewer do not lower it.
func Scaled[T ~int64 | ~uint](limit T, series int) T {
	return limit * T(max(series, DefaultSeries)) / DefaultSeries
}

// Base returns the configuration with the store's own jobs.
func Base(o Options) (*config.Config, error) {
	if o.Interval == 0 {
		o.Interval = defaultInterval
	}
	if o.MeshNamespace == "" {
		o.MeshNamespace = "istio-system"
	}
	c, err := load("")
	if err != nil {
		return nil, err
	}
	c.GlobalConfig.ScrapeInterval = model.Duration(o.Interval)
	c.GlobalConfig.ScrapeTimeout = model.Duration(min(o.Interval, maxTimeout))
	c.GlobalConfig.EvaluationInterval = model.Duration(evaluation)

	var jobs []*config.ScrapeConfig
	if o.Kubeconfig != "" {
		pods := discovery.Configs{kubernetesSD(kubernetes.RolePod, o.Kubeconfig)}
		jobs = append(jobs, proxies(JobProxies, pods), proxies(JobWaypoints, pods), annotated(JobPods, pods, o.MeshNamespace), annotated(JobHostPods, pods, o.MeshNamespace), istiod(pods, o.MeshNamespace))
		if o.Kubelets.CA != "" {
			nodes := discovery.Configs{kubernetesSD(kubernetes.RoleNode, o.Kubeconfig)}
			jobs = append(jobs, kubelet(JobKubelet, "/metrics/resource", nodes, o), kubelet(JobCadvisor, "/metrics/cadvisor", nodes, o))
		}
	}
	for _, name := range o.Local {
		if !slices.Contains(Local(), name) {
			return nil, fmt.Errorf("the job %q is none of %s", name, strings.Join(Local(), ", "))
		}
		jobs = append(jobs, local(name, o))
	}
	for _, j := range jobs {
		j.SampleLimit = Scaled(j.SampleLimit, o.Series)
		j.TargetLimit = Scaled(j.TargetLimit, o.Series)
		j.BodySizeLimit = Scaled(j.BodySizeLimit, o.Series)
		if err := j.Validate(c.GlobalConfig); err != nil {
			return nil, fmt.Errorf("the job %s: %w", j.JobName, err)
		}
	}
	c.ScrapeConfigs = jobs
	return c, nil
}

// load parses Prometheus' configuration format. Only a loaded Config returns its jobs, so an empty text is loaded, too.
func load(text string) (*config.Config, error) {
	return config.Load(text, slog.New(slog.DiscardHandler))
}

func kubernetesSD(role kubernetes.Role, kubeconfig string) *kubernetes.SDConfig {
	sd := kubernetes.DefaultSDConfig
	sd.Role, sd.KubeConfig = role, kubeconfig
	return &sd
}

// job returns a job with the limits of all of the store's jobs. A target that exceeds one is down, with a reason.
func job(name string, sd discovery.Configs) *config.ScrapeConfig {
	j := config.DefaultScrapeConfig
	j.JobName = name
	j.ServiceDiscoveryConfigs = sd
	j.HTTPClientConfig = commonconfig.DefaultHTTPClientConfig
	// A redirect's answer would be stored as this target's.
	j.HTTPClientConfig.FollowRedirects = false
	j.BodySizeLimit = maxBody
	// Compressed answers are not requested, so that a large answer costs its sender as much. One that is compressed anyway is
	// read, up to its limit.
	j.EnableCompression = !Guarded(name)
	j.SampleLimit = 5000
	j.TargetLimit = 1000
	j.LabelLimit = maxLabels
	j.LabelNameLengthLimit = maxLabelName
	j.LabelValueLengthLimit = maxLabelValue
	// Dropped targets are only informative, and each keeps its pod's annotations in memory.
	j.KeepDroppedTargets = 10
	return &j
}

// proxies reads Envoy in sidecars and gateways. The injector has set the pod's annotations to the agent's port 15020, which serves
// Envoy's, the agent's and the app's own metrics, and is excluded from mutual TLS. A pod that has not got them (metrics are not
// merged) has Envoy's at 15090. A target's address is always the pod's with one of these two ports.
//
// Waypoints have their own job, because their samples cannot be distinguished from an app's by their contents.
func proxies(name string, sd discovery.Configs) *config.ScrapeConfig {
	const host, port = "__tmp_host", "__tmp_port"
	const waypoint = "istio-waypoint" // the class of the gateways that are waypoints
	j := job(name, sd)
	j.MetricsPath = "/stats/prometheus"
	// A gateway has some 130 series for each service behind it.
	j.SampleLimit = 10000
	j.BodySizeLimit = maxLargeBody
	j.RelabelConfigs = append([]*relabel.Config{
		keep("istio-proxy", podContainer),
		keep("15090", podPort),
		keep("Pending|Running", podPhase), // a sidecar that is an init container runs in a pod that is pending
		replace("(.+):15090", "$1", host, model.AddressLabel),
		set(port, "15090"),
		replace("15020", "15020", port, annotation("port")),
		replace("(.+);(.+)", "$1:$2", model.AddressLabel, host, port),
	}, podLabels()...)
	if name == JobWaypoints {
		j.RelabelConfigs = append(j.RelabelConfigs, keep(waypoint, podLabel("gateway_networking_k8s_io_gateway_class_name")), set(model.JobLabel, JobProxies))
	} else {
		j.RelabelConfigs = append(j.RelabelConfigs, drop(waypoint, podLabel("gateway_networking_k8s_io_gateway_class_name")))
	}
	j.MetricRelabelConfigs = slices.Concat(ownNamespace(name), only(`(?:envoy|istio_agent)_.*`, envoyKept+"|"+agentKept), dropTemplateHash())
	return j
}

// ownNamespace trusts a proxy only about its own namespace: what it reports as the source must be from there, and what it
// reports as the destination, or as a waypoint, must go there. The app's metrics come through the same port, so an app could
// otherwise invent requests between others. Metrics with another reporter, or none, are dropped, except for the agent's own.
func ownNamespace(name string) []*relabel.Config {
	const tmp = "__tmp_namespace"
	called := "destination"
	if name == JobWaypoints {
		called = "destination|waypoint"
	}
	return []*relabel.Config{
		replace("(.*)", "$1", tmp, "namespace"),
		replace("istio_.*", "", tmp, model.MetricNameLabel),
		replace("(?:istio_agent_.*|istio_build);(.*)", "$1", tmp, model.MetricNameLabel, "namespace"),
		replace("istio_.*;source;(.*)", "$1", tmp, model.MetricNameLabel, "reporter", "source_workload_namespace"),
		replace("istio_.*;(?:"+called+");(.*)", "$1", tmp, model.MetricNameLabel, "reporter", "destination_workload_namespace"),
		equal(relabel.KeepEqual, tmp, "namespace"),
		labelDrop(tmp),
	}
}

// Of Envoy's 425 series, and the agent's, these say whether a proxy works.
const (
	envoyKept = `envoy_server_(?:live|uptime|memory_allocated|total_connections|days_until_first_cert_expiring)|` +
		`envoy_cluster_manager_active_clusters|envoy_listener_manager_(?:total_listeners_active|listener_create_failure)|` +
		`envoy_cluster_upstream_cx_connect_fail|envoy_access_logs_open_telemetry_access_log_logs_dropped`
	agentKept = `istio_agent_(?:cert_expiry_seconds|process_resident_memory_bytes|process_cpu_seconds_total|startup_duration_seconds)`
)

// annotated reads pods without a sidecar by their annotations, as Prometheus' examples do: scrape, port, path, scheme.
//
// The address is the pod's own and a number. A pod in the machine's network (JobHostPods) has the machine's address, so its
// annotation could name a service of the machine's: only ports that it declares, which Kubernetes' scheduler and the pod security
// standards see, are asked. The ports of Kubernetes itself are refused by the dialer.
func annotated(name string, sd discovery.Configs, mesh string) *config.ScrapeConfig {
	const port = "__tmp_port"
	j := job(name, sd)
	// An https target usually has a self-signed certificate. Nothing secret is sent.
	j.HTTPClientConfig.TLSConfig.InsecureSkipVerify = true
	j.RelabelConfigs = []*relabel.Config{
		keep("true", annotation("scrape")),
		drop("Succeeded|Failed", podPhase),
		drop("istio-(?:proxy|init|validation)", podContainer),
		drop("15020", annotation("port")), // with a sidecar, see proxies
		drop(exactly(mesh)+";istiod", podNamespace, podLabel("app")),
		keep("|"+portNumber, annotation("port")),
		// Without a port in either place there is no target.
		drop(";", annotation("port"), podPort),
		drop("UDP|SCTP", podProtocol),
		replace("(.+)", "$1", port, podPort),
		replace("(.+)", "$1", port, annotation("port")),
	}
	if name == JobHostPods {
		j.RelabelConfigs = append(j.RelabelConfigs, equal(relabel.KeepEqual, podHostIP, podIP), equal(relabel.KeepEqual, port, podPort))
	} else {
		j.RelabelConfigs = append(j.RelabelConfigs, equal(relabel.DropEqual, podHostIP, podIP))
	}
	j.RelabelConfigs = append(j.RelabelConfigs,
		replace(`([0-9.]+);(.+)`, "$1:$2", model.AddressLabel, podIP, port),
		replace(`([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*);(.+)`, "[$1]:$2", model.AddressLabel, podIP, port),
		replace(`(/[-A-Za-z0-9_.~/]{0,200})`, "$1", model.MetricsPathLabel, annotation("path")),
		replace("(https?)", "$1", model.SchemeLabel, annotation("scheme")),
	)
	j.RelabelConfigs = append(j.RelabelConfigs, podLabels()...)
	// Only proxies have Istio's metrics. An app without a proxy can only have forged ones.
	j.MetricRelabelConfigs = append([]*relabel.Config{drop("istio_.*", model.MetricNameLabel)}, dropTemplateHash()...)
	return j
}

// istiod reads Istio's control plane.
func istiod(sd discovery.Configs, mesh string) *config.ScrapeConfig {
	j := job(JobIstiod, sd)
	j.RelabelConfigs = append([]*relabel.Config{
		keep(exactly(mesh)+";istiod", podNamespace, podLabel("app")),
		keep("15014", podPort),
		keep("Running", podPhase),
	}, podLabels()...)
	j.MetricRelabelConfigs = []*relabel.Config{
		keep(`(?:pilot|galley|citadel|polymesh_dialect|sidecar_injection)_.*|istio_build|`+processKept, model.MetricNameLabel),
	}
	return j
}

const processKept = `process_(?:cpu_seconds_total|resident_memory_bytes|start_time_seconds)|go_(?:goroutines|memstats_heap_inuse_bytes)`

// kubelet reads a path of each kubelet, but never /metrics: the kubelet is in one process with the API server, which has
// 32,000 series of its own there.
func kubelet(name, path string, sd discovery.Configs, o Options) *config.ScrapeConfig {
	j := job(name, sd)
	j.Scheme, j.MetricsPath = "https", path
	j.ScrapeInterval = model.Duration(2 * o.Interval)
	j.HTTPClientConfig.TLSConfig = commonconfig.TLSConfig{CAFile: o.Kubelets.CA, CertFile: o.Kubelets.Cert, KeyFile: o.Kubelets.Key}
	// The samples have the time at which the kubelet measured.
	j.TrackTimestampsStaleness = true
	j.SampleLimit = 10000
	j.BodySizeLimit = maxLargeBody
	j.RelabelConfigs = []*relabel.Config{
		replace("(.+)", "$1", "node", nodeName),
		replace("(.+)", "$1", model.InstanceLabel, nodeName),
	}
	if name == JobKubelet {
		j.MetricRelabelConfigs = []*relabel.Config{keep(resourceKept, model.MetricNameLabel)}
		return j
	}
	j.MetricRelabelConfigs = []*relabel.Config{
		keep(cadvisorPod+"|"+cadvisorContainer, model.MetricNameLabel),
		// Without a pod it is a cgroup of the machine, and without a container a pod's sum, which a query can compute.
		drop("", "pod"),
		drop("(?:"+cadvisorContainer+");(?:|POD)", model.MetricNameLabel, "container"),
		// They identify the same as pod and container, and change with each start.
		labelDrop("id|name|image"),
	}
	return j
}

const (
	resourceKept      = `(?:node|pod|container)_(?:cpu_usage_seconds_total|memory_working_set_bytes)|container_start_time_seconds|resource_scrape_error`
	cadvisorPod       = `container_network_(?:receive|transmit)_(?:bytes|packets|packets_dropped)_total`
	cadvisorContainer = `container_cpu_cfs_(?:periods|throttled_periods|throttled_seconds)_total|container_oom_events_total|` +
		`container_fs_(?:reads|writes)_bytes_total|container_memory_rss`
)

// local reads metrics of this process, through a connection without a socket.
func local(name string, o Options) *config.ScrapeConfig {
	group := &targetgroup.Group{Source: "0", Targets: []model.LabelSet{{model.AddressLabel: model.LabelValue(LocalAddress(name))}}}
	j := job(name, discovery.Configs{discovery.StaticConfig{group}})
	j.EnableCompression = false
	j.SampleLimit = 20000
	j.BodySizeLimit = maxLargeBody
	j.LabelValueLengthLimit = 2 * maxLabelValue // an image's name may be long
	j.RelabelConfigs = []*relabel.Config{set(model.InstanceLabel, o.Node)}
	switch name {
	case JobNode:
		j.RelabelConfigs = append(j.RelabelConfigs, set("node", o.Node))
	case JobState:
		j.ScrapeInterval = model.Duration(2 * o.Interval)
	case JobSelf:
		j.MetricRelabelConfigs = []*relabel.Config{keep(selfKept+"|"+processKept, model.MetricNameLabel)}
	}
	return j
}

// selfKept matches the store's own metrics that are kept. The rest can be read at /metrics.
const selfKept = `polymesh_.*|prometheus_(?:tsdb_(?:head_series|head_chunks|head_samples_appended_total|storage_blocks_bytes|wal_storage_size_bytes|` +
	`compactions_failed_total|reloads_failures_total|wal_corruptions_total|out_of_order_samples_total)|` +
	`target_(?:scrapes_exceeded_sample_limit_total|scrapes_exceeded_body_size_limit_total|scrape_pool_exceeded_target_limit_total)|` +
	`rule_evaluation_failures_total|notifications_(?:errors|dropped)_total|sd_failed_configs|engine_queries|engine_query_samples_total)`

// dropTemplateHash drops the label that changes with each rollout.
func dropTemplateHash() []*relabel.Config { return []*relabel.Config{labelDrop("pod_template_hash")} }
