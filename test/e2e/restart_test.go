//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const survivorPort = 30080

// survivorManifests are pods that must outlive their server: "server" answers, "victim" is killed.
const survivorManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: e2e-restart}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: e2e-restart}
spec:
  type: NodePort
  selector: {app: server}
  ports: [{port: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: e2e-restart, labels: {app: server}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {name: victim, namespace: e2e-restart}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `", readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
`

// deploySurvivors starts them on a node that is ready.
func deploySurvivors(t *testing.T, n *node.Node) {
	t.Helper()
	importEcho(t, n)
	n.Apply(t, survivorManifests)
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/server", "pod/victim", "-n", "e2e-restart", "--timeout=120s")
	n.Eventually(t, time.Minute, func() (bool, string) { return echoes(n, survivorPort) })
	// A kubelet takes a container that started less than 10 s before itself for a new one, and takes its pod out of
	// service until the probe has succeeded again (kubeletRestartGracePeriod in pkg/kubelet/prober).
	n.Eventually(t, time.Minute, func() (bool, string) {
		pod, err := n.Client(t).CoreV1().Pods("e2e-restart").Get(t.Context(), "server", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, c := range pod.Status.ContainerStatuses {
			if c.State.Running == nil || time.Since(c.State.Running.StartedAt.Time) < 12*time.Second {
				return false, "the pod's container is new"
			}
		}
		return true, ""
	})
}

// prober queries the pod "server" again and again, each time on a new connection: by the pod's address from the node, and by
// the service's port from outside.
type prober struct {
	cancel context.CancelFunc
	wait   sync.WaitGroup

	mu       sync.Mutex
	asked    int
	failures []string
}

// probePause keeps the prober from taking the machine's time.
const probePause = 50 * time.Millisecond

func probe(t *testing.T, n *node.Node) *prober {
	t.Helper()
	pod, err := n.Client(t).CoreV1().Pods("e2e-restart").Get(t.Context(), "server", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	p := &prober{cancel: cancel}
	t.Cleanup(func() { p.stop() })
	for url, client := range map[string]*http.Client{
		fmt.Sprintf("http://%s:8080/healthz", pod.Status.PodIP):        n.HTTPInside(false),
		fmt.Sprintf("http://%s:%d/healthz", n.Address(), survivorPort): n.HTTP(false),
	} {
		p.wait.Go(func() {
			for ctx.Err() == nil {
				begin := time.Now()
				err := healthy(ctx, client, url)
				if ctx.Err() != nil {
					return
				}
				p.mu.Lock()
				p.asked++
				if err != nil {
					p.failures = append(p.failures, fmt.Sprintf("%s, after %s: %v", begin.Format(time.TimeOnly), time.Since(begin).Round(time.Millisecond), err))
				}
				p.mu.Unlock()
				select {
				case <-ctx.Done():
				case <-time.After(probePause):
				}
			}
		})
	}
	return p
}

func healthy(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if body, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusOK || string(body) != "ok\n" {
		return fmt.Errorf("%s answers %s %q (%v)", url, response.Status, body, err)
	}
	return nil
}

func (p *prober) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked
}

// more waits for a number of further requests, in whatever state the server is.
func (p *prober) more(t *testing.T, requests int) {
	t.Helper()
	want := p.count() + requests
	for deadline := time.Now().Add(2 * time.Minute); p.count() < want; time.Sleep(probePause) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d requests to the pod have an answer: %v", p.count(), want, p.failures)
		}
	}
}

func (p *prober) stop() (asked int, failures []string) {
	p.cancel()
	p.wait.Wait()
	return p.asked, p.failures
}

// noneFailed ends the prober.
func (p *prober) noneFailed(t *testing.T) {
	t.Helper()
	asked, failures := p.stop()
	t.Logf("%d requests to the pod, %d failed", asked, len(failures))
	if len(failures) > 0 || asked == 0 {
		t.Errorf("%d of %d requests to the pod failed, the first ones:\n%s", len(failures), asked, strings.Join(failures[:min(len(failures), 10)], "\n"))
	}
}

// containers returns what runs: one line for each container, which changes when it is started again.
func containers(t *testing.T, n *node.Node) (lines []string) {
	t.Helper()
	pods, err := n.Client(t).CoreV1().Pods(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		// What the storage provisioner starts ends by itself.
		if p.Status.Phase != corev1.PodRunning || p.Name == "victim" {
			continue
		}
		for _, c := range p.Status.ContainerStatuses {
			if c.State.Running == nil {
				t.Errorf("container %s of %s/%s does not run: %+v", c.Name, p.Namespace, p.Name, c.State)
				continue
			}
			lines = append(lines, fmt.Sprintf("%s/%s %s %s since %s, %d restarts, address %s", p.Namespace, p.Name, c.Name, c.ContainerID,
				c.State.Running.StartedAt.UTC().Format(time.TimeOnly), c.RestartCount, p.Status.PodIP))
		}
	}
	slices.Sort(lines)
	return lines
}

// identities of what a second start must find again.
func identities(t *testing.T, n *node.Node) string {
	t.Helper()
	return n.Kubectl(t, "get", "namespaces,nodes,serviceaccounts", "-A", "-o", `jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name} {.metadata.uid}{"\n"}{end}`)
}

// killPod ends a pod's processes, as the kernel does when memory runs short.
func killPod(t *testing.T, n *node.Node, uid, command string) {
	t.Helper()
	mark := regexp.MustCompile(`pod` + strings.ReplaceAll(uid, "-", "[-_]"))
	killed := 0
	for _, pid := range pids(t) {
		group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !mark.Match(group) {
			continue
		}
		if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || !strings.HasPrefix(string(line), command+"\x00") {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed++
	}
	if killed == 0 {
		t.Fatalf("pod %s has no process %s", uid, command)
	}
}

func pids(t *testing.T) (found []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

// Pods keep running while the server is down and after it is back; containers that have ended meanwhile are started again.
func TestRestart(t *testing.T) {
	ownNodes(t, 1)
	config := filepath.Join(t.TempDir(), "config.yaml")
	write := func(text string) {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("disable: [istio, metrics-server, observe, traefik]\n")
	n := node.ForTest(t, node.Options{Observe: true, Args: []string{"--config", config}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 3*time.Minute)
	wantLog(t, n, "--disable traefik does nothing: Polymesh has no Traefik")
	deploySurvivors(t, n)
	victim, err := n.Client(t).CoreV1().Pods("e2e-restart").Get(t.Context(), "victim", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	wantMode(t, n.Kubeconfig(), 0o600)
	secondServerIsRefused(t, n)
	before, known := containers(t, n), identities(t, n)
	if len(before) < 3 {
		t.Fatalf("CoreDNS, the storage provisioner and the test's pod should run, but there are only %v", before)
	}

	p := probe(t, n)
	p.more(t, 20)
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	killPod(t, n, string(victim.UID), "/echo")
	p.more(t, 40) // while there is no server
	write("disable: [istio, metrics-server, observe]\nwrite-kubeconfig-mode: 644\n")
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 2*time.Minute)
	wantMode(t, n.Kubeconfig(), 0o644)
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		pod, err := n.Client(t).CoreV1().Pods("e2e-restart").Get(t.Context(), "victim", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		why := node.NotReady(pod)
		for _, c := range pod.Status.ContainerStatuses {
			if c.RestartCount != 1 {
				why += fmt.Sprintf(" the container that was killed has %d restarts, want 1", c.RestartCount)
			}
		}
		return why == "" && pod.UID == victim.UID, fmt.Sprintf("%s (uid %s, was %s)", why, pod.UID, victim.UID)
	})
	p.more(t, 20)
	if after := containers(t, n); !slices.Equal(before, after) {
		t.Errorf("the containers were\n%s\nand are\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	if now := identities(t, n); now != known {
		t.Errorf("the second start did not find the data of the first one: there was\n%sand is\n%s", known, now)
	}
	p.noneFailed(t)
	secretsAreKept(t, n)
}

func wantLog(t *testing.T, n *node.Node, text string) {
	t.Helper()
	log, err := os.ReadFile(n.Log())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), text) {
		t.Errorf("the server's log does not contain %q", text)
	}
}

func wantMode(t *testing.T, path string, want fs.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != want {
		t.Errorf("%s has the mode %o, want %o", path, info.Mode().Perm(), want)
	}
}

var (
	privateKey = regexp.MustCompile(`PRIVATE KEY-----|client-key-data: `)
	// jwt is a service-account token: header and claims are JSON in base64url, and start with {".
	jwt = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.`)
)

// secretsAreKept checks what the server wrote: only root can read keys, and no log contains one, nor a token.
func secretsAreKept(t *testing.T, n *node.Node) {
	t.Helper()
	keys := 0
	err := filepath.WalkDir(n.DataDir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inner, _ := filepath.Rel(n.DataDir(), path)
		switch {
		// The shipped programs, other programs' files in images and volumes.
		case inner == "data" || inner == "storage" || strings.HasPrefix(inner, "agent/containerd/io.") || inner == "agent/kubelet/pods":
			return fs.SkipDir
		case !d.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, ".log") {
			return nil
		}
		if strings.HasSuffix(path, ".key") || privateKey.Match(text) {
			keys++
			if info.Mode().Perm() != 0o600 {
				t.Errorf("%s contains a private key and has the mode %o", path, info.Mode().Perm())
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if keys < 10 {
		t.Errorf("only %d private keys were found in %s: this test searches the wrong folder", keys, n.DataDir())
	}
	info, err := os.Stat(n.Layout().Server("db"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the datastore's folder: %v %v, want mode 700", info, err)
	}

	// A token, to check that the pattern matches one.
	if token := n.Kubectl(t, "create", "token", "default", "-n", "e2e-restart"); !jwt.MatchString(token) {
		t.Error("the pattern does not match a service-account token")
	}
	logs := []string{n.Log(), n.Layout().Agent("containerd", "containerd.log")}
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []*regexp.Regexp{privateKey, jwt} {
			if at := secret.FindIndex(text); at != nil {
				line := 1 + strings.Count(string(text[:at[0]]), "\n")
				t.Errorf("%s contains a secret in line %d", path, line) // which is not repeated here
			}
		}
	}
}
