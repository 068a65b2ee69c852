package project

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// write creates files in a new folder and returns it.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "Shop 2")
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const header = "apiVersion: polymesh.dev/v1\nkind: Project\n"

func TestLoadTheGuidesTree(t *testing.T) {
	p, err := Load("../../../examples/polyglot")
	if err != nil {
		t.Fatal(err)
	}
	objects, namespace, err := p.Objects()
	if err != nil {
		t.Fatal(err)
	}
	if namespace != "polyglot-services" || len(objects) == 0 || len(p.Services) == 0 {
		t.Errorf("namespace %q, %d objects, services %v", namespace, len(objects), p.Services)
	}
	if s, ok := p.Service("fastapi-service"); !ok || s.Context != "services/fastapi-service" || s.Dockerfile != "Dockerfile" {
		t.Errorf("fastapi-service is %+v", s)
	}
}

func TestLoadFile(t *testing.T) {
	dir := write(t, map[string]string{
		"api/Containerfile": "FROM scratch\n",
		"deploy/all.yaml":   "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n",
		File: header + `name: shop
namespace: shops
registry: registry.example:5000/shop
timeout: 90s
manifests: [deploy/all.yaml]
services:
- name: api
  context: api
  dockerfile: Containerfile
  args: {VERSION: "1"}
secrets:
- name: db
  data: {url: {env: DATABASE_URL}, ca: {file: ca.pem}}
`})
	p, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "shop" || p.Namespace != "shops" || p.Timeout != 90*time.Second || p.Secrets[0].Data["url"].Env != "DATABASE_URL" || p.Services[0].Args["VERSION"] != "1" {
		t.Errorf("project is %+v", p)
	}
}

func TestLoadRefuses(t *testing.T) {
	service := map[string]string{"services/api/Dockerfile": "FROM scratch\n", "k8s/a.yaml": "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}"}
	for name, c := range map[string]struct{ file, want string }{
		"unknown field":     {header + "servces: []\n", "additional properties 'servces' not allowed"},
		"bad name":          {header + "name: Shop\n", "name: 'Shop' does not match pattern"},
		"bad timeout":       {header + "timeout: soon\n", "timeout: 'soon' does not match pattern"},
		"no kind":           {"apiVersion: polymesh.dev/v1\n", "missing property 'kind'"},
		"other version":     {"apiVersion: v9\nkind: Project\n", "apiVersion: value must be"},
		"two sources":       {header + "secrets: [{name: a, data: {b: {env: A, file: b}}}]\n", "secrets.0.data.b: maxProperties"},
		"missing context":   {header + "services: [{name: web}]\n", "services/web/Dockerfile does not exist"},
		"twice":             {header + "services: [{name: api}, {name: api}]\n", "two services are named api"},
		"missing manifests": {header + "manifests: []\n", "nothing to deploy"},
		"not YAML":          {"a: [", "yaml"},
		"bad id":            {header + "id: \"a b\"\n", "id: 'a b' does not match pattern"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{File: c.file}
			for k, v := range service {
				files[k] = v
			}
			_, err := Load(write(t, files))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "no-such")); err == nil || !strings.Contains(err.Error(), "does not exist: specify the folder") {
		t.Errorf("error is %v", err)
	}
}

const manifest = `# comment
apiVersion: apps/v1
kind: Deployment
metadata:
  name: api
spec:
  template:
    spec:
      containers:
      - name: web
        image: shop/api:1
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: api}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {a: "yes"}}
---
`

func TestObjects(t *testing.T) {
	dir := write(t, map[string]string{"k8s/api/a.yaml": manifest, "k8s/README.md": "not one"})
	p, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	objects, namespace, err := p.Objects()
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "shop-2" || namespace != "shop-2" || p.Namespace != "" {
		t.Errorf("name %q, namespace %q", p.Name, namespace)
	}
	var ids []string
	for _, o := range objects {
		ids = append(ids, o.ID())
	}
	if want := []string{"deployment.apps/api", "service/api", "configmap/c"}; !slices.Equal(ids, want) {
		t.Errorf("objects are %q, want %q", ids, want)
	}
	for path, want := range map[string]string{
		"": "k8s/api/a.yaml:2", "spec template spec containers 0 image": "k8s/api/a.yaml:11",
		"spec template spec containers 0 ports 0": "k8s/api/a.yaml:10", "spec replicas": "k8s/api/a.yaml:6",
	} {
		if got := objects[0].At(strings.Fields(path)...); got != want {
			t.Errorf("%q is at %s, want %s", path, got, want)
		}
	}
}

// TestManifestLinks tests links to files and folders among the manifests, including broken ones and loops.
func TestManifestLinks(t *testing.T) {
	dir := write(t, map[string]string{"shared/a.yaml": "{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}", "shared/b.yaml": "{apiVersion: v1, kind: ConfigMap, metadata: {name: b}}",
		"k8s/c.yaml": "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}", "more/d.yaml": "{apiVersion: v1, kind: ConfigMap, metadata: {name: d}}",
		File: header + "manifests: [k8s, linked]\n"})
	link := func(to, from string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	link("more", "linked")
	link("../shared", "k8s/base")
	link("/no/such", "k8s/README")
	ids := func() ([]string, error) {
		p, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		objects, _, err := p.Objects()
		var ids []string
		for _, o := range objects {
			ids = append(ids, o.ID())
		}
		return ids, err
	}
	if got, err := ids(); err != nil || !slices.Equal(got, []string{"configmap/a", "configmap/b", "configmap/c", "configmap/d"}) {
		t.Errorf("objects are %q, %v", got, err)
	}
	link("/no/such", "k8s/z.yaml")
	if _, err := ids(); err == nil || !strings.Contains(err.Error(), "z.yaml is a broken link") {
		t.Errorf("error is %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "k8s/z.yaml")); err != nil {
		t.Fatal(err)
	}
	link("..", "k8s/round")
	if _, err := ids(); err == nil || !strings.Contains(err.Error(), "is a link to a folder that contains it") {
		t.Errorf("error is %v", err)
	}
}

func TestLoadNames(t *testing.T) {
	for _, name := range []string{"___", strings.Repeat("a", 64)} {
		dir := filepath.Join(filepath.Dir(write(t, map[string]string{"x": ""})), name)
		if err := os.MkdirAll(filepath.Join(dir, "k8s"), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "set one in polymesh.yaml (name:)") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestObjectsRefuse(t *testing.T) {
	for want, text := range map[string]string{
		"a.yaml:3: not a Kubernetes object":             "# the guide's resources and budget in one\n\nresources: {}\n",
		"a.yaml:1: ConfigMap has no metadata.name":      "apiVersion: v1\nkind: ConfigMap\n",
		"configmap/c is already at k8s/a.yaml:1":        "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n",
		"a.yaml:2: not valid YAML":                      "a: b\n  c: [\n",
		`a.yaml:5: the key "name" is already at line 4`: "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\n  name: b\n",
		"set the project's in polymesh.yaml":            "{apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n{apiVersion: v1, kind: Namespace, metadata: {name: b}}\n",
	} {
		p, err := Load(write(t, map[string]string{"k8s/a.yaml": text}))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := p.Objects(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want %q", err, want)
		}
	}
}
