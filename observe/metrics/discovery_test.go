package metrics

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// cluster answers lists and watches as an API server does, over a real socket.
type cluster struct {
	url string

	mu       sync.Mutex
	pods     []corev1.Pod
	version  int
	watchers map[chan metav1.WatchEvent]bool
	watches  map[string]int
}

func newCluster(t *testing.T, pods ...corev1.Pod) *cluster {
	c := &cluster{pods: pods, version: 1, watchers: map[chan metav1.WatchEvent]bool{}, watches: map[string]int{}}
	server := httptest.NewServer(c)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	c.url = server.URL
	return c
}

func (c *cluster) kubeconfig(t *testing.T, path string) {
	t.Helper()
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, clusters: [{name: a, cluster: {server: %q}}], contexts: [{name: a, context: {cluster: a, user: a}}], users: [{name: a, user: {}}], current-context: a}`, c.url)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	kind := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	c.mu.Lock()
	meta := metav1.ListMeta{ResourceVersion: strconv.Itoa(c.version)}
	var list any = map[string]any{"kind": "List", "apiVersion": "v1", "metadata": meta, "items": []any{}}
	if kind == "pods" {
		list = corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, ListMeta: meta, Items: c.pods}
	}
	if r.URL.Query().Get("watch") == "" {
		_ = json.NewEncoder(w).Encode(list)
		c.mu.Unlock()
		return
	}
	if r.URL.Query().Get("sendInitialEvents") == "true" { // a list by watching, which this one does not know
		c.mu.Unlock()
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonInvalid, Code: 422})
		return
	}
	c.watches[r.URL.Path]++
	events := make(chan metav1.WatchEvent, 10)
	if kind == "pods" {
		c.watchers[events] = true
	}
	c.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case e := <-events:
			_ = json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func (c *cluster) remove(t *testing.T, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, p := range c.pods {
		if p.Name != name {
			continue
		}
		c.version++
		p.ResourceVersion = strconv.Itoa(c.version)
		p.TypeMeta = metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}
		raw, err := json.Marshal(p)
		require.NoError(t, err)
		e := metav1.WatchEvent{Type: "DELETED"}
		e.Object.Raw = raw
		for w := range c.watchers {
			w <- e
		}
		c.pods = append(c.pods[:i], c.pods[i+1:]...)
		return
	}
}

// newPod is a pod at this address whose containers declare ports, by name.
func newPod(name, ip string, annotations map[string]string, ports map[string]int32) corev1.Pod {
	controller := true
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "shop", UID: "u-" + "1", ResourceVersion: "1", Annotations: annotations, Labels: map[string]string{"app": "api-service", "pod-template-hash": "5d9c7b4f6"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "api-5d9c7b4f6", Controller: &controller}},
		},
		Spec:   corev1.PodSpec{NodeName: "node-1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, HostIP: "192.0.2.200"},
	}
	for container, port := range ports {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: container, Ports: []corev1.ContainerPort{{ContainerPort: port, Protocol: corev1.ProtocolTCP}}})
	}
	return p
}

// Pods are found by the cluster's API, which comes after the store. The guide's ConfigMap has its targets, and says what it cannot
// reach; the store's own job has the pod with all of its labels.
func TestDiscovery(t *testing.T) {
	ip := ownIP(t)
	address := target(t, ip, text("orders_total 3\nistio_requests_total{reporter=\"source\",source_workload_namespace=\"shop\"} 1\n"))
	_, port, err := splitPort(address)
	require.NoError(t, err)
	annotations := map[string]string{
		"prometheus.io/scrape": "true", "prometheus.io/port": fmt.Sprint(port), "prometheus.io/path": "/any",
		"kubectl.kubernetes.io/last-applied-configuration": "{env: hunter2}",
	}
	c := newCluster(t, newPod("api-5d9c7b4f6-x2x4z", ip, annotations, map[string]int32{"api": port, "other": 1}))
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	s := open(t, Options{Base: fast(t, scrapeconfig.Options{Kubeconfig: kubeconfig}), Kubeconfig: kubeconfig})
	guide, err := os.ReadFile("../scrapeconfig/testdata/guide-configmap.yaml")
	require.NoError(t, err)
	var object struct {
		Data map[string]string `yaml:"data"`
	}
	require.NoError(t, yaml.Unmarshal(guide, &object))
	ps, err := s.Apply(t.Context(), []UserConfig{{Namespace: "shop", Name: "prometheus-config", Prometheus: []byte(object.Data["prometheus.yml"])}})
	require.NoError(t, err)
	require.Empty(t, ps)
	require.Empty(t, s.query("up"))
	c.kubeconfig(t, kubeconfig)

	s.is(fmt.Sprintf(`orders_total{job="pods",namespace="shop",pod="api-5d9c7b4f6-x2x4z",node="node-1",workload="api",service="api-service",instance=%q}`, address), 3)
	s.is(`count(up{job="pods"})`, 1)
	// Without a proxy, nobody makes Istio's metrics.
	require.Empty(t, s.query(`istio_requests_total{job="pods"}`))

	s.is(`count(up{job="shop/prometheus-config/kubernetes-pods"})`, 2)
	s.is(`orders_total{job="shop/prometheus-config/kubernetes-pods"}`, 3)
	s.is(`sum(up{job="shop/prometheus-config/kubernetes-pods"})`, 1)
	errs := fmt.Sprint(s.targetErrors())
	require.Contains(t, errs, "connection refused")
	code, body := s.get("/api/v1/targets")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, body, "__meta_kubernetes_pod_annotation_prometheus_io_path")
	require.NotContains(t, body, "hunter2")

	// All jobs with all pods share one watch.
	c.mu.Lock()
	require.Equal(t, 1, c.watches["/api/v1/pods"])
	require.Zero(t, c.watches["/api/v1/nodes"])
	c.mu.Unlock()

	c.remove(t, "api-5d9c7b4f6-x2x4z")
	s.eventually("a removed pod remains", func() bool { return len(s.query(`up`)) == 0 && len(s.query("orders_total")) == 0 })
}

// A kubelet is believed about its node and the pods that the cluster has there, and its series have no more room than others'.
func TestKubelets(t *testing.T) {
	here, there := newPod("here", "10.42.0.7", nil, map[string]int32{"a": 80}), newPod("there", "10.42.1.7", nil, map[string]int32{"a": 80})
	there.Spec.NodeName = "node-2"
	c := newCluster(t, here, there)
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	c.kubeconfig(t, kubeconfig)
	cpu := func(name, namespace, pod string) string {
		return fmt.Sprintf("%s{container=\"a\",namespace=%q,pod=%q,node=\"node-2\"} 1\n", name, namespace, pod)
	}
	var gone atomic.Bool
	address := target(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		body := "node_cpu_usage_seconds_total 1\n" + cpu("forged", "shop", "there") + cpu("forged", "bank", "here") + cpu("forged", "shop", "made-up") + cpu("forged", "shop", "") + cpu("forged", "", "here")
		if !gone.Load() {
			body += cpu("container_cpu_usage_seconds_total", "shop", "here")
		}
		text(body)(w, r)
	})
	base := fast(t, scrapeconfig.Options{Kubeconfig: kubeconfig})
	base = addJobs(t, base, "scrape_configs: [{job_name: kubelet, static_configs: [{targets: ["+address+"], labels: {node: node-1}}]}]")
	s := open(t, Options{Base: base, Kubeconfig: kubeconfig})
	s.is(`node_cpu_usage_seconds_total{job="kubelet",node="node-1"}`, 1)
	s.is(`container_cpu_usage_seconds_total{job="kubelet",node="node-1",namespace="shop",pod="here"}`, 1)
	require.Empty(t, s.query("forged"))
	require.Zero(t, s.Numbers()["series_refused"])

	// A pod that the cluster forgets first ends at once, too.
	c.remove(t, "here")
	s.eventually("a forgotten pod is still believed", func() bool {
		return !s.targets.places.allow(labels.FromStrings("namespace", "shop", "pod", "here", "node", "node-1"))
	})
	gone.Store(true)
	s.eventually("the series does not end", func() bool { return len(s.query("container_cpu_usage_seconds_total")) == 0 })

	// Where strangers have no room, they have none.
	full := &bounded{db: s.db, fresh: newFreshSeries(0), labels: s.series.labels, maxLabels: s.series.maxLabels, space: s.series.space, misplaced: s.series.misplaced, log: s.log}
	app := full.scraped(s.targets.places).AppenderV2(t.Context())
	for job, room := range map[string]bool{"kubelet": false, "cadvisor": false, "kube-state": true} {
		ref, err := app.Append(0, labels.FromStrings("__name__", "new", "job", job), 0, time.Now().UnixMilli(), 1, nil, nil, storage.AOptions{})
		require.NoError(t, err)
		require.Equal(t, room, ref != 0, job)
	}
	require.NoError(t, app.Rollback())
}

func splitPort(address string) (string, int32, error) {
	i := strings.LastIndex(address, ":")
	n, err := strconv.ParseInt(address[i+1:], 10, 32)
	return address[:i], int32(n), err
}
