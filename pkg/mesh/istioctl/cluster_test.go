package istioctl

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Lists whether each command needs a cluster when called without flags. A new upstream command fails this test.
func TestWhichCommandsNeedACluster(t *testing.T) {
	var list strings.Builder
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if !c.Runnable() {
			return
		}
		if err := c.ParseFlags(nil); err != nil {
			t.Fatal(err)
		}
		needs := "-"
		if needsCluster(name(c), c.Flags()) {
			needs = "cluster"
		}
		fmt.Fprintf(&list, "%-8s %s\n", needs, c.CommandPath())
	}
	walk(NewCommand(nil, ours))
	golden(t, "cluster.txt", list.String())
}

// kubeconfigOf writes a kubeconfig with a context for each server, c0 and so on; the first is the current one.
func kubeconfigOf(t *testing.T, servers ...string) string {
	t.Helper()
	var clusters, contexts strings.Builder
	for i, server := range servers {
		fmt.Fprintf(&clusters, "- {name: c%d, cluster: {server: '%s'}}\n", i, server)
		fmt.Fprintf(&contexts, "- {name: c%d, context: {cluster: c%d, user: u}}\n", i, i)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig.yaml")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: c0\nusers: [{name: u, user: {}}]\nclusters:\n" + clusters.String() + "contexts:\n" + contexts.String()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Without a cluster, the commands that need one fail instead of waiting.
func TestWithoutCluster(t *testing.T) {
	const deaf = "http://127.0.0.1:1"
	alive := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"major":"1"}`)) }))
	defer alive.Close()
	missing, dead := filepath.Join(t.TempDir(), "missing.yaml"), kubeconfigOf(t, deaf)
	both := kubeconfigOf(t, alive.URL, deaf)
	none := "no cluster: " + missing + " does not exist (on a server: start it with `polymesh server`; elsewhere copy a server's kubeconfig, and set it with --kubeconfig or KUBECONFIG)"
	down := "the cluster at " + deaf + " does not answer: "
	for _, tc := range []struct{ env, args, want string }{
		{missing, "proxy-status", none},
		{dead, "proxy-status", down},
		{missing, "proxy-status -c " + dead, down},
		{both, "proxy-status --context c1", down},
		{both, "proxy-status --context nosuch", `context "nosuch" does not exist`},
		{missing, "proxy-status -c " + missing + "x", "no such file or directory"},
		{dead, "proxy-config cluster x", down},
		{dead, "x precheck", down},
		{dead, "x describe pod x", down},
		{dead, "x internal-debug syncz", down},
		{dead, "admin log", down},
		{dead, "analyze", down},
		{dead, "install -y", down},
		{dead, "uninstall --purge -y", down},
		{dead, "manifest generate --cluster-specific", down},
		{dead, "remote-clusters", down},
		{dead, "bug-report", down},
		{both, "bug-report --context c1", down},
		{dead, "dashboard kiali", down},
		{dead, "tag list", down},
	} {
		t.Setenv("KUBECONFIG", tc.env)
		if out, err := run(t, strings.Fields(tc.args)...); err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("istioctl %s: error is %v, want %q\n%s", tc.args, err, tc.want, out)
		}
	}
	// Printing this program's version does not need a cluster.
	t.Setenv("KUBECONFIG", dead)
	for _, args := range []string{"version", "version -o json", "x version"} {
		if out, err := run(t, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), down) || !strings.Contains(out, "client version: ") && !strings.Contains(out, "clientVersion") {
			t.Errorf("istioctl %s: error is %v\n%s", args, err, out)
		}
	}
}

// Commands that do not need a cluster work without one.
func TestOffline(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KUBECONFIG", filepath.Join(dir, "missing.yaml"))
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	service := write("service.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: n}\nspec: {ports: [{name: http, port: 80}]}\n")
	dump := write("dump.json", `{"configs": [{"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
		"dynamic_active_clusters": [{"cluster": {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "outbound|80||s.n.svc.cluster.local"}}]}]}`)
	for _, args := range []string{
		"version --remote=false", "analyze --use-kube=false " + service, "analyze -L", "validate -f " + service, "profile list", "manifest generate --set profile=empty",
		"manifest translate --set profile=empty -o " + dir, "waypoint generate", "x workload group create --name n --namespace n", "x config list",
		"proxy-config cluster -f " + dump, "help", "proxy-status --help", "completion bash", "dashboard", "tag", "bug-report version",
	} {
		if out, err := run(t, strings.Fields(args)...); err != nil {
			t.Errorf("istioctl %s: %v\n%s", args, err, out)
		}
	}
	// This fails for lack of an istiod, not of an API server; upstream then still prints this program's version.
	if _, err := run(t, "x", "version", "--xds-address", "127.0.0.1:1", "--plaintext", "--timeout", "1s"); err != nil {
		t.Errorf("istioctl x version of an address: %v", err)
	}
}
