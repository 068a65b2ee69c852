package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/imagestore"
)

// pinInterval is how often new images are pinned that were imported in other ways. The kubelet removes none younger than two minutes.
const pinInterval = 20 * time.Second

// Images is the component "images": it imports the shipped images, and those in <data-dir>/agent/images, into containerd
// before the kubelet needs them, and pins images that no registry has while they may be needed (see imagestore for the
// rules). It never pulls.
type Images struct {
	component.Background // an import that is broken off is done again by the next start
	opts                 Options
	result               atomic.Pointer[error]
	failed               chan error
}

// NewImages returns the component, not yet started.
func NewImages(o Options) *Images { return &Images{opts: o, failed: make(chan error, 1)} }

// Name implements component.Component.
func (i *Images) Name() string { return "images" }

// Init does nothing: Start creates the folder.
func (i *Images) Init(context.Context) error { return nil }

func (i *Images) dir() string { return i.opts.Settings.DataDir.Agent("images") }

// Start creates the folder for the user's archives, imports in the background, and then keeps images pinned.
func (i *Images) Start(ctx context.Context) error {
	if err := os.MkdirAll(i.dir(), 0o755); err != nil {
		return err
	}
	i.Go(ctx, func(ctx context.Context) {
		w, err := i.importAll(ctx)
		i.result.Store(&err)
		if err != nil {
			if ctx.Err() == nil {
				i.failed <- err
			}
			return
		}
		i.keepPinned(ctx, w)
	})
	return nil
}

// keepPinned also finds images imported by others while the server runs.
func (i *Images) keepPinned(ctx context.Context, w imagestore.Wanted) {
	ticker := time.NewTicker(pinInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		store, err := imagestore.Open(i.opts.Settings.DataDir.ContainerdSocket())
		if err == nil {
			err = errors.Join(store.Pin(ctx, w), store.Close())
		}
		if err != nil && ctx.Err() == nil {
			i.opts.Log.Warn("cannot pin images that no registry has", "component", i.Name(), "err", err)
		}
	}
}

// Failed yields the error if the shipped images cannot be imported: without the pause image no pod starts.
func (i *Images) Failed() <-chan error { return i.failed }

// Ready returns nil once everything is imported.
func (i *Images) Ready(context.Context) error {
	if err := i.result.Load(); err != nil {
		return *err
	}
	return errors.New("importing")
}

// importAll returns the payloads and archives that there are.
func (i *Images) importAll(ctx context.Context) (imagestore.Wanted, error) {
	store, err := imagestore.Open(i.opts.Settings.DataDir.ContainerdSocket())
	if err != nil {
		return imagestore.Wanted{}, err
	}
	defer store.Close()

	w, err := i.restore(ctx, store)
	if err != nil {
		return imagestore.Wanted{}, err
	}
	if err := i.opts.Session.Checked(); err != nil {
		return imagestore.Wanted{}, err
	}
	if err := store.Pin(ctx, w); err != nil && ctx.Err() == nil {
		i.opts.Log.Warn("cannot pin images that no registry has", "component", i.Name(), "err", err)
	}
	return w, nil
}

// restore imports missing images, after checking the existing ones. Damage from a power failure is found in steps, because an
// image's layers are known only once its manifest is restored: it repeats until nothing more is restored.
func (i *Images) restore(ctx context.Context, store *imagestore.Store) (imagestore.Wanted, error) {
	var before []string
	for {
		lost, err := i.repair(ctx, store)
		if err != nil {
			return imagestore.Wanted{}, err
		}
		w := imagestore.Wanted{Payloads: i.payloads(), Archives: map[string]bool{}}
		again := len(lost) > 0 && !slices.Equal(lost, before)
		if err := i.importShipped(ctx, store, again && slices.ContainsFunc(lost, func(name string) bool { return slices.Contains(i.opts.Manifest.Images, name) })); err != nil {
			return imagestore.Wanted{}, err
		}
		if err := i.importTheirs(ctx, store, w, again); err != nil {
			return imagestore.Wanted{}, err
		}
		if len(lost) > 0 && !again {
			i.opts.Log.Error("images have lost content that is in no local archive: import or deploy them again", "component", i.Name(), "images", lost)
		}
		if !again {
			return w, nil
		}
		before = lost
	}
}

func (i *Images) importShipped(ctx context.Context, store *imagestore.Store, again bool) error {
	archives, err := i.opts.Programs.ImageArchives()
	if err != nil {
		return err
	}
	present, err := store.HasPayload(ctx, i.payloadID(), i.opts.Manifest.Images, archives)
	if err != nil || present && !again {
		return err
	}
	for _, path := range archives {
		if err := store.ImportPayload(ctx, i.payloadID(), path); err != nil {
			return err
		}
	}
	return nil
}

// importTheirs imports the user's archives, with again also those whose images exist, and adds them to w.
func (i *Images) importTheirs(ctx context.Context, store *imagestore.Store, w imagestore.Wanted, again bool) error {
	theirs, err := os.ReadDir(i.dir())
	if err != nil {
		return fmt.Errorf("list %s: %w", i.dir(), err)
	}
	for _, entry := range theirs {
		if entry.IsDir() || !imagestore.IsArchive(entry.Name()) {
			continue
		}
		// An invalid file of the user must not keep the node from starting.
		key, err := store.ImportArchive(ctx, filepath.Join(i.dir(), entry.Name()), again)
		if err != nil {
			i.opts.Log.Error("image archive skipped", "err", err)
		}
		if key != "" {
			w.Archives[key] = true
		}
	}
	return nil
}

// repair checks all images after a power failure, and returns those that have lost content which an import may
// restore.
func (i *Images) repair(ctx context.Context, store *imagestore.Store) (lost []string, err error) {
	if !i.opts.Session.Doubt() {
		return nil, nil
	}
	log := i.opts.Log.With("component", i.Name())
	begin := time.Now()
	log.Info("the machine was not shut down properly: checking all images")
	f, err := store.Verify(ctx)
	if err != nil {
		return nil, err
	}
	for _, layer := range f.Rewritten {
		log.Warn("a damaged layer of an image was unpacked again", "layer", layer)
	}
	log.Info("checked all images", "after", time.Since(begin).Round(time.Millisecond).String(), "without content", f.Lost)
	slices.Sort(f.Lost)
	return f.Lost, nil
}

func (i *Images) payloadID() string {
	dir, err := filepath.EvalSymlinks(string(i.opts.Programs))
	if err != nil {
		return string(i.opts.Programs)
	}
	return filepath.Base(dir)
}

// payloads returns the ids of this payload and the previous one, whose programs are kept too.
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
