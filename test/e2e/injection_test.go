//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// sidecar reports what kind of container the sidecar of a pod is.
func sidecar(p *corev1.Pod) string {
	is := func(c corev1.Container) bool { return c.Name == "istio-proxy" }
	if slices.ContainsFunc(p.Spec.Containers, is) {
		return "container"
	}
	if i := slices.IndexFunc(p.Spec.InitContainers, is); i >= 0 {
		if always := p.Spec.InitContainers[i].RestartPolicy; always != nil && *always == corev1.ContainerRestartPolicyAlways {
			return "native"
		}
		return "init container"
	}
	return "none"
}

func TestInjection(t *testing.T) {
	s := newScenario(t, "injection")
	for _, pod := range []struct{ namespace, app, want string }{
		{"injection", "app", "native"},
		{"injection", "opted-out", "none"},
		{"injection-unlabelled", "app", "none"},
		{"injection-unlabelled", "opted-in", "native"},
		{"injection-revision", "app", "native"},
	} {
		s.WaitRollout(t, pod.namespace, "deployment/"+pod.app)
		found := listPods(t, s.Node, pod.namespace, "app="+pod.app)
		if len(found) != 1 {
			t.Fatalf("%s/%s has %d pods, want 1", pod.namespace, pod.app, len(found))
		}
		if got := sidecar(&found[0]); got != pod.want {
			t.Errorf("%s/%s has the sidecar %q, want %q", pod.namespace, pod.app, got, pod.want)
		}
		if status := containerStatus(&found[0], "istio-proxy"); status.Ready != (pod.want == "native") {
			t.Errorf("%s/%s: the sidecar's status is %+v", pod.namespace, pod.app, status)
		}
	}

	// Istio's pages call curl in the sidecar: Envoy's admin port, and services by their names, with a certificate.
	curl := func(command string) string {
		return s.Kubectl(t, "exec", "-n", "injection", "deployment/app", "-c", "istio-proxy", "--", "sh", "-c", "curl -sS "+command)
	}
	if got := curl("localhost:15000/ready"); got != "LIVE\n" {
		t.Errorf("curl of the sidecar's admin port prints %q, want LIVE", got)
	}
	// The search path completes the name.
	if got := curl(`-w ' %{http_code}' --cacert /var/run/secrets/kubernetes.io/serviceaccount/ca.crt ` +
		`-H "Authorization: Bearer $(cat /var/run/secrets/kubernetes.io/serviceaccount/token)" https://kubernetes.default/version`); !strings.HasSuffix(got, " 200") {
		t.Errorf("curl of the API server, with its authority, prints %q, want status 200", got)
	}
	if got := curl("-kI --http1.1 https://kubernetes.default.svc.cluster.local/version"); !strings.HasPrefix(got, "HTTP/1.1 ") {
		t.Errorf("curl -I of the API server prints %q, want the response's headers", got)
	}

	s.apply("job.yaml")
	s.Kubectl(t, "wait", "--for=condition=Complete", "job/once", "-n", s.name, "--timeout=180s")
	s.Eventually(t, time.Minute, func() (bool, string) {
		for _, p := range listPods(t, s.Node, s.name, "job-name=once") {
			if p.Status.Phase != corev1.PodSucceeded {
				continue
			}
			ended := containerStatus(&p, "istio-proxy").State.Terminated
			return sidecar(&p) == "native" && ended != nil, fmt.Sprintf("the Job's pod has succeeded with the sidecar %q, which ended with %v", sidecar(&p), ended)
		}
		return false, "no pod of the Job has succeeded"
	})
}

func TestValidation(t *testing.T) {
	s := newScenario(t, "validation")
	list := func() string {
		return s.Kubectl(t, "get", "virtualservices", "-n", s.name, "-o", "jsonpath={range .items[*]}{.metadata.name} {.metadata.resourceVersion}{end}")
	}
	refuse := func() {
		t.Helper()
		out, err := s.KubectlErr("apply", "-f", filepath.Join(s.dir, "bad.yaml"))
		if err == nil {
			t.Fatalf("kubectl apply of bad.yaml prints %q, want it rejected", out)
		}
		for _, want := range []string{`validation.istio.io" denied the request`, "HTTP route cannot contain both route and redirect"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("kubectl apply of bad.yaml prints %q, want %q in it", err, want)
			}
		}
	}

	t.Cleanup(func() { s.delete("bad.yaml") })
	refuse()
	if found := list(); found != "" {
		t.Errorf("there is %q, although it was refused", found)
	}
	// As a change it is rejected too, and what was there stays.
	s.apply("good.yaml")
	before := list()
	refuse()
	if after := list(); after != before || before == "" {
		t.Errorf("there is %q, before it was %q", after, before)
	}
}
