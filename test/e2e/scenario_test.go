//go:build e2e

package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"polymesh.dev/polymesh/test/e2e/node"
)

// scenario is a folder of test/e2e/scenarios: manifests that a reader can apply by hand, and a README that explains what
// they show. The test that uses the folder asserts it. Everything of a scenario is in separate namespaces, the first
// one named like the folder, and is removed when the test ends.
type scenario struct {
	*node.Node
	t    *testing.T
	name string
	dir  string
	// jaegerAPI is where traces are looked up, the scenario's own Jaeger if it is empty.
	jaegerAPI string
}

// workloads is the file of every scenario with its namespaces, Deployments and Services.
const workloads = "workloads.yaml"

// newScenario applies a scenario's workloads to the shared node and waits for their pods. The other files are for apply.
func newScenario(t *testing.T, name string) *scenario {
	t.Helper()
	return newScenarioOn(t, app(t), name)
}

// newScenarioOn is newScenario on the test's own node.
func newScenarioOn(t *testing.T, n *node.Node, name string) *scenario {
	t.Helper()
	s := &scenario{Node: n, t: t, name: name, dir: filepath.Join("scenarios", name)}
	importEcho(t, s.Node)
	t.Cleanup(func() { s.delete(workloads) })
	s.apply(workloads)
	for deployment := range strings.FieldsSeq(s.Kubectl(t, "get", "deployments", "-n", name, "-o", "name")) {
		s.WaitRollout(t, name, deployment)
	}
	return s
}

// apply applies files of the scenario and deletes them at the test's end.
func (s *scenario) apply(files ...string) {
	s.t.Helper()
	for _, file := range files {
		if file != workloads {
			s.t.Cleanup(func() { s.delete(file) })
		}
		s.Kubectl(s.t, "apply", "-f", filepath.Join(s.dir, file))
	}
}

// applyHere applies files without a namespace in the scenario's own.
func (s *scenario) applyHere(files ...string) {
	s.t.Helper()
	for _, file := range files {
		s.t.Cleanup(func() { s.delete(file, "-n", s.name) })
		s.Kubectl(s.t, "apply", "-n", s.name, "-f", filepath.Join(s.dir, file))
	}
}

// delete deletes a file's objects and waits until they are gone.
func (s *scenario) delete(file string, flags ...string) {
	s.t.Helper()
	s.ExplainNow(s.t)
	args := append([]string{"delete", "--ignore-not-found", "-f", filepath.Join(s.dir, file)}, flags...)
	if _, err := s.KubectlErr(args...); err != nil {
		s.t.Error(err)
	}
}

// call calls with the echo image's client from the scenario's Deployment of this name.
func (s *scenario) call(from string, args ...string) (string, error) {
	return s.KubectlErr(append([]string{"exec", "-n", s.name, "deployment/" + from, "-c", "echo", "--", "/echo"}, args...)...)
}

// in is the scenario in a subtest: what it applies is deleted when the subtest ends.
func (s *scenario) in(t *testing.T) *scenario {
	part := *s
	part.t = t
	return &part
}
