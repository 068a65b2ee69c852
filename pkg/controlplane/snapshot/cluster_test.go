//go:build integration

package snapshot

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	coordinationv1 "k8s.io/api/coordination/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/porttest"
)

// TestServer is not a test: each server of the others is this test binary, because a process can have one control plane.
func TestServer(t *testing.T) { controlplanetest.ServeProcess(t) }

// A cluster is saved while clients write to it, runs on, and is restored on another data dir with another node name. Clients that ran
// all the time see the restored state, although they know later revisions.
func TestRestoredCluster(t *testing.T) {
	t.Parallel()
	t.Run("SQLite", func(t *testing.T) { testRestoredCluster(t) })
	t.Run("etcd", func(t *testing.T) { testRestoredCluster(t, "--cluster-init") })
}

func testRestoredCluster(t *testing.T, args ...string) {
	t.Parallel()
	port := fmt.Sprint(porttest.Loopback(t).Port())
	old, fresh := newMachine(t, "old"), newMachine(t, "new")
	run := func(dir layout.DataDir) (*kubernetes.Clientset, string, func()) {
		t.Helper()
		kubeconfig, stop := controlplanetest.StartProcess(t, append([]string{"--data-dir", string(dir), "--https-listen-port", port, "--secrets-encryption"}, args...)...)
		return controlplanetest.Client(t, kubeconfig), kubeconfig, stop
	}
	ctx := t.Context()
	client, kubeconfig, stop := run(old.dir)
	old.o.Images = imagesInUse(kubeconfig)
	if len(args) > 0 {
		endpoint, err := datastore.ReadEndpoint(old.dir.DatastoreEndpoint())
		if err != nil {
			t.Fatal(err)
		}
		old.o.Datastore = etcd.New(etcd.Options{
			Dir: old.dir.Etcd(), Certificates: certificate.Store(old.dir.TLS()), Client: netip.MustParseAddrPort(strings.TrimPrefix(endpoint.Servers, "https://")), Log: slog.Default(),
		})
	}
	configMap := func(name, value string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"test": "snapshot"}}, Data: map[string]string{"value": value}}
	}
	maps := client.CoreV1().ConfigMaps("default")
	for _, name := range []string{"kept", "changed", "deleted"} {
		if _, err := maps.Create(ctx, configMap(name, "before"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "sealed"}, StringData: map[string]string{"password": "hunter2"}}
	if _, err := client.CoreV1().Secrets("default").Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// A node with a pod, as the machine that is lost leaves them.
	for _, name := range []string{"old", "other"} {
		if _, err := client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: coordinationv1.LeaseSpec{RenewTime: &metav1.MicroTime{Time: time.Now()}}}
		if _, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Create(ctx, lease, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "pod"}, Spec: corev1.PodSpec{NodeName: "old", Containers: []corev1.Container{{Name: "a", Image: "registry.example.com/a:1"}}}}
	controlplanetest.Eventually(t, "create a pod", func() error { // its service account comes first
		_, err := client.CoreV1().Pods("default").Create(ctx, pod, metav1.CreateOptions{})
		return err
	})

	// An informer of the administrator's, on another machine.
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace("default"), informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = "test=snapshot" }))
	informer := factory.Core().V1().ConfigMaps().Informer()
	watching, end := context.WithCancel(ctx)
	defer end()
	factory.StartWithContext(watching)
	if !cache.WaitForCacheSync(watching.Done(), informer.HasSynced) {
		t.Fatal("the informer does not start")
	}
	seen := func() string {
		text := ""
		for _, name := range []string{"kept", "changed", "deleted", "later"} {
			if o, ok, _ := informer.GetStore().GetByKey("default/" + name); ok {
				text += name + "=" + o.(*corev1.ConfigMap).Data["value"] + " "
			}
		}
		return text
	}

	// Writes that are acknowledged before the snapshot is requested are in it.
	var acknowledged []string
	var mu sync.Mutex
	writing, endWrites := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			for i := 0; writing.Err() == nil; i++ {
				name := fmt.Sprintf("write-%d-%d", w, i)
				if _, err := client.CoreV1().ConfigMaps("kube-public").Create(ctx, configMap(name, "x"), metav1.CreateOptions{}); err != nil {
					t.Errorf("write %s: %v", name, err)
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, name)
				mu.Unlock()
			}
		})
	}
	controlplanetest.Eventually(t, "writes", func() error {
		mu.Lock()
		defer mu.Unlock()
		if len(acknowledged) < 30 {
			return fmt.Errorf("%d writes", len(acknowledged))
		}
		return nil
	})
	mu.Lock()
	before := len(acknowledged)
	want := acknowledged[:before:before]
	mu.Unlock()
	info := old.save(t, "on-demand")
	endWrites()
	writers.Wait()

	// The life after the snapshot: also with another key, which the snapshot does not have.
	endpoint, err := datastore.ReadEndpoint(old.dir.DatastoreEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	secrets := encryption.Cluster{
		Place:      encryption.Place{File: old.dir.EncryptionFile(), Datastore: endpoint, BootstrapKey: old.dir.BootstrapKey(), Reload: controlplanetest.KeyReload},
		Kubeconfig: kubeconfig,
	}
	if err := secrets.Rotate(ctx, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Update(ctx, configMap("changed", "after"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := maps.Delete(ctx, "deleted", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	later, err := maps.Create(ctx, configMap("later", "after"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the informer", func() error {
		if got := seen(); got != "kept=before changed=after later=after " {
			return fmt.Errorf("it sees %q", got)
		}
		return nil
	})
	known := informer.LastSyncResourceVersion()
	stop()

	r, err := fresh.Restore(ctx, info.Path)
	if err != nil {
		t.Fatal(err)
	}
	client2, kubeconfig2, _ := run(fresh.dir)
	if len(r.Images) != 1 || r.Images[0] != "registry.example.com/a:1" {
		t.Errorf("images: %q", r.Images)
	}
	if got, err := client2.CoreV1().Secrets("default").Get(ctx, "sealed", metav1.GetOptions{}); err != nil || string(got.Data["password"]) != "hunter2" {
		t.Errorf("the Secret is %v, %v", got, err)
	}
	public, err := client2.CoreV1().ConfigMaps("kube-public").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, o := range public.Items {
		have[o.Name] = true
	}
	for _, name := range want {
		if !have[name] {
			t.Errorf("%s was acknowledged before the snapshot, and is not in it", name)
		}
	}
	// The informer's client keeps its certificate: the authorities are the same.
	controlplanetest.Eventually(t, "the informer after the restore", func() error {
		if got := seen(); got != "kept=before changed=before deleted=before " {
			return fmt.Errorf("it sees %q at revision %s, known before was %s", got, informer.LastSyncResourceVersion(), known)
		}
		return nil
	})
	// A watch that continues from a lost revision is rejected.
	w, err := client2.CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{ResourceVersion: later.ResourceVersion})
	if err == nil {
		event := <-w.ResultChan()
		w.Stop()
		err = apierrors.FromObject(event.Object)
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("a watch from the lost revision %s: %v", later.ResourceVersion, err)
	}
	// And what happens from now on is seen.
	if _, err := client2.CoreV1().ConfigMaps("default").Create(ctx, configMap("later", "again"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the informer sees new writes", func() error {
		if got := seen(); !strings.Contains(got, "later=again") {
			return fmt.Errorf("it sees %q", got)
		}
		return nil
	})

	// The lost machine's node goes away, with its pod. Another one stays.
	c := NewComponent(fresh.Snapshots, Schedule{}, kubeconfig2, slog.New(slog.DiscardHandler))
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Stop(context.Background()) }()
	controlplanetest.Eventually(t, "the node of the lost machine", func() error {
		if _, err := client2.CoreV1().Nodes().Get(ctx, "old", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it is there: %v", err)
		}
		if _, err := os.Stat(fresh.dir.Server(noteName)); !os.IsNotExist(err) {
			return fmt.Errorf("the note is there: %v", err)
		}
		return nil
	})
	if _, err := client2.CoreV1().Nodes().Get(ctx, "other", metav1.GetOptions{}); err != nil {
		t.Errorf("another node: %v", err)
	}

	// A node that has reported since is in use.
	lease, err := client2.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, "other", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := note{Node: "other", Restored: lease.Spec.RenewTime.Add(-time.Second)}
	if err := c.removeFormer(ctx, n); err != nil {
		t.Fatal(err)
	}
	if _, err := client2.CoreV1().Nodes().Get(ctx, "other", metav1.GetOptions{}); err != nil || !strings.Contains(strings.Join(c.Notes(ctx), "\n"), "node other") {
		t.Errorf("a node that reports: %v, %q", err, strings.Join(c.Notes(ctx), "\n"))
	}
}
