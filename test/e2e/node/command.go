package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// commandLimit is the timeout of a single command; one that waits for something has its own.
const commandLimit = 5 * time.Minute

// Command returns a command on the node: in its network, with the environment for its server. The caller sets standard output and
// error.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	line := slices.Concat(n.namespaces(), []string{name}, args)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = append(environment(),
		"POLYMESH_DATA_DIR="+n.DataDir(), "KUBECONFIG="+n.Kubeconfig(),
		"KUBECACHEDIR="+filepath.Join(n.Dir, "kubecache"), "XDG_CACHE_HOME="+filepath.Join(n.Dir, "cache"))
	return cmd
}

// OutsideCommand returns a command in the outside world. nsenter executes the program, so the process is the program itself.
func (n *Node) OutsideCommand(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.outside.path(), "--", name}, args...)...)
	cmd.Env = environment()
	return cmd
}

// PolymeshCommand returns `polymesh` with these arguments, on the node.
func (n *Node) PolymeshCommand(ctx context.Context, args ...string) *exec.Cmd {
	return n.Command(ctx, n.program, args...)
}

// run returns a command's standard output; an error contains both outputs.
func (n *Node) run(ctx context.Context, name string, args ...string) (string, error) {
	return n.runWith(ctx, "", name, args...)
}

func (n *Node) runWith(ctx context.Context, input, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := n.Command(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
	if err := cmd.Run(); err != nil {
		output := strings.TrimSpace(errOut.String() + out.String())
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, output)
	}
	return out.String(), nil
}

// Polymesh runs `polymesh` on the node. It returns both outputs and the exit code.
func (n *Node) Polymesh(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(lasting(t), commandLimit)
	defer cancel()
	cmd := n.PolymeshCommand(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() < 0) {
		t.Fatalf("polymesh %s: %v: %s", strings.Join(args, " "), err, errOut.String())
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// Status runs `polymesh status` and returns what it prints and its exit code.
func (n *Node) Status(t testing.TB) (string, int) {
	t.Helper()
	out, errOut, code := n.Polymesh(t, "status")
	return out + errOut, code
}

// KubectlErr runs `polymesh kubectl` and returns its standard output.
func (n *Node) KubectlErr(args ...string) (string, error) {
	if server := n.agentOf(); server != nil {
		return server.KubectlErr(args...)
	}
	return n.run(context.Background(), n.program, append([]string{"kubectl"}, args...)...)
}

// Kubectl runs `polymesh kubectl`, which must succeed, and returns its standard output.
func (n *Node) Kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.KubectlErr(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Istioctl runs `polymesh istioctl`, which must succeed, and returns its standard output.
func (n *Node) Istioctl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.run(lasting(t), n.program, append([]string{"istioctl"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies manifests with kubectl.
func (n *Node) Apply(t testing.TB, yaml string) {
	t.Helper()
	if _, err := n.runWith(lasting(t), yaml, n.program, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// Delete deletes manifests with kubectl and waits until everything is gone, at the end of a test. A test that has failed is explained
// first, while everything still exists.
func (n *Node) Delete(t testing.TB, yaml string) {
	t.Helper()
	n.ExplainNow(t)
	if _, err := n.runWith(lasting(t), yaml, n.program, "kubectl", "delete", "--ignore-not-found", "-f", "-"); err != nil {
		t.Error(err)
	}
}

// Exec runs a command in a container and returns its standard output.
func (n *Node) Exec(namespace, pod, container string, command ...string) (string, error) {
	return n.KubectlErr(append([]string{"exec", "-n", namespace, pod, "-c", container, "--"}, command...)...)
}

// Ctr runs `polymesh ctr`, which must succeed, and returns its standard output.
func (n *Node) Ctr(t testing.TB, args ...string) string {
	t.Helper()
	out, err := n.run(lasting(t), n.program, append([]string{"ctr"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Import imports an image archive into the node's containerd.
func (n *Node) Import(t testing.TB, archive string) {
	t.Helper()
	n.Ctr(t, "images", "import", archive)
}

// ClientConfig returns the administrator's configuration for client-go, through the node's network.
func (n *Node) ClientConfig() (*rest.Config, error) {
	if server := n.agentOf(); server != nil {
		return server.ClientConfig()
	}
	config, err := kubeconfig.Config(n.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.Dial = n.Dial
	config.QPS, config.Burst = 200, 400
	return config, nil
}

// NewClient returns client-go's client for the cluster. The kubeconfig must exist.
func (n *Node) NewClient() (*kubernetes.Clientset, error) {
	config, err := n.ClientConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// Client is NewClient, which must succeed.
func (n *Node) Client(t testing.TB) *kubernetes.Clientset {
	t.Helper()
	client, err := n.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	return client
}
