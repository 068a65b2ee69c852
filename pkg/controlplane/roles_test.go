//go:build integration

package controlplane_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/layout"
)

// startVar is the number of the server's start, and dataDirVar its data dir: a process can have only one control
// plane, so each start is a separate process.
const (
	startVar   = "POLYMESH_TEST_START"
	dataDirVar = "POLYMESH_TEST_DATA_DIR"
)

const (
	imagePolicy = "system:polymesh:image-policy"
	servicelb   = "system:polymesh:servicelb"
	kubelets    = "system:polymesh:kube-apiserver-kubelet-client"
)

// What is deleted or removed from a role or binding is restored at the next start, additions stay, and a role with autoupdate
// disabled is not changed: so an administrator can remove a permission permanently.
func TestRoles(t *testing.T) {
	t.Parallel()
	starts := map[string]func(*testing.T, *kubernetes.Clientset, string){"1": firstStart, "2": secondStart}
	if run := starts[os.Getenv(startVar)]; run != nil {
		kubeconfig := controlplanetest.Start(t, slog.New(slog.NewTextHandler(os.Stderr, nil)), "--data-dir", os.Getenv(dataDirVar))
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			t.Fatal(err)
		}
		run(t, kubernetes.NewForConfigOrDie(config), kubeconfig)
		return
	}
	dir := t.TempDir()
	for _, n := range []string{"1", "2"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestRoles$", "-test.v", "-test.timeout=10m")
		cmd.Env = append(os.Environ(), startVar+"="+n, dataDirVar+"="+dir)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestRoles") {
			t.Fatalf("start %s: %v\n%s", n, err, out)
		}
	}
}

func firstStart(t *testing.T, admin *kubernetes.Clientset, kubeconfig string) {
	kubelet := identity(t, kubeconfig, certificate.APIServerKubelet)
	for what, want := range map[authorizationv1.ResourceAttributes]bool{
		// logs, exec, attach, port-forward; then the requests of `kubectl get --raw /api/v1/nodes/NAME/proxy/…`.
		{Verb: "get", Resource: "nodes", Subresource: "proxy"}:    true,
		{Verb: "create", Resource: "nodes", Subresource: "proxy"}: true,
		{Verb: "get", Resource: "nodes", Subresource: "metrics"}:  true,
		{Verb: "get", Resource: "nodes", Subresource: "stats"}:    true,
		{Verb: "get", Resource: "nodes", Subresource: "log"}:      true,
		{Verb: "get", Resource: "nodes", Subresource: "pods"}:     true,
		{Verb: "update", Resource: "nodes"}:                       false,
		{Verb: "get", Resource: "secrets"}:                        false,
		{Verb: "create", Resource: "pods", Subresource: "exec"}:   false,
		{Verb: "*", Group: "*", Resource: "*"}:                    false,
	} {
		if got := may(t, kubelet, what); got != want {
			t.Errorf("the API server's identity at the kubelet: %+v: %v", what, got)
		}
	}
	if !may(t, identity(t, kubeconfig, certificate.ImagePolicy), readSecrets) || !may(t, identity(t, kubeconfig, certificate.LoadBalancer), watchServices) {
		t.Error("the image policy or the load balancer has no permissions")
	}
	balancer := identity(t, kubeconfig, certificate.LoadBalancer)
	for what, want := range map[authorizationv1.ResourceAttributes]bool{
		{Verb: "list", Resource: "nodes"}:                                       true,
		{Verb: "watch", Resource: "nodes"}:                                      true,
		{Verb: "patch", Resource: "nodes"}:                                      false,
		{Verb: "list", Group: "discovery.k8s.io", Resource: "endpointslices"}:   true,
		{Verb: "watch", Group: "discovery.k8s.io", Resource: "endpointslices"}:  true,
		{Verb: "create", Group: "discovery.k8s.io", Resource: "endpointslices"}: false,
		{Verb: "patch", Resource: "services", Subresource: "status"}:            true,
		{Verb: "patch", Resource: "services"}:                                   false,
		{Verb: "list", Resource: "pods"}:                                        false,
	} {
		if got := may(t, balancer, what); got != want {
			t.Errorf("the load balancer: %+v: %v", what, got)
		}
	}
	store := identity(t, kubeconfig, certificate.Observe)
	for what, want := range map[authorizationv1.ResourceAttributes]bool{
		{Verb: "watch", Resource: "pods"}:                            true,
		{Verb: "list", Group: "apps", Resource: "deployments"}:       true,
		{Verb: "watch", Group: "events.k8s.io", Resource: "events"}:  true,
		{Verb: "create", Group: "events.k8s.io", Resource: "events"}: true,
		{Verb: "create", Resource: "events"}:                         false,
		{Verb: "get", Resource: "nodes", Subresource: "metrics"}:     true,
		{Verb: "get", Resource: "nodes", Subresource: "proxy"}:       false,
		{Verb: "get", Resource: "pods", Subresource: "exec"}:         false,
		{Verb: "get", Resource: "pods", Subresource: "log"}:          false,
		{Verb: "get", Resource: "secrets"}:                           false,
		{Verb: "list", Resource: "secrets"}:                          false,
		{Verb: "patch", Resource: "pods"}:                            false,
		{Verb: "delete", Resource: "events"}:                         false,
		{Verb: "update", Resource: "configmaps"}:                     false,
	} {
		if got := may(t, store, what); got != want {
			t.Errorf("the store of metrics, logs and traces: %+v: %v", what, got)
		}
	}
	node := identity(t, kubeconfig, certificate.Kubelet)
	for what, want := range map[authorizationv1.ResourceAttributes]bool{
		{Verb: "list", Resource: "nodes"}:                                         true,
		{Verb: "watch", Resource: "nodes"}:                                        true,
		{Verb: "delete", Resource: "nodes"}:                                       false,
		{Verb: "create", Resource: "services", Namespace: "kube-system"}:          false,
		{Verb: "list", Resource: "pods"}:                                          true,
		{Verb: "watch", Resource: "namespaces"}:                                   true,
		{Verb: "watch", Group: "networking.k8s.io", Resource: "networkpolicies"}:  true,
		{Verb: "list", Resource: "secrets"}:                                       false,
		{Verb: "list", Resource: "configmaps"}:                                    false,
		{Verb: "create", Group: "networking.k8s.io", Resource: "networkpolicies"}: false,
		{Verb: "update", Resource: "namespaces"}:                                  false,
	} {
		if got := may(t, node, what); got != want {
			t.Errorf("a node: %+v: %v", what, got)
		}
	}

	ctx, rbac := t.Context(), admin.RbacV1()
	if err := rbac.ClusterRoles().Delete(ctx, servicelb, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := rbac.ClusterRoleBindings().Delete(ctx, imagePolicy, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := get(t, rbac.ClusterRoleBindings(), kubelets)
	binding.Subjects = []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "debugger"}}
	if _, err := rbac.ClusterRoleBindings().Update(ctx, binding, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The image policy's role permanently loses access to Secrets.
	role := get(t, rbac.ClusterRoles(), imagePolicy)
	role.Rules, role.Annotations[rbacv1.AutoUpdateAnnotationKey] = role.Rules[:1], "false"
	if _, err := rbac.ClusterRoles().Update(ctx, role, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func secondStart(t *testing.T, admin *kubernetes.Clientset, kubeconfig string) {
	if !may(t, identity(t, kubeconfig, certificate.LoadBalancer), watchServices) {
		t.Error("the deleted role is not restored")
	}
	if !may(t, identity(t, kubeconfig, certificate.APIServerKubelet), authorizationv1.ResourceAttributes{Verb: "get", Resource: "nodes", Subresource: "proxy"}) {
		t.Error("the removed subject is not restored")
	}
	if subjects := get(t, admin.RbacV1().ClusterRoleBindings(), kubelets).Subjects; len(subjects) != 2 || subjects[0].Name != "debugger" {
		t.Errorf("the added subject is gone: %v", subjects)
	}
	policy := identity(t, kubeconfig, certificate.ImagePolicy)
	if !may(t, policy, authorizationv1.ResourceAttributes{Verb: "get", Group: "admissionregistration.k8s.io", Resource: "validatingwebhookconfigurations", Name: "polymesh-image-policy"}) {
		t.Error("the deleted binding is not restored")
	}
	if may(t, policy, readSecrets) {
		t.Error("a permanently removed permission is back")
	}
	if _, err := policy.CoreV1().Secrets("default").Get(t.Context(), "any", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("reading a Secret without permission: %v", err)
	}
	testWebhook(t, admin)
	testWithoutStore(t, admin, identity(t, kubeconfig, certificate.Observe))
}

// The store's permissions go with it, unless a user keeps them.
func testWithoutStore(t *testing.T, admin *kubernetes.Clientset, store *kubernetes.Clientset) {
	ctx, rbac := t.Context(), admin.RbacV1()
	watchPods := authorizationv1.ResourceAttributes{Verb: "watch", Resource: "pods"}
	mine := get(t, rbac.ClusterRoles(), layout.ObserveRole)
	mine.Annotations[rbacv1.AutoUpdateAnnotationKey] = "false"
	if _, err := rbac.ClusterRoles().Update(ctx, mine, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if !may(t, store, watchPods) {
		t.Error("the store may not read pods")
	}
	for range 2 {
		if err := controlplane.ReconcileRoles(ctx, admin, false); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "the store may do nothing", func() error {
			if may(t, store, watchPods) {
				return errors.New("it may read pods")
			}
			return nil
		})
	}
	if _, err := rbac.ClusterRoles().Get(ctx, certificate.ObserveUser, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the store's role is still there: %v", err)
	}
	if got := get(t, rbac.ClusterRoles(), layout.ObserveRole); got.UID != mine.UID {
		t.Error("a role that is a user's was made anew")
	}
	if err := controlplane.ReconcileRoles(ctx, admin, true); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the store may read again", func() error {
		if !may(t, store, watchPods) {
			return errors.New("it may not")
		}
		return nil
	})
}

// The error names an unreachable webhook that covers the roles, and the remedy; once it is gone the roles are created.
func testWebhook(t *testing.T, admin *kubernetes.Clientset) {
	ctx, rbac := t.Context(), admin.RbacV1()
	url, fail, none := "https://127.0.0.1:1/", admissionv1.Fail, admissionv1.SideEffectClassNone
	hooks := admin.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	if _, err := hooks.Create(ctx, &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "all"}, Webhooks: []admissionv1.ValidatingWebhook{{
		Name: "all.example.com", ClientConfig: admissionv1.WebhookClientConfig{URL: &url}, FailurePolicy: &fail, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
		Rules: []admissionv1.RuleWithOperations{{Operations: []admissionv1.OperationType{admissionv1.Create}, Rule: admissionv1.Rule{APIGroups: []string{"*"}, APIVersions: []string{"*"}, Resources: []string{"*"}}}},
	}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := rbac.ClusterRoles().Delete(ctx, servicelb, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the webhook is asked", func() error {
		probe := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "probe"}}
		if _, err := rbac.ClusterRoles().Create(ctx, probe, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err == nil {
			return errors.New("not yet")
		}
		return nil
	})
	err := controlplane.ReconcileRoles(ctx, admin, true)
	for _, want := range []string{"ClusterRole " + servicelb, `failed calling webhook "all.example.com"`, "delete the configuration of this webhook"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("with the webhook: %v, want %q", err, want)
		}
	}
	if err := hooks.Delete(ctx, "all", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the roles are made without the webhook", func() error { return controlplane.ReconcileRoles(ctx, admin, true) })
	if len(get(t, rbac.ClusterRoles(), servicelb).Rules) == 0 {
		t.Error("the role has no rules")
	}
}

var (
	readSecrets   = authorizationv1.ResourceAttributes{Verb: "get", Resource: "secrets", Namespace: "default"}
	watchServices = authorizationv1.ResourceAttributes{Verb: "watch", Resource: "services"}
)

// identity returns a client with one of the server's certificates.
func identity(t *testing.T, kubeconfig, name string) *kubernetes.Clientset {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	store := certificate.Store(filepath.Join(os.Getenv(dataDirVar), "server", "tls"))
	config.TLSClientConfig = rest.TLSClientConfig{CAFile: config.CAFile, CertFile: store.Cert(name), KeyFile: store.Key(name)}
	return kubernetes.NewForConfigOrDie(config)
}

func may(t *testing.T, client *kubernetes.Clientset, what authorizationv1.ResourceAttributes) bool {
	t.Helper()
	review, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(),
		&authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &what}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(fmt.Errorf("check the identity's permissions: %w", err))
	}
	return review.Status.Allowed
}

func get[T any](t *testing.T, client interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (T, error)
}, name string) T {
	t.Helper()
	obj, err := client.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return obj
}
