//go:build integration

package addon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/kubectl/pkg/cmd/apply"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/ssa"
)

// kubectlApply is `kubectl apply -f FILE`.
func kubectlApply(t *testing.T, kubeconfig, file string, more ...string) error {
	t.Helper()
	flags := genericclioptions.NewConfigFlags(true)
	flags.KubeConfig = &kubeconfig
	streams, _, _, said := genericiooptions.NewTestIOStreams()
	var failure error
	// kubectl would end the process.
	cmdutil.BehaviorOnFatal(func(text string, _ int) { failure = errors.Join(failure, errors.New(text)); panic(failure) })
	defer cmdutil.DefaultBehaviorOnFatal()
	cmd := apply.NewCmdApply("kubectl", cmdutil.NewFactory(flags), streams)
	cmd.SetArgs(append([]string{"-f", file}, more...))
	func() {
		defer func() {
			if p := recover(); p != nil && failure == nil {
				panic(p)
			}
		}()
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			failure = err
		}
	}()
	if failure != nil {
		return fmt.Errorf("%w: %s", failure, said)
	}
	return nil
}

// sample is one of Istio's.
func sample(t *testing.T, name string) string {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(strings.TrimSpace(string(dir)), "samples", "addons", name)
}

// What a user has keeps its name; what a user applies on top of ours wins; and ours comes back when it is gone.
func testYield(t *testing.T, kubeconfig string, log *slog.Logger) {
	opts := testOptions(ObserveAccess)
	opts.Kubeconfig, opts.Log = kubeconfig, log
	client, ctx := controlplanetest.Client(t, kubeconfig), t.Context()
	services, pods := client.CoreV1().Services(observeNamespace), client.CoreV1().Pods(observeNamespace)
	start := func(o Options) *Addon {
		t.Helper()
		a := New(o)
		if err := a.Init(ctx); err != nil {
			t.Fatal(err)
		}
		if err := a.Start(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = a.Stop(context.Background()) })
		controlplanetest.Eventually(t, "applied", a.loop.Ready)
		return a
	}
	// expect waits until the Services lead where they are to, by the selector of each, and the add-on names those of users.
	ours := map[string]string{"prometheus": "apis", "loki": "apis", "kiali": "apis", "tracing": "traces", "jaeger-query": "traces", "jaeger-collector": "traces", "zipkin": "traces"}
	expect := func(a *Addon, what string, users ...string) {
		t.Helper()
		controlplanetest.Eventually(t, what, func() error {
			list, err := services.List(ctx, metav1.ListOptions{})
			if err != nil {
				return err
			}
			have := map[string]map[string]string{}
			for _, s := range list.Items {
				have[s.Name] = s.Spec.Selector
				managed := slices.ContainsFunc(s.ManagedFields, func(m metav1.ManagedFieldsEntry) bool { return m.Manager == ssa.Observe })
				_, labelled := s.Labels[nameLabel]
				if users := slices.Contains(users, s.Name); users == managed || users == labelled || len(s.Spec.Selector) == 0 {
					return fmt.Errorf("Service %s: a user's %t, owned by us %t, our label %t, selector %v", s.Name, users, managed, labelled, s.Spec.Selector)
				}
			}
			for name, value := range ours {
				if want := map[string]string{accessLabel: value}; !slices.Contains(users, name) && !maps.Equal(have[name], want) {
					return fmt.Errorf("Service %s has the selector %v", name, have[name])
				}
				if _, mixed := have[name][accessLabel]; mixed && slices.Contains(users, name) {
					return fmt.Errorf("a user's Service %s has the selector %v", name, have[name])
				}
			}
			notes := strings.Join(a.Notes(ctx), "\n")
			for name := range ours {
				if strings.Contains(notes, "/"+name+" is a user's") != slices.Contains(users, name) {
					return fmt.Errorf("notes %q", notes)
				}
			}
			return a.loop.Ready()
		})
	}
	labelled := func(name string, labels ...string) {
		t.Helper()
		controlplanetest.Eventually(t, "labels of the pods", func() error {
			d, err := client.AppsV1().Deployments(observeNamespace).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			var have []string
			for _, label := range []string{"app", "app.kubernetes.io/name"} {
				if v := d.Spec.Template.Labels[label]; v != "" {
					have = append(have, label+"="+v)
				}
			}
			if !slices.Equal(have, labels) {
				return fmt.Errorf("%s has the labels %v", name, have)
			}
			return nil
		})
	}

	// A Service of the user's was there before.
	if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: observeNamespace}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	own := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "loki"}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": "mine"}, Ports: []corev1.ServicePort{{Port: 3100}},
	}}
	before, err := services.Create(ctx, own, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	a := start(opts)
	expect(a, "applied", "loki")
	if s, err := services.Get(ctx, "loki", metav1.GetOptions{}); err != nil || s.ResourceVersion != before.ResourceVersion {
		t.Errorf("a user's Service was written: %v", err)
	}
	labelled("polymesh-observe", "app=kiali", "app.kubernetes.io/name=prometheus")
	labelled("polymesh-observe-traces", "app=jaeger")
	if err := services.Delete(ctx, "loki", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect(a, "the user's is gone")

	// What a user adds to ours does not make it the user's.
	if _, err := services.Patch(ctx, "prometheus", types.MergePatchType, []byte(`{"metadata":{"annotations":{"mine":"yes"}},"spec":{"type":"NodePort"}}`), metav1.PatchOptions{FieldManager: "kubectl-patch"}); err != nil {
		t.Fatal(err)
	}
	a.loop.Kick()
	expect(a, "an addition")

	// Istio's samples on top.
	samples := []string{"prometheus.yaml", "jaeger.yaml", "kiali.yaml", "loki.yaml"}
	for _, name := range samples {
		if err := kubectlApply(t, kubeconfig, sample(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	users := []string{"prometheus", "loki", "kiali", "tracing", "jaeger-collector", "zipkin", "loki-headless", "loki-memberlist"}
	expect(a, "Istio's samples", users...)
	for name, port := range map[string]int32{"jaeger-collector": 4317, "tracing": 80, "zipkin": 9411, "prometheus": 9090, "kiali": 20001, "loki": 3100} {
		s, err := services.Get(ctx, name, metav1.GetOptions{})
		if err != nil || !slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return p.Port == port }) {
			t.Errorf("Service %s has lost the port %d: %v", name, port, err)
		}
	}
	// The controllers make the samples' pods; `istioctl dashboard` is to find those.
	labelled("polymesh-observe")
	labelled("polymesh-observe-traces")
	// They are the user's to change, with kubectl and by server-side apply.
	if err := kubectlApply(t, kubeconfig, sample(t, "jaeger.yaml"), "--server-side", "--force-conflicts"); err != nil {
		t.Error(err)
	}

	// And gone again.
	for _, name := range users {
		if err := services.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	deployments, sets := client.AppsV1().Deployments(observeNamespace), client.AppsV1().StatefulSets(observeNamespace)
	foreground := metav1.DeletePropagationBackground
	for _, name := range []string{"prometheus", "jaeger", "kiali"} {
		if err := deployments.Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &foreground}); err != nil {
			t.Fatal(err)
		}
	}
	if err := sets.Delete(ctx, "loki", metav1.DeleteOptions{PropagationPolicy: &foreground}); err != nil {
		t.Fatal(err)
	}
	expect(a, "the samples are gone")
	labelled("polymesh-observe", "app=kiali", "app.kubernetes.io/name=prometheus")
	labelled("polymesh-observe-traces", "app=jaeger")

	// By server-side apply a user has to say that it is to replace ours.
	if err := kubectlApply(t, kubeconfig, sample(t, "prometheus.yaml"), "--server-side"); err == nil || !strings.Contains(err.Error(), "conflict") {
		t.Errorf("server-side apply: %v", err)
	}
	if err := kubectlApply(t, kubeconfig, sample(t, "prometheus.yaml"), "--server-side", "--force-conflicts"); err != nil {
		t.Error(err)
	}
	expect(a, "server-side apply", "prometheus")
	if err := a.Stop(ctx); err != nil {
		t.Fatal(err)
	}

	// With less access, and with none, ours go, and only ours.
	opts.Access = config.ObserveIngest
	ours = map[string]string{"jaeger-collector": "traces", "zipkin": "traces"}
	b := start(opts)
	controlplanetest.Eventually(t, "only sending", func() error {
		list, err := services.List(ctx, metav1.ListOptions{LabelSelector: nameLabel + "=" + string(ObserveAccess)})
		if err != nil || len(list.Items) != 2 {
			return fmt.Errorf("%d Services, %w", len(list.Items), err)
		}
		return nil
	})
	if _, err := services.Get(ctx, "prometheus", metav1.GetOptions{}); err != nil {
		t.Errorf("a user's: %v", err)
	}
	if _, err := deployments.Get(ctx, "polymesh-observe", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a Deployment that is not to be there: %v", err)
	}
	if err := b.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	opts.Disabled = true
	start(opts)
	controlplanetest.Eventually(t, "removed", func() error {
		list, err := services.List(ctx, metav1.ListOptions{LabelSelector: nameLabel})
		if err != nil || len(list.Items) > 0 {
			return fmt.Errorf("%d Services, %w", len(list.Items), err)
		}
		all, err := pods.List(ctx, metav1.ListOptions{LabelSelector: accessLabel})
		if err != nil || len(all.Items) > 0 {
			return fmt.Errorf("%d pods, %w", len(all.Items), err)
		}
		return nil
	})
	if _, err := services.Get(ctx, "prometheus", metav1.GetOptions{}); err != nil {
		t.Errorf("a user's: %v", err)
	}
}
