//go:build integration

package noderole

import (
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// The server's node gets its roles when it registers, and again if they are removed; other nodes get none.
func TestRoles(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	kubeconfig := controlplanetest.Start(t, log)
	client := controlplanetest.Client(t, kubeconfig).CoreV1().Nodes()
	c := New(Options{Node: "one", Kubeconfig: kubeconfig, Log: log})
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Stop(t.Context()) })
	if err := c.Ready(t.Context()); err == nil {
		t.Error("it is ready before there is a node")
	}
	for _, name := range []string{"two", "one"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if name == "one" {
			node.Labels = map[string]string{Roles()[1]: "theirs"}
		}
		if _, err := client.Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	labelled := func() {
		t.Helper()
		controlplanetest.Eventually(t, "the node has its roles", func() error {
			node, err := client.Get(t.Context(), "one", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if want := map[string]string{Roles()[0]: "true", Roles()[1]: "theirs"}; !maps.Equal(node.Labels, want) {
				return errors.New("not yet")
			}
			return c.Ready(t.Context())
		})
	}
	labelled()
	without, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{Roles()[0]: nil}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Patch(t.Context(), "one", types.MergePatchType, without, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	labelled()
	if node, err := client.Get(t.Context(), "two", metav1.GetOptions{}); err != nil || len(node.Labels) > 0 {
		t.Errorf("another node has %v (%v)", node.Labels, err)
	}
}
