//go:build e2e

package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

func TestNodeIsReady(t *testing.T) {
	n := app(t)
	line := strings.TrimSpace(n.Kubectl(t, "get", "nodes", "--no-headers"))
	// NAME STATUS ROLES AGE VERSION, as the guide shows it
	f := strings.Fields(line)
	if len(f) != 5 || f[1] != "Ready" || f[2] != "control-plane,master" || !strings.HasPrefix(f[4], "v1.36.") {
		t.Errorf("kubectl get nodes prints %q", line)
	}
}

func TestSystemPodsRun(t *testing.T) {
	n := app(t)
	client := n.Client(t)
	want := []string{
		"kube-system/coredns", "kube-system/metrics-server", "kube-system/local-path-provisioner",
		"istio-system/istiod", "istio-system/istio-ingressgateway", "istio-system/istio-egressgateway",
	}
	n.Eventually(t, time.Minute, func() (bool, string) {
		pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		missing := slices.Clone(want)
		for _, p := range pods.Items {
			if p.Namespace != "kube-system" && p.Namespace != "istio-system" {
				continue
			}
			if why := node.NotReady(&p); why != "" && p.Status.Phase != corev1.PodSucceeded {
				return false, why
			}
			missing = slices.DeleteFunc(missing, func(prefix string) bool { return strings.HasPrefix(p.Namespace+"/"+p.Name, prefix+"-") })
		}
		return len(missing) == 0, "no pod of " + strings.Join(missing, ", ")
	})
	if out, code := n.Status(t); code != 0 {
		t.Errorf("polymesh status ends with %d:\n%s", code, out)
	}
}

func TestAppPodsHaveSidecars(t *testing.T) {
	n := app(t)
	count := map[string]int{}
	for line := range strings.Lines(n.Kubectl(t, "get", "pods", "-n", "polyglot-services", "--no-headers")) {
		f := strings.Fields(line)
		if len(f) < 3 || f[1] != "2/2" || f[2] != "Running" {
			t.Errorf("not 2/2 and Running: %s", line)
		}
		name := strings.Split(f[0], "-service-")[0]
		count[name]++
	}
	if count["fastapi"] != 2 || count["go"] != 3 {
		t.Errorf("pods: %v, want 2 of fastapi and 3 of go", count)
	}
}

func TestUpShowsTheAnswers(t *testing.T) {
	app(t)
	for _, want := range []string{`{"prediction":2.0,"confidence":0.95}`, `"go_service_response":{"status":"healthy"`, "2/2", "Next:", "make down"} {
		if !strings.Contains(shared.output, want) {
			t.Errorf("make up does not show %q:\n%s", want, shared.output)
		}
	}
}

func TestUpAgainChangesNothing(t *testing.T) {
	n := app(t)
	pid, pods := n.PID(), podUIDs(t, n)
	out, err := n.Up(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, " 0 created, 0 changed, ") {
		t.Errorf("make up does not report that nothing was changed:\n%s", out)
	}
	if n.PID() != pid {
		t.Errorf("the server was process %d and is %d now", pid, n.PID())
	}
	if now := podUIDs(t, n); !slices.Equal(now, pods) {
		t.Errorf("the pods were %v and are %v now", pods, now)
	}
}

// podUIDs returns the pods of the system and of the app, with their UIDs.
func podUIDs(t *testing.T, n *node.Node) []string {
	t.Helper()
	pods, err := n.Client(t).CoreV1().Pods(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range pods.Items {
		if slices.Contains([]string{"kube-system", "istio-system", "polyglot-services"}, p.Namespace) {
			found = append(found, p.Namespace+"/"+p.Name+" "+string(p.UID))
		}
	}
	slices.Sort(found)
	return found
}
