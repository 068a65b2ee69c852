//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// The guide's K3s server has this taint, with which Istio cannot be scheduled on a single server. And an Istio that the user
// has removed stays removed.
func TestTaintWithoutRoomForIstio(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{Args: []string{"--node-taint", "CriticalAddonsOnly=true:NoExecute"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Everything else becomes ready; only Istio waits, and reports for what.
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		report, err := n.Report(t.Context())
		if err != nil {
			return false, err.Error()
		}
		istio := ""
		for _, c := range report.Components {
			switch {
			case c.Name == "istio":
				istio = string(c.State) + ": " + c.Message
			case c.State != "Ready":
				return false, c.Name + " is " + string(c.State) + ": " + c.Message
			}
		}
		return strings.Contains(istio, "istiod") && strings.Contains(istio, "taint"), "istio is " + istio
	})
	out, code := n.Status(t)
	if code != 1 {
		t.Errorf("polymesh status ends with %d, want 1", code)
	}
	printed := ""
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "istio ") {
			printed = line
		}
	}
	if !strings.Contains(printed, "CriticalAddonsOnly") && !strings.Contains(printed, "untolerated taint") {
		t.Errorf("polymesh status does not show why Istio cannot be scheduled:\n%s", out)
	}
	jsonOut, _, code := n.Polymesh(t, "status", "-o", "json")
	var report struct{ Ready *bool }
	if err := json.Unmarshal([]byte(jsonOut), &report); err != nil || report.Ready == nil || *report.Ready || code != 1 {
		t.Errorf("polymesh status -o json ends with %d (%v):\n%s", code, err, jsonOut)
	}
	if taints := n.Kubectl(t, "get", "nodes", "-o", "jsonpath={.items[0].spec.taints[*].key}"); taints != "CriticalAddonsOnly" {
		t.Errorf("the node has the taints %q", taints)
	}

	// The user's changes of Istio stay: the server's own is removed, and another revision is installed that tolerates the taint.
	n.Istioctl(t, "uninstall", "--purge", "-y")
	// It does not wait for its types to go, and an installation that begins before would miss them.
	n.Eventually(t, time.Minute, func() (bool, string) {
		left := n.Kubectl(t, "get", "crds", "-o", "jsonpath={.items[*].metadata.name}")
		return !strings.Contains(left, ".istio.io"), "these types are left: " + left
	})
	n.Istioctl(t, "install", "-y", "--set", "profile=minimal", "--set", "revision=canary",
		"--set", "values.pilot.tolerations[0].key=CriticalAddonsOnly", "--set", "values.pilot.tolerations[0].operator=Exists")
	deployments := n.Client(t).AppsV1().Deployments("istio-system")
	before, err := deployments.Get(t.Context(), "istiod-canary", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 2*time.Minute)
	after, err := deployments.List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(after.Items) != 1 || after.Items[0].UID != before.UID || after.Items[0].Generation != before.Generation {
		t.Errorf("after the restart istio-system has %v, want only istiod-canary as it was", names(after.Items))
	}
}

func names(deployments []appsv1.Deployment) (found []string) {
	for _, d := range deployments {
		found = append(found, fmt.Sprintf("%s (%s, generation %d)", d.Name, d.UID, d.Generation))
	}
	return found
}
