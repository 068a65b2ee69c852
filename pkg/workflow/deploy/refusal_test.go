package deploy

import (
	"errors"
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

const mistakes = `apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
  annotations:
    sidecar.istio.io/inject: "true"
spec:
  template:
    spec:
      containers:
      - name: other
        image: a:1
      - name: web
        image: b:1
        env:
        - {name: A, value: x}
        - name: PORT
          value: 8080
        ports:
        - containerPort: "80"
        args: [a, b]
`

func TestPathIn(t *testing.T) {
	o := objects(t, mistakes)[0]
	for field, want := range map[string]string{
		"spec.template.spec.containers[1].image":                                                            "k8s/all.yaml:14",
		`.spec.template.spec.containers[name="web"].env[name="PORT"].value`:                                 "k8s/all.yaml:18",
		`.spec.template.spec.containers[name="web"].ports[containerPort="80",protocol="TCP"].containerPort`: "k8s/all.yaml:20",
		`.spec.template.spec.containers[name="web"].args[="b"]`:                                             "k8s/all.yaml:21",
		".metadata.annotations.sidecar.istio.io/inject":                                                     "k8s/all.yaml:6",
		"metadata.annotations[sidecar.istio.io/inject]":                                                     "k8s/all.yaml:6",
		`.spec.template.spec.containers[name="none"].image`:                                                 "k8s/all.yaml:10",
		".spec.no.such[0].field":                                                                            "k8s/all.yaml:7",
		"":                                                                                                  "k8s/all.yaml:1",
		"[":                                                                                                 "k8s/all.yaml:1",
		".":                                                                                                 "k8s/all.yaml:1",
		"spec[":                                                                                             "k8s/all.yaml:7",
	} {
		if got := o.At(pathIn(o.Object, field)...); got != want {
			t.Errorf("%s is at %s, want %s", field, got, want)
		}
	}
}

// TestExplainTyped has what an API server said to objects that do not fit their types.
func TestExplainTyped(t *testing.T) {
	o := objects(t, mistakes)[0]
	d := &deployment{}
	one := d.explainApply(o, errors.New(`failed to create typed patch object (shop/web; apps/v1, Kind=Deployment): .spec.template.spec.containers[name="web"].env[name="PORT"].value: expected string, got &value.valueUnstructured{Value:8080}`)).Error()
	if want := `k8s/all.yaml:18: apply deployment.apps/web: spec.template.spec.containers[name="web"].env[name="PORT"].value: expected string, got 8080 (write it in quotes: "8080")`; one != want {
		t.Errorf("got %s", one)
	}
	two := d.explainApply(o, errors.New("failed to create typed patch object (shop/web; apps/v1, Kind=Deployment): errors:\n  .metadata.annotations.sidecar.istio.io/inject: expected string, got &value.valueUnstructured{Value:true}\n  .spec.replica: field not declared in schema")).Error()
	lines := strings.Split(two, "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "k8s/all.yaml:6: ") || !strings.HasPrefix(lines[1], "k8s/all.yaml:7: ") || !strings.Contains(lines[1], "spec.replica: field not declared") {
		t.Errorf("got %q", lines)
	}
}

func TestExplainIsShort(t *testing.T) {
	o := objects(t, "apiVersion: batch/v1\nkind: Job\nmetadata: {name: migrate}\nspec:\n  template: {}\n")[0]
	dump := strings.Repeat(`core.PodTemplateSpec{ObjectMeta: v1.ObjectMeta{Name:""}}, `, 60)
	err := apierrors.NewInvalid(schema.GroupKind{Group: "batch", Kind: "Job"}, "migrate", field.ErrorList{field.Invalid(field.NewPath("spec", "template"), dump, "field is immutable")})
	if !immutable(err) {
		t.Error("it is not seen that the field cannot be changed")
	}
	got := (&deployment{}).explainApply(o, err).Error()
	lines := strings.Split(got, "\n")
	if len(got) > 400 || lines[0] != "k8s/all.yaml:5: apply job.batch/migrate: spec.template: Invalid value: field is immutable" {
		t.Errorf("got %q", got)
	}
	if long := readable(strings.Repeat("é", 500)); len(long) > longestProblem+10 || !strings.HasSuffix(long, " …") {
		t.Errorf("got %q", long)
	}
}

func TestCutField(t *testing.T) {
	if field, text := cutField(`.a[name="x: y"].b: expected string`); field != `.a[name="x: y"].b` || text != "expected string" {
		t.Errorf("got %q, %q", field, text)
	}
	if field, text := cutField("no field"); field != "" || text != "no field" {
		t.Errorf("got %q, %q", field, text)
	}
}

func FuzzPathIn(f *testing.F) {
	for _, field := range []string{"spec.a[0].b", `.a[name="x"].c`, `.a[="b"]`, "a[b.c/d]", "[[", "..", `.a["`} {
		f.Add(field)
	}
	object := map[string]any{"a": []any{map[string]any{"name": "x", "c": int64(1)}, "b"}, "b.c/d": map[string]any{"e": nil}}
	f.Fuzz(func(t *testing.T, field string) {
		if path := pathIn(object, field); slices.Contains(path, "") {
			t.Errorf("%q has an empty part: %q", field, path)
		}
	})
}
