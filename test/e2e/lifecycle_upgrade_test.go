//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// An older release of the mesh, with its Istio and its Envoy, is replaced by the one that ships in the way that Istio documents: a second
// revision, a tag that moves, pods that start again, and the first revision uninstalled. No request fails.
func TestUpgrade(t *testing.T) {
	ownNodes(t, 1)
	tag, archive, charts := buildOldMesh(t)
	// The server leaves Istio to the user, so that these two are the only ones.
	n := node.ForTest(t, node.Options{Args: []string{"--disable", "istio"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	n.Import(t, archive)

	n.Istioctl(t, "install", "--set", "profile=minimal", "--set", "revision=old", "--set", "tag="+tag, "--manifests", charts, "-y")
	n.Istioctl(t, "tag", "set", "prod", "--revision", "old")
	s := newScenarioOn(t, n, "upgrade")
	s.wantServed(map[string]string{"client": "old", "server": "old"})
	before := map[string]release{"client": s.release("client"), "server": s.release("server")}
	for deployment, r := range before {
		if r.istio != tag {
			t.Errorf("the %s is of Istio %s, want %s", deployment, r.istio, tag)
		}
	}
	s.wantStatus(http.StatusOK, "", "client", myService)

	n.Istioctl(t, "install", "--set", "profile=minimal", "--set", "revision=new", "-y")
	sent, end := s.load(myService)
	n.Istioctl(t, "tag", "set", "prod", "--revision", "new", "--overwrite")
	n.Kubectl(t, "rollout", "restart", "deployment/server", "-n", "upgrade")
	n.WaitRollout(t, "upgrade", "deployment/server")
	s.wantServed(map[string]string{"client": "old", "server": "new"})
	s.wantCaller("client", "spiffe://cluster.local/ns/upgrade/sa/default", "get", myService)
	if r := s.release("client"); r != before["client"] {
		t.Errorf("the client is %+v, and was %+v", r, before["client"])
	}
	end()
	wantNoFailure(t, "the servers moved", sent)

	n.Kubectl(t, "rollout", "restart", "deployment/client", "-n", "upgrade")
	n.WaitRollout(t, "upgrade", "deployment/client")
	s.wantServed(map[string]string{"client": "new", "server": "new"})
	for deployment, was := range before {
		r := s.release(deployment)
		t.Logf("%s: %+v, was %+v", deployment, r, was)
		if r.istio == was.istio || r.envoy == was.envoy {
			t.Errorf("the %s is %+v and was %+v, want another Istio and another Envoy", deployment, r, was)
		}
	}
	sent, end = s.load(myService)
	n.Istioctl(t, "uninstall", "--revision", "old", "-y")
	n.Eventually(t, 3*time.Minute, func() (bool, string) {
		left := n.Kubectl(t, "get", "deployments,pods,services,configmaps", "-n", "istio-system", "-l", "istio.io/rev=old", "-o", "name") +
			n.Kubectl(t, "get", "mutatingwebhookconfigurations,validatingwebhookconfigurations", "-l", "istio.io/rev=old", "-o", "name")
		return left == "", "the old control plane leaves " + left
	})
	s.wantServed(map[string]string{"client": "new", "server": "new"})
	s.wantCaller("client", "spiffe://cluster.local/ns/upgrade/sa/default", "get", myService)
	end()
	wantNoFailure(t, "the old control plane went", sent)
	if out := n.Istioctl(t, "version"); strings.Contains(out, tag) {
		t.Errorf("the old release is still there:\n%s", out)
	}
}

func wantNoFailure(t *testing.T, while string, sent *tally) {
	t.Helper()
	t.Logf("while %s: %+v", while, *sent)
	if len(sent.Errors) > 0 || len(sent.Status) != 1 || sent.Status[http.StatusOK] == 0 {
		t.Errorf("while %s: %+v, want nothing but 200", while, *sent)
	}
}

// buildOldMesh makes the images of the older release and returns their tag, their archive, and that Istio's charts.
func buildOldMesh(t *testing.T) (tag, archive, charts string) {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	var complaint strings.Builder
	cmd := exec.CommandContext(t.Context(), filepath.Join(top, "test", "e2e", "images", "old", "build.sh"))
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("build the older release: %v: %s", err, complaint.String())
	}
	made := filepath.Join(top, ".build", "e2e")
	return strings.TrimSpace(string(out)), filepath.Join(made, "old.tar"), filepath.Join(made, "old", "manifests")
}

// wantServed waits until istioctl shows every proxy of each Deployment in step with the control plane of this revision.
func (s *scenario) wantServed(by map[string]string) {
	s.t.Helper()
	s.Eventually(s.t, 4*time.Minute, func() (bool, string) {
		printed := map[string]string{}
		for _, revision := range by {
			// A control plane reports its own proxies only.
			out, errOut, code := s.Polymesh(s.t, "istioctl", "proxy-status", "-n", s.name, "--revision", revision, "-v", "1")
			if code != 0 {
				return false, errOut
			}
			printed[revision] = out
		}
		for deployment, revision := range by {
			for _, pod := range listPods(s.t, s.Node, s.name, "app="+deployment) {
				if pod.DeletionTimestamp != nil {
					return false, pod.Name + " is still there"
				}
				line := lineOf(printed[revision], pod.Name+"."+s.name+" ")
				if strings.Count(line, "SYNCED") < 3 || strings.Contains(line, "STALE") || strings.Contains(line, "ERROR") || !strings.Contains(line, " istiod-"+revision+"-") {
					return false, fmt.Sprintf("%s is not in step with %s:\n%s", pod.Name, revision, printed[revision])
				}
			}
		}
		return true, ""
	})
}

// lineOf is the line of a text that begins like this, or nothing.
func lineOf(text, beginning string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, beginning) {
			return line
		}
	}
	return ""
}

// release is what a sidecar is made of.
type release struct{ istio, envoy string }

var envoyVersion = regexp.MustCompile(`/(\d+\.\d+\.\d+)/`)

// release queries the Envoy of a Deployment.
func (s *scenario) release(deployment string) release {
	s.t.Helper()
	out := s.Kubectl(s.t, "exec", "-n", s.name, "deployment/"+deployment, "-c", "istio-proxy", "--", "pilot-agent", "request", "GET", "server_info")
	var info struct {
		Version string
		Node    struct {
			Metadata struct {
				Version string `json:"ISTIO_VERSION"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		s.t.Fatal(err)
	}
	found := envoyVersion.FindStringSubmatch(info.Version)
	if found == nil || info.Node.Metadata.Version == "" {
		s.t.Fatalf("the Envoy of %s returns %s", deployment, out)
	}
	return release{info.Node.Metadata.Version, found[1]}
}
