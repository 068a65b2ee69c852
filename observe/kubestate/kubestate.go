// Package kubestate makes metrics from the objects in the cluster, with the names and labels of kube-state-metrics.
//
// Public dashboards and rules use about sixty of its families. These are made at each collection from the objects that package cluster holds
// anyway. Left out, compared with kube-state-metrics: ReplicaSets without pods, states of containers that another
// family has (waiting, terminated), and everything but restarts and reasons of init containers that are not sidecars. A pod costs about 20
// series, one with a sidecar 30.
//
// Names and reasons are chosen by users, so each label is cut, and the number of series is bounded. When there are too many, those of states
// that an object does not have, which are 0, are left out first, then the least important families; a family of our own names them.
// Package metrics gathers, package server creates the State.
package kubestate

import (
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/observe/excerpt"
)

// Objects are the objects in the cluster. They must not be changed.
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
	// maxLabel is the longest value of a label in bytes.
	maxLabel = 512
	// LeftOut is the family that names the families left out because of the limit.
	LeftOut = "polymesh_observe_kube_family_left_out"
)

// State is a prometheus.Gatherer of the cluster's objects.
type State struct {
	objects Objects
	max     int
}

// New returns the State of these objects, with at most maxSeries series: 10,000 are enough for 300 pods with a sidecar each.
func New(objects Objects, maxSeries int) *State {
	return &State{objects, maxSeries}
}

// family describes the samples of one name.
type family struct {
	name, help string
	kind       dto.MetricType
	labels     []string
	// states has a series for each state that an object can have, 1 for the one that it has.
	states bool
	// each calls add for each series, with the values of the labels.
	each func(*lists, adder)
}

// adder adds a sample. Samples above the limit are dropped.
type adder func(value float64, labels ...string)

// lists are the objects at one collection.
type lists struct {
	nodes        []*corev1.Node
	namespaces   []*corev1.Namespace
	pods         []*corev1.Pod
	services     []*corev1.Service
	claims       []*corev1.PersistentVolumeClaim
	deployments  []*appsv1.Deployment
	replicaSets  []*appsv1.ReplicaSet
	statefulSets []*appsv1.StatefulSet
	daemonSets   []*appsv1.DaemonSet
	jobs         []*batchv1.Job
	cronJobs     []*batchv1.CronJob
	autoscalers  []*autoscalingv2.HorizontalPodAutoscaler
}

// Gather implements prometheus.Gatherer. It never fails.
func (s *State) Gather() ([]*dto.MetricFamily, error) {
	o := &lists{
		s.objects.Nodes(), s.objects.Namespaces(), s.objects.Pods(), s.objects.Services(), s.objects.PersistentVolumeClaims(), s.objects.Deployments(),
		s.objects.ReplicaSets(), s.objects.StatefulSets(), s.objects.DaemonSets(), s.objects.Jobs(), s.objects.CronJobs(), s.objects.HorizontalPodAutoscalers(),
	}
	all := families()
	gathered, missing := gather(all, o, s.max, false)
	if len(missing) > 0 {
		gathered, missing = gather(all, o, s.max, true)
	}
	if len(missing) > 0 {
		f := gauge(LeftOut, "Families that are missing because there are too many series.", []string{"family"}, func(_ *lists, add adder) {
			for _, name := range missing {
				add(1, name)
			}
		})
		g, _ := f.gather(o, len(missing), false)
		gathered = append(gathered, g)
	}
	slices.SortFunc(gathered, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return gathered, nil
}

// gather returns the families within the limit, and the names of the others.
func gather(all []family, o *lists, room int, lean bool) (gathered []*dto.MetricFamily, missing []string) {
	for _, f := range all {
		g, ok := f.gather(o, room, lean)
		switch {
		case !ok:
			missing = append(missing, f.name)
		case len(g.Metric) > 0:
			room -= len(g.Metric)
			gathered = append(gathered, g)
		}
	}
	return gathered, missing
}

// sample holds a series in one allocation.
type sample struct {
	metric dto.Metric
	gauge  dto.Gauge
	value  float64
}

// gather returns the family, lean without states that an object does not have, and false if it has more than limit series.
func (f family) gather(o *lists, limit int, lean bool) (*dto.MetricFamily, bool) {
	g := &dto.MetricFamily{Name: &f.name, Help: &f.help, Type: &f.kind}
	over := false
	f.each(o, func(value float64, labels ...string) {
		if lean && f.states && value == 0 {
			return
		}
		if len(g.Metric) >= limit {
			over = true
			return
		}
		s := &sample{value: value}
		if f.kind == dto.MetricType_COUNTER {
			s.metric.Counter = &dto.Counter{Value: &s.value}
		} else {
			s.gauge.Value, s.metric.Gauge = &s.value, &s.gauge
		}
		pairs := make([]dto.LabelPair, len(labels))
		s.metric.Label = make([]*dto.LabelPair, 0, len(labels))
		for i := range labels {
			// An empty value is the same as no label.
			if labels[i] == "" {
				continue
			}
			labels[i] = excerpt.Of(labels[i], maxLabel)
			pairs[i].Name, pairs[i].Value = &f.labels[i], &labels[i]
			s.metric.Label = append(s.metric.Label, &pairs[i])
		}
		g.Metric = append(g.Metric, &s.metric)
	})
	return g, !over
}

func gauge(name, help string, labels []string, each func(*lists, adder)) family {
	return family{name, help, dto.MetricType_GAUGE, labels, false, each}
}

// statesOf returns a family with a series for each state.
func statesOf(f family) family {
	f.states = true
	return f
}

// families returns all of them, the most important first.
func families() []family {
	return slices.Concat(nodes(), workloads(), autoscalers(), podsFirst(), containersFirst(), claims(), namespaces(), jobs(), services(), replicaSets(), podsMore(), containersMore())
}
