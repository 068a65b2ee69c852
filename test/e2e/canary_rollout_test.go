//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/rollout"
)

const (
	nextImage   = "registry.polymesh.dev/test/echo:2"
	rolloutHost = "rollout.example.com"
)

// canaryScenario is the scenario "rollout" under load.
type canaryScenario struct {
	*scenario
	// before is what the scenario's own routes look like without a rollout.
	before string
}

// operator is a place from which someone drives a rollout: it has its own kubeconfig.
type operator struct {
	s    *canaryScenario
	t    *testing.T
	file string
}

func (s *canaryScenario) operator(t *testing.T) *operator {
	t.Helper()
	text, err := os.ReadFile(s.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return &operator{s, t, file}
}

// driving is a command that is under way.
type driving struct {
	t       *testing.T
	cmd     *exec.Cmd
	printed *firstOf
	out     strings.Builder
}

// start starts a rollout command, which prints text at some time.
func (m *operator) start(text string, args ...string) *driving {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.t.Context()), 4*time.Minute)
	m.t.Cleanup(cancel)
	d := &driving{t: m.t, printed: &firstOf{text: text, seen: make(chan struct{})}}
	d.cmd = m.s.PolymeshCommand(ctx, append([]string{"rollout"}, append(args, "-n", "rollout", "--kubeconfig", m.file)...)...)
	d.cmd.Stdout, d.cmd.Stderr = &d.out, d.printed
	if err := d.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	return d
}

// canary starts a rollout of nextImage, until it is at its first step.
func (m *operator) canary() *driving { return m.canaryOf(nextImage) }

// canaryOf starts a rollout whose steps last a few seconds. The bound of p99 is for a machine that does much else.
func (m *operator) canaryOf(image string) *driving {
	m.t.Helper()
	d := m.start("10 % ...", "canary", "api", "--image", image, "--interval", "6s", "--min-requests", "15", "--timeout", "2m", "--max-p99", "1500ms", "-o", "json")
	d.seen()
	return d
}

// seen waits until the command has printed its text.
func (d *driving) seen() {
	d.t.Helper()
	select {
	case <-d.printed.seen:
	case <-time.After(2 * time.Minute):
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
		d.t.Fatalf("it does not print %q:\n%s", d.printed.text, d.printed)
	}
}

// end waits for the command's end, and returns its exit code and how the rollout stands.
func (d *driving) end() (int, rollout.Result) {
	d.t.Helper()
	err := d.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	var r rollout.Result
	if d.out.Len() > 0 {
		if err := json.Unmarshal([]byte(d.out.String()), &r); err != nil {
			d.t.Fatalf("%v: %s", err, d.out.String())
		}
	}
	d.t.Logf("exit code %d:\n%s", d.cmd.ProcessState.ExitCode(), d.printed)
	return d.cmd.ProcessState.ExitCode(), r
}

// spoil changes the responses of the canary's pods.
func (s *canaryScenario) spoil(t *testing.T, how string) {
	t.Helper()
	for _, pod := range listPods(t, s.Node, s.name, "polymesh.dev/rollout=api") {
		if out, err := s.Exec(s.name, pod.Name, "echo", "/echo", "get", "http://localhost:8080/set?"+how); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// routes is what the mesh knows of the Service.
func (s *canaryScenario) routes(t *testing.T) string {
	t.Helper()
	return s.Kubectl(t, "get", "deployments,virtualservices,destinationrules", "-n", s.name, "-o",
		`jsonpath={range .items[*]}{.kind}/{.metadata.name} {.spec.http} {.spec.subsets} {.spec.selector}{"\n"}{end}`)
}

// wantAsBefore checks what a rollout has left.
func (s *canaryScenario) wantAsBefore(t *testing.T, image string) {
	t.Helper()
	if now := s.routes(t); now != s.before {
		t.Errorf("there is now\n%s\nand was\n%s", now, s.before)
	}
	if got := s.Kubectl(t, "get", "deployment", "api", "-n", s.name, "-o", "jsonpath={.spec.template.spec.containers[0].image}"); got != image {
		t.Errorf("the image is %s, want %s", got, image)
	}
	if left := s.Kubectl(t, "get", "leases", "-n", s.name, "-o", "name"); strings.TrimSpace(left) != "" {
		t.Errorf("a lease is left: %s", left)
	}
}

// outside calls through the gateway until end, which returns what did not come back with 200.
func (s *canaryScenario) outside(t *testing.T) (end func() (sent int, failed []string)) {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var sent int
	var failed []string
	client := s.HTTP(true)
	running.Go(func() {
		defer client.CloseIdleConnections()
		pace := time.NewTicker(40 * time.Millisecond)
		defer pace.Stop()
		for ctx.Err() == nil {
			<-pace.C
			status, text, err := ask(client, s.Node, http.MethodGet, rolloutHost, "/", nil)
			sent++
			if err != nil || status != http.StatusOK {
				failed = append(failed, fmt.Sprintf("%d %s %v", status, text, err))
			}
		}
	})
	end = func() (int, []string) {
		stop()
		running.Wait()
		return sent, failed
	}
	t.Cleanup(func() { end() })
	return end
}

// A canary gets its share step by step, and goes by itself when it fails, is slow, or is not wanted any more. The machine
// that drives it may die.
func TestCanaryRollout(t *testing.T) {
	s := &canaryScenario{scenario: newScenario(t, "rollout")}
	s.Ctr(t, "images", "tag", "--force", echoImage, nextImage)
	t.Cleanup(func() { s.Ctr(t, "images", "rm", nextImage) })
	s.apply("routes.yaml")
	s.Eventually(t, time.Minute, func() (bool, string) {
		status, text, err := ask(s.HTTP(false), s.Node, http.MethodGet, rolloutHost, "/", nil)
		return err == nil && status == http.StatusOK, fmt.Sprintf("%d %s %v", status, text, err)
	})
	s.before = s.routes(t)
	const url = "http://api/"
	here, there := s.operator(t), s.operator(t)
	_, endLoad := s.load(url)

	t.Run("errors take it back", func(t *testing.T) {
		s := &canaryScenario{s.in(t), s.before}
		d := (&operator{s, t, here.file}).canary()
		s.spoil(t, "status=500")
		code, r := d.end()
		if code != 2 || r.State == nil || r.Phase != rollout.RolledBack || !strings.Contains(r.Reason, "at 10 %: error rate") || !strings.Contains(r.Reason, "above --max-error-rate 1") {
			t.Errorf("exit code %d, %+v", code, r.State)
		}
		s.wantAsBefore(t, echoImage)
	})
	t.Run("slowness takes it back", func(t *testing.T) {
		long(t, "errors take a canary back in the same way, and pkg/workflow/rollout measures the quantile")
		s := &canaryScenario{s.in(t), s.before}
		d := (&operator{s, t, here.file}).canary()
		s.spoil(t, "delay=2s")
		code, r := d.end()
		if code != 2 || r.State == nil || r.Phase != rollout.RolledBack || !strings.Contains(r.Reason, "p99") || !strings.Contains(r.Reason, "above --max-p99 1.5s") {
			t.Errorf("exit code %d, %+v", code, r.State)
		}
		s.wantAsBefore(t, echoImage)
		// A rollout that has ended is still shown.
		if out, _, code := s.Polymesh(t, "rollout", "status", "api", "-n", s.name); code != 2 || !strings.Contains(out, "RolledBack: at 10 %: p99") {
			t.Errorf("status: exit code %d: %s", code, out)
		}
	})
	t.Run("another machine aborts it", func(t *testing.T) {
		s := &canaryScenario{s.in(t), s.before}
		d := (&operator{s, t, here.file}).canary()
		s.refusesDeploy(t)
		if _, printed, code := s.Polymesh(t, "rollout", "canary", "api", "-n", s.name, "--image", "registry.polymesh.dev/test/echo:3"); code != 1 || !strings.Contains(printed, "of image "+nextImage) {
			t.Errorf("a second rollout: exit code %d: %s", code, printed)
		}
		if out, _, _ := s.Polymesh(t, "__complete", "rollout", "abort", "-n", s.name, ""); !strings.Contains(out, "api\n") {
			t.Errorf("the shell is offered %q", out)
		}
		code, _ := (&operator{s, t, there.file}).start("aborted", "abort", "api").end()
		driver, r := d.end()
		if code != 0 || driver != 3 || r.State == nil || r.Phase != rollout.Aborted {
			t.Errorf("exit codes %d and %d, %+v", code, driver, r.State)
		}
		s.wantAsBefore(t, echoImage)
	})
	endLoad() // its requests were to fail
	t.Run("the machine dies and another one promotes it", func(t *testing.T) {
		s := &canaryScenario{s.in(t), s.before}
		sent, end := s.load(url)
		outside := s.outside(t)
		d := (&operator{s, t, here.file}).canary()
		if err := d.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = d.cmd.Wait()
		// Its weights hold.
		weights := s.Kubectl(t, "get", "virtualservice", "api-outside", "-n", s.name, "-o", "jsonpath={.spec.http[0].route[*].weight}")
		if weights != "90 10" {
			t.Errorf("the weights are %q", weights)
		}
		code, r := (&operator{s, t, there.file}).start("promoted", "canary", "api", "-o", "json").end()
		if code != 0 || r.State == nil || r.Phase != rollout.Promoted || len(r.Done) != 3 {
			t.Errorf("exit code %d, %+v", code, r.State)
		}
		s.wantAsBefore(t, nextImage)
		end()
		if count, failed := outside(); len(failed) > 0 || count < 100 {
			t.Errorf("from outside, %d of %d failed: %v", len(failed), count, failed[:min(len(failed), 5)])
		}
		canary, total := 0, 0
		for pod, n := range sent.Pods {
			total += n
			if strings.HasPrefix(pod, "api-canary-") {
				canary += n
			}
		}
		t.Logf("%d of %d answers came from the canary: %v", canary, total, sent.Pods)
		if len(sent.Errors) > 0 || len(sent.Status) != 1 || sent.Status[200] != total || canary == 0 || canary == total {
			t.Errorf("inside the mesh: %+v, want nothing but 200, from both", *sent)
		}
	})
	t.Run("pods that never become ready take it back", func(t *testing.T) {
		long(t, "errors take a canary back in the same way, and TestDrive in pkg/workflow/rollout has pods that never become ready")
		s := &canaryScenario{s.in(t), s.before}
		d := (&operator{s, t, here.file}).start("rolled back", "canary", "api", "--image", "registry.polymesh.dev/test/none:1", "--interval", "6s", "--timeout", "20s", "-o", "json")
		code, r := d.end()
		if code != 2 || r.State == nil || r.Phase != rollout.RolledBack || !strings.Contains(r.Reason, "the pods of api-canary did not become ready") {
			t.Errorf("exit code %d, %+v", code, r.State)
		}
		s.wantAsBefore(t, nextImage)
	})
	t.Run("Ctrl-C, and promoted by hand", func(t *testing.T) {
		s := &canaryScenario{s.in(t), s.before}
		d := (&operator{s, t, here.file}).canaryOf(echoImage)
		if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if code, _ := d.end(); code != 1 || !strings.Contains(d.printed.String(), "interrupted at 10 %, which stays so") {
			t.Errorf("exit code %d", code)
		}
		code, r := (&operator{s, t, there.file}).start("promoted", "promote", "api", "-o", "json").end()
		if code != 0 || r.State == nil || r.Phase != rollout.Promoted {
			t.Errorf("exit code %d, %+v", code, r.State)
		}
		s.wantAsBefore(t, echoImage)
	})
}

// refusesDeploy checks a deploy of the Deployment during a rollout.
func (s *canaryScenario) refusesDeploy(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	text, err := os.ReadFile(filepath.Join(s.dir, workloads))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"polymesh.yaml": "apiVersion: polymesh.dev/v1\nkind: Project\nname: rollout\nmanifests: [" + workloads + "]\n", workloads: string(text),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, printed, code := s.Polymesh(t, "deploy", dir)
	if code != 1 || !strings.Contains(printed, workloads+":") || !strings.Contains(printed, "a rollout of deployment.apps/api -n rollout is under way, at 10 %") {
		t.Errorf("a deploy: exit code %d: %s", code, printed)
	}
}
