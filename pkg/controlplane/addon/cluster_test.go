//go:build integration

package addon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	applyadmission "k8s.io/client-go/applyconfigurations/admissionregistration/v1"
	applycore "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/ssa"
)

// A process can have one control plane.
func TestOnACluster(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	kubeconfig := controlplanetest.Start(t, log)
	t.Run("what is deleted or changed", func(t *testing.T) { testLife(t, kubeconfig, log) })
	t.Run("nodes", func(t *testing.T) { testNodes(t, kubeconfig, log) })
	t.Run("what users have instead", func(t *testing.T) { testYield(t, kubeconfig, log) })
	t.Run("policies", func(t *testing.T) { testPolicies(t, kubeconfig, log) })
}

// What an earlier version has applied is taken over, and only that; what someone deletes or changes comes back.
func testLife(t *testing.T, kubeconfig string, log *slog.Logger) {
	opts := testOptions(config.CoreDNS)
	opts.Kubeconfig, opts.Log = kubeconfig, log
	ctx := t.Context()
	rest, err := clientcmd.BuildConfigFromFlags("", opts.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		t.Fatal(err)
	}
	dyn, err := dynamic.NewForConfig(rest)
	if err != nil {
		t.Fatal(err)
	}
	const earlier = "polymesh"
	objects, err := render(opts, inputs{})
	if err != nil {
		t.Fatal(err)
	}
	apply := func(obj *unstructured.Unstructured, manager string) error {
		a := &Addon{dynamic: dyn}
		_, err := a.resource(idOf(obj)).Apply(ctx, obj.GetName(), obj, metav1.ApplyOptions{FieldManager: manager, Force: true})
		return err
	}
	// An earlier version had one more annotation on each object, and one more object.
	for _, obj := range objects {
		old := obj.DeepCopy()
		old.SetAnnotations(map[string]string{"dropped": "yes"})
		if err := apply(old, earlier); err != nil {
			t.Fatal(err)
		}
	}
	// And an add-on that there is no more.
	warns := client.AdmissionregistrationV1().ValidatingAdmissionPolicies()
	if _, err := warns.Apply(ctx, applyadmission.ValidatingAdmissionPolicy("network-policy.polymesh.dev").WithLabels(map[string]string{nameLabel: "network-policy"}).
		WithSpec(applyadmission.ValidatingAdmissionPolicySpec().WithValidations(applyadmission.Validation().WithExpression("false")).
			WithMatchConstraints(applyadmission.MatchResources().WithResourceRules(applyadmission.NamedRuleWithOperations().
				WithAPIGroups("networking.k8s.io").WithAPIVersions("*").WithOperations("CREATE").WithResources("networkpolicies")))),
		metav1.ApplyOptions{FieldManager: ssa.Addon}); err != nil {
		t.Fatal(err)
	}
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	label := map[string]string{nameLabel: string(config.CoreDNS)}
	mine := map[string]string{nameLabel: string(config.CoreDNS), "applyset.kubernetes.io/part-of": "applyset-x-v1"}
	for name, labels := range map[string]map[string]string{"coredns-gone": label, "coredns-deployed": mine} {
		if _, err := maps.Apply(ctx, applycore.ConfigMap(name, metav1.NamespaceSystem).WithLabels(labels), metav1.ApplyOptions{FieldManager: earlier}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "coredns-copy", Labels: label}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	start := func(o Options) *Addon {
		t.Helper()
		a := New(o)
		if err := a.Init(ctx); err != nil {
			t.Fatal(err)
		}
		if err := a.Start(ctx); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "applied", a.loop.Ready)
		return a
	}
	a := start(opts)
	for _, obj := range objects {
		live, err := a.resource(idOf(obj)).Get(ctx, obj.GetName(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if live.GetAnnotations()["dropped"] != "" {
			t.Errorf("%s still has what this version no longer applies", idOf(obj))
		}
		for _, m := range live.GetManagedFields() {
			if m.Manager == earlier {
				t.Errorf("%s still has the field manager %s", idOf(obj), earlier)
			}
		}
	}
	if _, err := maps.Get(ctx, "coredns-gone", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("an object of an earlier version is still there: %v", err)
	}
	if _, err := warns.Get(ctx, "network-policy.polymesh.dev", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("an object of an add-on that there is no more is still there: %v", err)
	}
	users := func() {
		t.Helper()
		for _, name := range []string{"coredns-deployed", "coredns-copy"} {
			if _, err := maps.Get(ctx, name, metav1.GetOptions{}); err != nil {
				t.Errorf("a user's object: %v", err)
			}
		}
	}
	users()

	// A round with nothing to do writes nothing.
	service, err := client.CoreV1().Services(metav1.NamespaceSystem).Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.loop.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.sync(ctx); err != nil {
		t.Fatal(err)
	}
	again, err := client.CoreV1().Services(metav1.NamespaceSystem).Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil || again.ResourceVersion != service.ResourceVersion {
		t.Errorf("a round with nothing to do has written: %v", err)
	}

	if err := client.CoreV1().Services(metav1.NamespaceSystem).Delete(ctx, "kube-dns", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.AppsV1().Deployments(metav1.NamespaceSystem).Patch(ctx, "coredns", types.StrategicMergePatchType,
		[]byte(`{"metadata":{"annotations":{"mine":"yes"}},"spec":{"template":{"spec":{"containers":[{"name":"coredns","image":"evil"}]}}}}`), metav1.PatchOptions{FieldManager: "kubectl-edit"}); err != nil {
		t.Fatal(err)
	}
	// The controllers write the Deployment meanwhile: then the loop tries again.
	controlplanetest.Eventually(t, "a round", func() error { return a.sync(ctx) })
	if _, err := client.CoreV1().Services(metav1.NamespaceSystem).Get(ctx, "kube-dns", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	d, err := client.AppsV1().Deployments(metav1.NamespaceSystem).Get(ctx, "coredns", metav1.GetOptions{})
	if err != nil || d.Spec.Template.Spec.Containers[0].Image == "evil" || d.Annotations["mine"] != "yes" {
		t.Errorf("%v: image %s, annotations %v", err, d.Spec.Template.Spec.Containers[0].Image, d.Annotations)
	}

	// Disabled: all of it goes, and nothing else.
	opts.Disabled = true
	b := start(opts)
	controlplanetest.Eventually(t, "removed", func() error {
		for _, obj := range objects {
			if _, err := b.resource(idOf(obj)).Get(ctx, obj.GetName(), metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				return context.DeadlineExceeded
			}
		}
		return nil
	})
	users()
	if err := b.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// With the second node come its line in the hosts file, a second replica and a disruption budget. A user's number of replicas stays.
func testNodes(t *testing.T, kubeconfig string, log *slog.Logger) {
	opts := testOptions(config.CoreDNS)
	opts.Kubeconfig, opts.Log = kubeconfig, log
	client, ctx := controlplanetest.Client(t, kubeconfig), t.Context()
	a := New(opts)
	if err := a.Init(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	want := func(what string, replicas int32, hosts string, budget bool) {
		t.Helper()
		controlplanetest.Eventually(t, what, func() error {
			d, err := client.AppsV1().Deployments(metav1.NamespaceSystem).Get(ctx, "coredns", metav1.GetOptions{})
			if err != nil {
				return err
			}
			m, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, "coredns", metav1.GetOptions{})
			if err != nil {
				return err
			}
			_, err = client.PolicyV1().PodDisruptionBudgets(metav1.NamespaceSystem).Get(ctx, "coredns", metav1.GetOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				return err
			}
			if *d.Spec.Replicas != replicas || m.Data["NodeHosts"] != hosts || (err == nil) != budget {
				return fmt.Errorf("%d replicas, hosts %q, budget: %v", *d.Spec.Replicas, m.Data["NodeHosts"], err)
			}
			return a.loop.Ready()
		})
	}
	const own, both = "192.0.2.10 node-1\n", "192.0.2.10 node-1\n192.0.2.11 node-2\n"
	want("one node", 1, own, false)
	nodes := client.CoreV1().Nodes()
	for _, name := range []string{"node-1", "node-2"} {
		controlplanetest.ReadyNode(t, client, name, "192.0.2.11")
	}
	want("two nodes", 2, both, true)

	// While a replica runs on a node that is being drained, there are two.
	pods := client.CoreV1().Pods(metav1.NamespaceSystem)
	pod, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "replica", Labels: map[string]string{"k8s-app": "kube-dns"}},
		Spec:       corev1.PodSpec{NodeName: "node-2", Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod.ResourceVersion, pod.Status.Phase = "", corev1.PodRunning // whatever the controllers write meanwhile
	if _, err := pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	cordon := func(on bool) {
		t.Helper()
		if _, err := nodes.Patch(ctx, "node-2", types.MergePatchType, fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, on), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		controlplanetest.Eventually(t, "the node is known to be cordoned", func() error {
			if n, err := a.nodes.Get("node-2"); err != nil || n.Spec.Unschedulable != on {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
	}
	cordon(true)
	if err := a.loop.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		controlplanetest.Eventually(t, "a round", func() error { return a.sync(ctx) })
	}
	want("cordoned", 2, both, true)
	zero := int64(0)
	if err := pods.Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "a round", func() error { return a.sync(ctx) })
	want("drained", 1, both, false)
	cordon(false)
	a.loop.Start(ctx)
	want("back", 2, both, true)

	deployments := client.AppsV1().Deployments(metav1.NamespaceSystem)
	scale, err := deployments.GetScale(ctx, "coredns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	scale.Spec.Replicas, scale.ResourceVersion = 3, "" // whatever the controllers write meanwhile
	if _, err := deployments.UpdateScale(ctx, "coredns", scale, metav1.UpdateOptions{FieldManager: "kubectl"}); err != nil {
		t.Fatal(err)
	}
	a.loop.Kick()
	if err := nodes.Delete(ctx, "node-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	want("scaled by a user, and one node again", 3, own, false)
	if err := deployments.Delete(ctx, "coredns", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	a.loop.Kick()
	want("made again", 1, own, false)
}
