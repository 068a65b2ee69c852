//go:build integration

package install

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"istio.io/istio/operator/pkg/install"
	"istio.io/istio/operator/pkg/uninstall"
	"istio.io/istio/operator/pkg/util/progress"
	"istio.io/istio/pkg/kube"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/converge"
)

// server is one run of the component on a cluster.
type server struct {
	t *testing.T
	*mesh
}

func start(t *testing.T, opts Options) *server {
	t.Helper()
	m := New(opts).(*mesh)
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &server{t, m}
}

// settle waits until the installation is done.
func (s *server) settle() {
	s.t.Helper()
	controlplanetest.Eventually(s.t, "installed", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.waiting
	})
}

// versions are what an apply changes of the recorded objects when it is not one that changes nothing: fingerprints, and
// generations. Controllers write to the status meanwhile.
func versions(t *testing.T, client kube.CLIClient, record *Record) map[string]string {
	t.Helper()
	out := map[string]string{}
	for key := range record.Objects {
		gvk, namespace, name, err := parseKey(key)
		if err != nil {
			t.Fatal(err)
		}
		r, err := client.DynamicClientFor(gvk, nil, namespace)
		if err != nil {
			t.Fatal(err)
		}
		obj, err := r.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Errorf("%s: %v", display(key), err)
			continue
		}
		print, err := fingerprint(obj)
		if err != nil {
			t.Fatal(err)
		}
		out[key] = fmt.Sprint(obj.GetGeneration(), " ", print)
	}
	return out
}

func same(t *testing.T, what string, before, after map[string]string) {
	t.Helper()
	for k, v := range before {
		if after[k] != v {
			t.Errorf("%s: %s changed from %s to %s", what, display(k), v, after[k])
		}
	}
}

func TestLifeOnACluster(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	opts := Options{Kubeconfig: controlplanetest.Start(t, log), Profile: "default", Images: testImages, Log: log}
	ctx := t.Context()
	client, err := New(opts).(*mesh).connect()
	if err != nil {
		t.Fatal(err)
	}
	record := func() *Record {
		t.Helper()
		r, err := readRecord(ctx, client.Kube())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	decide := func(s *server) (Observed, Decision) {
		t.Helper()
		want, err := s.settings.identity()
		if err != nil {
			t.Fatal(err)
		}
		o, err := observe(ctx, client, want)
		if err != nil {
			t.Fatal(err)
		}
		return o, Decide(o, want)
	}

	// A first start that is stopped half way.
	killed := start(t, opts)
	for ctx.Err() == nil {
		if _, err := client.Kube().AppsV1().Deployments(istioNamespace).Get(ctx, "istiod", metav1.GetOptions{}); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := killed.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if r := record(); r == nil || r.Phase != Installing || r.Owner != Ours {
		t.Fatalf("the record of an interrupted installation is %+v", r)
	}

	first := start(t, opts)
	if o, d := decide(first); d.Action != Finish {
		t.Errorf("after an interruption: %+v, %+v", d, o)
	}
	// There is no istiod to publish its certificate.
	if _, err := client.Kube().CoreV1().ConfigMaps(istioNamespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: rootCert}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	first.settle()
	deadline := time.Now().Add(time.Minute)
	for {
		err := first.Ready(ctx)
		if err != nil && strings.HasPrefix(err.Error(), "istiod: 0/1 available: pod istiod-") && strings.Contains(err.Error(), "cannot be scheduled: no nodes available") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("without a node, it says: %v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	class, err := client.Kube().NetworkingV1().IngressClasses().Get(ctx, "istio", metav1.GetOptions{})
	if err != nil || class.Annotations["ingressclass.kubernetes.io/is-default-class"] != "true" {
		t.Errorf("ingress class: %+v, %v", class, err)
	}
	installed := record()
	if installed.Phase != Installed || installed.Version != testImages.Tag || len(installed.Objects) < 20 {
		t.Errorf("record: %+v", installed)
	}
	before := versions(t, client, installed)

	// A restart does nothing, and does not make the ingress class again.
	if err := client.Kube().NetworkingV1().IngressClasses().Delete(ctx, "istio", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	again := start(t, opts)
	again.settle()
	if v := again.Version(); v != testImages.Tag {
		t.Errorf("version %q", v)
	}
	same(t, "restart", before, versions(t, client, record()))

	// What the control plane needs comes back when it is deleted, once it has been missing in two rounds.
	hooks, accounts := client.Kube().AdmissionregistrationV1().MutatingWebhookConfigurations(), client.Kube().CoreV1().ServiceAccounts(istioNamespace)
	const hook, account = "istio-sidecar-injector", "istio-reader-service-account"
	if err := errors.Join(hooks.Delete(ctx, hook, metav1.DeleteOptions{}), hooks.Delete(ctx, "istio-revision-tag-default", metav1.DeleteOptions{}),
		accounts.Delete(ctx, account, metav1.DeleteOptions{})); err != nil {
		t.Fatal(err)
	}
	restorer := &restorer{mesh: again.mesh, client: client}
	if err := restorer.sync(ctx); !errors.As(err, new(converge.Later)) || !strings.Contains(err.Error(), hook) {
		t.Errorf("the first round after a deletion says %v", err)
	}
	if _, err := hooks.Get(ctx, hook, metav1.GetOptions{}); err == nil {
		t.Error("it was put back at once, into what may be an uninstall")
	}
	if err := restorer.sync(ctx); err != nil {
		t.Error(err)
	}
	for _, name := range []string{hook, "istio-revision-tag-default"} {
		if _, err := hooks.Get(ctx, name, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := accounts.Get(ctx, account, metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	installed = record()
	before = versions(t, client, installed)

	// Istio's own installer has nothing to add, which shows that ours does the same.
	upstream(t, client, again.settings)
	same(t, "istioctl install", before, versions(t, client, installed))

	// Nothing that the cluster itself does counts as a change by the user.
	other := opts
	other.ClusterDomain = "other.local"
	next := &server{t, New(other).(*mesh)}
	if o, d := decide(next); d.Action != Upgrade {
		t.Errorf("other settings: %+v, %+v", d, o.Changed)
	}

	testReplicas(t, client, again.mesh)
	testTelemetry(t, client, again.mesh)
	if o, d := decide(next); d.Action != Upgrade {
		t.Errorf("other settings, after the number of nodes has changed: %+v, %+v", d, o.Changed)
	}

	// A user's change is never reverted.
	deployments := client.Kube().AppsV1().Deployments(istioNamespace)
	if _, err := deployments.Patch(ctx, "istiod", types.StrategicMergePatchType,
		[]byte(`{"spec":{"template":{"spec":{"containers":[{"name":"discovery","image":"mine"}]}}}}`), metav1.PatchOptions{FieldManager: "kubectl-edit"}); err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{opts, other} {
		start(t, o).settle()
	}
	d, err := deployments.Get(ctx, "istiod", metav1.GetOptions{})
	if err != nil || d.Spec.Template.Spec.Containers[0].Image != "mine" {
		t.Errorf("the user's image was reverted: %v", err)
	}
	if o, d := decide(next); d.Action != Leave || len(o.Changed) != 1 || o.Changed[0] != "Deployment istio-system/istiod" {
		t.Errorf("after a change: %+v %v", d, o.Changed)
	}

	// `istioctl install` with the same values takes the change back, so it is ours again; the other profile removes the gateway.
	upstream(t, client, again.settings)
	small := opts
	small.Profile = "minimal"
	upgrade := start(t, small)
	upgrade.settle()
	if r := record(); r.Profile != "minimal" || r.Phase != Installed {
		t.Errorf("record after a change of the profile: %+v", r)
	}
	// The garbage collector ends a deletion in the foreground.
	if d, err := deployments.Get(ctx, "istio-ingressgateway", metav1.GetOptions{}); err == nil && d.DeletionTimestamp == nil {
		t.Error("the gateway is still there")
	}

	// An uninstall is never reverted.
	if err := deployments.Delete(ctx, "istiod", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := hooks.Delete(ctx, hook, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := restorer.sync(ctx); err != nil {
			t.Error(err)
		}
	}
	if _, err := hooks.Get(ctx, hook, metav1.GetOptions{}); err == nil {
		t.Error("a webhook of an uninstalled Istio was put back: no pod could start")
	}
	for _, o := range []Options{small, opts} {
		s := start(t, o)
		s.settle()
		if err := s.Ready(ctx); err != nil {
			t.Error(err)
		}
		if s.Version() != "" {
			t.Error("an uninstalled Istio has a version")
		}
	}
	if _, err := deployments.Get(ctx, "istiod", metav1.GetOptions{}); err == nil {
		t.Error("the uninstall was reverted")
	}

	// What `istioctl uninstall --purge` does, and the record deleted, is the way back to an Istio of the server.
	purge := func() {
		t.Helper()
		objects, err := uninstall.GetPrunedResources(client, "", istioNamespace, "", true)
		if err == nil {
			err = uninstall.DeleteObjectsList(client, false, console{slog.New(slog.DiscardHandler)}, objects)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := client.Kube().CoreV1().ConfigMaps(recordNamespace).Delete(ctx, recordName, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	purge()
	// The garbage collector and the API server take their time with webhooks and CRDs: after "storage is (re)initializing" the
	// latter tries again when its informer resyncs, each five minutes.
	for deadline := time.Now().Add(6 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		o, d := decide(next)
		if d.Action == Install {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after a purge: %+v %v", d, o.Present)
		}
	}
	start(t, small).settle()

	// Without a record, what is there is the user's, forever.
	if err := client.Kube().CoreV1().ConfigMaps(recordNamespace).Delete(ctx, recordName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	start(t, opts).settle()
	if r := record(); r == nil || r.Owner != Users {
		t.Errorf("record of a user's Istio: %+v", r)
	}
}

// testReplicas shows that two nodes have two replicas of everything, and that what a user sets stays.
func testReplicas(t *testing.T, client kube.CLIClient, m *mesh) {
	deployments, autoscalers := client.Kube().AppsV1().Deployments(istioNamespace), client.Kube().AutoscalingV2().HorizontalPodAutoscalers(istioNamespace)
	budgets, ctx := client.Kube().PolicyV1().PodDisruptionBudgets(istioNamespace), t.Context()
	want := func(what string, istiod, gateway int32, budget ...string) {
		t.Helper()
		controlplanetest.Eventually(t, what, func() error {
			d, err := deployments.Get(ctx, "istiod", metav1.GetOptions{})
			if err != nil {
				return err
			}
			a, err := autoscalers.Get(ctx, "istio-ingressgateway", metav1.GetOptions{})
			if err != nil {
				return err
			}
			list, err := budgets.List(ctx, metav1.ListOptions{})
			if err != nil {
				return err
			}
			var names []string
			for _, b := range list.Items {
				names = append(names, b.Name)
			}
			if *d.Spec.Replicas != istiod || *a.Spec.MinReplicas != gateway || !slices.Equal(names, budget) {
				return fmt.Errorf("%d istiods, at least %d gateways, budgets %v", *d.Spec.Replicas, *a.Spec.MinReplicas, names)
			}
			return nil
		})
	}
	const ingress = "istio-ingressgateway"
	want("no node", 1, 1)
	for _, name := range []string{"node-1", "node-2"} {
		controlplanetest.ReadyNode(t, client.Kube(), name)
	}
	want("two nodes", 2, 2, ingress, "istiod")

	// A budget of the user's for the same pods is enough.
	own, err := budgets.Create(ctx, &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "mine"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"istio": "ingressgateway"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.scaler.loop.Kick()
	want("a user's budget", 2, 2, "istiod", own.Name)
	if err := budgets.Delete(ctx, own.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	scale, err := deployments.GetScale(ctx, "istiod", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	scale.Spec.Replicas, scale.ResourceVersion = 3, "" // whatever the controllers write meanwhile
	if _, err := deployments.UpdateScale(ctx, "istiod", scale, metav1.UpdateOptions{FieldManager: "kubectl"}); err != nil {
		t.Fatal(err)
	}
	if err := client.Kube().CoreV1().Nodes().Delete(ctx, "node-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	want("one node again", 3, 1)
}

// testTelemetry shows that the resource is created once, makes way for a user's, and goes with the store; the rest of the installation stays as it is.
func testTelemetry(t *testing.T, client kube.CLIClient, m *mesh) {
	ctx := t.Context()
	resources, err := client.DynamicClientFor(telemetryKind, nil, istioNamespace)
	if err != nil {
		t.Fatal(err)
	}
	// A round of a server with these settings, of which the loop of m knows nothing: that one wants none.
	if err := m.restore.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	round := func(want Telemetry) *restorer {
		t.Helper()
		r := &restorer{mesh: &mesh{log: m.log, settings: m.settings, wanted: want}, client: client}
		controlplanetest.Eventually(t, "a round", func() error { return r.telemetry(ctx) })
		return r
	}
	spec := func() map[string]any {
		t.Helper()
		obj, err := resources.Get(ctx, telemetryName, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		s, _ := obj.Object["spec"].(map[string]any)
		return s
	}
	expect := func(what string, parts ...string) {
		t.Helper()
		if got := slices.Sorted(maps.Keys(spec())); !slices.Equal(got, parts) {
			t.Errorf("%s: the resource has %q, want %q", what, got, parts)
		}
	}
	user := func(name string, spec map[string]any) {
		t.Helper()
		obj := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
		obj.SetGroupVersionKind(telemetryKind)
		obj.SetNamespace(istioNamespace)
		obj.SetName(name)
		if _, err := resources.Create(ctx, obj, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := resources.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	all := Telemetry{Traces: true, AccessLogs: true}
	sampling := map[string]any{"tracing": []any{map[string]any{"randomSamplingPercentage": int64(1)}}}

	round(Telemetry{})
	expect("without the store")
	user("mesh-default", sampling)
	if notes := round(all).Notes(ctx); len(notes) != 1 || !strings.Contains(notes[0], "istio-system/mesh-default") {
		t.Errorf("notes %q", notes)
	}
	expect("the user's was first")
	remove("mesh-default")
	user("gateways", map[string]any{"selector": map[string]any{"matchLabels": map[string]any{"istio": "ingressgateway"}}, "tracing": sampling["tracing"]})
	if notes := round(all).Notes(ctx); len(notes) > 0 {
		t.Errorf("notes %q", notes)
	}
	expect("the user's is for some pods", "accessLogging", "tracing")
	round(Telemetry{AccessLogs: true})
	expect("other settings", "accessLogging")
	user("mesh-default", sampling)
	round(all)
	expect("the user's came")
	remove("mesh-default")
	round(all)
	expect("it is gone", "accessLogging", "tracing")
	round(Telemetry{})
	expect("the store is off")
	round(all)
	expect("and on", "accessLogging", "tracing")
	if _, err := resources.Patch(ctx, telemetryName, types.MergePatchType, []byte(`{"spec":{"tracing":[{"providers":[{"name":"jaeger"}],"randomSamplingPercentage":5}]}}`), metav1.PatchOptions{FieldManager: "kubectl-edit"}); err != nil {
		t.Fatal(err)
	}
	round(Telemetry{AccessLogs: true})
	round(Telemetry{})
	expect("changed by the user", "accessLogging", "tracing")
	remove(telemetryName)
	round(all)
	expect("deleted by the user")
	remove("gateways")
	m.restore = nil // it was stopped
}

// upstream does what `istioctl install` does with these settings, without waiting for pods.
func upstream(t *testing.T, client kube.CLIClient, s settings) {
	t.Helper()
	log := console{slog.New(slog.DiscardHandler)}
	sets, values, err := s.manifests(client, log)
	if err != nil {
		t.Fatal(err)
	}
	err = install.Installer{Kube: client, SkipWait: true, Values: values, Logger: log, ProgressLogger: progress.NewLog()}.InstallManifests(sets)
	if err != nil {
		t.Fatal(err)
	}
}
