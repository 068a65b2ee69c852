// Package controlplanetest starts a control plane without nodes inside a test's process: the datastore, API
// server, controllers and scheduler of a real server, with the same options. It is for tests that need a real
// API server; only tests import it.
//
// Pods stay Pending, because there is no kubelet: a test that needs another status writes it like a kubelet.
package controlplanetest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"istio.io/istio/manifests"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/porttest"
)

// KubernetesVersion is the version that the control plane says it has to machines that join: a test is not stamped with one.
const KubernetesVersion = "v1.36.3"

// KeyReload is how often the API server checks the keys of Secrets: a test waits for that in each step of a change.
const KeyReload = 500 * time.Millisecond

// limit is the time for what should happen: enough on a machine on which other tests keep all cores busy.
const limit = 2 * time.Minute

// Start starts a control plane that ends with the test, and returns the path of its administrator's kubeconfig. The kubeconfigs of
// components with their own identity are next to it (controlplane.WriteKubeconfigs). The data is in the test's
// temporary directory, the API server listens on a free port of 127.0.0.1. args are additional flags of
// `polymesh server`; with --cluster-init the datastore is etcd, of which this is the only server. With --datastore-endpoint, for an etcd
// outside, it is one of several servers, and none of them runs controllers: components that elect a leader end the process when they lose it.
//
// A process can have only one control plane (see package controlplane), so the tests of a package that share it are subtests, each
// in its own namespace.
func Start(t testing.TB, log *slog.Logger, args ...string) string {
	t.Helper()
	return StartWith(t, log, nil, args...)
}

// StartWith is Start, with further paths of the API server (controlplane.Options.Handlers).
func StartWith(t testing.TB, log *slog.Logger, more map[string]http.Handler, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	flags := config.ServerFlags()
	if err := flags.Parse(append([]string{"--data-dir", dir, "--bind-address", "127.0.0.1", "--https-listen-port", fmt.Sprint(porttest.Loopback(t).Port()),
		"--write-kubeconfig", filepath.Join(dir, "kubeconfig"),
		// Not upstream's 20 requests a second, which spare the API server of a large cluster.
		"--kube-controller-manager-arg=kube-api-qps=1000", "--kube-controller-manager-arg=kube-api-burst=1000"}, args...)); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Server(nil)
	if err != nil {
		t.Fatal(err)
	}
	ip, name := netip.MustParseAddr("192.0.2.1"), cmp.Or(cfg.NodeName, "none")
	renewal := certificate.NewRenewal(certificate.Options{Dir: cfg.DataDir.Server("tls"), NodeName: name, NodeIP: ip, ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain, Observe: cfg.Enabled(config.Observe)},
		func(s certificate.Store) error {
			return controlplane.WriteKubeconfigs(cfg, s, controlplane.URL(cfg), cfg.Enabled(config.Observe))
		}, log)
	if err := renewal.Ensure(time.Now()); err != nil {
		t.Fatal(err)
	}
	certs := certificate.Store(cfg.DataDir.TLS())
	var db datastore.Store = datastore.New(datastore.Options{Dir: cfg.DataDir.Server("db"), Socket: datastoretest.Socket(t), Sync: cfg.DatastoreSync})
	if cfg.ClusterInit {
		db = etcd.New(etcd.Options{
			Dir: cfg.DataDir.Etcd(), SQLite: cfg.DataDir.Server("db", datastore.CopyName), Node: name, Certificates: certs, Log: log,
			Client: porttest.Loopback(t), HTTP: porttest.Loopback(t), Peer: porttest.Loopback(t),
		})
	}
	several := cfg.Datastore.Kind == config.Etcd
	if several {
		db = datastore.NewExternal(cfg.Datastore)
	}
	joining := join.NewServer(join.Options{
		Name: name, Address: ip, Kubeconfig: cfg.DataDir.Kubeconfig("polymesh"), Certificates: certs, TokenFile: cfg.DataDir.NodeToken(), Version: KubernetesVersion, Log: log,
		Cluster: join.ClusterOf(cfg), Shared: &join.Shared{Config: cfg, Datastore: bootstrap.External, Endpoint: db.Endpoint(), Settles: true},
	})
	handlers := joining.Handlers()
	maps.Copy(handlers, more)
	plane := controlplane.Options{KeyReload: KeyReload, Config: cfg, Node: name, NodeIP: ip, Certificates: certs, Datastore: db.Endpoint(), Handlers: handlers, Authenticator: joining.Authenticator, Filter: joining.Filter, Observe: cfg.Enabled(config.Observe)}
	m := component.NewManager(log)
	api := m.Add(controlplane.NewAPIServer(plane), m.Add(db))
	m.Add(joining, api)
	if plane.Datastore.LeaderElect {
		m.Add(encryption.New(encryption.Cluster{Place: plane.Keys(), Kubeconfig: cfg.DataDir.Kubeconfig("polymesh")}, plane.Self(), plane.Provider(), log), api)
	}
	if !several {
		plane.Datastore.LeaderElect = false
		m.Add(controlplane.NewControllerManager(plane), api)
		m.Add(controlplane.NewScheduler(plane), api)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-m.Settled():
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	case <-time.After(limit):
		t.Fatalf("no control plane after %s", limit)
	}
	return cfg.DataDir.Kubeconfig("polymesh")
}

// Client returns a client with a kubeconfig's identity, without rate limit.
func Client(t testing.TB, file string) *kubernetes.Clientset {
	t.Helper()
	client, err := kubeconfig.Client(file, func(c *rest.Config) { c.QPS = -1 })
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// ReadyNode creates a node that is Ready, with these internal addresses, and keeps it so like a kubelet, by a Lease. It is deleted with the test.
func ReadyNode(t testing.TB, client kubernetes.Interface, name string, addresses ...string) {
	t.Helper()
	nodes := client.CoreV1().Nodes()
	node, err := nodes.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
		corev1.LabelHostname: name, corev1.LabelOSStable: "linux",
	}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nodes.Delete(context.Background(), name, metav1.DeleteOptions{}) })
	node.ResourceVersion = "" // whatever the controllers write meanwhile
	for _, a := range addresses {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}}
	if _, err := nodes.UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{
		{APIVersion: "v1", Kind: "Node", Name: name, UID: node.UID},
	}}}
	leases := client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	go wait.UntilWithContext(t.Context(), func(ctx context.Context) {
		now := metav1.NowMicro()
		if lease.Spec.RenewTime = &now; lease.ResourceVersion == "" {
			if made, err := leases.Create(ctx, lease, metav1.CreateOptions{}); err == nil {
				lease = made
			}
		} else if renewed, err := leases.Update(ctx, lease, metav1.UpdateOptions{}); err == nil {
			lease = renewed
		}
	}, 5*time.Second)
}

// Eventually waits until done returns nil, for at most two minutes.
func Eventually(t testing.TB, what string, done func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// InstallIstioTypes creates the CRDs of Istio's base chart, and waits until they are served.
func InstallIstioTypes(t testing.TB, config *rest.Config) {
	t.Helper()
	text, err := fs.ReadFile(manifests.BuiltinOrDir(""), "charts/base/files/crd-all.gen.yaml")
	if err != nil {
		t.Fatal(err)
	}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	definitions := client.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	var served []schema.GroupVersionResource
	for decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 1<<20); ; {
		u := &unstructured.Unstructured{}
		if err := decoder.Decode(&u.Object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if len(u.Object) == 0 {
			continue
		}
		if _, err := definitions.Create(t.Context(), u, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		group, _, _ := unstructured.NestedString(u.Object, "spec", "group")
		plural, _, _ := unstructured.NestedString(u.Object, "spec", "names", "plural")
		versions, _, _ := unstructured.NestedSlice(u.Object, "spec", "versions")
		for _, v := range versions {
			if name, ok := v.(map[string]any)["name"].(string); ok {
				served = append(served, schema.GroupVersionResource{Group: group, Version: name, Resource: plural})
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for _, kind := range served {
		err := wait.PollUntilContextCancel(ctx, 50*time.Millisecond, true, func(ctx context.Context) (bool, error) {
			_, err := client.Resource(kind).List(ctx, metav1.ListOptions{Limit: 1})
			return err == nil, nil
		})
		if err != nil {
			t.Fatalf("%s is not served after %s", kind, limit)
		}
	}
}
