// Package route brings requests for the store of metrics, logs and traces from any API server of the cluster to the one store.
//
// One server has the store, on a socket. It writes its name and the address of its API server into a ConfigMap in kube-system. The other
// servers pass requests on to that API server, as servers, with the name of the user. The ConfigMap only decides where
// that is: an address other than that of one of the cluster's API servers has no valid certificate, and a request is passed on only once.
//
// It owns the ConfigMap, and the path by which the collectors of other nodes send what they have read (layout.ObserveIngestPath): who may send,
// how much, and under which name. pkg/server adds the component "observe-route" where there are several servers; pkg/dashboard passes the
// requests of its path on by Pass; pkg/observe asks by Ask whether there is a store.
package route

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// name is that of the ConfigMap, in kube-system.
const name = "polymesh-observe"

// Keys of the ConfigMap.
const (
	serverKey  = "server"  // the name of the server's node
	addressKey = "address" // of its API server, for other machines
)

const (
	// interval is how often the ConfigMap is read.
	interval       = 15 * time.Second
	requestTimeout = 10 * time.Second
)

// Options are the options of a server.
type Options struct {
	// Server is the name of this server's node, Address where other machines reach its API server.
	Server  string
	Address netip.AddrPort
	// Socket is that of the store, if this server has it; empty if not.
	Socket string
	// Kubeconfig may read and write ConfigMaps in kube-system.
	Kubeconfig string
	// CA is the file of the authority of the API servers' certificates; Cert and Key are this server's own as a client, one of an administrator.
	CA, Cert, Key string
	Log           *slog.Logger
}

// Route is the component "observe-route".
type Route struct {
	component.Background
	o   Options
	log *slog.Logger
	senders

	place   atomic.Pointer[place] // nil while it is not known
	problem atomic.Pointer[string]
	// written is set when this run has written the ConfigMap.
	written bool

	mu        sync.Mutex
	transport *http.Transport
}

// place is where the store is; the zero place if there is none.
type place struct {
	server  string
	address netip.AddrPort
}

// New returns the component, not yet started. Without other servers it need not be: its handlers work.
func New(o Options) *Route {
	r := &Route{o: o}
	r.log = o.Log.With("component", r.Name())
	if o.Socket != "" {
		r.place.Store(&place{o.Server, o.Address})
	}
	return r
}

// Name implements component.Component.
func (*Route) Name() string { return "observe-route" }

// Init does nothing.
func (*Route) Init(context.Context) error { return nil }

// Start keeps the ConfigMap, or follows it.
func (r *Route) Start(ctx context.Context) error {
	client, err := kubeconfig.Client(r.o.Kubeconfig, nil)
	if err != nil {
		return err
	}
	r.Go(ctx, func(ctx context.Context) {
		wake := component.NewWake()
		wake.Call()
		component.Rounds(ctx, wake, interval, func(ctx context.Context) {
			err := r.sync(ctx, client)
			if ctx.Err() != nil {
				return
			}
			text := ""
			if err != nil {
				text = err.Error()
			}
			if before := r.problem.Swap(&text); text != "" && (before == nil || *before != text) {
				r.log.Warn("other servers, or this one, may not find the store of metrics, logs and traces", "err", err)
			}
		})
	})
	return nil
}

// Ready returns nil: a server works without a store.
func (*Route) Ready(context.Context) error { return nil }

// Notes implements component.Noted.
func (r *Route) Notes(context.Context) []string { return component.Present(r.problem.Load()) }

// sync writes where the store is, or reads it.
func (r *Route) sync(ctx context.Context, client kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	have, err := maps.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		have, err = nil, nil
	}
	if err != nil {
		return fmt.Errorf("read ConfigMap %s: %w", name, err)
	}
	if r.o.Socket != "" {
		return r.write(ctx, client, have)
	}
	if have != nil && have.Data[serverKey] == r.o.Server {
		// This server had the store.
		if err := maps.Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &have.UID, ResourceVersion: &have.ResourceVersion}}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove ConfigMap %s, which names this server: %w", name, err)
		}
		have = nil
	}
	if have == nil {
		r.place.Store(&place{})
		return nil
	}
	p := place{server: have.Data[serverKey]}
	if p.address, err = netip.ParseAddrPort(have.Data[addressKey]); err != nil || !p.address.IsValid() || p.address.Port() == 0 || !config.ValidNodeName(p.server) {
		return fmt.Errorf("ConfigMap %s does not say where the store is: delete it, the server with the store writes it again", name)
	}
	r.place.Store(&p)
	return nil
}

// write writes this server into the ConfigMap, once in a run. It replaces another server, which may be gone and unable to remove its entry.
func (r *Route) write(ctx context.Context, client kubernetes.Interface, have *corev1.ConfigMap) error {
	data := map[string]string{serverKey: r.o.Server, addressKey: r.o.Address.String()}
	maps := client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	var err error
	switch {
	case have == nil:
		_, err = maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{})
	case have.Data[serverKey] == data[serverKey] && have.Data[addressKey] == data[addressKey]:
	case have.Data[serverKey] != r.o.Server && r.written:
		return fmt.Errorf("server %.63q says that it has the store of the cluster, as this one does: other servers and nodes use that one", have.Data[serverKey])
	default:
		next := have.DeepCopy()
		next.Data = data
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s: %w", name, err)
	}
	r.written = true
	return nil
}

// where returns the server that has the store: the zero place if there is none.
func (r *Route) where() (place, error) {
	if p := r.place.Load(); p != nil {
		return *p, nil
	}
	return place{}, errors.New("it is not known yet which server has the store: try again")
}

// round sends a request to another server. Its identity is read again for each connection, as it is renewed.
func (r *Route) round(request *http.Request) (*http.Response, error) {
	t, err := r.client()
	if err != nil {
		return nil, err
	}
	return t.RoundTrip(request)
}

func (r *Route) client() (*http.Transport, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.transport != nil {
		return r.transport, nil
	}
	text, err := os.ReadFile(r.o.CA)
	if err != nil {
		return nil, fmt.Errorf("read the authority of the API servers: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	// HTTP/1.1, for WebSocket, and without a proxy of the environment.
	r.transport = &http.Transport{
		DialContext: dialer.DialContext, TLSHandshakeTimeout: dialTimeout, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute, DisableCompression: true,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, RootCAs: roots,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				pair, err := tls.LoadX509KeyPair(r.o.Cert, r.o.Key)
				return &pair, err
			},
		},
	}
	return r.transport, nil
}
