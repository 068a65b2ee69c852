package deploy

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"istio.io/istio/pkg/config/analysis/diag"
	"istio.io/istio/pkg/config/analysis/msg"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// objects reads manifests as a project does.
func objects(t *testing.T, text string) []project.Object {
	t.Helper()
	found, _, err := written(t, text).Objects()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// written is a project with one file of manifests, k8s/all.yaml.
func written(t *testing.T, text string) *project.Project {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "k8s"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "k8s", "all.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err := project.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func unstructuredOf(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatal(err)
	}
	return u
}

func TestOrder(t *testing.T) {
	var text strings.Builder
	for _, kind := range []string{"VirtualService", "Deployment", "Widget", "DestinationRule", "Gateway", "Service", "ConfigMap", "HorizontalPodAutoscaler", "Namespace", "ServiceAccount"} {
		text.WriteString("apiVersion: v1\nkind: " + kind + "\nmetadata: {name: x}\n---\n")
	}
	found := objects(t, text.String())
	slices.SortStableFunc(found, func(a, b project.Object) int { return rank(a) - rank(b) })
	var got []string
	for _, o := range found {
		got = append(got, o.GetKind())
	}
	if want := "Namespace ServiceAccount ConfigMap Service DestinationRule Deployment Widget HorizontalPodAutoscaler Gateway VirtualService"; strings.Join(got, " ") != want {
		t.Errorf("the order is %v, want %s", got, want)
	}
}

func TestMasked(t *testing.T) {
	before := unstructuredOf(t, "apiVersion: v1\nkind: Secret\nmetadata: {name: db}\ndata: {same: c2VjcmV0, changed: b2xk}\n")
	after := unstructuredOf(t, "apiVersion: v1\nkind: Secret\nmetadata: {name: db}\ndata: {same: c2VjcmV0, changed: bmV3, added: YWRkZWQ=}\n")
	const want = "apiVersion: v1\ndata:\n  added: '*** (differs)'\n  changed: '*** (differs)'\n  same: '***'\nkind: Secret\nmetadata:\n  name: db\n"
	if got := text(masked(after, before)); got != want {
		t.Errorf("got:\n%s", got)
	}
	if got := after.Object["data"].(map[string]any)["same"]; got != "c2VjcmV0" {
		t.Errorf("masking has changed what is applied: %v", got)
	}
	if got := text(masked(after, nil)); strings.Contains(got, "bmV3") || strings.Contains(got, "c2VjcmV0") {
		t.Errorf("a new Secret is shown:\n%s", got)
	}
	before.SetAnnotations(map[string]string{corev1.LastAppliedConfigAnnotation: `{"data":{"same":"c2VjcmV0"}}`})
	if got := text(masked(before, after)); strings.Contains(got, "c2VjcmV0") {
		t.Errorf("what kubectl has applied is shown:\n%s", got)
	}
	settings := unstructuredOf(t, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: b}\n")
	if masked(settings, nil) != settings {
		t.Error("a ConfigMap is masked")
	}
}

func TestDropReplicas(t *testing.T) {
	found := objects(t, `apiVersion: apps/v1
kind: Deployment
metadata: {name: scaled}
spec: {replicas: 2}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: fixed}
spec: {replicas: 2}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: x}
spec: {scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: scaled}}
`)
	dropReplicas(found)
	for _, o := range found[:2] {
		if _, has, _ := unstructured.NestedFieldNoCopy(o.Object, "spec", "replicas"); has != (o.GetName() == "fixed") {
			t.Errorf("%s has replicas: %v", o.GetName(), has)
		}
	}
}

// Where an object goes is decided once, also for kinds that the project itself defines and the cluster does not know yet.
func TestSetNamespace(t *testing.T) {
	const definition = "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata: {name: %[1]ss.example.com}\nspec: {group: example.com, scope: %[2]s, names: {kind: %[1]s}}\n---\n"
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.Add(schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, meta.RESTScopeNamespace)
	mapper.Add(schema.GroupVersionKind{Version: "v1", Kind: "PersistentVolume"}, meta.RESTScopeRoot)
	found := objects(t, fmt.Sprintf(definition, "Widget", "Namespaced")+fmt.Sprintf(definition, "Factory", "Cluster")+`
apiVersion: example.com/v1
kind: Widget
metadata: {name: a}
---
apiVersion: example.com/v1
kind: Factory
metadata: {name: a}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: a}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: b, namespace: other}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: a}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: b, namespace: shop}
---
apiVersion: example.com/v1
kind: Gadget
metadata: {name: a}
`)
	d := &deployment{objects: found, cluster: &cluster.Cluster{Mapper: mapper}, Options: Options{Project: &project.Project{Namespace: "shop"}}}
	for i, want := range []struct{ namespace, refused string }{
		{"shop", ""}, {"", ""}, {"shop", ""}, {"other", ""}, {"", ""}, {"shop", "a PersistentVolume has no namespace"}, {"", "does not know the kind Gadget"},
	} {
		o := found[i+2]
		err := d.setNamespace(o)
		if o.GetNamespace() != want.namespace || (err == nil) != (want.refused == "") || err != nil && !strings.Contains(err.Error(), want.refused) {
			t.Errorf("%s %s: namespace %q, %v", o.GetKind(), o.GetName(), o.GetNamespace(), err)
		}
	}
}

func TestContainers(t *testing.T) {
	found := containers(objects(t, `apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec: {template: {spec: {initContainers: [{name: i, image: "init:1"}], containers: [{name: c, image: "app:1"}, {name: auto}]}}}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: b}
spec:
  jobTemplate:
    spec:
      template:
        spec:
          containers:
            - image: job:1
---
apiVersion: example.com/v1
kind: Widgets
metadata: {name: c}
spec: {parts: [{pod: {containers: [{image: "widget:1"}]}}], containers: none}
`))
	var got []string
	for _, c := range found {
		got = append(got, c.image+" "+strings.Join(c.path, "."))
	}
	slices.Sort(got)
	want := []string{"app:1 spec.template.spec.containers.0", "init:1 spec.template.spec.initContainers.0",
		"job:1 spec.jobTemplate.spec.template.spec.containers.0", "widget:1 spec.parts.0.pod.containers.0"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	i := slices.IndexFunc(found, func(c container) bool { return c.image == "job:1" })
	if at := found[i].at(); at != "k8s/all.yaml:15" {
		t.Errorf("job:1 is at %s", at)
	}
}

func TestExplainApply(t *testing.T) {
	o := objects(t, "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: api}\nspec:\n  replicas: 1\n  selector:\n    matchLabels: {app: api}\n  template:\n    spec:\n      containers:\n        - name: api\n          image: \"\"\n")[0]
	d := &deployment{}
	invalid := func(e *field.Error) error {
		return d.explainApply(o, apierrors.NewInvalid(schema.GroupKind{Group: "apps", Kind: "Deployment"}, "api", field.ErrorList{e}))
	}
	if got := invalid(field.Required(field.NewPath("spec", "template", "spec", "containers").Index(0).Child("image"), "")).Error(); !strings.HasPrefix(got, "k8s/all.yaml:12: ") {
		t.Errorf("got %q", got)
	}
	got := invalid(field.Invalid(field.NewPath("spec", "selector"), nil, "field is immutable")).Error()
	if !strings.HasPrefix(got, "k8s/all.yaml:6: ") || !strings.HasSuffix(got, "(kubectl delete deployment.apps/api), or give the new one another name") {
		t.Errorf("got %q", got)
	}
}

const routes = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop, namespace: shop}
spec:
  hosts: [shop.example.com]
  gateways:
    - mesh
    - no-such-gateway
  http:
    - route:
        - destination: {host: api}
        - destination:
            host: none
            subset: v9
`

func TestExplain(t *testing.T) {
	o := objects(t, routes)[0]
	for name, c := range map[string]struct {
		message diag.Message
		reason  diagnose.Reason
		advice  string
		at      string
	}{
		"gateway":  {msg.NewReferencedResourceNotFound(nil, "gateway", "no-such-gateway"), diagnose.GatewayMismatch, "create the Gateway", "k8s/all.yaml:8"},
		"host":     {msg.NewReferencedResourceNotFound(nil, "host", "none"), diagnose.GatewayMismatch, "create a Service", "k8s/all.yaml:13"},
		"subset":   {msg.NewReferencedResourceNotFound(nil, "host+subset in destinationrule", "none+v9"), diagnose.GatewayMismatch, "add the subset v9 to a DestinationRule of none", "k8s/all.yaml:14"},
		"hosts":    {msg.NewVirtualServiceHostNotFoundInGateway(nil, []string{"x"}, "shop", "shop"), diagnose.GatewayMismatch, "the same host", "k8s/all.yaml:5"},
		"anything": {msg.NewVirtualServiceUnreachableRule(nil, "x", "y"), diagnose.Istio, "https://istio.io/latest/docs/reference/config/analysis/ist0130/", "k8s/all.yaml:1"},
	} {
		reason, advice, path := explain(o, c.message)
		if at := o.At(path...); reason != c.reason || !strings.Contains(advice, c.advice) || at != c.at {
			t.Errorf("%s: %s at %s: %s", name, reason, at, advice)
		}
	}
}

func TestStrict(t *testing.T) {
	policy := func(namespace, name, selector, mode string) *unstructured.Unstructured {
		spec := "{mtls: {mode: " + mode + "}}"
		if selector != "" {
			spec = "{selector: {matchLabels: {app: " + selector + "}}, mtls: {mode: " + mode + "}}"
		}
		return unstructuredOf(t, "metadata: {name: "+name+", namespace: "+namespace+"}\nspec: "+spec)
	}
	mesh, namespace := policy("istio-system", "mesh", "", "STRICT"), policy("shop", "all", "", "PERMISSIVE")
	workload, unset := policy("shop", "api", "api", "STRICT"), policy("shop", "unset", "", "UNSET")
	other := policy("other", "all", "", "STRICT")
	for name, c := range map[string]struct {
		policies []*unstructured.Unstructured
		want     string
	}{
		"none":                        {nil, ""},
		"the mesh's":                  {[]*unstructured.Unstructured{mesh, other}, "mesh -n istio-system"},
		"the namespace's is nearer":   {[]*unstructured.Unstructured{mesh, namespace}, ""},
		"the workload's is nearest":   {[]*unstructured.Unstructured{mesh, namespace, workload}, "api -n shop"},
		"UNSET leaves it to the mesh": {[]*unstructured.Unstructured{unset, mesh}, "mesh -n istio-system"},
		"another namespace's":         {[]*unstructured.Unstructured{other}, ""},
	} {
		if got := strict(c.policies, "shop", map[string]string{"app": "api"}); strings.TrimPrefix(got, "peerauthentication.security.istio.io/") != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestNoMTLS(t *testing.T) {
	for spec, want := range map[string]string{
		"{host: api}": "",
		"{trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}":                                      "",
		"{trafficPolicy: {tls: {mode: DISABLE}}}":                                           "spec.trafficPolicy.tls.mode",
		"{trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE}}]}}": "spec.trafficPolicy.portLevelSettings.0.tls.mode",
		"{subsets: [{name: v1}, {name: v2, trafficPolicy: {tls: {mode: DISABLE}}}]}":        "spec.subsets.1.trafficPolicy.tls.mode",
	} {
		if got := strings.Join(noMTLS(unstructuredOf(t, "spec: "+spec).Object), "."); got != want {
			t.Errorf("%s: %q", spec, got)
		}
	}
	for host, want := range map[string]string{"api": "api/shop", "api.other": "api/other", "api.other.svc.cluster.local": "api/other", "db.example.com": "/", "*.shop.svc.cluster.local": "/"} {
		if name, namespace := serviceOfHost(host, "shop"); name+"/"+namespace != want {
			t.Errorf("%s is %s/%s", host, name, namespace)
		}
	}
}
