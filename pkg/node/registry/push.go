package registry

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"polymesh.dev/polymesh/pkg/imagestore"
)

const (
	// maxUploads is how many layers are received at a time, userUploads how many of one user.
	maxUploads, userUploads = 32, 16
	// idleTime is how long an upload may be idle, and heldTime how long a layer is kept that no manifest refers to.
	idleTime, heldTime = 10 * time.Minute, time.Hour
	// maxHeld is how many such layers are kept.
	maxHeld = 4096
	// maxDocuments is how many bytes of manifests are received at a time, userDocuments how many of one user. minDocument is what each counts
	// at least: a signature's parts are read, too. A manifest has to come within documentTime.
	maxDocuments, userDocuments, minDocument = 8 * maxManifest, 2 * maxManifest, imagestore.MaxPayloads
	documentTime                             = 2 * time.Minute
	// maxDeploy is the limit of an imagestore.Deploy, in bytes.
	maxDeploy = 4 << 10
)

// uploads is what users of the API server have begun to push to this node. An upload that this process does not know has to be
// begun again.
type uploads struct {
	mu   sync.Mutex
	open map[string]*upload
	held map[part]*hold
	// documents are the bytes of manifests that are being received, by their users.
	documents map[string]int64
}

// part is content of a repository. Who may push to one repository does not get another's content by its digest.
type part struct {
	repository string
	digest     digest.Digest
}

// hold is a lease of content that no image refers to yet.
type hold struct {
	lease imagestore.Lease
	at    time.Time
}

// upload is one layer that is being received.
type upload struct {
	id, repository, user string
	lease                imagestore.Lease
	busy                 bool
	at                   time.Time
}

func newUploads() *uploads {
	return &uploads{open: map[string]*upload{}, held: map[part]*hold{}, documents: map[string]int64{}}
}

// Handlers are paths of the API server, all below a prefix, by which users push images to this node. The API server has checked who calls, and
// whether they may: below imagestore.ImagesPath a user decides what any tag means for the cluster, below imagestore.BuildsPath only what those
// mean that no registry has.
func (r *Registry) Handlers() map[string]http.Handler {
	return map[string]http.Handler{
		imagestore.BuildsPath: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) { r.servePush(w, h, imagestore.BuildsPath) }),
		imagestore.ImagesPath: http.HandlerFunc(func(w http.ResponseWriter, h *http.Request) { r.servePush(w, h, imagestore.ImagesPath) }),
	}
}

// servePush serves one request of a user.
func (r *Registry) servePush(w http.ResponseWriter, h *http.Request, prefix string) {
	rest, ok := strings.CutPrefix(h.URL.Path, prefix)
	who, known := apirequest.UserFrom(h.Context())
	switch {
	case !ok || !known:
		refuse(w, http.StatusForbidden, "DENIED", "no user")
		return
	case !r.open.Load():
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, "UNAVAILABLE", "this server's node is starting: try again")
		return
	case rest == "":
		w.WriteHeader(http.StatusOK) // so that a client knows that the cluster takes images
		return
	}
	host, path, ok := strings.Cut(rest, "/")
	if !ok || len(path) > 2*maxName+256 || checkRegistry(host) != nil || host == every {
		refuse(w, http.StatusNotFound, "NAME_INVALID", "not the name of a registry")
		return
	}
	if host == imagestore.ShippedRegistry {
		refuse(w, http.StatusForbidden, "DENIED", host+" has the images that come with Polymesh: use another name")
		return
	}
	conn := http.NewResponseController(w)
	defer func() {
		// The connection is the API server's, and may serve a watch next.
		_, _ = conn.SetReadDeadline(time.Time{}), conn.SetWriteDeadline(time.Time{})
	}()
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		// Without it, a request could last forever.
		r.log.Error("pushes are refused: the time of their requests cannot be limited", "err", err)
		refuse(w, http.StatusInternalServerError, "UNAVAILABLE", "the server cannot limit the time of a request")
		return
	}
	body := &pushed{ReadCloser: h.Body, conn: conn}
	b := &backend{Registry: r, ctx: h.Context(), host: host, user: who.GetName(), any: prefix == imagestore.ImagesPath, body: body}
	inner := h.Clone(h.Context())
	inner.URL.Path, inner.URL.RawPath = "/"+path, ""
	inner.Body = body
	// A document is read as a whole; layers have their own limit.
	if h.Method == http.MethodPut && !ofUpload(path) {
		if h.ContentLength > maxManifest {
			refuse(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", "the manifest is too large")
			return
		}
		end, ok := r.uploads.document(b.user, h.ContentLength)
		if !ok {
			w.Header().Set("Retry-After", "1")
			refuse(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", "many manifests are being pushed at this moment: try again")
			return
		}
		defer end()
		body.until = time.Now().Add(documentTime)
		inner.Body = http.MaxBytesReader(w, body, maxManifest)
	}
	if at := strings.LastIndex(path, imagestore.DeploysPath); at > 0 && h.Method == http.MethodPost {
		repository, ok := strings.CutPrefix(path[:at], "v2/")
		if tag := path[at+len(imagestore.DeploysPath):]; ok && !strings.Contains(tag, "/") {
			b.deployed(w, inner, repository, tag)
			return
		}
	}
	if h.Method == http.MethodDelete {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "images are not deleted here")
		return
	}
	w = patient{w, conn}
	ociserver.New(b, &ociserver.Options{DebugID: "push", DisableReferrersAPI: true, WriteError: func(w http.ResponseWriter, _ *http.Request, err error) {
		if h.Context().Err() == nil {
			var api ociregistry.Error
			if !errors.As(err, &api) {
				r.log.Warn("an image was not pushed", "user", fmt.Sprintf("%.100q", b.user), "path", fmt.Sprintf("%.300q", path), "err", err)
			}
		}
		_ = ociregistry.WriteError(w, err)
	}}).ServeHTTP(w, inner)
}

// ofUpload reports whether a path is that of an upload, and not of a manifest in a repository with a name like one.
func ofUpload(path string) bool {
	return strings.HasSuffix(path[:max(strings.LastIndex(path, "/"), 0)], "/blobs/uploads")
}

// pushed is the body of a request, which ends when nothing comes.
type pushed struct {
	io.ReadCloser
	conn   *http.ResponseController
	until  time.Time // when it has to be complete; zero for a layer
	failed bool
}

func (p *pushed) Read(text []byte) (int, error) {
	deadline := time.Now().Add(stallTime)
	if !p.until.IsZero() && p.until.Before(deadline) {
		deadline = p.until
	}
	_ = p.conn.SetReadDeadline(deadline)
	n, err := p.ReadCloser.Read(text)
	if err != nil {
		_ = p.conn.SetReadDeadline(time.Time{}) // what follows may take longer
		p.failed = p.failed || err != io.EOF
	}
	return n, err
}

// backend is this node's images for one request of a user. What it does not implement is unsupported.
type backend struct {
	ociregistry.Funcs
	*Registry
	ctx        context.Context
	host, user string
	// any is set if the user may push every tag.
	any  bool
	body *pushed
}

// repository returns the full name of a repository: docker.io/shop/api.
func (b *backend) repository(path string) (string, error) {
	named, err := reference.ParseNormalizedNamed(b.host + "/" + path)
	// What the parser adds or leaves out would be another name.
	if err != nil || len(b.host)+len(path) > maxName || reference.Domain(named) != b.host || reference.Path(named) != path || !reference.IsNameOnly(named) {
		return "", ociregistry.NewError(fmt.Sprintf("%.255q is not the name of a repository of %q", path, b.host), ociregistry.ErrNameInvalid.Code(), nil)
	}
	return named.Name(), nil
}

// tagged checks a tag that is pushed.
func (b *backend) tagged(repository, tag string) (string, error) {
	named, err := reference.ParseNormalizedNamed(repository)
	if err == nil {
		named, err = reference.WithTag(named, tag)
	}
	if err != nil {
		return "", ociregistry.ErrNameInvalid
	}
	if err := imagestore.CheckTag(tag); err != nil {
		return "", ociregistry.NewError(err.Error(), ociregistry.ErrUnsupported.Code(), nil)
	}
	if !b.any && !imagestore.BuiltTag.MatchString(tag) && !imagestore.SignatureTag.MatchString(tag) {
		return "", denied("the tag %q may be a registry's: below %s only tags are accepted that end in the hash of `polymesh deploy`", tag, imagestore.BuildsPath)
	}
	return named.String(), nil
}

func denied(format string, args ...any) error {
	return ociregistry.NewError(fmt.Sprintf(format, args...), ociregistry.ErrDenied.Code(), nil)
}

// withStatus gives an error an HTTP status.
func withStatus(status int, format string, args ...any) error {
	return ociregistry.NewHTTPError(fmt.Errorf(format, args...), status, nil, nil)
}

// ResolveTag implements ociregistry.Reader. An image that was pushed to another server counts, so that it is not built and pushed again.
func (b *backend) ResolveTag(ctx context.Context, path, tag string) (ocispec.Descriptor, error) {
	repository, err := b.repository(path)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := b.store.Find(ctx, repository, tag, false)
	if !errdefs.IsNotFound(err) {
		return d, err
	}
	q := request{host: b.host, path: path, kind: manifests, tag: tag}
	found, err := b.peers.find(ctx, q.scope(false), q)
	if err != nil {
		return d, ociregistry.ErrManifestUnknown
	}
	return found.what, nil
}

// ResolveManifest implements ociregistry.Reader.
func (b *backend) ResolveManifest(ctx context.Context, path string, d digest.Digest) (ocispec.Descriptor, error) {
	return b.resolve(ctx, path, d, ociregistry.ErrManifestUnknown)
}

// ResolveBlob implements ociregistry.Reader. Content that is there is kept until the manifest comes.
func (b *backend) ResolveBlob(ctx context.Context, path string, d digest.Digest) (ocispec.Descriptor, error) {
	return b.resolve(ctx, path, d, ociregistry.ErrBlobUnknown)
}

func (b *backend) resolve(ctx context.Context, path string, d digest.Digest, unknown error) (ocispec.Descriptor, error) {
	repository, err := b.repository(path)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	found, err := b.own(ctx, repository, d)
	switch {
	case errdefs.IsNotFound(err):
		return found, unknown
	case err != nil:
		return found, err
	}
	return found, b.uploads.keep(ctx, b.store, part{repository, d})
}

// own returns content that belongs to a repository, or was pushed to it.
func (b *backend) own(ctx context.Context, repository string, d digest.Digest) (ocispec.Descriptor, error) {
	if b.uploads.has(part{repository, d}) {
		size, err := b.store.ContentSize(ctx, d)
		if !errdefs.IsNotFound(err) {
			return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: size}, err
		}
	}
	return b.store.FindContent(ctx, repository, d, false)
}

// GetTag implements ociregistry.Reader.
func (b *backend) GetTag(ctx context.Context, path, tag string) (ociregistry.BlobReader, error) {
	return b.read(ctx, request{host: b.host, path: path, kind: manifests, tag: tag})
}

// GetManifest implements ociregistry.Reader.
func (b *backend) GetManifest(ctx context.Context, path string, d digest.Digest) (ociregistry.BlobReader, error) {
	return b.read(ctx, request{host: b.host, path: path, kind: manifests, digest: d})
}

// GetBlob implements ociregistry.Reader.
func (b *backend) GetBlob(ctx context.Context, path string, d digest.Digest) (ociregistry.BlobReader, error) {
	return b.read(ctx, request{host: b.host, path: path, kind: blobs, digest: d})
}

// read returns content of this node, or else of another one.
func (b *backend) read(ctx context.Context, q request) (ociregistry.BlobReader, error) {
	repository, err := b.repository(q.path)
	if err != nil {
		return nil, err
	}
	d, err := b.store.Find(ctx, repository, q.ref(), false)
	if err == nil {
		blob, err := b.store.Read(ctx, d)
		if err != nil {
			return nil, err
		}
		return blobReader{blob, ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: blob.Size()}}, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	if q.kind == blobs {
		for _, o := range b.peers.holding(repository) {
			if answer, err := b.peers.ask(ctx, o, http.MethodGet, q); err == nil {
				body := &incoming{ReadCloser: answer.Body, began: time.Now()}
				return blobReader{body, ocispec.Descriptor{MediaType: "application/octet-stream", Digest: q.digest, Size: answer.ContentLength}}, nil
			}
		}
		return nil, ociregistry.ErrBlobUnknown
	}
	found, err := b.peers.find(ctx, q.scope(false), q)
	if err != nil {
		return nil, ociregistry.ErrManifestUnknown
	}
	return blobReader{io.NopCloser(bytes.NewReader(found.text)), found.what}, nil
}

type blobReader struct {
	io.ReadCloser
	d ocispec.Descriptor
}

// Descriptor implements ociregistry.BlobReader.
func (r blobReader) Descriptor() ocispec.Descriptor { return r.d }

// MountBlob implements ociregistry.Writer: whether the user may read the other repository was not checked, so the layer is sent.
func (b *backend) MountBlob(context.Context, string, string, digest.Digest) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, ociregistry.ErrUnsupported
}

// PushBlob implements ociregistry.Writer.
func (b *backend) PushBlob(ctx context.Context, path string, d ocispec.Descriptor, from io.Reader) (ocispec.Descriptor, error) {
	w, err := b.PushBlobChunked(ctx, path, 0)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer func() { _ = w.Cancel() }()
	if _, err := io.Copy(w, from); err != nil {
		return ocispec.Descriptor{}, err
	}
	return w.Commit(d.Digest)
}

// PushBlobChunked implements ociregistry.Writer.
func (b *backend) PushBlobChunked(ctx context.Context, path string, _ int) (ociregistry.BlobWriter, error) {
	repository, err := b.repository(path)
	if err != nil {
		return nil, err
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	u := &upload{id: hex.EncodeToString(id[:]), repository: repository, user: b.user, busy: true, at: time.Now()}
	if err := b.uploads.begin(u); err != nil {
		return nil, err
	}
	if u.lease, err = b.store.NewLease(ctx); err != nil {
		b.uploads.drop(u.id)
		return nil, err
	}
	w := &writer{backend: b, upload: u}
	return w, w.opened(ctx)
}

// PushBlobChunkedResume implements ociregistry.Writer.
func (b *backend) PushBlobChunkedResume(ctx context.Context, path, id string, offset int64, _ int) (ociregistry.BlobWriter, error) {
	repository, err := b.repository(path)
	if err != nil {
		return nil, err
	}
	u, err := b.uploads.take(id, repository, b.user)
	if err != nil {
		return nil, err
	}
	w := &writer{backend: b, upload: u}
	if err := w.opened(ctx); err != nil {
		return nil, err
	}
	// A request without a range continues.
	if offset > 0 && offset != w.size {
		_ = w.Close()
		return nil, ociregistry.ErrRangeInvalid
	}
	return w, nil
}

// writer receives one request's part of an upload.
type writer struct {
	*backend
	upload *upload
	to     content.Writer
	buffer *bufio.Writer
	size   int64 // with what is in the buffer
	looked int64 // the size at the last look at the free space
	ended  bool
}

func (w *writer) opened(ctx context.Context) (err error) {
	if w.to, err = w.store.Upload(ctx, w.upload.lease, w.upload.id); err == nil {
		var status content.Status
		if status, err = w.to.Status(); err == nil {
			w.size = status.Offset
			err = w.space()
		}
	}
	if err != nil {
		_ = w.Cancel()
		return err
	}
	w.buffer = bufio.NewWriterSize(w.to, 256<<10)
	return nil
}

// space returns an error if the disk is nearly full.
func (w *writer) space() error {
	w.looked = w.size
	return w.enoughSpace(0)
}

// Write implements io.Writer.
func (w *writer) Write(text []byte) (int, error) {
	if w.size+int64(len(text)) > imagestore.MaxBlob {
		w.body.failed = true
		return 0, ociregistry.NewHTTPError(ociregistry.NewError(fmt.Sprintf("a layer has more than %d bytes", int64(imagestore.MaxBlob)), ociregistry.ErrSizeInvalid.Code(), nil), http.StatusRequestEntityTooLarge, nil, nil)
	}
	if w.size-w.looked >= lookBytes {
		if err := w.space(); err != nil {
			w.body.failed = true
			return 0, err
		}
	}
	n, err := w.buffer.Write(text)
	w.size += int64(n)
	w.body.failed = w.body.failed || err != nil
	return n, err
}

// Close implements io.Closer: the upload can go on, unless this part of it was broken off.
func (w *writer) Close() error {
	if w.ended {
		return nil
	}
	if w.body.failed {
		return w.Cancel()
	}
	err := w.buffer.Flush()
	if err = errors.Join(err, w.to.Close()); err != nil {
		return errors.Join(err, w.Cancel())
	}
	w.ended = true
	w.uploads.give(w.upload)
	return nil
}

// Size implements ociregistry.BlobWriter.
func (w *writer) Size() int64 { return w.size }

// ChunkSize implements ociregistry.BlobWriter.
func (w *writer) ChunkSize() int { return 0 }

// ID implements ociregistry.BlobWriter.
func (w *writer) ID() string { return w.upload.id }

// Cancel implements ociregistry.BlobWriter.
func (w *writer) Cancel() error {
	if w.ended {
		return nil
	}
	w.ended = true
	if w.to != nil {
		_ = w.to.Close()
	}
	w.uploads.drop(w.upload.id)
	return w.remove(w.upload)
}

// remove removes what an upload has written.
func (r *Registry) remove(u *upload) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errors.Join(r.store.AbortUpload(ctx, u.id), r.store.EndLease(ctx, u.lease))
}

// Commit implements ociregistry.BlobWriter.
func (w *writer) Commit(d digest.Digest) (ocispec.Descriptor, error) {
	defer func() { _ = w.Cancel() }()
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return ocispec.Descriptor{}, ociregistry.ErrDigestInvalid
	}
	if w.body.failed {
		return ocispec.Descriptor{}, ociregistry.ErrSizeInvalid
	}
	if err := w.buffer.Flush(); err != nil {
		return ocispec.Descriptor{}, err
	}
	if w.size == 0 {
		return ocispec.Descriptor{}, ociregistry.ErrSizeInvalid
	}
	err := w.to.Commit(w.ctx, w.size, d)
	switch {
	case errdefs.IsFailedPrecondition(err):
		return ocispec.Descriptor{}, ociregistry.ErrDigestInvalid
	case err != nil && !errdefs.IsAlreadyExists(err):
		return ocispec.Descriptor{}, err
	}
	w.ended = true
	_ = w.to.Close()
	w.uploads.drop(w.upload.id)
	for _, old := range w.uploads.hold(part{w.upload.repository, d}, w.upload.lease) {
		_ = w.store.EndLease(w.ctx, old)
	}
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: w.size}, nil
}

// PushManifest implements ociregistry.Writer. What a manifest refers to must have been pushed to the repository, or be in it.
func (b *backend) PushManifest(ctx context.Context, path, tag string, text []byte, mediaType string) (d ocispec.Descriptor, err error) {
	repository, err := b.repository(path)
	if err != nil {
		return d, err
	}
	name := ""
	if tag != "" {
		if name, err = b.tagged(repository, tag); err != nil {
			return d, err
		}
	}
	read := imagestore.Children
	signature := imagestore.SignatureTag.MatchString(tag)
	if signature {
		read = imagestore.SignatureParts
	}
	children, err := read(mediaType, text)
	if err != nil {
		return d, ociregistry.NewError(err.Error(), ociregistry.ErrManifestInvalid.Code(), nil)
	}
	if signature && mediaType != ocispec.MediaTypeImageManifest {
		return d, ociregistry.NewError("a signature is an OCI manifest", ociregistry.ErrManifestInvalid.Code(), nil)
	}
	if err := b.enoughSpace(0); err != nil {
		return d, err
	}
	for _, c := range children {
		found, err := b.own(ctx, repository, c.Digest)
		if err == nil {
			// Its garbage collection must wait until the manifest refers to it.
			err = b.uploads.keep(ctx, b.store, part{repository, c.Digest})
		}
		switch {
		case errdefs.IsNotFound(err):
			return d, ociregistry.NewError(fmt.Sprintf("%s was not pushed to %s", c.Digest, repository), ociregistry.ErrManifestBlobUnknown.Code(), nil)
		case err != nil:
			return d, err
		case found.Size != c.Size:
			return d, ociregistry.NewError(fmt.Sprintf("%s has %d bytes, the manifest says %d", c.Digest, found.Size, c.Size), ociregistry.ErrManifestInvalid.Code(), nil)
		}
	}
	lease, err := b.store.NewLease(ctx)
	if err != nil {
		return d, err
	}
	held := false
	defer func() {
		if !held {
			_ = b.store.EndLease(context.WithoutCancel(ctx), lease)
		}
	}()
	if d, err = b.store.PutManifest(ctx, lease, mediaType, text); err != nil {
		return d, err
	}
	switch {
	case tag == "":
		// A part of an index, which comes later.
		held = true
		for _, old := range b.uploads.hold(part{repository, d.Digest}, lease) {
			_ = b.store.EndLease(ctx, old)
		}
		return d, nil
	case signature:
		err = b.store.PushedSignature(ctx, name, text)
	default:
		err = b.store.Pushed(ctx, name, d)
	}
	if err != nil {
		return d, err
	}
	// The image keeps its content now.
	for _, l := range b.uploads.release(repository, append(children, d)) {
		_ = b.store.EndLease(ctx, l)
	}
	b.log.Info("an image was pushed", "image", name, "digest", d.Digest, "user", fmt.Sprintf("%.100q", b.user))
	b.copies.look()
	return d, nil
}

// deployed records that an image was deployed. One that another server has is copied, so that this one keeps it as long.
func (b *backend) deployed(w http.ResponseWriter, h *http.Request, path, tag string) {
	repository, err := b.repository(path)
	name := ""
	if err == nil {
		name, err = b.tagged(repository, tag)
	}
	if err != nil {
		_ = ociregistry.WriteError(w, err)
		return
	}
	var what imagestore.Deploy
	text, err := io.ReadAll(http.MaxBytesReader(w, h.Body, maxDeploy))
	if err == nil {
		err = json.Unmarshal(text, &what)
	}
	c := imagestore.NewDeployed(name, what.Project, what.Service)
	if err != nil || what.Project == "" || what.Service == "" || !c.Built() {
		refuse(w, http.StatusBadRequest, "UNSUPPORTED", "not a deploy of an image that was built")
		return
	}
	q := request{host: b.host, path: path, kind: manifests, tag: tag}
	c.Target, err = b.store.Find(h.Context(), repository, tag, false)
	switch {
	case err == nil:
		if err = c.Check(); err == nil {
			err = b.store.Deployed(h.Context(), name, what.Project, what.Service)
		}
	case errdefs.IsNotFound(err):
		var found document
		if found, err = b.peers.find(h.Context(), q.scope(false), q); err != nil {
			_ = ociregistry.WriteError(w, ociregistry.ErrManifestUnknown)
			return
		}
		c.Target = found.what
		if err = c.Check(); err == nil {
			if _, err = b.copies.receive(c, found.from); errors.Is(err, errBusy) {
				err = nil // it stays where it is
			}
		}
	}
	if err != nil {
		b.log.Warn("a deployed image is not kept", "image", name, "err", err)
		_ = ociregistry.WriteError(w, withStatus(http.StatusInternalServerError, "the server could not keep the image: %w", err))
		return
	}
	b.copies.look()
	w.WriteHeader(http.StatusAccepted)
}

// begin adds an upload.
func (u *uploads) begin(n *upload) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	own := 0
	for _, o := range u.open {
		if o.user == n.user {
			own++
		}
	}
	if len(u.open) >= maxUploads || own >= userUploads {
		return ociregistry.NewError("many layers are being pushed at this moment: try again", ociregistry.ErrTooManyRequests.Code(), nil)
	}
	u.open[n.id] = n
	return nil
}

// document counts a manifest of a size, in bytes or -1 if it is not known, that a user pushes. It reports whether it may be received; end is
// called after that.
func (u *uploads) document(user string, size int64) (end func(), ok bool) {
	if size < 0 {
		size = maxManifest
	}
	size = max(size, minDocument)
	u.mu.Lock()
	defer u.mu.Unlock()
	all := size
	for _, of := range u.documents {
		all += of
	}
	if all > maxDocuments || u.documents[user]+size > userDocuments {
		return nil, false
	}
	u.documents[user] += size
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.documents[user] -= size; u.documents[user] == 0 {
			delete(u.documents, user)
		}
	}, true
}

// take returns an upload for the next part of it. Another user's, or one for another repository, is unknown.
func (u *uploads) take(id, repository, user string) (*upload, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	o := u.open[id]
	if o == nil || o.repository != repository || o.user != user {
		return nil, ociregistry.ErrBlobUploadUnknown
	}
	if o.busy {
		return nil, ociregistry.ErrBlobUploadInvalid
	}
	o.busy, o.at = true, time.Now()
	return o, nil
}

// give ends the part.
func (u *uploads) give(o *upload) {
	u.mu.Lock()
	defer u.mu.Unlock()
	o.busy, o.at = false, time.Now()
}

func (u *uploads) drop(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.open, id)
}

func (u *uploads) has(p part) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.held[p] != nil
}

// hold notes what a lease keeps, and returns leases that are not needed any more.
func (u *uploads) hold(p part, l imagestore.Lease) (old []imagestore.Lease) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if before := u.held[p]; before != nil {
		old = append(old, before.lease)
	}
	u.held[p] = &hold{l, time.Now()}
	for len(u.held) > maxHeld {
		var oldest part
		at := time.Now()
		for p, h := range u.held {
			if h.at.Before(at) {
				oldest, at = p, h.at
			}
		}
		old = append(old, u.held[oldest].lease)
		delete(u.held, oldest)
	}
	return old
}

// keep keeps content that is there until a manifest refers to it.
func (u *uploads) keep(ctx context.Context, store *imagestore.Store, p part) error {
	u.mu.Lock()
	if h := u.held[p]; h != nil {
		h.at = time.Now()
		u.mu.Unlock()
		return nil
	}
	u.mu.Unlock()
	lease, err := store.NewLease(ctx)
	if err != nil {
		return err
	}
	if err := store.Keep(ctx, lease, p.digest); err != nil {
		_ = store.EndLease(context.WithoutCancel(ctx), lease)
		return err
	}
	for _, old := range u.hold(p, lease) {
		_ = store.EndLease(ctx, old)
	}
	return nil
}

// release returns the leases of content that an image refers to now.
func (u *uploads) release(repository string, list []ocispec.Descriptor) (old []imagestore.Lease) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, d := range list {
		p := part{repository, d.Digest}
		if h := u.held[p]; h != nil {
			old = append(old, h.lease)
			delete(u.held, p)
		}
	}
	return old
}

// idle removes and returns the uploads that have ended, and the leases that have waited too long.
func (u *uploads) idle(now time.Time) (ended []*upload, old []imagestore.Lease) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, o := range u.open {
		if !o.busy && now.Sub(o.at) > idleTime {
			ended = append(ended, o)
			delete(u.open, id)
		}
	}
	for p, h := range u.held {
		if now.Sub(h.at) > heldTime {
			old = append(old, h.lease)
			delete(u.held, p)
		}
	}
	return ended, old
}

// tidy removes what pushes have left that did not end, until ctx ends.
func (r *Registry) tidy(ctx context.Context) {
	if err := r.store.AbortUploads(ctx); err != nil && ctx.Err() == nil {
		r.log.Warn("parts of images that were not pushed completely stay until containerd removes them", "err", err)
	}
	r.open.Store(true)
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			r.open.Store(false)
			return
		case now := <-ticker.C:
			ended, old := r.uploads.idle(now)
			for _, o := range ended {
				if err := r.remove(o); err != nil {
					r.log.Warn("an upload that has ended is not removed", "err", err)
				}
			}
			for _, l := range old {
				if err := r.store.EndLease(ctx, l); err != nil {
					r.log.Warn("a lease is not ended", "err", err)
				}
			}
		}
	}
}
