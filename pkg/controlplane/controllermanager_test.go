package controlplane

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/client-go/rest"
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
