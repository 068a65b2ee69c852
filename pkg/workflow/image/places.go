package image

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"k8s.io/client-go/rest"

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

// Destination is where images go that are in no registry, and where they can be read and signed.
type Destination interface {
	Store
	// Notice says that images are pushed from this machine, where to and why; empty for its own node.
	Notice() string
	// Load brings an image there from an archive that an Engine has written, under a full name. note is called while it takes long.
	Load(ctx context.Context, archive, ref string, note func(string)) error
	// LoadAll is Load for the images in an archive that OpenArchive has returned, under their own names. They stay until the user removes them.
	LoadAll(ctx context.Context, archive string, list []Archived, note func(string)) error
	// Deployed records for which service of which project an image is used, so that it is kept; see imagestore.Store.
	Deployed(ctx context.Context, ref, project, service string) error
	SignedPlace() signature.Place
	io.Closer
}

// Node is this machine's node as a Destination.
type Node struct{ *imagestore.Store }

var _ Destination = Node{}

// Has implements Store.
func (n Node) Has(ctx context.Context, ref string) (bool, error) { return n.Unpacked(ctx, ref) }

// Notice implements Destination.
func (Node) Notice() string { return "" }

// Load implements Destination.
func (n Node) Load(ctx context.Context, archive, _ string, note func(string)) error {
	note("loading")
	return n.Import(ctx, archive, nil)
}

// LoadAll implements Destination.
func (n Node) LoadAll(ctx context.Context, archive string, _ []Archived, note func(string)) error {
	note("loading")
	return n.Store.Load(ctx, archive)
}

// SignedPlace implements Destination.
func (n Node) SignedPlace() signature.Place { return n.Signatures() }

var _ Destination = (*Cluster)(nil)

// OpenDestination returns where images for a cluster go: to this machine's node, if it is one of the cluster and this user may use its
// containerd, or else through the cluster's API server, below a prefix as for OpenCluster. authorities are the files with the authorities of
// this machine's cluster that a node has; see layout.DataDir.
func OpenDestination(ctx context.Context, socket string, authorities []string, config *rest.Config, prefix string) (Destination, error) {
	store, err := OpenNode(socket)
	switch {
	case err == nil && isCluster(config, authorities):
		return Node{store}, nil
	case err == nil:
		if err := store.Close(); err != nil {
			return nil, err
		}
		err = errors.New("this machine is a node of another cluster")
	case !errors.Is(err, ErrNoNode):
		return nil, err
	}
	cluster, clusterErr := OpenCluster(ctx, config, prefix)
	if errors.Is(clusterErr, ErrNotTaken) {
		return nil, fmt.Errorf("images cannot be loaded: %w (%w). Use --registry for another cluster, sudo for this machine's", clusterErr, err)
	}
	if clusterErr != nil {
		return nil, clusterErr
	}
	return cluster, nil
}

// isCluster reports whether a kubeconfig is of the cluster that has one of these authorities. One without an authority may be.
func isCluster(config *rest.Config, authorities []string) bool {
	theirs := config.CAData
	if len(theirs) == 0 && config.CAFile != "" {
		theirs, _ = os.ReadFile(config.CAFile)
	}
	known, here := certificates(theirs), false
	for _, file := range authorities {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for own := range certificates(text) {
			here = true
			if known[own] {
				return true
			}
		}
	}
	return here && len(known) == 0
}

// certificates returns the certificates in a PEM text, in DER form.
func certificates(text []byte) map[string]bool {
	found := map[string]bool{}
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			return found
		}
		if block.Type == "CERTIFICATE" {
			found[string(block.Bytes)] = true
		}
		text = rest
	}
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
