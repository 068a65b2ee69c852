package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/signature"
)

// ErrNoNode means that this machine's node cannot be used as a place of images.
var ErrNoNode = errors.New("no Polymesh server runs on this machine, or this user may not use its containerd")

// OpenNode connects to the containerd of this machine's node, by its socket. The error wraps ErrNoNode if there is none, or if
// this user may not use it.
func OpenNode(socket string) (*imagestore.Store, error) {
	store, err := imagestore.Open(socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w (%w)", ErrNoNode, err)
	}
	return store, err
}

// OpenReader returns a reader of all origins; without a node, of the others. engine is a name as for Find. Call Close
// afterwards.
func OpenReader(dir layout.DataDir, engine string) (Reader, error) {
	reader := Reader{Engine: func(ctx context.Context) (Engine, error) { return Find(ctx, engine) }}
	store, err := OpenNode(dir.ContainerdSocket())
	switch {
	case err == nil:
		reader.Node = store
	case !errors.Is(err, ErrNoNode):
		return Reader{}, err
	}
	return reader, nil
}

// Close ends the connection to the node.
func (r Reader) Close() error {
	if c, ok := r.Node.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// SignedOrigins are where images can be signed and verified: signatures are stored next to their images.
func SignedOrigins() []string { return []string{FromNode, FromRegistry} }

// SignedPlaces are where images and their signatures are searched, in this order.
type SignedPlaces struct {
	All  []signature.Place
	node *imagestore.Store
}

// OpenSignedPlaces returns the place that from names, one of SignedOrigins, or both of them if it is empty; without a node, only
// registries. The user's logins are for these. Call Close afterwards.
func OpenSignedPlaces(dir layout.DataDir, from string) (*SignedPlaces, error) {
	if from != "" && !slices.Contains(SignedOrigins(), from) {
		return nil, fmt.Errorf("--from %q is not one of %s", from, strings.Join(SignedOrigins(), ", "))
	}
	p := &SignedPlaces{}
	if from != FromRegistry {
		store, err := OpenNode(dir.ContainerdSocket())
		switch {
		case err == nil:
			p.All, p.node = append(p.All, store.Signatures()), store
		case from != "" || !errors.Is(err, ErrNoNode):
			return nil, fmt.Errorf("the node's images cannot be used: %w", err)
		}
	}
	if from != FromNode {
		registry, err := SignedRegistry(dir.RegistryDir())
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		p.All = append(p.All, registry)
	}
	return p, nil
}

// SignedRegistry is the registry in an image's name, with this user's logins. hosts is containerd's folder with settings of
// registries; it need not exist.
func SignedRegistry(hosts string) (signature.Place, error) {
	logins, err := signature.UserLogins()
	if err != nil {
		return nil, err
	}
	return signature.NewRegistry(hosts, logins), nil
}

// Close ends the connection to the node.
func (p *SignedPlaces) Close() error {
	if p.node == nil {
		return nil
	}
	return p.node.Close()
}
