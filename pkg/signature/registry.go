package signature

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
)

// maxBlob is how much is read of what is stored beside an image: a manifest or a payload, some kilobytes.
const maxBlob = 4 << 20

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
		Hosts: config.ConfigureHosts(ctx, config.HostOptions{HostDir: config.HostDirFromRoot(r.hosts), Credentials: login}),
	})
}

// String implements fmt.Stringer.
func (r *Registry) String() string { return "the registry" }

// Digest implements Place.
func (r *Registry) Digest(ctx context.Context, image string) (digest.Digest, error) {
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
	_, found, err := r.resolver(ctx, name).Resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	return r.Blob(ctx, name, found)
}

// Blob implements Place.
func (r *Registry) Blob(ctx context.Context, name string, blob ocispec.Descriptor) ([]byte, error) {
	if blob.Size > maxBlob {
		return nil, fmt.Errorf("%s of %s has %d bytes: too many for a signature", blob.Digest, name, blob.Size)
	}
	fetcher, err := r.resolver(ctx, name).Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	body, err := fetcher.Fetch(ctx, blob)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	content, err := io.ReadAll(io.LimitReader(body, maxBlob))
	if err != nil {
		return nil, err
	}
	if got := blob.Digest.Algorithm().FromBytes(content); got != blob.Digest {
		return nil, fmt.Errorf("the registry sent %s for %s of %s", got, blob.Digest, name)
	}
	return content, nil
}

// Put implements Place.
func (r *Registry) Put(ctx context.Context, name string, manifest Blob, blobs ...Blob) error {
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
