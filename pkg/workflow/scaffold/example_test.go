package scaffold

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

const example = "../../../examples/polyglot"

// inExample returns the name of the example's service in a language.
var inExample = map[string]string{
	"go": "go-service", "java": "java-service", "node": "node-service", "python": "fastapi-service", "rust": "rust-service",
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Dependencies that a new service and the example share have the same version, so that they are maintained once.
func TestVersionsAreTheExamples(t *testing.T) {
	for lang, c := range map[string]struct {
		file, template string
		asked          string // name and version
		least          int    // minimum number of shared ones
	}{
		"go":     {"go.mod", "go.mod.template", `(?m)^(?:require )?\t?(\S+) (v\S+)$`, 1},
		"java":   {"pom.xml", "pom.xml", `(?s)<parent>.*?<artifactId>(.*?)</artifactId>\s*<version>(.*?)</version>`, 1},
		"node":   {"package.json", "package.json", `(?m)^    "(\S+)": "([0-9.]+)"`, 1},
		"python": {"requirements.txt", "requirements.txt", `(?m)^(fastapi|uvicorn|httpx|prometheus-client)==(\S+)`, 4},
		"rust":   {"Cargo.toml", "Cargo.toml", `(?m)^([a-z_-]+) = (?:\{ version = )?"=(.*?)"`, 6},
	} {
		versions := func(text string) map[string]string {
			found := map[string]string{}
			for _, m := range regexp.MustCompile(c.asked).FindAllStringSubmatch(text, -1) {
				found[m[1]] = m[2]
			}
			return found
		}
		theirs := versions(read(t, example, "services", inExample[lang], c.file))
		both := 0
		for name, version := range versions(read(t, "templates", "services", lang, c.template)) {
			switch theirs[name] {
			case version:
				both++
			case "":
			default:
				t.Errorf("%s: %s is %s here and %s in the example", lang, name, version, theirs[name])
			}
		}
		if both < c.least {
			t.Errorf("%s: only %d shared dependencies, the example has %v", lang, both, theirs)
		}
	}
}

// New services use the same base images as the example, so that examples/polyglot/images.sh can provide them.
func TestImagesAreTheExamples(t *testing.T) {
	from := regexp.MustCompile(`(?m)^FROM (\S+)`)
	argument := regexp.MustCompile(`(?m)^ARG ([A-Z_]+)=(\S+)$`)
	for _, lang := range LanguageNames() {
		dockerfile := read(t, "templates", "services", lang, "Dockerfile")
		ours := map[string]bool{}
		for _, m := range argument.FindAllStringSubmatch(dockerfile, -1) {
			ours[m[2]] = true
			if !strings.Contains(dockerfile, "FROM ${"+m[1]+"}") {
				t.Errorf("%s: %s is not used", lang, m[1])
			}
		}
		theirs := map[string]bool{}
		for _, m := range from.FindAllStringSubmatch(read(t, example, "services", inExample[lang], "Dockerfile"), -1) {
			theirs[m[1]] = true
		}
		if !maps.Equal(ours, theirs) {
			t.Errorf("%s: images are %v, the example's %v", lang, ours, theirs)
		}
	}
}

// A new service's manifests equal those of the example's rust-service, except for names, numbers and additions.
func TestManifestsAreTheExamples(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "polyglot")
	do(t, func() (*Plan, error) { return NewProject(dir, ProjectOptions{Languages: []string{"rust"}}) })
	specs := func(dir string) map[string]any {
		objects, _, err := load(t, dir).Objects()
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]any{}
		for _, o := range objects {
			if o.GetName() == "rust-service" {
				found[o.GetKind()] = comparable(o)
			}
		}
		return found
	}
	ours, theirs := specs(dir), specs(example)
	kinds := slices.Sorted(maps.Keys(ours))
	if want := []string{"ConfigMap", "Deployment", "DestinationRule", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service", "VirtualService"}; !slices.Equal(kinds, want) {
		t.Errorf("kinds are %v", kinds)
	}
	for _, kind := range []string{"Deployment", "DestinationRule", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"} {
		if !reflect.DeepEqual(ours[kind], theirs[kind]) {
			t.Errorf("%s is\n%v\nthe example's is\n%v", kind, ours[kind], theirs[kind])
		}
	}
}

// comparable returns an object's spec without the parts that may differ.
func comparable(o project.Object) any {
	spec, _ := o.Object["spec"].(map[string]any)
	if o.GetKind() != "Deployment" {
		return spec
	}
	pod := spec["template"].(map[string]any)["spec"].(map[string]any)
	delete(pod, "volumes")
	container := pod["containers"].([]any)[0].(map[string]any)
	for _, field := range []string{"name", "image", "env", "envFrom", "resources", "startupProbe", "volumeMounts"} {
		delete(container, field)
	}
	return spec
}
