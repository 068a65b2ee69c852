package registry

import (
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"polymesh.dev/polymesh/pkg/imagestore"
)

const (
	// nodeUser is the start of a node's user name (k8s.io/kubernetes/pkg/auth/nodeidentifier).
	nodeUser = "system:node:"
	// writeTimeout is how long one part of an answer may take to be sent.
	writeTimeout = time.Minute
)

// serveContainerd answers containerd. Who does not know the secret, as other users of the machine and pods in the host's network, gets
// nothing: with the credentials of registries.yaml they could read private images.
func (r *Registry) serveContainerd(w http.ResponseWriter, h *http.Request) {
	if subtle.ConstantTimeCompare([]byte(h.Header.Get("Authorization")), []byte(r.authorization())) != 1 {
		w.Header().Set("Connection", "close")
		refuse(w, http.StatusForbidden, "DENIED", "only this node's containerd is served")
		return
	}
	if !welcome(h.Context(), "containerd") {
		refuseMany(w)
		return
	}
	q, ok := accept(w, h)
	if !ok {
		return
	}
	w = patient{w, http.NewResponseController(w)}
	ctx := h.Context()
	if q.host == imagestore.ShippedRegistry && q.kind == manifests && r.opts.Await != nil {
		if err := r.opts.Await(ctx, q.name()); err != nil && ctx.Err() == nil {
			r.log.Warn("an image that came with Polymesh is not imported", "image", q.name(), "err", err)
		}
	}
	if q.kind == manifests && h.Method == http.MethodHead {
		r.startOver(ctx, q.repository())
	}
	for _, answer := range []func(http.ResponseWriter, *http.Request, request) bool{r.fromStore, r.fromPeers, r.mirrors.serve} {
		if answer(w, h, q) || ctx.Err() != nil {
			return
		}
	}
	if q.kind == manifests && h.Method == http.MethodHead && q.host != imagestore.ShippedRegistry {
		if why := r.mirrors.unreachable(ctx, q.host); why != "" {
			failedBecause(w, why)
			return
		}
	}
	refuse(w, http.StatusNotFound, q.code(), "neither this node nor another one has it")
}

func (r *Registry) authorization() string { return "Bearer " + r.secret }

// accept reads a request, or answers it.
func accept(w http.ResponseWriter, h *http.Request) (request, bool) {
	switch {
	case h.ContentLength != 0:
		// Go's server would wait for it, without a limit, before it answers, and again before it closes the connection.
		w.Header().Set("Connection", "close")
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
		refuse(w, http.StatusBadRequest, "UNSUPPORTED", "a request for content has no body")
	case h.Method != http.MethodGet && h.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "read only")
	case h.URL.Path == "/v2/" || h.URL.Path == "/v2":
		w.WriteHeader(http.StatusOK)
	default:
		q, err := parse(h)
		if err == nil {
			return q, true
		}
		refuse(w, http.StatusNotFound, "NAME_INVALID", err.Error())
	}
	return request{}, false
}

// fromStore answers from this node's images. It reports whether it has answered. A tag that is a registry's is not answered: who asks
// for one that the node has wants to know what it means now.
func (r *Registry) fromStore(w http.ResponseWriter, h *http.Request, q request) bool {
	return q.scope(false) != nowhere && r.serve(w, h, q, false)
}

// servePeer answers another node, from this node's images only, or keeps a copy of one of its images.
func (r *Registry) servePeer(w http.ResponseWriter, h *http.Request) {
	name, err := peerName(h.TLS)
	if err == nil && !r.peers.known(name) {
		err = fmt.Errorf("%.63q is not a node of the cluster", name)
	}
	if err != nil {
		w.Header().Set("Connection", "close")
		refuse(w, http.StatusForbidden, "DENIED", err.Error())
		return
	}
	if !welcome(h.Context(), name) {
		refuseMany(w)
		return
	}
	if h.URL.Path == copiesPath {
		r.serveCopy(w, h, name)
		return
	}
	q, ok := accept(w, h)
	if !ok {
		return
	}
	end, ok := r.turns.take(h.Context(), name)
	if !ok {
		refuseMany(w)
		return
	}
	defer end()
	if q.scope(false) == nowhere || !r.serve(patient{w, http.NewResponseController(w)}, h, q, r.opened(q.host)) {
		refuse(w, http.StatusNotFound, q.code(), "this node has no such image for others")
	}
}

func refuseMany(w http.ResponseWriter) {
	refuse(w, http.StatusServiceUnavailable, "TOOMANYREQUESTS", "this node serves many requests at this moment")
}

// opened reports whether nodes give each other a registry's images.
func (r *Registry) opened(host string) bool { return r.opts.Embedded && r.mirrors.names(host) }

// serve answers from containerd's store, unless it is not there.
func (r *Registry) serve(w http.ResponseWriter, h *http.Request, q request, pulled bool) bool {
	ctx := h.Context()
	var found ocispec.Descriptor
	var err error
	if q.kind == blobs {
		found, err = r.store.FindContent(ctx, q.repository(), q.digest, pulled)
	} else {
		found, err = r.store.Find(ctx, q.repository(), q.ref(), pulled)
	}
	if err != nil {
		if !errdefs.IsNotFound(err) && ctx.Err() == nil {
			r.log.Warn("cannot read this node's images", "image", q.name(), "err", err)
		}
		return false
	}
	content, err := r.store.Read(ctx, found)
	if err != nil {
		r.log.Warn("cannot read this node's images", "image", q.name(), "err", err)
		return false
	}
	defer content.Close()
	describe(w, q, found)
	http.ServeContent(w, h, "", time.Time{}, content)
	return true
}

// describe sets the headers of an answer.
func describe(w http.ResponseWriter, q request, d ocispec.Descriptor) {
	media := d.MediaType
	if q.kind == blobs || media == "" {
		media = "application/octet-stream"
	}
	w.Header().Set("Content-Type", media)
	w.Header().Set("Docker-Content-Digest", d.Digest.String())
	w.Header().Set("Etag", `"`+d.Digest.String()+`"`)
}

// patient sends an answer as long as each part of it is taken.
type patient struct {
	http.ResponseWriter
	conn *http.ResponseController
}

func (p patient) Write(text []byte) (int, error) {
	_ = p.conn.SetWriteDeadline(time.Now().Add(writeTimeout)) // not for HTTP/2 streams of a test
	return p.ResponseWriter.Write(text)
}

// Unwrap is for http.ResponseController.
func (p patient) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// failedBecause answers with a status line that has the reason: an answer to HEAD has no body, and containerd shows the status line only.
func failedBecause(w http.ResponseWriter, why string) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuse(w, http.StatusBadGateway, "UNKNOWN", why)
		return
	}
	defer conn.Close()
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", http.StatusBadGateway, oneLine(why))
}

// oneLine makes a text printable ASCII, at most 500 bytes.
func oneLine(text string) string {
	text = strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, text)
	return text[:min(len(text), 500)]
}

// peerName returns the name of the node whose certificate the client has shown; the handshake has verified it.
func peerName(state *tls.ConnectionState) (string, error) {
	if state == nil || len(state.PeerCertificates) == 0 {
		return "", errors.New("no certificate")
	}
	return nodeName(state.PeerCertificates[0])
}

// nodeName returns the name of the node that a certificate is for.
func nodeName(cert *x509.Certificate) (string, error) {
	name, ok := strings.CutPrefix(cert.Subject.CommonName, nodeUser)
	if !ok || name == "" || !slices.Contains(cert.Subject.Organization, user.NodesGroup) {
		return "", errors.New("the certificate is not a node's")
	}
	return name, nil
}

// serving is what the node shows other nodes, and requires of them.
func (i Identity) serving() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			pair, err := tls.LoadX509KeyPair(i.ServingCert, i.ServingKey)
			if err != nil {
				return nil, fmt.Errorf("the node has no serving certificate yet: %w", err)
			}
			clients, err := os.ReadFile(i.ClientCA)
			if err != nil {
				return nil, err
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(clients) {
				return nil, fmt.Errorf("%s has no certificate", i.ClientCA)
			}
			return &tls.Config{
				MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
				// A range of a blob is one request; HTTP/2 would let one connection have many.
				NextProtos: []string{"http/1.1"},
			}, nil
		},
	}
}

// asking is what the node shows the node of a name, and requires of it.
func (i Identity) asking(name string) (*tls.Config, error) {
	authority, err := i.ServingCA()
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		return nil, errors.New("the authority of kubelets' certificates is not known")
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: name, NextProtos: []string{"http/1.1"},
		VerifyConnection: func(state tls.ConnectionState) error {
			if got, err := nodeName(state.PeerCertificates[0]); err != nil || got != name {
				return fmt.Errorf("the certificate is of node %.63q, want %.63q (%v)", got, name, err)
			}
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(i.ClientCert, i.ClientKey)
			return &pair, err
		},
	}, nil
}
