package rollout

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s (go test -update writes it again) is not:\n%s", file, got)
	}
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text), into); err != nil {
		t.Fatal(err)
	}
}

// route is a VirtualService as the API server gives it.
func route(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	data, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(data); err != nil {
		t.Fatal(err)
	}
	return u
}

func render(t *testing.T, objects ...any) []byte {
	t.Helper()
	var out bytes.Buffer
	for i, o := range objects {
		text, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			out.WriteString("---\n")
		}
		out.Write(text)
	}
	return out.Bytes()
}

const stableText = `
apiVersion: apps/v1
kind: Deployment
metadata:
  name: api
  namespace: shop
  uid: u-1
  labels: {app: api, applyset.kubernetes.io/part-of: applyset-x}
  annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
spec:
  replicas: 3
  paused: true
  selector: {matchLabels: {app: api}}
  template:
    metadata:
      labels: {app: api, version: v1}
      annotations: {prometheus.io/scrape: "true"}
    spec:
      containers:
      - {name: api, image: "shop/api:1.0.0"}
      - {name: log, image: "log:1"}
`

func state() *State {
	return &State{Name: "api", Namespace: "shop", Spec: Spec{Container: "api", Image: "shop/api:1.1.0", Previous: "shop/api:1.0.0", VersionLabel: "version", Version: "v1", Plan: plan()}}
}

// The canary keeps every label that a policy may select by, and none that would make it a project's.
func TestObjects(t *testing.T) {
	stable := &appsv1.Deployment{}
	decode(t, stableText, stable)
	canary, err := runtime.DefaultUnstructuredConverter.ToUnstructured(canaryDeployment(stable, state(), 1))
	if err != nil {
		t.Fatal(err)
	}
	h := &host{service: "api", own: true, tcp: []int32{9000}, exportTo: []any{"."}, policy: map[string]any{"loadBalancer": map[string]any{"simple": "RANDOM"}},
		subsets: map[string]subset{"": {}, "v1": {labels: map[string]string{"version": "v1", "zone": "a"}, policy: map[string]any{"connectionPool": map[string]any{}}}}}
	r := &routing{hosts: []*host{h}}
	vs := h.virtualService(state(), ownerOf(stable))
	if err := setWeight(vs, r.leads("shop"), 10); err != nil {
		t.Fatal(err)
	}
	golden(t, "objects.yaml", render(t, canary, h.destinationRule(state(), ownerOf(stable)).Object, vs.Object))
	if stable.Spec.Template.Labels["version"] != "v1" || stable.Spec.Template.Spec.Containers[0].Image != "shop/api:1.0.0" {
		t.Error("making the canary has changed the Deployment that it is a copy of")
	}
}

// routesText has every kind of route: a lone one, one with weights, with subsets, to others, by TCP.
const routesText = `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example.com]
  http:
  - match: [{uri: {prefix: /lone}}]
    route:
    - destination: {host: api, port: {number: 80}}
    timeout: 3s
  - match: [{uri: {prefix: /explicit}}]
    route:
    - {destination: {host: api.shop.svc.cluster.local}, weight: 100}
  - match: [{uri: {prefix: /mixed}}]
    route:
    - {destination: {host: api, subset: v1}, weight: 75, headers: {request: {set: {x: z}}}}
    - {destination: {host: api, subset: v2}, weight: 20}
    - {destination: {host: other}, weight: 5}
  - match: [{uri: {prefix: /none}}]
    route:
    - destination: {host: other}
  - redirect: {uri: /}
  tcp:
  - match: [{port: 9000}]
    route:
    - destination: {host: api}
`

func TestWeights(t *testing.T) {
	r := &routing{hosts: []*host{{service: "api", subsets: map[string]subset{"": {}, "v1": {}}}}}
	to := r.leads("shop")
	original := route(t, routesText)
	vs := original.DeepCopy()
	for _, weight := range []int64{0, 10, 50} {
		if err := setWeight(vs, to, weight); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "weights.yaml", render(t, vs.Object))
	if err := removeWeights(vs, to); err != nil {
		t.Fatal(err)
	}
	if !equality.Semantic.DeepEqual(vs.Object, original.Object) {
		t.Errorf("put together it is\n%s", render(t, vs.Object))
	}
	if err := removeWeights(vs, to); err != nil || !equality.Semantic.DeepEqual(vs.Object, original.Object) {
		t.Errorf("put together twice it is %v\n%s", err, render(t, vs.Object))
	}
}

// Two rollouts may share a VirtualService, and end in any order.
func TestWeightsOfTwoRollouts(t *testing.T) {
	one := (&routing{hosts: []*host{{service: "api", subsets: map[string]subset{"": {}, "v1": {}}}}}).leads("shop")
	two := (&routing{hosts: []*host{{service: "other", subsets: map[string]subset{"": {}}}}}).leads("shop")
	for _, first := range []bool{true, false} {
		original := route(t, routesText)
		vs := original.DeepCopy()
		for _, set := range []struct {
			to     leads
			weight int64
		}{{one, 10}, {two, 30}, {one, 50}, {two, 100}} {
			if err := setWeight(vs, set.to, set.weight); err != nil {
				t.Fatal(err)
			}
		}
		ends := []leads{one, two}
		if !first {
			ends = []leads{two, one}
		}
		for _, to := range ends {
			if err := removeWeights(vs, to); err != nil {
				t.Fatal(err)
			}
		}
		if !equality.Semantic.DeepEqual(vs.Object, original.Object) {
			t.Errorf("first %v: put together it is\n%s", first, render(t, vs.Object))
		}
	}
}

// What someone has written into a split route meanwhile stays as far as it can.
func TestUnsplitEdited(t *testing.T) {
	to := (&routing{hosts: []*host{{service: "api", subsets: map[string]subset{"": {}}}}}).leads("shop")
	for text, want := range map[string]string{
		`[{destination: {host: api, subset: polymesh-stable}, weight: 7}]`:                                                                         `[{destination: {host: api}, weight: 7}]`,
		`[{destination: {host: api, subset: polymesh-canary}, weight: 10}, {destination: {host: other}, weight: 3}]`:                               `[{destination: {host: api}, weight: 10}, {destination: {host: other}, weight: 3}]`,
		`[{destination: {host: api, subset: polymesh-stable-v1}, weight: 90}, {destination: {host: api, subset: polymesh-canary-v1}, weight: 10}]`: `[{destination: {host: api, subset: v1}}]`,
		`[{destination: {host: api, subset: polymesh-stables}}]`:                                                                                   `[{destination: {host: api, subset: polymesh-stables}}]`,
	} {
		const head = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: x, namespace: shop}\nspec: {http: [{route: "
		vs, expected := route(t, head+text+"}]}"), route(t, head+want+"}]}")
		if err := removeWeights(vs, to); err != nil {
			t.Fatal(err)
		}
		if !equality.Semantic.DeepEqual(vs.Object, expected.Object) {
			t.Errorf("%s became\n%s", text, render(t, vs.Object))
		}
	}
}

func TestVersionOf(t *testing.T) {
	d := &appsv1.Deployment{}
	decode(t, stableText, d)
	if label, value, err := versionOf(d); label != "version" || value != "v1" || err != nil {
		t.Errorf("got %s=%s, %v", label, value, err)
	}
	d.Spec.Template.Labels = map[string]string{"app": "api", "app.kubernetes.io/version": "1.2"}
	if label, value, err := versionOf(d); label != "app.kubernetes.io/version" || value != "1.2" || err != nil {
		t.Errorf("got %s=%s, %v", label, value, err)
	}
	delete(d.Spec.Template.Labels, "app.kubernetes.io/version")
	if _, _, err := versionOf(d); err == nil || !strings.Contains(err.Error(), "add `version: v1` to spec.template.metadata.labels") {
		t.Errorf("without a label: %v", err)
	}
	if mark := canaryMark(strings.Repeat("a", 55) + "-bbbbbbbb"); len(mark) > maxLabel || strings.Contains(mark, "--") || !strings.HasSuffix(mark, "a-canary") {
		t.Errorf("the mark is %q", mark)
	}
}

func TestContainerOf(t *testing.T) {
	d := &appsv1.Deployment{}
	decode(t, stableText, d)
	if i, err := containerOf(d, "log"); i != 1 || err != nil {
		t.Errorf("got %d, %v", i, err)
	}
	for name, want := range map[string]string{"": "choose one with --container, one of api, log", "x": "has no container x: it has api, log"} {
		if _, err := containerOf(d, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestReplicasFor(t *testing.T) {
	for _, c := range []struct{ all, weight, want int }{{3, 10, 1}, {3, 50, 2}, {3, 100, 3}, {0, 50, 1}, {10, 11, 2}} {
		if got := replicasFor(int32(c.all), c.weight); int(got) != c.want {
			t.Errorf("%d pods at %d %%: %d, want %d", c.all, c.weight, got, c.want)
		}
	}
}
