package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
	"k8s.io/kubernetes/pkg/kubelet/allocation/state"
	"k8s.io/kubernetes/pkg/kubelet/checkpointmanager"
	drastate "k8s.io/kubernetes/pkg/kubelet/cm/dra/state"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// checkpoints are the kubelet's state files with a checksum, by upstream's types. Those of the CPU, memory and device
// managers have checksums too, in several formats; if damaged, they are not valid JSON.
var checkpoints = map[string]func() checkpointmanager.Checkpoint{
	"allocated_pods_state": func() checkpointmanager.Checkpoint { return &state.Checkpoint{} },
	"actuated_pods_state":  func() checkpointmanager.Checkpoint { return &state.Checkpoint{} },
	"dra_manager_state":    func() checkpointmanager.Checkpoint { return &drastate.Checkpoint{} },
}

// deviceCheckpoint is the device manager's file, in the kubelet's folder.
const deviceCheckpoint = "device-plugins/kubelet_internal_checkpoint"

// setTornCheckpointsAside renames the kubelet's damaged state files below dir to NAME.broken-TIME. The kubelet
// recreates them from the running containers: after a power failure there are none.
func setTornCheckpointsAside(dir string, log *slog.Logger) error {
	files, err := filepath.Glob(filepath.Join(dir, "*_state"))
	if err != nil {
		return err
	}
	for _, path := range append(files, filepath.Join(dir, filepath.FromSlash(deviceCheckpoint))) {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read the kubelet's state: %w", err)
		}
		problem := readCheckpoint(filepath.Base(path), text)
		if problem == nil {
			continue
		}
		aside, err := setAside(path)
		if err != nil {
			return fmt.Errorf("rename a damaged state file of the kubelet: %w", err)
		}
		log.Warn("a state file of the kubelet is damaged, probably by a power failure: it was renamed and the kubelet creates a new one", "file", path, "now", aside, "err", problem)
	}
	return nil
}

// readCheckpoint reads a state file as the kubelet does, which exits at each start if that fails ("please drain this node
// and delete …").
func readCheckpoint(name string, text []byte) error {
	made, known := checkpoints[name]
	if !known {
		var content json.RawMessage
		return json.Unmarshal(text, &content)
	}
	c := made()
	if err := c.UnmarshalCheckpoint(text); err != nil {
		return err
	}
	return c.VerifyChecksum()
}

// removeHalfMadeLayers removes the folders of layers that are not in containerd's database: the remains of layers that were
// being unpacked. A later layer will get the same name, and fail ("failed to rename … file exists"). containerd must
// not be running; while it runs, it removes such folders itself, but only after removing a layer.
func removeHalfMadeLayers(ctx context.Context, dir string) error {
	root := filepath.Join(dir, filepath.FromSlash(filepath.Dir(metadata[1])))
	if _, err := os.Stat(filepath.Join(root, filepath.Base(metadata[1]))); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list layers: %w", err)
	}
	store, err := storage.NewMetaStore(filepath.Join(root, filepath.Base(metadata[1])))
	if err != nil {
		return fmt.Errorf("open the database of layers: %w", err)
	}
	var known map[string]string
	err = store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		known, err = storage.IDMap(ctx)
		return err
	})
	if err = errors.Join(err, store.Close()); err != nil {
		return fmt.Errorf("read the database of layers: %w", err)
	}
	for _, e := range entries {
		if _, ok := known[e.Name()]; ok || !e.IsDir() {
			continue
		}
		if err := os.RemoveAll(filepath.Join(root, "snapshots", e.Name())); err != nil {
			return fmt.Errorf("remove an incomplete layer: %w", err)
		}
	}
	return nil
}

// setAside renames a file or folder to NAME.broken-TIME and returns the new name.
func setAside(path string) (string, error) {
	aside := path + ".broken-" + time.Now().UTC().Format("20060102-150405")
	for i := 2; ; i++ {
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			return aside, atomicfile.Rename(path, aside)
		}
		aside = fmt.Sprintf("%s.broken-%s-%d", path, time.Now().UTC().Format("20060102-150405"), i)
	}
}

// metadata are containerd's essential databases: the list of images, and which folder is which layer.
var metadata = []string{"io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db"}

// setTornMetadataAside checks containerd's databases. A damaged one makes containerd exit at every start. Then its whole folder
// is renamed, or only that database if the rest can be used without it. containerd must not be running.
func setTornMetadataAside(dir string, log *slog.Logger) error {
	for _, name := range metadata {
		problem := checkBolt(filepath.Join(dir, filepath.FromSlash(name)))
		if problem == nil {
			continue
		}
		aside, err := setAside(dir)
		if err != nil {
			return fmt.Errorf("rename containerd's damaged folder: %w", err)
		}
		log.Error("a database of containerd is damaged, probably by a power failure: its folder was renamed; shipped images are imported again, others must be restored (polymesh deploy, polymesh image import); remove the old folder when nothing is missing",
			"database", name, "now", aside, "err", problem)
		return nil
	}
	others, err := filepath.Glob(filepath.Join(dir, "io.containerd.*", "*.db"))
	if err != nil {
		return err
	}
	for _, path := range others {
		problem := checkBolt(path)
		if problem == nil {
			continue
		}
		aside, err := setAside(path)
		if err != nil {
			return fmt.Errorf("rename a damaged database of containerd: %w", err)
		}
		log.Warn("a database of containerd is damaged, probably by a power failure: it was renamed", "file", path, "now", aside, "err", problem)
	}
	return nil
}

// checkBolt reads all pages of a database. A missing or empty one is fine: it is created on open.
func checkBolt(path string) (err error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	// Accessing a page beyond the end of a truncated file, or an impossible offset, is a fault.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(checkPages)
}

// checkPages walks the whole tree in this goroutine; bolt's own Tx.Check uses another, where a fault ends the process.
func checkPages(tx *bolt.Tx) error {
	if size := tx.DB().Info().PageSize; size <= 0 {
		return fmt.Errorf("page size %d", size)
	}
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return checkBucket(b) })
}

func checkBucket(b *bolt.Bucket) error {
	var last []byte
	return b.ForEach(func(k, v []byte) error {
		if last != nil && string(k) <= string(last) {
			return fmt.Errorf("key %q follows %q", k, last)
		}
		last = append(last[:0:0], k...)
		if v != nil {
			// Its last byte is on the last of its pages.
			if len(v) > 0 {
				_ = v[len(v)-1]
			}
			return nil
		}
		nested := b.Bucket(k)
		if nested == nil {
			return fmt.Errorf("bucket %q cannot be opened", k)
		}
		return checkBucket(nested)
	})
}
