package kubestate_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"

	"polymesh.dev/polymesh/observe/kubestate"
)

var update = flag.Bool("update", false, "write the golden files")

var _ prometheus.Gatherer = (*kubestate.State)(nil)

// objects are given, instead of a cluster's.
type objects []runtime.Object

func of[T runtime.Object](o objects) []T {
	var list []T
	for _, object := range o {
		if t, ok := object.(T); ok {
			list = append(list, t)
		}
	}
	return list
}

func (o objects) Nodes() []*corev1.Node               { return of[*corev1.Node](o) }
func (o objects) Namespaces() []*corev1.Namespace     { return of[*corev1.Namespace](o) }
func (o objects) Pods() []*corev1.Pod                 { return of[*corev1.Pod](o) }
func (o objects) Services() []*corev1.Service         { return of[*corev1.Service](o) }
func (o objects) Deployments() []*appsv1.Deployment   { return of[*appsv1.Deployment](o) }
func (o objects) ReplicaSets() []*appsv1.ReplicaSet   { return of[*appsv1.ReplicaSet](o) }
func (o objects) StatefulSets() []*appsv1.StatefulSet { return of[*appsv1.StatefulSet](o) }
func (o objects) DaemonSets() []*appsv1.DaemonSet     { return of[*appsv1.DaemonSet](o) }
func (o objects) Jobs() []*batchv1.Job                { return of[*batchv1.Job](o) }
func (o objects) CronJobs() []*batchv1.CronJob        { return of[*batchv1.CronJob](o) }
func (o objects) PersistentVolumeClaims() []*corev1.PersistentVolumeClaim {
	return of[*corev1.PersistentVolumeClaim](o)
}
func (o objects) HorizontalPodAutoscalers() []*autoscalingv2.HorizontalPodAutoscaler {
	return of[*autoscalingv2.HorizontalPodAutoscaler](o)
}

// read reads the objects in testdata.
func read(t *testing.T) objects {
	t.Helper()
	text, err := os.ReadFile("testdata/objects.yaml")
	require.NoError(t, err)
	var o objects
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(part), nil, nil)
		require.NoError(t, err, part)
		o = append(o, object)
	}
	return o
}

func TestGolden(t *testing.T) {
	families, err := kubestate.New(read(t), 10_000).Gather()
	require.NoError(t, err)
	var text bytes.Buffer
	for _, f := range families {
		_, err := expfmt.MetricFamilyToText(&text, f)
		require.NoError(t, err)
	}
	const file = "testdata/metrics.txt"
	if *update {
		require.NoError(t, os.WriteFile(file, text.Bytes(), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), text.String(), "run the test with -update if this is intended")
}

// TestNames compares with kube-state-metrics' documentation (docs/metrics at c92fe0c5): each family that is made of the objects in
// testdata has its name, its type and no other labels.
func TestNames(t *testing.T) {
	type documented struct {
		kind   string
		labels []string
	}
	known := map[string]documented{}
	file, err := os.Open("testdata/kube-state-metrics.txt")
	require.NoError(t, err)
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		part := strings.Split(lines.Text(), " ")
		require.Len(t, part, 3)
		known[part[0]] = documented{part[1], strings.Split(part[2], ",")}
	}
	families, err := kubestate.New(read(t), 10_000).Gather()
	require.NoError(t, err)
	for _, f := range families {
		doc, ok := known[f.GetName()]
		require.True(t, ok, f.GetName())
		require.Equal(t, doc.kind, strings.ToLower(f.GetType().String()), f.GetName())
		labels := map[string]bool{}
		for _, m := range f.Metric {
			seen := map[string]bool{}
			for _, l := range m.Label {
				require.Contains(t, doc.labels, l.GetName(), f.GetName())
				require.False(t, seen[l.GetName()], f.GetName())
				seen[l.GetName()], labels[l.GetName()] = true, true
			}
		}
		// Some series of each family have all of its labels.
		for _, l := range doc.labels {
			require.True(t, labels[l] || f.GetName() == "kube_node_spec_taint" && l == "value" || f.GetName() == "kube_service_info", "%s has no %s", f.GetName(), l)
		}
	}
	// What public dashboards and the page ask for.
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	for _, name := range []string{
		"kube_node_status_condition", "kube_node_status_allocatable", "kube_node_status_capacity", "kube_node_info", "kube_node_spec_unschedulable", "kube_pod_status_phase",
		"kube_pod_status_reason", "kube_pod_status_ready", "kube_pod_info", "kube_pod_owner", "kube_pod_container_info", "kube_pod_container_resource_requests",
		"kube_pod_container_resource_limits", "kube_pod_container_status_restarts_total", "kube_pod_container_status_last_terminated_reason",
		"kube_pod_container_status_waiting_reason", "kube_pod_init_container_status_restarts_total", "kube_deployment_spec_replicas",
		"kube_deployment_status_replicas_available", "kube_statefulset_status_replicas_ready", "kube_daemonset_status_number_ready", "kube_replicaset_owner",
		"kube_job_status_failed", "kube_job_failed", "kube_namespace_status_phase", "kube_persistentvolumeclaim_status_phase",
		"kube_horizontalpodautoscaler_status_current_replicas",
	} {
		require.Contains(t, names, name)
	}
}

// TestLimit: with too many series those of states that are 0 are missing, and then whole families, the least important ones, which are named.
func TestLimit(t *testing.T) {
	o := read(t)
	all, err := kubestate.New(o, 10_000).Gather()
	require.NoError(t, err)
	byName := map[string]*dto.MetricFamily{}
	total := 0
	for _, f := range all {
		byName[f.GetName()] = f
		total += len(f.Metric)
	}
	for _, limit := range []int{1, 10, 50, 100, total - 1, total} {
		some, err := kubestate.New(o, limit).Gather()
		require.NoError(t, err)
		n, missing := 0, 0
		for _, f := range some {
			if f.GetName() == kubestate.LeftOut {
				missing = len(f.Metric)
				continue
			}
			n += len(f.Metric)
			states := 0 // that an object has
			for _, m := range byName[f.GetName()].Metric {
				if m.GetGauge().GetValue() != 0 || m.Counter != nil {
					states++
				}
			}
			require.Contains(t, []int{len(byName[f.GetName()].Metric), states}, len(f.Metric), "%s is whole", f.GetName())
		}
		require.LessOrEqual(t, n, limit)
		require.Equal(t, limit >= total-1, missing == 0, "states that are 0 are left out first")
		require.Equal(t, limit == total, n == total)
		if limit >= 50 {
			require.Contains(t, names(some), "kube_node_status_condition")
		}
	}
}

// TestHostile: what users choose is cut, is text, and makes no family fail.
func TestHostile(t *testing.T) {
	long := strings.Repeat("ä", 5000)
	requests := corev1.ResourceList{}
	for i := range 1000 {
		requests[corev1.ResourceName(fmt.Sprintf("example.com/r%d", i))] = resource.MustParse("1")
	}
	var owners []metav1.OwnerReference
	for range 1000 {
		owners = append(owners, metav1.OwnerReference{Kind: "Deployment", Name: "coredns"})
	}
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "n", OwnerReferences: owners},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: long, Resources: corev1.ResourceRequirements{Requests: requests}}}},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			Name: "c", Image: "\xff\n\"", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: long}},
		}}},
	}
	families, err := kubestate.New(objects{p}, 10_000).Gather()
	require.NoError(t, err)
	var text bytes.Buffer
	for _, f := range families {
		_, err := expfmt.MetricFamilyToText(&text, f)
		require.NoError(t, err)
		series := map[string]bool{}
		for _, m := range f.Metric {
			var key string
			for _, l := range m.Label {
				require.LessOrEqual(t, len(l.GetValue()), 512+3)
				key += fmt.Sprintf("%q=%q,", l.GetName(), l.GetValue())
			}
			require.False(t, series[key], "%s: %s is there twice", f.GetName(), key)
			series[key] = true
		}
		require.LessOrEqual(t, len(f.Metric), 16, f.GetName())
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	_, err = parser.TextToMetricFamilies(&text)
	require.NoError(t, err)
}

func names(families []*dto.MetricFamily) []string {
	var list []string
	for _, f := range families {
		list = append(list, f.GetName())
	}
	return slices.Sorted(slices.Values(list))
}

// BenchmarkGather gathers what 50 and 1,000 pods make, each with a sidecar.
func BenchmarkGather(b *testing.B) {
	text, err := os.ReadFile("testdata/objects.yaml")
	require.NoError(b, err)
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(strings.Split(string(text), "\n---\n")[2]), nil, nil)
	require.NoError(b, err)
	for _, pods := range []int{50, 1000} {
		b.Run(fmt.Sprint(pods), func(b *testing.B) {
			var o objects
			for i := range pods {
				p := object.(*corev1.Pod).DeepCopy()
				p.Name = fmt.Sprintf("api-7f9c-x%d", i)
				o = append(o, p)
			}
			b.ReportAllocs()
			series := 0
			for b.Loop() {
				families, _ := kubestate.New(o, 100_000).Gather()
				series = 0
				for _, f := range families {
					series += len(f.Metric)
				}
			}
			b.ReportMetric(float64(series), "series")
		})
	}
}
