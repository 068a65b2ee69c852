package eureka

import (
	"flag"
	"net/http"
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden file anew")

// testdata/apps.json is what Spring Cloud Netflix 4.3.0's Eureka has answered, with one instance out of service and one that
// takes TLS only.
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
		t.Errorf("%s (go test -update writes it anew) is not:\n%s", golden, got)
	}
}

// What is not Eureka's answer must not look like an empty registry.
func TestParseRefuses(t *testing.T) {
	for answer, want := range map[string]string{
		``:                        "cannot be read",
		`<html>`:                  "cannot be read",
		`{"error":"Not Found"}`:   "is not Eureka",
		`{"applications":null}`:   "is not Eureka",
		`{"applications":{"appli`: "cannot be read",
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
		"http://user:secret@host:x/":       "cannot be read as a URL",
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
		t.Errorf("it calls itself %s", got)
	}
}
