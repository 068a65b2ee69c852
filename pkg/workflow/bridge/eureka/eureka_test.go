package eureka

import (
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

var update = flag.Bool("update", false, "write the golden file again")

// testdata/apps.json is a response of Spring Cloud Netflix 4.3.0's Eureka, with one instance out of service and one that
// only accepts TLS.
func TestParse(t *testing.T) {
	answer, err := os.ReadFile("testdata/apps.json")
	if err != nil {
		t.Fatal(err)
	}
	services, err := parse(answer)
	if err != nil {
		t.Fatal(err)
	}
	got, err := yaml.Marshal(services)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/services.yaml"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s (go test -update writes it again) is not:\n%s", golden, got)
	}
}

// A response that is not Eureka's must not look like an empty registry.
func TestParseRefuses(t *testing.T) {
	for answer, want := range map[string]string{
		``:                        "parse Eureka",
		`<html>`:                  "parse Eureka",
		`{"error":"Not Found"}`:   "is not Eureka",
		`{"applications":null}`:   "is not Eureka",
		`{"applications":{"appli`: "parse Eureka",
	} {
		if services, err := parse([]byte(answer)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %v, %v; want an error with %q", answer, services, err, want)
		}
	}
	if services, err := parse([]byte(`{"applications":{"versions__delta":"1","apps__hashcode":"","application":[]}}`)); err != nil || len(services) != 0 {
		t.Errorf("an empty Eureka is %v, %v", services, err)
	}
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"eureka.example.com:8761":          "not an address of Eureka",
		"ftp://eureka.example.com":         "not an address of Eureka",
		"http://user:secret@host:x/":       "is not a valid URL",
		"http://user:secret@/eureka":       "not an address of Eureka",
		"http://user:secret@host/eureka?x": "not an address of Eureka",
	} {
		_, err := New(http.DefaultClient, []string{address}, "", "")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", address, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error shows the password: %v", err)
		}
	}
	c, err := New(http.DefaultClient, []string{"https://user:secret@a:8761/eureka/", " http://b:8761/eureka"}, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.String(); got != "https://a:8761/eureka/,http://b:8761/eureka" {
		t.Errorf("String() is %s", got)
	}
}

// Of several servers the first that responds is used, and each receives only its own password. This test uses a proxy in front of
// a registry; Eureka's own responses are tested on Eureka (TestSpringCloud).
func TestServers(t *testing.T) {
	var asked []string
	door := func(name string, status int) *httptest.Server {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			user, password, _ := r.BasicAuth()
			asked = append(asked, name+" "+r.Method+" "+r.URL.EscapedPath()+" "+user+":"+password)
			w.WriteHeader(status)
		}))
		t.Cleanup(s.Close)
		return s
	}
	broken, locked := door("broken", http.StatusServiceUnavailable), door("locked", http.StatusUnauthorized)
	gone := door("gone", http.StatusOK)
	gone.Close()
	address := strings.Replace(locked.URL, "http://", "http://other:hidden@", 1)
	c, err := New(http.DefaultClient, []string{gone.URL + "/eureka/", broken.URL + "/eureka/", address + "/eureka"}, "mesh", "secret")
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Renew(t.Context(), bridge.Advert{Service: "a", ID: "host:a/b"})
	if err == nil || !strings.Contains(err.Error(), "401") || !strings.Contains(err.Error(), "password right?") {
		t.Errorf("the error is %v", err)
	}
	want := []string{"broken PUT /eureka/apps/A/host:a%2Fb mesh:secret", "locked PUT /eureka/apps/A/host:a%2Fb other:hidden"}
	if !slices.Equal(asked, want) {
		t.Errorf("asked %q, want %q", asked, want)
	}
	c, err = New(http.DefaultClient, []string{gone.URL, strings.Replace(broken.URL, "http://", "http://other:hidden@", 1)}, "mesh", "secret")
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Services(t.Context())
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "503") {
		t.Errorf("without a response, the error is %v", err)
	}
	if err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "hidden")) {
		t.Errorf("the error shows a password: %v", err)
	}
}

// Eureka's representation of an instance that a bridge has registered; TestSpringCloud checks it on Eureka.
func TestShown(t *testing.T) {
	a := bridge.Advert{Service: "Inventory", ID: "polymesh-1:shop:inventory", Host: "inventory.example.com", Address: "192.0.2.100", Port: 80, Owner: "cluster/bridges/eureka"}
	read := func(change func(map[string]any)) bridge.Advert {
		t.Helper()
		registered := registration(a)
		change(registered)
		text, err := json.Marshal(map[string]any{"applications": map[string]any{"application": []any{map[string]any{"name": "INVENTORY", "instance": []any{registered}}}}})
		if err != nil {
			t.Fatal(err)
		}
		services, err := parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return services[0].Instances[0].Shown
	}
	want := a
	want.Service = "inventory"
	if got := read(func(map[string]any) {}); got != want {
		t.Errorf("got %+v", got)
	}
	for what, change := range map[string]func(map[string]any){
		"address":  func(r map[string]any) { r["ipAddr"] = "203.0.113.66" },
		"none":     func(r map[string]any) { r["ipAddr"] = "" },
		"host":     func(r map[string]any) { r["hostName"] = "evil.example.com" },
		"port":     func(r map[string]any) { r["port"] = map[string]any{"$": 666, "@enabled": "true"} },
		"off":      func(r map[string]any) { r["port"] = map[string]any{"$": 80, "@enabled": "false"} },
		"secure":   func(r map[string]any) { r["securePort"] = map[string]any{"$": 666, "@enabled": "true"} },
		"name":     func(r map[string]any) { r["vipAddress"] = "other" },
		"metadata": func(r map[string]any) { r["metadata"].(map[string]any)["management.port"] = "666" },
		"mark":     func(r map[string]any) { r["metadata"] = map[string]any{"@class": "java.util.Collections$EmptyMap"} },
		"health":   func(r map[string]any) { r["healthCheckUrl"] = "http://203.0.113.66/" },
	} {
		if got := read(change); got == want {
			t.Errorf("%s is not detected", what)
		}
	}
}

// A registry cannot redirect the bridge, and its password, to another server.
func TestRedirect(t *testing.T) {
	asked := false
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	t.Cleanup(other.Close)
	there := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/eureka/apps" {
			http.Redirect(w, r, "/moved/apps", http.StatusFound)
			return
		}
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(there.Close)
	c, err := New(http.DefaultClient, []string{there.URL + "/eureka/"}, "mesh", "secret")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Services(t.Context()); err == nil || !strings.Contains(err.Error(), "redirects to another server") || asked {
		t.Errorf("asked %v, %v", asked, err)
	}
}
