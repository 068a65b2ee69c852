package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	lru "github.com/hashicorp/golang-lru/v2/expirable"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
)

const (
	// maxAsked is how many nodes are asked at a time, askTimeout how long one may take to answer, and searchTimeout how long all may.
	maxAsked      = 4
	askTimeout    = 3 * time.Second
	searchTimeout = 15 * time.Second
	maxManifest   = imagestore.MaxManifest
	// holdersTime is how long a node counts as one that has a repository's images; maxHolders is how many repositories and, of each, nodes
	// are remembered.
	holdersTime                 = 30 * time.Minute
	missedTime                  = time.Minute
	maxRepositories, maxHolders = 512, 4
	// manifestTimeout is how long a node may take to send a manifest after it has begun to answer.
	manifestTimeout = 5 * time.Second
	// forgedTime is how long a node is not asked for a repository's images after it has sent something wrong, brokenTime after it has not sent
	// all of a blob.
	forgedTime, brokenTime = holdersTime, missedTime
	// tornTime is how long it is remembered of which blobs containerd may have kept something wrong, maxTorn of how many.
	tornTime, maxTorn = 24 * time.Hour, 4096
	// passBytes is how much of a blob is passed on at a time.
	passBytes = 256 << 10
)

// peer is another node.
type peer struct {
	name    string
	uid     types.UID
	address string // host:port
	server  bool
	client  *http.Client
}

// is reports whether both are the same node, and not one that has its name later.
func (o *peer) is(other *peer) bool {
	return o != nil && other != nil && o.name == other.name && o.uid == other.uid
}

// peers are the other nodes of the cluster.
type peers struct {
	opts  Options
	log   *slog.Logger
	nodes cache.Store
	// changed is called when a node has come, has gone, or has begun or ceased to report; nil for nothing.
	changed func()
	// complete is set once all nodes of the cluster are in the list: one that is not there has been removed.
	complete atomic.Bool

	mu      sync.Mutex
	clients map[string]*peer // by name and address
	// holders are the nodes that have had images of a repository: containerd asks for content after it has asked what a name means.
	// missed has the repositories of which no node had an image just now, so that a registry's image costs one search.
	holders *lru.LRU[string, []string]
	missed  *lru.LRU[string, struct{}]
	// avoided are nodes that have failed to send content of a repository, with the time until which they are not asked for it.
	avoided *lru.LRU[source, time.Time]
	// torn are blobs of which another node has sent something that was not verified. containerd keeps it, and would go on with it.
	torn *lru.LRU[part, struct{}]
}

// source is a node, for a repository's images.
type source struct {
	repository, node string
	uid              types.UID
}

func newPeers(o Options, log *slog.Logger) *peers {
	return &peers{
		opts: o, log: log, nodes: cache.NewStore(cache.MetaNamespaceKeyFunc), clients: map[string]*peer{},
		holders: lru.NewLRU[string, []string](maxRepositories, nil, holdersTime), missed: lru.NewLRU[string, struct{}](maxRepositories, nil, missedTime),
		avoided: lru.NewLRU[source, time.Time](maxRepositories*maxHolders, nil, forgedTime), torn: lru.NewLRU[part, struct{}](maxTorn, nil, tornTime),
	}
}

// watch keeps the list of nodes, until ctx ends.
func (p *peers) watch(ctx context.Context) {
	for {
		client, err := p.connect()
		if err == nil {
			p.run(ctx, client)
			return
		}
		p.log.Warn("other nodes are not known", "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
	}
}

func (p *peers) connect() (kubernetes.Interface, error) {
	return kubeconfig.Client(p.opts.Kubeconfig, func(c *rest.Config) { c.ContentType = runtime.ContentTypeProtobuf })
}

func (p *peers) run(ctx context.Context, client kubernetes.Interface) {
	note := func(update func(any) error) func(any) {
		return func(o any) {
			if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = last.Obj
			}
			if err := update(o); err != nil {
				p.log.Error("note a node", "err", err)
			}
		}
	}
	ready := func(o any) bool {
		node, ok := o.(*corev1.Node)
		return ok && condition.IsNodeReady(node)
	}
	changed := func() {
		if p.changed != nil {
			p.changed()
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "nodes", metav1.NamespaceAll, fields.Everything()),
		ObjectType:    &corev1.Node{},
		Transform:     trim,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc: func(o any) { note(p.nodes.Add)(o); changed() },
			UpdateFunc: func(before, o any) {
				note(p.nodes.Update)(o)
				if ready(before) != ready(o) {
					changed()
				}
			},
			DeleteFunc: func(o any) { note(p.nodes.Delete)(o); changed() },
		},
	})
	var tasks sync.WaitGroup
	tasks.Go(func() {
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			p.complete.Store(true)
			changed()
		}
	})
	informer.RunWithContext(ctx)
	tasks.Wait()
}

// trim leaves of a node what is needed here: nodes are large, and there may be many.
func trim(o any) (any, error) {
	node, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	out := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion}}
	if _, ok := node.Labels[layout.ServerLabel]; ok {
		out.Labels = map[string]string{layout.ServerLabel: ""}
	}
	out.Status.Addresses = node.Status.Addresses
	if c := condition.NodeReady(node); c != nil {
		out.Status.Conditions = []corev1.NodeCondition{{Type: c.Type, Status: c.Status}}
	}
	return out, nil
}

// known reports whether a node of the name is in the cluster.
func (p *peers) known(name string) bool {
	_, ok, err := p.nodes.GetByKey(name)
	return err == nil && ok
}

// list returns the other nodes that may be asked for an image and report, servers before others, in a random order. A node that does not
// report would cost its timeout with each pull.
func (p *peers) list(from scope) []*peer {
	var found []*peer
	names := map[string]bool{}
	nodes := p.nodes.List()
	for _, o := range nodes {
		names[o.(*corev1.Node).Name] = true
	}
	p.forget(names)
	for _, o := range nodes {
		node := o.(*corev1.Node)
		_, server := node.Labels[layout.ServerLabel]
		if node.Name == p.opts.Node || from == nowhere || from == servers && !server || !condition.IsNodeReady(node) {
			continue
		}
		if peer := p.peer(node); peer != nil {
			found = append(found, peer)
		}
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	rank := func(o *peer) int {
		if o.server {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(found, func(a, b *peer) int { return rank(a) - rank(b) })
	return found
}

// address returns where a node serves others: at its own address, or, with External, at its external one; empty if it has none.
func (p *peers) address(node *corev1.Node) string {
	of := func(kind corev1.NodeAddressType) string {
		for _, a := range node.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); a.Type == kind && err == nil {
				return net.JoinHostPort(ip.String(), strconv.Itoa(int(p.opts.PeerPort)))
			}
		}
		return ""
	}
	if external := of(corev1.NodeExternalIP); p.opts.External && external != "" {
		return external
	}
	return of(corev1.NodeInternalIP)
}

// peer returns a node with its client, which keeps connections; nil if the node has no address.
func (p *peers) peer(node *corev1.Node) *peer {
	out := &peer{name: node.Name, uid: node.UID, address: p.address(node)}
	if out.address == "" {
		return nil
	}
	_, out.server = node.Labels[layout.ServerLabel]
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.clients[node.Name]
	if old != nil && old.address == out.address {
		out.client = old.client
	} else {
		if old != nil {
			old.client.CloseIdleConnections()
		}
		out.client = p.client(node.Name)
	}
	p.clients[node.Name] = out
	return out
}

// forget drops the clients of nodes that are gone.
func (p *peers) forget(names map[string]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, o := range p.clients {
		if !names[name] {
			o.client.CloseIdleConnections()
			delete(p.clients, name)
		}
	}
}

// client returns one that talks to the node of this name only.
func (p *peers) client(name string) *http.Client {
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				config, err := p.opts.Identity.asking(name)
				if err != nil {
					return nil, err
				}
				conn, err := (&net.Dialer{Timeout: askTimeout}).DialContext(ctx, network, address)
				if err != nil {
					return nil, err
				}
				return handshake(ctx, conn, config)
			},
			ResponseHeaderTimeout: waitForTurn + askTimeout, IdleConnTimeout: time.Minute, MaxIdleConnsPerHost: 4, MaxResponseHeaderBytes: 16 << 10,
			DisableCompression: true,
		},
	}
}

// ask sends a request to a node. The caller closes the body.
func (p *peers) ask(ctx context.Context, o *peer, method string, q request) (*http.Response, error) {
	h, err := http.NewRequestWithContext(ctx, method, "https://"+o.address+q.target(), nil)
	if err != nil {
		return nil, err
	}
	answer, err := o.client.Do(h)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		_, _ = io.CopyN(io.Discard, answer.Body, 4<<10) // so that the connection can be used again
		answer.Body.Close()
		return nil, fmt.Errorf("node %s: %s", o.name, http.StatusText(answer.StatusCode))
	}
	return answer, nil
}

// has returns nil if a node says that it has a manifest, by its digest.
func (p *peers) has(ctx context.Context, o *peer, q request) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answer, err := p.ask(ctx, o, http.MethodHead, q)
	if err != nil {
		return err
	}
	answer.Body.Close()
	if got := answer.Header.Get("Docker-Content-Digest"); got != q.digest.String() {
		return fmt.Errorf("node %s answers with the digest %.100q for %s", o.name, got, q.name())
	}
	return nil
}

// errNoNode means that no node that may be asked has an image.
var errNoNode = errors.New("no other node has it")

// document is a manifest or index that a node has. It is verified.
type document struct {
	from *peer
	what ocispec.Descriptor
	text []byte
}

// get gets a manifest from a node. A node that sends another one is not asked for the repository for a time.
func (p *peers) get(ctx context.Context, o *peer, q request) (document, error) {
	d, err := p.manifest(ctx, o, q)
	if errors.Is(err, errForged) {
		p.log.Warn("a node sends a manifest that is not what it says", "image", q.name(), "node", o.name, "err", err)
		p.avoid(q.repository(), o, forgedTime)
	}
	return d, err
}

// find asks nodes for a manifest, some at a time; the first that has it wins.
func (p *peers) find(ctx context.Context, from scope, q request) (document, error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	repository := q.repository()
	candidates := slices.DeleteFunc(p.list(from), func(o *peer) bool { return p.avoids(repository, o) })
	found := make(chan document, len(candidates))
	next := make(chan *peer)
	var asking sync.WaitGroup
	for range min(maxAsked, len(candidates)) {
		asking.Go(func() {
			for o := range next {
				d, err := p.get(ctx, o, q)
				if err != nil {
					p.log.Debug("a node does not have an image", "image", q.name(), "node", o.name, "err", err)
					continue
				}
				found <- d
				cancel()
			}
		})
	}
	for _, o := range candidates {
		select {
		case next <- o:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	asking.Wait()
	select {
	case d := <-found:
		p.holds(repository, d.from.name)
		return d, nil
	default:
		return document{}, errNoNode
	}
}

// search is find, for a name; for content, which comes after that, it asks the nodes that had the name.
func (p *peers) search(ctx context.Context, from scope, q request, content bool) (document, error) {
	repository := q.repository()
	if content && q.digest != "" {
		for _, o := range p.holding(repository) {
			if d, err := p.get(ctx, o, q); err == nil {
				return d, nil
			}
		}
		if p.missed.Contains(repository) {
			return document{}, errNoNode
		}
	}
	d, err := p.find(ctx, from, q)
	switch {
	case err == nil:
		p.missed.Remove(repository)
	case ctx.Err() == nil:
		p.missed.Add(repository, struct{}{})
	}
	return d, err
}

// avoid notes that a node is not asked for a repository's images for a time.
func (p *peers) avoid(repository string, o *peer, pause time.Duration) {
	p.avoided.Add(source{repository, o.name, o.uid}, time.Now().Add(pause))
	p.mu.Lock()
	defer p.mu.Unlock()
	old, _ := p.holders.Get(repository)
	p.holders.Add(repository, slices.DeleteFunc(slices.Clone(old), func(n string) bool { return n == o.name }))
}

func (p *peers) avoids(repository string, o *peer) bool {
	until, ok := p.avoided.Get(source{repository, o.name, o.uid})
	return ok && time.Now().Before(until)
}

// holds notes that a node has images of a repository.
func (p *peers) holds(repository, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, _ := p.holders.Get(repository)
	list := append([]string{name}, slices.DeleteFunc(slices.Clone(old), func(n string) bool { return n == name })...)
	p.holders.Add(repository, list[:min(len(list), maxHolders)])
}

// holding returns the nodes that have had images of a repository, the last one first.
func (p *peers) holding(repository string) []*peer {
	p.mu.Lock()
	names, _ := p.holders.Get(repository)
	p.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	var found []*peer
	list := p.list(everyNode)
	for _, name := range names {
		if i := slices.IndexFunc(list, func(o *peer) bool { return o.name == name }); i >= 0 && !p.avoids(repository, list[i]) {
			found = append(found, list[i])
		}
	}
	return found
}

// fromPeers answers with another node's content. It reports whether it has answered.
func (r *Registry) fromPeers(w http.ResponseWriter, h *http.Request, q request) bool {
	if q.kind == blobs {
		return r.blobFromPeers(w, h, q)
	}
	d, err := r.peers.search(h.Context(), q.scope(r.opened(q.host)), q, h.Method == http.MethodGet)
	if err != nil {
		return false
	}
	describe(w, q, d.what)
	w.Header().Set("Content-Length", strconv.Itoa(len(d.text)))
	if h.Method == http.MethodHead {
		r.came.expect(q.name(), d.what.Digest)
		w.WriteHeader(http.StatusOK)
		r.log.Info("an image comes from another node", "image", q.name(), "digest", d.what.Digest, "node", d.from.name)
		return true
	}
	_, _ = w.Write(d.text)
	return true
}

// errForged means that content is not what its digest or media type says.
var errForged = errors.New("the content is another")

// manifest reads a manifest from a node and verifies it: by the digest in the request, or by the one that the node says a tag means. Its size and
// media type are those of the text, not what the node says: containerd uses those of its first HEAD for every host, so wrong ones would also make
// the registry's answer fail.
func (p *peers) manifest(ctx context.Context, o *peer, q request) (document, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	limit := time.AfterFunc(askTimeout, cancel)
	defer limit.Stop()
	answer, err := p.ask(ctx, o, http.MethodGet, q)
	if err != nil {
		return document{}, err
	}
	defer answer.Body.Close()
	limit.Reset(manifestTimeout)
	want := q.digest
	if want == "" {
		want = digest.Digest(answer.Header.Get("Docker-Content-Digest"))
		if err := want.Validate(); err != nil {
			return document{}, fmt.Errorf("node %s answers with the digest %.100q for %s", o.name, want, q.name())
		}
	}
	if answer.ContentLength > maxManifest {
		return document{}, fmt.Errorf("node %s answers with %d bytes for %s", o.name, answer.ContentLength, q.name())
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxManifest+1))
	if err != nil {
		return document{}, err
	}
	if got := want.Algorithm().FromBytes(text); got != want || len(text) > maxManifest {
		return document{}, fmt.Errorf("node %s sends %s for %s: %w", o.name, got, want, errForged)
	}
	media, err := mediaTypeOf(text)
	if err != nil {
		return document{}, err
	}
	return document{o, ocispec.Descriptor{MediaType: media, Digest: want, Size: int64(len(text))}, text}, nil
}

// mediaTypeOf returns what a manifest or index is. One without a media type is OCI's.
func mediaTypeOf(text []byte) (string, error) {
	var m struct {
		MediaType string          `json:"mediaType"`
		Config    json.RawMessage `json:"config"`
		Manifests json.RawMessage `json:"manifests"`
	}
	err := json.Unmarshal(text, &m)
	switch {
	case err != nil:
		return "", fmt.Errorf("the manifest cannot be read: %w: %w", err, errForged)
	case images.IsManifestType(m.MediaType) || images.IsIndexType(m.MediaType):
		return m.MediaType, nil
	case m.MediaType == "" && m.Config != nil && m.Manifests == nil:
		return ocispec.MediaTypeImageManifest, nil
	case m.MediaType == "" && m.Config == nil && m.Manifests != nil:
		return ocispec.MediaTypeImageIndex, nil
	}
	return "", fmt.Errorf("%.100q is neither a manifest nor an index: %w", m.MediaType, errForged)
}

// blobFromPeers passes a blob on from a node that has images of the repository. It is always the whole one, because no part can be verified;
// containerd skips what it has. Its size is not passed on alone, because it is not verified then.
func (r *Registry) blobFromPeers(w http.ResponseWriter, h *http.Request, q request) bool {
	if h.Method == http.MethodHead {
		return false
	}
	repository := q.repository()
	for _, o := range r.peers.holding(repository) {
		answer, err := r.peers.ask(h.Context(), o, http.MethodGet, q)
		if err != nil {
			if h.Context().Err() != nil {
				return false
			}
			r.log.Debug("a node does not have a blob", "blob", q.name(), "node", o.name, "err", err)
			continue
		}
		defer answer.Body.Close()
		describe(w, q, ocispec.Descriptor{Digest: q.digest})
		if answer.ContentLength >= 0 {
			w.Header().Set("Content-Length", strconv.FormatInt(answer.ContentLength, 10))
		}
		w.WriteHeader(http.StatusOK)
		sent, taken := copyVerified(w, &incoming{ReadCloser: answer.Body, began: time.Now()}, q.digest)
		if sent == nil && taken == nil {
			return true
		}
		r.peers.torn.Add(part{repository, q.digest}, struct{}{})
		// Also containerd may have ended it, because more came than the manifest says.
		pause := brokenTime
		if errors.Is(sent, errForged) || errors.Is(sent, errSlow) {
			pause = forgedTime
		}
		r.peers.avoid(repository, o, pause)
		r.log.Warn("a blob does not come from another node, which is not asked for the repository for a time", "blob", q.name(), "node", o.name, "for", pause, "err", errors.Join(sent, taken))
		panic(http.ErrAbortHandler) // only a broken connection says that the answer is not complete
	}
	return false
}

// copyVerified copies content. The last of it is only written when all is verified. The errors are those of who sends and of who takes.
func copyVerified(w io.Writer, from io.Reader, want digest.Digest) (sent, taken error) {
	verifier := want.Verifier()
	last, next := make([]byte, 0, passBytes), make([]byte, passBytes)
	for {
		n, err := from.Read(next)
		if n > 0 {
			if _, err := w.Write(last); err != nil {
				return nil, err
			}
			_, _ = verifier.Write(next[:n])
			last, next = next[:n], last[:cap(last)]
		}
		switch {
		case errors.Is(err, io.EOF) && verifier.Verified():
			_, err := w.Write(last)
			return nil, err
		case errors.Is(err, io.EOF):
			return errForged, nil
		case err != nil:
			return err, nil
		}
	}
}

// startOver makes containerd forget what it may have kept of a repository's blobs that were not verified: a pull begins.
func (r *Registry) startOver(ctx context.Context, repository string) {
	for _, p := range r.peers.torn.Keys() {
		if p.repository != repository {
			continue
		}
		if err := r.store.Discard(ctx, p.digest); err != nil {
			r.log.Warn("a part of a blob stays until containerd removes it", "blob", repository+"@"+p.digest.String(), "err", err)
			continue
		}
		r.peers.torn.Remove(p)
	}
}

func handshake(ctx context.Context, conn net.Conn, config *tls.Config) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return stalling{secure}, nil
}

// stallTime is how long another node may send nothing in the middle of an answer.
const stallTime = time.Minute

// stalling is a connection that ends when nothing comes.
type stalling struct{ net.Conn }

func (s stalling) Read(p []byte) (int, error) {
	if err := s.SetReadDeadline(time.Now().Add(stallTime)); err != nil {
		return 0, err
	}
	return s.Conn.Read(p)
}
