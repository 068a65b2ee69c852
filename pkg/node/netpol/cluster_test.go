//go:build integration

package netpol

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// The whole component, with the identity of a node, a real API server and the kernel.
func TestComponent(t *testing.T) {
	if !private(t) {
		return
	}
	up(t, "lo")
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	kubeconfig := controlplanetest.Start(t, log)
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	admin := kubernetes.NewForConfigOrDie(config)
	ctx := t.Context()
	// The name in the kubelet's certificate.
	const node, network = "none", "test-pods"
	_, err = admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{})
	must(t, err)
	records := filepath.Join(t.TempDir(), "results")
	start := func(disabled bool) *Component {
		c := New(Options{Node: node, Kubeconfig: filepath.Join(filepath.Dir(kubeconfig), "kubelet.kubeconfig"), Network: network, Disabled: disabled, Log: log})
		c.records, c.interval = records, 50*time.Millisecond
		must(t, c.Init(ctx))
		must(t, c.Start(ctx))
		eventually(t, "the component is ready", func() bool { return c.Ready(ctx) == nil })
		return c
	}
	stop := func(c *Component) { t.Helper(); must(t, c.Stop(context.WithoutCancel(ctx))) }
	c := start(false)
	if text := list(t); text != "" || c.Summary() != "" || len(c.Notes(ctx)) > 0 || c.sources.pods.LastSyncResourceVersion() != "" {
		t.Errorf("without a policy there are rules, pods are read, or it shows: %q %q %s", c.Summary(), c.Notes(ctx), text)
	}

	pod := func(name string, address string) *corev1.Pod {
		t.Helper()
		var made *corev1.Pod
		eventually(t, "the pod can be created", func() bool {
			var err error
			made, err = admin.CoreV1().Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
				Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "none", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}}}}}}, metav1.CreateOptions{})
			if err != nil && !apierrors.IsForbidden(err) { // until the service account is there
				t.Fatal(err)
			}
			return err == nil
		})
		if address != "" {
			made.Status.Phase, made.Status.PodIP, made.Status.PodIPs = corev1.PodRunning, address, []corev1.PodIP{{IP: address}}
			made, err = admin.CoreV1().Pods("default").UpdateStatus(ctx, made, metav1.UpdateOptions{})
			must(t, err)
		}
		return made
	}
	attach := func(pod *corev1.Pod, address string) {
		t.Helper()
		text, err := json.Marshal(map[string]any{
			"kind": "cniCacheV1", "containerId": pod.Name, "ifName": "eth0", "networkName": network, "netns": "/proc/self/ns/net",
			"cniArgs": [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", pod.Namespace}, {"K8S_POD_NAME", pod.Name}, {"K8S_POD_UID", string(pod.UID)}},
			"result":  map[string]any{"cniVersion": "1.0.0", "ips": []map[string]any{{"address": address + "/24", "gateway": "10.42.0.1"}}},
		})
		must(t, err)
		must(t, os.WriteFile(filepath.Join(records, network+"-"+pod.Name+"-eth0"), text, 0o600))
	}
	elements := func(name string) string {
		t.Helper()
		all, err := realKernel(t).nft.ListElements(ctx, "set", name)
		if err != nil {
			return err.Error()
		}
		var keys []string
		for _, e := range all {
			keys = append(keys, strings.Join(e.Key, " "))
		}
		return strings.Join(keys, ",")
	}
	first := pod("first", "10.42.0.2")
	deny := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "deny"}, Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "first"}}}}
	policies := admin.NetworkingV1().NetworkPolicies("default")
	_, err = policies.Create(ctx, deny, metav1.CreateOptions{})
	must(t, err)
	eventually(t, "the policy is in force", func() bool { return c.Summary() == "1 NetworkPolicy is enforced, for 1 pod of this node" })
	if got := elements(knownSet); got != "10.42.0.2" {
		t.Errorf("known are %s", got)
	}

	// A new pod is known when it is attached, before its status has the address.
	second := pod("second", "")
	begin := time.Now()
	attach(second, "10.42.0.3")
	eventually(t, "the attached pod is known", func() bool { return strings.Contains(elements(knownSet), "10.42.0.3") })
	t.Logf("an attached pod is known after %s, the time to list the rules included", time.Since(begin).Round(time.Millisecond))
	// The reset of another data dir removes the folder when it is empty.
	must(t, os.RemoveAll(records))
	eventually(t, "the folder of the records is there", func() bool { _, err := os.Stat(records); return err == nil })
	eventually(t, "a pod that is not attached is not known", func() bool { return elements(knownSet) == "10.42.0.2" })
	eventually(t, "the attached pod is known again", func() bool { attach(second, "10.42.0.3"); return strings.Contains(elements(knownSet), "10.42.0.3") })
	// Of a pod that does not exist, the address stays unknown.
	attach(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "second-old", UID: "x"}}, "10.42.0.9")
	// A pod that has ended keeps its address in the API, where another has it.
	first.Status.Phase = corev1.PodSucceeded
	_, err = admin.CoreV1().Pods("default").UpdateStatus(ctx, first, metav1.UpdateOptions{})
	must(t, err)
	eventually(t, "a pod that has ended is not isolated", func() bool { return c.Summary() == "1 NetworkPolicy is enforced, for 0 pods of this node" })
	third := pod("third", "10.42.0.2")
	attach(third, "10.42.0.2")
	eventually(t, "its address is another pod's", func() bool { return elements(knownSet) == "10.42.0.2,10.42.0.3" })

	// Rules that another program removes come back.
	before := list(t)
	if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, "the rules are back", func() bool { return list(t) == before })
	if notes := c.Notes(ctx); len(notes) != 1 || !strings.Contains(notes[0], "put back what another program had removed: the rules of NetworkPolicies") {
		t.Errorf("the notes are %q", notes)
	}

	// They outlive the process. Another one, with policies that have changed meanwhile, continues from there.
	stop(c)
	if list(t) != before {
		t.Errorf("after the process the rules are:\n%s", list(t))
	}
	deny.Spec.PodSelector = metav1.LabelSelector{}
	_, err = policies.Update(ctx, deny, metav1.UpdateOptions{})
	must(t, err)
	c = start(false)
	eventually(t, "the changed policy is in force", func() bool { return c.Summary() == "1 NetworkPolicy is enforced, for 2 pods of this node" })
	must(t, policies.Delete(ctx, "deny", metav1.DeleteOptions{}))
	eventually(t, "without policies there are no rules", func() bool { return list(t) == "" })
	_, err = policies.Create(ctx, deny, metav1.CreateOptions{})
	must(t, err)
	eventually(t, "a new policy is in force", func() bool { return strings.Contains(list(t), "policy-in-") })
	stop(c)

	// A kernel without nftables' newer parts.
	old := New(Options{Node: node, Kubeconfig: filepath.Join(filepath.Dir(kubeconfig), "kubelet.kubeconfig"), Log: log})
	old.records, old.supported = records, false
	must(t, old.Start(ctx))
	eventually(t, "it is ready", func() bool { return old.Ready(ctx) == nil })
	if got := old.Notes(ctx); !slices.Equal(got, []string{"1 NetworkPolicy is stored and not enforced, which needs Linux 5.13"}) {
		t.Errorf("on an old kernel the note is %q", got)
	}
	stop(old)

	c = start(true)
	if text := list(t); text != "" || c.Summary() != "disabled" {
		t.Errorf("disabled: %q, and rules are left: %s", c.Summary(), text)
	}
	stop(c)
}
