package signature

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
)

// hub is a registry, empty at first, and its name.
func hub(t *testing.T) (*Registry, string) {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	return NewRegistry(t.TempDir(), &credentialprovider.BasicDockerKeyring{}), strings.TrimPrefix(server.URL, "http://")
}

// pushImage pushes an image that is unique by its author.
func pushImage(t *testing.T, r *Registry, ref, author string) digest.Digest {
	t.Helper()
	config := blob(ocispec.MediaTypeImageConfig, []byte(`{"author":"`+author+`"}`))
	text, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config.Descriptor})
	if err != nil {
		t.Fatal(err)
	}
	manifest := blob(ocispec.MediaTypeImageManifest, text)
	if err := r.Put(t.Context(), ref, manifest, config); err != nil {
		t.Fatal(err)
	}
	return manifest.Digest
}

// pair returns the files of a new key pair.
func pair(t *testing.T) (*Signer, Keys) {
	t.Helper()
	password := func(bool) ([]byte, error) { return []byte("secret"), nil }
	private, public, err := Generate(password)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image")
	for name, text := range map[string][]byte{file + ".key": private, file + ".pub": public} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	signer, err := ReadSigner(file+".key", password)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ReadKeys(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return signer, keys
}

func sign(t *testing.T, key *Signer, ref string, place Place, fresh bool) Image {
	t.Helper()
	image, got, err := Sign(t.Context(), key, ref, place)
	if err != nil || got != fresh {
		t.Fatalf("sign %s: fresh is %v, %v", ref, got, err)
	}
	return image
}

func refused(t *testing.T, keys Keys, ref string, place Place, why string) {
	t.Helper()
	if _, err := keys.Verify(t.Context(), ref, place); !errors.Is(err, ErrUnsigned) || !strings.Contains(err.Error(), why) {
		t.Errorf("%s: %v, want it refused: %s", ref, err, why)
	}
}

func TestSignedImageIsVerified(t *testing.T) {
	r, host := hub(t)
	ref := host + "/shop/api:1"
	sum := pushImage(t, r, ref, "a")
	ours, our := pair(t)
	theirs, their := pair(t)
	refused(t, our, ref, r, "there is no signature of it in the registry")

	if image := sign(t, ours, ref, r, true); image.String() != host+"/shop/api@"+sum.String() {
		t.Errorf("signed is %s", image)
	}
	sign(t, ours, ref, r, false) // once is enough
	for _, name := range []string{ref, host + "/shop/api@" + sum.String(), ref + "@" + sum.String()} {
		if image, err := our.Verify(t.Context(), name, r); err != nil || image.Digest != sum {
			t.Errorf("%s: %v, %v", name, image, err)
		}
	}
	refused(t, their, ref, r, "its signature is by another key")

	sign(t, theirs, ref, r, true)
	for _, keys := range []Keys{our, their, append(their, our...)} {
		if _, err := keys.Verify(t.Context(), ref, r); err != nil {
			t.Error(err)
		}
	}
	// The tag where cosign looks.
	if _, err := r.Manifest(t.Context(), host+"/shop/api:sha256-"+sum.Encoded()+".sig"); err != nil {
		t.Error(err)
	}
}

func TestSignatureIsOfOneImageOnly(t *testing.T) {
	r, host := hub(t)
	key, keys := pair(t)
	good := host + "/shop/api:1"
	pushImage(t, r, good, "a")
	signed := sign(t, key, good, r, true)
	manifest, err := r.Manifest(t.Context(), signed.stored())
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatal(err)
	}
	blobs := func(name string) (all []Blob) {
		for _, d := range append(m.Layers, m.Config) {
			text, err := r.Blob(t.Context(), name, d)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, Blob{d, text})
		}
		return all
	}
	copied := blobs(signed.stored())

	// The tag moves to another image.
	pushImage(t, r, good, "b")
	refused(t, keys, good, r, "there is no signature of it")
	if _, err := keys.Verify(t.Context(), signed.String(), r); err != nil {
		t.Error("the signed one by its digest:", err)
	}

	// Someone with write access to the registry copies the signature to it, and to another repository.
	other := Image{signed.repository, digest.FromString("")}
	if other.Digest, err = r.Digest(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	if err := r.Put(t.Context(), other.stored(), blob(ocispec.MediaTypeImageManifest, manifest), copied...); err != nil {
		t.Fatal(err)
	}
	refused(t, keys, good, r, "its signature is for "+signed.String())
	elsewhere := host + "/tools/shell:1"
	pushImage(t, r, elsewhere, "a")
	if err := r.Put(t.Context(), strings.Replace(signed.stored(), "/shop/api:", "/tools/shell:", 1), blob(ocispec.MediaTypeImageManifest, manifest), copied...); err != nil {
		t.Fatal(err)
	}
	refused(t, keys, elsewhere, r, "its signature is for "+signed.String())

	// The signed payload is changed.
	payload := blob(payloadType, []byte(strings.Replace(string(copied[0].Content), signed.Digest.String(), other.Digest.String(), 1)))
	payload.Annotations = m.Layers[0].Annotations
	m.Layers = []ocispec.Descriptor{payload.Descriptor}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Put(t.Context(), other.stored(), blob(ocispec.MediaTypeImageManifest, text), payload); err != nil {
		t.Fatal(err)
	}
	refused(t, keys, good, r, "does not match its payload")
}

// holder is a place that has one image, and no signature.
type holder struct {
	*Registry
	image  string
	sum    digest.Digest
	copied bool
}

func (h *holder) Digest(_ context.Context, name string) (digest.Digest, error) {
	if name != h.image {
		return "", errdefs.ErrNotFound
	}
	return h.sum, nil
}

func (h *holder) Copied(context.Context, Image) (bool, error) { return h.copied, nil }

func (h *holder) Manifest(context.Context, string) ([]byte, error) { return nil, errdefs.ErrNotFound }
func (h *holder) ImageManifest(context.Context, string) ([]byte, error) {
	return nil, errdefs.ErrNotFound
}

func TestPlacesInOrder(t *testing.T) {
	far, host := hub(t)
	key, keys := pair(t)
	ref := host + "/shop/api:1"
	sum := pushImage(t, far, ref, "a")
	sign(t, key, ref, far, true)
	for _, c := range []struct {
		copied bool
		good   bool
	}{{true, true}, {false, false}} {
		// The first place has the image, but not its signature.
		place := &holder{Registry: far, image: ref, sum: sum, copied: c.copied}
		image, err := keys.Verify(t.Context(), ref, place, far)
		if (err == nil) != c.good || image.Digest != sum {
			t.Errorf("copied %v: %v, %v", c.copied, image, err)
		}
	}
	// It does not have the image: the next place is used.
	if _, err := keys.Verify(t.Context(), ref, &holder{Registry: far}, far); err != nil {
		t.Error(err)
	}
	if _, err := keys.Verify(t.Context(), "Not A Name", far); err == nil || errors.Is(err, ErrUnsigned) {
		t.Errorf("a bad name: %v", err)
	}
	if _, err := keys.Verify(t.Context(), host+"/no/such:1", far); err == nil || errors.Is(err, ErrUnsigned) {
		t.Errorf("a nonexistent image: %v", err)
	}
}

func TestKeys(t *testing.T) {
	asked := []bool{}
	right := func(twice bool) ([]byte, error) { asked = append(asked, twice); return []byte("right"), nil }
	private, public, err := Generate(right)
	if err != nil || !strings.HasPrefix(string(private), "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----") || !strings.HasPrefix(string(public), "-----BEGIN PUBLIC KEY-----") {
		t.Fatalf("%v\n%s%s", err, private, public)
	}
	t.Setenv("TEST_KEY", string(private))
	t.Setenv("TEST_PUB", string(public))
	if _, err := ReadSigner("env://TEST_KEY", right); err != nil {
		t.Error(err)
	}
	if len(asked) != 2 || !asked[0] || asked[1] {
		t.Errorf("the password was requested: %v", asked)
	}
	if _, err := ReadSigner("env://TEST_KEY", func(bool) ([]byte, error) { return []byte("wrong"), nil }); err == nil {
		t.Error("a wrong password is accepted")
	}
	if keys, err := ReadKeys("env://TEST_PUB", "env://TEST_PUB"); err != nil || len(keys) != 2 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	for from, want := range map[string]string{
		"env://TEST_KEY": "is a private key", "env://NO_SUCH": "NO_SUCH is not set in the environment", "/no/such": "no such file",
	} {
		if _, err := ReadKeys(from); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", from, err, want)
		}
	}
}

// hostile is a registry whose image has this digest, with this manifest of its signatures and this blob.
func hostile(t testing.TB, sum, signatures string, blob http.HandlerFunc) (*Registry, string) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/blobs/"):
			blob(w, r)
		case strings.HasSuffix(r.URL.Path, ".sig"), strings.HasSuffix(r.URL.Path, digest.FromString(signatures).String()):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromString(signatures).String())
			w.Header().Set("Content-Length", strconv.Itoa(len(signatures)))
			if r.Method == http.MethodGet {
				_, _ = io.WriteString(w, signatures)
			}
		default:
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header()["Docker-Content-Digest"] = []string{sum}
			w.Header().Set("Content-Length", "2")
			if r.Method == http.MethodGet {
				_, _ = io.WriteString(w, "{}")
			}
		}
	}))
	t.Cleanup(server.Close)
	return NewRegistry(t.TempDir(), &credentialprovider.BasicDockerKeyring{}), strings.TrimPrefix(server.URL, "http://") + "/shop/api:1"
}

// A registry can return anything.
func TestHostileRegistry(t *testing.T) {
	signer, keys := pair(t)
	image := digest.FromString("{}").String()
	some := base64.StdEncoding.EncodeToString([]byte("signature"))
	layer := func(sum string, size int64) string {
		return fmt.Sprintf(`{"schemaVersion":2,"layers":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{%q:%q}}]}`, payloadType, sum, size, annotation, some)
	}
	endless := func(w http.ResponseWriter, r *http.Request) {
		for chunk := make([]byte, 1<<20); r.Method == http.MethodGet; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	none := func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }
	for name, c := range map[string]struct {
		sum, signatures string
		blob            http.HandlerFunc
		why             string
	}{
		"image without algorithm": {"abc", "{}", none, ""},
		"empty algorithm":         {":abc", "{}", none, ""},
		"unknown algorithm":       {"md5:d41d8cd98f00b204e9800998ecf8427e", "{}", none, ""},
		"short digest":            {"sha256:abc", "{}", none, ""},
		"no layer digest":         {image, layer("", 5), none, "is not a digest"},
		"layer digest of a word":  {image, layer("abc", 5), none, "is not a digest"},
		"upper case":              {image, layer("sha256:"+strings.Repeat("A", 64), 5), none, "is not a digest"},
		"negative size":           {image, layer(image, -1), none, "has -1 bytes"},
		"huge size":               {image, layer(image, 1<<40), none, "bytes, too many for a signature"},
		"elsewhere":               {image, strings.Replace(layer(image, 5), `"size"`, `"urls":["http://169.254.169.254/"],"size"`, 1), none, "instead of the registry"},
		"endless":                 {image, layer(image, 5), endless, ""},
		"not JSON":                {image, "{", none, "unexpected end of JSON"},
		"an index":                {image, `{"mediaType":"application/vnd.oci.image.index.v1+json"}`, none, ", not a manifest"},
		"a wrong type":            {image, `{"layers":"x"}`, none, "cannot unmarshal"},
		"to another scheme": {image, layer(image, 5), func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "ftp://"+r.Host+"/", http.StatusFound)
		}, ""},
		"in a circle": {image, layer(image, 5), func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, "redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			r, ref := hostile(t, c.sum, c.signatures, c.blob)
			_, err := keys.Verify(t.Context(), ref, r)
			if err == nil || !strings.Contains(err.Error(), c.why) {
				t.Errorf("Verify returned %v, want %q", err, c.why)
			}
			if _, _, err := Sign(t.Context(), signer, ref, r); err == nil {
				t.Error("it is signed")
			}
		})
	}
}

// Whatever a registry returns, nothing is verified without a signature, and the program does not crash.
func FuzzRegistry(f *testing.F) {
	image := digest.FromString("{}").String()
	f.Add(image, `{"schemaVersion":2,"layers":[{"mediaType":"`+payloadType+`","digest":"sha256","size":-1,"annotations":{"`+annotation+`":"eA=="}}]}`, "x")
	f.Add("sha256:", `{"layers":[{}]}`, "")
	f.Add(":", "[]", "{}")
	f.Add(image, `{"schemaVersion":2,"layers":[{"mediaType":"`+payloadType+`","digest":"`+image+`","size":2,"annotations":{"`+annotation+`":"eA=="}}]}`, "{}")
	_, public, err := Generate(func(bool) ([]byte, error) { return nil, nil })
	if err != nil {
		f.Fatal(err)
	}
	f.Setenv("TEST_PUB", string(public))
	keys, err := ReadKeys("env://TEST_PUB")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, sum, signatures, blob string) {
		r, ref := hostile(t, strings.Map(func(c rune) rune {
			if c < ' ' || c > '~' {
				return -1
			}
			return c
		}, sum), signatures, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, blob) })
		if image, err := keys.Verify(t.Context(), ref, r); err == nil {
			t.Errorf("%s is verified", image)
		}
	})
}
