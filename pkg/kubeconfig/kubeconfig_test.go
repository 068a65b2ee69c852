package kubeconfig

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

func TestAsk(t *testing.T) {
	reply := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/version" {
				t.Errorf("it asks for %s", r.URL.Path)
			}
			w.WriteHeader(code)
			_, _ = w.Write([]byte(body))
		}
	}
	login := &clientcmdapi.ExecConfig{Command: "/nosuch/login", APIVersion: "client.authentication.k8s.io/v1", InteractiveMode: clientcmdapi.NeverExecInteractiveMode}
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		config  rest.Config
		want    string
	}{
		"an API server":                {reply(200, `{"major":"1","minor":"36"}`), rest.Config{}, ""},
		"one that hides its version":   {reply(403, ""), rest.Config{}, ""},
		"one that does not know us":    {reply(401, ""), rest.Config{BearerToken: "old"}, "does not know the user of the kubeconfig"},
		"a login that takes its time":  {reply(401, ""), rest.Config{ExecProvider: login}, ""},
		"something else":               {reply(200, "<html>"), rest.Config{}, "does not answer: the server there is not an API server (is `polymesh server` running?"},
		"an API server that is broken": {reply(500, "sorry"), rest.Config{}, "does not answer: "},
		"impersonation": {func(w http.ResponseWriter, r *http.Request) {
			if user := r.Header.Get("Impersonate-User"); user != "" {
				w.WriteHeader(500)
			}
			_, _ = w.Write([]byte("{}"))
		}, rest.Config{Impersonate: rest.ImpersonationConfig{UserName: "jane"}}, ""},
	} {
		server := httptest.NewServer(tc.handler)
		tc.config.Host = server.URL
		err := Ask(t.Context(), &tc.config)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "the cluster at "+server.URL)) {
			t.Errorf("%s: error is %v, want %q", name, err, tc.want)
		}
		server.Close()
		// Now the server is gone.
		if err := Ask(t.Context(), &tc.config); err == nil || !strings.Contains(err.Error(), "connection refused (is `polymesh server` running? check with `polymesh status`)") {
			t.Errorf("%s, gone: error is %v", name, err)
		}
	}
}

// A server that accepts the connection and does not respond does not block a command.
func TestAskOfASilentServer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer server.Close()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, errors.New("the test waits no longer"))
	defer cancel()
	if err := Ask(ctx, &rest.Config{Host: server.URL}); err == nil || !strings.Contains(err.Error(), "does not answer: the test waits no longer (is") {
		t.Errorf("error is %v", err)
	}
	if err := Ask(t.Context(), &rest.Config{Host: server.URL}); err == nil || !strings.Contains(err.Error(), "does not answer: there is no response within 5s (is") {
		t.Errorf("error is %v", err)
	}
}

func TestNamed(t *testing.T) {
	dir := t.TempDir()
	home := filepath.Join(dir, "home.yaml")
	// The file in the user's home; client-go determines its name only once.
	load := func(explicit, context string) error {
		rules := clientcmd.NewDefaultClientConfigLoadingRules()
		rules.DefaultClientConfig = &clientcmd.DefaultClientConfig
		rules.ExplicitPath = explicit
		if os.Getenv("KUBECONFIG") == "" {
			rules.Precedence = []string{home}
		}
		loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{ClusterDefaults: clientcmd.ClusterDefaults, CurrentContext: context})
		config, err := loader.ClientConfig()
		if err != nil {
			return err
		}
		return Named(loader, config)
	}
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("apiVersion: v1\nkind: Config\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	const cluster = "clusters: [{name: c, cluster: {server: 'http://localhost:8080'}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\n"
	missing, empty, whole := filepath.Join(dir, "missing.yaml"), write("empty.yaml", ""), write("whole.yaml", cluster+"current-context: c\n")
	other := write("other.yaml", strings.ReplaceAll(cluster, "localhost:8080", "localhost:6443"))
	const todo = " (on a server: start it with `polymesh server`; elsewhere copy a server's kubeconfig, and set it with --kubeconfig or KUBECONFIG)"
	for _, tc := range []struct{ env, explicit, context, want string }{
		{"", "", "", "no cluster: /etc/polymesh/polymesh.yaml does not exist, " + home + " does not exist" + todo},
		{missing, "", "", "no cluster: " + missing + " does not exist" + todo},
		{missing + ":" + empty, "", "", "no cluster: " + missing + " does not exist, " + empty + " contains no cluster" + todo},
		{missing, empty, "", "no cluster: " + empty + " contains no cluster" + todo},
		{other, "", "", "no cluster: " + other + " has no current context (kubectl config use-context)" + todo},
		{other, "", "c", ""},
		{whole, "", "", ""}, // an explicit address is intended
		{missing, whole, "", ""},
	} {
		if _, err := os.Stat("/etc/polymesh/polymesh.yaml"); err == nil && tc.env == "" {
			continue // a server has run on this machine
		}
		t.Setenv("KUBECONFIG", tc.env)
		got := ""
		if err := load(tc.explicit, tc.context); err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%+v: error is %q", tc, got)
		}
	}
}
