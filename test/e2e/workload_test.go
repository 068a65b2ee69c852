//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// fetch queries a pod or a service by its address, from the node, on a new connection.
func fetch(n *node.Node, method, address, path, body string) (int, string, error) {
	request, err := http.NewRequest(method, "http://"+address+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	response, err := n.HTTPInside(false).Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// readOK queries with GET what must answer with 200.
func readOK(n *node.Node, address, path string, query url.Values) (string, error) {
	status, text, err := fetch(n, http.MethodGet, address, path+"?"+query.Encode(), "")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("http://%s%s: status %d: %.300s", address, path, status, text)
	}
	return text, err
}

// mustFetch is fetch, which must be answered with 200.
func mustFetch(t *testing.T, n *node.Node, method, address, path, body string) string {
	t.Helper()
	status, text, err := fetch(n, method, address, path, body)
	if err != nil || status != http.StatusOK {
		t.Fatalf("%s http://%s%s: status %d %s, %v", method, address, path, status, text, err)
	}
	return text
}

// getPod returns a pod as it is now.
func getPod(t *testing.T, n *node.Node, namespace, name string) *corev1.Pod {
	t.Helper()
	pod, err := n.Client(t).CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// readyPod waits until a pod is ready.
func readyPod(t *testing.T, n *node.Node, namespace, name string) *corev1.Pod {
	t.Helper()
	n.Kubectl(t, "wait", "--for=create", "pod/"+name, "-n", namespace, "--timeout=120s")
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/"+name, "-n", namespace, "--timeout=120s")
	return getPod(t, n, namespace, name)
}

// listPods returns the pods that a selector finds, in the order of their names.
func listPods(t *testing.T, n *node.Node, namespace, selector string) []corev1.Pod {
	t.Helper()
	pods, err := n.Client(t).CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(pods.Items, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods.Items
}

// containerStatus is that of a container, also of a sidecar, which Kubernetes counts among the init containers.
func containerStatus(p *corev1.Pod, name string) corev1.ContainerStatus {
	for _, s := range slices.Concat(p.Status.ContainerStatuses, p.Status.InitContainerStatuses) {
		if s.Name == name {
			return s
		}
	}
	return corev1.ContainerStatus{}
}

// echoAddress is where the echo image serves HTTP in a pod.
func echoAddress(p *corev1.Pod) string { return p.Status.PodIP + ":8080" }

// appAnswers waits until the app answers through the gateway.
func appAnswers(t *testing.T, n *node.Node) {
	t.Helper()
	n.Eventually(t, time.Minute, func() (bool, string) {
		status, got, _, err := predict(n.HTTP(false), n, []float64{1, 2})
		return status == http.StatusOK && got == 1.5, fmt.Sprintf("predict: status %d, %v", status, err)
	})
}

func TestKilledContainerComesBack(t *testing.T) {
	n := app(t)
	for _, name := range []string{"fastapi", "istio-proxy"} {
		t.Run(name, func(t *testing.T) {
			pod := listPods(t, n, appNamespace, "app=fastapi-service")[0]
			before := containerStatus(&pod, name)
			id := strings.TrimPrefix(before.ContainerID, "containerd://")
			n.Ctr(t, "tasks", "kill", "--signal", "SIGKILL", id)
			n.Eventually(t, 2*time.Minute, func() (bool, string) {
				now := getPod(t, n, appNamespace, pod.Name)
				if now.UID != pod.UID {
					t.Fatalf("pod %s is another one now", pod.Name)
				}
				after := containerStatus(now, name)
				if after.RestartCount != before.RestartCount+1 || after.ContainerID == before.ContainerID {
					return false, fmt.Sprintf("%s has restarted %d times, before %d", name, after.RestartCount, before.RestartCount)
				}
				if last := after.LastTerminationState.Terminated; last == nil || last.ExitCode != 137 {
					return false, fmt.Sprintf("%s ended with %v, want exit code 137", name, last)
				}
				why := node.NotReady(now)
				return why == "", why
			})
			appAnswers(t, n)
		})
	}
}

func TestDeletedPodComesBack(t *testing.T) {
	n := app(t)
	before := listPods(t, n, appNamespace, "app=fastapi-service")
	n.Kubectl(t, "delete", "pod", before[0].Name, "-n", appNamespace)
	n.WaitRollout(t, appNamespace, "deployment/fastapi-service")
	after := listPods(t, n, appNamespace, "app=fastapi-service")
	if len(after) != len(before) || slices.ContainsFunc(after, func(p corev1.Pod) bool { return p.UID == before[0].UID }) {
		t.Errorf("there were %d pods and are %d, the deleted one perhaps among them", len(before), len(after))
	}
	appAnswers(t, n)
}

const workloadNamespace = "e2e-workload"

// What Kubernetes promises to every pod. The parts are independent, so they wait at the same time.
func TestWorkload(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	const namespace = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + workloadNamespace + `}
`
	t.Cleanup(func() { n.Delete(t, namespace) })
	n.Apply(t, namespace)
	for _, part := range []struct {
		name string
		test func(*testing.T, *node.Node)
	}{
		{"ConfigMap and Secret", testConfig},
		{"liveness", testLiveness},
		{"readiness", testReadiness},
		{"memory limit", testMemoryLimit},
		{"job", testJob},
	} {
		t.Run(part.name, func(t *testing.T) {
			t.Parallel()
			part.test(t, n)
		})
	}
}

func testConfig(t *testing.T, n *node.Node) {
	const secret = "postgresql://user:pass@postgres.example.com:5432/mydb"
	settings := func(greeting string) string {
		return `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: ` + workloadNamespace + `}
data: {greeting: "` + greeting + `"}
`
	}
	n.Apply(t, settings("hello")+`
---
apiVersion: v1
kind: Secret
metadata: {name: database, namespace: `+workloadNamespace+`}
stringData: {url: "`+secret+`"}
---
apiVersion: v1
kind: Pod
metadata: {name: configured, namespace: `+workloadNamespace+`}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: "`+echoImage+`"
    env: [{name: VERSION, valueFrom: {secretKeyRef: {name: database, key: url}}}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    volumeMounts: [{name: settings, mountPath: /etc/settings}]
  volumes: [{name: settings, configMap: {name: settings}}]
`)
	address := echoAddress(readyPod(t, n, workloadNamespace, "configured"))
	var got struct{ Version string }
	text := mustFetch(t, n, http.MethodGet, address, "/", "")
	if err := json.Unmarshal([]byte(text), &got); err != nil || got.Version != secret {
		t.Errorf("the variable from the Secret is %q (%v), want %q", got.Version, err, secret)
	}
	const file = "/file?path=/etc/settings/greeting"
	if text := mustFetch(t, n, http.MethodGet, address, file, ""); text != "hello" {
		t.Errorf("the file from the ConfigMap contains %q, want hello", text)
	}
	// The kubelet checks a pod's volumes about once a minute.
	n.Apply(t, settings("good day"))
	n.Eventually(t, 4*time.Minute, func() (bool, string) {
		_, text, err := fetch(n, http.MethodGet, address, file, "")
		return text == "good day", fmt.Sprintf("the file from the changed ConfigMap says %q (%v)", text, err)
	})
}

func testLiveness(t *testing.T, n *node.Node) {
	n.Apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: live, namespace: `+workloadNamespace+`}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: "`+echoImage+`"
    livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`)
	pod := readyPod(t, n, workloadNamespace, "live")
	mustFetch(t, n, http.MethodGet, echoAddress(pod), "/fail", "")
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		now := getPod(t, n, workloadNamespace, "live")
		restarts := containerStatus(now, "echo").RestartCount
		why := node.NotReady(now)
		return restarts == 1 && why == "", fmt.Sprintf("%d restarts, want 1; %s", restarts, why)
	})
	events := n.Kubectl(t, "get", "events", "-n", workloadNamespace, "--field-selector", "involvedObject.name=live", "-o", "jsonpath={.items[*].message}")
	if !strings.Contains(events, "failed liveness probe, will be restarted") {
		t.Errorf("no event reports the failed probe: %s", events)
	}
}

func testReadiness(t *testing.T, n *node.Node) {
	n.Apply(t, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: ready, namespace: `+workloadNamespace+`}
spec:
  replicas: 2
  selector: {matchLabels: {app: ready}}
  template:
    metadata: {labels: {app: ready}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: "`+echoImage+`"
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: ready, namespace: `+workloadNamespace+`}
spec: {selector: {app: ready}, ports: [{port: 80, targetPort: 8080}]}
`)
	n.WaitRollout(t, workloadNamespace, "deployment/ready")
	service, err := n.Client(t).CoreV1().Services(workloadNamespace).Get(t.Context(), "ready", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pods := listPods(t, n, workloadNamespace, "app=ready")
	both := []string{pods[0].Name, pods[1].Name}
	serve := func(want []string) {
		t.Helper()
		n.Eventually(t, time.Minute, func() (bool, string) {
			var ready []string
			found, err := n.Client(t).DiscoveryV1().EndpointSlices(workloadNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=ready"})
			if err != nil {
				return false, err.Error()
			}
			for _, s := range found.Items {
				for _, e := range s.Endpoints {
					if e.Conditions.Ready != nil && *e.Conditions.Ready {
						ready = append(ready, e.TargetRef.Name)
					}
				}
			}
			// kube-proxy picks one of the ready pods by chance for each connection.
			who, err := answering(n, service.Spec.ClusterIP, 20)
			return same(ready, want) && err == nil && same(who, want), fmt.Sprintf("the Service's endpoints are %v, and %v answer (%v); want %v", ready, who, err, want)
		})
	}
	serve(both)
	mustFetch(t, n, http.MethodGet, echoAddress(&pods[0]), "/fail", "")
	serve(both[1:])
	mustFetch(t, n, http.MethodGet, echoAddress(&pods[0]), "/ok", "")
	serve(both)
}

// answering sends requests to a service of echo pods and returns which pods have answered.
func answering(n *node.Node, address string, count int) (names []string, err error) {
	for range count {
		status, text, err := fetch(n, http.MethodGet, address, "/", "")
		if err != nil || status != http.StatusOK {
			return names, fmt.Errorf("status %d %s, %v", status, text, err)
		}
		r, err := parseReply(text)
		if err != nil {
			return names, err
		}
		if !slices.Contains(names, r.Pod) {
			names = append(names, r.Pod)
		}
	}
	return names, nil
}

// same compares without order.
func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

func testMemoryLimit(t *testing.T, n *node.Node) {
	n.Apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: hungry, namespace: `+workloadNamespace+`}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: "`+echoImage+`"
    resources: {limits: {memory: 64Mi}}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`)
	address := echoAddress(readyPod(t, n, workloadNamespace, "hungry"))
	mustFetch(t, n, http.MethodGet, address, "/alloc?mb=8", "")
	if status, text, err := fetch(n, http.MethodGet, address, "/alloc?mb=256", ""); err == nil {
		t.Errorf("256 MiB of 64 were given: status %d %s", status, text)
	}
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		now := getPod(t, n, workloadNamespace, "hungry")
		s := containerStatus(now, "echo")
		if last := s.LastTerminationState.Terminated; last == nil || last.Reason != "OOMKilled" || last.ExitCode != 137 {
			return false, fmt.Sprintf("the container ended with %v, want OOMKilled", last)
		}
		why := node.NotReady(now)
		return why == "", why
	})
}

func testJob(t *testing.T, n *node.Node) {
	n.Apply(t, `
apiVersion: batch/v1
kind: Job
metadata: {name: count, namespace: `+workloadNamespace+`}
spec:
  completions: 3
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: busybox
        image: "`+busyboxImage(t, n)+`"
        command: [sh, -c, 'echo "part $JOB_COMPLETION_INDEX"']
`)
	n.Kubectl(t, "wait", "--for=condition=Complete", "job/count", "-n", workloadNamespace, "--timeout=120s")
	logs := strings.Split(strings.TrimSpace(n.Kubectl(t, "logs", "-n", workloadNamespace, "-l", "job-name=count")), "\n")
	if want := []string{"part 0", "part 1", "part 2"}; !same(logs, want) {
		t.Errorf("the job's pods say %q, want %q", logs, want)
	}
}

// busyboxImage is the name of the busybox that ships.
func busyboxImage(t *testing.T, n *node.Node) string {
	t.Helper()
	out, errOut, code := n.Polymesh(t, "version", "-o", "json")
	var versions struct{ Images []string }
	if err := json.Unmarshal([]byte(out), &versions); err != nil || code != 0 {
		t.Fatalf("polymesh version -o json ends with %d (%v): %s%s", code, err, out, errOut)
	}
	for _, image := range versions.Images {
		if strings.Contains(image, "/busybox:") {
			return image
		}
	}
	t.Fatalf("polymesh version knows no busybox among %v", versions.Images)
	return ""
}
