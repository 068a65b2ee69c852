package diagnose

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"
)

var update = flag.Bool("update", false, "write the golden file")

// read reads what was recorded of a node: a pod with its status as the kubelet writes it, and the warnings about it.
func read(t *testing.T, file string) (pod *corev1.Pod, objects []runtime.Object) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	documents := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	for {
		document := make([]byte, len(text))
		n, err := documents.Read(document)
		if errors.Is(err, io.EOF) {
			return pod, objects
		}
		if err != nil {
			t.Fatal(err)
		}
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(document[:n], nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := o.(*corev1.Pod); ok {
			pod = p
		}
		objects = append(objects, o)
	}
}

// deployment is the Deployment of a pod.
func deployment(t *testing.T, pod *corev1.Pod) *unstructured.Unstructured {
	t.Helper()
	template := &corev1.PodTemplateSpec{Spec: *pod.Spec.DeepCopy()}
	template.Spec.InitContainers = nil // those of a mesh
	spec, err := runtime.DefaultUnstructuredConverter.ToUnstructured(template)
	if err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": pod.Labels["app"], "namespace": pod.Namespace},
		"spec": map[string]any{"selector": map[string]any{"matchLabels": map[string]any{"app": pod.Labels["app"]}}, "template": spec},
	}}
	return u
}

// explain is what a user reads. The field stands where deploy puts file and line.
func explain(t *testing.T, workload *unstructured.Unstructured, objects ...runtime.Object) string {
	t.Helper()
	client := fake.NewClientset(objects...)
	found, err := Workload(t.Context(), client, "deployment.apps/"+workload.GetName(), workload)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range found {
		if len(f.Places) > 0 {
			f.At = strings.TrimPrefix(f.Places[0].Object+" ", " ") + strings.Join(f.Places[0].Path, ".")
		}
		b.WriteString(f.String() + "\n")
		if f.Final {
			b.WriteString("    (waiting does not help)\n")
		}
	}
	for _, action := range client.Actions() {
		if verb := action.GetVerb(); verb != "get" && verb != "list" {
			t.Errorf("it does more than read: %s %s", verb, action.GetResource().Resource)
		}
	}
	return b.String()
}

func TestExplained(t *testing.T) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d recorded pods: %v", len(files), err)
	}
	var got strings.Builder
	for _, file := range files {
		pod, objects := read(t, file)
		got.WriteString(explain(t, deployment(t, pod), objects...) + "\n")
	}
	golden := filepath.Join("testdata", "explained.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("%s (go test -update writes it again) is not:\n%s", golden, got.String())
	}
}

// TestRows are the rows that the recorded pods do not have. The messages are those of Kubernetes 1.36 and containerd 2.
func TestRows(t *testing.T) {
	base := func() *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "api-1", Namespace: "shop", UID: "1", Labels: map[string]string{"app": "api"}},
			Spec: corev1.PodSpec{
				Containers: []corev1.Container{{Name: "log"}, {Name: "api", Image: "shop/api:1", EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "db"}}}}}},
				Volumes:    []corev1.Volume{{Name: "certs"}, {Name: "data"}},
			},
			Status: corev1.PodStatus{Phase: corev1.PodPending},
		}
	}
	waiting := func(reason, message string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "api", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}
		}
	}
	unschedulable := func(message string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: message}}
		}
	}
	warning := func(reason, message, fieldPath string, count int32) runtime.Object {
		return &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "shop"}, Type: "Warning", Reason: reason, Message: message, Count: count,
			InvolvedObject: corev1.ObjectReference{UID: "1", Name: "api-1", FieldPath: fieldPath}}
	}
	namespace := func(labels map[string]string) runtime.Object {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: labels}}
	}
	running := func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }

	for name, c := range map[string]struct {
		pod     func(*corev1.Pod)
		objects []runtime.Object
		want    []string // parts; none means that nothing is found
	}{
		"taint": {unschedulable("0/1 nodes are available: 1 node(s) had untolerated taint(s). no new claims to deallocate"), nil,
			[]string{"spec.template.spec.tolerations: Pending: ", "untolerated taint(s)\n", "add a toleration"}},
		"volume claim": {unschedulable(`0/1 nodes are available: persistentvolumeclaim "data" not found. not found`), nil,
			[]string{"spec.template.spec.volumes: Pending: ", "kubectl get pvc"}},
		"login": {waiting("ErrImagePull", `failed to pull and unpack image "registry.example.com/api:1": failed to authorize: failed to fetch anonymous token: unexpected status: 401 Unauthorized`), nil,
			[]string{"spec.template.spec.containers.1.image: ImagePull: ", "imagePullSecrets", "(waiting does not help)"}},
		"no such tag": {waiting("ImagePullBackOff", `Back-off pulling image "shop/api:1": ErrImagePull: rpc error: code = NotFound desc = failed to pull and unpack image "docker.io/shop/api:1": failed to resolve image: docker.io/shop/api:1: not found`), nil,
			[]string{"no such image or tag", "    failed to resolve image: docker.io/shop/api:1: not found\n", "(waiting does not help)"}},
		"envFrom": {waiting("CreateContainerConfigError", `secret "db" not found`), nil,
			[]string{"spec.template.spec.containers.1.envFrom.0: Configuration: ", `    secret "db" not found`}},
		"too little memory to start": {waiting("RunContainerError", `failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: container init was OOM-killed (memory limit too low?): unknown`), nil,
			[]string{"resources.limits.memory: OutOfMemory: ", "raise the memory limit"}},
		"another architecture": {waiting("RunContainerError", `failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: exec /api: exec format error`), nil,
			[]string{"containers.1.image: Crash: ", "architecture"}},
		"volume": {func(p *corev1.Pod) {}, []runtime.Object{warning("FailedMount", `MountVolume.SetUp failed for volume "data" : secret "nope" not found`, "", 1)},
			[]string{"spec.template.spec.volumes.1: Configuration: ", `secret "nope" not found`}},
		"a probe that failed once": {running, []runtime.Object{warning("Unhealthy", "Readiness probe failed: connection refused", "spec.containers{api}", 1)}, nil},
		"a probe of a container that is ready since": {func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "api", Ready: true}}
		}, []runtime.Object{warning("Unhealthy", "Startup probe failed: connection refused", "spec.containers{api}", 9)}, nil},
		"older than the label": {running, []runtime.Object{namespace(map[string]string{"istio-injection": "enabled"})},
			[]string{"InjectionMissing: ", "kubectl rollout restart deployment/api -n shop"}},
		"an unlabelled namespace": {running, []runtime.Object{namespace(nil)}, nil},
		"a pod that opts out": {func(p *corev1.Pod) { running(p); p.Labels["sidecar.istio.io/inject"] = "false" },
			[]runtime.Object{namespace(map[string]string{"istio-injection": "enabled"})}, nil},
		"no such revision": {running, []runtime.Object{namespace(map[string]string{"istio.io/rev": "canary"})},
			[]string{`namespace/shop metadata.labels.istio.io/rev: InjectionMissing: `, `revision "canary", and no control plane has it`}},
		"a revision's tag": {running, []runtime.Object{namespace(map[string]string{"istio.io/rev": "canary"}),
			&admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"istio.io/tag": "canary"}}}},
			[]string{"it is older than the namespace's label"}},
	} {
		t.Run(name, func(t *testing.T) {
			pod := base()
			c.pod(pod)
			check(t, explain(t, deployment(t, pod), append(c.objects, pod)...), c.want)
		})
	}
}

// What a user may not read does not hide what can be read.
func TestForbidden(t *testing.T) {
	for _, resource := range []string{"namespaces", "events"} {
		broken, objects := read(t, "testdata/pods/exit.yaml")
		started := broken.DeepCopy()
		started.Name, started.UID = "a-starting", "other"
		delete(started.Labels, "sidecar.istio.io/inject")
		started.Status = corev1.PodStatus{Phase: corev1.PodRunning}
		client := fake.NewClientset(append(objects, started)...)
		client.PrependReactor("*", resource, func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: resource}, "", errors.New("not for this user"))
		})
		found, err := Workload(t.Context(), client, "deployment.apps/api", deployment(t, broken))
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: it returns %v", resource, err)
		}
		if !slices.ContainsFunc(found, func(f Finding) bool { return f.Reason == Crash }) {
			t.Errorf("%s: it finds %v", resource, found)
		}
	}
}

func TestNoPods(t *testing.T) {
	const quota = `pods "api-6f-x" is forbidden: exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1`
	failed := func(object, message string) runtime.Object {
		return &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "shop"}, Type: "Warning", Reason: "FailedCreate", Message: message, InvolvedObject: corev1.ObjectReference{Name: object}}
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "api-1", Namespace: "shop", Labels: map[string]string{"app": "api"}}, Status: corev1.PodStatus{
		Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}}
	want := []string{"resourcequota/small -n shop spec.hard.pods: Refused: ", "lower the replicas"}
	t.Run("quota", func(t *testing.T) {
		check(t, explain(t, deployment(t, pod), failed("api-6f", quota)), want)
	})
	t.Run("quota while an old pod is well", func(t *testing.T) {
		workload := deployment(t, pod)
		condition := map[string]any{"type": "ReplicaFailure", "status": "True", "message": quota}
		if err := unstructured.SetNestedSlice(workload.Object, []any{condition}, "status", "conditions"); err != nil {
			t.Fatal(err)
		}
		check(t, explain(t, workload, pod), want)
	})
	t.Run("a workload whose name begins alike", func(t *testing.T) {
		check(t, explain(t, deployment(t, pod), failed("api-gateway-6f", quota)), nil)
	})
	t.Run("pod security", func(t *testing.T) {
		const violates = `pods "api-6f-x" is forbidden: violates PodSecurity "restricted:latest": `
		check(t, explain(t, deployment(t, pod), failed("api-6f", violates+`unrestricted capabilities (container "istio-init" must not include "NET_ADMIN", "NET_RAW")`)),
			[]string{"Refused: ", "kubectl label namespace shop pod-security.kubernetes.io/enforce=privileged", "waiting does not help"})
		check(t, explain(t, deployment(t, pod), failed("api-6f", violates+`runAsNonRoot != true (pod or container "api" must set securityContext.runAsNonRoot=true)`)),
			[]string{"Refused: ", "change what the message names", "waiting does not help"})
	})
	t.Run("injection", func(t *testing.T) {
		check(t, explain(t, deployment(t, pod), failed("api-6f", `failed calling webhook "namespace.sidecar-injector.istio.io": connection refused`)), []string{"InjectionMissing: ", "polymesh status"})
	})
}

func check(t *testing.T, got string, want []string) {
	t.Helper()
	if len(want) == 0 && got != "" {
		t.Errorf("want nothing, got:\n%s", got)
	}
	for _, part := range want {
		if !strings.Contains(got, part) {
			t.Errorf("want %q in:\n%s", part, got)
		}
	}
}

// A program's two streams reach the log in either order. What it wrote is told in the order in which it was told before.
func TestOutputKeepsItsOrder(t *testing.T) {
	ended := func(text string) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: "app", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3, Message: text}}}
	}
	var before map[string]string
	for _, step := range []struct{ wrote, told string }{
		{"INFO starting\nERROR no file", "INFO starting\nERROR no file"},
		{"ERROR no file\nINFO starting", "INFO starting\nERROR no file"},
		{"ERROR no space\nINFO starting", "ERROR no space\nINFO starting"},
		{"ERROR no space\nERROR no space", "ERROR no space\nERROR no space"},
	} {
		w := &examination{output: before}
		if got := w.lastOutput(t.Context(), &corev1.Pod{}, ended(step.wrote)); got != step.told {
			t.Errorf("it wrote %q, and %q is told", step.wrote, got)
		}
		before = w.written
	}
}
