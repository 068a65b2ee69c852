package signature

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
)

// Bounds of a registry's answers: it is asked about images before anything is known about it.
const (
	// maxBlob is how much is read of what is stored beside an image: a manifest or a payload, some kilobytes.
	maxBlob = 4 << 20
	// maxAnswer is how much is read of any answer, such as one with a token.
	maxAnswer = 2 * maxBlob
	// answerTime is how long one request may take, its answer included, and operationTime all requests of one operation.
	answerTime    = 30 * time.Second
	operationTime = 2 * time.Minute
	maxRedirects  = 5
)

// Registry is the registry that an image's name says.
type Registry struct {
	hosts  string
	logins credentialprovider.DockerKeyring
}

// NewRegistry returns the registries as containerd reaches them. hosts is containerd's folder with a hosts.toml for each
// (https://github.com/containerd/containerd/blob/main/docs/hosts.md); it need not exist.
func NewRegistry(hosts string, logins credentialprovider.DockerKeyring) *Registry {
	return &Registry{hosts, logins}
}

// UserLogins are those of `buildah login`, `podman login` and `docker login`. Of Docker's, those that a helper program
// keeps are not among them.
func UserLogins() (credentialprovider.DockerKeyring, error) {
	files := []string{os.Getenv("REGISTRY_AUTH_FILE"), fmt.Sprintf("/run/containers/%d/auth.json", os.Geteuid())}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		files = append(files, filepath.Join(dir, "containers", "auth.json"))
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		files = append(files, filepath.Join(dir, "config.json"))
	}
	if home, err := os.UserHomeDir(); err == nil {
		files = append(files, filepath.Join(home, ".docker", "config.json"))
	}
	logins := &credentialprovider.BasicDockerKeyring{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if file == "" || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the logins of registries: %w", err)
		}
		var found credentialprovider.DockerConfigJSON
		if err := json.Unmarshal(text, &found); err != nil {
			return nil, fmt.Errorf("read the logins of registries: %s: %w", file, err)
		}
		logins.Add(nil, found.Auths)
	}
	return logins, nil
}

// resolver reaches the registry of a name.
func (r *Registry) resolver(ctx context.Context, name string) remotes.Resolver {
	login := func(string) (string, string, error) {
		if found, ok := r.logins.Lookup(name); ok {
			return found[0].Username, found[0].Password, nil
		}
		return "", "", nil
	}
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(r.hosts), Credentials: login, UpdateClient: bound}),
	})
}

// bound makes a client that is not kept waiting, and reads no more than maxAnswer. Registries redirect to where they have
// their blobs, which are checked by their digests; a redirect may not leave TLS.
func bound(client *http.Client) error {
	client.Timeout = answerTime
	client.Transport = limited{client.Transport}
	client.CheckRedirect = func(next *http.Request, before []*http.Request) error {
		switch {
		case len(before) > maxRedirects:
			return fmt.Errorf("more than %d redirects", maxRedirects)
		case before[0].URL.Scheme == "https" && next.URL.Scheme != "https":
			return fmt.Errorf("a redirect from https to %s", next.URL.Scheme)
		}
		return nil
	}
	return nil
}

// limited is a transport whose answers have an end.
type limited struct{ next http.RoundTripper }

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := l.next.RoundTrip(r)
	if err == nil {
		answer.Body = &limitedBody{answer.Body, maxAnswer}
	}
	return answer, err
}

type limitedBody struct {
	io.ReadCloser
	left int
}

func (b *limitedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	return n, err
}

// String implements fmt.Stringer.
func (r *Registry) String() string { return "the registry" }

// Digest implements Place.
func (r *Registry) Digest(ctx context.Context, image string) (digest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, operationTime)
	defer cancel()
	_, found, err := r.resolver(ctx, image).Resolve(ctx, image)
	return found.Digest, err
}

// Copied implements Place: it is where images come from.
func (r *Registry) Copied(context.Context, Image) (bool, error) { return false, nil }

// ImageManifest implements Place: a registry does not tell images from what else it stores.
func (r *Registry) ImageManifest(ctx context.Context, name string) ([]byte, error) {
	return r.Manifest(ctx, name)
}

// Manifest implements Place.
func (r *Registry) Manifest(ctx context.Context, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, operationTime)
	defer cancel()
	_, found, err := r.resolver(ctx, name).Resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	return r.Blob(ctx, name, found)
}

// Blob implements Place.
func (r *Registry) Blob(ctx context.Context, name string, blob ocispec.Descriptor) ([]byte, error) {
	if err := checkBlob(blob); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, operationTime)
	defer cancel()
	fetcher, err := r.resolver(ctx, name).Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	body, err := fetcher.Fetch(ctx, blob)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	content, err := io.ReadAll(io.LimitReader(body, maxBlob+1))
	if err != nil {
		return nil, err
	}
	if got := blob.Digest.Algorithm().FromBytes(content); got != blob.Digest || len(content) > maxBlob {
		return nil, fmt.Errorf("the registry sent %s for %s of %s", got, blob.Digest, name)
	}
	return content, nil
}

// Put implements Place.
func (r *Registry) Put(ctx context.Context, name string, manifest Blob, blobs ...Blob) error {
	ctx, cancel := context.WithTimeout(ctx, operationTime)
	defer cancel()
	pusher, err := r.resolver(ctx, name).Pusher(ctx, name)
	if err != nil {
		return err
	}
	for _, b := range append(blobs, manifest) {
		if err := push(ctx, pusher, b); err != nil {
			host, _, _ := strings.Cut(name, "/")
			return fmt.Errorf("push to %s: %w (log in with `buildah login %s` if it asks for that)", name, err, host)
		}
	}
	return nil
}

func push(ctx context.Context, pusher remotes.Pusher, b Blob) (err error) {
	w, err := pusher.Push(ctx, b.Descriptor)
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := w.Write(b.Content); err != nil {
		return err
	}
	if err := w.Commit(ctx, b.Size, b.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return nil
}
