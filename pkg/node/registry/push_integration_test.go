//go:build integration

package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/image"
)

// client is a user of the API server whose node is a machine.
type client struct {
	*testing.T
	config *rest.Config
	http   *http.Client
}

func newClient(t *testing.T, config *rest.Config) *client {
	t.Helper()
	h, err := rest.HTTPClientFor(config)
	ok(t, err)
	return &client{t, config, h}
}

// as returns another user.
func (c *client) as(user string) *client {
	c.Helper()
	config := rest.CopyConfig(c.config)
	config.Impersonate = rest.ImpersonationConfig{UserName: user}
	return newClient(c.T, config)
}

// ask sends a request, and returns the answer with its body.
func (c *client) ask(method, path, mediaType string, body []byte) (*http.Response, string) {
	c.Helper()
	r, err := http.NewRequestWithContext(c.Context(), method, c.config.Host, bytes.NewReader(body))
	ok(c.T, err)
	target, query, _ := strings.Cut(path, "?")
	r.URL.Path, r.URL.RawQuery = target, query
	if mediaType != "" {
		r.Header.Set("Content-Type", mediaType)
	}
	answer, err := c.http.Do(r)
	ok(c.T, err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	ok(c.T, err)
	return answer, string(text)
}

// upload pushes content to a repository and returns the status of the last request.
func (c *client) upload(repository string, content []byte, as digest.Digest) (int, string) {
	c.Helper()
	answer, text := c.ask(http.MethodPost, imagestore.BuildsPath+"docker.io/v2/"+repository+"/blobs/uploads/", "", nil)
	if answer.StatusCode != http.StatusAccepted {
		return answer.StatusCode, text
	}
	at := imagestore.BuildsPath + "docker.io" + answer.Header.Get("Location")
	if answer, text = c.ask(http.MethodPatch, at, "application/octet-stream", content); answer.StatusCode != http.StatusAccepted {
		return answer.StatusCode, text
	}
	answer, text = c.ask(http.MethodPut, at+"?digest="+as.String(), "", nil)
	return answer.StatusCode, text
}

// push pushes an image as `polymesh deploy` does.
func (c *client) push(img v1.Image, ref, prefix string) error {
	c.Helper()
	file := filepath.Join(c.TempDir(), "image.tar")
	tag, err := name.NewTag(ref)
	ok(c.T, err)
	ok(c.T, tarball.WriteToFile(file, tag, img))
	cluster, err := image.OpenCluster(c.Context(), c.config, prefix)
	if err != nil {
		return err
	}
	return cluster.Load(c.Context(), file, "docker.io/"+ref, func(string) {})
}

// uploads returns the parts of images that the machine's containerd is receiving.
func (m *machine) uploads() (names []string) {
	m.Helper()
	ctd, err := containerd.New(m.dir.ContainerdSocket(), containerd.WithDefaultNamespace(imagestore.Namespace))
	ok(m.T, err)
	defer ctd.Close()
	list, err := ctd.ContentStore().ListStatuses(m.Context())
	ok(m.T, err)
	for _, s := range list {
		names = append(names, s.Ref)
	}
	return names
}

// names returns the names of the machine's images.
func (m *machine) names() []string {
	m.Helper()
	list, err := m.store.Names(m.Context())
	ok(m.T, err)
	return list
}

// eventuallyKeeps waits until a node has an image without having pulled it.
func (m *machine) eventuallyKeeps(ref string, want digest.Digest) {
	m.Helper()
	repository, tag := ref[:strings.LastIndex(ref, ":")], ref[strings.LastIndex(ref, ":")+1:]
	eventually(m.T, ref+" is on "+m.name, func() error {
		d, err := m.store.Find(m.Context(), "docker.io/"+repository, tag, false)
		if err == nil && want != "" && d.Digest != want {
			err = fmt.Errorf("it is %s, want %s", d.Digest, want)
		}
		return err
	})
}

// Users push images through a real API server to a real containerd; another node keeps a copy of each.
func TestPush(t *testing.T) {
	pki := newPKI(t)
	a, b := newMachine(t, pki, "a", "127.0.0.5"), newMachine(t, pki, "b", "127.0.0.6")
	a.start(a, b)
	b.start(a, b)
	kubeconfig := controlplanetest.StartWith(t, slog.New(slog.DiscardHandler), a.reg.Handlers())
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	ok(t, err)
	config.QPS = -1
	admin := newClient(t, config)
	api := kubernetes.NewForConfigOrDie(config)

	t.Run("an image that was built", func(t *testing.T) {
		ref := "shop/pushed:1.0.0-" + hash
		img := newImage(t)
		ok(t, admin.push(img, ref, imagestore.BuildsPath))
		want, err := img.Digest()
		ok(t, err)
		a.eventuallyPinned(ref)
		a.eventuallyKeeps(ref, digest.Digest(want.String()))
		b.eventuallyKeeps(ref, digest.Digest(want.String()))
		b.eventuallyPinned(ref)
		// A node that has neither runs it.
		ok(t, b.pull(ref))
		cluster, err := image.OpenCluster(t.Context(), config, imagestore.BuildsPath)
		ok(t, err)
		for ref, want := range map[string]bool{"docker.io/" + ref: true, "docker.io/shop/pushed:" + hash: false, "docker.io/library/redis:8": false} {
			if has, err := cluster.Has(t.Context(), ref); err != nil || has != want {
				t.Errorf("%s is there: %t, %v", ref, has, err)
			}
		}
		file := filepath.Join(t.TempDir(), "export.tar")
		ok(t, cluster.Export(t.Context(), "docker.io/"+ref, file))
		if list, done, err := image.OpenArchive(file); err != nil || len(list) != 1 || list[0].Name != "docker.io/"+ref {
			t.Errorf("the export has %v, %v", list, err)
		} else {
			done()
		}
		ok(t, cluster.Deployed(t.Context(), "docker.io/"+ref, "project", "api"))
		list, err := a.store.Copies(t.Context())
		ok(t, err)
		found := false
		for _, c := range list {
			found = found || c.Name == "docker.io/"+ref && c.Project == "project" && c.Service == "api" && c.Deployed != ""
		}
		if !found {
			t.Errorf("it is not kept as deployed: %+v", list)
		}
		if err := cluster.Deployed(t.Context(), "docker.io/shop/none:"+hash, "project", "api"); err == nil {
			t.Error("an image that is nowhere is deployed")
		}
		// What is kept until a manifest comes is released with it.
		a.reg.uploads.mu.Lock()
		defer a.reg.uploads.mu.Unlock()
		if len(a.reg.uploads.held)+len(a.reg.uploads.open) > 0 {
			t.Errorf("left are %v and %v", a.reg.uploads.held, a.reg.uploads.open)
		}
	})
	t.Run("built again", func(t *testing.T) {
		ref := "shop/again:" + hash
		for range 2 {
			img := newImage(t)
			ok(t, admin.push(img, ref, imagestore.BuildsPath))
			want, err := img.Digest()
			ok(t, err)
			b.eventuallyKeeps(ref, digest.Digest(want.String()))
		}
	})
	t.Run("an index", func(t *testing.T) {
		index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: newImage(t)}, mutate.IndexAddendum{Add: newImage(t)})
		cluster, err := image.OpenCluster(t.Context(), config, imagestore.ImagesPath)
		ok(t, err)
		ok(t, cluster.Push(t.Context(), index, "docker.io/shop/index:2", func(string) {}))
		want, err := index.Digest()
		ok(t, err)
		a.eventuallyKeeps("shop/index:2", digest.Digest(want.String()))
		// Its tag is none of a build, so an agent is no place for it. That the cluster has no other server is no warning: the user can do nothing.
		eventually(t, "there is nothing left to copy", func() error {
			pending, failed, err := a.reg.copies.round(t.Context())
			if notes := a.reg.Notes(t.Context()); err != nil || pending || failed || len(notes) > 0 {
				return fmt.Errorf("pending: %t, failed: %t, %v, %q", pending, failed, err, notes)
			}
			return nil
		})
		if names := b.names(); slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "shop/index") }) {
			t.Errorf("an agent keeps it: %q", names)
		}
	})
	t.Run("a signature", func(t *testing.T) {
		ref := "shop/signed-away:" + hash
		ok(t, admin.push(newImage(t), ref, imagestore.BuildsPath))
		password := func(bool) ([]byte, error) { return []byte("sesame"), nil }
		private, _, err := signature.Generate(password)
		ok(t, err)
		file := filepath.Join(t.TempDir(), "key")
		ok(t, os.WriteFile(file, private, 0o600))
		signer, err := signature.ReadSigner(file, password)
		ok(t, err)
		cluster, err := image.OpenCluster(t.Context(), config, imagestore.BuildsPath)
		ok(t, err)
		_, fresh, err := signature.Sign(t.Context(), signer, "docker.io/"+ref, cluster.SignedPlace())
		if err != nil || !fresh {
			t.Fatalf("sign: %t, %v", fresh, err)
		}
		for _, m := range []*machine{a, b} {
			eventually(t, "the signature is on "+m.name, func() error {
				m.reg.copies.look()
				a.reg.copies.look()
				_, err := signer.Public().Verify(t.Context(), "docker.io/"+ref, m.store.Signatures())
				return err
			})
		}
	})

	t.Run("who may", func(t *testing.T) {
		bind := func(role, user string) {
			t.Helper()
			_, err := api.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
				ObjectMeta: metav1.ObjectMeta{Name: user}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
				Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
			}, metav1.CreateOptions{})
			ok(t, err)
		}
		bind(imagestore.PushRole, "deployer")
		_, err := api.RbacV1().ClusterRoles().Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "team"}, Rules: []rbacv1.PolicyRule{
			{NonResourceURLs: []string{imagestore.BuildsPath + "docker.io/v2/team/*"}, Verbs: []string{"get", "head", "post", "patch", "put"}},
		}}, metav1.CreateOptions{})
		ok(t, err)
		bind("team", "member")

		deployer, member, stranger := admin.as("deployer"), admin.as("member"), admin.as("stranger")
		img := newImage(t)
		eventually(t, "a deployer may push what was built", func() error { return deployer.push(img, "team/api:"+hash, imagestore.BuildsPath) })
		eventually(t, "a member may push to the team's repositories", func() error { return member.push(img, "team/web:"+hash, imagestore.BuildsPath) })
		for what, err := range map[string]error{
			"a deployer, any tag below builds":     deployer.push(img, "library/nginx:1.27", imagestore.BuildsPath),
			"a deployer, any tag below images":     deployer.push(img, "library/nginx:1.27", imagestore.ImagesPath),
			"an administrator, a tag below builds": admin.push(img, "library/nginx:1.27", imagestore.BuildsPath),
			"a member, another repository":         member.push(img, "shop/api:"+hash, imagestore.BuildsPath),
			"a user without the role":              stranger.push(img, "team/api:"+hash, imagestore.BuildsPath),
			"the tag latest":                       admin.push(img, "shop/api:latest", imagestore.ImagesPath),
		} {
			if err == nil {
				t.Errorf("%s: it is pushed", what)
			}
		}
		if err := stranger.push(img, "team/api:"+hash, imagestore.BuildsPath); err == nil || !strings.Contains(err.Error(), imagestore.PushRole) {
			t.Errorf("the error does not say what is missing: %v", err)
		}
		for _, name := range a.names() {
			if strings.Contains(name, "nginx") || strings.Contains(name, "latest") || name == "shop/api:"+hash {
				t.Errorf("%s is there", name)
			}
		}
		// Without credentials, the API server itself refuses.
		anonymous := rest.AnonymousClientConfig(config)
		for _, path := range []string{imagestore.BuildsPath, imagestore.BuildsPath + "docker.io/v2/", imagestore.ImagesPath + "docker.io/v2/team/api/manifests/" + hash} {
			if answer, text := newClient(t, anonymous).ask(http.MethodGet, path, "", nil); answer.StatusCode != http.StatusUnauthorized {
				t.Errorf("without credentials, %s is %d: %s", path, answer.StatusCode, text)
			}
		}
		if err := newClient(t, anonymous).push(img, "team/api:"+hash, imagestore.BuildsPath); err == nil || !strings.Contains(err.Error(), "log in") {
			t.Errorf("without credentials: %v", err)
		}
		// An upload is its user's, and its repository's.
		answer, _ := deployer.ask(http.MethodPost, imagestore.BuildsPath+"docker.io/v2/team/api/blobs/uploads/", "", nil)
		at := answer.Header.Get("Location")
		if answer, text := member.ask(http.MethodPatch, imagestore.BuildsPath+"docker.io"+at, "", []byte("x")); answer.StatusCode != http.StatusNotFound {
			t.Errorf("another user's upload: %d %s", answer.StatusCode, text)
		}
		if answer, text := deployer.ask(http.MethodPatch, imagestore.BuildsPath+"docker.io"+strings.Replace(at, "team/api", "team/web", 1), "", []byte("x")); answer.StatusCode != http.StatusNotFound {
			t.Errorf("another repository's upload: %d %s", answer.StatusCode, text)
		}
	})

	const base = imagestore.BuildsPath + "docker.io/v2/"
	t.Run("hostile requests", func(t *testing.T) {
		before := a.names()
		layer := []byte("layer")
		sum := digest.FromBytes(layer)
		manifest := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":%q,"digest":%q,"size":5},"layers":[]}`, ocispec.MediaTypeImageConfig, sum)
		for _, path := range []string{
			base + "../../builds/docker.io/v2/x/y/manifests/" + hash, base + "shop/../../x/manifests/" + hash, base + "Shop/api/manifests/" + hash, base + "shop//api/manifests/" + hash,
			base + "shop/api/manifests/" + hash + ":x", base + "shop/api/manifests/..", base + "redis/manifests/" + hash, base + strings.Repeat("a", 300) + "/manifests/" + hash,
			base + "shop/api@" + sum.String() + "/manifests/" + hash, base + "shop/a\x00pi/manifests/" + hash, base + "shop/a%2fpi/manifests/" + hash, base + "shop/api\n/manifests/" + hash,
			imagestore.BuildsPath + imagestore.ShippedRegistry + "/v2/polymesh/coredns/manifests/" + hash, imagestore.BuildsPath + "*/v2/shop/api/manifests/" + hash,
			imagestore.BuildsPath + "index.docker.io/v2/shop/api/manifests/" + hash, imagestore.BuildsPath + "a:b@c/v2/shop/api/manifests/" + hash, imagestore.BuildsPath + "localhost/../x/v2/shop/api/manifests/" + hash,
			imagestore.BuildsPath + "/v2/shop/api/manifests/" + hash, imagestore.BuildsPath + "docker.io", imagestore.BuildsPath + "docker.io/shop/api/manifests/" + hash,
		} {
			for _, method := range []string{http.MethodPut, http.MethodPost, http.MethodDelete} {
				if answer, text := admin.ask(method, path, ocispec.MediaTypeImageManifest, manifest); answer.StatusCode < 400 || answer.StatusCode >= 500 {
					t.Errorf("%s %q: %d %s", method, path, answer.StatusCode, text)
				}
			}
		}
		// Content of another repository is not in this one, though the node has it.
		if status, text := admin.upload("shop/theirs", layer, sum); status != http.StatusCreated {
			t.Fatalf("upload: %d %s", status, text)
		}
		if answer, text := admin.ask(http.MethodPut, base+"shop/mine/manifests/"+hash, ocispec.MediaTypeImageManifest, manifest); answer.StatusCode < 400 || !strings.Contains(text, "MANIFEST_BLOB_UNKNOWN") {
			t.Errorf("a manifest with another repository's layer: %d %s", answer.StatusCode, text)
		}
		if answer, _ := admin.ask(http.MethodHead, base+"shop/mine/blobs/"+sum.String(), "", nil); answer.StatusCode != http.StatusNotFound {
			t.Errorf("another repository's layer: %d", answer.StatusCode)
		}
		if answer, text := admin.ask(http.MethodPost, base+"shop/mine/blobs/uploads/?mount="+sum.String()+"&from=shop/theirs", "", nil); answer.StatusCode == http.StatusCreated {
			t.Errorf("another repository's layer is mounted: %s", text)
		}
		for what, change := range map[string]struct {
			media string
			text  []byte
		}{
			"a wrong size":         {ocispec.MediaTypeImageManifest, bytes.Replace(manifest, []byte(`"size":5`), []byte(`"size":4`), 1)},
			"an index as manifest": {ocispec.MediaTypeImageManifest, []byte(`{"manifests":[]}`)},
			"no media type":        {"", manifest},
			"a page":               {"text/html", manifest},
			"not JSON":             {ocispec.MediaTypeImageManifest, []byte("<html>")},
			"both":                 {ocispec.MediaTypeImageManifest, bytes.Replace(manifest, []byte(`"layers":[]`), []byte(`"layers":[],"manifests":[]`), 1)},
			"without end":          {ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), imagestore.MaxManifest+1)},
		} {
			if answer, text := admin.ask(http.MethodPut, base+"shop/theirs/manifests/"+hash, change.media, change.text); answer.StatusCode < 400 {
				t.Errorf("%s: %d %s", what, answer.StatusCode, text)
			}
		}
		if answer, text := admin.ask(http.MethodPut, base+"shop/blobs/uploads/api/manifests/"+hash, ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), imagestore.MaxManifest+1)); answer.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("a large manifest in a repository with a name like an upload: %d %s", answer.StatusCode, text)
		}
		// A manifest under another digest than its own.
		if answer, text := admin.ask(http.MethodPut, base+"shop/theirs/manifests/"+digest.FromString("x").String(), ocispec.MediaTypeImageManifest, manifest); answer.StatusCode < 400 {
			t.Errorf("a manifest with another digest: %d %s", answer.StatusCode, text)
		}
		for _, body := range []string{``, `{}`, `{"project":"p"}`, `{"project":"` + strings.Repeat("p", 1000) + `","service":"s"}`, strings.Repeat(" ", maxDeploy+1)} {
			if answer, text := admin.ask(http.MethodPost, base+"shop/pushed/deploys/1.0.0-"+hash, "application/json", []byte(body)); answer.StatusCode < 400 {
				t.Errorf("a deploy %.50q: %d %s", body, answer.StatusCode, text)
			}
		}
		if after := a.names(); len(after) != len(before) {
			t.Errorf("the images are %q, were %q", after, before)
		}
	})
	t.Run("a large signature", func(t *testing.T) {
		text := bytes.Repeat([]byte("x"), imagestore.MaxPayloads)
		sum := digest.FromBytes(text)
		if status, text := admin.upload("shop/large", text, sum); status != http.StatusCreated {
			t.Fatalf("upload: %d %s", status, text)
		}
		part := fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageLayer, sum, len(text))
		manifest := []byte(`{"schemaVersion":2,"config":` + part + `,"layers":[` + part + `]}`)
		tag := "sha256-" + digest.FromString("signed").Encoded() + ".sig"
		if answer, text := admin.ask(http.MethodPut, base+"shop/large/manifests/"+tag, ocispec.MediaTypeImageManifest, manifest); answer.StatusCode < 400 || !strings.Contains(text, "MANIFEST_INVALID") {
			t.Errorf("%d %s", answer.StatusCode, text)
		}
	})
	t.Run("a wrong digest", func(t *testing.T) {
		for _, as := range []digest.Digest{digest.FromString("other"), "sha256:x", digest.SHA512.FromString("layer"), ""} {
			if status, text := admin.upload("shop/wrong", []byte("layer"), as); status < 400 || status >= 500 {
				t.Errorf("as %q: %d %s", as, status, text)
			}
		}
		if status, text := admin.upload("shop/wrong", nil, digest.FromString("")); status < 400 || status >= 500 {
			t.Errorf("nothing: %d %s", status, text)
		}
		if _, err := a.store.ContentSize(t.Context(), digest.FromString("other")); err == nil {
			t.Error("content has a digest that is not its own")
		}
	})
	// What is broken off leaves nothing, and does not count any more.
	t.Run("broken off", func(t *testing.T) {
		a.reg.uploads.mu.Lock()
		for _, o := range a.reg.uploads.open {
			o.at = o.at.Add(-2 * idleTime) // what the requests above have left
		}
		a.reg.uploads.mu.Unlock()
		ended, _ := a.reg.uploads.idle(time.Now())
		for _, o := range ended {
			ok(t, a.reg.remove(o))
		}
		answer, _ := admin.ask(http.MethodPost, base+"shop/broken/blobs/uploads/", "", nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		from, to := io.Pipe()
		r, err := http.NewRequestWithContext(ctx, http.MethodPatch, config.Host, from)
		ok(t, err)
		r.URL.Path = imagestore.BuildsPath + "docker.io" + answer.Header.Get("Location")
		done := make(chan struct{})
		go func() {
			defer close(done)
			if answer, err := admin.http.Do(r); err == nil {
				answer.Body.Close()
			}
		}()
		_, err = to.Write(bytes.Repeat([]byte("x"), 1<<20))
		ok(t, err)
		eventually(t, "the layer comes", func() error {
			if len(a.uploads()) == 0 {
				return errors.New("nothing has come")
			}
			return nil
		})
		cancel()
		to.CloseWithError(net.ErrClosed)
		<-done
		eventually(t, "nothing is left", func() error {
			a.reg.uploads.mu.Lock()
			open := len(a.reg.uploads.open)
			a.reg.uploads.mu.Unlock()
			if left := a.uploads(); len(left) > 0 || open > 0 {
				return fmt.Errorf("%q, and %d uploads", left, open)
			}
			return nil
		})
	})
	t.Run("many at once", func(t *testing.T) {
		var last int
		for range userUploads + 1 {
			answer, _ := admin.ask(http.MethodPost, base+"shop/many/blobs/uploads/", "", nil)
			last = answer.StatusCode
		}
		if last != http.StatusTooManyRequests {
			t.Errorf("one more is %d", last)
		}
		// Another user still can.
		if answer, text := admin.as("deployer").ask(http.MethodPost, base+"shop/many/blobs/uploads/", "", nil); answer.StatusCode != http.StatusAccepted {
			t.Errorf("another user: %d %s", answer.StatusCode, text)
		}
	})
	t.Run("a full disk", func(t *testing.T) {
		a.reg.opts.ContentDir = nearlyFull(t)
		defer func() { a.reg.opts.ContentDir = a.opts.ContentDir }()
		if status, text := admin.as("deployer").upload("shop/full", []byte("layer"), digest.FromString("layer")); status != http.StatusInsufficientStorage {
			t.Errorf("%d %s", status, text)
		}
	})
}

// The node that has an image first is lost: the one with its copy has a second one made, and an agent chooses nothing for a server.
func TestCopies(t *testing.T) {
	pki := newPKI(t)
	a, b, c := newMachine(t, pki, "a", "127.0.0.7"), newMachine(t, pki, "b", "127.0.0.8"), newMachine(t, pki, "c", "127.0.0.9")
	all := []*machine{a, b, c}
	for _, m := range all {
		m.start(all...)
	}
	ref := "shop/api:" + hash
	img := newImage(t)
	b.load(img, ref, true)
	d, err := b.store.Find(t.Context(), "docker.io/shop/api", hash, false)
	ok(t, err)
	// The server is preferred.
	a.eventuallyKeeps(ref, d.Digest)
	a.eventuallyPinned(ref)
	if _, err := c.store.Find(t.Context(), "docker.io/shop/api", hash, false); err == nil {
		t.Error("a third node has a copy, too")
	}
	lost := b.object()
	lost.Status.Conditions[0].Status = corev1.ConditionUnknown
	stop(t, b.reg.Stop)
	for _, m := range []*machine{a, c} {
		ok(t, m.reg.peers.nodes.Update(lost))
		m.reg.copies.look()
	}
	c.eventuallyKeeps(ref, d.Digest)
	c.eventuallyPinned(ref)
	// Another image under the name, from another node, does not replace it.
	copied := imagestore.NewDeployed("docker.io/"+ref, "project", "service")
	other := newImage(t)
	c.load(other, "shop/other:"+hash, true)
	copied.Target, err = c.store.Find(t.Context(), "docker.io/shop/other", hash, false)
	ok(t, err)
	server := func(name string) *peer {
		for _, o := range c.reg.peers.list(everyNode) {
			if o.name == name {
				return o
			}
		}
		t.Fatalf("%s is not known", name)
		return nil
	}
	if done, err := c.reg.peers.copyTo(t.Context(), server("a"), copied); err == nil {
		t.Errorf("another image takes the name: %t", done)
	}
	tagged := copied
	tagged.Name = "docker.io/shop/nginx:1.27"
	if done, err := c.reg.peers.copyTo(t.Context(), server("a"), tagged); err == nil || !strings.Contains(err.Error(), "agents") {
		t.Errorf("an agent chooses what a tag means: %t, %v", done, err)
	}
	// Content that is not what it says it is.
	forged := copied
	forged.Name = "docker.io/shop/forged:" + hash
	forged.Target.Digest = digest.FromString("forged")
	eventually(t, "a copy that cannot be had is an error", func() error {
		if _, err := c.reg.peers.copyTo(t.Context(), server("a"), forged); err == nil {
			return errors.New("it is accepted")
		}
		return nil
	})
	if _, err := a.store.Find(t.Context(), "docker.io/shop/forged", hash, false); err == nil {
		t.Error("a forged copy is kept")
	}
	// A signature of an image that the other node does not have.
	unsigned := imagestore.Copy{Name: "docker.io/shop/api:sha256-" + digest.FromString("none").Encoded() + ".sig", Target: copied.Target, Signature: true}
	if done, err := c.reg.peers.copyTo(t.Context(), server("a"), unsigned); !errors.Is(err, errTaken) {
		t.Errorf("a signature without its image is kept: %t, %v", done, err)
	}
	// Nor does a node get more of the disk than it may.
	c.load(newImage(t), "shop/many:"+hash, false)
	many := imagestore.NewDeployed("docker.io/shop/many:"+hash, "project", "service")
	many.Target, err = c.store.Find(t.Context(), "docker.io/shop/many", hash, false)
	ok(t, err)
	a.reg.copies.mu.Lock()
	a.reg.copies.budgets["c"] = &budget{running: 1, measured: true, used: 1 << 60}
	a.reg.copies.mu.Unlock()
	eventually(t, "the copy is refused", func() error {
		if done, err := c.reg.peers.copyTo(t.Context(), server("a"), many); done || err == nil || !strings.Contains(err.Error(), "of at most") {
			return fmt.Errorf("%t, %w", done, err)
		}
		return nil
	})
	a.reg.copies.mu.Lock()
	delete(a.reg.copies.budgets, "c")
	a.reg.copies.mu.Unlock()
	// A full disk takes none.
	c.load(newImage(t), "shop/full:"+hash, false)
	full := imagestore.NewDeployed("docker.io/shop/full:"+hash, "project", "service")
	full.Target, err = c.store.Find(t.Context(), "docker.io/shop/full", hash, false)
	ok(t, err)
	a.reg.opts.ContentDir = nearlyFull(t)
	if done, err := c.reg.peers.copyTo(t.Context(), server("a"), full); err == nil || !strings.Contains(err.Error(), "MiB of disk left") {
		t.Errorf("a copy on a full disk: %t, %v", done, err)
	}
	a.reg.opts.ContentDir = a.opts.ContentDir
	// The node that built the image is removed: its copy here is released by the next deploys here, not before.
	ok(t, a.reg.peers.nodes.Delete(b.object()))
	a.reg.peers.complete.Store(true)
	if _, _, err := a.reg.copies.round(t.Context()); err != nil || !a.pinned(ref) {
		t.Errorf("the copy of a node that was removed is released before others replace it: %v", err)
	}
	for i := range imagestore.KeptDeploys {
		a.load(newImage(t), fmt.Sprintf("shop/later:%d-%s", i, hash), true)
	}
	// The CRI learns of a label from an event.
	eventually(t, "the copy of a node that was removed is released", func() error {
		if a.pinned(ref) {
			return errors.New("it is pinned")
		}
		return nil
	})
	text, err := json.Marshal(copied)
	ok(t, err)
	if strings.Contains(string(text), "copied-from") {
		t.Errorf("%s", text)
	}
}

// nearlyFull returns a folder on a file system without space.
func nearlyFull(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ok(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { ok(t, unix.Unmount(dir, 0)) })
	ok(t, os.WriteFile(filepath.Join(dir, "full"), make([]byte, 1<<20), 0o600))
	return dir
}
