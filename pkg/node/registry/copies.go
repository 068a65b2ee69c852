package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
)

// An image that no registry has is lost with the only node that has it. So the node that has built it, or to which it was pushed, asks
// another one to keep a copy: a server, if there is one, always the same for a repository while the nodes stay. The other one gets it as
// containerd does, verifies it, and keeps it for the same reason and as long. When the first node is lost, it does the same.

const (
	// copiesPath takes an imagestore.Copy of another node. The answer is 200 if the node has it, 202 while it gets it or others of the same node,
	// and 429 if it gets too many of other nodes.
	copiesPath = "/polymesh/v1/copies"
	// copyInterval is the time between two rounds when nothing changes; pendingInterval while a copy is made, and failed ones are tried
	// again after that, and then after up to maxCopyInterval.
	copyInterval    = 5 * time.Minute
	pendingInterval = time.Second
	maxCopyInterval = time.Minute
	// checkInterval is how long a node is believed to have a copy: its user may remove it.
	checkInterval = 10 * time.Minute
	// maxCandidates is how many nodes are asked for one image in one round.
	maxCandidates = 3
	// maxReceiving is how many copies are received at a time, nodeReceiving how many of one node: it delays its own ones only. One may take
	// copyTime, and after a failure the reason is the answer for failedTime.
	maxReceiving, nodeReceiving = 8, 2
	copyTime, failedTime        = 6 * time.Hour, 5 * time.Second
	// maxCopies is how many images and signatures of one node are kept. An agent's images have at most the part of the disk that share returns.
	maxCopies = 1024
	// shownImages is how many images a note names.
	shownImages = 3
)

// copies makes sure that two nodes have each image that no registry has.
type copies struct {
	*Registry
	wake  component.Wake
	alone atomic.Pointer[string]

	// rounds is held during a round, and guards made: the copies that other nodes have, by the image's full name.
	rounds sync.Mutex
	made   map[string]made

	mu        sync.Mutex
	ctx       context.Context // of the component, while it runs
	tasks     sync.WaitGroup
	receiving map[offer]*arriving
	budgets   map[string]*budget // of agents of which copies come
}

// made is a copy that another node has. It may need a request again when the image, the reason to keep it, or the preferred node changes.
type made struct {
	image     imagestore.Copy
	at, first *peer // the node that has it, and the preferred one
	asked     time.Time
}

// offer is an image, by its full name, that a node has: another one with the same name does not stand in its way.
type offer struct{ node, image string }

// arriving is a copy that this node gets.
type arriving struct {
	target digest.Digest
	done   bool
	err    error
	at     time.Time // when it was done
}

func newCopies(r *Registry) *copies {
	return &copies{Registry: r, wake: component.NewWake(), receiving: map[offer]*arriving{}, budgets: map[string]*budget{}}
}

// look starts a round soon.
func (c *copies) look() { c.wake.Call() }

// run makes copies until ctx ends.
func (c *copies) run(ctx context.Context) {
	c.mu.Lock()
	c.ctx = ctx
	c.mu.Unlock()
	retry := pendingInterval
	for {
		pending, failed, err := c.round(ctx)
		if ctx.Err() != nil {
			break
		}
		next := copyInterval
		switch {
		case err != nil:
			c.log.Warn("cannot check whether other nodes have this node's images", "err", err)
			next, retry = retry, min(2*retry, maxCopyInterval)
		case failed:
			next, retry = retry, min(2*retry, maxCopyInterval)
		case pending:
			next, retry = pendingInterval, pendingInterval
		default:
			retry = pendingInterval
		}
		select {
		case <-ctx.Done():
		case <-time.After(next):
		case <-c.wake:
			// What comes next often comes at once: the images of a project.
			select {
			case <-ctx.Done():
			case <-time.After(pendingInterval):
			}
		}
		if ctx.Err() != nil {
			break
		}
	}
	c.mu.Lock()
	c.ctx = nil
	c.mu.Unlock()
	c.tasks.Wait()
}

// round requests the copies that are missing. pending means that some are under way.
func (c *copies) round(ctx context.Context) (pending, failed bool, err error) {
	c.rounds.Lock()
	defer c.rounds.Unlock()
	if c.peers.complete.Load() {
		if err := c.store.Removed(ctx, c.peers.known); err != nil {
			return false, false, err
		}
	}
	list, err := c.store.Copies(ctx)
	if err != nil {
		return false, false, err
	}
	others := c.peers.list(everyNode)
	note, pending, failed := c.copyAll(ctx, list, others, time.Now())
	if ctx.Err() != nil {
		return false, false, ctx.Err()
	}
	if len(others) == 0 && len(c.peers.nodes.List()) < 2 {
		note, failed = "", false // a cluster of one node
	}
	if before := c.alone.Swap(&note); failed && (before == nil || *before != note) {
		c.log.Warn("images are on one node only", "why", note)
	}
	return pending, failed, nil
}

// copyAll requests copies of images, of which each is followed by its signature, unless they are made. The note names those that only this node
// has.
func (c *copies) copyAll(ctx context.Context, list []imagestore.Copy, others []*peer, now time.Time) (note string, pending, failed bool) {
	before, only := c.made, alone{}
	c.made = map[string]made{}
	var at *peer // the node that has the image before, whose signature may come next
	for _, image := range list {
		candidates := others
		if image.Signature {
			// It stays where its image is.
			if at == nil {
				continue
			}
			candidates = []*peer{at}
		}
		copied, done, err := c.second(ctx, image, candidates, before[image.Name], now)
		if !image.Signature {
			at = nil
			if done {
				at = copied.at
			}
		}
		switch {
		case ctx.Err() != nil:
			return "", false, false
		case err != nil:
			failed = true
			only.add(image, err.Error())
		case !done:
			pending = true
			only.add(image, "being copied to node "+copied.at.name)
		case copied.at != nil:
			c.made[image.Name] = copied
		}
	}
	return only.String(), pending, failed
}

// errTaken means that a node has another image of the name.
var errTaken = errors.New("another image has the name there, and stays")

// errNoOther means that no other node can keep a copy.
var errNoOther = errors.New("no other node is Ready")

// second returns the copy of an image that another node has, or, if it is not done, the one that gets it now; have is the one of before. An
// image that needs no other node is done with none.
func (c *copies) second(ctx context.Context, image imagestore.Copy, others []*peer, have made, now time.Time) (copied made, done bool, err error) {
	q, err := partOf(image.Name, image.Target)
	if err != nil {
		return made{}, false, err
	}
	candidates := slices.Clone(others)
	err = errNoOther
	if !image.Built() && !image.Signature {
		// Other nodes ask only servers what such a tag means.
		if !c.peers.otherServer() {
			return made{}, true, nil
		}
		candidates = slices.DeleteFunc(candidates, func(o *peer) bool { return !o.server })
		err = errors.New("no other server is Ready, and its tag is not one of `polymesh deploy`")
	}
	if len(candidates) == 0 {
		return made{}, false, err
	}
	order(candidates, q.repository())
	copied = made{image: image, first: candidates[0], asked: now}
	from := slices.IndexFunc(candidates, func(o *peer) bool { return o.name == image.From })
	if from >= 0 {
		copied.first = candidates[from]
	}
	at := slices.IndexFunc(candidates, have.at.is)
	if at >= 0 && copied.first.is(have.first) && now.Sub(have.asked) < checkInterval && reflect.DeepEqual(image, have.image) {
		have.at = candidates[at]
		return have, true, nil
	}
	if from >= 0 {
		// The first node does this while it has the image.
		copied.at = copied.first
		if c.peers.has(ctx, copied.at, q) == nil {
			return copied, true, nil
		}
	}
	for _, o := range candidates[:min(len(candidates), maxCandidates)] {
		copied.at = o
		done, askErr := c.peers.copyTo(ctx, o, image)
		switch {
		case askErr == nil:
			return copied, done, nil
		case image.Signature && errors.Is(askErr, errTaken):
			return copied, true, nil // the other node's own signatures of the image stay
		case o == candidates[0]:
			err = askErr
		}
	}
	return made{}, false, err
}

// order puts the node first that gets copies of a repository: servers before others, and of these always the same one.
func order(list []*peer, repository string) {
	rank := func(o *peer) string {
		sum := sha256.Sum256(fmt.Appendf(nil, "%q %q", repository, o.name))
		if o.server {
			return "0" + string(sum[:])
		}
		return "1" + string(sum[:])
	}
	slices.SortFunc(list, func(a, b *peer) int { return strings.Compare(rank(a), rank(b)) })
}

// partOf returns the request for content of an image.
func partOf(name string, d ocispec.Descriptor) (request, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return request{}, err
	}
	q := request{host: reference.Domain(named), path: reference.Path(named), kind: blobs, digest: d.Digest}
	if images.IsManifestType(d.MediaType) || images.IsIndexType(d.MediaType) {
		q.kind = manifests
	}
	return q, nil
}

// copyTo asks a node to keep a copy. It reports whether the node has it.
func (p *peers) copyTo(ctx context.Context, o *peer, image imagestore.Copy) (done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	text, err := json.Marshal(image)
	if err != nil {
		return false, err
	}
	h, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+o.address+copiesPath, bytes.NewReader(text))
	if err != nil {
		return false, err
	}
	h.Header.Set("Content-Type", "application/json")
	answer, err := o.client.Do(h)
	if err != nil {
		return false, fmt.Errorf("node %s does not answer: %w", o.name, withoutURL(err))
	}
	defer answer.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
	switch answer.StatusCode {
	case http.StatusOK:
		return true, nil
	case http.StatusAccepted:
		return false, nil
	case http.StatusConflict:
		return false, fmt.Errorf("node %s: %w", o.name, errTaken)
	case http.StatusMethodNotAllowed, http.StatusNotFound:
		return false, fmt.Errorf("node %s has an older version, which keeps no copies", o.name)
	}
	var refusal struct {
		Errors []struct {
			Message string `json:"message"`
		} `json:"errors"`
	}
	why := http.StatusText(answer.StatusCode)
	if json.Unmarshal(body, &refusal) == nil && len(refusal.Errors) > 0 {
		why = oneLine(refusal.Errors[0].Message)
	}
	return false, fmt.Errorf("node %s: %s", o.name, why)
}

// alone collects images that only this node has, for a note.
type alone struct {
	shown []string
	more  int
}

func (a *alone) add(image imagestore.Copy, why string) {
	switch {
	case image.Signature: // the image is named
	case len(a.shown) < shownImages:
		a.shown = append(a.shown, image.Name+" ("+why+")")
	default:
		a.more++
	}
}

func (a *alone) String() string {
	if len(a.shown) == 0 {
		return ""
	}
	shown := a.shown
	if a.more > 0 {
		shown = append(slices.Clone(shown), fmt.Sprintf("%d more", a.more))
	}
	return "on this node only: " + strings.Join(shown, ", ")
}

// serveCopy answers another node that asks for a copy.
func (r *Registry) serveCopy(w http.ResponseWriter, h *http.Request, name string) {
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Now().Add(askTimeout))
	if h.Method != http.MethodPost {
		w.Header().Set("Allow", "POST")
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "use POST")
		return
	}
	var c imagestore.Copy
	text, err := io.ReadAll(http.MaxBytesReader(w, h.Body, 64<<10))
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err == nil {
		err = c.Check()
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", oneLine(err.Error()))
		return
	}
	_ = conn.SetReadDeadline(time.Time{}) // its turn may take longer to come
	end, ok := r.asks.take(h.Context(), name)
	if !ok {
		refuseMany(w)
		return
	}
	defer end()
	from := r.peers.named(name)
	if from == nil {
		refuse(w, http.StatusServiceUnavailable, "UNAVAILABLE", "the node's address is not known yet")
		return
	}
	// What an agent says that another tag means is believed by no node.
	if !from.server && !c.Built() && !c.Signature || c.Imported && !from.server {
		refuse(w, http.StatusForbidden, "DENIED", "from agents, only images that `polymesh deploy` has built are kept")
		return
	}
	done, err := r.copies.receive(c, from)
	switch {
	case errors.Is(err, imagestore.ErrTaken):
		refuse(w, http.StatusConflict, "DENIED", "another image has the name here: it stays")
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", err.Error())
	case errors.Is(err, errUnsigned):
		refuse(w, http.StatusConflict, "DENIED", err.Error())
	case err != nil:
		refuse(w, http.StatusBadGateway, "UNAVAILABLE", oneLine(err.Error()))
	case done:
		w.WriteHeader(http.StatusOK)
	default:
		w.WriteHeader(http.StatusAccepted)
	}
}

// receive keeps a copy of another node's image. It reports whether this node has it; otherwise it gets it in the background, and an error
// is that of the last attempt.
func (c *copies) receive(image imagestore.Copy, from *peer) (done bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		return false, errors.New("the node is starting or stopping")
	}
	ctx := c.ctx
	image.From, image.FromServer = from.name, from.server
	what := offer{from.name, image.Name}
	if a := c.receiving[what]; a != nil {
		switch {
		case !a.done:
			return false, nil
		case a.err != nil && a.target == image.Target.Digest && time.Since(a.at) < failedTime:
			return false, a.err
		}
		delete(c.receiving, what)
	}
	check, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	has, err := c.store.HasCopy(check, image)
	if err != nil {
		return false, err
	}
	if has {
		return true, c.store.Renew(check, image)
	}
	if image.Signature {
		// Nothing else would say for how long it is kept.
		if signed, err := c.store.HasSigned(check, image); err != nil {
			return false, err
		} else if !signed {
			return false, errUnsigned
		}
	}
	if turn, err := c.turn(from.name); err != nil || !turn {
		return false, err
	}
	if err := c.enoughSpace(0); err != nil {
		return false, err
	}
	if err := c.roomFrom(check, from.name); err != nil {
		return false, err
	}
	a := &arriving{target: image.Target.Digest}
	c.receiving[what] = a
	c.tasks.Go(func() {
		limited, cancel := context.WithTimeout(ctx, copyTime)
		defer cancel()
		err := c.get(limited, image, from)
		if err == nil {
			c.log.Info("this node keeps a copy of another node's image", "image", image.Name, "digest", image.Target.Digest, "node", from.name)
		} else if ctx.Err() == nil {
			c.log.Warn("another node's image was not copied", "image", image.Name, "node", from.name, "err", err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		a.done, a.err, a.at = true, err, time.Now()
	})
	return false, nil
}

// errBusy means that this node gets copies of many others.
var errBusy = errors.New("this node gets many copies at this moment")

// turn reports whether a node's next copy may be received now. errBusy is not the node's doing. c.mu is held.
func (c *copies) turn(node string) (bool, error) {
	running, own := 0, 0
	for what, a := range c.receiving {
		switch {
		case a.done:
			if len(c.receiving) > maxCopies {
				delete(c.receiving, what) // of a node that has not asked again
			}
			continue
		case what.node == node:
			own++
		}
		running++
	}
	switch {
	case own >= nodeReceiving:
		return false, nil
	case running >= maxReceiving:
		return false, errBusy
	}
	return true, nil
}

// errUnsigned means that this node does not have the image that a signature is for.
var errUnsigned = errors.New("this node does not have the image that it signs")

// roomFrom returns an error if this node keeps as many copies of a node's images and signatures as it may.
func (c *copies) roomFrom(ctx context.Context, node string) error {
	n, err := c.store.CopiesFrom(ctx, node)
	if err == nil && n >= maxCopies {
		// Images are released after later deploys, and their signatures with them.
		if err = c.store.DropSignatures(ctx, node); err == nil {
			n, err = c.store.CopiesFrom(ctx, node)
		}
	}
	if err == nil && n >= maxCopies {
		err = fmt.Errorf("this node keeps %d copies of images and signatures of node %s, and no more", n, node)
	}
	return err
}

// share is how many bytes of a disk of a size the images of one agent may have here, which it decides alone: a tenth, or of a small disk at least
// a few images. Servers decide what runs anyway.
func share(all uint64) int64 { return int64(max(all/10, minShare)) }

const minShare = 4 << 30

// budget counts the bytes that one agent's images have here, from when the first of some copies begins until none is under way.
type budget struct {
	running int // copies; guarded by copies.mu

	mu       sync.Mutex
	measured bool
	used     int64 // at the first part, and with all parts since then
}

// spend returns an error if the images would have more than limit with a part that comes. kept returns what they have. The part counts also
// after its copy is done: the next budget measures it.
func (b *budget) spend(node string, part, limit int64, kept func() (int64, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.measured {
		used, err := kept()
		if err != nil {
			return err
		}
		b.used, b.measured = used, true
	}
	if b.used > limit-part {
		return fmt.Errorf("this node keeps %d of at most %d MiB of images of node %s, and this part has %d MiB: remove images of that node that are not needed", b.used>>20, limit>>20, node, part>>20)
	}
	b.used += part
	return nil
}

// refund takes back what was spent for a copy that failed.
func (b *budget) refund(parts int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= parts
}

// budget returns an agent's budget for one more copy. end is called after that.
func (c *copies) budget(node string) (b *budget, end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b = c.budgets[node]; b == nil {
		b = &budget{}
		c.budgets[node] = b
	}
	b.running++
	return b, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if b.running--; b.running == 0 {
			delete(c.budgets, node)
		}
	}
}

// get gets an image's content from a node.
func (c *copies) get(ctx context.Context, image imagestore.Copy, from *peer) error {
	if from.server {
		return c.getWithin(ctx, image, from, func(int64) error { return nil })
	}
	_, all, err := c.disk()
	if err != nil {
		return err
	}
	limit := share(all)
	b, end := c.budget(from.name)
	defer end()
	var spent atomic.Int64
	err = c.getWithin(ctx, image, from, func(part int64) error {
		err := b.spend(from.name, part, limit, func() (int64, error) { return c.store.BytesFrom(ctx, from.name, limit) })
		if err == nil {
			spent.Add(part)
		}
		return err
	})
	if err != nil {
		b.refund(spent.Load())
	}
	return err
}

// getWithin is get, with a limit: admit returns an error for a part, of a size, that is too much.
func (c *copies) getWithin(ctx context.Context, image imagestore.Copy, from *peer, admit func(int64) error) error {
	return c.store.Receive(ctx, image, func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
		if err := c.enoughSpace(d.Size); err != nil {
			return nil, err
		}
		if err := admit(d.Size); err != nil {
			return nil, err
		}
		q, err := partOf(image.Name, d)
		if err != nil {
			return nil, err
		}
		answer, err := c.peers.ask(ctx, from, http.MethodGet, q)
		if err != nil {
			return nil, withoutURL(err)
		}
		return &incoming{ReadCloser: answer.Body, space: func() error { return c.enoughSpace(0) }, began: time.Now()}, nil
	})
}

// otherServer reports whether the cluster has another server, Ready or not.
func (p *peers) otherServer() bool {
	return slices.ContainsFunc(p.nodes.List(), func(o any) bool {
		node, ok := o.(*corev1.Node)
		if !ok || node.Name == p.opts.Node {
			return false
		}
		_, server := node.Labels[layout.ServerLabel]
		return server
	})
}

// named returns the node of a name; nil if its address is not known.
func (p *peers) named(name string) *peer {
	o, ok, err := p.nodes.GetByKey(name)
	if err != nil || !ok {
		return nil
	}
	return p.peer(o.(*corev1.Node))
}
