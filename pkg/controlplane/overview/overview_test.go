//go:build integration

package overview

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd/etcdtest"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/status"
)

// What one server sees of three, and what it says when the other two are away and no API server answers.
func TestCluster(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	kubeconfig := controlplanetest.Start(t, log)
	client := controlplanetest.Client(t, kubeconfig)
	for _, name := range []string{"a", "b"} {
		if _, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	servers := etcdtest.Cluster(t, log, "a", "b", "c")
	a := servers[0]
	dir := layout.DataDir(t.TempDir())
	o := Options{
		Node: "a", Version: controlplanetest.KubernetesVersion, Kubeconfig: kubeconfig, Certificates: a.Certificates(), Datastore: a.Etcd,
		Snapshots: snapshot.New(snapshot.Options{DataDir: dir, Dir: snapshot.DefaultDir(dir)}), SnapshotFailure: func() error { return nil },
	}
	// Each part has two seconds to answer, which one may exceed on a busy machine.
	controlplanetest.Eventually(t, "all is well", func() error {
		c := New(o).Cluster(t.Context())
		if c.Problem != "" || len(c.Nodes) != 2 || len(c.Datastore.Members) != 3 || c.Datastore.Size == 0 || c.Datastore.Revision == 0 || c.Snapshot != nil {
			return fmt.Errorf("%+v", c)
		}
		// There is no Lease in this control plane, which has one server.
		if len(c.Unknown) != 1 || !strings.Contains(c.Unknown[0], "leaders: ") {
			return fmt.Errorf("unknown is %q", c.Unknown)
		}
		for _, node := range []string{"a", "", "b", "c"} {
			if !slices.ContainsFunc(c.Certificates, func(e status.Certificate) bool { return e.Node == node && e.Expires.After(time.Now()) }) {
				return fmt.Errorf("no certificate of %q: %+v", node, c.Certificates)
			}
		}
		return nil
	})
	servers[1].Halt(t)
	servers[2].Halt(t)
	o.Kubeconfig = "/nonexistent"
	controlplanetest.Eventually(t, "it has no majority", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		c := New(o).Cluster(ctx)
		if !strings.Contains(c.Problem, "2 of 3 servers are away since ") || !strings.Contains(c.Problem, "b (") || !c.Several() {
			return errors.New(c.Problem)
		}
		if !slices.ContainsFunc(c.Unknown, func(line string) bool {
			return strings.Contains(line, "nodes: this server has not started its API server yet")
		}) {
			t.Errorf("unknown is %q", c.Unknown)
		}
		return nil
	})
}
