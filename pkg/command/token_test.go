package command

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The commands for the whole cluster list the searched files if none has a cluster, as kubectl does, and complete nothing.
func TestWithoutCluster(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.yaml")
	t.Setenv("KUBECONFIG", missing)
	for _, args := range []string{"token create", "token list", "token revoke abcdef", "node list", "node remove a"} {
		_, _, err := call(strings.Fields(args)...)
		if want := "no cluster: " + missing + " does not exist (on a server: start it with"; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: error is %v, want %s…", args, err, want)
		}
	}
	for _, args := range []string{"token revoke", "node remove"} {
		// 4 is ShellCompDirectiveNoFileComp.
		if out, _, err := call(append(append([]string{"__complete"}, strings.Fields(args)...), "")...); err != nil || out != ":4\n" {
			t.Errorf("%s completes %q, %v", args, out, err)
		}
	}
}

// Without its datastore an API server answers little, and late: the commands do not wait for it.
func TestWithoutDatastore(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/version":
			fmt.Fprint(w, `{"gitVersion": "v1.36.3"}`)
		case "/readyz/etcd":
			http.Error(w, "internal server error: etcd failed: reason withheld", http.StatusInternalServerError)
		default:
			t.Errorf("%s was requested", r.URL.Path)
		}
	}))
	defer api.Close()
	file := filepath.Join(t.TempDir(), "polymesh.yaml")
	text := "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n" +
		"clusters: [{name: c, cluster: {server: '" + api.URL + "'}}]\nusers: [{name: u, user: {}}]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", file)
	for _, args := range []string{"token create", "token list", "token revoke abcdef", "node list"} {
		_, _, err := call(strings.Fields(args)...)
		if want := "the API server at " + api.URL + " does not reach its datastore"; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: error is %v, want %s…", args, err, want)
		}
	}
}

// Flags with a few values complete them.
func TestServerFlagsComplete(t *testing.T) {
	for flag, want := range map[string]string{
		"flannel-backend": "vxlan\nhost-gw\nwireguard-native\nnone\n", "disable": "coredns\nmetrics-server\nlocal-storage\nservicelb\nistio\nobserve\n",
		"observe-cluster-access": "all\ningest\noff\n",
		"datastore-sync":         "full\nnormal\n", "pod-security": "privileged\nbaseline\nrestricted\n",
	} {
		for _, command := range []string{"server", "install"} {
			if out, _, err := call("__complete", command, "--"+flag, ""); err != nil || out != want+":4\n" {
				t.Errorf("%s --%s completes %q, %v", command, flag, out, err)
			}
		}
	}
}
