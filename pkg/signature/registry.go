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

// Limits for a registry's responses: it is contacted about images before anything is known about it.
const (
	// maxBlob limits what is read of content next to an image, in bytes: a manifest or a payload has a few kilobytes.
	maxBlob = 4 << 20
	// maxAnswer limits what is read of any response, such as one with a token, in bytes.
	maxAnswer = 2 * maxBlob
	// answerTime is the timeout of one request including its response, and operationTime that of all requests of one operation.
	answerTime    = 30 * time.Second
	operationTime = 2 * time.Minute
	maxRedirects  = 5
)

// Registry is the registry in an image's name.
type Registry struct {
	name   string
	hosts  string
	logins credentialprovider.DockerKeyring
	// through is how registries are reached; nil for hosts and logins.
	through docker.RegistryHosts
}

// NewRegistry returns the registries as containerd accesses them. hosts are containerd's folders with a hosts.toml for each
// (https://github.com/containerd/containerd/blob/main/docs/hosts.md), separated by colons; they need not exist.
func NewRegistry(hosts string, logins credentialprovider.DockerKeyring) *Registry {
	return &Registry{name: "the registry", hosts: hosts, logins: logins}
}

// NewPlace returns a place, by the name that messages have, that is used as registries are, and is reached by these hosts.
func NewPlace(name string, through docker.RegistryHosts) *Registry {
	return &Registry{name: name, through: func(registry string) ([]docker.RegistryHost, error) {
		hosts, err := through(registry)
		for i := range hosts {
			if err == nil {
				err = bound(hosts[i].Client)
			}
		}
		return hosts, err
	}}
}

// UserLogins returns the logins of `buildah login`, `podman login` and `docker login`. Docker logins that are kept by a credential
// helper are not included.
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

// resolver returns a resolver for the registry of a name.
func (r *Registry) resolver(ctx context.Context, name string) remotes.Resolver {
	if r.through != nil {
		return docker.NewResolver(docker.ResolverOptions{Hosts: r.through})
	}
	login := func(string) (string, string, error) {
		if found, ok := r.logins.Lookup(name); ok {
			return found[0].Username, found[0].Password, nil
		}
		return "", "", nil
	}
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: hostDir(r.hosts), Credentials: login, UpdateClient: bound}),
	})
}

// hostDir returns a function that finds a registry's folder, in the first of the folders that has one, as containerd does
// (hostDirFromRoots in internal/cri/server/images/image_pull.go).
func hostDir(roots string) func(string) (string, error) {
	return func(host string) (dir string, err error) {
		for _, root := range filepath.SplitList(roots) {
			if dir, err = config.HostDirFromRoot(root)(host); dir != "" || err != nil && !errdefs.IsNotFound(err) {
				break
			}
		}
		return dir, err
	}
}

// bound returns a client with a timeout that reads no more than maxAnswer. Registries redirect to the storage of
// their blobs, which are checked by digest; a redirect must not downgrade from TLS.
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

// limited is a transport that limits the size of responses.
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
		return 0, fmt.Errorf("the response has more than %d bytes", maxAnswer)
	}
	return n, err
}

// String implements fmt.Stringer.
func (r *Registry) String() string { return r.name }

// Digest implements Place.
func (r *Registry) Digest(ctx context.Context, image string) (digest.Digest, error) {
	ctx, cancel := context.WithTimeout(ctx, operationTime)
	defer cancel()
	_, found, err := r.resolver(ctx, image).Resolve(ctx, image)
	return found.Digest, err
}

// Copied implements Place: a registry is the source of images.
func (r *Registry) Copied(context.Context, Image) (bool, error) { return false, nil }

// ImageManifest implements Place: a registry does not distinguish images from its other content.
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
			return fmt.Errorf("push to %s: %w (log in with `buildah login %s` if the registry requires it)", name, err, host)
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
