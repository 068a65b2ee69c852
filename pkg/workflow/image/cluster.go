package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/signature"
)

const (
	// attempts is how often a push is begun: another server may answer in the middle of it, which does not have what came before.
	attempts = 3
	// askTime is the time limit of a request that sends no image.
	askTime = 30 * time.Second
	// progressInterval is the time between two notes about a push.
	progressInterval = 500 * time.Millisecond
)

// Cluster is the cluster of a kubeconfig as a place of images: its API server takes them, for all nodes. No node and no other address has
// to be reachable.
type Cluster struct {
	// prefix is the path of the API server below which images are sent.
	prefix string
	base   url.URL
	next   http.RoundTripper
}

// ErrNotTaken means that a cluster takes no images: it is not Polymesh's.
var ErrNotTaken = errors.New("the cluster takes no images: only Polymesh's do, from this version on")

// OpenCluster returns the cluster of a kubeconfig. prefix is imagestore.BuildsPath or imagestore.ImagesPath.
func OpenCluster(ctx context.Context, config *rest.Config, prefix string) (*Cluster, error) {
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, err
	}
	next, err := rest.TransportFor(config)
	if err != nil {
		return nil, err
	}
	c := &Cluster{prefix: prefix, base: *base, next: next}
	answer, err := c.ask(ctx, http.MethodGet, c.target(), nil)
	if err != nil {
		return nil, err
	}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusForbidden: // a user may have only some repositories
		return c, nil
	case http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", c, ErrNotTaken)
	}
	return nil, c.refused(answer.StatusCode)
}

// String implements fmt.Stringer: the API server's address.
func (c *Cluster) String() string {
	return (&url.URL{Scheme: c.base.Scheme, Host: c.base.Host}).String()
}

// Close implements io.Closer.
func (c *Cluster) Close() error { return nil }

// target returns the URL of a path below the prefix.
func (c *Cluster) target(elem ...string) *url.URL {
	u := c.base
	u.Path = strings.TrimSuffix(u.Path, "/") + c.prefix + path.Join(elem...)
	return &u
}

// ask sends a request without an image; the answer's body is read.
func (c *Cluster) ask(ctx context.Context, method string, target *url.URL, body []byte) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, fmt.Errorf("ask %s about images: %w", c, err)
	}
	defer answer.Body.Close()
	_, _ = io.CopyN(io.Discard, answer.Body, 64<<10)
	return answer, nil
}

// refused is the error of a status.
func (c *Cluster) refused(status int) error {
	switch status {
	case http.StatusUnauthorized:
		return fmt.Errorf("%s does not accept the user of the kubeconfig: log in again", c)
	case http.StatusForbidden:
		return fmt.Errorf("%s: the user of the kubeconfig may not push images: an administrator can allow it with `kubectl create clusterrolebinding NAME --clusterrole=%s --user=USER`", c, imagestore.PushRole)
	case http.StatusNotFound:
		return fmt.Errorf("%s: %w", c, ErrNotTaken)
	}
	return fmt.Errorf("%s answers with %d %s to a question about images", c, status, http.StatusText(status))
}

// mapped sends a registry's requests to the API server, and nothing anywhere else: it has the user's credentials.
type mapped struct {
	*Cluster
	registry string
}

func (m mapped) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Path == "/v2/" {
		// How to log in is in the kubeconfig.
		return &http.Response{
			Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Header: http.Header{}, Body: http.NoBody, Request: r,
		}, nil
	}
	if !strings.HasPrefix(r.URL.Path, "/v2/") || path.Clean(r.URL.Path) != strings.TrimSuffix(r.URL.Path, "/") {
		return nil, fmt.Errorf("%s answers with the address %.300q", m.Cluster, r.URL.Path)
	}
	out := r.Clone(r.Context())
	out.URL = m.target(m.registry)
	out.URL.Path += r.URL.Path
	out.URL.RawQuery = r.URL.RawQuery
	out.Host = ""
	out.Header.Del("Authorization")
	answer, err := m.next.RoundTrip(out)
	if err == nil {
		answer.Request = r
	}
	return answer, err
}

// parse returns an image's registry, repository and tag, by its full name.
func parse(ref string) (reference.NamedTagged, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("image %.300q: %w", ref, err)
	}
	tagged, ok := named.(reference.NamedTagged)
	if !ok {
		return nil, fmt.Errorf("image %.300q has no tag", ref)
	}
	return tagged, nil
}

// parseName returns the full name for one with a tag.
func parseName(ref string) (string, error) {
	named, err := parse(ref)
	if err != nil {
		return "", err
	}
	return named.String(), nil
}

// options are those of go-containerregistry.
func (c *Cluster) options(ctx context.Context, ref string) (name.Tag, []remote.Option, error) {
	named, err := parse(ref)
	if err != nil {
		return name.Tag{}, nil, err
	}
	tag, err := name.NewTag(named.String(), name.WeakValidation)
	return tag, []remote.Option{remote.WithContext(ctx), remote.WithTransport(mapped{c, reference.Domain(named)})}, err
}

// Has implements Store: whether a node that gives it to others has an image, by its full name.
func (c *Cluster) Has(ctx context.Context, ref string) (bool, error) {
	named, err := parse(ref)
	if err != nil {
		return false, err
	}
	answer, err := c.ask(ctx, http.MethodHead, c.target(reference.Domain(named), "v2", reference.Path(named), "manifests", named.Tag()), nil)
	if err != nil {
		return false, err
	}
	switch answer.StatusCode {
	case http.StatusOK:
		return true, nil
	case http.StatusNotFound:
		return false, nil
	}
	return false, c.refused(answer.StatusCode)
}

// Export implements Store.
func (c *Cluster) Export(ctx context.Context, ref, file string) error {
	tag, options, err := c.options(ctx, ref)
	if err != nil {
		return err
	}
	found, err := remote.Image(tag, append(options, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))...)
	if err == nil {
		err = writeArchive(found, ref, file)
	}
	return c.explain(err)
}

// Notice implements Destination.
func (c *Cluster) Notice() string {
	// What an agent says that a tag means is believed by no other node, unless the tag is a hash.
	member := "node"
	if c.prefix == imagestore.ImagesPath {
		member = "server"
	}
	return fmt.Sprintf("images are pushed to the cluster at %s: this machine is not a %s of it, or this user may not use its containerd", c, member)
}

// Load implements Destination: it pushes the image in an archive under a full name.
func (c *Cluster) Load(ctx context.Context, archive, ref string, note func(string)) error {
	list, done, err := OpenArchive(archive)
	if err != nil {
		return err
	}
	defer done()
	if len(list) != 1 {
		return fmt.Errorf("%s has %d images: push one at a time", archive, len(list))
	}
	return c.Push(ctx, list[0].Content, ref, note)
}

// LoadAll implements Destination.
func (c *Cluster) LoadAll(ctx context.Context, _ string, list []Archived, note func(string)) error {
	for _, a := range list {
		note("pushing")
		if err := c.Push(ctx, a.Content, a.Name, note); err != nil {
			return err
		}
	}
	return nil
}

// Push pushes an image or index under a full name. note is called while it is sent.
func (c *Cluster) Push(ctx context.Context, content remote.Taggable, ref string, note func(string)) error {
	for i := 1; ; i++ {
		err := c.push(ctx, content, ref, note)
		if i == attempts || !unknown(err) || ctx.Err() != nil {
			return c.explain(err)
		}
	}
}

func (c *Cluster) push(ctx context.Context, content remote.Taggable, ref string, note func(string)) error {
	tag, options, err := c.options(ctx, ref)
	if err != nil {
		return err
	}
	updates := make(chan v1.Update, 64)
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		last := time.Now()
		for u := range updates {
			if u.Error == nil && u.Total > 0 && time.Since(last) > progressInterval {
				last = time.Now()
				note(fmt.Sprintf("pushing, %d of %d MB", u.Complete>>20, (u.Total+1<<20-1)>>20))
			}
		}
	}()
	err = remote.Push(tag, content, append(options, remote.WithProgress(updates))...)
	<-shown
	return err
}

// unknown reports whether the server that has answered does not have what was pushed before.
func unknown(err error) bool {
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return false
	}
	for _, e := range answer.Errors {
		switch e.Code {
		case transport.BlobUnknownErrorCode, transport.BlobUploadUnknownErrorCode, transport.ManifestBlobUnknownErrorCode:
			return true
		}
	}
	return false
}

// explain returns an error of a push with what to do about it.
func (c *Cluster) explain(err error) error {
	var answer *transport.Error
	if !errors.As(err, &answer) {
		return err
	}
	for _, e := range answer.Errors {
		if e.Code != "" && e.Message != "" {
			return fmt.Errorf("%s: %s", c, e.Message)
		}
	}
	return c.refused(answer.StatusCode)
}

// Deployed implements Destination.
func (c *Cluster) Deployed(ctx context.Context, ref, project, service string) error {
	named, err := parse(ref)
	if err != nil {
		return err
	}
	text, err := json.Marshal(imagestore.Deploy{Project: project, Service: service})
	if err != nil {
		return err
	}
	answer, err := c.ask(ctx, http.MethodPost, c.target(reference.Domain(named), "v2", reference.Path(named), imagestore.DeploysPath, named.Tag()), text)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusAccepted {
		return fmt.Errorf("the image is not marked as deployed: %w", c.refused(answer.StatusCode))
	}
	return nil
}

// SignedPlace implements Destination.
func (c *Cluster) SignedPlace() signature.Place {
	return signature.NewPlace("the cluster", func(registry string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client: &http.Client{Transport: mapped{c, registry}}, Host: registry, Scheme: "https", Path: "/v2",
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush,
		}}, nil
	})
}

// tempDir returns a new folder, and what removes it.
func tempDir() (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp("", "polymesh-image-")
	return dir, func() { _ = os.RemoveAll(dir) }, err
}
