//go:build e2e

package e2e

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// Without a way out, a name server and images, everything that ships comes up, and containerd pulls nothing.
func TestAirGap(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{FirstStart: true, NoDefaultRoute: true, NoNameserver: true, Args: []string{"--mesh-profile", "demo"}})
	if _, err := os.Stat(n.DataDir()); err == nil {
		t.Fatal("the data dir is there before the first start, perhaps with images")
	}
	if c, err := n.Dial(t.Context(), "tcp", net.JoinHostPort("192.0.2.1", "443")); err == nil {
		c.Close()
		t.Fatal("the node has a way out")
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	names, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(n.PID()), "root", "etc", "resolv.conf"))
	if err != nil || strings.Contains(string(names), "nameserver") {
		t.Fatalf("the server's resolv.conf contains %q (%v), want no name server", names, err)
	}
	client := n.Client(t)
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, p := range pods.Items {
			if why := node.NotReady(&p); why != "" && p.Status.Phase != corev1.PodSucceeded {
				return false, why
			}
		}
		return len(pods.Items) >= 6, "there are too few pods"
	})

	log := n.Layout().Agent("containerd", "containerd.log")
	pulls := func() (found []string) {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, "PullImage") {
				found = append(found, line)
			}
		}
		return found
	}
	if found := pulls(); len(found) > 0 {
		t.Errorf("containerd tried to pull:\n%s", strings.Join(found, ""))
	}
	events, err := client.CoreV1().Events(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{FieldSelector: "reason=Pulling"})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		t.Errorf("%s %s/%s: %s", e.InvolvedObject.Kind, e.InvolvedObject.Namespace, e.InvolvedObject.Name, e.Message)
	}

	// An image that is not there, to see that a pull would have been seen.
	n.Kubectl(t, "run", "absent", "--image=registry.example.com/absent:1", "--restart=Never")
	n.Eventually(t, time.Minute, func() (bool, string) {
		return strings.Contains(strings.Join(pulls(), ""), "registry.example.com/absent:1"), "containerd's log shows no pull of an image that is not there"
	})
	if err := client.CoreV1().Pods(metav1.NamespaceDefault).Delete(context.WithoutCancel(t.Context()), "absent", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}
