// Package registry is the component "registry" of a node: it brings images to the node that no registry has, and images of registries
// through mirrors.
//
// containerd asks it first, on the loopback, for every image that has to be pulled (hosts.go). It answers from containerd's own store, or from
// another node's over mutual TLS (peers.go), or from the mirrors of registries.yaml (mirrors.go); what it does not have, containerd asks the
// registry itself for. To other nodes it serves the images of this one that no registry has (serve.go), and two nodes keep each of those
// (copies.go). On a server, users push images to it through the API server (push.go). pkg/server and pkg/agent build it from
// plain values; the only identity that it needs is the node's own. It owns <data-dir>/agent/etc/containerd/registry.d.
package registry

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
)

const (
	// maxConnections limits the connections to each of the two ports that are answered, nodeConnections those of one node.
	maxConnections, nodeConnections = 1024, 128
	// maxPeers limits the requests of other nodes that are answered at a time, nodePeers those of one node, and nodeAsks its requests to keep
	// a copy: it delays its own ones only.
	maxPeers, nodePeers, nodeAsks = 64, 32, 1
	// waitForTurn is how long a request of another node waits for its turn.
	waitForTurn = 20 * time.Second
	// retryInterval is how often what has failed in the background is tried again.
	retryInterval = 2 * time.Second
)

// Options of the component.
type Options struct {
	// Node and IP are the node's name and address in the cluster.
	Node string
	IP   netip.Addr
	// LocalPort is the port on the loopback for containerd, PeerPort the one for other nodes, at IP without External.
	LocalPort, PeerPort uint16
	// External is set if nodes reach each other by their external addresses.
	External bool

	// Socket is containerd's. HostsDir is this component's folder of containerd's registry settings, UserHostsDir the user's, which
	// containerd reads first.
	Socket, HostsDir, UserHostsDir string
	// ContentDir is containerd's folder, whose disk pushes and copies must not fill.
	ContentDir string
	// EvictsBelow is how many bytes of a disk of a size the kubelet needs: with less, it evicts pods. Pushes and copies leave more.
	EvictsBelow func(size uint64) uint64
	// Registries is the file registries.yaml; it need not exist.
	Registries string
	// DisableDefaultEndpoint keeps a registry that has mirrors from being asked itself.
	DisableDefaultEndpoint bool
	// Embedded is set if nodes give each other also the images of registries, of those that Registries names as a mirror.
	Embedded bool

	// Kubeconfig is that of the node itself (system:node:NAME). It may list and watch nodes.
	Kubeconfig string
	Identity   Identity

	// Await waits until an image that came with Polymesh, by its full name, is imported, and returns at once for one that is, or that this
	// file does not have; nil if all are imported before the component starts. Its context ends with the request. After an error the
	// image is looked for as any other.
	Await func(ctx context.Context, ref string) error

	Log *slog.Logger
}

// Identity is the node's, to other nodes. The files are read for each connection, because they are renewed.
type Identity struct {
	// ClientCert and ClientKey are the node's client certificate, ServingCert and ServingKey the kubelet's serving certificate.
	ClientCert, ClientKey, ServingCert, ServingKey string
	// ClientCA is the authority of clients.
	ClientCA string
	// ServingCA returns the authority of the kubelets' serving certificates, PEM.
	ServingCA func() ([]byte, error)
}

// Registry is the component.
type Registry struct {
	component.Background
	opts   Options
	log    *slog.Logger
	secret string
	// local is the listener for containerd, servers what is stopped in the end.
	local   net.Listener
	servers []*http.Server
	// store is the connection to containerd, which it makes again by itself.
	store   *imagestore.Store
	closing sync.Once
	peers   *peers
	mirrors *mirrors
	came    arrivals
	uploads *uploads
	copies  *copies
	open    atomic.Bool // users may push
	// turns are those of other nodes' requests for content, asks those of their requests to keep copies.
	turns, asks *turns
	// problem is why other nodes are not served, notice what the user should know; empty or nil if there is none.
	problem, notice atomic.Pointer[string]
}

// New returns the component, not yet started.
func New(o Options) *Registry {
	r := &Registry{opts: o, log: o.Log.With("component", "registry"), turns: newTurns(maxPeers, nodePeers), asks: newTurns(maxPeers, nodeAsks)}
	r.peers = newPeers(o, r.log)
	r.mirrors = newMirrors(o, r.log)
	r.uploads, r.copies = newUploads(), newCopies(r)
	r.peers.changed = r.copies.look
	return r
}

// Name implements component.Component.
func (r *Registry) Name() string { return "registry" }

// Init reads registries.yaml, so that a bad one stops the node before anything runs.
func (r *Registry) Init(context.Context) error { return r.mirrors.reload() }

// Start listens for containerd, and names the address to it; other nodes are served when the node has its certificate and address.
func (r *Registry) Start(ctx context.Context) (err error) {
	var secret [32]byte
	_, _ = rand.Read(secret[:]) // never fails
	r.secret = hex.EncodeToString(secret[:])
	if r.store, err = imagestore.Open(r.opts.Socket); err != nil {
		return err
	}
	if r.local, err = (&net.ListenConfig{}).Listen(ctx, "tcp4", layout.Loopback(int(r.opts.LocalPort)).String()); err != nil {
		return fmt.Errorf("listen for containerd: %w", err)
	}
	if err := r.writeHosts(); err != nil {
		return fmt.Errorf("write containerd's settings of registries: %w", err)
	}
	local := r.newServer(http.HandlerFunc(r.serveContainerd))
	peers := r.newServer(http.HandlerFunc(r.servePeer))
	r.servers = []*http.Server{local, peers}
	r.Go(ctx, func(ctx context.Context) {
		var tasks sync.WaitGroup
		tasks.Go(func() { _ = local.Serve(newGuests(r.local, maxConnections)) })
		tasks.Go(func() { r.listen(ctx, peers) })
		tasks.Go(func() { r.peers.watch(ctx) })
		tasks.Go(func() { r.mirrors.watch(ctx, r.writeHosts) })
		tasks.Go(func() { r.keepLabels(ctx) })
		tasks.Go(func() { r.tidy(ctx) })
		tasks.Go(func() { r.copies.run(ctx) })
		<-ctx.Done()
		for _, s := range r.servers {
			_ = s.Close()
		}
		tasks.Wait()
	})
	return nil
}

func (r *Registry) newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10, ConnContext: withGuest,
		ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
}

// peerAddress is where the component listens for other nodes: at the node's address, or, if they use external addresses, at all, because the
// external one may be the machine's or a router's. Either way, others than the cluster's nodes are not served.
func (o Options) peerAddress() string {
	host := o.IP.String()
	if o.External {
		host = ""
	}
	return net.JoinHostPort(host, strconv.Itoa(int(o.PeerPort)))
}

// listen serves other nodes. The node's address or certificate may come later than the component.
func (r *Registry) listen(ctx context.Context, server *http.Server) {
	address := r.opts.peerAddress()
	for {
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err == nil {
			r.problem.Store(nil)
			err = server.Serve(tls.NewListener(newGuests(listener, nodeConnections), r.opts.Identity.serving()))
		}
		if ctx.Err() != nil {
			return
		}
		text := fmt.Sprintf("other nodes get no images from this one: listen on %s: %v", address, err)
		if before := r.problem.Swap(&text); before == nil || *before != text {
			r.log.Error("other nodes get no images from this one", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
	}
}

// keepLabels keeps images that came from other nodes, and those that containerd pulled again from here.
func (r *Registry) keepLabels(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.store.KeepLabels(ctx, r.came.take, r.copies.look)
		if ctx.Err() != nil {
			return
		}
		r.log.Warn("images are not marked as needed until containerd responds", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(retryInterval):
		}
	}
}

// Ready implements component.Component. Without other nodes it works too.
func (r *Registry) Ready(context.Context) error {
	if r.local == nil {
		return errors.New("not started")
	}
	return nil
}

// Notes implements component.Noted.
func (r *Registry) Notes(context.Context) []string {
	return append(component.Present(r.problem.Load(), r.notice.Load(), r.copies.alone.Load()), r.mirrors.notes()...)
}

// Stop implements component.Component.
func (r *Registry) Stop(ctx context.Context) error {
	err := r.Background.Stop(ctx)
	if r.local != nil {
		_ = r.local.Close()
	}
	// Requests that have not ended yet still have it.
	r.closing.Do(func() {
		if r.store != nil {
			err = errors.Join(err, r.store.Close())
		}
	})
	return err
}

// arrivals are the images that containerd has been told about by another node's answer, until it has pulled them.
type arrivals struct {
	mu   sync.Mutex
	list []arrival
}

type arrival struct {
	name   string
	target digest.Digest
	at     time.Time
}

const (
	// arrivalTime is how long a pull may take.
	arrivalTime = time.Hour
	maxArrivals = 1024
)

// expect notes that containerd pulls an image, by its full name.
func (a *arrivals) expect(name string, target digest.Digest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.drop(func(o arrival) bool { return o.name == name })
	if len(a.list) >= maxArrivals {
		a.list = a.list[1:]
	}
	a.list = append(a.list, arrival{name, target, time.Now()})
}

// take reports whether an image was expected.
func (a *arrivals) take(name string, target digest.Digest) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	found := false
	a.drop(func(o arrival) bool {
		is := o.name == name && o.target == target
		found = found || is
		return is
	})
	return found
}

func (a *arrivals) drop(which func(arrival) bool) {
	kept := a.list[:0]
	for _, o := range a.list {
		if !which(o) && time.Since(o.at) < arrivalTime {
			kept = append(kept, o)
		}
	}
	a.list = kept
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
