package install

import (
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// live is a Deployment as an API server returns it after a server-side apply by Istio's installer.
const live = `
apiVersion: apps/v1
kind: Deployment
metadata:
  name: istiod
  namespace: istio-system
  uid: 11111111-2222-3333-4444-555555555555
  labels: {app: istiod}
  managedFields:
  - manager: istio-operator
    operation: Apply
    apiVersion: apps/v1
    fieldsType: FieldsV1
    fieldsV1:
      f:metadata: {f:labels: {f:app: {}}}
      f:spec:
        f:selector: {}
        f:template:
          f:spec:
            f:containers:
              k:{"name":"discovery"}:
                .: {}
                f:name: {}
                f:image: {}
                f:args: {}
                f:ports:
                  k:{"containerPort":8080,"protocol":"TCP"}: {.: {}, f:containerPort: {}}
                f:env:
                  k:{"name":"A"}: {.: {}, f:name: {}, f:value: {}}
  - manager: kube-controller-manager
    operation: Update
    apiVersion: apps/v1
    fieldsType: FieldsV1
    fieldsV1: {f:status: {f:replicas: {}}}
spec:
  replicas: 1
  selector: {matchLabels: {app: istiod}}
  template:
    spec:
      containers:
      - name: discovery
        image: pilot:1
        args: [discovery, --x]
        ports: [{containerPort: 8080, protocol: TCP}]
        env: [{name: A, value: "1"}]
status: {replicas: 1}
`

func TestFingerprint(t *testing.T) {
	print := func(change func(o map[string]any)) string {
		t.Helper()
		o := map[string]any{}
		if err := yaml.Unmarshal([]byte(live), &o); err != nil {
			t.Fatal(err)
		}
		change(o)
		p, err := fingerprint(&unstructured.Unstructured{Object: o})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	set := func(value any, path ...string) func(map[string]any) {
		return func(o map[string]any) {
			if err := unstructured.SetNestedField(o, value, path...); err != nil {
				t.Fatal(err)
			}
		}
	}
	container := func(change func(c map[string]any)) func(map[string]any) {
		return func(o map[string]any) {
			c, _, err := unstructured.NestedSlice(o, "spec", "template", "spec", "containers")
			if err != nil {
				t.Fatal(err)
			}
			change(c[0].(map[string]any))
			set(c, "spec", "template", "spec", "containers")(o)
		}
	}
	base := print(func(map[string]any) {})
	for name, change := range map[string]func(map[string]any){
		"status":                     set(int64(3), "status", "replicas"),
		"replicas, by an autoscaler": set(int64(3), "spec", "replicas"),
		"a default of a newer API":   set("new", "spec", "template", "spec", "newField"),
		"a user's annotation":        set("x", "metadata", "annotations", "note"),
		"an added container port": container(func(c map[string]any) {
			c["ports"] = append(c["ports"].([]any), map[string]any{"containerPort": int64(9), "protocol": "TCP"})
		}),
		"the resource version": set("7", "metadata", "resourceVersion"),
	} {
		if print(change) != base {
			t.Errorf("%s counts as a change", name)
		}
	}
	for name, change := range map[string]func(map[string]any){
		"the image":       container(func(c map[string]any) { c["image"] = "pilot:2" }),
		"an argument":     container(func(c map[string]any) { c["args"] = []any{"discovery"} }),
		"an env value":    container(func(c map[string]any) { c["env"] = []any{map[string]any{"name": "A", "value": "2"}} }),
		"a label":         set("other", "metadata", "labels", "app"),
		"the object, new": set("99999999-2222-3333-4444-555555555555", "metadata", "uid"),
		"an owner": func(o map[string]any) {
			m := o["metadata"].(map[string]any)
			m["managedFields"] = m["managedFields"].([]any)[1:]
		},
	} {
		if print(change) == base {
			t.Errorf("%s does not count as a change", name)
		}
	}
}

func TestObjectKey(t *testing.T) {
	gvk, namespace, name, err := parseKey(ownPlane)
	if err != nil || gvk != deploymentKind || namespace != istioNamespace || name != "istiod" {
		t.Errorf("%v %s %s %v", gvk, namespace, name, err)
	}
	if got := display(ownPlane); got != "Deployment istio-system/istiod" {
		t.Error(got)
	}
	if _, _, _, err := parseKey("nonsense"); err == nil {
		t.Error("nonsense is a key")
	}
}
