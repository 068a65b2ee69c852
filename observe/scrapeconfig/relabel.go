package scrapeconfig

import (
	"regexp"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/relabel"
)

// The labels that discovery gives a pod's or a node's target.
const (
	meta           = model.MetaLabelPrefix + "kubernetes_"
	podIP          = meta + "pod_ip"
	podHostIP      = meta + "pod_host_ip"
	podPhase       = meta + "pod_phase"
	podName        = meta + "pod_name"
	podNode        = meta + "pod_node_name"
	podContainer   = meta + "pod_container_name"
	podPort        = meta + "pod_container_port_number"
	podProtocol    = meta + "pod_container_port_protocol"
	podOwnerKind   = meta + "pod_controller_kind"
	podOwner       = meta + "pod_controller_name"
	podNamespace   = meta + "namespace"
	nodeName       = meta + "node_name"
	templateSuffix = `-[0-9a-z]{1,10}`
)

// Place returns the pod that these labels of discovery describe, and its node.
func Place(found model.LabelSet) (namespace, pod, node string) {
	return string(found[podNamespace]), string(found[podName]), string(found[podNode])
}

// portNumber matches 1 to 65535.
const portNumber = `[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]`

// annotation returns the label with one of a pod's Prometheus annotations.
func annotation(name string) model.LabelName {
	return model.LabelName(meta + "pod_annotation_prometheus_io_" + name)
}

// podLabel returns the label with a label of a pod, in discovery's spelling.
func podLabel(name string) model.LabelName { return model.LabelName(meta + "pod_label_" + name) }

// podLabels sets the labels of a pod's targets. "workload" is the Deployment, StatefulSet, DaemonSet or CronJob, or the pod
// itself, and "service" its name in Istio.
func podLabels() []*relabel.Config {
	return []*relabel.Config{
		replace("(.+)", "$1", "namespace", podNamespace),
		replace("(.+)", "$1", "pod", podName),
		replace("(.+)", "$1", "node", podNode),
		replace("(.+)", "$1", "workload", podName),
		replace("(.+)", "$1", "workload", podOwner),
		replace("ReplicaSet;(.+)"+templateSuffix, "$1", "workload", podOwnerKind, podOwner),
		replace(`Job;(.+)-[0-9]{8,10}`, "$1", "workload", podOwnerKind, podOwner),
		replace("(.+)", "$1", "service", "workload"),
		replace("(.+)", "$1", "service", podLabel("app")),
		replace("(.+)", "$1", "service", podLabel("app_kubernetes_io_name")),
		replace("(.+)", "$1", "service", podLabel("service_istio_io_canonical_name")),
	}
}

func rule(action relabel.Action, regex string, source []model.LabelName) *relabel.Config {
	r := relabel.DefaultRelabelConfig
	r.Action = action
	r.SourceLabels = source
	if regex != "" || action != relabel.Replace {
		r.Regex = relabel.MustNewRegexp(regex)
	}
	return &r
}

// keep drops everything with other values. The values of several labels are joined by semicolons, as everywhere in this file.
func keep(regex string, source ...model.LabelName) *relabel.Config {
	return rule(relabel.Keep, regex, source)
}

func drop(regex string, source ...model.LabelName) *relabel.Config {
	return rule(relabel.Drop, regex, source)
}

// replace sets a label if the regular expression matches.
func replace(regex, replacement string, target model.LabelName, source ...model.LabelName) *relabel.Config {
	r := rule(relabel.Replace, regex, source)
	r.Replacement, r.TargetLabel = replacement, string(target)
	return r
}

// set writes a label.
func set(target model.LabelName, value string) *relabel.Config {
	r := rule(relabel.Replace, "", nil)
	r.Replacement, r.TargetLabel = value, string(target)
	return r
}

// equal keeps or drops depending on whether two labels are equal.
func equal(action relabel.Action, target, source model.LabelName) *relabel.Config {
	r := relabel.DefaultRelabelConfig
	r.Action, r.SourceLabels, r.TargetLabel = action, model.LabelNames{source}, string(target)
	return &r
}

func labelDrop(regex string) *relabel.Config { return rule(relabel.LabelDrop, regex, nil) }

// only drops metrics that are in the first set but not in the second, which RE2 cannot express.
func only(all, kept string) []*relabel.Config {
	const tmp = "__tmp_kept"
	return []*relabel.Config{
		labelDrop(tmp), // a target may send it
		replace(kept, "1", tmp, model.MetricNameLabel),
		drop(";(?:"+all+")", tmp, model.MetricNameLabel),
		labelDrop(tmp),
	}
}

// exactly matches a text literally.
func exactly(text string) string { return regexp.QuoteMeta(text) }
