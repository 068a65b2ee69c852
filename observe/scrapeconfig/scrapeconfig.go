// Package scrapeconfig says what Prometheus' scraper asks, how often, and what it keeps of the answers.
//
// It owns the jobs of the store (Base) and what a user's own prometheus.yml may add to them (Merge). It is made of functions
// from settings to Prometheus' configuration types; pkg metrics runs them.
//
// Everything in the cluster that is not the store's own is asked through a dialer that refuses this machine's addresses:
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
	_ "github.com/prometheus/prometheus/discovery/http" // file and http only so that they are refused with a reason
	"github.com/prometheus/prometheus/discovery/kubernetes"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"github.com/prometheus/prometheus/model/relabel"
)

// The names of the store's jobs, the label "job" of what they read. A user's job always has two slashes in its name.
const (
	// JobProxies reads the sidecars and gateways, with the metrics of their apps.
	JobProxies = "istio-proxy"
	// JobWaypoints reads proxies that others' requests pass. What they report has the label job of JobProxies.
	JobWaypoints = "istio-waypoint"
	// JobPods reads the other pods that have Prometheus' annotations, and JobHostPods those in the machine's network.
	JobPods     = "pods"
	JobHostPods = "host-pods"
	// JobIstiod reads Istio's control plane.
	JobIstiod = "istiod"
	// JobKubelet reads the kubelets' use of CPU and memory, and JobCadvisor what else they know of containers.
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

// guarded are the store's jobs whose addresses others have a say in: a pod's annotation, an answer that redirects.
var guarded = []string{JobProxies, JobWaypoints, JobPods, JobHostPods, JobIstiod}

// Guarded reports whether the addresses of a job come from others, so that it must not reach this machine's own services.
// Only kubelets and what is read in this process are not.
func Guarded(job string) bool { return strings.Contains(job, "/") || slices.Contains(guarded, job) }

// OfKubelet reports whether a job reads kubelets, which may be in an attacker's hands as their nodes may be.
func OfKubelet(job string) bool { return job == JobKubelet || job == JobCadvisor }

// localDomain is the domain of the addresses of what is read in this process. RFC 6761 keeps it from ever being resolved.
const localDomain = ".polymesh.invalid"

// LocalAddress is the address of a job of this process. metrics connects it without a socket.
func LocalAddress(job string) string { return job + localDomain + ":80" }

// Options of the store's own jobs.
type Options struct {
	// Node is the name of this machine's node, the label "instance" of what is read in this process.
	Node string
	// Kubeconfig lets discovery see pods and nodes. It may not exist yet.
	Kubeconfig string
	// Kubelets asks them. Without a CA they are not asked.
	Kubelets TLSFiles
	// MeshNamespace is where istiod runs. Empty means istio-system.
	MeshNamespace string
	// Local are those of the jobs of Local that there are.
	Local []string
	// Interval between two readings of a target. 0 means 15 s. Kubelets and objects are read half as often.
	Interval time.Duration
}

// TLSFiles are PEM files: whom to trust, and who asks. They are read again when they change.
type TLSFiles struct{ CA, Cert, Key string }

const (
	defaultInterval = 15 * time.Second
	// evaluation is how often rules are evaluated.
	evaluation = 30 * time.Second
	// maxTimeout of one reading.
	maxTimeout = 10 * time.Second
	// maxBody is the size of an answer. Each is in memory as a whole while it is read. Those of a large gateway, a kubelet with many
	// pods or all objects of a cluster are longer.
	maxBody      = 4 * units.MiB
	maxLargeBody = 16 * units.MiB
	// The labels of a sample, with those of its target. A proxy's have some 40. See metrics for all labels of a series.
	maxLabels     = 64
	maxLabelName  = 128
	maxLabelValue = 512
)

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
		if err := j.Validate(c.GlobalConfig); err != nil {
			return nil, fmt.Errorf("the job %s: %w", j.JobName, err)
		}
	}
	c.ScrapeConfigs = jobs
	return c, nil
}

// load parses Prometheus' configuration format. The result of an empty text is the way to a Config whose jobs can be asked for.
func load(text string) (*config.Config, error) {
	return config.Load(text, slog.New(slog.DiscardHandler))
}

func kubernetesSD(role kubernetes.Role, kubeconfig string) *kubernetes.SDConfig {
	sd := kubernetes.DefaultSDConfig
	sd.Role, sd.KubeConfig = role, kubeconfig
	return &sd
}

// job returns a job with the limits that all of the store's have. A target that exceeds one is down, and says why.
func job(name string, sd discovery.Configs) *config.ScrapeConfig {
	j := config.DefaultScrapeConfig
	j.JobName = name
	j.ServiceDiscoveryConfigs = sd
	j.HTTPClientConfig = commonconfig.DefaultHTTPClientConfig
	// An answer that points elsewhere would be stored as this target's.
	j.HTTPClientConfig.FollowRedirects = false
	j.BodySizeLimit = maxBody
	// Others' answers are not compressed, so that whoever makes a large one sends a large one. One that is compressed all the same is
	// read, up to its limit.
	j.EnableCompression = !Guarded(name)
	j.SampleLimit = 5000
	j.TargetLimit = 1000
	j.LabelLimit = maxLabels
	j.LabelNameLengthLimit = maxLabelName
	j.LabelValueLengthLimit = maxLabelValue
	// Dropped targets are only for looking at, and each keeps its pod's annotations.
	j.KeepDroppedTargets = 10
	return &j
}

// proxies reads Envoy in sidecars and gateways. The injector has set the pod's annotations to the agent's port 15020, which serves
// Envoy's, the agent's and the app's own metrics, and is excluded from mutual TLS. A pod that has not got them (metrics are not
// merged) has Envoy's at 15090. Only the pod's address and these two numbers make the target's.
//
// Waypoints are a job of their own, because what a sample says of itself cannot tell them apart from an app.
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

// ownNamespace believes a proxy only about its own namespace: what it reports as the source must be from there, and what it
// reports as the destination, or as a waypoint, must go there. The app's metrics come through the same port, so an app could
// otherwise make up requests between others. What has another reporter, or none, is dropped, but for the agent's own metrics.
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
	// Whoever asks for https has a certificate of their own. Nothing secret is sent.
	j.HTTPClientConfig.TLSConfig.InsecureSkipVerify = true
	j.RelabelConfigs = []*relabel.Config{
		keep("true", annotation("scrape")),
		drop("Succeeded|Failed", podPhase),
		drop("istio-(?:proxy|init|validation)", podContainer),
		drop("15020", annotation("port")), // with a sidecar, see proxies
		drop(exactly(mesh)+";istiod", podNamespace, podLabel("app")),
		keep("|"+portNumber, annotation("port")),
		// Without a port in either place there is nothing to ask.
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
	// Istio's metrics are the proxies'. From an app without one they are made up.
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

// kubelet reads a path of each kubelet. Never /metrics: the kubelet is one process with the API server, which serves its own
// 32,000 series there.
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
		// Without a pod it is a group of the machine's, and without a container the sum of a pod's, which a query makes.
		drop("", "pod"),
		drop("(?:"+cadvisorContainer+");(?:|POD)", model.MetricNameLabel, "container"),
		// They name the same as pod and container, and are new with each start.
		labelDrop("id|name|image"),
	}
	return j
}

const (
	resourceKept      = `(?:node|pod|container)_(?:cpu_usage_seconds_total|memory_working_set_bytes)|container_start_time_seconds|resource_scrape_error`
	cadvisorPod       = `container_network_(?:receive|transmit)_(?:bytes|packets_dropped|errors)_total`
	cadvisorContainer = `container_cpu_cfs_(?:periods|throttled_periods|throttled_seconds)_total|container_oom_events_total|` +
		`container_fs_(?:reads|writes)_bytes_total|container_memory_rss`
)

// local reads what is in this process, through a connection without a socket.
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

// selfKept is what of the store's own numbers is worth keeping. The rest can be read at /metrics.
const selfKept = `polymesh_.*|prometheus_(?:tsdb_(?:head_series|head_chunks|head_samples_appended_total|storage_blocks_bytes|wal_storage_size_bytes|` +
	`compactions_failed_total|reloads_failures_total|wal_corruptions_total|out_of_order_samples_total)|` +
	`target_(?:scrapes_exceeded_sample_limit_total|scrapes_exceeded_body_size_limit_total|scrape_pool_exceeded_target_limit_total)|` +
	`rule_evaluation_failures_total|notifications_(?:errors|dropped)_total|sd_failed_configs|engine_queries|engine_query_samples_total)`

// dropTemplateHash drops the label that changes with each rollout.
func dropTemplateHash() []*relabel.Config { return []*relabel.Config{labelDrop("pod_template_hash")} }
