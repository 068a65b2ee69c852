package image

import (
	"archive/tar"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// apiServer is an API server with a registry below a prefix and a path of its own, and a token.
func apiServer(t *testing.T, handler http.Handler) *rest.Config {
	t.Helper()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer sesame" {
			http.Error(w, `{"kind":"Status"}`, http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	return &rest.Config{Host: server.URL + "/cluster", BearerToken: "sesame", TLSClientConfig: rest.TLSClientConfig{CAData: ca}}
}

// A push goes to the API server of the kubeconfig with its credentials, below its path, whatever the registry in the image's name is.
func TestPushThroughTheAPIServer(t *testing.T) {
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	prefix := "/cluster" + imagestore.BuildsPath
	config := apiServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest, ok := strings.CutPrefix(r.URL.Path, prefix)
		switch {
		case !ok:
			t.Errorf("%s %s", r.Method, r.URL.Path)
		case rest == "":
		case strings.HasPrefix(rest, "registry.example.com:5000/"):
			http.StripPrefix(prefix+"registry.example.com:5000", images).ServeHTTP(w, r)
		default:
			http.NotFound(w, r)
		}
	}))
	c, err := OpenCluster(t.Context(), config, imagestore.BuildsPath)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	const ref = "registry.example.com:5000/shop/api:1"
	if has, err := c.Has(t.Context(), ref); err != nil || has {
		t.Errorf("before: %t, %v", has, err)
	}
	if err := c.Push(t.Context(), img, ref, func(string) {}); err != nil {
		t.Fatal(err)
	}
	if has, err := c.Has(t.Context(), ref); err != nil || !has {
		t.Errorf("after: %t, %v", has, err)
	}
	const other = "registry.example.com:5000/shop/other:1"
	if err := c.LoadAll(t.Context(), "", []Archived{{other, img}}, func(string) {}); err != nil {
		t.Fatal(err)
	}
	if has, err := c.Has(t.Context(), other); err != nil || !has {
		t.Errorf("under its own name: %t, %v", has, err)
	}
	// The user learns where images go, and on which machines they would not.
	server, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	load := *c
	load.prefix = imagestore.ImagesPath
	for member, d := range map[string]Destination{"node": c, "server": &load} {
		if got := d.Notice(); !strings.Contains(got, "https://"+server.Host+": this machine is not a "+member) {
			t.Errorf("the notice is %q", got)
		}
	}
	if got := (Node{}).Notice(); got != "" {
		t.Errorf("of this machine's node, the notice is %q", got)
	}
}

// Each refusal says what to do.
func TestClusterThatTakesNoImages(t *testing.T) {
	for status, want := range map[int]string{
		http.StatusNotFound: "only Polymesh's do", http.StatusUnauthorized: "log in again", http.StatusBadGateway: "502 Bad Gateway",
	} {
		config := apiServer(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		if _, err := OpenCluster(t.Context(), config, imagestore.BuildsPath); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %v, want %q", status, err, want)
		}
	}
	// A user who may do nothing learns it before anything is built.
	config := apiServer(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	c, err := OpenCluster(t.Context(), config, imagestore.BuildsPath)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Has(t.Context(), "docker.io/shop/api:1"); err == nil || !strings.Contains(err.Error(), imagestore.PushRole) {
		t.Errorf("%v", err)
	}
}

// The credentials go nowhere else, whatever the server answers.
func TestHostileLocation(t *testing.T) {
	elsewhere := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { elsewhere <- r.URL.Path }))
	defer other.Close()
	img, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, location := range []string{other.URL + "/v2/x", other.URL + "/x", "/api/v1/namespaces/kube-system/secrets", "/v2/../../../api/v1/secrets", "//" + strings.TrimPrefix(other.URL, "http://") + "/v2/x", ""} {
		config := apiServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasPrefix(r.URL.Path, "/cluster"+imagestore.BuildsPath) || strings.Contains(r.URL.Path, "..") {
				t.Errorf("%q: %s %s", location, r.Method, r.URL.Path)
			}
			switch r.Method {
			case http.MethodHead:
				w.WriteHeader(http.StatusNotFound)
			case http.MethodPost:
				w.Header().Set("Location", location)
				w.WriteHeader(http.StatusAccepted)
			default:
				w.WriteHeader(http.StatusBadRequest)
			}
		}))
		c, err := OpenCluster(t.Context(), rest.CopyConfig(config), imagestore.BuildsPath)
		if err == nil {
			err = c.Push(t.Context(), img, "docker.io/shop/api:1", func(string) {})
		}
		if err == nil {
			t.Errorf("%q: it is pushed", location)
		}
	}
	if len(elsewhere) > 0 {
		t.Errorf("another server got %s", <-elsewhere)
	}
}

func TestIsCluster(t *testing.T) {
	dir := t.TempDir()
	authority := func(name string) []byte {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(name)})
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
		return text
	}
	mine, other := authority("mine"), authority("other")
	of := func(ca []byte) *rest.Config { return &rest.Config{TLSClientConfig: rest.TLSClientConfig{CAData: ca}} }
	for _, c := range []struct {
		config *rest.Config
		files  []string
		want   bool
	}{
		{of(mine), []string{"mine"}, true},
		{of(append(other, mine...)), []string{"none", "mine"}, true},
		{of(other), []string{"none", "mine"}, false},
		{&rest.Config{TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(dir, "other")}}, []string{"mine"}, false},
		{of(nil), []string{"mine"}, true},
		{of([]byte("no certificate")), []string{"mine"}, true},
		// An agent has no authority of a server.
		{of(mine), []string{"none"}, false},
		{of(nil), []string{"none"}, false},
	} {
		var files []string
		for _, name := range c.files {
			files = append(files, filepath.Join(dir, name))
		}
		if got := isCluster(c.config, files); got != c.want {
			t.Errorf("%q with %q: %t", c.config.CAData, c.files, got)
		}
	}
}

// An archive from someone else writes nothing outside of its folder, and is read once.
func TestHostileArchive(t *testing.T) {
	write := func(entries ...tar.Header) string {
		file := filepath.Join(t.TempDir(), "image.tar")
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		w := tar.NewWriter(f)
		for _, h := range entries {
			text := []byte("{}")
			if h.Typeflag == 0 {
				h.Typeflag, h.Size = tar.TypeReg, int64(len(text))
			}
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				if _, err := w.Write(text); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return file
	}
	blob := "blobs/sha256/" + strings.Repeat("0", 64)
	dir := filepath.Join(t.TempDir(), "in", "it")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := write(tar.Header{Name: "./oci-layout"}, tar.Header{Name: "index.json"}, tar.Header{Name: blob}, tar.Header{Name: "../outside"}, tar.Header{Name: "../../outside"},
		tar.Header{Name: "blobs/sha256/../../../outside"}, tar.Header{Name: "/outside"}, tar.Header{Name: "other"},
		tar.Header{Name: "blobs/link", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, tar.Header{Name: "blobs/link/outside"})
	if err := extract(file, dir); err != nil {
		t.Fatal(err)
	}
	var found []string
	if err := filepath.WalkDir(filepath.Dir(filepath.Dir(dir)), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, strings.TrimPrefix(path, dir))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(found, " "); got != "/"+blob+" /index.json /oci-layout" {
		t.Errorf("written are %s", got)
	}
	if err := extract(write(tar.Header{Name: "index.json"}, tar.Header{Name: "index.json"}), t.TempDir()); err == nil {
		t.Error("a file that is there twice is accepted")
	}
	if _, _, err := OpenArchive(write(tar.Header{Name: "oci-layout"}, tar.Header{Name: "index.json"})); err == nil {
		t.Error("an archive without an image is accepted")
	}
}

// What is exported can be loaded again.
func TestArchive(t *testing.T) {
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	const ref = "docker.io/shop/api:1"
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := writeArchive(img, ref, file); err != nil {
		t.Fatal(err)
	}
	list, done, err := OpenArchive(file)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if len(list) != 1 || list[0].Name != ref {
		t.Fatalf("it has %+v", list)
	}
	got, err := list[0].Content.(v1.Image).Digest()
	want, wantErr := img.Digest()
	if errors.Join(err, wantErr) != nil || got != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
	// Of `docker save`, with short names.
	tags := map[name.Tag]v1.Image{}
	for _, short := range []string{"shop/api:1", "shop/web:1"} {
		tag, err := name.NewTag(short)
		if err != nil {
			t.Fatal(err)
		}
		tags[tag] = img
	}
	several := filepath.Join(t.TempDir(), "several.tar")
	if err := tarball.MultiWriteToFile(several, tags); err != nil {
		t.Fatal(err)
	}
	list, _, err = OpenArchive(several)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range list {
		names = append(names, a.Name)
		if got, err := a.Content.(v1.Image).Digest(); err != nil || got != want {
			t.Errorf("%s is %s, %v, want %s", a.Name, got, err, want)
		}
	}
	slices.Sort(names)
	if got := strings.Join(names, " "); got != "docker.io/shop/api:1 docker.io/shop/web:1" {
		t.Errorf("it has %s", got)
	}
	var c *Cluster
	if err := c.Load(context.Background(), several, ref, nil); err == nil || !strings.Contains(err.Error(), "one at a time") {
		t.Errorf("two images under one name: %v", err)
	}
	if err := c.Load(context.Background(), filepath.Join(t.TempDir(), "none"), ref, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}
