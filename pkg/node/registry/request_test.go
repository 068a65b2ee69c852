package registry

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func get(t *testing.T, path, ns string, header ...string) *http.Request {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "http://127.0.0.1/", nil)
	r.URL = &url.URL{Path: path, RawQuery: url.Values{"ns": {ns}}.Encode()}
	if len(header) > 0 {
		r.Header.Set("Range", header[0])
	}
	return r
}

func TestParse(t *testing.T) {
	for path, want := range map[string]request{
		"/v2/library/redis/manifests/8":      {host: "docker.io", path: "library/redis", kind: manifests, tag: "8"},
		"/v2/library/redis/manifests/" + sum: {host: "docker.io", path: "library/redis", kind: manifests, digest: sum},
		"/v2/a/b/c/blobs/" + sum:             {host: "docker.io", path: "a/b/c", kind: blobs, digest: sum},
		// A repository may be called as the parts of the API are.
		"/v2/blobs/manifests/manifests/1": {host: "docker.io", path: "blobs/manifests", kind: manifests, tag: "1"},
	} {
		got, err := parse(get(t, path, "docker.io"))
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", path, got, err, want)
		}
		// What is asked of another node is read as the same.
		if again, err := url.Parse(got.target()); err != nil || again.Path != path || again.Query().Get("ns") != "docker.io" {
			t.Errorf("%s becomes %s", path, got.target())
		}
	}
	if q, err := parse(get(t, "/v2/a/b/manifests/1", "registry.example.com:5000")); err != nil || q.name() != "registry.example.com:5000/a/b:1" {
		t.Errorf("%+v, %v", q, err)
	}
}

func TestParseRefuses(t *testing.T) {
	long := strings.Repeat("a", 300)
	for _, r := range []struct{ path, ns string }{
		{"/v2/a/manifests/1", ""}, {"/v2/a/manifests/1", "docker.io"}, // library/a is another name
		{"/v2/a/b/manifests/1", "docker.io/c"}, {"/v2/a/b/manifests/1", "docker.io?x"}, {"/v2/a/b/manifests/1", "a b"}, {"/v2/a/b/manifests/1", "x\ny.z"},
		{"/v2/a/b/manifests/1", "-x.y"}, {"/v2/a/b/manifests/1", long + ".io"}, {"/v2/a/" + long + "/manifests/1", "docker.io"},
		{"/v2/A/b/manifests/1", "docker.io"}, {"/v2/../b/manifests/1", "docker.io"}, {"/v2/a//b/manifests/1", "docker.io"}, {"/v2//manifests/1", "docker.io"},
		{"/v2/a/b/manifests/", "docker.io"}, {"/v2/a/b/manifests/..", "docker.io"}, {"/v2/a/b/manifests/a/b", "docker.io"}, {"/v2/a/b/manifests/1%00", "docker.io"},
		{"/v2/a/b/manifests/sha256:12", "docker.io"}, {"/v2/a/b/manifests/md5:" + strings.Repeat("0", 32), "docker.io"},
		{"/v2/a/b/blobs/1", "docker.io"}, {"/v2/a/b/blobs/" + sum + "/..", "docker.io"}, {"/v2/a/b/tags/list", "docker.io"}, {"/v2/_catalog", "docker.io"},
		{"/etc/passwd", "docker.io"}, {"/v2/a/b:1/manifests/1", "docker.io"}, {"/v2/a/b@" + sum + "/manifests/1", "docker.io"},
	} {
		if q, err := parse(get(t, r.path, r.ns)); err == nil {
			t.Errorf("%q of %q is %+v", r.path, r.ns, q)
		}
	}
}

func TestRange(t *testing.T) {
	for text, want := range map[string]string{
		"bytes=0-": "bytes=0-", "bytes=10-20": "bytes=10-20", "bytes=-5": "", "bytes=0-1,2-3": "", "bytes=0-\r\nX: y": "", "lines=1-": "",
		"bytes=" + strings.Repeat("9", 30) + "-": "",
	} {
		r := get(t, "/v2/a/b/blobs/"+sum, "docker.io")
		r.Header["Range"] = []string{text}
		if q, err := parse(r); err != nil || q.span != want {
			t.Errorf("%q: %q, %v", text, q.span, err)
		}
	}
}

// A node decides for others only what images that were built mean.
func TestScope(t *testing.T) {
	for tag, want := range map[string]scope{
		"1.0.0-" + strings.Repeat("0a", 16): everyNode, strings.Repeat("0a", 16): everyNode, "1.0.0": servers, "latest": nowhere,
		"1.0.0" + strings.Repeat("0a", 16): servers, "x-" + strings.Repeat("0a", 15): servers, "x-" + strings.Repeat("0A", 16): servers,
	} {
		if got := (request{tag: tag}).scope(false); got != want {
			t.Errorf("%s: %d, want %d", tag, got, want)
		}
	}
	if (request{tag: "latest"}).scope(true) != nowhere || (request{tag: "1"}).scope(true) != everyNode || (request{digest: sum}).scope(false) != everyNode {
		t.Error("the scope of an opened registry, or of a digest")
	}
}

func TestSettings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registries.yaml")
	read := func(text string) (*settings, error) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return readSettings(path)
	}
	s, err := read(`mirrors:
  docker.io:
    endpoint: ["https://mirror.example.com", "mirror.example.com/", "localhost:5000", "https://other.example.com/v2/hub", "https://registry-1.docker.io/v2"]
    rewrite: {"^library/(.*)": "hub/$1"}
  "*": {endpoint: ["http://all.example.com:80"]}
configs:
  mirror.example.com: {auth: {username: me, password: sesame}}
  registry-1.docker.io: {auth: {auth: bWU6c2VzYW1l}}
`)
	if err != nil {
		t.Fatal(err)
	}
	show := func(m *mirrors, host, path string) (out []string) {
		for _, a := range m.attempts(s, request{host: host, path: path}) {
			out = append(out, a.endpoint.String()+" "+a.path)
		}
		return out
	}
	for _, c := range []struct {
		host, path string
		closed     bool
		want       string
	}{
		{"docker.io", "library/redis", false, "https://mirror.example.com/v2 hub/redis|http://localhost:5000/v2 hub/redis|https://other.example.com/v2/hub hub/redis|https://registry-1.docker.io/v2 library/redis"},
		{"docker.io", "library/redis", true, "https://mirror.example.com/v2 hub/redis|http://localhost:5000/v2 hub/redis|https://other.example.com/v2/hub hub/redis"},
		// Without a login for it, containerd asks the registry itself, with the pod's.
		{"quay.io", "a/b", false, "http://all.example.com:80/v2 a/b"},
	} {
		m := &mirrors{opts: Options{DisableDefaultEndpoint: c.closed}}
		if got := strings.Join(show(m, c.host, c.path), "|"); got != c.want {
			t.Errorf("%s/%s, closed %t:\n%s, want\n%s", c.host, c.path, c.closed, got, c.want)
		}
	}
	for _, text := range []string{
		"mirrors: [a]", "mirrors: {a/b: {endpoint: [x]}}", "mirrors: {..: {endpoint: [x]}}", "mirrors: {../../x: {endpoint: [x]}}", "mirrors: {a: {endpoints: [x]}}", "mirrors: {a: {endpoint: ['ftp://x']}}",
		"mirrors: {a: {endpoint: ['https://me:sesame@x']}}", "mirrors: {a: {endpoint: ['https://x?y=sesame']}}", "mirrors: {a: {rewrite: {'(': x}}}",
		"configs: {a: {auth: {auth: sesame!}}}", "configs: {a: {tls: {ca_file: /none}}}", "configs: {a: {tls: {cert_file: /none}}}", "configs: {a: {auth: [sesame]}}",
	} {
		_, err := read(text)
		if err == nil {
			t.Errorf("%s is accepted", text)
		} else if strings.Contains(err.Error(), "me:sesame") || strings.Contains(err.Error(), "sesame!") {
			t.Errorf("%s: the error has the password: %v", text, err)
		}
	}
}
