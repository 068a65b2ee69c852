//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	supplyNamespace = "supply-chain"
	// vulnerable is what the scenario's advisories say of golang.org/x/text 0.3.7, and not of 0.3.8; other is of older ones.
	vulnerable = "GHSA-69ch-w2m2-3vjp"
	other      = "GHSA-ppp9-7jff-5vj2"
)

// From a vulnerable dependency to a signed image without it: what is in an image, what is known of that, and what may run.
func TestSupplyChain(t *testing.T) {
	ownNodes(t, 1)
	keys := t.TempDir()
	config := filepath.Join(keys, "config.yaml")
	settings := func(more string) {
		if err := os.WriteFile(config, []byte("disable: [metrics-server, local-storage, observe]\nmesh-profile: minimal\n"+more), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	settings("image-policy-key: " + filepath.Join(keys, "image.pub") + "\n")
	n := node.ForTest(t, node.Options{Observe: true, NoDefaultRoute: true, Args: []string{"--config", config}})
	p := &shopProject{Node: n, t: t, dir: filepath.Join(t.TempDir(), "shop"), env: append(builderStorage(t), "COSIGN_PASSWORD=secret")}
	if err := os.CopyFS(p.dir, os.DirFS(filepath.Join("scenarios", "supply-chain"))); err != nil {
		t.Fatal(err)
	}
	s := &supplyChain{p, keys}
	s.want(0, "keep it secret", "keygen", s.key("image"))
	s.want(0, "", "keygen", s.key("stranger"))
	s.want(1, "is there already", "keygen", s.key("image"))
	wantMode(t, s.key("image.key"), 0o600)
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.buildGreeter()
	database := s.database()
	n.WaitReady(t, 3*time.Minute)

	// Unsigned, nothing of it runs, and deploy reports why.
	result, printed, code := p.tryDeploy("--timeout", "15s")
	refused := slices.ContainsFunc(result.Findings, func(f diagnose.Finding) bool {
		return f.Reason == diagnose.Refused && strings.Contains(f.Message, "is not signed by a key of this server")
	})
	if code != 1 || !refused {
		t.Fatalf("an unsigned image: exit code %d, findings %v:\n%s", code, result.Findings, printed)
	}
	first := result.Images[0].Ref
	s.want(1, "there is no signature of it in the node", "verify", "--key", s.key("image.pub"), first)
	if names, _, _ := n.Polymesh(t, "__complete", "image", "sign", ""); !strings.Contains(names, first+"\n") || strings.Contains(names, "sha256") {
		t.Errorf("completed as names of images:\n%s", names)
	}

	// Signed, it does, by its digest, with Istio's sidecar, which needs no signature.
	bills := filepath.Join(p.dir, "sbom")
	result, _ = p.deploy("--sign-key", s.key("image.key"), "--sbom", bills)
	digest := result.Images[0].Digest
	s.wantPinned(supplyNamespace, first, digest)
	s.wantBill(result.Images[0].SBOM, "pkg:golang/golang.org/x/text@v0.3.7")
	if want := "docker.io/shop/greeter@" + digest; strings.TrimSpace(s.want(0, digest, "verify", "--key", s.key("image.pub"), first)) != want {
		t.Errorf("verify does not print %s", want)
	}
	s.want(1, "its signature is by another key", "verify", "--key", s.key("stranger.pub"), first)

	// What is known of what is in it.
	s.want(1, "there is no vulnerability database", "scan", first)
	s.want(1, "not the file that was published", "db", "import", database.file, "--checksum", "sha256:"+strings.Repeat("0", 64))
	s.want(0, "", "db", "import", database.file, "--checksum", database.checksum)
	report := s.want(2, "severity high or worse", "scan", "--fail-on", "high", first)
	if !strings.Contains(report, vulnerable) || !strings.Contains(report, "0.3.8") || strings.Contains(report, other) {
		t.Errorf("the report on 0.3.7:\n%s", report)
	}
	s.want(0, vulnerable, "scan", "--fail-on", "critical", first)
	s.want(1, "import a newer one", "scan", "--max-db-age", "1ms", first)
	for _, format := range []string{"json", "sarif"} {
		if out := s.want(0, vulnerable, "scan", "-o", format, first); !json.Valid([]byte(out)) {
			t.Errorf("-o %s: %s", format, out)
		}
	}
	if _, err := buildEcho(); err != nil {
		t.Fatal(err)
	}
	s.want(0, "SPDX-", "sbom", "-o", "spdx-json", filepath.Join(top(t), ".build", "e2e", "echo.tar"))

	// The upgrade.
	p.edit("services/greeter/go.mod", "v0.3.7", "v0.3.8")
	s.buildGreeter()
	result, _ = p.deploy("--sign-key", s.key("image.key"), "--sbom", bills)
	second := result.Images[0].Ref
	s.wantPinned(supplyNamespace, second, result.Images[0].Digest)
	s.wantBill(result.Images[0].SBOM, "pkg:golang/golang.org/x/text@v0.3.8")
	if report := s.want(0, "", "scan", "--fail-on", "negligible", second); strings.Contains(report, "GHSA-") {
		t.Errorf("the report on 0.3.8:\n%s", report)
	}

	// A signed name that gets another image.
	importEcho(t, n)
	n.Ctr(t, "images", "tag", "--force", echoImage, "docker.io/"+second)
	s.want(1, "there is no signature of it in the node", "verify", "--key", s.key("image.pub"), second)
	if out, err := s.makePod("retagged", second); err == nil || !strings.Contains(err.Error(), "is not signed by a key of this server") {
		t.Errorf("a pod with a name that was signed for another image: %s, %v", out, err)
	}
	if out, err := s.makePod("exact", "docker.io/shop/greeter@"+digest); err != nil {
		t.Errorf("a pod with the signed digest: %s, %v", out, err)
	}
	if out, err := n.KubectlErr("-n", supplyNamespace, "debug", "exact", "--image="+echoImage, "--", "true"); err == nil || !strings.Contains(err.Error(), "is not signed") {
		t.Errorf("an unsigned container for debugging: %s, %v", out, err)
	}

	// A policy that someone removes comes back.
	n.Kubectl(t, "delete", "validatingwebhookconfiguration,mutatingwebhookconfiguration", "polymesh-image-policy")
	n.Eventually(t, time.Minute, func() (bool, string) {
		_, err := n.KubectlErr("-n", supplyNamespace, "run", "unsigned", "--image="+echoImage, "--dry-run=server")
		return err != nil && strings.Contains(err.Error(), "is not signed"), fmt.Sprintf("after its webhooks were deleted, an unsigned pod gets %v", err)
	})

	s.throughRegistry()

	// Without keys there is no policy, and none of its objects is left.
	settings("")
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 2*time.Minute)
	if out, err := s.makePod("free", echoImage); err != nil {
		t.Errorf("an unsigned pod without the policy: %s, %v", out, err)
	}
}

// throughRegistry deploys the project by way of a registry, in a separate namespace.
func (s *supplyChain) throughRegistry() {
	s.t.Helper()
	listener, err := s.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	go func() { _ = server.Serve(listener) }()
	s.t.Cleanup(func() { server.Close() })
	host := listener.Addr().String()
	// It uses plain HTTP, which buildah needs a flag for.
	conf := s.key("registries.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "[[registry]]\nlocation = %q\ninsecure = true\n", host), 0o600); err != nil {
		s.t.Fatal(err)
	}
	p := *s.shopProject
	p.dir, p.env = filepath.Join(s.t.TempDir(), "remote"), append(slices.Clone(s.env), "CONTAINERS_REGISTRIES_CONF="+conf)
	if err := os.CopyFS(p.dir, os.DirFS(s.dir)); err != nil {
		s.t.Fatal(err)
	}
	p.edit("k8s/greeter.yaml", "name: "+supplyNamespace, "name: supply-registry")
	remote := &supplyChain{&p, s.keys}

	result, printed, code := p.tryDeploy("--registry", host+"/team", "--timeout", "15s")
	if code != 1 || !strings.Contains(fmt.Sprint(result.Findings), "there is no signature of it in the registry") {
		s.t.Fatalf("an unsigned image in a registry: exit code %d:\n%s", code, printed)
	}
	result, _ = p.deploy("--registry", host+"/team", "--sign-key", s.key("image.key"))
	remote.wantPinned("supply-registry", result.Images[0].Ref, result.Images[0].Digest)
	remote.want(0, result.Images[0].Digest, "verify", "--from", "registry", "--key", s.key("image.pub"), result.Images[0].Ref)
}

// supplyChain is the scenario with its keys.
type supplyChain struct {
	*shopProject
	keys string
}

func (s *supplyChain) key(name string) string { return filepath.Join(s.keys, name) }

// want runs `polymesh image …`, which must end with a code and say a text, and returns its standard output.
func (s *supplyChain) want(code int, text string, args ...string) string {
	s.t.Helper()
	cmd := s.PolymeshCommand(s.t.Context(), append([]string{"image"}, args...)...)
	cmd.Env = append(cmd.Env, s.env...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	_ = cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(out.String()+errOut.String(), text) {
		s.t.Fatalf("polymesh image %s: exit code %d, want %d and %q:\n%s%s", strings.Join(args, " "), got, code, text, out.String(), errOut.String())
	}
	return out.String()
}

func (s *supplyChain) makePod(name, image string) (string, error) {
	return s.KubectlErr("-n", supplyNamespace, "run", name, "--image="+image, "--image-pull-policy=IfNotPresent")
}

// buildGreeter compiles the service on this machine, which has Go; its image is made of the program alone.
func (s *supplyChain) buildGreeter() {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), "go", "build", "-o", "greeter", ".")
	cmd.Dir = filepath.Join(s.dir, "services", "greeter")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("build the greeter: %v: %s", err, out)
	}
}

// published is a database file with the checksum that is published with it.
type published struct{ file, checksum string }

// database makes one of the scenario's advisories.
func (s *supplyChain) database() published {
	s.t.Helper()
	out := s.t.TempDir()
	cmd := exec.CommandContext(s.t.Context(), filepath.Join(top(s.t), ".build", "test", "database"), filepath.Join(s.dir, "advisories"), out)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("write the vulnerability database: %v: %s (test/e2e/prepare.sh builds the program)", err, out)
	}
	text, err := os.ReadFile(filepath.Join(out, "database", "latest.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	var latest struct{ Path, Checksum string }
	if err := json.Unmarshal(text, &latest); err != nil {
		s.t.Fatal(err)
	}
	return published{filepath.Join(out, "database", latest.Path), latest.Checksum}
}

func top(t *testing.T) string {
	t.Helper()
	dir, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// wantPinned looks for a running pod of the greeter whose images all have a digest.
func (s *supplyChain) wantPinned(namespace, ref, digest string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		pods, err := s.Client(s.t).CoreV1().Pods(namespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: "app=greeter"})
		if err != nil {
			return false, err.Error()
		}
		var found []string
		for _, pod := range pods.Items {
			images := map[string]string{}
			for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
				images[c.Name] = c.Image
			}
			found = append(found, fmt.Sprint(pod.Status.Phase, images))
			if pod.Status.Phase == corev1.PodRunning && images["greeter"] == ref+"@"+digest && strings.Contains(images["istio-proxy"], "@sha256:") {
				return true, ""
			}
		}
		return false, fmt.Sprintf("no pod runs %s@%s beside a pinned sidecar: %v", ref, digest, found)
	})
}

func (s *supplyChain) wantBill(file, part string) {
	s.t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	var bill struct {
		BOMFormat  string
		Components []struct{ PURL string }
	}
	if err := json.Unmarshal(text, &bill); err != nil {
		s.t.Fatalf("%s: %v", file, err)
	}
	if bill.BOMFormat != "CycloneDX" || !slices.ContainsFunc(bill.Components, func(c struct{ PURL string }) bool { return c.PURL == part }) {
		s.t.Errorf("the bill of materials %s does not list %s: %+v", file, part, bill)
	}
}
