//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
)

// TestRegistries follows docs/operate/registries.md: a registry without TLS, with a login, and a mirror. Each pod sets
// imagePullPolicy: Always, so nothing but the registry can have its image.
func TestRegistries(t *testing.T) {
	n := app(t)
	archive, err := buildEcho()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := n.Listen("tcp", net.JoinHostPort(n.Address(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Images below private/ take a login.
		if user, password, _ := r.BasicAuth(); (strings.HasPrefix(r.URL.Path, "/v2/private/") || r.URL.Path == "/v2/") && (user != "me" || password != "sesame") {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		images.ServeHTTP(w, r)
	})}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	host := listener.Addr().String()

	dir := t.TempDir()
	t.Setenv("CONTAINERS_STORAGE_CONF", filepath.Join(dir, "storage.conf"))
	conf := fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(dir, "storage"), filepath.Join(dir, "run"))
	if err := os.WriteFile(filepath.Join(dir, "storage.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	login := filepath.Join(dir, "login.json")
	buildah := func(args ...string) string {
		t.Helper()
		cmd := n.Command(t.Context(), "buildah", args...)
		cmd.Env = append(cmd.Env, "CONTAINERS_STORAGE_CONF="+filepath.Join(dir, "storage.conf"))
		cmd.Stdin = strings.NewReader("sesame")
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("buildah %v: %v: %s", args, err, &errOut)
		}
		return strings.TrimSpace(string(out))
	}
	// A separate image: once the kubelet has pulled an image with a login, pods without one may not use it, by any name.
	container := buildah("from", "--pull-never", buildah("pull", "--quiet", "oci-archive:"+archive))
	buildah("config", "--label", "test="+t.Name(), container)
	id := buildah("commit", "--quiet", "--rm", container)
	buildah("login", "--tls-verify=false", "--authfile", login, "--username", "me", "--password-stdin", host)
	for _, name := range []string{"/team/echo:1", "/private/echo:1"} {
		buildah("push", "--quiet", "--tls-verify=false", "--authfile", login, id, "docker://"+host+name)
	}

	const mirrored = "registry.example.net"
	for name, text := range map[string]string{
		host:     fmt.Sprintf("server = \"http://%s\"\n", host),
		mirrored: fmt.Sprintf("server = \"https://%s\"\n\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", mirrored, host),
	} {
		folder := filepath.Join(n.Layout().RegistryDir(), name)
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(folder) })
		if err := os.WriteFile(filepath.Join(folder, "hosts.toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const namespace = "e2e-registries"
	t.Cleanup(func() { removeNamespaces(t, n, namespace) })
	n.Kubectl(t, "create", "namespace", namespace)
	n.Kubectl(t, "create", "secret", "docker-registry", "registry-login", "-n", namespace, "--from-file=.dockerconfigjson="+login)
	for pod, c := range map[string]struct{ image, secrets string }{
		"plain":  {host + "/team/echo:1", ""},
		"mirror": {mirrored + "/team/echo:1", ""},
		"login":  {host + "/private/echo:1", "imagePullSecrets: [{name: registry-login}]"},
	} {
		n.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  terminationGracePeriodSeconds: 1
  %s
  containers:
  - {name: echo, image: "%s", imagePullPolicy: Always, readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
`, pod, namespace, c.secrets, c.image))
	}
	for _, pod := range []string{"plain", "mirror", "login"} {
		n.Kubectl(t, "wait", "--for=condition=Ready", "pod/"+pod, "-n", namespace, "--timeout=60s")
	}
}

// Each program in the file logs as upstream's own does, whatever the packages that it shares the file with would like.
func TestProgramsLogAsUpstream(t *testing.T) {
	n := app(t)
	for _, c := range []struct {
		args             []string
		stdout, errStart string // what standard output is or holds, and what a line of standard error begins with
	}{
		{[]string{"kubectl", "get", "--raw", "/readyz", "-v=6"}, "ok", "I"},
		{[]string{"kubectl", "get", "--raw", "/readyz"}, "ok", ""},
		{[]string{"istioctl", "version", "--remote=false"}, "client version: ", ""},
		{[]string{"ctr", "version"}, "Client:", ""},
		{[]string{"status"}, "COMPONENT", ""},
	} {
		out, errOut, code := n.Polymesh(t, c.args...)
		if code != 0 || !strings.Contains(out, c.stdout) || c.args[0] == "kubectl" && out != c.stdout {
			t.Errorf("%v: exit code %d, standard output %q", c.args, code, out)
		}
		if strings.Contains(out, "\tklog\t") || strings.Contains(errOut, "\tklog\t") {
			t.Errorf("%v: klog writes in Istio's format:\n%s%s", c.args, out, errOut)
		}
		// containerd's client warns of cgroup v1 and of other versions.
		if !strings.HasPrefix(errOut, c.errStart) || c.errStart == "" && errOut != "" && c.args[0] != "ctr" {
			t.Errorf("%v: standard error %q", c.args, errOut)
		}
	}
	text, err := os.ReadFile(n.Log())
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "\tklog\t") || !strings.Contains(string(text), "\nI") {
		t.Errorf("the server's log is not klog's:\n%.2000s", text)
	}
}

// A profile whose images are not in the file is rejected with the list, before anything is changed.
func TestIstioctlRefusesMissingImages(t *testing.T) {
	n := app(t)
	for set, want := range map[string]string{"profile=ambient": "/ztunnel:", "values.global.variant=distroless": "-distroless: this file does not have it"} {
		out, errOut, code := n.Polymesh(t, "istioctl", "install", "--set", set, "--set", "revision=lacking", "-y")
		if code == 0 || !strings.Contains(out+errOut, want) || !strings.Contains(out+errOut, "--skip-image-check") {
			t.Errorf("%s: exit code %d: %s%s", set, code, out, errOut)
		}
	}
	if found := n.Kubectl(t, "get", "deployments", "-n", "istio-system", "-l", "istio.io/rev=lacking", "-o", "name"); found != "" {
		t.Errorf("it was installed: %s", found)
	}
}
