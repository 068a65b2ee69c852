package registry

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// withHosts returns a component whose port answers with status, and the requests that it gets.
func withHosts(t *testing.T, status int) (r *Registry, asked chan string) {
	t.Helper()
	asked = make(chan string, 10)
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		asked <- h.Header.Get("Authorization") + " " + h.URL.Query().Get("ns")
		w.WriteHeader(status)
	})}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	dir := t.TempDir()
	r = New(Options{HostsDir: filepath.Join(dir, "registry.d"), UserHostsDir: filepath.Join(dir, "certs.d"), Log: slog.New(slog.DiscardHandler)})
	r.local, r.secret = listener, "secret"
	return r, asked
}

// resolve asks as containerd does, with the folders that its configuration names (pkg/node).
func (r *Registry) resolve(ctx context.Context, ref string) error {
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: func(host string) (dir string, err error) {
		for _, root := range []string{r.opts.UserHostsDir, r.opts.HostsDir} {
			if dir, err = config.HostDirFromRoot(root)(host); dir != "" || err != nil && !errdefs.IsNotFound(err) {
				break
			}
		}
		return dir, err
	}})})
	_, _, err := resolver.Resolve(ctx, ref)
	return err
}

// containerd itself reads the files: nothing outside is contacted for a shipped image, and what the component does not have, the registry
// is asked for.
func TestShippedImagesAreNotPulled(t *testing.T) {
	r, asked := withHosts(t, http.StatusNotFound)
	if err := r.writeHosts(); err != nil {
		t.Fatal(err)
	}
	err := r.resolve(t.Context(), imagestore.ShippedRegistry+"/coredns:1.15.0")
	if !errdefs.IsNotFound(err) || len(asked) != 1 || <-asked != "Bearer secret "+imagestore.ShippedRegistry {
		t.Errorf("a shipped image: %v, %d more requests", err, len(asked))
	}

	outside := make(chan string, 10)
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		outside <- h.Header.Get("Authorization") + " " + h.URL.Path
		http.NotFound(w, h)
	}))
	defer registry.Close()
	host := strings.TrimPrefix(registry.URL, "http://")
	err = r.resolve(t.Context(), host+"/team/api:1")
	if !errdefs.IsNotFound(err) || len(asked) != 1 || len(outside) != 1 || <-asked != "Bearer secret "+host || <-outside != " /v2/team/api/manifests/1" {
		t.Errorf("an image of a registry: %v", err)
	}

	// With --disable-default-registry-endpoint, a registry that has mirrors is not asked.
	r.opts.DisableDefaultEndpoint, r.mirrors.opts.DisableDefaultEndpoint = true, true
	r.mirrors.settings.mirrors = map[string]mirror{host: {}}
	if err := r.writeHosts(); err != nil {
		t.Fatal(err)
	}
	if err := r.resolve(t.Context(), host+"/team/api:1"); !errdefs.IsNotFound(err) || len(asked) != 1 || len(outside) != 0 {
		t.Errorf("a registry that must not be asked: %v, asked %d times", err, len(outside))
	}
	// Without its entry it is again.
	<-asked
	r.mirrors.settings.mirrors = nil
	if err := r.writeHosts(); err != nil {
		t.Fatal(err)
	}
	if err := r.resolve(t.Context(), host+"/team/api:1"); !errdefs.IsNotFound(err) || len(outside) != 1 {
		t.Errorf("a registry that may be asked again: %v, asked %d times", err, len(outside))
	}
}

// A file of the user stays and is used; the one of an earlier version is removed.
func TestShippedRegistryIsRefused(t *testing.T) {
	r, asked := withHosts(t, http.StatusNotFound)
	path := filepath.Join(r.opts.UserHostsDir, imagestore.ShippedRegistry, "hosts.toml")
	write := func(text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.writeHosts(); err != nil {
			t.Fatal(err)
		}
	}
	write(oldRefusal)
	if _, err := os.Stat(path); err == nil {
		t.Error("the file of an earlier version hides the component")
	}
	if err := r.resolve(t.Context(), imagestore.ShippedRegistry+"/coredns:1.15.0"); !errdefs.IsNotFound(err) || len(asked) != 1 {
		t.Errorf("a shipped image: %v", err)
	}
	<-asked
	mirror := httptest.NewServer(http.NotFoundHandler())
	defer mirror.Close()
	text := "server = \"" + mirror.URL + "\"\n"
	write(text)
	if got, err := os.ReadFile(path); err != nil || string(got) != text {
		t.Errorf("a user's mirror became %q, %v", got, err)
	}
	if err := r.resolve(t.Context(), imagestore.ShippedRegistry+"/coredns:1.15.0"); !errdefs.IsNotFound(err) || len(asked) != 0 {
		t.Errorf("with the user's mirror: %v, %d requests", err, len(asked))
	}
	for _, file := range []string{"_default", imagestore.ShippedRegistry} {
		info, err := os.Stat(filepath.Join(r.opts.HostsDir, file, "hosts.toml"))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s, which has the secret: %v, %v", file, info, err)
		}
	}
}

// A reason is one line of printable characters, whoever wrote it.
func TestFailedBecause(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		failedBecause(w, "a.b: no such\r\nX-Evil: host \x1b[1m"+strings.Repeat("x", 1000))
	}))
	defer server.Close()
	answer, err := http.Head(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if !strings.HasPrefix(answer.Status, "502 a.b: no such??X-Evil: host ?[1mxx") || answer.Header.Get("X-Evil") != "" || len(answer.Status) > 510 {
		t.Errorf("%q %v", answer.Status, answer.Header)
	}
}
