//go:build integration

package registry

import (
	"context"
	cryptotls "crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/porttest"
	"polymesh.dev/polymesh/pkg/signature"
)

// machine is a node with the shipped containerd and the component, without the rest.
type machine struct {
	*testing.T
	name  string
	ip    netip.Addr
	dir   layout.DataDir
	store *imagestore.Store
	cri   cri.ImageServiceClient
	opts  Options
	reg   *Registry
	log   *logs
}

type logs struct{ atomic.Pointer[string] }

func (l *logs) Write(p []byte) (int, error) {
	for {
		old := l.Load()
		text := string(p)
		if old != nil {
			text = *old + text
		}
		if l.CompareAndSwap(old, &text) {
			return len(p), nil
		}
	}
}

func (l *logs) String() string {
	if text := l.Load(); text != nil {
		return *text
	}
	return ""
}

// newMachine starts containerd for a node. Its certificates are of the authorities in pki.
func newMachine(t *testing.T, pki, name, ip string) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("containerd needs root")
	}
	built, err := filepath.Abs("../../../.build")
	ok(t, err)
	if _, err := os.Stat(filepath.Join(built, "bin", "containerd")); err != nil {
		t.Fatalf("%v: make .build/bin/containerd", err)
	}
	// The path of a socket has 107 characters.
	dataDir, err := os.MkdirTemp("", "pm-")
	ok(t, err)
	m := &machine{T: t, name: name, ip: netip.MustParseAddr(ip), dir: layout.DataDir(dataDir), log: &logs{}}
	t.Cleanup(func() {
		if err := errors.Join(os.RemoveAll(dataDir), os.RemoveAll(m.dir.Run())); err != nil {
			t.Error(err)
		}
	})
	empty := filepath.Join(dataDir, "config.yaml")
	ok(t, os.WriteFile(empty, nil, 0o600))
	cfg, err := config.Parse([]string{"-c", empty, "-d", dataDir}, nil)
	ok(t, err)
	programs := payload.Dir(filepath.Join(dataDir, "data", "1"))
	ok(t, os.MkdirAll(string(programs), 0o755))
	ok(t, os.Symlink(filepath.Join(built, "bin"), programs.BinDir()))
	ctd := node.NewContainerd(node.Options{
		Settings: cfg.Node, Name: name, IP: m.ip, Programs: programs, Manifest: &payload.Manifest{Images: []string{imagestore.ShippedRegistry + "/pause:1"}},
		Session: node.NewSession(m.dir), OwnNetwork: true, Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ok(t, ctd.Start(ctx))
	t.Cleanup(func() { stop(t, ctd.Stop) })
	eventually(t, "containerd is ready", func() error { return ctd.Ready(ctx) })
	m.store, err = imagestore.Open(m.dir.ContainerdSocket())
	ok(t, err)
	t.Cleanup(func() { m.store.Close() })
	conn, err := grpc.NewClient("unix://"+m.dir.ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	ok(t, err)
	t.Cleanup(func() { conn.Close() })
	m.cri = cri.NewImageServiceClient(conn)

	tls := m.dir.TLS()
	ok(t, os.MkdirAll(filepath.Dir(tls), 0o700))
	ok(t, os.CopyFS(tls, os.DirFS(pki)))
	_, err = certificate.Ensure(certificate.Options{Dir: tls, NodeName: name, NodeIP: m.ip, ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now()})
	ok(t, err)
	certs := certificate.Store(tls)
	m.opts = Options{
		Node: name, IP: m.ip, LocalPort: porttest.Loopback(t).Port(), PeerPort: peerPort, Socket: m.dir.ContainerdSocket(), HostsDir: m.dir.NodeRegistryDir(), UserHostsDir: m.dir.RegistryDir(), ContentDir: m.dir.Agent("containerd"), EvictsBelow: func(uint64) uint64 { return 0 },
		Registries: filepath.Join(dataDir, "registries.yaml"), Kubeconfig: filepath.Join(dataDir, "none"), Log: slog.New(slog.NewTextHandler(m.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Identity: Identity{
			ClientCert: certs.Cert(certificate.Kubelet), ClientKey: certs.Key(certificate.Kubelet), ServingCert: certs.Cert(certificate.KubeletServing), ServingKey: certs.Key(certificate.KubeletServing),
			ClientCA: certs.Cert(certificate.ClientCA), ServingCA: func() ([]byte, error) { return os.ReadFile(certs.Cert(certificate.KubeletCA)) },
		},
	}
	return m
}

// peerPort is that of the test's nodes, which have addresses of their own on the loopback.
const peerPort = 20265

// start starts the component, which knows these nodes.
func (m *machine) start(nodes ...*machine) {
	m.Helper()
	m.reg = New(m.opts)
	ok(m.T, m.reg.Init(m.Context()))
	ok(m.T, m.reg.Start(m.Context()))
	m.Cleanup(func() {
		stop(m.T, m.reg.Stop)
		if m.Failed() {
			m.Logf("%s:\n%s", m.name, m.log)
		}
	})
	for _, o := range nodes {
		ok(m.T, m.reg.peers.nodes.Add(o.object()))
	}
	eventually(m.T, "the component listens", func() error {
		if p := m.reg.problem.Load(); p != nil {
			return errors.New(*p)
		}
		conn, err := net.Dial("tcp", net.JoinHostPort(m.ip.String(), fmt.Sprint(peerPort)))
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// object is the node's in the cluster; node a is a server.
func (m *machine) object() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: m.name}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: m.ip.String()}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
	}}
	if m.name == "a" {
		n.Labels = map[string]string{layout.ServerLabel: "true"}
	}
	return n
}

// pull pulls as the kubelet does.
func (m *machine) pull(image string) error {
	ctx, cancel := context.WithTimeout(m.Context(), time.Minute)
	defer cancel()
	_, err := m.cri.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}

// pinned reports whether the kubelet's garbage collection skips an image.
func (m *machine) pinned(image string) bool {
	m.Helper()
	status, err := m.cri.ImageStatus(m.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: image}})
	ok(m.T, err)
	return status.Image.GetPinned()
}

func (m *machine) eventuallyPinned(image string) {
	m.Helper()
	eventually(m.T, image+" is pinned on "+m.name, func() error {
		if !m.pinned(image) {
			return errors.New("it is not")
		}
		return nil
	})
}

// load imports an image, as `polymesh deploy` does with deployed.
func (m *machine) load(img v1.Image, ref string, deployed bool) {
	m.Helper()
	file := filepath.Join(m.TempDir(), "image.tar")
	tag, err := name.NewTag(ref)
	ok(m.T, err)
	ok(m.T, tarball.WriteToFile(file, tag, img))
	ok(m.T, m.store.Import(m.Context(), file, nil))
	if deployed {
		ok(m.T, m.store.Deployed(m.Context(), "docker.io/"+ref, "project", "service"))
	}
}

func newImage(t *testing.T) v1.Image {
	t.Helper()
	return newImageOf(t, 100_000)
}

// newImageOf returns an image with layers of a size, in bytes.
func newImageOf(t *testing.T, size int64) v1.Image {
	t.Helper()
	img, err := random.Image(size, 2)
	ok(t, err)
	conf, err := img.ConfigFile()
	ok(t, err)
	conf.OS, conf.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, conf)
	ok(t, err)
	return img
}

func newPKI(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tls")
	_, err := certificate.EnsureAuthorities(certificate.Store(dir), time.Now())
	ok(t, err)
	return dir
}

const hash = "0123456789abcdef0123456789abcdef"

// What one node has built or imported reaches another one through the real containerd, and stays there; what no node may give, and what no
// registry has, ends as without the component.
func TestImagesReachOtherNodes(t *testing.T) {
	pki := newPKI(t)
	a, b := newMachine(t, pki, "a", "127.0.0.2"), newMachine(t, pki, "b", "127.0.0.3")
	a.start(a, b)
	b.start(a, b)

	t.Run("a deployed image", func(t *testing.T) {
		ref := "shop/api:1.0.0-" + hash
		a.load(newImage(t), ref, true)
		ok(t, b.pull(ref))
		b.eventuallyPinned(ref)
		// With imagePullPolicy Always the kubelet pulls what the node has. No registry is there to be asked.
		for _, m := range []*machine{a, b} {
			if err := m.pull(ref); err != nil {
				t.Errorf("again on %s: %v", m.name, err)
			}
			m.eventuallyPinned(ref)
		}
	})
	t.Run("one that was deployed on an agent", func(t *testing.T) {
		ref := "shop/web:" + hash
		b.load(newImage(t), ref, true)
		ok(t, a.pull(ref))
		a.eventuallyPinned(ref)
	})
	t.Run("by its digest", func(t *testing.T) {
		img := newImage(t)
		b.load(img, "shop/signed:2", false)
		d, err := b.store.Find(t.Context(), "docker.io/shop/signed", "2", false)
		ok(t, err)
		ref := "shop/signed@" + d.Digest.String()
		ok(t, a.pull(ref))
		a.eventuallyPinned(ref)
	})
	t.Run("an imported image of a server", func(t *testing.T) {
		a.load(newImage(t), "shop/imported:1.0.0", false)
		for _, m := range []*machine{b, b, a} {
			ok(t, m.pull("shop/imported:1.0.0"))
		}
		b.eventuallyPinned("shop/imported:1.0.0")
	})
	t.Run("not a tag of an agent", func(t *testing.T) {
		b.load(newImage(t), "shop/nginx:1.27", false)
		if err := a.pull("shop/nginx:1.27"); err == nil {
			t.Error("an agent has chosen what a tag means for the server")
		}
	})
	t.Run("not latest", func(t *testing.T) {
		a.load(newImage(t), "shop/late:latest", false)
		if err := b.pull("shop/late:latest"); err == nil {
			t.Error("latest came from another node")
		}
		if err := a.pull("shop/late:latest"); err == nil {
			t.Error("the node responds for the tag latest in the place of the registry")
		}
	})
	t.Run("not a shipped image of outside", func(t *testing.T) {
		err := b.pull(imagestore.ShippedRegistry + "/coredns:9")
		if err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("a missing shipped image: %v", err)
		}
	})
	t.Run("the reason why a registry is not reached", func(t *testing.T) {
		err := b.pull(fmt.Sprintf("registry.invalid:%d/x/y:1", porttest.Loopback(t).Port()))
		if err == nil || !strings.Contains(err.Error(), "registry.invalid") || !strings.Contains(err.Error(), "dial tcp") && !strings.Contains(err.Error(), "no such host") {
			t.Errorf("a registry that does not exist: %v", err)
		}
	})
	t.Run("an image of a registry", func(t *testing.T) {
		server := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
		defer server.Close()
		ref := strings.TrimPrefix(server.URL, "http://") + "/team/tool:1"
		push(t, newImage(t), ref)
		ok(t, b.pull(ref))
		if b.pinned(ref) {
			t.Error("an image that a registry has is pinned")
		}
		// It is not given to others, and its tag is the registry's to say.
		if _, err := b.store.Find(t.Context(), strings.TrimSuffix(ref, ":1"), "1", false); err == nil {
			t.Error("the node answers for an image of a registry")
		}
	})
	// The image policy runs on servers, and an image may have been signed on another node.
	t.Run("a signature", func(t *testing.T) {
		ref := "shop/signed-there:" + hash
		b.load(newImage(t), ref, true)
		password := func(bool) ([]byte, error) { return []byte("sesame"), nil }
		private, _, err := signature.Generate(password)
		ok(t, err)
		file := filepath.Join(t.TempDir(), "key")
		ok(t, os.WriteFile(file, private, 0o600))
		signer, err := signature.ReadSigner(file, password)
		ok(t, err)
		signed, _, err := signature.Sign(t.Context(), signer, "docker.io/"+ref, b.store.Signatures())
		ok(t, err)
		here := signature.NewRegistry(a.dir.RegistryDirs(), &credentialprovider.BasicDockerKeyring{})
		found, err := signer.Public().Verify(t.Context(), ref, here)
		if err != nil || found.Digest != signed.Digest {
			t.Errorf("the signature of another node's image: %v, %v, want %s", found, err, signed.Digest)
		}
	})
	t.Run("await", func(t *testing.T) {
		ref := imagestore.ShippedRegistry + "/test/later:1"
		img := newImage(t)
		// An archive as the payload has them.
		dir := t.TempDir()
		_, err := ocilayout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Annotations: map[string]string{"io.containerd.image.name": ref}},
		}))
		ok(t, err)
		file := filepath.Join(t.TempDir(), "image.tar")
		if out, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "-cf", file, "index.json", "oci-layout", "blobs").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		payload, err := imagestore.OpenPayload("payload", []string{file})
		ok(t, err)
		defer payload.Close()
		waited := make(chan string, 10)
		b.reg.opts.Await = func(ctx context.Context, name string) error {
			waited <- name
			return b.store.ImportShipped(ctx, payload, name)
		}
		for range 2 {
			ok(t, b.pull(ref))
		}
		if got := <-waited; got != ref {
			t.Errorf("waited for %q", got)
		}
		b.eventuallyPinned(ref)
		if shipped, err := b.store.Signatures().Shipped(t.Context(), ref); err != nil || !shipped {
			t.Errorf("after the pull it is an image that came with Polymesh: %t, %v", shipped, err)
		}
	})
}

// A node that was broken into stops no pull of a registry's image by its digest: the first attempt fails, and the kubelet makes others.
func TestForgedAnswers(t *testing.T) {
	pki := newPKI(t)
	a, b := newMachine(t, pki, "a", "127.0.0.12"), "127.0.0.13"
	a.start(a)
	dir := filepath.Join(t.TempDir(), "b")
	ok(t, os.CopyFS(dir, os.DirFS(pki)))
	_, err := certificate.Ensure(certificate.Options{Dir: dir, NodeName: "b", NodeIP: netip.MustParseAddr(b), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now()})
	ok(t, err)
	certs := certificate.Store(dir)
	id := Identity{ServingCert: certs.Cert(certificate.KubeletServing), ServingKey: certs.Key(certificate.KubeletServing), ClientCA: certs.Cert(certificate.ClientCA)}
	images := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	origin := httptest.NewServer(images)
	defer origin.Close()
	host := strings.TrimPrefix(origin.URL, "http://")
	var forge atomic.Pointer[http.HandlerFunc]
	listener, err := net.Listen("tcp", net.JoinHostPort(b, fmt.Sprint(peerPort)))
	ok(t, err)
	hostile := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) { (*forge.Load())(w, h) })}
	go func() { _ = hostile.Serve(cryptotls.NewListener(listener, id.serving())) }()
	defer hostile.Close()
	ok(t, a.reg.peers.nodes.Add(nodeObject("b", b)))
	layer := func(h *http.Request) int {
		answer := httptest.NewRecorder()
		images.ServeHTTP(answer, h)
		if n := answer.Body.Len(); n > 1<<20 && strings.Contains(h.URL.Path, "/blobs/") {
			return n
		}
		return 0
	}
	for what, c := range map[string]struct {
		handler http.HandlerFunc
		first   bool // the first attempt works
	}{
		"the size of a manifest": {first: true, handler: func(w http.ResponseWriter, h *http.Request) {
			if h.Method == http.MethodHead {
				answer := httptest.NewRecorder()
				images.ServeHTTP(answer, h)
				for _, key := range []string{"Content-Type", "Docker-Content-Digest"} {
					w.Header().Set(key, answer.Header().Get(key))
				}
				w.Header().Set("Content-Length", "4321")
				return
			}
			images.ServeHTTP(w, h)
		}},
		"blobs": {handler: func(w http.ResponseWriter, h *http.Request) {
			n := layer(h)
			if n == 0 {
				images.ServeHTTP(w, h)
				return
			}
			_, _ = w.Write(make([]byte, n))
		}},
		"a long config": {handler: func(w http.ResponseWriter, h *http.Request) {
			if !strings.Contains(h.URL.Path, "/blobs/") {
				images.ServeHTTP(w, h)
				return
			}
			w.Header().Set("Content-Length", "100000000")
			_, _ = w.Write(make([]byte, 1<<20))
			panic(http.ErrAbortHandler)
		}},
		"the beginning of blobs": {handler: func(w http.ResponseWriter, h *http.Request) {
			n := layer(h)
			if n == 0 {
				images.ServeHTTP(w, h)
				return
			}
			w.Header().Set("Content-Length", strconv.Itoa(n))
			_, _ = w.Write(make([]byte, 1<<20))
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}},
	} {
		t.Run(what, func(t *testing.T) {
			forge.Store(&c.handler)
			img := newImageOf(t, 3<<20) // so that a part of each layer is on its way before the end is refused
			sum, err := img.Digest()
			ok(t, err)
			repository := fmt.Sprintf("%s/team/%s", host, strings.ReplaceAll(what, " ", "-"))
			push(t, img, repository+":1")
			pull := func() error { return a.pull(repository + "@" + sum.String()) }
			if c.first {
				ok(t, pull())
			} else {
				eventually(t, "a later attempt", pull)
			}
		})
	}
}

func push(t *testing.T, img v1.Image, ref string, options ...remote.Option) {
	t.Helper()
	tag, err := name.NewTag(ref, name.Insecure)
	ok(t, err)
	ok(t, remote.Write(tag, img, options...))
}

// registries.yaml is read while the node runs: the first mirror fails and is reported, the second one takes a login and has the
// repository below a path.
func TestMirrors(t *testing.T) {
	m := newMachine(t, newPKI(t), "a", "127.0.0.4")
	m.start(m)
	images := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "sesame" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		images.ServeHTTP(w, r)
	}))
	defer server.Close()
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "broken", http.StatusBadGateway) }))
	defer broken.Close()
	push(t, newImage(t), strings.TrimPrefix(server.URL, "http://")+"/mirrored/team/tool:1", remote.WithAuth(&authn.Basic{Username: "me", Password: "sesame"}))

	const ref = "registry.example.invalid/team/tool:1"
	if err := m.pull(ref); err == nil {
		t.Fatal("without a mirror, the image is pulled")
	}
	text := fmt.Sprintf(`mirrors:
  registry.example.invalid:
    endpoint: [%q, %q]
    rewrite: {"^team/(.*)": "mirrored/team/$1"}
configs:
  %q:
    auth: {username: me, password: sesame}
`, broken.URL, server.URL, strings.TrimPrefix(server.URL, "http://"))
	ok(t, os.WriteFile(m.opts.Registries, []byte(text), 0o600))
	eventually(t, "the file is read", func() error { return m.pull(ref) })
	if note := strings.Join(m.reg.Notes(t.Context()), "\n"); !strings.Contains(note, broken.URL) || !strings.Contains(note, "502") {
		t.Errorf("the note is %q", note)
	}
	ok(t, os.WriteFile(m.opts.Registries, []byte("mirrors: [sesame2]\n"), 0o600))
	eventually(t, "a bad file is reported", func() error {
		if note := strings.Join(m.reg.Notes(t.Context()), "\n"); !strings.Contains(note, "registries.yaml") {
			return errors.New(note)
		}
		return nil
	})
	if strings.Contains(m.log.String()+strings.Join(m.reg.Notes(t.Context()), "\n"), "sesame") {
		t.Errorf("a password is in the log:\n%s", m.log)
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func stop(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for err := f(); err != nil; err = f() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
