package dns

import (
	"strings"
	"testing"
)

func TestNew(t *testing.T) {
	for services, want := range map[string]string{
		"":                    "no DNS name is specified",
		"orders":              "should be SERVICE=NAME",
		"=orders.example.com": "should be SERVICE=NAME",
		"orders=":             "should be SERVICE=NAME",
		"orders=x:http":       `"http" is not a port`,
		"orders=x:0":          `"0" is not a port`,
		"orders=x:70000":      `"70000" is not a port`,
		"a=x:1 a=y:1":         "a is listed twice",
	} {
		if _, err := New(strings.Fields(services), ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: the error is %v, want %q", services, err, want)
		}
	}
	z, err := New([]string{"a=_http._tcp.a.example.com.", "b=b.example.com:8080"}, "192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := z.String(), "DNS of 192.0.2.1: _http._tcp.a.example.com, b.example.com"; got != want {
		t.Errorf("String() is %q, want %q", got, want)
	}
}
