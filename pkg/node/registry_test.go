package node

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

// containerd itself reads the file: no host is contacted for a shipped image, even with a mirror for all registries.
func TestShippedImagesAreNotPulled(t *testing.T) {
	asked := make(chan string, 10)
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.String()
		http.NotFound(w, r)
	}))
	defer mirror.Close()
	dir := t.TempDir()
	write := func(host, text string) {
		t.Helper()
		writeFile(t, filepath.Join(dir, host, "hosts.toml"), text)
	}
	write("_default", "server = \""+mirror.URL+"\"\n")
	resolve := func(ref string) error {
		resolver := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(dir)})})
		_, _, err := resolver.Resolve(t.Context(), ref)
		return err
	}
	const shipped = shippedRegistry + "/coredns:1.15.0"
	if err := resolve(shipped); err == nil || len(asked) == 0 {
		t.Fatalf("without the file, the mirror should be used: %v, %d requests", err, len(asked))
	}
	for len(asked) > 0 {
		<-asked
	}
	if err := refuseRegistry(dir); err != nil {
		t.Fatal(err)
	}
	if err := resolve(shipped); err == nil || !strings.Contains(err.Error(), "no resolve hosts") || len(asked) > 0 {
		t.Errorf("error is %v, %d requests", err, len(asked))
	}
}

func TestShippedRegistryIsRefused(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, shippedRegistry, "hosts.toml")
	for range 2 {
		if err := refuseRegistry(dir); err != nil {
			t.Fatal(err)
		}
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != refusal {
		t.Errorf("%q, %v", text, err)
	}
	const mirror = "server = \"https://mirror.example.com\"\n"
	if err := os.WriteFile(path, []byte(mirror), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := refuseRegistry(dir); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != mirror {
		t.Errorf("a user's mirror became %q", text)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
