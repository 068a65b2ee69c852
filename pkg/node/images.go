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

	if err := i.restore(ctx, store); err != nil {
		return err
	}
	return i.opts.Session.Checked()
}

// restore imports what is missing, after a look at what is there. What a power cut has damaged is found step by step, because
// an image's layers are known when its manifest is there: it looks until nothing more comes back.
func (i *Images) restore(ctx context.Context, store *ImageStore) error {
	var before []string
	for {
		lost, err := i.mend(ctx, store)
		if err != nil {
			return err
		}
		if len(lost) > 0 && slices.Equal(lost, before) {
			i.opts.Log.Error("images have lost content that no archive here has: import or deploy them again", "component", i.Name(), "images", lost)
			return nil
		}
		again := slices.ContainsFunc(lost, func(name string) bool { return slices.Contains(i.opts.Images, name) })
		if err := i.importShipped(ctx, store, again); err != nil {
			return err
		}
		if err := i.importTheirs(ctx, store); err != nil {
			return err
		}
		if len(lost) == 0 {
			return nil
		}
		before = lost
	}
}

func (i *Images) importShipped(ctx context.Context, store *ImageStore, again bool) error {
	present, err := i.shippedPresent(ctx, store)
	if err != nil || present && !again {
		return err
	}
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
	return nil
}

func (i *Images) importTheirs(ctx context.Context, store *ImageStore) error {
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
	return nil
}

// mend looks at what is there after a power cut, and returns the images of which something is lost that an import may bring
// again.
func (i *Images) mend(ctx context.Context, store *ImageStore) (lost []string, err error) {
	if !i.opts.Session.Doubt() {
		return nil, nil
	}
	log := i.opts.Log.With("component", i.Name())
	begin := time.Now()
	log.Info("the machine ended without the server: looking whether all images are whole")
	f, err := store.Verify(ctx)
	if err != nil {
		return nil, err
	}
	for _, layer := range f.rewritten {
		log.Warn("a layer of an image was torn and was unpacked again", "layer", layer)
	}
	log.Info("looked at all images", "after", time.Since(begin).Round(time.Millisecond).String(), "without content", f.lost)
	slices.Sort(f.lost)
	return f.lost, nil
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
