//go:build integration

package external_test

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/noderole"
	"polymesh.dev/polymesh/pkg/node/external"
)

// A node announces its address with its own identity, and a server then removes the taint with which it has registered, which the node cannot.
func TestCluster(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	kubeconfig := controlplanetest.Start(t, log)
	nodes := controlplanetest.Client(t, kubeconfig).CoreV1().Nodes()
	file, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, user := range file.AuthInfos {
		user.Impersonate, user.ImpersonateGroups = "system:node:node", []string{"system:nodes", "system:authenticated"}
	}
	own := t.TempDir() + "/kubeconfig"
	if err := clientcmd.WriteToFile(*file, own); err != nil {
		t.Fatal(err)
	}
	server := noderole.New(noderole.Options{Node: "server", Kubeconfig: kubeconfig, Log: log})
	a := external.New(external.Options{Node: "node", IP: netip.MustParseAddr("192.0.2.1"), External: netip.MustParseAddr("203.0.113.1"), Kubeconfig: own, Log: log})
	for _, c := range []component.Component{server, a} {
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Stop(t.Context()) })
	}

	internal, host := corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, corev1.NodeAddress{Type: corev1.NodeHostName, Address: "node"}
	registered := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{internal, host}}}
	registered.Spec.Taints = []corev1.Taint{{Key: "node.cloudprovider.kubernetes.io/uninitialized", Value: "true", Effect: corev1.TaintEffectNoSchedule}}
	if _, err := nodes.Create(t.Context(), registered, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	want := []corev1.NodeAddress{internal, {Type: corev1.NodeExternalIP, Address: "203.0.113.1"}, host}
	controlplanetest.Eventually(t, "the address is announced, and the taint removed", func() error {
		n, err := nodes.Get(t.Context(), "node", metav1.GetOptions{})
		if err != nil {
			return err
		}
		waits := slices.ContainsFunc(n.Spec.Taints, func(taint corev1.Taint) bool { return taint.Key == registered.Spec.Taints[0].Key })
		if !slices.Equal(n.Status.Addresses, want) || waits {
			return errors.New("not yet")
		}
		return a.Ready(t.Context())
	})

	config, err := clientcmd.BuildConfigFromFlags("", own)
	if err != nil {
		t.Fatal(err)
	}
	self, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	n, err := nodes.Get(t.Context(), "node", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Spec.Taints = []corev1.Taint{{Key: "other", Effect: corev1.TaintEffectNoSchedule}}
	if _, err := self.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err == nil {
		t.Error("a node changes its own taints")
	}
}
