package consul

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"consul.example.com:8500":           "not an address of Consul",
		"ftp://consul.example.com":          "not an address of Consul",
		"http://:secret@/":                  "is not valid",
		"http://user:secret@host:x/":        "is not valid",
		"http://user:secret@host:8500":      "without a user",
		"http://host:8500/?token=secret":    "without a token",
		"http://host:8500/v1?token=%secret": "without a token",
	} {
		_, err := New(http.DefaultClient, []string{address}, "", time.Second)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", address, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error shows the secret: %v", err)
		}
	}
	c, err := New(http.DefaultClient, []string{"https://a:8501", " http://b:8500/proxied/"}, "secret", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.String(); got != "https://a:8501,http://b:8500/proxied/" {
		t.Errorf("String() is %s", got)
	}
}

// Of several agents the first that responds is used, and the token is sent to no other server. This test uses a proxy in front of
// an agent; Consul's own responses are tested on Consul (TestCatalog and others, TestConsul).
func TestAgents(t *testing.T) {
	var asked []string
	door := func(name string, status int, answer, location string) *httptest.Server {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, name+" "+r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("X-Consul-Token"))
			w.Header().Set("Location", location)
			w.WriteHeader(status)
			_, _ = w.Write([]byte(answer))
		}))
		t.Cleanup(s.Close)
		return s
	}
	client := func(agents ...string) *Client {
		c, err := New(http.DefaultClient, agents, "secret", time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	gone, other := door("gone", http.StatusOK, "", ""), door("other", http.StatusOK, "{}", "")
	gone.Close()
	broken := door("broken", http.StatusInternalServerError, "No cluster leader\n", "")
	moved := door("moved", http.StatusMovedPermanently, "", other.URL)

	_, err := client(gone.URL, broken.URL, moved.URL+"/proxied/").Renew(t.Context(), bridge.Advert{Service: "a", ID: "mesh/x"})
	if err == nil || !strings.Contains(err.Error(), "301") {
		t.Errorf("the error is %v", err)
	}
	const request = " PUT /v1/agent/check/pass/service:mesh%2Fx:a secret"
	if want := []string{"broken" + request, "moved" + strings.Replace(request, "/v1", "/proxied/v1", 1)}; !slices.Equal(asked, want) {
		t.Errorf("asked %q, want %q", asked, want)
	}

	_, err = client(gone.URL, broken.URL).Services(t.Context())
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "returned 500: No cluster leader") || strings.Contains(err.Error(), "secret") {
		t.Errorf("without a response, the error is %v", err)
	}
	// A response that is not Consul's must not look like an empty registry.
	for answer, want := range map[string]string{"": "parse Consul", "<html>": "parse Consul", "[]": "parse Consul", "null": "not even its own", "{}": "not even its own"} {
		services, err := client(door("strange", http.StatusOK, answer, "").URL).Services(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %v, %v; want an error with %q", answer, services, err, want)
		}
	}
}
