//go:build e2e

// Package e2e contains the end-to-end tests of the shipped file, dist/polymesh, on nodes in network namespaces. They need root.
//
// Most tests use one node with the guide's app, which the first of them brings up with the script of `make up`; that of `make down`
// takes it down when all tests have run. A test that breaks a node has its own. A test leaves the shared node as it found it. Its
// first statement declares what it needs: app or newScenario, or ownNodes. A test that only repeats what others show calls long, and
// is omitted with -short, which CI uses.
//
//	make test-e2e                                                    # all of them, as CI does
//	go test -tags "netgo osusergo sqlite_omit_load_extension disable_pgv e2e" -count=1 -v -run TestCallGo ./test/e2e
//
// The documentation of package node describes how to inspect a node that a test has created.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/lanes"
	"polymesh.dev/polymesh/test/e2e/node"
)

var prepare = flag.Bool("prepare", false, "run no tests, only prepare the data dir from which nodes start")

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(lanes.PlanEnv) != "" {
		os.Exit(m.Run())
	}
	if err := node.Guard(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	if *prepare {
		if err := node.Prepare(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: prepare the data dir of nodes:", err)
			os.Exit(1)
		}
		return
	}
	code := runTests(m)
	if err := shared.finish(code == 0); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: the shared node at the end:", err)
		code = 1
	}
	os.Exit(code)
}

// runTests runs the tests that the command line selects, or those that the scheduler hands out, in sequence.
func runTests(m *testing.M) (code int) {
	if !lanes.InLane() {
		return m.Run()
	}
	for {
		name, err := lanes.Next(context.Background(), shared.state())
		if err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			return 1
		}
		if name == "" {
			return code
		}
		if err := flag.Set("test.run", "^"+name+"$"); err != nil {
			fmt.Fprintln(os.Stderr, "FAIL:", err)
			return 1
		}
		// It may be called again (go.dev/issue/23129).
		code = max(code, m.Run())
	}
}

// ownNodes declares that a test runs this number of its own nodes at a time, or none, and can run in parallel with others. It must be
// the test's first statement.
func ownNodes(t *testing.T, count int) {
	t.Helper()
	declare(t, lanes.Test{Nodes: count})
}

// declare writes down what a test needs instead of running it, if that is requested.
func declare(t *testing.T, need lanes.Test) {
	t.Helper()
	file := os.Getenv(lanes.PlanEnv)
	if file == "" {
		return
	}
	need.Name = t.Name()
	if err := lanes.Declare(file, need); err != nil {
		t.Fatal(err)
	}
	t.SkipNow()
}

// long leaves a test, or a part of one, to `make test-all`, because it repeats what another one shows, which why names.
func long(t *testing.T, why string) {
	t.Helper()
	if testing.Short() {
		t.Skip("left to make test-all: " + why)
	}
}

// sharedNode is the node with the guide's app.
type sharedNode struct {
	once   sync.Once
	node   *node.Node
	output string // of `make up`
	err    error
	// reported is set once a test has shown err.
	reported bool
}

var shared sharedNode

func (s *sharedNode) state() lanes.SharedNode {
	switch {
	case s.err != nil:
		return lanes.NodeBroken
	case s.node != nil:
		return lanes.NodeUp
	default:
		return lanes.NoNode
	}
}

// app returns the node on which `make up` has run.
func app(t *testing.T) *node.Node {
	t.Helper()
	declare(t, lanes.Test{Shared: true})
	shared.once.Do(func() {
		if shared.node, shared.err = node.New(node.Options{Env: []string{"POLYMESH_OBSERVE_REMOTE_WRITE=true", node.GOGC}}); shared.err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		shared.output, shared.err = shared.node.Up(ctx)
		t.Log(shared.output)
	})
	if shared.err != nil && !shared.reported {
		shared.reported = true
		if shared.node != nil {
			shared.node.ExplainFailure(t)
		}
		t.Fatalf("make up: %v", shared.err)
	}
	if shared.err != nil {
		t.Fatal("make up has failed: see the first test that failed")
	}
	shared.node.ExplainFailure(t)
	return shared.node
}

// finish takes down the shared node, after a last check.
func (s *sharedNode) finish(check bool) error {
	if s.node == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if s.err != nil || !check || os.Getenv("POLYMESH_E2E_KEEP") != "" {
		return s.node.Close(ctx)
	}
	err := noRejects(ctx, s.node)
	if err != nil {
		s.node.Explain(os.Stderr)
	}
	out, downErr := s.node.Down(ctx)
	fmt.Print(out)
	if downErr == nil {
		if _, err := os.Stat(s.node.DataDir()); err == nil {
			downErr = errors.New("make down left the data dir")
		}
	}
	return errors.Join(err, downErr, s.node.Close(ctx))
}

// removeNamespaces removes namespaces with all that is in them, also after a failed test. Their pods get a second to terminate,
// instead of their grace period.
func removeNamespaces(t *testing.T, n *node.Node, names ...string) {
	t.Helper()
	n.ExplainNow(t)
	steps := [][]string{append([]string{"delete", "namespace", "--ignore-not-found", "--wait=false"}, names...)}
	for _, name := range names {
		steps = append(steps, []string{"delete", "pods", "--all", "-n", name, "--grace-period=1", "--wait=false"})
	}
	steps = append(steps, append([]string{"delete", "namespace", "--ignore-not-found"}, names...))
	for _, args := range steps {
		if _, err := n.KubectlErr(args...); err != nil {
			t.Error(err)
		}
	}
}

// Images of the tests, from test/e2e/images: the workload, and where a mesh sends its traces.
const (
	echoImage   = "registry.polymesh.dev/test/echo:1"
	jaegerImage = "registry.polymesh.dev/test/jaeger:1.76.0"
)

var (
	buildEcho   = sync.OnceValues(func() (string, error) { return buildImage("echo") })
	buildJaeger = sync.OnceValues(func() (string, error) { return buildImage("jaeger") })
)

// buildImage returns the archive of an image, which it builds if it is missing or old.
func buildImage(name string) (string, error) {
	top, err := node.Top()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(filepath.Join(top, "test", "e2e", "images", "build.sh"), name)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the image %s: %w: %s", name, err, out)
	}
	return filepath.Join(top, ".build", "e2e", name+".tar"), nil
}

// importEcho imports the echo image on a node. It builds it if it is missing.
func importEcho(t *testing.T, n *node.Node) { importImage(t, n, echoImage, buildEcho) }

// importJaeger imports Jaeger's image on a node. The first build takes some minutes.
func importJaeger(t *testing.T, n *node.Node) { importImage(t, n, jaegerImage, buildJaeger) }

func importImage(t *testing.T, n *node.Node, image string, build func() (string, error)) {
	t.Helper()
	archive, err := build()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(n.Ctr(t, "images", "ls", "-q"), image) {
		n.Import(t, archive)
	}
}
