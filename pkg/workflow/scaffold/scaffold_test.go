package scaffold

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"istio.io/istio/pkg/config/analysis/analyzers"
	"istio.io/istio/pkg/config/analysis/local"
	"istio.io/istio/pkg/config/resource"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

var update = flag.Bool("update", false, "write the golden file")

// shop is a new project with a service in each language.
func shop(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "shop")
	do(t, func() (*Plan, error) { return NewProject(dir, ProjectOptions{Languages: LanguageNames()}) })
	return dir
}

// do plans and writes.
func do(t *testing.T, plan func() (*Plan, error)) *Plan {
	t.Helper()
	p, err := plan()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Write(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

func load(t *testing.T, dir string) *project.Project {
	t.Helper()
	p, err := project.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tree returns the files below a folder, with their contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := os.ReadFile(filepath.Join(dir, name))
		found[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func names(files map[string]string) []string {
	var out []string
	for name := range files {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFiles(t *testing.T) {
	got := strings.Join(names(tree(t, shop(t))), "\n") + "\n"
	golden := filepath.Join("testdata", "files.txt")
	if *update {
		write(t, golden, got)
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the files are (-update writes %s)\n%s", golden, got)
	}
}

// No placeholder of the templates is left, and everything new has the right name.
func TestWords(t *testing.T) {
	dir := shop(t)
	for name, text := range tree(t, dir) {
		for _, word := range []string{"service-name", "service_name", "project-name", "project-host", "gateway-name", "-request\n", "-limit\n", notAModule} {
			if strings.Contains(name, word) || strings.Contains(text, word) {
				t.Errorf("%s still has %q", name, word)
			}
		}
		if strings.HasPrefix(name, "services/") && strings.HasSuffix(name, "Dockerfile") && !strings.Contains(text, "\nUSER 65532:65532\n") {
			t.Errorf("%s runs as root", name)
		}
	}
	p := load(t, dir)
	var services []string
	for _, s := range p.Services {
		services = append(services, s.Name)
	}
	if want := []string{"go-service", "java-service", "node-service", "python-service", "rust-service"}; p.Name != "shop" || !slices.Equal(services, want) {
		t.Errorf("project %s has the services %v", p.Name, services)
	}
}

// gatewayPods stand in for Istio's own ingress gateway, which a deploy's analyzers find in the cluster.
const gatewayPods = `
apiVersion: v1
kind: Pod
metadata: {name: istio-ingressgateway, namespace: istio-system, labels: {istio: ingressgateway}}
spec: {containers: [{name: istio-proxy, image: auto}]}
---
apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: istio-system}
spec: {selector: {istio: ingressgateway}, ports: [{name: http2, port: 80, targetPort: 8080, protocol: TCP}]}
`

// The API server accepts every object as written, and Istio's analyzers, which check each deploy, find nothing.
func TestManifests(t *testing.T) {
	p := load(t, shop(t))
	objects, namespace, err := p.Objects()
	if err != nil {
		t.Fatal(err)
	}
	if namespace != "shop" {
		t.Errorf("the namespace is %s", namespace)
	}
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Strict: true})
	var readers []local.ReaderSource
	pods := []string{gatewayPods}
	kinds := map[string]int{}
	files := map[string]bool{}
	for _, o := range objects {
		kinds[o.GetKind()]++
		if !files[o.File] {
			files[o.File] = true
			text, err := os.ReadFile(p.Path(o.File))
			if err != nil {
				t.Fatal(err)
			}
			readers = append(readers, local.ReaderSource{Name: o.File, Reader: bytes.NewReader(text)})
		}
		if strings.HasSuffix(o.GroupVersionKind().Group, "istio.io") {
			continue // the analyzers check these
		}
		text, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		decoded, _, err := strict.Decode(text, nil, nil)
		if err != nil {
			t.Errorf("%s: %v", o.At(), err)
		}
		if d, ok := decoded.(*appsv1.Deployment); ok {
			pods = append(pods, pod(t, d, namespace))
		}
	}
	for _, kind := range []string{"Deployment", "Service", "ConfigMap", "HorizontalPodAutoscaler", "PodDisruptionBudget", "VirtualService", "DestinationRule"} {
		if kinds[kind] != 5 {
			t.Errorf("there are %d of kind %s", kinds[kind], kind)
		}
	}
	analyzer := local.NewIstiodAnalyzer(analyzers.AllCombined(), resource.Namespace(namespace), "istio-system", nil)
	readers = append(readers, local.ReaderSource{Name: "pods", Reader: strings.NewReader(strings.Join(pods, "\n---\n"))})
	if err := analyzer.AddTestReaderKubeSource(readers); err != nil {
		t.Fatal(err)
	}
	found, err := analyzer.Analyze(t.Context().Done())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range found.Messages {
		t.Error(m.String())
	}
}

// pod returns a pod of a Deployment, with its sidecar.
func pod(t *testing.T, d *appsv1.Deployment, namespace string) string {
	t.Helper()
	made := corev1.Pod{ObjectMeta: d.Spec.Template.ObjectMeta, Spec: d.Spec.Template.Spec}
	made.APIVersion, made.Kind, made.Name, made.Namespace = "v1", "Pod", d.Name, namespace
	made.Spec.Containers = append(made.Spec.Containers, corev1.Container{Name: "istio-proxy", Image: "proxyv2"})
	text, err := yaml.Marshal(made)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestNewService(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "shop")
	do(t, func() (*Plan, error) { return NewProject(dir, ProjectOptions{Host: "shop.test"}) })
	before := tree(t, dir)
	p := do(t, func() (*Plan, error) { return NewService(load(t, dir), "orders", "go", ServiceOptions{}) })
	for _, f := range p.Files {
		if f.Action != Create {
			t.Errorf("%s: %s", f.Path, f.Action)
		}
	}
	after := tree(t, dir)
	if len(after) != len(before)+len(p.Files) {
		t.Errorf("the files are %v", names(after))
	}
	for name, text := range before {
		if after[name] != text {
			t.Errorf("%s has changed", name)
		}
	}
	if got := after["istio/orders/virtualservice.yaml"]; !strings.Contains(got, `- "shop.test"`) || !strings.Contains(got, "gateways:\n    - shop\n") || !strings.Contains(got, "prefix: /orders/") {
		t.Errorf("the route is\n%s", got)
	}
	if got := after["k8s/orders/deployment.yaml"]; !strings.Contains(got, "image: shop/orders:1.0.0\n") || !strings.Contains(got, "memory: 32Mi\n") {
		t.Errorf("the deployment is\n%s", got)
	}

	// Again, after an interruption: missing files are created.
	if err := os.RemoveAll(filepath.Join(dir, "istio", "orders")); err != nil {
		t.Fatal(err)
	}
	p = do(t, func() (*Plan, error) { return NewService(load(t, dir), "orders", "go", ServiceOptions{}) })
	for _, f := range p.Files {
		if want := strings.HasPrefix(f.Path, "istio/"); (f.Action == Create) != want || (f.Action == Unchanged) == want {
			t.Errorf("%s: %s", f.Path, f.Action)
		}
	}
	if got := tree(t, dir); len(got) != len(after) {
		t.Errorf("the files are %v", names(got))
	}
}

// The guide's own project has a Gateway of the platform, in another namespace, and an object named like each service.
func TestNewServiceInTheExample(t *testing.T) {
	p := load(t, "../../../examples/polyglot")
	plan, err := NewService(p, "stock", "rust", ServiceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range plan.Files {
		if f.Path == "istio/stock/virtualservice.yaml" && (!strings.Contains(string(f.text), "- istio-system/main-gateway\n") || !strings.Contains(string(f.text), `- "api.example.com"`)) {
			t.Errorf("the route is\n%s", f.text)
		}
	}
	if _, err := NewService(load(t, "../../../examples/polyglot"), "java-service", "java", ServiceOptions{}); err == nil || !strings.Contains(err.Error(), "/java-service is already at ") {
		t.Errorf("error is %v", err)
	}
}

func TestRefuses(t *testing.T) {
	project := func(o ProjectOptions) func(string) (*Plan, error) {
		return func(dir string) (*Plan, error) { return NewProject(filepath.Join(dir, "shop"), o) }
	}
	service := func(name, lang string, o ServiceOptions, files ...string) func(string) (*Plan, error) {
		return func(dir string) (*Plan, error) {
			write(t, filepath.Join(dir, "k8s", "a.yaml"), "{apiVersion: v1, kind: ConfigMap, metadata: {name: taken}}\n")
			for i := 0; i < len(files); i += 2 {
				write(t, filepath.Join(dir, files[i]), files[i+1])
			}
			return NewService(load(t, dir), name, lang, o)
		}
	}
	const (
		header  = "apiVersion: polymesh.dev/v1\nkind: Project\n"
		gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {servers: [{port: {protocol: HTTP}, hosts: [a.test]}]}\n"
		other   = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: h}\nspec: {servers: [{port: {protocol: TCP}, hosts: ['*']}]}\n"
	)
	for name, c := range map[string]struct {
		plan func(dir string) (*Plan, error)
		want string
	}{
		"project's name":  {project(ProjectOptions{Name: "Shop"}), `"Shop" is not a valid project name`},
		"host":            {project(ProjectOptions{Host: "http://shop"}), `--host "http://shop" is not a host name`},
		"language":        {project(ProjectOptions{Languages: []string{"cobol"}}), `--lang "cobol" is not one of go, java, node, python, rust`},
		"language twice":  {project(ProjectOptions{Languages: []string{"go", "go"}}), "--lang names go twice"},
		"no language":     {service("api", "", ServiceOptions{}, "istio/g.yaml", gateway), "set the service's language with --lang: go, java, node, python, rust"},
		"digit first":     {service("1api", "go", ServiceOptions{}, "istio/g.yaml", gateway), `"1api" is not a valid service name`},
		"path":            {service("../api", "go", ServiceOptions{}, "istio/g.yaml", gateway), `"../api" is not a valid service name`},
		"too long":        {service(strings.Repeat("a", 64), "go", ServiceOptions{}, "istio/g.yaml", gateway), "at most 63 characters"},
		"no gateway":      {service("api", "go", ServiceOptions{}), "the project has no such Gateway: set the Gateway"},
		"two gateways":    {service("api", "go", ServiceOptions{}, "istio/g.yaml", gateway, "istio/h.yaml", other), "the project has the Gateways g, h: select one with --gateway"},
		"other gateway":   {service("api", "go", ServiceOptions{Gateway: "x"}, "istio/g.yaml", gateway), "the project has no such Gateway"},
		"gateway for TCP": {service("api", "go", ServiceOptions{Gateway: "h"}, "istio/h.yaml", other), "istio/h.yaml:4: Gateway h serves no host over HTTP"},
		"object":          {service("taken", "go", ServiceOptions{}, "istio/g.yaml", gateway), "configmap/taken is already at k8s/a.yaml:1"},
		"other context":   {service("api", "go", ServiceOptions{}, "istio/g.yaml", gateway, "api/Dockerfile", "FROM x", "polymesh.yaml", header+"services:\n- {name: api, context: api}\n"), "service api already exists in api"},
		"brackets":        {service("api", "go", ServiceOptions{}, "istio/g.yaml", gateway, "polymesh.yaml", header+"services: []\n"), "polymesh.yaml:3: services is written in brackets"},
		"manifests":       {service("api", "go", ServiceOptions{}, "istio/g.yaml", gateway, "polymesh.yaml", header+"manifests: [istio]\n"), "polymesh.yaml:3: k8s/api/configmap.yaml would not be deployed: add the folder k8s to manifests"},
		"in the way":      {service("api", "go", ServiceOptions{}, "istio/g.yaml", gateway, "services/api", "a file"), "services/api/.dockerignore is in the way"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := c.plan(dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %s", err, c.want)
			}
			for _, file := range names(tree(t, dir)) {
				if strings.Contains(file, "shop") || strings.HasPrefix(file, "k8s/api") {
					t.Errorf("it has created %s", file)
				}
			}
		})
	}
}

func TestGatewayOfSomebodyElse(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "k8s", "a.yaml"), "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n")
	p, err := NewService(load(t, dir), "api", "node", ServiceOptions{Gateway: "istio-system/theirs", Host: "api.test"})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range p.Files {
		if f.Path == "istio/api/virtualservice.yaml" && !strings.Contains(string(f.text), "- istio-system/theirs\n") {
			t.Errorf("the route is\n%s", f.text)
		}
	}
}

// An existing folder can become a project; its own files stay.
func TestProjectInAFolder(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "README.md"), "mine\n")
	p := do(t, func() (*Plan, error) { return NewProject(dir, ProjectOptions{Name: "shop"}) })
	if files := tree(t, dir); files["README.md"] != "mine\n" || !strings.Contains(files["polymesh.yaml"], "name: shop\n") {
		t.Errorf("the files are %v", files)
	}
	if i := slices.IndexFunc(p.Files, func(f File) bool { return f.Path == "README.md" }); p.Files[i].Action != Keep {
		t.Errorf("README.md: %s", p.Files[i].Action)
	}
}

// Files copied into an image keep their mode, and are read by another user there.
func TestModesUnderAnyUmask(t *testing.T) {
	before := syscall.Umask(0o077)
	dir := shop(t)
	syscall.Umask(before)
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o644)
		if entry.IsDir() {
			want = 0o755
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has the mode %v", path, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOverwrite(t *testing.T) {
	dir := shop(t)
	file := filepath.Join(dir, "services", "go-service", "main.go")
	write(t, file, "package main // mine\n")
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := NewService(load(t, dir), "go-service", "go", ServiceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Refuse(); err == nil || !strings.Contains(err.Error(), "\n  services/go-service/main.go\nChoose another name, or overwrite them with --force") {
		t.Errorf("error is %v", err)
	}
	if err := p.Write(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text := tree(t, dir)["services/go-service/main.go"]; !strings.Contains(text, `serviceName = "go-service"`) {
		t.Errorf("main.go is\n%s", text)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	// Another language has other files.
	if p, err = NewService(load(t, dir), "go-service", "node", ServiceOptions{}); err != nil || p.Refuse() == nil {
		t.Errorf("%v", err)
	}
}

// After an error or an interruption, no part of a plan is left behind.
func TestAllOrNothing(t *testing.T) {
	dir := shop(t)
	write(t, filepath.Join(dir, "services", "go-service", "main.go"), "package main // mine\n")
	before := tree(t, dir)
	broken := func(ctx context.Context, want func(error) bool, spoil func(p *Plan)) {
		t.Helper()
		p, err := NewService(load(t, dir), "go-service", "python", ServiceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		spoil(p)
		if err := p.Write(ctx); !want(err) {
			t.Errorf("error is %v", err)
		}
		if after := tree(t, dir); !slices.Equal(names(after), names(before)) || after["services/go-service/Dockerfile"] != before["services/go-service/Dockerfile"] {
			t.Errorf("the files are %v", names(after))
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	broken(ended, func(err error) bool { return errors.Is(err, context.Canceled) }, func(*Plan) {})
	// A file cannot replace a folder.
	write(t, filepath.Join(dir, "services", "go-service", "zzz", "x"), "")
	before = tree(t, dir)
	broken(t.Context(), func(err error) bool { return err != nil }, func(p *Plan) {
		p.Files = append(p.Files, File{Path: "services/go-service/zzz", Action: Create, text: []byte("x")})
	})
}

func TestAddTo(t *testing.T) {
	const header = "apiVersion: polymesh.dev/v1\nkind: Project\n"
	for name, c := range map[string]struct{ before, after string }{
		"no list": {"name: shop\n", ""},
		"a list": {
			"services: # mine\n  - name: web\n    args:\n      A: b # why\n\n# more\nname: shop\n",
			"services: # mine\n  - name: web\n    args:\n      A: b # why\n  - name: orders\n\n# more\nname: shop\n",
		},
		"at the left":     {"services:\n- name: web", "services:\n- name: web\n- name: orders\n"},
		"a long text":     {"services:\n- name: web\n  target: |\n    a\n    b\nname: shop\n", "services:\n- name: web\n  target: |\n    a\n    b\n- name: orders\nname: shop\n"},
		"there already":   {"services:\n- name: orders\n", ""},
		"items in braces": {"services:\n - {name: web, context: web}\n", "services:\n - {name: web, context: web}\n - name: orders\n"},
	} {
		t.Run(name, func(t *testing.T) {
			p := Plan{Dir: t.TempDir()}
			write(t, filepath.Join(p.Dir, project.File), header+c.before)
			if err := p.describe("orders"); err != nil {
				t.Fatal(err)
			}
			got := ""
			if len(p.Files) > 0 {
				got = strings.TrimPrefix(string(p.Files[0].text), header)
			}
			if got != c.after {
				t.Errorf("got\n%s", got)
			}
		})
	}
}
