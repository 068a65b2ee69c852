//go:build integration

package join_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/util/clog"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/pkg/registry/rbac/validation"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
)

// startServer starts the component of a further server.
func startServer(t *testing.T, kubeconfig string, dir layout.DataDir, name string, shared ...*join.Shared) *join.Server {
	t.Helper()
	o := join.Options{
		Name: name, Address: netip.MustParseAddr("192.0.2.200"), Kubeconfig: kubeconfig, Certificates: certificate.Store(dir.TLS()), Version: controlplanetest.KubernetesVersion,
		TokenFile: filepath.Join(t.TempDir(), "node-token"), Log: slog.New(slog.DiscardHandler),
	}
	if len(shared) > 0 {
		o.Shared = shared[0]
	}
	s := join.NewServer(o)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop(context.Background()) })
	return s
}

// Who may write the records, by the roles of Kubernetes, Polymesh and Istio: the servers and Kubernetes' own controllers on them.
func writers(t *testing.T, admin *kubernetes.Clientset, config *rest.Config) {
	installIstioRoles(t, config)
	subjects := func(resource string, verbs ...string) (names []string) {
		t.Helper()
		for _, verb := range verbs {
			allowed, err := evaluator(t, admin).AllowedSubjects(t.Context(), authorizer.AttributesRecord{
				Verb: verb, Namespace: metav1.NamespaceSystem, APIVersion: "v1", Resource: resource, Name: "joined.worker-1", ResourceRequest: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range allowed {
				names = append(names, strings.TrimSuffix(s.Kind+" "+s.Namespace, " ")+" "+s.Name)
			}
		}
		slices.Sort(names)
		return slices.Compact(names)
	}
	want := []string{
		"Group system:masters",
		"ServiceAccount kube-system generic-garbage-collector",
		"ServiceAccount kube-system legacy-service-account-token-cleaner",
		"ServiceAccount kube-system namespace-controller",
		"ServiceAccount kube-system token-cleaner",
		"User system:kube-controller-manager",
	}
	if got := subjects("secrets", "create", "update", "patch", "delete", "deletecollection"); !slices.Equal(got, want) {
		t.Errorf("records are written by %q, want %q", got, want)
	}
	if got := subjects("configmaps", "update"); !slices.Contains(got, "ServiceAccount istio-system istiod") {
		t.Errorf("the roles of Istio are not the real ones: ConfigMaps are written by %q", got)
	}
	// Nodes have a further authorizer.
	for _, verb := range []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"} {
		for _, name := range []string{"joined.worker-1", "etcd-member.1", ""} {
			review, err := admin.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: "system:node:worker-1", Groups: []string{"system:nodes", "system:authenticated"},
				ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Namespace: metav1.NamespaceSystem, Version: "v1", Resource: "secrets", Name: name},
			}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if review.Status.Allowed {
				t.Errorf("a node may %s Secret %q: %s", verb, name, review.Status.Reason)
			}
		}
	}
}

// evaluator has the API server's roles and bindings, as it evaluates them.
func evaluator(t *testing.T, admin *kubernetes.Clientset) *rbac.SubjectAccessEvaluator {
	t.Helper()
	api := admin.RbacV1()
	clusterRoles, err1 := api.ClusterRoles().List(t.Context(), metav1.ListOptions{})
	clusterRoleBindings, err2 := api.ClusterRoleBindings().List(t.Context(), metav1.ListOptions{})
	roles, err3 := api.Roles("").List(t.Context(), metav1.ListOptions{})
	roleBindings, err4 := api.RoleBindings("").List(t.Context(), metav1.ListOptions{})
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	_, all := validation.NewTestRuleResolver(pointers(roles.Items), pointers(roleBindings.Items), pointers(clusterRoles.Items), pointers(clusterRoleBindings.Items))
	return rbac.NewSubjectAccessEvaluator(all, all, all, all, "")
}

func pointers[T any](items []T) (all []*T) {
	for i := range items {
		all = append(all, &items[i])
	}
	return all
}

// installIstioRoles creates the roles and bindings of Istio's charts, those of gateways too.
func installIstioRoles(t *testing.T, config *rest.Config) {
	t.Helper()
	sets, _, err := render.GenerateManifest(nil, []string{"profile=demo"}, true, nil, clog.NewConsoleLogger(io.Discard, io.Discard, nil))
	if err != nil {
		t.Fatal(err)
	}
	client := dynamic.NewForConfigOrDie(config)
	namespaces := client.Resource(corev1.SchemeGroupVersion.WithResource("namespaces"))
	created := 0
	for _, set := range sets {
		for _, m := range set.Manifests {
			kind := m.GroupVersionKind()
			if kind.Group != rbacv1.GroupName {
				continue
			}
			resources := client.Resource(schema.GroupVersionResource{Group: kind.Group, Version: kind.Version, Resource: strings.ToLower(kind.Kind) + "s"})
			if m.GetNamespace() != "" {
				namespace := m.DeepCopy()
				namespace.Object = map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": m.GetNamespace()}}
				if _, err := namespaces.Create(t.Context(), namespace, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
					t.Fatal(err)
				}
			}
			if _, err := resources.Namespace(m.GetNamespace()).Create(t.Context(), m.Unstructured, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			created++
		}
	}
	if created == 0 {
		t.Fatal("Istio's charts have no roles")
	}
}

// Records of the version before are taken over until all servers have this one, and those of this version are not changed back by them.
func formerRecords(t *testing.T, admin *kubernetes.Clientset, kubeconfig string, dir layout.DataDir) {
	secrets, maps, nodes := admin.CoreV1().Secrets("kube-system"), admin.CoreV1().ConfigMaps("kube-system"), admin.CoreV1().Nodes()
	const mark, label = "joined-machines", "join.polymesh.dev/record"
	former := func(name string, data map[string]string) {
		t.Helper()
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "joined." + name, Labels: map[string]string{label: "true"}}, Data: data}
		if _, err := maps.Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	adopted := func(name string, want map[string]string) {
		t.Helper()
		controlplanetest.Eventually(t, "the record of "+name+" is taken over", func() error {
			s, err := secrets.Get(t.Context(), "joined."+name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for key, value := range want {
				if string(s.Data[key]) != value {
					return errors.New(key + " is " + string(s.Data[key]))
				}
			}
			return nil
		})
	}
	// The cluster is complete: what is written into ConfigMaps now is never read.
	controlplanetest.Eventually(t, "there is nothing more to take over", func() error {
		_, err := secrets.Get(t.Context(), mark, metav1.GetOptions{})
		return err
	})
	const removed, joined = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
	former("too-late", map[string]string{"key": "0", "time": joined})
	complete := startServer(t, kubeconfig, dir, "complete")
	controlplanetest.Eventually(t, "a further server is ready", func() error { return complete.Ready(t.Context()) })
	if s, err := secrets.Get(t.Context(), "joined.too-late", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a ConfigMap is read: %v, %v", s, err)
	}
	if err := maps.Delete(t.Context(), "joined.too-late", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	// As before the upgrade: a server has not started with this version, and a node of an agent is there.
	if err := secrets.Delete(t.Context(), mark, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	server := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "not-upgraded", Labels: map[string]string{layout.ServerLabel: "true"}}}
	if _, err := nodes.Create(t.Context(), server, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nodes.Delete(context.Background(), server.Name, metav1.DeleteOptions{}) })
	former("old", map[string]string{"key": "0", "token": "t", "address": "192.0.2.77", "time": joined})
	former("from-the-future", map[string]string{"key": "0", "time": "2926-01-01T00:00:00Z", "removed": "2926-01-02T00:00:00Z"})
	former("old-removed", map[string]string{"key": "0", "time": removed, "removed": removed})
	// It joined as worker-6, and its node was removed: what a ConfigMap claims does not undo that.
	before, err := secrets.Get(t.Context(), "joined.worker-6", metav1.GetOptions{})
	if err != nil || len(before.Data["removed"]) == 0 {
		t.Fatalf("%v, %v", before, err)
	}
	former("worker-6", map[string]string{"key": "0", "time": removed})

	upgraded := startServer(t, kubeconfig, dir, "upgraded")
	adopted("old", map[string]string{"key": "0", "token": "t", "address": "192.0.2.77", "time": joined, "role": "agent"})
	adopted("old-removed", map[string]string{"removed": removed})
	controlplanetest.Eventually(t, "the server is ready", func() error { return upgraded.Ready(t.Context()) })
	if s, err := secrets.Get(t.Context(), "joined.from-the-future", metav1.GetOptions{}); err != nil || strings.HasPrefix(string(s.Data["time"]), "2926") || strings.HasPrefix(string(s.Data["removed"]), "2926") {
		t.Errorf("a time to come is believed: %v, %v", s, err)
	}
	if note := strings.Join(upgraded.Notes(t.Context()), "\n"); !strings.Contains(note, "(not-upgraded)") {
		t.Errorf("the note is %q", note)
	}
	// Machines join by the other server, and its nodes leave.
	former("next", map[string]string{"key": "0", "time": joined})
	adopted("next", map[string]string{"time": joined})
	if _, err := maps.Update(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "joined.next", Labels: map[string]string{label: "true"}}, Data: map[string]string{"key": "0", "time": joined, "removed": "2026-01-03T00:00:00Z"},
	}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	adopted("next", map[string]string{"removed": "2026-01-03T00:00:00Z"})
	if after, err := secrets.Get(t.Context(), "joined.worker-6", metav1.GetOptions{}); err != nil || string(after.Data["removed"]) != string(before.Data["removed"]) {
		t.Errorf("the record of a node that was removed is %v, %v", after, err)
	}
	if _, err := secrets.Get(t.Context(), mark, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("records of the version before are not read any more: %v", err)
	}
	// The last server is upgraded.
	startServer(t, kubeconfig, dir, "not-upgraded")
	controlplanetest.Eventually(t, "there is nothing more to take over", func() error {
		_, err := secrets.Get(t.Context(), mark, metav1.GetOptions{})
		return err
	})
	if left, err := maps.List(t.Context(), metav1.ListOptions{LabelSelector: label}); err != nil || len(left.Items) != 0 {
		t.Errorf("ConfigMaps are left: %v, %v", left.Items, err)
	}
	controlplanetest.Eventually(t, "nothing is to be said", func() error {
		if note := strings.Join(upgraded.Notes(t.Context()), "\n"); strings.Contains(note, "not-upgraded") {
			return errors.New(note)
		}
		return nil
	})
}
