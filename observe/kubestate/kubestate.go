// Package kubestate makes metrics of the objects in the cluster, with the names and labels of kube-state-metrics.
//
// Public dashboards and rules ask for some sixty of its families; these are made, from the objects that package cluster holds anyway, when
// somebody gathers. What is left out where kube-state-metrics would write more: ReplicaSets without pods, states of containers that another
// family tells (waiting, terminated), and of init containers all but restarts and reasons, unless they are sidecars. A pod costs about 20
// series, one with a sidecar 30.
//
// Names and reasons are chosen by users, so each label is cut, and the number of series is bounded: when there are too many, whole families
// are missing, the least important first, and one of our own names them. Package metrics gathers, package server makes the State.
package kubestate

import (
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
)

// Objects are those of the cluster. The objects are not changed by anybody.
type Objects interface {
	Nodes() []*corev1.Node
	Namespaces() []*corev1.Namespace
	Pods() []*corev1.Pod
	Services() []*corev1.Service
	PersistentVolumeClaims() []*corev1.PersistentVolumeClaim
	Deployments() []*appsv1.Deployment
	ReplicaSets() []*appsv1.ReplicaSet
	StatefulSets() []*appsv1.StatefulSet
	DaemonSets() []*appsv1.DaemonSet
	Jobs() []*batchv1.Job
	CronJobs() []*batchv1.CronJob
	HorizontalPodAutoscalers() []*autoscalingv2.HorizontalPodAutoscaler
}

const (
	// DefaultMaxSeries is enough for 600 pods with a sidecar each.
	DefaultMaxSeries = 20_000
	// maxLabel is the longest value of a label in bytes.
	maxLabel = 512
	// LeftOut is the family that names what is missing because of the limit.
	LeftOut = "polymesh_observe_kube_family_left_out"
)

// State is a prometheus.Gatherer of the cluster's objects.
type State struct {
	objects Objects
	max     int
}

// New returns the State of these objects, with at most maxSeries series; 0 means DefaultMaxSeries.
func New(objects Objects, maxSeries int) *State {
	if maxSeries == 0 {
		maxSeries = DefaultMaxSeries
	}
	return &State{objects, maxSeries}
}

// family is how the samples of one name are made.
type family struct {
	name, help string
	kind       dto.MetricType
	labels     []string
	// each calls add for each series, with the values of the labels.
	each func(Objects, adder)
}

// adder takes a sample. A sample that is one too many is not kept.
type adder func(value float64, labels ...string)

// Gather implements prometheus.Gatherer. It never fails.
func (s *State) Gather() ([]*dto.MetricFamily, error) {
	var gathered []*dto.MetricFamily
	var missing []string
	left := s.max
	for _, f := range families() {
		g, ok := f.gather(s.objects, left)
		switch {
		case !ok:
			missing = append(missing, f.name)
		case len(g.Metric) > 0:
			left -= len(g.Metric)
			gathered = append(gathered, g)
		}
	}
	if len(missing) > 0 {
		f := gauge(LeftOut, "Families that are missing because there are too many series.", []string{"family"}, func(_ Objects, add adder) {
			for _, name := range missing {
				add(1, name)
			}
		})
		g, _ := f.gather(s.objects, len(missing))
		gathered = append(gathered, g)
	}
	slices.SortFunc(gathered, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return gathered, nil
}

// sample is a series in one piece of memory.
type sample struct {
	metric dto.Metric
	gauge  dto.Gauge
	count  dto.Counter
	value  float64
}

// gather returns the family, and false if it has more than limit series.
func (f family) gather(o Objects, limit int) (*dto.MetricFamily, bool) {
	g := &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: &f.kind}
	over := false
	f.each(o, func(value float64, labels ...string) {
		if len(g.Metric) >= limit {
			over = true
			return
		}
		s := &sample{value: value}
		if f.kind == dto.MetricType_COUNTER {
			s.count.Value, s.metric.Counter = &s.value, &s.count
		} else {
			s.gauge.Value, s.metric.Gauge = &s.value, &s.gauge
		}
		pairs := make([]dto.LabelPair, len(labels))
		s.metric.Label = make([]*dto.LabelPair, 0, len(labels))
		for i := range labels {
			// No value is the same as no label.
			if labels[i] == "" {
				continue
			}
			labels[i] = text(labels[i])
			pairs[i].Name, pairs[i].Value = &f.labels[i], &labels[i]
			s.metric.Label = append(s.metric.Label, &pairs[i])
		}
		g.Metric = append(g.Metric, &s.metric)
	})
	return g, !over
}

func text(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxLabel)], "\uFFFD")
}

func gauge(name, help string, labels []string, each func(Objects, adder)) family {
	return family{name, help, dto.MetricType_GAUGE, labels, each}
}

// families returns all of them, the most important first.
func families() []family {
	return slices.Concat(nodes(), workloads(), autoscalers(), podsFirst(), containersFirst(), claims(), namespaces(), jobs(), services(), replicaSets(), podsMore(), containersMore())
}
