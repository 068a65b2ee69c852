package node

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/klauspost/compress/zstd"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// Images is the component "images": it brings the shipped images, and those that the user has put into
// <data-dir>/agent/images, into containerd before the kubelet can ask for one. Nothing is ever pulled for them.
type Images struct {
	opts   Options
	cancel context.CancelFunc
	result atomic.Pointer[error]
	failed chan error
}

// NewImages returns the component, not yet started.
func NewImages(o Options) *Images { return &Images{opts: o, failed: make(chan error, 1)} }

// Name implements component.Component.
func (i *Images) Name() string { return "images" }

// Init does nothing: the folder is made by Start.
func (i *Images) Init(context.Context) error { return nil }

func (i *Images) dir() string { return i.opts.Config.AgentDir("images") }

// Start makes the folder for the user's archives, and imports in the background.
func (i *Images) Start(ctx context.Context) error {
	if err := os.MkdirAll(i.dir(), 0o755); err != nil {
		return err
	}
	ctx, i.cancel = component.Running(ctx)
	go func() {
		err := i.importAll(ctx)
		i.result.Store(&err)
		if err != nil && ctx.Err() == nil {
			i.failed <- err
		}
	}()
	return nil
}

// Failed yields the error when the shipped images cannot be imported: without the pause image no pod starts.
func (i *Images) Failed() <-chan error { return i.failed }

// Ready is nil once everything is imported.
func (i *Images) Ready(context.Context) error {
	if err := i.result.Load(); err != nil {
		return *err
	}
	return errors.New("importing")
}

// Stop breaks an import off; the next start does it again.
func (i *Images) Stop(context.Context) error {
	if i.cancel != nil {
		i.cancel()
	}
	return nil
}

func (i *Images) importAll(ctx context.Context) error {
	store, err := OpenImageStore(config.ContainerdSocket(i.opts.Config.DataDir))
	if err != nil {
		return err
	}
	defer store.Close()

	mended, err := i.mend(ctx, store)
	if err != nil {
		return err
	}
	present, err := i.shippedPresent(ctx, store)
	if err != nil {
		return err
	}
	if !present || mended {
		archives, err := i.opts.Programs.ImageArchives()
		if err != nil {
			return err
		}
		for _, path := range archives {
			if err := store.Import(ctx, path, map[string]string{
				pinnedLabel: "pinned", payloadLabel: i.payloadID(),
			}); err != nil {
				return err
			}
		}
	}

	theirs, err := os.ReadDir(i.dir())
	if err != nil {
		return fmt.Errorf("list %s: %w", i.dir(), err)
	}
	for _, entry := range theirs {
		if entry.IsDir() || !isArchive(entry.Name()) {
			continue
		}
		// A bad file of the user's must not keep the node down.
		if err := store.Import(ctx, filepath.Join(i.dir(), entry.Name()), nil); err != nil {
			i.opts.Log.Error("image archive skipped", "err", err)
		}
	}
	if mended {
		// Layers that had lost what they are made of have it again.
		if _, err := i.mend(ctx, store); err != nil {
			return err
		}
	}
	return i.opts.Session.Checked()
}

// mend looks at what is there after a power cut, and reports whether something was lost that an import may bring again.
func (i *Images) mend(ctx context.Context, store *ImageStore) (lost bool, err error) {
	if !i.opts.Session.Doubt() {
		return false, nil
	}
	log := i.opts.Log.With("component", i.Name())
	begin := time.Now()
	log.Info("the machine ended without the server: looking whether all images are whole")
	f, err := store.Verify(ctx)
	if err != nil {
		return false, err
	}
	for _, layer := range f.rewritten {
		log.Warn("a layer of an image was torn and was unpacked again", "layer", layer)
	}
	for _, image := range f.lost {
		log.Error("an image has lost content; if it is not a shipped one, import or deploy it again", "image", image)
	}
	log.Info("looked at all images", "after", time.Since(begin).Round(time.Millisecond).String())
	return len(f.lost) > 0, nil
}

// pinnedLabel is CRI's: the kubelet's garbage collection leaves images alone that have it.
const pinnedLabel = "io.cri-containerd.pinned"

// payloadLabel marks the images that came from a payload with its id, so that each is imported once.
const payloadLabel = "polymesh.dev/payload"

func (i *Images) payloadID() string {
	dir, err := filepath.EvalSymlinks(string(i.opts.Programs))
	if err != nil {
		return string(i.opts.Programs)
	}
	return filepath.Base(dir)
}

// shippedPresent reports whether every shipped image of this very payload is in containerd, unpacked.
func (i *Images) shippedPresent(ctx context.Context, store *ImageStore) (bool, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	list, err := store.client.ListImages(ctx, "labels.\""+payloadLabel+"\"=="+i.payloadID())
	if err != nil {
		return false, fmt.Errorf("list images: %w", err)
	}
	for _, ref := range i.opts.Images {
		at := slices.IndexFunc(list, func(image containerd.Image) bool { return image.Name() == ref })
		if at < 0 {
			return false, nil
		}
		if unpacked, err := list[at].IsUnpacked(ctx, snapshotter); err != nil || !unpacked {
			return false, nil
		}
	}
	return true, nil
}

var archiveSuffixes = []string{".tar", ".tar.gz", ".tgz", ".tar.zst"}

func isArchive(name string) bool {
	return slices.ContainsFunc(archiveSuffixes, func(s string) bool { return strings.HasSuffix(name, s) })
}

func decompress(path string, r io.Reader) (io.ReadCloser, error) {
	switch {
	case strings.HasSuffix(path, "gz"):
		return gzip.NewReader(r)
	case strings.HasSuffix(path, ".zst"):
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}
