//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// olderProgram returns a polymesh file of the version before (build/test.mk): "polymesh" has today's code and reports the minor version of
// Kubernetes before, "agent" is only `polymesh agent`, and has that Kubernetes.
func olderProgram(t *testing.T, name string) string {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(top, ".build", "test", "older", name)
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("no program of the version before: run `make .build/test/older/%s` (%v)", name, err)
	}
	return program
}

// kubernetesOf returns the version of Kubernetes of a node's program.
func kubernetesOf(t *testing.T, n *node.Node) string {
	t.Helper()
	out, errOut, code := n.Polymesh(t, "version", "-o", "json")
	var v struct{ Kubernetes string }
	if err := json.Unmarshal([]byte(out), &v); err != nil || code != 0 || v.Kubernetes == "" {
		t.Fatalf("polymesh version -o json ends with %d (%v): %s%s", code, err, out, errOut)
	}
	return v.Kubernetes
}

// upgrade puts the program under test in place of a node's, and starts it again, as `polymesh install --now` does.
func upgrade(t *testing.T, n *node.Node) {
	t.Helper()
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Replace(program)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
}

// podsOf returns an app's pods in the namespace default: on which node each runs, and how often its containers have started.
func podsOf(t *testing.T, n *node.Node, app string) string {
	t.Helper()
	out := n.Kubectl(t, "get", "pods", "-l", "app="+app, "--sort-by=.spec.nodeName",
		"-o", `jsonpath={range .items[*]}{.spec.nodeName}={.metadata.name}:{.status.containerStatuses[*].restartCount} {end}`)
	return strings.TrimSpace(out)
}

// wantServiceCalls calls an app's pod on a node through a service that has no other pod, from the pods on the other nodes, and the other
// way round. Each pod answers with its caller's address, which stays the pod's own.
func wantServiceCalls(t *testing.T, n *node.Node, app, on string) {
	t.Helper()
	pods := listPods(t, n, "default", "app="+app)
	var services []string
	for _, p := range pods {
		n.Kubectl(t, "label", "pod", p.Name, "on="+p.Spec.NodeName)
		services = append(services, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "on-%[1]s", "namespace": "default"},
			"spec": {"selector": {"on": "%[1]s"}, "ports": [{"port": 8000, "targetPort": 8080}]}}`, p.Spec.NodeName))
	}
	list := `{"apiVersion": "v1", "kind": "List", "items": [` + strings.Join(services, ",") + `]}`
	n.Apply(t, list)
	defer n.Delete(t, list)
	called := 0
	for _, from := range pods {
		for _, to := range pods {
			if from.Name == to.Name || from.Spec.NodeName != on && to.Spec.NodeName != on {
				continue
			}
			n.Eventually(t, time.Minute, func() (bool, string) {
				out, err := n.Exec("default", from.Name, app, "wget", "-qO-", "-T", "5", "http://on-"+to.Spec.NodeName+":8000/")
				caller := strings.TrimPrefix(strings.Trim(strings.TrimSpace(out), "[]"), "::ffff:")
				return err == nil && caller == from.Status.PodIP, fmt.Sprintf("from %s, the service of the pod on %s answers %q (%v), want %s", from.Spec.NodeName, to.Spec.NodeName, out, err, from.Status.PodIP)
			})
			called++
		}
	}
	if called == 0 {
		t.Errorf("no pod of %s runs on %s beside another one: %s", app, on, podsOf(t, n, app))
	}
}

// Three servers and two agents of the version before, one with an older kubelet and kube-proxy. The servers are upgraded as docs/operate
// says, one after the other, while the agents stay as they are, and then the agents. No request to pods is lost, no acknowledged write is
// lost, and no pod is started again.
func TestUpgradeOfServers(t *testing.T) {
	long(t, "TestAgents has an agent of the version before, and upgrades it; TestServers loses servers")
	ownNodes(t, 5)
	older := olderProgram(t, "polymesh")
	c := node.ClusterForTest(t)
	// Ours is a feature gate that Kubernetes has not had in the minor version before.
	args := []string{"--kube-controller-manager-arg", "feature-gates=AllAlpha=false"}
	first := c.AddForTest(t, node.Options{Program: older, Args: append(args, "--cluster-init", "--disable", "istio,metrics-server,local-storage")})
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	first.WaitReady(t, 3*time.Minute)
	servers := []*node.Node{first}
	for range 2 {
		servers = append(servers, c.AddForTest(t, node.Options{Joins: first, Serves: true, Program: older, Args: args}))
	}
	agents := []*node.Node{c.AddForTest(t, node.Options{Joins: first, Program: older}), c.AddForTest(t, node.Options{Joins: first, Program: olderProgram(t, "agent")})}
	for _, n := range append(servers[1:], agents...) {
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range append(servers[1:], agents...) {
		n.WaitReady(t, 4*time.Minute)
	}
	before := kubernetesOf(t, first)
	wantVersions := func(t *testing.T, n *node.Node, upgraded int, now string) {
		t.Helper()
		want := ""
		for i := range 5 {
			version := before
			if i < upgraded {
				version = now
			}
			want += fmt.Sprintf("node-%d=%s ", i+1, version)
		}
		n.Eventually(t, time.Minute, func() (bool, string) {
			got := n.Kubectl(t, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.nodeInfo.kubeletVersion} {end}`)
			return got == want, "the nodes have " + got + ", want " + want
		})
	}
	wantVersions(t, first, 0, "")

	first.Kubectl(t, "create", "namespace", writesNamespace)
	first.Apply(t, fmt.Sprintf(serversPods, busyboxImage(t, first)))
	first.Kubectl(t, "rollout", "status", "deployment/echo", "--timeout=2m")
	urls := []string{"http://" + agents[0].Address() + ":8000/", "http://" + agents[1].Address() + ":8000/"}
	answer(t, first, urls...)
	pods := podsOf(t, first, "echo")

	ctx, cancel := context.WithCancel(t.Context())
	book := &writeBook{acknowledged: map[string]bool{}}
	var writing sync.WaitGroup
	for i, n := range servers {
		client := n.Client(t)
		writing.Go(func() { book.write(ctx, client, fmt.Sprintf("upgrade-%d", i)) })
	}
	answers := sendRequests(ctx, first, 10*time.Millisecond, urls...)
	for i, n := range servers {
		upgrade(t, n)
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			out, code := n.Status(t)
			members, err := etcdMembers(t, n)
			answering := 0
			for _, m := range members {
				if m.Problem == "" {
					answering++
				}
			}
			return code == 0 && !strings.Contains(out, "\n! ") && err == nil && answering == 3, fmt.Sprintf("%d members of etcd answer (%v), and polymesh status ends with %d:\n%s", answering, err, code, out)
		})
		wantVersions(t, n, i+1, kubernetesOf(t, n))
	}
	// Today's servers, and both agents of the version before.
	out, _ := servers[2].Status(t)
	for _, name := range []string{"node-4 ", "node-5 "} {
		if line := lineOf(out, name); !strings.Contains(line, " Ready ") || !strings.Contains(line, before+" (1 minor older)") {
			t.Errorf("polymesh status shows %q, want Ready and %s (1 minor older)", line, before)
		}
	}
	for _, p := range listPods(t, first, "default", "app=echo") {
		if out, err := first.Exec("default", p.Name, "echo", "cat", "/tmp/w/index.html"); err != nil || strings.TrimSpace(out) != "ok" {
			t.Errorf("kubectl exec on %s: %s %v", p.Spec.NodeName, out, err)
		}
		if _, err := first.KubectlErr("logs", p.Name); err != nil {
			t.Errorf("kubectl logs on %s: %v", p.Spec.NodeName, err)
		}
	}
	for i, n := range agents {
		upgrade(t, n)
		wantVersions(t, first, 4+i, kubernetesOf(t, first))
	}
	cancel()
	writing.Wait()
	answers.none(t, 1000)
	for _, n := range servers {
		book.check(t, n)
	}
	t.Log(book.summary())
	if after := podsOf(t, first, "echo"); after != pods {
		t.Errorf("the upgrade has changed the pods: %s, want %s", after, pods)
	}
	if out, code := first.Status(t); code != 0 || strings.Contains(out, "minor older") {
		t.Errorf("after the upgrade polymesh status ends with %d:\n%s", code, out)
	}
}
