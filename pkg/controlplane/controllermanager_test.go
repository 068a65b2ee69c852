package controlplane

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// Only a list or watch by the shared informers means that the controllers are built.
func TestFirstList(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	for _, step := range []struct {
		client, path string
		want         bool
	}{
		{"controller-discovery", "/apis", false},
		{"shared-informers", "/healthz", false},
		{"tokens-controller", "/api/v1/serviceaccounts", false},
		{"shared-informers", "/api/v1/nodes", true},
	} {
		seen := false
		config := rest.AddUserAgent(&rest.Config{Host: server.URL}, step.client)
		config.Wrap(func(next http.RoundTripper) http.RoundTripper {
			return &firstList{next: next, seen: func() { seen = true }}
		})
		client, err := rest.HTTPClientFor(config)
		if err != nil {
			t.Fatal(err)
		}
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+step.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if seen != step.want {
			t.Errorf("GET %s by %s: seen is %v, want %v", step.path, step.client, seen, step.want)
		}
	}
}

// With SQLite there is no leader election, and with a datastore for several servers there is, whatever the user sets.
func TestLeaderElect(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for _, set := range []string{"", "leader-elect=false", "leader-elect=true", "--leader-elect"} {
			args := []string{"--data-dir", t.TempDir()}
			if set != "" {
				args = append(args, "--kube-controller-manager-arg", set, "--kube-scheduler-arg", set)
			}
			cfg, err := config.Parse(args, nil)
			if err != nil {
				t.Fatal(err)
			}
			o := Options{Config: cfg, Certificates: certificate.Store(cfg.DataDir.TLS()), Datastore: datastore.Endpoint{LeaderElect: shared}}
			want := set == "" || strings.HasSuffix(set, "=false") != shared
			for _, c := range []component.Component{NewControllerManager(o), NewScheduler(o)} {
				if err := c.Init(t.Context()); (err == nil) != want || err != nil && !strings.Contains(err.Error(), "leader-elect=") {
					t.Errorf("%s, several servers %t, %q: %v", c.Name(), shared, set, err)
				}
			}
		}
	}
}
