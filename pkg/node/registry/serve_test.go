package registry

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
)

// identities returns one for each name, of the same authorities.
func identities(t *testing.T, names ...string) map[string]Identity {
	t.Helper()
	pki := filepath.Join(t.TempDir(), "tls")
	if _, err := certificate.EnsureAuthorities(certificate.Store(pki), time.Now()); err != nil {
		t.Fatal(err)
	}
	out := map[string]Identity{}
	for _, name := range names {
		dir := filepath.Join(t.TempDir(), name)
		if err := os.CopyFS(dir, os.DirFS(pki)); err != nil {
			t.Fatal(err)
		}
		if _, err := certificate.Ensure(certificate.Options{Dir: dir, NodeName: name, NodeIP: netip.MustParseAddr("127.0.0.1"), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
			t.Fatal(err)
		}
		certs := certificate.Store(dir)
		out[name] = Identity{
			ClientCert: certs.Cert(certificate.Kubelet), ClientKey: certs.Key(certificate.Kubelet),
			ServingCert: certs.Cert(certificate.KubeletServing), ServingKey: certs.Key(certificate.KubeletServing), ClientCA: certs.Cert(certificate.ClientCA),
			ServingCA: func() ([]byte, error) { return os.ReadFile(certs.Cert(certificate.KubeletCA)) },
		}
	}
	return out
}

func nodeObject(name, address string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
	}}
}

// Only a node of the cluster is answered, and only the node that was meant answers.
func TestPeersAreNodes(t *testing.T) {
	ids := identities(t, "a", "b", "gone")
	// The administrator's certificate is of the clients' authority, but not a node's.
	admin := ids["b"]
	admin.ClientCert, admin.ClientKey = strings.Replace(admin.ClientCert, certificate.Kubelet, certificate.Admin, 1), strings.Replace(admin.ClientKey, certificate.Kubelet, certificate.Admin, 1)
	foreign := identities(t, "b")["b"]
	foreign.ServingCA = ids["b"].ServingCA
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(listener.Addr().(*net.TCPAddr).Port)
	r := New(Options{Node: "a", PeerPort: port, Identity: ids["a"], Log: slog.New(slog.DiscardHandler)})
	for _, name := range []string{"a", "b"} {
		if err := r.peers.nodes.Add(nodeObject(name, "127.0.0.1")); err != nil {
			t.Fatal(err)
		}
	}
	server := r.newServer(http.HandlerFunc(r.servePeer))
	go func() { _ = server.Serve(tls.NewListener(listener, r.opts.Identity.serving())) }()
	defer server.Close()

	ask := func(id Identity, of string) (int, error) {
		p := newPeers(Options{Node: "x", PeerPort: port, Identity: id}, slog.New(slog.DiscardHandler))
		client := p.client(of)
		defer client.CloseIdleConnections()
		answer, err := client.Get("https://" + listener.Addr().String() + "/v2/")
		if err != nil {
			return 0, err
		}
		defer answer.Body.Close()
		return answer.StatusCode, nil
	}
	if status, err := ask(ids["b"], "a"); err != nil || status != http.StatusOK {
		t.Errorf("a node gets %d, %v", status, err)
	}
	for who, id := range map[string]Identity{"a node that was removed": ids["gone"], "an administrator": admin} {
		if status, err := ask(id, "a"); err != nil || status != http.StatusForbidden {
			t.Errorf("%s gets %d, %v", who, status, err)
		}
	}
	if status, err := ask(foreign, "a"); err == nil {
		t.Errorf("a node of another cluster gets %d", status)
	}
	if status, err := ask(ids["b"], "c"); err == nil {
		t.Errorf("another node than the one that was meant answers %d", status)
	}
	// Without a certificate there is no handshake.
	plain := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	if answer, err := plain.Get("https://" + listener.Addr().String() + "/v2/"); err == nil {
		answer.Body.Close()
		t.Errorf("without a certificate the answer is %s", answer.Status)
	}
}

func TestOnlyContainerd(t *testing.T) {
	r := New(Options{Log: slog.New(slog.DiscardHandler)})
	r.secret = "secret"
	for header, want := range map[string]int{"": http.StatusForbidden, "Bearer ": http.StatusForbidden, "secret": http.StatusForbidden, "Bearer secret": http.StatusOK} {
		w, h := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "http://127.0.0.1/v2/", nil)
		h.Header.Set("Authorization", header)
		r.serveContainerd(w, h)
		if w.Code != want {
			t.Errorf("%q: %d, want %d", header, w.Code, want)
		}
	}
}

// A node that answers with what was not asked for, without end, or not at all is as one that has nothing.
func TestHostileAnswers(t *testing.T) {
	ids := identities(t, "a", "b")
	q, err := parse(get(t, "/v2/shop/api/manifests/"+sum, "docker.io"))
	if err != nil {
		t.Fatal(err)
	}
	for what, handler := range map[string]http.HandlerFunc{
		"another digest": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", strings.Replace(sum, "e3", "00", 1))
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Content-Length", "2")
		},
		"no digest": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "2") },
		"a page": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", sum)
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Content-Length", "2")
		},
		"a huge manifest": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", sum)
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Content-Length", "99999999999")
		},
		"a redirect": func(w http.ResponseWriter, h *http.Request) {
			http.Redirect(w, h, "https://127.0.0.1:1/", http.StatusFound)
		},
		"an error": func(w http.ResponseWriter, h *http.Request) { http.Error(w, "x", http.StatusInternalServerError) },
	} {
		t.Run(what, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: handler}
			go func() { _ = server.Serve(tls.NewListener(listener, ids["b"].serving())) }()
			defer server.Close()
			p := newPeers(Options{Node: "a", PeerPort: uint16(listener.Addr().(*net.TCPAddr).Port), Identity: ids["a"]}, slog.New(slog.DiscardHandler))
			if err := p.nodes.Add(nodeObject("b", "127.0.0.1")); err != nil {
				t.Fatal(err)
			}
			if d, err := p.get(t.Context(), p.list(everyNode)[0], q); err == nil {
				t.Errorf("b has %+v", d.what)
			}
			if what == "a page" || what == "a huge manifest" {
				return // it has the right digest
			}
			if p.has(t.Context(), p.list(everyNode)[0], q) == nil {
				t.Error("b says that it has the image")
			}
		})
	}
}

// A request with a body that never comes is refused at once: Go's server would wait for the body before it answers, in another node's turn.
func TestNoBodies(t *testing.T) {
	ids := identities(t, "a", "b")
	r := New(Options{Node: "a", Identity: ids["a"], Log: slog.New(slog.DiscardHandler)})
	if err := r.peers.nodes.Add(nodeObject("b", "127.0.0.1")); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := r.newServer(http.HandlerFunc(r.servePeer))
	go func() { _ = server.Serve(tls.NewListener(listener, ids["a"].serving())) }()
	defer server.Close()
	config, err := ids["b"].asking("a")
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range []string{"Content-Length: 100", "Transfer-Encoding: chunked"} {
		conn, err := tls.Dial("tcp", listener.Addr().String(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET /v2/shop/api/manifests/"+sum+"?ns=docker.io HTTP/1.1\r\nHost: a\r\n"+header+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(conn) // to the end of the connection
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
			t.Errorf("%s: %.100q, %v", header, answer, err)
		}
	}
}
