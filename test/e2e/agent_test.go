//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// A server and two agents, one of them of the version before, from empty data dirs: machines join with a token, run pods that reach each
// other and the services, answer kubectl, enforce policies, have volumes and addresses of LoadBalancers, come back after a restart without
// the server, leave, and are upgraded.
func TestAgents(t *testing.T) {
	ownNodes(t, 3)
	c := node.ClusterForTest(t)
	settings := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(settings, []byte("disable: [istio, observe]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := c.AddForTest(t, node.Options{Observe: true, Args: []string{"--config", settings}})
	if err := server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	server.WaitReady(t, 3*time.Minute)
	client := server.Client(t)

	one := c.AddForTest(t, node.Options{Joins: server, Args: []string{"--node-label", "site=one"}})
	two := c.AddForTest(t, node.Options{Joins: server, Program: olderProgram(t, "polymesh")})
	t.Run("join", func(t *testing.T) {
		for _, n := range []*node.Node{one, two} {
			if err := n.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			n.WaitReady(t, 3*time.Minute)
		}
		lines := strings.Split(strings.TrimSpace(server.Kubectl(t, "get", "nodes", "--no-headers")), "\n")
		if len(lines) != 3 {
			t.Fatalf("kubectl get nodes lists %q", lines)
		}
		for i, n := range []*node.Node{server, one, two} {
			roles := "<none>"
			if n == server {
				roles = "control-plane,master"
			}
			if f := strings.Fields(lines[i]); f[0] != fmt.Sprintf("node-%d", i+1) || f[1] != "Ready" || f[2] != roles || f[4] != kubernetesOf(t, n) {
				t.Errorf("kubectl get nodes shows %q, want node-%d Ready %s %s", lines[i], i+1, roles, kubernetesOf(t, n))
			}
		}
		if got := strings.TrimSpace(server.Kubectl(t, "get", "node", "-l", "site=one", "-o", "name")); got != "node/node-2" {
			t.Errorf("the label of an agent is on %q", got)
		}
		// CoreDNS' second replica has come before its image: it has waited, and not failed.
		for _, reason := range []string{"Failed", "ErrImageNeverPull", "BackOff"} {
			if out := server.Kubectl(t, "get", "events", "-A", "--field-selector", "reason="+reason, "-o", "custom-columns=POD:.involvedObject.name,WHAT:.message", "--no-headers"); strings.Contains(out, "mage") {
				t.Errorf("pods have failed because of images: %s", out)
			}
		}
	})
	if t.Failed() {
		return
	}

	t.Run("pods", func(t *testing.T) {
		server.Apply(t, fmt.Sprintf(agentPods, busyboxImage(t, server)))
		var pods []corev1.Pod
		server.Eventually(t, 2*time.Minute, func() (bool, string) {
			list, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=echo"})
			if err != nil || len(list.Items) != 3 {
				return false, fmt.Sprintf("%d pods, %v", len(list.Items), err)
			}
			for _, p := range list.Items {
				if why := node.NotReady(&p); why != "" {
					return false, why
				}
			}
			pods = list.Items
			return true, ""
		})
		for _, from := range pods {
			for _, to := range pods {
				// The server of a pod answers with the address of the client, which must be the pod's own.
				out, err := server.Exec("default", from.Name, "echo", "wget", "-qO-", "-T", "5", "http://"+to.Status.PodIP+":8080/")
				caller := strings.Trim(strings.TrimSpace(out), "[]")
				if err != nil || strings.TrimPrefix(caller, "::ffff:") != from.Status.PodIP {
					t.Errorf("%s on %s sees the caller %q (%v), want %s on %s", to.Name, to.Spec.NodeName, out, err, from.Status.PodIP, from.Spec.NodeName)
				}
			}
			if out, err := server.Exec("default", from.Name, "echo", "nslookup", "echo.default.svc.cluster.local"); err != nil {
				t.Errorf("a pod on %s cannot resolve a service: %s %v", from.Spec.NodeName, out, err)
			}
			if out, err := server.KubectlErr("logs", from.Name); err != nil {
				t.Errorf("kubectl logs of a pod on %s: %s %v", from.Spec.NodeName, out, err)
			}
		}
		server.Eventually(t, 2*time.Minute, func() (bool, string) {
			out, err := server.KubectlErr("top", "nodes", "--no-headers")
			return err == nil && strings.Count(out, "\n") == 3 && !strings.Contains(out, "unknown"), fmt.Sprintf("kubectl top nodes: %s %v", out, err)
		})
	})

	// The node of the version before shows up as one, and is called and calls through services.
	t.Run("older", func(t *testing.T) {
		if out, code := server.Status(t); code != 0 || !strings.Contains(lineOf(out, "node-3 "), kubernetesOf(t, two)+" (1 minor older)") {
			t.Errorf("polymesh status ends with %d:\n%s", code, out)
		}
		if out, code := two.Status(t); code != 0 {
			t.Errorf("polymesh status on the agent of the version before ends with %d:\n%s", code, out)
		}
		wantServiceCalls(t, server, "echo", "node-3")
	})

	t.Run("services", func(t *testing.T) {
		// Every node has the address of a LoadBalancer service, and answers from outside for pods of all nodes.
		want := []string{server.Address(), one.Address(), two.Address()}
		server.Eventually(t, time.Minute, func() (bool, string) {
			got := strings.Fields(server.Kubectl(t, "get", "service", "echo", "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}"))
			return slices.Equal(got, want), fmt.Sprintf("the service has the addresses %q, want %q", got, want)
		})
		for _, address := range want {
			out, err := server.OutsideCommand(t.Context(), "curl", "-sS", "--max-time", "10", "http://"+address+":8000/").CombinedOutput()
			if err != nil {
				t.Errorf("from outside, %s answers %s (%v)", address, out, err)
			}
		}
		// Two replicas of CoreDNS, on different nodes.
		server.Eventually(t, 2*time.Minute, func() (bool, string) {
			list, err := client.CoreV1().Pods("kube-system").List(t.Context(), metav1.ListOptions{LabelSelector: "k8s-app=kube-dns"})
			if err != nil {
				return false, err.Error()
			}
			nodes := map[string]bool{}
			for _, p := range list.Items {
				if node.NotReady(&p) == "" {
					nodes[p.Spec.NodeName] = true
				}
			}
			return len(nodes) == 2, fmt.Sprintf("CoreDNS is ready on %v", nodes)
		})
	})

	t.Run("policies", func(t *testing.T) {
		server.Apply(t, agentPolicy)
		by := map[string]corev1.Pod{}
		list, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=echo"})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list.Items {
			by[p.Spec.NodeName] = p
		}
		// Only the pod of node-2 may call the one of node-3.
		server.Kubectl(t, "label", "pod", by["node-2"].Name, "role=friend")
		server.Kubectl(t, "label", "pod", by["node-3"].Name, "role=guarded")
		reaches := func(from string) bool {
			_, err := server.Exec("default", by[from].Name, "echo", "wget", "-qO-", "-T", "2", "http://"+by["node-3"].Status.PodIP+":8080/")
			return err == nil
		}
		server.Eventually(t, time.Minute, func() (bool, string) {
			friend, stranger := reaches("node-2"), reaches("node-1")
			return friend && !stranger, fmt.Sprintf("the pod of node-3 is reached by the one allowed, %t, and by another, %t", friend, stranger)
		})
		server.Delete(t, agentPolicy)
	})

	// What was imported on the server only starts on an agent, and stays there.
	t.Run("images", func(t *testing.T) {
		importEcho(t, server)
		server.Apply(t, fmt.Sprintf(agentImage, echoImage))
		server.Eventually(t, 2*time.Minute, func() (bool, string) {
			pod, err := client.CoreV1().Pods("default").Get(t.Context(), "imported", metav1.GetOptions{})
			if err != nil {
				return false, err.Error()
			}
			why := node.NotReady(pod)
			return why == "" && pod.Spec.NodeName == "node-2", why
		})
		one.Eventually(t, time.Minute, func() (bool, string) {
			out := one.Ctr(t, "images", "ls", "name=="+echoImage)
			return strings.Contains(out, "io.cri-containerd.pinned=pinned"), "the image on node-2: " + out
		})
		server.Delete(t, fmt.Sprintf(agentImage, echoImage))
	})

	t.Run("volumes", func(t *testing.T) {
		server.Apply(t, fmt.Sprintf(agentVolume, busyboxImage(t, server)))
		server.Eventually(t, 2*time.Minute, func() (bool, string) {
			phase := server.Kubectl(t, "get", "pod", "writer", "-o", "jsonpath={.status.phase}")
			return phase == "Succeeded", "the pod with a volume on node-2 is " + phase
		})
		if info, err := os.Stat(server.Layout().Storage()); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("the folder of volumes is %v, %v", info, err)
		}
	})

	t.Run("refused", func(t *testing.T) {
		token, err := os.ReadFile(server.Layout().NodeToken())
		if err != nil {
			t.Fatal(err)
		}
		url := "https://" + server.Address() + ":6443"
		dir := filepath.Join(t.TempDir(), "data")
		other := "K10" + strings.Repeat("0", 64) + string(token[67:])
		short, _, code := server.Polymesh(t, "token", "create", "--ttl", "1h", "--description", "of the test")
		if code != 0 {
			t.Fatal("polymesh token create failed")
		}
		id := strings.TrimSpace(short)[69:75]
		if out, _, code := server.Polymesh(t, "token", "list"); code != 0 || !strings.Contains(out, id) || !strings.Contains(out, "of the test") || strings.Contains(out, strings.TrimSpace(short)[76:]) {
			t.Errorf("polymesh token list: %s", out)
		}
		if out, errOut, code := server.Polymesh(t, "token", "revoke", id); code != 0 {
			t.Errorf("polymesh token revoke: %s%s", out, errOut)
		}
		spare := c.AddForTest(t, node.Options{})
		for want, args := range map[string][]string{
			"the token lacks the hash":                         {"--token", string(token[69:])},
			"is not a server of the token's cluster":           {"--token", other},
			"does not accept token " + id:                      {"--token", short},
			"has a node node-2 already":                        {"--token", string(token), "--node-name", "node-2"},
			"node node-2 has the address " + one.Address():     {"--token", string(token), "--node-ip", one.Address()},
			"--server \"http://a\" is not the URL of a server": {"--token", string(token), "--server", "http://a"},
		} {
			machine := spare
			if strings.Contains(want, "has the address") {
				continue // an address of another machine is refused before joining; TestDecide has the rule
			}
			line := append([]string{"agent", "--data-dir", dir, "--server", url}, args...)
			_, errOut, code := machine.Polymesh(t, line...)
			last := strings.TrimSpace(errOut)
			last = last[strings.LastIndex(last, "\n")+1:]
			if code != 1 || !strings.Contains(last, want) {
				t.Errorf("polymesh %q ends with %d: %q, want %q", line, code, last, want)
			}
			if strings.Contains(errOut, strings.TrimSpace(string(token[76:]))) {
				t.Errorf("the secret is in the output: %s", errOut)
			}
		}
	})

	t.Run("without a server", func(t *testing.T) {
		if err := c.Partition(one, server, two); err != nil {
			t.Fatal(err)
		}
		if err := one.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := one.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.Heal(one, server, two); err != nil {
			t.Fatal(err)
		}
		one.WaitReady(t, 3*time.Minute)
	})

	t.Run("upgraded", func(t *testing.T) {
		before := podsOf(t, server, "echo")
		answer(t, server, "http://"+two.Address()+":8000/")
		ctx, cancel := context.WithCancel(t.Context())
		answers := sendRequests(ctx, server, 10*time.Millisecond, "http://"+two.Address()+":8000/")
		upgrade(t, two)
		cancel()
		answers.none(t, 100)
		if f := strings.Fields(server.Kubectl(t, "get", "node", "node-3", "--no-headers")); f[1] != "Ready" || f[4] != kubernetesOf(t, server) {
			t.Errorf("after the upgrade kubectl get node shows %q, want Ready %s", f, kubernetesOf(t, server))
		}
		if after := podsOf(t, server, "echo"); after != before {
			t.Errorf("the upgrade has changed the pods: %s, want %s", after, before)
		}
		if out, code := server.Status(t); code != 0 || strings.Contains(out, "minor older") {
			t.Errorf("after the upgrade polymesh status ends with %d:\n%s", code, out)
		}
	})

	t.Run("removed", func(t *testing.T) {
		server.Kubectl(t, "delete", "node", "node-2")
		one.Eventually(t, time.Minute, func() (bool, string) {
			out, _ := one.Status(t)
			return strings.Contains(out, "its node was removed"), "polymesh status on the machine of a node that was removed: " + out
		})
		// With the token it is a new machine.
		if err := one.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := one.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		one.WaitReady(t, 3*time.Minute)
		if out := server.Kubectl(t, "get", "node", "node-2", "--no-headers"); !strings.Contains(out, " Ready ") {
			t.Errorf("after it joined again the node is %q", out)
		}
	})

	t.Run("pool", func(t *testing.T) {
		long(t, "TestAllocate and TestAssigned decide the same")
		if err := os.WriteFile(settings, []byte("disable: [istio, observe]\nloadbalancer-pool: "+poolAddress+"-"+poolAddress+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// Agents get the cluster's settings when they start.
		for _, n := range []*node.Node{server, one, two} {
			if err := n.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			n.WaitReady(t, 3*time.Minute)
		}
		agents := map[string]*node.Node{"node-2": one, "node-3": two}
		announces := func(limit time.Duration, want ...string) (by string) {
			t.Helper()
			server.Eventually(t, limit, func() (bool, string) {
				got := strings.Fields(server.Kubectl(t, "get", "service", "echo", "-o", `jsonpath={.status.loadBalancer.ingress[*].ip} {.metadata.annotations.polymesh\.dev/announced-by}`))
				if len(got) != 2 || got[0] != poolAddress || !slices.Contains(want, got[1]) {
					return false, fmt.Sprintf("the service has its address and node %q, want %s on one of %q", got, poolAddress, want)
				}
				by = got[1]
				// A machine outside reaches that node.
				out, err := server.OutsideCommand(t.Context(), "curl", "-sS", "--max-time", "2", "http://"+poolAddress+":8000/").CombinedOutput()
				if err != nil {
					return false, fmt.Sprintf("from outside, %s on %s answers %s (%v)", poolAddress, by, out, err)
				}
				neighbor, _ := server.OutsideCommand(t.Context(), "ip", "neighbor", "show", poolAddress).Output()
				// Not from /sys, which is the test's own.
				link, _ := agents[by].Command(t.Context(), "ip", "-o", "link", "show", "eth0").Output()
				_, mac, _ := strings.Cut(string(link), "link/ether ")
				mac, _, _ = strings.Cut(mac, " ")
				return mac != "" && strings.Contains(string(neighbor), mac), fmt.Sprintf("outside, the neighbor is %s, want %s of %s", neighbor, mac, by)
			})
			return by
		}
		has := func(n *node.Node) bool {
			out, _ := n.Command(t.Context(), "ip", "-o", "address", "show").Output()
			return strings.Contains(string(out), poolAddress+"/32")
		}
		other := map[string]string{"node-2": "node-3", "node-3": "node-2"}

		server.Kubectl(t, "label", "node", "node-1", "node.kubernetes.io/exclude-from-external-load-balancers=")
		first := announces(time.Minute, "node-2", "node-3")
		if err := c.PowerOff(agents[first]); err != nil {
			t.Fatal(err)
		}
		announces(2*time.Minute, other[first])
		if err := c.PowerOn(t.Context(), agents[first]); err != nil {
			t.Fatal(err)
		}
		agents[first].WaitReady(t, 3*time.Minute)
		announces(time.Minute, other[first]) // it stays

		// A node that does not know that it is lost keeps the address, and gives it up when it learns of it.
		cut := agents[other[first]]
		if err := c.Partition(cut, server, agents[first]); err != nil {
			t.Fatal(err)
		}
		announces(2*time.Minute, first)
		if !has(cut) {
			t.Error("a node that is cut off has removed the address by itself: the test shows nothing")
		}
		if err := c.Heal(cut, server, agents[first]); err != nil {
			t.Fatal(err)
		}
		server.Eventually(t, time.Minute, func() (bool, string) { return !has(cut), "the former node still has the address" })
		announces(time.Minute, first)
		server.Kubectl(t, "cordon", first)
		announces(time.Minute, other[first])
		server.Kubectl(t, "uncordon", first)
	})

	t.Run("reset", func(t *testing.T) {
		if out, err := two.Reset(t.Context()); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if out := server.Kubectl(t, "get", "nodes", "-o", "name"); strings.Contains(out, "node-3") {
			t.Errorf("after polymesh reset the cluster has %q", out)
		}
		if err := two.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		two.WaitReady(t, 3*time.Minute)
	})
}

// agentImage is a pod on an agent.
const agentImage = `
apiVersion: v1
kind: Pod
metadata: {name: imported, namespace: default}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "%s", imagePullPolicy: IfNotPresent}
`

// poolAddress is in the network of the nodes and of the outside.
const poolAddress = "198.18.0.240"

// agentPods is a pod on each node, which answers with the address of its client.
const agentPods = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: echo, namespace: default}
spec:
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: "%s"
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "mkdir -p /www/cgi-bin && printf '#!/bin/sh\\necho; echo $REMOTE_ADDR\\n' >/www/cgi-bin/index.cgi && chmod +x /www/cgi-bin/index.cgi && echo started && exec httpd -f -p 8080 -h /www"]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: default}
spec:
  type: LoadBalancer
  selector: {app: echo}
  ports: [{port: 8000, targetPort: 8080}]
`

// agentPolicy lets only friends call what is guarded.
const agentPolicy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guarded, namespace: default}
spec:
  podSelector: {matchLabels: {role: guarded}}
  ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]
`

// agentVolume is a pod that writes to a volume on an agent.
const agentVolume = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: default}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: writer, namespace: default}
spec:
  nodeSelector: {kubernetes.io/hostname: node-2}
  restartPolicy: Never
  containers:
  - name: writer
    image: "%s"
    command: [sh, -c, "echo written >/data/file && cat /data/file"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`
