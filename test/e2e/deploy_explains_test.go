//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/workflow/deploy"
)

// mistake is an edit of the project that a row of the guide's troubleshooting table is about, and what deploy has to say.
type mistake struct {
	name, from, to string

	reason  diagnose.Reason
	message string // a part of it
	at      string
}

// podMistakes keep a pod from becoming ready. Each is in a separate Deployment, whose file is like k8s/api.yaml.
var podMistakes = []mistake{
	{name: "cpu", from: "          env:", to: "          resources: {requests: {cpu: \"1000\"}}\n          env:",
		reason: diagnose.Unschedulable, message: "Insufficient cpu", at: ":16"},
	{name: "node-selector", from: "      containers:", to: "      nodeSelector: {disk: no-such-disk}\n      containers:",
		reason: diagnose.Unschedulable, message: "node affinity/selector", at: ":13"},
	{name: "registry", from: "image: shop/api:1.0.0", to: "image: no-such-registry.example.com/other:1",
		reason: diagnose.ImagePull, message: "no-such-registry.example.com/other:1", at: ":15"},
	{name: "image-name", from: "image: shop/api:1.0.0", to: "image: Shop/API:1.0.0",
		reason: diagnose.ImagePull, message: "Shop/API:1.0.0", at: ":15"},
	{name: "never", from: "image: shop/api:1.0.0", to: "image: shop/none:1.0.0\n          imagePullPolicy: Never",
		reason: diagnose.ImagePull, message: "pull policy of Never", at: ":15"},
	{name: "probe", from: "path: /healthz", to: "path: \"/wrong?status=404\"",
		reason: diagnose.ProbeFailing, message: "statuscode: 404", at: ":21"},
	{name: "memory", from: "          readinessProbe: {httpGet: {path: /healthz", to: "          resources: {limits: {memory: 48Mi}}\n          readinessProbe: {httpGet: {path: \"/alloc?mb=64\"",
		reason: diagnose.OutOfMemory, message: "killed at its memory limit of 48Mi", at: ":21"},
	{name: "exit", from: "          env:", to: "          args: [nonsense]\n          env:",
		reason: diagnose.Crash, message: "ended with exit code 1", at: ":14"},
	{name: "command", from: "          env:", to: "          command: [/no-such-program]\n          env:",
		reason: diagnose.Crash, message: "cannot be started: \"/no-such-program\"", at: ":16"},
	{name: "key", from: "key: version", to: "key: no-such-key",
		reason: diagnose.Configuration, message: "couldn't find key no-such-key in ConfigMap", at: ":18"},
	{name: "secret", from: "name: db,", to: "name: no-such-secret,",
		reason: diagnose.Configuration, message: `secret "no-such-secret" not found`, at: ":20"},
}

// routeMistakes are seen before anything is applied. The pods are ready all the same.
var routeMistakes = []mistake{
	{name: "no such gateway", from: "gateways: [shop]", to: "gateways: [no-such-gateway]",
		reason: diagnose.GatewayMismatch, message: `gateway not found: "no-such-gateway"`, at: "istio/routes.yaml:18"},
	{name: "a gateway without pods", from: "istio: ingressgateway", to: "istio: no-such-gateway",
		reason: diagnose.GatewayMismatch, message: `selector not found: "istio=no-such-gateway"`, at: "istio/routes.yaml:6"},
	{name: "another host", from: "  hosts: [shop.deploy.test]\n  gateways", to: "  hosts: [other.deploy.test]\n  gateways",
		reason: diagnose.GatewayMismatch, message: "not found in Gateway", at: "istio/routes.yaml:17"},
	{name: "no such service", from: "{host: api}", to: "{host: no-such-service}",
		reason: diagnose.GatewayMismatch, message: `host not found: "no-such-service"`, at: "istio/routes.yaml:21"},
	{name: "no such subset", from: "{host: api}", to: "{host: api, subset: v9}",
		reason: diagnose.GatewayMismatch, message: `"api+v9"`, at: "istio/routes.yaml:21"},
	// The example makes the whole mesh STRICT.
	{name: "plain text", from: "mode: ISTIO_MUTUAL", to: "mode: DISABLE",
		reason: diagnose.MTLSMismatch, message: "send with TLS mode DISABLE", at: "istio/routes.yaml:30"},
}

// TestDeployExplains makes each mistake of the troubleshooting table and checks the output of deploy.
func TestDeployExplains(t *testing.T) {
	p := newShopProject(t)
	t.Cleanup(func() { removeNamespaces(t, p.Node, deployNamespace) })
	p.deploy()

	t.Run("routes", func(t *testing.T) {
		for _, m := range routeMistakes {
			p.edit("istio/routes.yaml", m.from, m.to)
			r, printed, code := p.tryDeploy("--dry-run")
			p.edit("istio/routes.yaml", m.to, m.from)
			if code != 0 {
				t.Errorf("%s: exit code %d: %s", m.name, code, printed)
			}
			m.check(t, r.Findings)
		}
	})
	t.Run("pods", func(t *testing.T) { p.podMistakes(t) })
	t.Run("taint", func(t *testing.T) {
		p.Kubectl(t, "taint", "nodes", "--all", "polymesh.dev/test=deploy:NoSchedule")
		defer p.Kubectl(t, "taint", "nodes", "--all", "polymesh.dev/test-")
		p.edit("k8s/api.yaml", "          env:", "          args: [serve]\n          env:")
		defer p.edit("k8s/api.yaml", "          args: [serve]\n", "")
		r, _, code := p.tryDeploy("--timeout", "10s")
		mistake{name: "taint", reason: diagnose.Unschedulable, message: "taint", at: "k8s/api.yaml:11"}.check(t, r.Findings)
		if code != 1 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("quota", func(t *testing.T) {
		quota := filepath.Join(p.dir, "k8s", "quota.yaml")
		text := "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: small}\nspec:\n  hard:\n    pods: \"1\"\n"
		if err := os.WriteFile(quota, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		defer p.deploy() // removes the quota
		p.edit("k8s/api.yaml", "spec:\n", "spec:\n  replicas: 3\n")
		defer p.edit("k8s/api.yaml", "  replicas: 3\n", "")
		defer os.Remove(quota)
		r, _, code := p.tryDeploy("--timeout", "15s")
		mistake{name: "quota", reason: diagnose.Refused, message: "exceeded quota: small", at: "k8s/quota.yaml:6"}.check(t, r.Findings)
		if code != 1 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("selector", func(t *testing.T) {
		p.edit("k8s/api.yaml", "matchLabels: {app: api}", "matchLabels: {app: api, tier: web}")
		p.edit("k8s/api.yaml", " labels: {app: api}", " labels: {app: api, tier: web}")
		defer p.edit("k8s/api.yaml", "matchLabels: {app: api, tier: web}", "matchLabels: {app: api}")
		defer p.edit("k8s/api.yaml", " labels: {app: api, tier: web}", " labels: {app: api}")
		_, printed, code := p.tryDeploy()
		if code != 1 || !strings.Contains(printed, "k8s/api.yaml:6: ") || !strings.Contains(printed, "kubectl delete deployment.apps/api -n "+deployNamespace) {
			t.Errorf("exit code %d: %s", code, printed)
		}
	})
	t.Run("a pod older than the label", func(t *testing.T) {
		p.Kubectl(t, "label", "namespace", deployNamespace, "istio-injection-")
		p.Kubectl(t, "delete", "pods", "-n", deployNamespace, "-l", "app=api", "--wait=false")
		p.Kubectl(t, "rollout", "restart", "deployment/api", "-n", deployNamespace)
		p.WaitRollout(t, deployNamespace, "deployment/api")
		r, _ := p.deploy()
		mistake{name: "older", reason: diagnose.InjectionMissing, message: "the pod has no sidecar", at: "k8s/api.yaml:1"}.check(t, r.Findings)
		if len(r.Findings) == 1 && !strings.Contains(r.Findings[0].Advice, "kubectl rollout restart deployment/api -n "+deployNamespace) {
			t.Errorf("the advice is %q", r.Findings[0].Advice)
		}
	})
	t.Run("no such revision", func(t *testing.T) {
		p.edit("k8s/namespace.yaml", "  name: deploy-test\n", "  name: deploy-test\n  labels:\n    istio.io/rev: no-such-revision\n")
		r, _ := p.deploy()
		mistake{name: "revision", reason: diagnose.InjectionMissing, message: `revision "no-such-revision"`, at: "k8s/namespace.yaml:6"}.check(t, r.Findings)
	})
}

// podMistakes makes them all at once: deploy waits for all workloads in parallel and shows for each why it is not ready.
func (p *shopProject) podMistakes(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(p.dir, "k8s", "api.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range podMistakes {
		file := "k8s/" + m.name + ".yaml"
		// Without sidecars eleven pods start in a moment; the one with the probe has one, which puts itself before the probe.
		inject := fmt.Sprint(m.name == "probe")
		deployment, _, _ := strings.Cut(string(text), "---\n")
		deployment = strings.NewReplacer(
			"  name: api\nspec:", "  name: "+m.name+"\nspec:", "matchLabels: {app: api}", "matchLabels: {app: "+m.name+"}",
			" labels: {app: api}", " labels: {app: "+m.name+", sidecar.istio.io/inject: \""+inject+"\"}").Replace(deployment)
		if err := os.WriteFile(filepath.Join(p.dir, file), []byte(deployment), 0o644); err != nil {
			t.Fatal(err)
		}
		p.edit(file, m.from, m.to)
	}
	r, printed, code := p.tryDeploy("--timeout", "75s")
	if code != 1 || !strings.Contains(printed, "not every workload is ready") {
		t.Errorf("exit code %d: %s", code, printed)
	}
	found := map[string][]diagnose.Finding{}
	for _, f := range r.Findings {
		found[f.Object] = append(found[f.Object], f)
	}
	for _, m := range podMistakes {
		id := "deployment.apps/" + m.name + " -n " + deployNamespace
		m.at = "k8s/" + m.name + ".yaml" + m.at
		m.check(t, found[id])
		delete(found, id)
		if err := os.Remove(filepath.Join(p.dir, "k8s", m.name+".yaml")); err != nil {
			t.Fatal(err)
		}
	}
	if len(found) > 0 {
		t.Errorf("deploy also finds %+v", found)
	}
	r, _ = p.deploy()
	for _, m := range podMistakes {
		if got := actions(r)["deployment.apps/"+m.name+" -n "+deployNamespace]; got != deploy.Pruned {
			t.Errorf("%s was %q", m.name, got)
		}
	}
}

func (m mistake) check(t *testing.T, found []diagnose.Finding) {
	t.Helper()
	if len(found) != 1 || found[0].Reason != m.reason || !strings.Contains(found[0].Message, m.message) || found[0].At != m.at || found[0].Advice == "" {
		t.Errorf("%s: want %s at %s with %q, got", m.name, m.reason, m.at, m.message)
		for _, f := range found {
			t.Error(f)
		}
	}
}

// TestDev saves files as an editor does and sees them served.
func TestDev(t *testing.T) {
	p := newShopProject(t)
	t.Cleanup(func() { removeNamespaces(t, p.Node, deployNamespace) })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd, printed := p.start(ctx, "dev", "waiting for a change")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	image := func() string {
		text, err := p.KubectlErr("get", "deployment", "api", "-n", deployNamespace, "-o", "jsonpath={.spec.template.spec.containers[0].image}")
		if err != nil {
			return ""
		}
		return text
	}
	p.Eventually(t, 3*time.Minute, func() (bool, string) { return image() != "", "there is no Deployment" })
	p.serves("v1")
	select {
	case <-printed.seen:
	case err := <-ended:
		t.Fatalf("polymesh dev has ended: %v: %s", err, printed)
	}
	first := image()
	p.edit("services/api/version", "one", "two")
	p.Eventually(t, 3*time.Minute, func() (bool, string) { return image() != first, "the image is still " + first })
	// A pod reads the ConfigMap when it starts, and a changed ConfigMap starts none.
	p.edit("k8s/settings.yaml", "version: v1", "version: v2")
	p.Eventually(t, 3*time.Minute, func() (bool, string) {
		got := p.Kubectl(t, "get", "configmap", "settings", "-n", deployNamespace, "-o", "jsonpath={.data.version}")
		return got == "v2", "the ConfigMap says " + got
	})
	second := image()
	p.edit("services/api/version", "two", "three")
	p.Eventually(t, 3*time.Minute, func() (bool, string) { return image() != second, "the image is still " + second })
	p.serves("v2")
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("polymesh dev after SIGINT: %v: %s", err, printed.String())
	}
	for _, want := range []string{"services/api/version changed", "waiting for a change"} {
		if !strings.Contains(printed.String(), want) {
			t.Errorf("it does not print %q:\n%s", want, printed.String())
		}
	}
	p.Kubectl(t, "get", "deployment", "api", "-n", deployNamespace)
}
