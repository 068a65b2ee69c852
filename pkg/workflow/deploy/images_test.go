//go:build integration

package deploy

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// TestSignsOnlyWhatItBuilt builds with buildah, pushes to a registry and signs there.
func TestSignsOnlyWhatItBuilt(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	storage := t.TempDir()
	for name, text := range map[string]string{
		"storage.conf":    fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(storage, "root"), filepath.Join(storage, "run")),
		"registries.conf": fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", host),
	} {
		if err := os.WriteFile(filepath.Join(storage, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CONTAINERS_STORAGE_CONF", filepath.Join(storage, "storage.conf"))
	t.Setenv("CONTAINERS_REGISTRIES_CONF", filepath.Join(storage, "registries.conf"))

	context := t.TempDir()
	write := func(text string) {
		t.Helper()
		for name, text := range map[string]string{"Dockerfile": "FROM scratch\nCOPY text /text\n", "text": text} {
			if err := os.WriteFile(filepath.Join(context, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	key := func() *signature.Signer {
		t.Helper()
		private, _, err := signature.Generate(func(bool) ([]byte, error) { return []byte("x"), nil })
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "image.key")
		if err := os.WriteFile(file, private, 0o600); err != nil {
			t.Fatal(err)
		}
		signer, err := signature.ReadSigner(file, func(bool) ([]byte, error) { return []byte("x"), nil })
		if err != nil {
			t.Fatal(err)
		}
		return signer
	}
	signer := key()
	d := newDeployment(Options{Project: &project.Project{Dir: context, Registry: host + "/team"}, Signer: signer, RegistryDir: t.TempDir()})
	m := mover{registry: true, engine: sync.OnceValues(func() (image.Engine, error) { return image.Find(t.Context(), "buildah") })}
	place, err := d.place(m)
	if err != nil {
		t.Fatal(err)
	}
	next := func() job {
		t.Helper()
		s := project.Service{Name: "api", Context: ".", Dockerfile: "Dockerfile"}
		j := job{service: s, source: source(d.Project, s)}
		fingerprint, err := j.source.Fingerprint()
		if err != nil {
			t.Fatal(err)
		}
		if j.ref, err = image.Name("shop/api:1", d.Project.Registry, fingerprint); err != nil {
			t.Fatal(err)
		}
		return j
	}
	provide := func(j job) Image {
		t.Helper()
		out, err := d.provide(t.Context(), m, j, (&progress.Steps{}).Start("image"))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	verified := func(ref string) string {
		t.Helper()
		i, err := signer.Public().Verify(t.Context(), ref, place)
		if err != nil {
			t.Fatal(err)
		}
		return i.Digest.String()
	}
	buildah := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "buildah", args...).CombinedOutput(); err != nil {
			t.Fatalf("buildah %v: %v: %s", args, err, out)
		}
	}

	write("one")
	first := provide(next())
	if !first.Built || first.Digest == "" || verified(next().ref.Full) != first.Digest {
		t.Errorf("the first: %+v", first)
	}
	if again := provide(next()); again.Built || again.Digest != first.Digest {
		t.Errorf("what has the signature already: %+v, was %s", again, first.Digest)
	}

	// Another image has the name that the next one will get, in the builder's storage and in the registry.
	write("other")
	buildah("build", "--isolation", "chroot", "--format", "oci", "--tag", "other", context)
	write("two")
	j := next()
	buildah("tag", "other", j.ref.Full)
	buildah("push", j.ref.Full)
	foreign, _, err := signature.Stored(t.Context(), j.ref.Full, place)
	if err != nil {
		t.Fatal(err)
	}
	second := provide(j)
	if !second.Built || second.Digest == foreign.Digest.String() || verified(j.ref.Full) != second.Digest {
		t.Errorf("instead of what was there: %+v", second)
	}
	if _, err := signer.Public().Verify(t.Context(), foreign.String(), place); !errors.Is(err, signature.ErrUnsigned) {
		t.Errorf("what was there is signed: %v", err)
	}

	// A signature by another key is none.
	d.Signer = key()
	if other := provide(j); !other.Built || other.Digest == "" {
		t.Errorf("with another key: %+v", other)
	}
}
