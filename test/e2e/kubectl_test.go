//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const kubectlNamespace = "e2e-kubectl"

// tools makes a pod with a shell, "tools", and one of the echo image with a Service, "echo".
func tools(t *testing.T, n *node.Node) {
	t.Helper()
	importEcho(t, n)
	const namespace = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + kubectlNamespace + `}
`
	t.Cleanup(func() { n.Delete(t, namespace) })
	n.Apply(t, namespace+`
---
apiVersion: v1
kind: Pod
metadata: {name: tools, namespace: `+kubectlNamespace+`}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: busybox, image: "`+busyboxImage(t, n)+`", command: [tail, -f, /dev/null]}
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: `+kubectlNamespace+`, labels: {app: echo}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "`+echoImage+`", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: `+kubectlNamespace+`}
spec: {selector: {app: echo}, ports: [{port: 80, targetPort: 8080}]}
`)
	readyPod(t, n, kubectlNamespace, "tools")
	readyPod(t, n, kubectlNamespace, "echo")
}

// What kubectl does by the kubelet.
func TestKubectl(t *testing.T) {
	n := app(t)
	tools(t, n)
	t.Run("logs", func(t *testing.T) { testLogs(t, n) })
	t.Run("exec", func(t *testing.T) { testExec(t, n) })
	t.Run("port-forward", func(t *testing.T) { testPortForward(t, n) })
	t.Run("cp", func(t *testing.T) { testCopy(t, n) })
}

func testLogs(t *testing.T, n *node.Node) {
	n.Apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: talker, namespace: `+kubectlNamespace+`}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: busybox
    image: "`+busyboxImage(t, n)+`"
    command: [sh, -c, 'mkfifo /tmp/go; echo one; echo two; read word </tmp/go; echo $word']
`)
	readyPod(t, n, kubectlNamespace, "talker")
	n.Eventually(t, time.Minute, func() (bool, string) {
		out, err := n.KubectlErr("logs", "talker", "-n", kubectlNamespace)
		return out == "one\ntwo\n", fmt.Sprintf("kubectl logs shows %q (%v)", out, err)
	})

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	follow := n.PolymeshCommand(ctx, "kubectl", "logs", "-f", "talker", "-n", kubectlNamespace)
	var complaint bytes.Buffer
	follow.Stderr = &complaint
	out, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	next := func(want string) {
		t.Helper()
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("kubectl logs -f shows %q (%v), want %q; it complains: %s", lines.Text(), lines.Err(), want, complaint.String())
		}
	}
	next("one")
	next("two")
	if _, err := n.Exec(kubectlNamespace, "talker", "busybox", "sh", "-c", "echo three >/tmp/go"); err != nil {
		t.Fatal(err)
	}
	next("three")
	if lines.Scan() {
		t.Errorf("kubectl logs -f shows also %q", lines.Text())
	}
	if err := follow.Wait(); err != nil {
		t.Errorf("kubectl logs -f of a pod that has ended: %v: %s", err, complaint.String())
	}
	if out := n.Kubectl(t, "logs", "talker", "-n", kubectlNamespace, "--tail=1"); out != "three\n" {
		t.Errorf("kubectl logs of a pod that has ended shows %q", out)
	}
}

func testExec(t *testing.T, n *node.Node) {
	exec := []string{"kubectl", "exec", "-n", kubectlNamespace, "tools", "--", "sh", "-c"}
	for script, want := range map[string]struct {
		out, errOut string
		code        int
	}{
		"echo out; echo err >&2": {"out\n", "err\n", 0},
		"exit 7":                 {"", "command terminated with exit code 7\n", 7},
	} {
		out, errOut, code := n.Polymesh(t, append(exec, script)...)
		if out != want.out || errOut != want.errOut || code != want.code {
			t.Errorf("kubectl exec … %q ends with %d: %q %q; want %+v", script, code, out, errOut, want)
		}
	}
	cmd := n.PolymeshCommand(t.Context(), "kubectl", "exec", "-i", "-n", kubectlNamespace, "tools", "--", "tr", "a-z", "A-Z")
	cmd.Stdin = strings.NewReader("some input")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "SOME INPUT" {
		t.Errorf("kubectl exec -i: %q %v", out, err)
	}
	got, err := n.Exec(kubectlNamespace, "tools", "busybox", "wget", "-T", "20", "-q", "-O-", "http://echo/")
	if err != nil {
		t.Fatalf("busybox wget with a time limit: %v", err)
	}
	if reply, err := parseReply(got); err != nil || reply.Pod != "echo" {
		t.Errorf("busybox wget with a time limit shows %q (%v), want the answer of the pod echo", got, err)
	}
}

func testPortForward(t *testing.T, n *node.Node) {
	for _, forward := range []struct {
		name, host, path string
		args             []string
	}{
		{"pod", "localhost", "/", []string{"pod/echo", ":8080", "-n", kubectlNamespace}},
		{"service", "localhost", "/", []string{"service/echo", ":80", "-n", kubectlNamespace}},
		{"the guide's way in", appHost, "/api/v1/call-go", []string{"svc/istio-ingressgateway", ":80", "-n", "istio-system"}},
	} {
		t.Run(forward.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			cmd := n.PolymeshCommand(ctx, append([]string{"kubectl", "port-forward"}, forward.args...)...)
			var complaint bytes.Buffer
			cmd.Stderr = &complaint
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				cancel()
				_ = cmd.Wait() // killed
			}()
			printed := bufio.NewReader(out)
			line, err := printed.ReadString('\n')
			address := regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) -> \d+\n$`).FindStringSubmatch(line)
			if address == nil {
				cancel()
				_ = cmd.Wait() // killed
				t.Fatalf("kubectl port-forward prints %q (%v) %s", line, err, complaint.String())
			}
			go func() { _, _ = io.Copy(io.Discard, printed) }() // it prints each connection
			for range 3 {
				request, err := http.NewRequest(http.MethodGet, "http://"+address[1]+forward.path, nil)
				if err != nil {
					t.Fatal(err)
				}
				request.Host = forward.host
				response, err := n.HTTPInside(false).Do(request)
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				if response.StatusCode != http.StatusOK {
					t.Errorf("%s: %s", request.URL, response.Status)
				}
			}
		})
	}
}

func testCopy(t *testing.T, n *node.Node) {
	dir := t.TempDir()
	content := make([]byte, 3<<20)
	if _, err := rand.Read(content); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "there", "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "there", "deep", "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	n.Kubectl(t, "cp", filepath.Join(dir, "there"), kubectlNamespace+"/tools:/tmp/there")
	if got, err := n.Exec(kubectlNamespace, "tools", "busybox", "wc", "-c", "/tmp/there/deep/file"); err != nil || !strings.HasPrefix(strings.TrimSpace(got), fmt.Sprint(len(content))) {
		t.Errorf("the file in the pod has the size %q (%v), want %d", got, err, len(content))
	}
	n.Kubectl(t, "cp", kubectlNamespace+"/tools:/tmp/there/deep/file", filepath.Join(dir, "back"))
	if back, err := os.ReadFile(filepath.Join(dir, "back")); err != nil || !bytes.Equal(back, content) {
		t.Errorf("the file that came back is another one (%v, %d bytes)", err, len(back))
	}
}

func TestTop(t *testing.T) {
	n := app(t)
	// A pod is measured when metrics-server has seen it twice, 15 seconds apart.
	const limit = 3 * time.Minute
	n.Eventually(t, limit, func() (bool, string) {
		out, err := n.KubectlErr("top", "nodes", "--no-headers")
		return err == nil && regexp.MustCompile(`^\S+ +[1-9]\d*m +\d+% +[1-9]\d*Mi +\d+% *\n$`).MatchString(out), fmt.Sprintf("kubectl top nodes: %q %v", out, err)
	})
	n.Eventually(t, limit, func() (bool, string) {
		out, err := n.KubectlErr("top", "pods", "--containers", "--no-headers", "-n", appNamespace)
		measured := map[string]int{}
		for line := range strings.Lines(out) {
			// POD NAME CPU MEMORY
			if f := strings.Fields(line); len(f) == 4 && regexp.MustCompile(`^[1-9]\d*Mi$`).MatchString(f[3]) {
				measured[f[1]]++
			}
		}
		return measured["fastapi"] == 2 && measured["go"] == 3 && measured["istio-proxy"] == 5, fmt.Sprintf("kubectl top pods: %s%v", out, err)
	})
}

// A drain waits for a PodDisruptionBudget, and works when that is gone. Only the test's own pod is to go.
func TestDrain(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	const manifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-drain}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: guarded, namespace: e2e-drain}
spec:
  selector: {matchLabels: {app: guarded}}
  template:
    metadata: {labels: {app: guarded}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: guard, namespace: e2e-drain}
spec: {minAvailable: 1, selector: {matchLabels: {app: guarded}}}
`
	t.Cleanup(func() { n.Delete(t, manifests) })
	n.Apply(t, manifests)
	n.WaitRollout(t, "e2e-drain", "deployment/guarded")
	// The budget's controller has counted the pod.
	n.Kubectl(t, "wait", "--for=jsonpath={.status.currentHealthy}=1", "pdb/guard", "-n", "e2e-drain", "--timeout=60s")
	pod := listPods(t, n, "e2e-drain", "app=guarded")[0]
	name := n.Kubectl(t, "get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
	drain := []string{"kubectl", "drain", name, "--pod-selector=app=guarded"}

	t.Cleanup(func() { n.Kubectl(t, "uncordon", name) })
	out, errOut, code := n.Polymesh(t, append(drain, "--timeout=12s")...)
	if code == 0 || !strings.Contains(errOut, pod.Name) || !strings.Contains(errOut, "disruption budget") {
		t.Errorf("kubectl drain ends with %d, and does not say that %s is held by a budget:\n%s%s", code, pod.Name, out, errOut)
	}
	// kubectl does not show the name that it was given.
	err := n.Client(t).PolicyV1().Evictions("e2e-drain").Evict(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: pod.Namespace}})
	var refused apierrors.APIStatus
	if !errors.As(err, &refused) || !strings.Contains(fmt.Sprint(refused.Status().Details), "The disruption budget guard needs 1 healthy pods") {
		t.Errorf("the eviction of %s returns %+v, want it rejected by the disruption budget guard", pod.Name, err)
	}
	if now := getPod(t, n, "e2e-drain", pod.Name); now.UID != pod.UID || node.NotReady(now) != "" {
		t.Errorf("the pod that the budget guards is not the same or not ready: %s", node.NotReady(now))
	}
	n.Kubectl(t, "delete", "pdb", "guard", "-n", "e2e-drain")
	if out, errOut, code := n.Polymesh(t, append(drain, "--timeout=120s")...); code != 0 {
		t.Fatalf("kubectl drain without the budget ends with %d:\n%s%s", code, out, errOut)
	}
	n.Eventually(t, time.Minute, func() (bool, string) {
		pods := listPods(t, n, "e2e-drain", "app=guarded")
		return len(pods) == 1 && pods[0].UID != pod.UID && pods[0].Spec.NodeName == "", fmt.Sprintf("%d pods; want one that waits for a node", len(pods))
	})
	n.Kubectl(t, "uncordon", name)
	n.WaitRollout(t, "e2e-drain", "deployment/guarded")
}
