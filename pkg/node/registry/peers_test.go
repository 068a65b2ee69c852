package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// testPeers are a node's component and other nodes of its cluster, at addresses of the loopback with one port.
type testPeers struct {
	*testing.T
	reg  *Registry
	ids  map[string]Identity
	port uint16
	// local answers containerd from other nodes.
	local *httptest.Server
}

func newTestPeers(t *testing.T, names ...string) *testPeers {
	t.Helper()
	p := &testPeers{T: t, ids: identities(t, append(names, "self")...)}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.port = uint16(listener.Addr().(*net.TCPAddr).Port)
	listener.Close()
	p.reg = New(Options{Node: "self", PeerPort: p.port, Identity: p.ids["self"], Log: slog.New(slog.DiscardHandler)})
	p.local = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		if q, ok := accept(w, h); ok && !p.reg.fromPeers(w, h, q) {
			refuse(w, http.StatusNotFound, q.code(), "no other node has it")
		}
	}))
	t.Cleanup(p.local.Close)
	return p
}

// serve adds a node. It returns the number of its answers to GET.
func (p *testPeers) serve(name, address string, handler http.HandlerFunc) *atomic.Int32 {
	p.Helper()
	listener, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(int(p.port))))
	if err != nil {
		p.Fatal(err)
	}
	gets := &atomic.Int32{}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		if h.Method == http.MethodGet {
			gets.Add(1)
		}
		handler(w, h)
	})}
	go func() { _ = server.Serve(tls.NewListener(listener, p.ids[name].serving())) }()
	p.Cleanup(func() { server.Close() })
	if err := p.reg.peers.nodes.Add(nodeObject(name, address)); err != nil {
		p.Fatal(err)
	}
	return gets
}

// ask asks as containerd does. Without any answer, the status says why.
func (p *testPeers) ask(method, path, span string) (*http.Response, []byte, error) {
	p.Helper()
	h, err := http.NewRequestWithContext(p.Context(), method, p.local.URL+"/v2/shop/api/"+path+"?ns=docker.io", nil)
	if err != nil {
		p.Fatal(err)
	}
	if span != "" {
		h.Header.Set("Range", span)
	}
	answer, err := p.local.Client().Do(h)
	if err != nil {
		return &http.Response{Status: err.Error()}, nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer, text, err
}

// testImage is a manifest with one layer.
type testImage struct {
	text, layer []byte
	what        digest.Digest
}

func newTestImage(t *testing.T) testImage {
	t.Helper()
	layer := bytes.Repeat([]byte("layer"), passBytes)
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.DescriptorEmptyJSON}
	m.SchemaVersion = 2
	m.Layers = []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer), Size: int64(len(layer))}}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return testImage{text, layer, digest.FromBytes(text)}
}

// ServeHTTP answers as a node that has the image.
func (i testImage) ServeHTTP(w http.ResponseWriter, h *http.Request) {
	d, text := i.what, i.text
	if strings.Contains(h.URL.Path, "/blobs/") {
		d, text = digest.FromBytes(i.layer), i.layer
	}
	if !strings.HasSuffix(h.URL.Path, d.String()) {
		http.NotFound(w, h)
		return
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
	w.Header().Set("Docker-Content-Digest", d.String())
	http.ServeContent(w, h, "", time.Time{}, bytes.NewReader(text))
}

// What a node only says about a manifest is not passed on: neither containerd nor the registry's answer would be believed after that.
func TestManifestsAreVerified(t *testing.T) {
	img := newTestImage(t)
	for what, c := range map[string]struct {
		handler http.HandlerFunc
		found   bool
	}{
		"another size and type": {found: true, handler: func(w http.ResponseWriter, h *http.Request) {
			if h.Method == http.MethodGet {
				img.ServeHTTP(w, h)
				return
			}
			w.Header().Set("Docker-Content-Digest", img.what.String())
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			w.Header().Set("Content-Length", strconv.Itoa(len(img.text)+1))
		}},
		"another manifest": {handler: func(w http.ResponseWriter, h *http.Request) {
			w.Header().Set("Docker-Content-Digest", img.what.String())
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			text := bytes.ToUpper(img.text)
			w.Header().Set("Content-Length", strconv.Itoa(len(text)))
			_, _ = w.Write(text)
		}},
		"no manifest": {handler: func(w http.ResponseWriter, h *http.Request) {
			if h.Method == http.MethodGet {
				http.NotFound(w, h)
				return
			}
			w.Header().Set("Docker-Content-Digest", img.what.String())
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Content-Length", strconv.Itoa(len(img.text)))
		}},
	} {
		t.Run(what, func(t *testing.T) {
			p := newTestPeers(t, "b")
			p.serve("b", "127.0.0.1", c.handler)
			for _, method := range []string{http.MethodHead, http.MethodGet} {
				answer, text, err := p.ask(method, "manifests/"+img.what.String(), "")
				switch {
				case !c.found && answer.StatusCode != http.StatusNotFound:
					t.Errorf("%s: %s", method, answer.Status)
				case !c.found:
				case err != nil || answer.ContentLength != int64(len(img.text)) || answer.Header.Get("Content-Type") != ocispec.MediaTypeImageManifest:
					t.Errorf("%s: %s, %d bytes of %q, %v", method, answer.Status, answer.ContentLength, answer.Header.Get("Content-Type"), err)
				case method == http.MethodGet && !bytes.Equal(text, img.text):
					t.Errorf("%q", text)
				}
			}
			if held := len(p.reg.peers.holding("docker.io/shop/api")) > 0; held != c.found {
				t.Errorf("the node counts as one that has the image: %t", held)
			}
		})
	}
	t.Run("one node lies and another does not", func(t *testing.T) {
		p := newTestPeers(t, "b", "c")
		p.serve("b", "127.0.0.1", func(w http.ResponseWriter, h *http.Request) {
			w.Header().Set("Docker-Content-Digest", img.what.String())
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "{}")
		})
		p.serve("c", "127.0.0.2", img.ServeHTTP)
		for range 5 { // in a random order
			if answer, _, _ := p.ask(http.MethodHead, "manifests/"+img.what.String(), ""); answer.ContentLength != int64(len(img.text)) {
				t.Errorf("%s, %d bytes", answer.Status, answer.ContentLength)
			}
		}
	})
}

// A manifest costs one request to a node, by its digest and by a tag, and so does an answer that there is none.
func TestOneRequest(t *testing.T) {
	img := newTestImage(t)
	const built = "0123456789abcdef0123456789abcdef"
	asked := make(chan string, 10)
	p := newTestPeers(t, "b")
	var says atomic.Value
	says.Store(img.what)
	p.serve("b", "127.0.0.1", func(w http.ResponseWriter, h *http.Request) {
		asked <- h.Method + " " + h.URL.Path
		if strings.HasSuffix(h.URL.Path, "/"+built) {
			w.Header().Set("Docker-Content-Digest", says.Load().(digest.Digest).String())
			_, _ = w.Write(img.text)
			return
		}
		img.ServeHTTP(w, h)
	})
	gone := digest.FromString("gone").String()
	for _, ref := range []string{img.what.String(), built, gone} {
		for _, method := range []string{http.MethodHead, http.MethodGet} {
			p.reg.peers.missed.Purge()
			p.reg.peers.holders.Purge()
			answer, _, err := p.ask(method, "manifests/"+ref, "")
			want := http.StatusOK
			if ref == gone {
				want = http.StatusNotFound
			}
			if err != nil || answer.StatusCode != want || want == http.StatusOK && answer.Header.Get("Docker-Content-Digest") != img.what.String() {
				t.Errorf("%s of %s: %s with the digest %s, %v", method, ref, answer.Status, answer.Header.Get("Docker-Content-Digest"), err)
			}
			if got, want := <-asked, "GET /v2/shop/api/manifests/"+ref; got != want || len(asked) > 0 {
				t.Errorf("%s of %s: the node gets %q and %d more, want %q", method, ref, got, len(asked), want)
			}
		}
	}
	// A tag that means something else than the node says.
	for _, d := range []digest.Digest{digest.FromString("another"), "sha256:x", ""} {
		says.Store(d)
		if answer, _, _ := p.ask(http.MethodHead, "manifests/"+built, ""); answer.StatusCode != http.StatusNotFound {
			t.Errorf("with the digest %q: %s", d, answer.Status)
		}
		p.reg.peers.avoided.Purge()
	}
}

// A node that does not answer, or does not end a manifest, does not hold up a search.
func TestSlowManifests(t *testing.T) {
	t.Parallel()
	img := newTestImage(t)
	q := request{host: "docker.io", path: "shop/api", kind: manifests, digest: img.what}
	for what, c := range map[string]struct {
		begins bool
		within time.Duration
	}{"no answer": {false, askTimeout}, "no end": {true, manifestTimeout}} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			p := newTestPeers(t, "b")
			ended := make(chan struct{})
			p.serve("b", "127.0.0.1", func(w http.ResponseWriter, h *http.Request) {
				if c.begins {
					w.Header().Set("Content-Length", strconv.Itoa(len(img.text)))
					_, _ = w.Write(img.text[:10])
					_ = http.NewResponseController(w).Flush()
				}
				<-h.Context().Done()
				close(ended)
			})
			began := time.Now()
			_, err := p.reg.peers.get(t.Context(), p.reg.peers.list(everyNode)[0], q)
			if took := time.Since(began); err == nil || took < c.within || took > c.within+searchTimeout {
				t.Errorf("after %s: %v", took, err)
			}
			<-ended // the node sees that nobody waits
		})
	}
}

// A node counts as removed only once the list of all nodes is there.
func TestListIsComplete(t *testing.T) {
	list := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		if h.URL.Query().Get("watch") != "" {
			if h.URL.Query().Get("sendInitialEvents") != "" {
				http.Error(w, "use a list", http.StatusBadRequest)
				return
			}
			<-h.Context().Done()
			return
		}
		<-list
		nodes := corev1.NodeList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
		for _, name := range []string{"b", "c"} {
			nodes.Items = append(nodes.Items, *nodeObject(name, "127.0.0.1"))
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(nodes)
	}))
	defer server.Close()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := newPeers(Options{Node: "a"}, slog.New(slog.DiscardHandler))
	var once sync.Once
	complete := make(chan struct{})
	p.changed = func() {
		if p.complete.Load() {
			once.Do(func() { close(complete) })
		}
	}
	var running sync.WaitGroup
	running.Go(func() { p.run(ctx, client) })
	defer running.Wait()
	defer cancel()
	if p.complete.Load() {
		t.Error("the list is complete before it has come")
	}
	close(list)
	select {
	case <-complete:
	case <-time.After(30 * time.Second):
		t.Fatal("the list is never complete")
	}
	for name, want := range map[string]bool{"b": true, "c": true, "d": false} {
		if p.known(name) != want {
			t.Errorf("%s is known: %t", name, !want)
		}
	}
}

func TestMediaTypeOf(t *testing.T) {
	for text, want := range map[string]string{
		`{"config":{},"layers":[]}`: ocispec.MediaTypeImageManifest,
		`{"manifests":[]}`:          ocispec.MediaTypeImageIndex,
		`{"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json","manifests":[]}`: "application/vnd.docker.distribution.manifest.list.v2+json",
		`{"mediaType":"text/html","config":{}}`:                                                    "",
		`{"config":{},"manifests":[]}`:                                                             "",
		`{}`:                                                                                       "",
		`<html>`:                                                                                   "",
	} {
		if got, err := mediaTypeOf([]byte(text)); got != want || (err == nil) != (want != "") {
			t.Errorf("%s is %q, %v", text, got, err)
		}
	}
}

// A node that sends something else as a blob, or not all of it, is not asked again: containerd sees that it is not complete, and the next time
// it comes from a node that has it.
func TestBlobsAreVerified(t *testing.T) {
	img := newTestImage(t)
	blob := "blobs/" + digest.FromBytes(img.layer).String()
	for what, send := range map[string]func(w http.ResponseWriter){
		"another blob":   func(w http.ResponseWriter) { _, _ = w.Write(bytes.ToUpper(img.layer)) },
		"another end":    func(w http.ResponseWriter) { _, _ = w.Write(append(bytes.Clone(img.layer[:len(img.layer)-1]), 'x')) },
		"a longer one":   func(w http.ResponseWriter) { _, _ = w.Write(append(bytes.Clone(img.layer), "more"...)) },
		"a shorter one":  func(w http.ResponseWriter) { _, _ = w.Write(img.layer[:len(img.layer)-1]) },
		"nothing":        func(http.ResponseWriter) {},
		"a part, no end": func(w http.ResponseWriter) { _, _ = w.Write(img.layer[:len(img.layer)/2]); panic(http.ErrAbortHandler) },
	} {
		t.Run(what, func(t *testing.T) {
			p := newTestPeers(t, "b", "c")
			bad := p.serve("b", "127.0.0.1", func(w http.ResponseWriter, h *http.Request) {
				if h.Method == http.MethodHead || strings.Contains(h.URL.Path, "/manifests/") {
					img.ServeHTTP(w, h)
					return
				}
				send(w)
			})
			p.serve("c", "127.0.0.2", img.ServeHTTP)
			const repository = "docker.io/shop/api"
			p.reg.peers.holds(repository, "c")
			p.reg.peers.holds(repository, "b")
			answer, text, err := p.ask(http.MethodGet, blob, "")
			if err == nil {
				t.Errorf("%s, and the answer seems complete, with %d bytes", answer.Status, len(text))
			}
			if !p.reg.peers.torn.Contains(part{repository, digest.FromBytes(img.layer)}) {
				t.Error("what containerd may have kept is not known")
			}
			before := bad.Load()
			for range 2 {
				if answer, text, err = p.ask(http.MethodGet, blob, ""); err != nil || !bytes.Equal(text, img.layer) {
					t.Errorf("from the other node: %s, %d bytes, %v", answer.Status, len(text), err)
				}
				if answer, _, _ := p.ask(http.MethodHead, "manifests/"+img.what.String(), ""); answer.StatusCode != http.StatusOK {
					t.Errorf("the manifest of the other node: %s", answer.Status)
				}
			}
			if bad.Load() != before {
				t.Error("the node is asked again")
			}
		})
	}
}

// No part of a blob is passed on, because only the whole can be verified, and no size that a node only says.
func TestBlobsAreWhole(t *testing.T) {
	img := newTestImage(t)
	p := newTestPeers(t, "b")
	p.serve("b", "127.0.0.1", img.ServeHTTP)
	p.reg.peers.holds("docker.io/shop/api", "b")
	blob := "blobs/" + digest.FromBytes(img.layer).String()
	if answer, text, err := p.ask(http.MethodGet, blob, "bytes=100-"); err != nil || answer.StatusCode != http.StatusOK || !bytes.Equal(text, img.layer) {
		t.Errorf("a part: %s, %d bytes, %v", answer.Status, len(text), err)
	}
	if answer, _, _ := p.ask(http.MethodHead, blob, ""); answer.StatusCode != http.StatusNotFound {
		t.Errorf("the size: %s", answer.Status)
	}
}

// A node that sends a byte now and then does not hold up a pull.
func TestSlowBlobs(t *testing.T) {
	stop := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) {
		_, _ = io.WriteString(w, "x")
		_ = http.NewResponseController(w).Flush()
		<-stop
	}))
	defer server.Close()
	defer close(stop)
	answer, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var to bytes.Buffer
	sent, taken := copyVerified(&to, &incoming{ReadCloser: answer.Body, began: time.Now().Add(-slowTime - time.Minute)}, digest.FromString("xx"))
	if !errors.Is(sent, errSlow) || taken != nil || to.Len() > 0 {
		t.Errorf("%v, %v, %d bytes", sent, taken, to.Len())
	}
	// Who takes it is not the sender's fault.
	broken := fmt.Errorf("broken")
	sent, taken = copyVerified(writerFunc(func([]byte) (int, error) { return 0, broken }), strings.NewReader("x"), digest.FromString("x"))
	if sent != nil || !errors.Is(taken, broken) {
		t.Errorf("%v, %v", sent, taken)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(text []byte) (int, error) { return f(text) }

// Nodes are asked at their external addresses if nodes see each other by those.
func TestPeerAddress(t *testing.T) {
	node := nodeObject("other", "192.0.2.2")
	node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "203.0.113.2"})
	for external, want := range map[bool]string{false: "192.0.2.2:10265", true: "203.0.113.2:10265"} {
		p := &peers{opts: Options{PeerPort: 10265, External: external}}
		if got := p.address(node); got != want {
			t.Errorf("external %v: %s, want %s", external, got, want)
		}
	}
	p := &peers{opts: Options{PeerPort: 10265, External: true}}
	if got := p.address(nodeObject("other", "192.0.2.2")); got != "192.0.2.2:10265" {
		t.Errorf("a node without an external address is asked at %s", got)
	}
}

// A node listens where others connect.
func TestWhereANodeListens(t *testing.T) {
	for external, want := range map[bool]string{false: "192.0.2.1:10265", true: ":10265"} {
		o := Options{IP: netip.MustParseAddr("192.0.2.1"), PeerPort: 10265, External: external}
		if got := o.peerAddress(); got != want {
			t.Errorf("external %v: %s, want %s", external, got, want)
		}
	}
}
