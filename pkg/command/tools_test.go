package command

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kubectl without a cluster lists the searched files, and only when it needs a cluster.
func TestKubectlWithoutCluster(t *testing.T) {
	if args := os.Getenv("KUBECTL_ARGS"); args != "" {
		os.Exit(Run(append([]string{"kubectl"}, strings.Fields(args)...)))
	}
	dir := t.TempDir()
	missing, empty, dead := filepath.Join(dir, "missing.yaml"), filepath.Join(dir, "empty.yaml"), filepath.Join(dir, "dead.yaml")
	for file, text := range map[string]string{
		empty: "apiVersion: v1\nkind: Config\n",
		dead: "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n" +
			"clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {}}]\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	none := "no cluster: " + missing + " does not exist (on a server: start it with `polymesh server`; elsewhere copy a server's kubeconfig, and set it with --kubeconfig or KUBECONFIG)"
	for _, tc := range []struct {
		kubeconfig, args string
		code             int
		out, errOut      string
	}{
		{missing, "get pods", 1, "", none},
		{missing, "version", 1, "Client Version: v", none},
		{empty, "get pods", 1, "", "no cluster: " + empty + " contains no cluster (on a server"},
		{missing + ":" + empty, "api-resources", 1, "", "no cluster: " + missing + " does not exist, " + empty + " contains no cluster (on a server"},
		{missing, "version --client", 0, "Client Version: v", ""},
		{missing, "config view", 0, "kind: Config", ""},
		{missing, "completion bash", 0, "kubectl", ""},
		{missing, "create configmap c --from-literal=a=b --dry-run=client -o yaml", 0, "kind: ConfigMap", ""},
		{missing, "get --help", 0, "Usage:", ""},
		{missing, "--server=http://127.0.0.1:1 get pods", 1, "", "The connection to the server 127.0.0.1:1 was refused"},
		{missing, "--server=http://localhost:8080 get pods --request-timeout=1ns", 1, "", "context deadline exceeded"},
		{missing, "--kubeconfig=" + dead + " get pods", 1, "", "The connection to the server 127.0.0.1:1 was refused"},
		{dead, "get pods", 1, "", "The connection to the server 127.0.0.1:1 was refused"},
	} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKubectlWithoutCluster$")
		cmd.Env = append(os.Environ(), "KUBECTL_ARGS="+tc.args, "KUBECONFIG="+tc.kubeconfig, "HOME="+dir)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		_ = cmd.Run() // the exit code is checked
		what := fmt.Sprintf("kubectl %s with %s", tc.args, tc.kubeconfig)
		if code := cmd.ProcessState.ExitCode(); code != tc.code || !strings.Contains(out.String(), tc.out) || !strings.Contains(errOut.String(), tc.errOut) {
			t.Errorf("%s: exit code %d, want %d with %q, %q\n%s%s", what, code, tc.code, tc.out, tc.errOut, &out, &errOut)
		}
		if strings.HasPrefix(tc.errOut, "no cluster") && (strings.Contains(errOut.String(), "localhost:8080") || strings.Contains(errOut.String(), "memcache.go")) {
			t.Errorf("%s: client-go's own lines are there:\n%s", what, &errOut)
		}
	}
}
