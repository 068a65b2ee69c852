package node

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// Images is the component "images": it brings the shipped images, and those that the user has put into
// <data-dir>/agent/images, into containerd before the kubelet can ask for one, and pins what no registry has for as long as
// it may be wanted (see pins). Nothing is ever pulled for them.
type Images struct {
	opts   Options
	cancel context.CancelFunc
	done   chan struct{}
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

// Start makes the folder for the user's archives, imports in the background, and goes on to pin.
func (i *Images) Start(ctx context.Context) error {
	if err := os.MkdirAll(i.dir(), 0o755); err != nil {
		return err
	}
	ctx, i.cancel = component.Running(ctx)
	i.done = make(chan struct{})
	go func() {
		defer close(i.done)
		w, err := i.importAll(ctx)
		i.result.Store(&err)
		if err != nil {
			if ctx.Err() == nil {
				i.failed <- err
			}
			return
		}
		i.keepPinned(ctx, w)
	}()
	return nil
}

// keepPinned also finds what others import while the server runs.
func (i *Images) keepPinned(ctx context.Context, w wanted) {
	ticker := time.NewTicker(pinInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		store, err := OpenImageStore(config.ContainerdSocket(i.opts.Config.DataDir))
		if err == nil {
			err = errors.Join(store.pin(ctx, w), store.Close())
		}
		if err != nil && ctx.Err() == nil {
			i.opts.Log.Warn("images that no registry has are not pinned", "component", i.Name(), "err", err)
		}
	}
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
func (i *Images) Stop(ctx context.Context) error {
	if i.cancel == nil {
		return nil
	}
	i.cancel()
	select {
	case <-i.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("still importing: %w", ctx.Err())
	}
}

// importAll returns the payloads and archives that there are.
func (i *Images) importAll(ctx context.Context) (wanted, error) {
	store, err := OpenImageStore(config.ContainerdSocket(i.opts.Config.DataDir))
	if err != nil {
		return wanted{}, err
	}
	defer store.Close()

	w, err := i.restore(ctx, store)
	if err != nil {
		return wanted{}, err
	}
	if err := i.opts.Session.Checked(); err != nil {
		return wanted{}, err
	}
	if err := store.pin(ctx, w); err != nil && ctx.Err() == nil {
		i.opts.Log.Warn("images that no registry has are not pinned", "component", i.Name(), "err", err)
	}
	return w, nil
}

// restore imports what is missing, after a look at what is there. What a power cut has damaged is found step by step, because
// an image's layers are known when its manifest is there: it looks until nothing more comes back.
func (i *Images) restore(ctx context.Context, store *ImageStore) (wanted, error) {
	var before []string
	for {
		lost, err := i.mend(ctx, store)
		if err != nil {
			return wanted{}, err
		}
		w := wanted{payloads: i.payloads(), archives: map[string]bool{}}
		again := len(lost) > 0 && !slices.Equal(lost, before)
		if err := i.importShipped(ctx, store, again && slices.ContainsFunc(lost, func(name string) bool { return slices.Contains(i.opts.Manifest.Images, name) })); err != nil {
			return wanted{}, err
		}
		if err := i.importTheirs(ctx, store, w, again); err != nil {
			return wanted{}, err
		}
		if len(lost) > 0 && !again {
			i.opts.Log.Error("images have lost content that no archive here has: import or deploy them again", "component", i.Name(), "images", lost)
		}
		if !again {
			return w, nil
		}
		before = lost
	}
}

func (i *Images) importShipped(ctx context.Context, store *ImageStore, again bool) error {
	archives, err := i.opts.Programs.ImageArchives()
	if err != nil {
		return err
	}
	present, err := i.shippedPresent(ctx, store, archives)
	if err != nil || present && !again {
		return err
	}
	for _, path := range archives {
		if err := store.Import(ctx, path, map[string]string{
			pinnedLabel: pinnedValue, payloadLabel: i.payloadID(),
		}); err != nil {
			return err
		}
	}
	return nil
}

// importTheirs imports the user's archives, those whose images are there too where again is set, and notes them in w.
func (i *Images) importTheirs(ctx context.Context, store *ImageStore, w wanted, again bool) error {
	theirs, err := os.ReadDir(i.dir())
	if err != nil {
		return fmt.Errorf("list %s: %w", i.dir(), err)
	}
	for _, entry := range theirs {
		if entry.IsDir() || !isArchive(entry.Name()) {
			continue
		}
		// A bad file of the user's must not keep the node down.
		key, err := store.importArchive(ctx, filepath.Join(i.dir(), entry.Name()), again)
		if err != nil {
			i.opts.Log.Error("image archive skipped", "err", err)
		}
		if key != "" {
			w.archives[key] = true
		}
	}
	return nil
}

// importArchive brings in an archive of the user's, unless all its images are there from an earlier start and again is not
// set. The key names the archive as it is now.
func (s *ImageStore) importArchive(ctx context.Context, path string, again bool) (key string, err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %d %d", filepath.Base(path), info.Size(), info.ModTime().UnixNano()))
	key = hex.EncodeToString(sum[:16])
	list, err := s.client.ListImages(ctx, fmt.Sprintf("labels.%q==%s", archiveLabel, key))
	if err != nil {
		return key, fmt.Errorf("list images: %w", err)
	}
	unpacked := 0
	for _, image := range list {
		if ok, err := image.IsUnpacked(ctx, snapshotter); err == nil && ok && image.Labels()[archiveCountLabel] == strconv.Itoa(len(list)) {
			unpacked++
		}
	}
	if len(list) > 0 && unpacked == len(list) && !again {
		return key, nil
	}
	imported, err := s.load(ctx, path, map[string]string{pinnedLabel: pinnedValue, archiveLabel: key})
	if err != nil {
		return key, err
	}
	names := map[string]bool{}
	for _, image := range imported {
		names[image.Name] = true
	}
	for name := range names {
		if err := s.label(ctx, name, map[string]string{archiveCountLabel: strconv.Itoa(len(names))}); err != nil {
			return key, err
		}
	}
	return key, nil
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

func (i *Images) payloadID() string {
	dir, err := filepath.EvalSymlinks(string(i.opts.Programs))
	if err != nil {
		return string(i.opts.Programs)
	}
	return filepath.Base(dir)
}

// payloads are this one and the one before, whose programs are kept too.
func (i *Images) payloads() map[string]bool {
	ids := map[string]bool{i.payloadID(): true}
	entries, _ := os.ReadDir(filepath.Dir(string(i.opts.Programs)))
	for _, e := range entries {
		if e.IsDir() {
			ids[e.Name()] = true
		}
	}
	return ids
}

// shippedPresent reports whether every shipped image of this very payload is in containerd, unpacked: under its name there
// is what the archives have, which the launcher has checked against payload.json.
func (i *Images) shippedPresent(ctx context.Context, store *ImageStore, archives []string) (bool, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	list, err := store.client.ListImages(ctx, fmt.Sprintf("labels.%q==%s", payloadLabel, i.payloadID()))
	if err != nil {
		return false, fmt.Errorf("list images: %w", err)
	}
	digests := map[string]digest.Digest{}
	for _, path := range archives {
		if err := readIndex(path, digests); err != nil {
			return false, err
		}
	}
	for _, ref := range i.opts.Manifest.Images {
		at := slices.IndexFunc(list, func(image containerd.Image) bool { return image.Name() == ref })
		if at < 0 || list[at].Target().Digest != digests[ref] {
			return false, nil
		}
		if unpacked, err := list[at].IsUnpacked(ctx, snapshotter); err != nil || !unpacked {
			return false, nil
		}
	}
	return true, nil
}

// readIndex adds the digests of the images in an OCI archive, by their names.
func readIndex(path string, digests map[string]digest.Digest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// The reader seeks over what is not asked for.
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return fmt.Errorf("%s has no %s", path, ocispec.ImageIndexFile)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if header.Name != ocispec.ImageIndexFile {
			continue
		}
		var index ocispec.Index
		if err := json.NewDecoder(archive).Decode(&index); err != nil {
			return fmt.Errorf("read %s in %s: %w", ocispec.ImageIndexFile, path, err)
		}
		for _, m := range index.Manifests {
			digests[m.Annotations[images.AnnotationImageName]] = m.Digest
		}
		return nil
	}
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
