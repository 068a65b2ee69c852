//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	deployNamespace = "deploy-test"
	deployHost      = "shop.deploy.test"
	deploySecret    = "postgresql://shop:not-to-be-seen@db.example.com/shop"
)

// shopProject is a copy of the scenario "deploy" that a test may change.
type shopProject struct {
	*node.Node
	t   *testing.T
	dir string
	env []string
}

func newShopProject(t *testing.T) *shopProject {
	t.Helper()
	n := app(t)
	if _, err := buildEcho(); err != nil {
		t.Fatal(err)
	}
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	p := &shopProject{Node: n, t: t, dir: filepath.Join(t.TempDir(), "shop")}
	if err := os.CopyFS(p.dir, os.DirFS(filepath.Join("scenarios", "deploy"))); err != nil {
		t.Fatal(err)
	}
	echo, err := os.ReadFile(filepath.Join(top, ".build", "e2e", "echo"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, "services", "api", "echo"), echo, 0o755); err != nil {
		t.Fatal(err)
	}
	// No other test's image is this one's.
	if err := os.WriteFile(filepath.Join(p.dir, "services", "api", "test"), []byte(t.Name()+time.Now().String()), 0o644); err != nil {
		t.Fatal(err)
	}
	p.env = append(builderStorage(t), "SHOP_DB_URL="+deploySecret)
	return p
}

// builderStorage gives buildah a storage of the test's own, so that it finds nothing of an earlier run and leaves nothing.
func builderStorage(t *testing.T) []string {
	t.Helper()
	// Paths of overlay mounts are limited, and the test's name is part of its own folder.
	dir, err := os.MkdirTemp("", "build-")
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "storage.conf")
	text := fmt.Sprintf("[storage]\ndriver = \"overlay\"\nrunroot = %q\ngraphroot = %q\n[storage.options.overlay]\nskip_mount_home = \"true\"\n", filepath.Join(dir, "run"), filepath.Join(dir, "root"))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return []string{"CONTAINERS_STORAGE_CONF=" + conf}
}

// run is a command of Polymesh on the project.
func (p *shopProject) run(args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.t.Context()), 5*time.Minute)
	defer cancel()
	cmd := p.PolymeshCommand(ctx, append(slices.Clone(args), p.dir)...)
	cmd.Env = append(cmd.Env, p.env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() < 0) {
		p.t.Fatalf("polymesh %v: %v: %s", args, err, errOut.String())
	}
	if strings.Contains(out.String()+errOut.String(), "not-to-be-seen") {
		p.t.Errorf("polymesh %v shows a password", args)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// start starts a command of Polymesh on the project, and reports when a text has come.
func (p *shopProject) start(ctx context.Context, command, text string) (*exec.Cmd, *firstOf) {
	p.t.Helper()
	cmd := p.PolymeshCommand(ctx, command, p.dir)
	cmd.Env = append(cmd.Env, p.env...)
	printed := &firstOf{text: text, seen: make(chan struct{})}
	cmd.Stderr = printed
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return cmd, printed
}

// deploy must work. It returns the result and what a user saw.
func (p *shopProject) deploy(args ...string) (deploy.Result, string) {
	p.t.Helper()
	result, printed, code := p.tryDeploy(args...)
	if code != 0 {
		p.t.Fatalf("polymesh deploy %v: exit code %d:\n%s", args, code, printed)
	}
	return result, printed
}

func (p *shopProject) tryDeploy(args ...string) (deploy.Result, string, int) {
	p.t.Helper()
	stdout, stderr, code := p.run(append([]string{"deploy", "-o", "json"}, args...)...)
	var result deploy.Result
	if stdout != "" {
		if err := json.Unmarshal([]byte(stdout), &result); err != nil {
			p.t.Fatalf("polymesh deploy -o json: %v: %s%s", err, stdout, stderr)
		}
	}
	return result, stderr, code
}

// edit replaces text in a file of the project.
func (p *shopProject) edit(file, from, to string) {
	p.t.Helper()
	replaceIn(p.t, filepath.Join(p.dir, file), from, to)
}

// serves waits until the gateway serves the shop in this version.
func (p *shopProject) serves(version string) {
	p.t.Helper()
	p.Eventually(p.t, time.Minute, func() (bool, string) {
		status, text, err := ask(p.HTTP(false), p.Node, "GET", deployHost, "/", nil)
		if err != nil || status != 200 {
			return false, fmt.Sprintf("%d %s %v", status, text, err)
		}
		reply, err := parseReply(text)
		return err == nil && reply.Version == version, text
	})
}

func (p *shopProject) uids() string {
	p.t.Helper()
	return p.Kubectl(p.t, "get", "pods", "-n", deployNamespace, "-o", "jsonpath={.items[*].metadata.uid}")
}

func actions(r deploy.Result) map[string]deploy.Action {
	found := map[string]deploy.Action{}
	for _, c := range r.Objects {
		found[c.ID] = c.Action
	}
	return found
}

// TestDeploy goes through the life of a project.
func TestDeploy(t *testing.T) {
	p := newShopProject(t)
	t.Cleanup(func() { removeNamespaces(t, p.Node, deployNamespace) })

	// Nothing is touched before the input is right.
	env := p.env
	p.env = slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, "SHOP_DB_URL") })
	_, printed, code := p.tryDeploy()
	if code != 1 || !strings.Contains(printed, "secret db has no value for url from SHOP_DB_URL") {
		t.Errorf("without the variable: exit code %d: %s", code, printed)
	}
	p.env = env
	if _, err := p.KubectlErr("get", "namespace", deployNamespace); err == nil {
		t.Error("a deploy that was refused has made the namespace")
	}

	first, _ := p.deploy()
	if len(first.Images) != 1 || !first.Images[0].Built || !first.Images[0].Moved || !strings.HasPrefix(first.Images[0].Ref, "shop/api:1.0.0-") {
		t.Errorf("images are %+v", first.Images)
	}
	for id, want := range map[string]deploy.Action{
		"namespace/" + deployNamespace: deploy.Created, "deployment.apps/api -n " + deployNamespace: deploy.Created,
		"secret/db -n " + deployNamespace: deploy.Created, "virtualservice.networking.istio.io/shop -n " + deployNamespace: deploy.Created,
	} {
		if got := actions(first)[id]; got != want {
			t.Errorf("%s was %q, want %q", id, got, want)
		}
	}
	if len(first.Findings) > 0 || !slices.Equal(first.Hosts, []string{deployHost}) {
		t.Errorf("findings %v, hosts %v", first.Findings, first.Hosts)
	}
	p.serves("v1")
	pod := listPods(t, p.Node, deployNamespace, "app=api")[0]
	if sidecar(&pod) == "" {
		t.Error("the pod has no sidecar: the namespace was not labelled")
	}

	t.Run("again", func(t *testing.T) {
		before := p.uids()
		r, _ := p.deploy()
		for id, action := range actions(r) {
			if action != deploy.Unchanged {
				t.Errorf("%s was %s", id, action)
			}
		}
		if r.Images[0].Built || r.Images[0].Moved || p.uids() != before {
			t.Errorf("something was built, or pods were replaced: %+v", r.Images)
		}
	})
	t.Run("a password is kept by who does not know it", func(t *testing.T) {
		p.env = slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, "SHOP_DB_URL") })
		defer func() { p.env = env }()
		r, _ := p.deploy()
		if got := actions(r)["secret/db -n "+deployNamespace]; got != deploy.Unchanged {
			t.Errorf("the secret was %s", got)
		}
	})
	t.Run("diff", func(t *testing.T) {
		p.edit("k8s/settings.yaml", "version: v1", "version: v2")
		out, printed, code := p.run("deploy", "--diff")
		if code != 1 || !strings.Contains(out, "-  version: v1\n+  version: v2\n") {
			t.Errorf("exit code %d:\n%s%s", code, out, printed)
		}
		if got := p.Kubectl(t, "get", "configmap", "settings", "-n", deployNamespace, "-o", "jsonpath={.data.version}"); got != "v1" {
			t.Errorf("--diff changed the cluster: version is %q", got)
		}
	})
	t.Run("a changed line", func(t *testing.T) {
		p.edit("services/api/version", "one", "two")
		r, _ := p.deploy()
		if !r.Images[0].Built || r.Images[0].Ref == first.Images[0].Ref || actions(r)["deployment.apps/api -n "+deployNamespace] != deploy.Changed {
			t.Errorf("images are %+v, objects %v", r.Images, actions(r))
		}
		p.serves("v2")
	})
	t.Run("a file that the build ignores", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(p.dir, "services", "api", "notes.md"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if r, _ := p.deploy(); r.Images[0].Built {
			t.Error("it was built again")
		}
	})
	t.Run("pruning", func(t *testing.T) {
		if err := os.Remove(filepath.Join(p.dir, "k8s", "unused.yaml")); err != nil {
			t.Fatal(err)
		}
		const id = "configmap/unused -n " + deployNamespace
		dry, _ := p.deploy("--dry-run")
		if actions(dry)[id] != deploy.Pruned {
			t.Errorf("a dry run does not name it: %v", actions(dry))
		}
		p.Kubectl(t, "get", "configmap", "unused", "-n", deployNamespace)
		r, _ := p.deploy()
		if actions(r)[id] != deploy.Pruned {
			t.Errorf("objects are %v", actions(r))
		}
		if _, err := p.KubectlErr("get", "configmap", "unused", "-n", deployNamespace); err == nil {
			t.Error("it is still there")
		}
	})
	t.Run("interrupted", func(t *testing.T) { p.interrupted(t) })
	t.Run("latest", func(t *testing.T) {
		p.edit("k8s/api.yaml", "image: shop/api:1.0.0", "image: registry.example.com/other:latest")
		defer p.edit("k8s/api.yaml", "image: registry.example.com/other:latest", "image: shop/api:1.0.0")
		_, printed, code := p.tryDeploy()
		if code != 1 || !strings.Contains(printed, "k8s/api.yaml:15: image registry.example.com/other:latest") || !strings.Contains(printed, "--allow-latest") {
			t.Errorf("exit code %d: %s", code, printed)
		}
	})
	t.Run("refused by the API server", func(t *testing.T) {
		p.edit("k8s/api.yaml", "port: 80, targetPort", "port: 80000, targetPort")
		defer p.edit("k8s/api.yaml", "port: 80000, targetPort", "port: 80, targetPort")
		_, printed, code := p.tryDeploy()
		if code != 1 || !strings.Contains(printed, "apply service/api -n "+deployNamespace) || !strings.Contains(printed, "80000") {
			t.Errorf("exit code %d: %s", code, printed)
		}
	})
	t.Run("a number where a text belongs", func(t *testing.T) {
		p.edit("k8s/api.yaml", "          env:", "          env:\n            - name: PORT\n              value: 8080")
		p.edit("k8s/settings.yaml", "version: v2", "version: v3")
		defer p.edit("k8s/api.yaml", "\n            - name: PORT\n              value: 8080", "")
		defer p.edit("k8s/settings.yaml", "version: v3", "version: v2")
		_, printed, code := p.tryDeploy()
		if code != 1 || !strings.Contains(printed, "k8s/api.yaml:18: apply deployment.apps/api") || !strings.Contains(printed, "got 8080 (write it in quotes") {
			t.Errorf("exit code %d: %s", code, printed)
		}
		if got := p.Kubectl(t, "get", "configmap", "settings", "-n", deployNamespace, "-o", "jsonpath={.data.version}"); got != "v2" {
			t.Errorf("half of it was applied: version is %q", got)
		}
	})
	t.Run("a copy of the project elsewhere", func(t *testing.T) {
		other := *p
		other.dir = filepath.Join(t.TempDir(), "shop")
		if err := os.CopyFS(other.dir, os.DirFS(p.dir)); err != nil {
			t.Fatal(err)
		}
		before := p.uids()
		_, printed, code := other.tryDeploy()
		if code != 1 || !strings.Contains(printed, "project shop in namespace "+deployNamespace+" was deployed from elsewhere") || !strings.Contains(printed, "--adopt") {
			t.Errorf("exit code %d: %s", code, printed)
		}
		if _, printed, code := other.run("undeploy"); code != 1 || !strings.Contains(printed, "--adopt") || p.uids() != before {
			t.Errorf("undeploy: exit code %d: %s", code, printed)
		}
	})
	t.Run("a pod that cannot run", func(t *testing.T) {
		p.edit("k8s/api.yaml", "key: version}", "key: no-such-key}")
		defer p.edit("k8s/api.yaml", "key: no-such-key}", "key: version}")
		r, printed, code := p.tryDeploy("--timeout", "30s")
		if code != 1 || len(r.Findings) != 1 || r.Findings[0].Reason != diagnose.Configuration || r.Findings[0].At != "k8s/api.yaml:18" || !strings.Contains(r.Findings[0].Message, "no-such-key") {
			t.Errorf("exit code %d, findings %+v: %s", code, r.Findings, printed)
		}
	})
	p.deploy() // as it was
	p.serves("v2")
	t.Run("undeploy", func(t *testing.T) {
		p.Kubectl(t, "create", "configmap", "theirs", "-n", deployNamespace)
		if _, printed, code := p.run("undeploy"); code != 0 {
			t.Fatalf("exit code %d: %s", code, printed)
		}
		if got := p.Kubectl(t, "get", "deployments,services,secrets,virtualservices,gateways.networking.istio.io", "-n", deployNamespace, "-o", "name"); strings.TrimSpace(got) != "" {
			t.Errorf("still there: %s", got)
		}
		p.Kubectl(t, "get", "configmap", "theirs", "-n", deployNamespace)
		if _, printed, code := p.run("undeploy"); code != 1 || !strings.Contains(printed, "project shop is not deployed in namespace "+deployNamespace) {
			t.Errorf("a second time: exit code %d: %s", code, printed)
		}
	})
}

// interrupted breaks a deploy off as Ctrl-C does, when it waits for the pods, and lets the next one finish.
func (p *shopProject) interrupted(t *testing.T) {
	p.edit("services/api/version", "two", "three")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd, printed := p.start(ctx, "deploy", "deployment.apps/api")
	go func() {
		select {
		case <-printed.seen:
			// An error means that it has ended already, which its exit code shows below.
			_ = cmd.Process.Signal(syscall.SIGINT)
		case <-ctx.Done():
		}
	}()
	err := cmd.Wait()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(printed.String(), "interrupted; the same command continues where this one stopped") {
		t.Errorf("%v: %s", err, printed)
	}
	if r, _ := p.deploy(); r.Images[0].Built {
		t.Error("the image was built twice")
	}
	p.serves("v2")
}

// firstOf is output that reports when a text has come. It has one writer, a command. The buffer is no embedded one, whose
// ReadFrom would pass Write by.
type firstOf struct {
	output bytes.Buffer
	text   string
	seen   chan struct{}
	done   bool
}

func (f *firstOf) String() string { return f.output.String() }

func (f *firstOf) Write(p []byte) (int, error) {
	n, err := f.output.Write(p)
	if !f.done && strings.Contains(f.output.String(), f.text) {
		f.done = true
		close(f.seen)
	}
	return n, err
}
