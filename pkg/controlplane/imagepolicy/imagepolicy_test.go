package imagepolicy

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	admission "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/credentialprovider"

	"polymesh.dev/polymesh/pkg/signature"
)

// setup is a policy with one key, a registry, and images in it: api:signed, api:unsigned and mesh:shipped.
type setup struct {
	t      *testing.T
	policy *Policy
	repo   string // the registry's name with a slash
	sums   map[string]digest.Digest
}

// place is the registry as the node's store, which knows what was shipped.
type place struct {
	*signature.Registry
	shipped string
}

func (p place) Shipped(_ context.Context, name string) (bool, error) { return name == p.shipped, nil }
func (p place) Close() error                                         { return nil }

func newSetup(t *testing.T) *setup {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	r := signature.NewRegistry(t.TempDir(), &credentialprovider.BasicDockerKeyring{})
	s := &setup{t: t, repo: strings.TrimPrefix(server.URL, "http://") + "/", sums: map[string]digest.Digest{}}
	for _, name := range []string{"api:signed", "api:unsigned", "mesh:shipped"} {
		config := []byte(`{"author":"` + name + `"}`)
		text, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descriptor(ocispec.MediaTypeImageConfig, config)})
		if err != nil {
			t.Fatal(err)
		}
		manifest := descriptor(ocispec.MediaTypeImageManifest, text)
		s.sums[name] = manifest.Digest
		if err := r.Put(t.Context(), s.repo+name, signature.Blob{Descriptor: manifest, Content: text}, signature.Blob{Descriptor: descriptor(ocispec.MediaTypeImageConfig, config), Content: config}); err != nil {
			t.Fatal(err)
		}
	}
	password := func(bool) ([]byte, error) { return nil, nil }
	private, public, err := signature.Generate(password)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TEST_KEY", string(private))
	block, _ := pem.Decode(public)
	signer, err := signature.ReadSigner("env://TEST_KEY", password)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := signature.Sign(t.Context(), signer, s.repo+"api:signed", r); err != nil {
		t.Fatal(err)
	}
	s.policy = New(Options{Keys: [][]byte{block.Bytes}, RegistryDirs: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err := s.policy.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.policy.node = place{r, s.repo + "mesh:shipped"}
	return s
}

func descriptor(mediaType string, content []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

// pod has a container with an image at each place where a pod can name one.
func pod(init, container, ephemeral, volume string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}}
	if init != "" {
		p.Spec.InitContainers = []corev1.Container{{Name: "init", Image: init}}
	}
	if container != "" {
		p.Spec.Containers = []corev1.Container{{Name: "main", Image: container}}
	}
	if ephemeral != "" {
		p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: ephemeral}}}
	}
	if volume != "" {
		p.Spec.Volumes = []corev1.Volume{{Name: "model", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: volume}}}}
	}
	return p
}

// ask sends a review as the API server does. It returns the patch, or the message with which the pod is refused.
func (s *setup) ask(decide decide, old, new *corev1.Pod) (patch []operation, refused string) {
	s.t.Helper()
	request := &admission.AdmissionRequest{UID: "1", Namespace: "shop"}
	for to, p := range map[*runtime.RawExtension]*corev1.Pod{&request.Object: new, &request.OldObject: old} {
		if p == nil {
			continue
		}
		text, err := json.Marshal(p)
		if err != nil {
			s.t.Fatal(err)
		}
		to.Raw = text
	}
	body, err := json.Marshal(admission.AdmissionReview{Request: request})
	if err != nil {
		s.t.Fatal(err)
	}
	w := httptest.NewRecorder()
	s.policy.handler(decide).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body)))
	var review admission.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &review); err != nil || review.Response == nil || review.Response.UID != "1" {
		s.t.Fatalf("answer %d %s: %v", w.Code, w.Body, err)
	}
	if !review.Response.Allowed {
		return nil, review.Response.Result.Message
	}
	if review.Response.Patch != nil {
		if err := json.Unmarshal(review.Response.Patch, &patch); err != nil {
			s.t.Fatal(err)
		}
	}
	return patch, ""
}

func TestSignedImageIsPinned(t *testing.T) {
	s := newSetup(t)
	signed := s.repo + "api:signed"
	patch, refused := s.ask(s.policy.pin, nil, pod(signed, signed, signed, signed))
	if refused != "" || len(patch) != 4 {
		t.Fatalf("%v %s", patch, refused)
	}
	for i, path := range []string{"/spec/initContainers/0/image", "/spec/containers/0/image", "/spec/ephemeralContainers/0/image", "/spec/volumes/0/image/reference"} {
		if want := (operation{"replace", path, signed + "@" + s.sums["api:signed"].String()}); patch[i] != want {
			t.Errorf("got %v, want %v", patch[i], want)
		}
	}
	pinned := patch[0].Value
	if patch, refused := s.ask(s.policy.check, nil, pod(pinned, pinned, pinned, pinned)); refused != "" || patch != nil {
		t.Errorf("%v %s", patch, refused)
	}
	// What has a digest stays as it is.
	if patch, refused := s.ask(s.policy.pin, nil, pod("", pinned, "", "")); refused != "" || patch != nil {
		t.Errorf("%v %s", patch, refused)
	}
}

func TestUnsignedImageIsRefused(t *testing.T) {
	s := newSetup(t)
	signed, unsigned := s.repo+"api:signed", s.repo+"api:unsigned"
	pinned := signed + "@" + s.sums["api:signed"].String()
	// The signed one's tag with the other's digest.
	disguised := signed + "@" + s.sums["api:unsigned"].String()
	for name, p := range map[string]*corev1.Pod{
		"container main": pod(pinned, unsigned, "", ""), "container init": pod(unsigned, pinned, "", ""),
		"container debug": pod("", pinned, unsigned, ""), "volume model": pod("", pinned, "", unsigned),
	} {
		if _, refused := s.ask(s.policy.pin, nil, p); !strings.Contains(refused, name+": image "+unsigned+" is not signed by a key of this server") || !strings.Contains(refused, "polymesh image sign --key FILE "+unsigned) {
			t.Errorf("%s: %q", name, refused)
		}
		if _, refused := s.ask(s.policy.check, nil, p); !strings.Contains(refused, name+": image "+unsigned+" has no digest") {
			t.Errorf("%s: %q", name, refused)
		}
	}
	if _, refused := s.ask(s.policy.check, nil, pod("", disguised, "", "")); !strings.Contains(refused, "is not signed") {
		t.Errorf("%q", refused)
	}
	// A tag that was right when someone else set it is no more than a tag.
	if _, refused := s.ask(s.policy.check, nil, pod("", signed, "", "")); !strings.Contains(refused, "has no digest") {
		t.Errorf("%q", refused)
	}
	for image, want := range map[string]string{"Not A Name": "invalid reference", s.repo + "api:none": "could not determine"} {
		if _, refused := s.ask(s.policy.pin, nil, pod("", image, "", "")); !strings.Contains(refused, want) {
			t.Errorf("%s: %q", image, refused)
		}
	}
}

func TestOnlyNewImagesAreJudged(t *testing.T) {
	s := newSetup(t)
	signed, unsigned := s.repo+"api:signed", s.repo+"api:unsigned"
	was := pod("", unsigned, "", "")
	labelled := was.DeepCopy()
	labelled.Labels = map[string]string{"a": "b"}
	if patch, refused := s.ask(s.policy.check, was, labelled); patch != nil || refused != "" {
		t.Errorf("a label: %v %s", patch, refused)
	}
	if _, refused := s.ask(s.policy.pin, pod("", signed, "", ""), pod("", unsigned, "", "")); refused == "" {
		t.Error("another image is accepted")
	}
	// The pod's own image too: its tag may mean another one now.
	for _, image := range []string{s.repo + "api:none", unsigned} {
		debugged := was.DeepCopy()
		debugged.Spec.EphemeralContainers = pod("", "", image, "").Spec.EphemeralContainers
		if _, refused := s.ask(s.policy.pin, was, debugged); refused == "" {
			t.Errorf("a container for debugging is accepted: %s", image)
		}
	}
}

func TestShippedImageNeedsNoSignature(t *testing.T) {
	s := newSetup(t)
	shipped := s.repo + "mesh:shipped"
	patch, refused := s.ask(s.policy.pin, nil, pod(shipped, "", "", ""))
	if refused != "" || len(patch) != 1 || patch[0].Value != shipped+"@"+s.sums["mesh:shipped"].String() {
		t.Errorf("%v %s", patch, refused)
	}
}

func TestBadRequest(t *testing.T) {
	s := newSetup(t)
	for _, body := range []string{"", "{}", "x"} {
		w := httptest.NewRecorder()
		s.policy.handler(s.policy.pin).ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body)))
		if w.Code != http.StatusBadRequest {
			t.Errorf("%q: %d", body, w.Code)
		}
	}
}

// The name stays as its author has written it: other policies and people go by that.
func TestPinned(t *testing.T) {
	sum := digest.FromString("x").String()
	for image, want := range map[string]string{
		"nginx":                   "nginx:latest@" + sum,
		"docker.io/library/nginx": "docker.io/library/nginx:latest@" + sum,
		"localhost:5000/api":      "localhost:5000/api:latest@" + sum,
		"localhost:5000/api:1.0":  "localhost:5000/api:1.0@" + sum,
	} {
		if got, err := pinned(image, sum); got != want || err != nil {
			t.Errorf("%s became %s, %v", image, got, err)
		}
	}
	for _, bad := range []string{"", "Shop/API", "a b"} {
		if got, err := pinned(bad, sum); err == nil {
			t.Errorf("%q became %s", bad, got)
		}
	}
	if got, err := pinned("nginx", "sha256:short"); err == nil {
		t.Errorf("a bad digest became %s", got)
	}
}
