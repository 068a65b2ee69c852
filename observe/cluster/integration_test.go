//go:build integration

package cluster

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/observe/cluster/clustertest"
	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/kubestate"
	"polymesh.dev/polymesh/observe/logstore"
)

// limit is the time for what should happen.
const limit = 2 * time.Minute

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	require.Eventually(t, is, limit, 50*time.Millisecond, what)
}

// identity gives a service account the role in rbac.yaml, and returns a token of it.
func identity(t *testing.T, client *kubernetes.Clientset) string {
	t.Helper()
	ctx := t.Context()
	text, err := os.ReadFile("rbac.yaml")
	require.NoError(t, err)
	role := &rbacv1.ClusterRole{}
	require.NoError(t, yaml.UnmarshalStrict(text, role))
	_, err = client.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = client.CoreV1().ServiceAccounts(metav1.NamespaceSystem).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "observe"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "observe"}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	token, err := client.CoreV1().ServiceAccounts(metav1.NamespaceSystem).CreateToken(ctx, "observe", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	require.NoError(t, err)
	return token.Status.Token
}

// running is a Cluster that runs.
type running struct {
	*Cluster
	stop func()

	mu      sync.Mutex
	configs [][]Config
}

func run(t *testing.T, kubeconfig string, store *logstore.Store) *running {
	r := &running{}
	r.Cluster = New(Options{
		Kubeconfig: kubeconfig, Store: store, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Configs: func(_ context.Context, configs []Config) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.configs = append(r.configs, configs)
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-done)
	})
	t.Cleanup(r.stop)
	return r
}

// lastConfigs returns what was delivered last, and false if nothing was yet.
func (r *running) lastConfigs() ([]Config, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.configs) == 0 {
		return nil, false
	}
	return r.configs[len(r.configs)-1], true
}

func deployment(name, image string, replicas int32) *appsv1.Deployment {
	labels := map[string]string{"app": name}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{{Name: "istio-proxy", Image: "proxyv2", RestartPolicy: new(corev1.ContainerRestartPolicyAlways), Env: environment(30)}},
				Containers: []corev1.Container{{Name: "app", Image: image, Env: environment(10), Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("32Mi")},
				}}},
			}},
		},
	}
}

// environment is as large as a sidecar's.
func environment(n int) []corev1.EnvVar {
	var list []corev1.EnvVar
	for i := range n {
		list = append(list, corev1.EnvVar{Name: fmt.Sprint("PASSWORD_", i), Value: strings.Repeat("hunter2 ", 8)})
	}
	return list
}

// kubelet makes of a pod's status what a kubelet writes.
func kubelet(t *testing.T, client *kubernetes.Clientset, namespace, name string, change func(*corev1.Pod)) {
	t.Helper()
	pod, err := client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
	require.NoError(t, err)
	pod.Status.Phase, pod.Status.PodIP = corev1.PodRunning, "10.42.0.7"
	pod.Status.PodIPs = []corev1.PodIP{{IP: pod.Status.PodIP}}
	pod.Status.StartTime = &pod.CreationTimestamp
	pod.Status.Conditions = append(pod.Status.Conditions[:0:0], corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue}, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue})
	if len(pod.Status.ContainerStatuses) == 0 {
		pod.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "istio-proxy", Ready: true, Image: "proxyv2", ImageID: "sha256:" + strings.Repeat("a", 64), ContainerID: "containerd://" + strings.Repeat("b", 64), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}}}
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", Ready: true, Image: "shop/api:1", ImageID: "sha256:" + strings.Repeat("c", 64), ContainerID: "containerd://" + strings.Repeat("d", 64), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}}}
	}
	if change != nil {
		change(pod)
	}
	_, err = client.CoreV1().Pods(namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{})
	require.NoError(t, err)
}

// podsOf returns the pods of a Deployment that are not being deleted.
func podsOf(t *testing.T, client *kubernetes.Clientset, namespace, app string) []corev1.Pod {
	t.Helper()
	list, err := client.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	require.NoError(t, err)
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// TestCluster watches a real API server, with no more permissions than those in rbac.yaml.
func TestCluster(t *testing.T) {
	config := clustertest.Start(t)
	client := clustertest.Client(t, config)
	token := identity(t, client)
	gate := clustertest.NewGate(t, config)
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	store := openStore(t, t.TempDir())
	c := run(t, kubeconfig, store)
	ctx := t.Context()
	count := func(job, reason string) (n int) {
		for _, e := range stored(t, store, job) {
			if reason == "" || logstore.Value(e.Metadata, "reason") == reason {
				n++
			}
		}
		return n
	}
	documentsOf := func(workload string) (lines []string) {
		for _, e := range stored(t, store, document.Objects) {
			if logstore.Value(e.Labels, "workload") == workload {
				lines = append(lines, e.Line)
			}
		}
		return lines
	}

	if !t.Run("starts without a kubeconfig and without an API server", func(t *testing.T) {
		eventually(t, "it says so", func() bool { return strings.Contains(c.Problem(), "no such file") })
		require.Zero(t, c.State())
		clustertest.WriteKubeconfig(t, kubeconfig, gate.Address, token, config)
		eventually(t, "it has tried", func() bool { return !c.State().Since.IsZero() })
		require.False(t, c.State().Reachable)
		require.Equal(t, "the API server does not answer", c.Problem())
		_, delivered := c.lastConfigs()
		require.False(t, delivered)
		gate.Open(t)
		eventually(t, "it is connected", func() bool { return c.State().Reachable })
		eventually(t, "it has all kinds", func() bool { return c.Problem() == "" && len(c.Namespaces()) > 3 })
		eventually(t, "that there are no ConfigMaps is told", func() bool {
			configs, delivered := c.lastConfigs()
			return delivered && len(configs) == 0
		})
	}) {
		return
	}

	t.Run("a Deployment", func(t *testing.T) {
		_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = client.AppsV1().Deployments("shop").Create(ctx, deployment("api", "shop/api:1", 2), metav1.CreateOptions{})
		require.NoError(t, err)
		var pods []corev1.Pod
		eventually(t, "it has pods", func() bool {
			pods = podsOf(t, client, "shop", "api")
			return len(pods) == 2
		})
		for _, p := range pods {
			eventually(t, "whose pods they are is known", func() bool {
				w, ok := c.Workload("shop", p.Name)
				require.True(t, !ok || w == Workload{kindDeployment, "api"}, "%v", w)
				return ok
			})
			kubelet(t, client, "shop", p.Name, nil)
		}
		eventually(t, "a document has both pods", func() bool {
			lines := documentsOf("api")
			return len(lines) > 0 && strings.Count(lines[len(lines)-1], `"state":"running"`) == 4
		})
		for _, line := range documentsOf("api") {
			require.NotContains(t, line, "hunter2")
		}
		eventually(t, "it is a mark", func() bool { return count(document.Events, Deployed) == 1 })

		families, err := kubestate.New(c, 10_000).Gather()
		require.NoError(t, err)
		found := map[string]float64{}
		for _, f := range families {
			for _, m := range f.Metric {
				found[f.GetName()] += m.GetGauge().GetValue()
			}
		}
		require.EqualValues(t, 2, found["kube_pod_info"])
		require.EqualValues(t, 2, found["kube_deployment_spec_replicas"])
		require.InDelta(t, 2*(0.01+32<<20), found["kube_pod_container_resource_requests"], 0.01)
		require.EqualValues(t, 1, found["kube_replicaset_owner"])
	})

	t.Run("restarts and a new image", func(t *testing.T) {
		pod := podsOf(t, client, "shop", "api")[0]
		kubelet(t, client, "shop", pod.Name, func(p *corev1.Pod) {
			s := &p.Status.ContainerStatuses[0]
			s.RestartCount, s.LastTerminationState.Terminated = 1, &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled", FinishedAt: metav1.Now()}
		})
		eventually(t, "the kill is a mark", func() bool { return count(document.Events, OOMKilled) == 1 })
		d, err := client.AppsV1().Deployments("shop").Get(ctx, "api", metav1.GetOptions{})
		require.NoError(t, err)
		d.Spec.Template.Spec.Containers[0].Image = "shop/api:2"
		_, err = client.AppsV1().Deployments("shop").Update(ctx, d, metav1.UpdateOptions{})
		require.NoError(t, err)
		eventually(t, "the image is a mark", func() bool {
			entries := stored(t, store, document.Events)
			return slices.ContainsFunc(entries, func(e logstore.Entry) bool { return e.Line == "deployment api: shop/api:1 → shop/api:2" })
		})
	})

	t.Run("events", func(t *testing.T) {
		d, err := client.AppsV1().Deployments("shop").Get(ctx, "api", metav1.GetOptions{})
		require.NoError(t, err)
		e := event("by-hand", 1)
		e.UID, e.Regarding = "", corev1.ObjectReference{Kind: kindDeployment, Namespace: "shop", Name: "api", UID: d.UID, APIVersion: "apps/v1"}
		e.ReportingInstance = "node-1"
		_, err = client.EventsV1().Events("shop").Create(ctx, e, metav1.CreateOptions{})
		require.NoError(t, err)
		eventually(t, "it is written", func() bool { return count(document.Events, e.Reason) == 1 })
		for _, entry := range stored(t, store, document.Events) {
			if logstore.Value(entry.Metadata, "reason") == e.Reason {
				require.Equal(t, "api", logstore.Value(entry.Labels, "workload"))
			}
		}
		// Kubernetes' own.
		require.Positive(t, count(document.Events, "ScalingReplicaSet"))
		require.Positive(t, count(document.Events, "SuccessfulCreate"))
	})

	t.Run("users' ConfigMaps", func(t *testing.T) {
		m := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: "prometheus-config", Namespace: "shop", Labels: map[string]string{ConfigLabel: Scrape}},
			Data:       map[string]string{"prometheus.yml": "scrape_configs: []"},
		}
		_, err := client.CoreV1().ConfigMaps("shop").Create(ctx, m, metav1.CreateOptions{})
		require.NoError(t, err)
		var configs []Config
		eventually(t, "it is delivered", func() bool {
			configs, _ = c.lastConfigs()
			return len(configs) > 0
		})
		require.Equal(t, []Config{{"shop", "prometheus-config", Scrape, m.Data}}, configs)
		for range 2 {
			require.NoError(t, c.Report(ctx, "shop", "prometheus-config", "job x: it is wrong "+strings.Repeat("x", 5000)))
		}
		require.Error(t, c.Report(ctx, "shop", "another", "x"))
		problems := func() (notes []string) {
			list, err := client.EventsV1().Events("shop").List(ctx, metav1.ListOptions{})
			require.NoError(t, err)
			for _, e := range list.Items {
				if e.Regarding.Kind == "ConfigMap" {
					require.Equal(t, Name, e.ReportingController)
					notes = append(notes, e.Note)
				}
			}
			return notes
		}
		require.Len(t, problems(), 1, "the same problem is told once")

		m.Labels[ConfigLabel] = "scrap"
		_, err = client.CoreV1().ConfigMaps("shop").Update(ctx, m, metav1.UpdateOptions{})
		require.NoError(t, err)
		eventually(t, "a wrong label is told", func() bool { return len(problems()) == 2 })
		eventually(t, "and it is not used", func() bool {
			configs, _ := c.lastConfigs()
			return len(configs) == 0
		})
		// Without the label it is of no interest, whatever is in it.
		delete(m.Labels, ConfigLabel)
		_, err = client.CoreV1().ConfigMaps("shop").Update(ctx, m, metav1.UpdateOptions{})
		require.NoError(t, err)
	})

	t.Run("the API server is away for a while", func(t *testing.T) {
		pods := podsOf(t, client, "shop", "api")
		gate.Close()
		eventually(t, "it is noticed", func() bool { return !c.State().Reachable })
		w, ok := c.Workload("shop", pods[0].Name)
		require.True(t, ok)
		require.Equal(t, Workload{kindDeployment, "api"}, w)
		require.NotEmpty(t, c.Pods())
		scale, err := client.AppsV1().Deployments("shop").GetScale(ctx, "api", metav1.GetOptions{})
		require.NoError(t, err)
		scale.Spec.Replicas = 0
		_, err = client.AppsV1().Deployments("shop").UpdateScale(ctx, "api", scale, metav1.UpdateOptions{})
		require.NoError(t, err)
		eventually(t, "the pods end", func() bool {
			for _, p := range pods {
				_ = client.CoreV1().Pods("shop").Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
			}
			return len(podsOf(t, client, "shop", "api")) == 0
		})
		eventually(t, "it is told", func() bool { return count(document.Events, ClusterGone) == 1 })
		gate.Open(t)
		eventually(t, "it is back", func() bool { return c.State().Reachable && c.Problem() == "" })
		eventually(t, "what has changed is known", func() bool { return len(c.Pods()) == 0 })
		eventually(t, "and told", func() bool { return count(document.Events, ClusterBack) == 1 })
		w, ok = c.Workload("shop", pods[0].Name)
		require.True(t, ok, "also of pods that are gone")
		require.Equal(t, Workload{kindDeployment, "api"}, w)
	})

	t.Run("another kubeconfig", func(t *testing.T) {
		clustertest.WriteKubeconfig(t, kubeconfig, gate.Address, "wrong", config)
		eventually(t, "it is not allowed", func() bool { return strings.Contains(c.Problem(), "Unauthorized") })
		require.True(t, c.State().Reachable)
		clustertest.WriteKubeconfig(t, kubeconfig, gate.Address, token, config)
		eventually(t, "it is allowed again", func() bool { return c.Problem() == "" })
	})

	t.Run("the next process writes nothing again", func(t *testing.T) {
		// What is under way ends.
		settled := func() bool {
			before := count(document.Events, "")
			time.Sleep(2 * tick) // it is written each second
			return count(document.Events, "") == before
		}
		eventually(t, "nothing happens", settled)
		c.stop()
		before := textOf(stored(t, store, document.Events))
		next := run(t, kubeconfig, store)
		eventually(t, "it has everything", func() bool { return next.Problem() == "" && len(next.Deployments()) == 1 })
		n := len(documentsOf("api"))
		eventually(t, "it writes documents", func() bool { return len(documentsOf("api")) > n })
		eventually(t, "nothing happens", settled)
		require.Equal(t, before, textOf(stored(t, store, document.Events)))
	})
}

// memoryVariable has the kubeconfig in the process of TestMemory that watches.
const memoryVariable = "POLYMESH_TEST_CLUSTER_MEMORY"

// TestMemory measures what watching costs, in a process that does nothing else, with 50 and with 1,000 pods that have a sidecar each.
func TestMemory(t *testing.T) {
	if kubeconfig := os.Getenv(memoryVariable); kubeconfig != "" {
		watchAndMeasure(t, kubeconfig)
		return
	}
	config := clustertest.Start(t)
	client := clustertest.Client(t, config)
	token := identity(t, client)
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	clustertest.WriteKubeconfig(t, kubeconfig, strings.TrimPrefix(config.Host, "https://"), token, config)
	_, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	made := 0
	for _, test := range []struct {
		pods  int
		limit float64 // MB, with the garbage of a start
	}{{50, 15}, {1000, 60}} {
		for ; made < test.pods/5; made++ {
			_, err := client.AppsV1().Deployments("shop").Create(t.Context(), deployment(fmt.Sprintf("app-%03d", made), "shop/api:1", 5), metav1.CreateOptions{})
			require.NoError(t, err)
		}
		var pods []corev1.Pod
		require.Eventually(t, func() bool {
			list, err := client.CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{})
			require.NoError(t, err)
			pods = list.Items
			return len(pods) == test.pods
		}, 10*time.Minute, time.Second, "all pods are created")
		for _, p := range pods {
			if p.Status.Phase != corev1.PodRunning {
				kubelet(t, client, "shop", p.Name, nil)
			}
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestMemory$", "-test.v")
		cmd.Env = append(os.Environ(), memoryVariable+"="+kubeconfig, memoryVariable+"_PODS="+strconv.Itoa(test.pods), "GOGC=50", "GOMEMLIMIT=110MiB")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		t.Logf("%d pods\n%s", test.pods, out)
		_, after, ok := strings.Cut(string(out), "more anonymous memory: ")
		require.True(t, ok)
		megabytes, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
		require.NoError(t, err)
		require.Less(t, megabytes, test.limit)
	}
}

func watchAndMeasure(t *testing.T, kubeconfig string) {
	pods, err := strconv.Atoi(os.Getenv(memoryVariable + "_PODS"))
	require.NoError(t, err)
	store := openStore(t, t.TempDir())
	require.NoError(t, store.Append([]logstore.Entry{{Time: time.Now(), Labels: []logstore.Field{{Name: "job", Value: "polymesh"}}, Line: "x"}}))
	require.NotEmpty(t, stored(t, store, "polymesh"))
	debug.FreeOSMemory()
	before, cpu := anonymous(t), cpuOf(t)
	c := run(t, kubeconfig, store)
	eventually(t, "it has all pods", func() bool { return len(c.Pods()) == pods && c.Problem() == "" })
	eventually(t, "their documents are written", func() bool { return len(stored(t, store, document.Objects)) >= pods/5 })
	state := kubestate.New(c, 10_000)
	for range 5 {
		_, err := state.Gather()
		require.NoError(t, err)
	}
	peak := anonymous(t)
	debug.FreeOSMemory()
	fmt.Printf("more anonymous memory: %.1f MB at its highest, %.1f MB kept; %.2f s of CPU until then\n", peak-before, anonymous(t)-before, cpuOf(t)-cpu)
	cpu = cpuOf(t)
	started := time.Now()
	time.Sleep(20 * time.Second) // a measurement of rest takes time
	fmt.Printf("at rest: %.2f %% of a core, %.1f MB\n", 100*(cpuOf(t)-cpu)/time.Since(started).Seconds(), anonymous(t)-before)
}

// anonymous returns the anonymous memory of this process in MB.
func anonymous(t *testing.T) float64 {
	file, err := os.Open("/proc/self/status")
	require.NoError(t, err)
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "RssAnon:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			require.NoError(t, err)
			return float64(n) / 1000
		}
	}
	t.Fatal("no RssAnon")
	return 0
}

// cpuOf returns the seconds of CPU that this process has used.
func cpuOf(t *testing.T) float64 {
	var usage syscall.Rusage
	require.NoError(t, syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}
