//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/scaffold"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	marketName = "market" // of the project and its namespace
	marketHost = "market.example.com"
)

// marketService is one of the project, in one language.
type marketService struct{ name, language string }

// marketServices ask each other in this order. Two languages show what any number does: with -short, there are no more. TestWalk
// has Go.
func marketServices() []marketService {
	all := []marketService{{"orders", "go"}, {"billing", "java"}, {"stock", "node"}, {"advice", "python"}, {"search", "rust"}}
	if testing.Short() {
		return all[2:4]
	}
	return all
}

// passedTests is what each language's tests print when they have passed.
var passedTests = map[string]string{
	"go": `(?m)^ok  \texample.com/go-`, "java": `Tests run: \d+, Failures: 0, Errors: 0, Skipped: 0\n`,
	"node": `(?m)^# pass [1-9]\d*\n# fail 0$`, "python": `Ran [1-9]\d* tests in [0-9.]+s\n\nOK`,
	"rust": `test result: ok\. [1-9]\d* passed; 0 failed`,
}

// TestNewProject goes from nothing to several services behind the gateway, with the commands that a user types. The services
// are built in the node's network, from where no package registry can be reached: what they download is in the builder's
// caches, which a first service of each language has filled.
func TestNewProject(t *testing.T) {
	n := app(t)
	t.Cleanup(func() { removeNamespaces(t, n, marketName) })
	services := marketServices()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	// The caches are next to the storage, and are removed with it.
	temp := filepath.Join(top, ".build", "polyglot", "tmp")
	if err := os.MkdirAll(temp, 0o755); err != nil {
		t.Fatal(err)
	}
	env := append(exampleImages(t, "bases"), "TMPDIR="+temp)
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	var languages []string
	for _, s := range services {
		languages = append(languages, s.language)
	}
	if all := scaffold.LanguageNames(); !testing.Short() && len(languages) != len(all) {
		t.Errorf("the languages are %v, and the services are in %v", all, languages)
	}
	fillCaches(t, n, languages...)

	dir := filepath.Join(t.TempDir(), marketName)
	newPlan(t, n, "project", dir)
	for i, s := range services {
		p := newPlan(t, n, "service", s.name, "--lang", s.language, "-C", dir)
		if len(p.Services) != 1 || p.Services[0].Path != "/"+s.name || p.Host != marketHost {
			t.Errorf("%s is %+v", s.name, p)
		}
		// No other run has built this image.
		replaceIn(t, filepath.Join(dir, "services", s.name, "Dockerfile"), "FROM", fmt.Sprintf("# %s\nFROM", dir))
		if i+1 < len(services) {
			next := services[i+1].name
			replaceIn(t, filepath.Join(dir, "k8s", s.name, "configmap.yaml"), `NEXT_URL: ""`, fmt.Sprintf("NEXT_URL: http://%s:%d/%s", next, scaffold.Port, next))
		}
	}
	first := deployFive(t, n, dir, nil)
	if len(first.Images) != len(services) || !slices.Equal(first.Hosts, []string{marketHost}) || len(first.Findings) > 0 {
		t.Errorf("images %+v, hosts %v, findings %v", first.Images, first.Hosts, first.Findings)
	}
	for _, i := range first.Images {
		if !i.Built {
			t.Errorf("%s was not built", i.Ref)
		}
	}

	for i, s := range services {
		var text string
		n.Eventually(t, time.Minute, func() (bool, string) {
			var status int
			var err error
			status, text, err = ask(n.HTTP(false), n, http.MethodGet, marketHost, "/"+s.name, nil)
			return err == nil && status == http.StatusOK, fmt.Sprintf("%s: %d %s %v", s.name, status, text, err)
		})
		wantAnswers(t, text, services[i:])
		refusesPlainText(t, n, marketName, s.name, fmt.Sprint(scaffold.Port))
	}
	for _, path := range []string{"/metrics", "/" + services[0].name + "/metrics", "/" + services[0].name + "s", "/"} {
		if status, text, err := ask(n.HTTP(false), n, http.MethodGet, marketHost, path, nil); err != nil || status != http.StatusNotFound {
			t.Errorf("%s from outside: %d %s %v", path, status, text, err)
		}
	}

	second := deployFive(t, n, dir, nil)
	for id, action := range actions(second) {
		if action != deploy.Unchanged {
			t.Errorf("a second deploy: %s was %s", id, action)
		}
	}
	for _, i := range second.Images {
		if i.Built || i.Moved {
			t.Errorf("a second deploy: %+v", i)
		}
	}
}

// newPlan runs `polymesh new`.
func newPlan(t *testing.T, n *node.Node, args ...string) scaffold.Plan {
	t.Helper()
	out, errOut, code := n.Polymesh(t, append([]string{"new", "-o", "json"}, args...)...)
	var p scaffold.Plan
	if err := json.Unmarshal([]byte(out), &p); code != 0 || err != nil {
		t.Fatalf("polymesh new %v: exit code %d, %v: %s%s", args, code, err, out, errOut)
	}
	return p
}

// fillCaches builds a service of each of these languages where package registries can be reached. Their tests run while they
// are built.
func fillCaches(t *testing.T, n *node.Node, languages ...string) {
	t.Helper()
	started := time.Now()
	dir := filepath.Join(t.TempDir(), "first")
	newPlan(t, n, "project", dir)
	// No other run has built a service of this name.
	name := func(lang string) string { return fmt.Sprintf("%s-%x", lang, started.UnixNano()) }
	for _, lang := range languages {
		newPlan(t, n, "service", name(lang), "--lang", lang, "-C", dir)
	}
	engine, err := image.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	logs := make([]bytes.Buffer, len(languages))
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(2)
	for i, lang := range languages {
		g.Go(func() error {
			source := image.Source{Context: filepath.Join(dir, "services", name(lang)), Dockerfile: "Dockerfile", Settings: image.Clients()}
			err := engine.Build(ctx, "docker.io/first/"+lang+":1", source, &logs[i])
			t.Logf("the first %s service is there after %v", lang, time.Since(started).Round(time.Second))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for i, lang := range languages {
		if text := logs[i].String(); !regexp.MustCompile(passedTests[lang]).MatchString(text) {
			t.Errorf("the tests of the %s service have not run:\n%s", lang, text)
		}
	}
}

// wantAnswers checks the answer of a service: its own, and in it those of all that come after it.
func wantAnswers(t *testing.T, text string, services []marketService) {
	t.Helper()
	type answer struct {
		Service, Message string
		Next             *answer
	}
	var got answer
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	at := &got
	for _, s := range services {
		if at == nil || at.Service != s.name || at.Message != "hello from "+s.name {
			t.Fatalf("%s answers %s", services[0].name, text)
		}
		at = at.Next
	}
	if at != nil {
		t.Errorf("%s answers %s", services[0].name, text)
	}
}

// replaceIn replaces a text in a file, which must have it.
func replaceIn(t *testing.T, path, from, to string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), from) {
		t.Fatalf("%s does not have %q", path, from)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), from, to, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
}
