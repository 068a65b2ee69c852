package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/imagestore"
)

// pinInterval is how often new images are pinned that were imported in other ways. The kubelet removes none younger than two minutes.
const pinInterval = 20 * time.Second

// Images is the component "images": it imports the shipped images, and those in <data-dir>/agent/images, into containerd,
// and pins images that no registry has while they may be needed (see imagestore for the rules). It never pulls.
//
// The kubelet waits for what no pod can start without (First). The other shipped images are imported behind it; what asks for one of
// them, by Await, waits for it and has it imported next.
type Images struct {
	component.Background // an import that is interrupted is done again by the next start
	opts                 Options
	result               atomic.Pointer[error]
	failed               chan error
	first                chan struct{} // closed when the kubelet can start
	shipped              *importQueue
	gate                 *imageGate
}

// NewImages returns the component, not yet started.
func NewImages(o Options) *Images {
	i := &Images{opts: o, failed: make(chan error, 1), first: make(chan struct{}), shipped: newImportQueue(o.Manifest.Images)}
	i.gate = newImageGate(o.Settings.DataDir.ContainerdSocket(), i.Await)
	return i
}

// First returns when the kubelet can start: the image of pods' sandboxes and the user's archives are there, and, after a power failure,
// all images are checked.
func (i *Images) First(ctx context.Context) error {
	select {
	case <-i.first:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Await returns when an image, by the name in a pod, is imported, at once if it is none of the shipped ones. An error means that it will
// not be: the import has failed, or ctx ended.
func (i *Images) Await(ctx context.Context, ref string) error {
	if !strings.HasPrefix(ref, imagestore.ShippedRegistry+"/") {
		return nil
	}
	return i.shipped.await(ctx, ref)
}

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
	if err := i.gate.start(i.opts.Settings.DataDir.ImageSocket()); err != nil {
		return fmt.Errorf("serve images to the kubelet: %w", err)
	}
	i.Go(ctx, func(ctx context.Context) {
		w, err := i.importAll(ctx)
		i.result.Store(&err)
		if err != nil {
			i.shipped.fail(err)
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
	component.Rounds(ctx, nil, pinInterval, func(ctx context.Context) {
		store, err := imagestore.Open(i.opts.Settings.DataDir.ContainerdSocket())
		if err == nil {
			err = errors.Join(store.Pin(ctx, w), store.Close())
		}
		if err != nil && ctx.Err() == nil {
			i.opts.Log.Warn("cannot pin images that no registry has", "component", i.Name(), "err", err)
		}
	})
}

// Failed yields the error if the shipped images cannot be imported: without the pause image no pod starts.
func (i *Images) Failed() <-chan error { return i.failed }

// Ready returns nil once everything is imported.
func (i *Images) Ready(context.Context) error {
	if err := i.result.Load(); err != nil {
		return *err
	}
	if left := i.shipped.left(); left > 0 {
		return fmt.Errorf("importing: %d of %d shipped images are missing; pods of those wait", left, len(i.opts.Manifest.Images))
	}
	return errors.New("importing")
}

// Stop implements component.Component.
func (i *Images) Stop(ctx context.Context) error {
	err := i.Background.Stop(ctx)
	i.gate.stop()
	return err
}

// importAll returns the payloads and archives that there are.
func (i *Images) importAll(ctx context.Context) (imagestore.Wanted, error) {
	store, err := imagestore.Open(i.opts.Settings.DataDir.ContainerdSocket())
	if err != nil {
		return imagestore.Wanted{}, err
	}
	defer store.Close()
	archives, err := i.opts.Programs.ImageArchives()
	if err != nil {
		return imagestore.Wanted{}, err
	}
	shipped, err := imagestore.OpenPayload(i.payloadID(), archives)
	if err != nil {
		return imagestore.Wanted{}, err
	}
	defer shipped.Close()

	w := i.wanted()
	if i.opts.Session.Doubt() {
		w, err = i.restore(ctx, store, shipped)
	} else if err = i.importFirst(ctx, store, shipped); err == nil {
		err = i.importTheirs(ctx, store, w, false)
	}
	if err != nil {
		return imagestore.Wanted{}, err
	}
	if err := i.opts.Session.Checked(); err != nil {
		return imagestore.Wanted{}, err
	}
	close(i.first)
	if err := i.importRest(ctx, store, shipped); err != nil {
		return imagestore.Wanted{}, err
	}
	if err := store.Pin(ctx, w); err != nil && ctx.Err() == nil {
		i.opts.Log.Warn("cannot pin images that no registry has", "component", i.Name(), "err", err)
	}
	return w, nil
}

func (i *Images) wanted() imagestore.Wanted {
	return imagestore.Wanted{Payloads: i.payloads(), Archives: map[string]bool{}}
}

// importFirst finds out which shipped images are missing, and imports the one that every pod needs.
func (i *Images) importFirst(ctx context.Context, store *imagestore.Store, shipped *imagestore.Payload) error {
	missing, err := store.Missing(ctx, shipped, i.opts.Manifest.Images)
	if err != nil {
		return err
	}
	i.shipped.keep(missing)
	pause, err := i.opts.Manifest.Image("pause")
	if err != nil {
		return err
	}
	if !slices.Contains(missing, pause) {
		return nil
	}
	return i.importShipped(ctx, store, shipped, pause)
}

// importShipped returns when the kubelet can use the image: containerd's image service learns of it by an event.
func (i *Images) importShipped(ctx context.Context, store *imagestore.Store, shipped *imagestore.Payload, ref string) error {
	if err := store.ImportShipped(ctx, shipped, ref); err != nil {
		return err
	}
	if err := i.gate.known(ctx, ref); err != nil {
		return err
	}
	i.shipped.imported(ref)
	return nil
}

// parallelImports is how many images are imported at the same time: what limits is two cores, or the disk.
const parallelImports = 2

// importRest imports the shipped images that are missing, those that something waits for first.
func (i *Images) importRest(ctx context.Context, store *imagestore.Store, shipped *imagestore.Payload) error {
	g, ctx := errgroup.WithContext(ctx)
	for range parallelImports {
		g.Go(func() error {
			for ref := i.shipped.next(); ref != "" && ctx.Err() == nil; ref = i.shipped.next() {
				if err := i.importShipped(ctx, store, shipped, ref); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

// restore imports missing images, after checking the existing ones. Damage from a power failure is found in steps, because an
// image's layers are known only once its manifest is restored: it repeats until nothing more is restored.
func (i *Images) restore(ctx context.Context, store *imagestore.Store, shipped *imagestore.Payload) (imagestore.Wanted, error) {
	var before []string
	for {
		lost, err := i.repair(ctx, store)
		if err != nil {
			return imagestore.Wanted{}, err
		}
		w := i.wanted()
		again := len(lost) > 0 && !slices.Equal(lost, before)
		missing := i.opts.Manifest.Images
		if !again || !slices.ContainsFunc(lost, func(name string) bool { return slices.Contains(missing, name) }) {
			if missing, err = store.Missing(ctx, shipped, missing); err != nil {
				return imagestore.Wanted{}, err
			}
		}
		for _, ref := range missing {
			if err := i.importShipped(ctx, store, shipped, ref); err != nil {
				return imagestore.Wanted{}, err
			}
		}
		if err := i.importTheirs(ctx, store, w, again); err != nil {
			return imagestore.Wanted{}, err
		}
		if len(lost) > 0 && !again {
			i.opts.Log.Error("images have lost content that is in no local archive: import or deploy them again", "component", i.Name(), "images", lost)
		}
		if !again {
			i.shipped.keep(nil)
			return w, nil
		}
		before = lost
	}
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

// repair checks all images, and returns those that have lost content which an import may
// restore.
func (i *Images) repair(ctx context.Context, store *imagestore.Store) (lost []string, err error) {
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
