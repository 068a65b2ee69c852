package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	utilversion "k8s.io/apimachinery/pkg/util/version"
	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/version"
)

// Restored is what a restore has done.
type Restored struct {
	Metadata
	// Path is the file that was restored.
	Path string `json:"path"`
	// ThisNode is the name of this machine's node. If it is not Node, Node is removed when the server starts.
	ThisNode string `json:"thisNode"`
	// Saved is the snapshot of the state before; nil if there was none, or SaveError is set.
	Saved     *Info  `json:"saved,omitempty"`
	SaveError string `json:"saveError,omitempty"`
	// Aside is the folder with the files of the state before; empty if there were none.
	Aside string `json:"aside,omitempty"`
	// Next is the revision at which the cluster continues.
	Next int64 `json:"nextRevision"`
	// ConfigFile is the snapshot's config file as written to this machine; empty if it had none, or if there already is one.
	ConfigFile string `json:"configFile,omitempty"`
	// ConfigDiffers is set if this machine has another config file than the snapshot, or the snapshot's is for another data dir. The
	// snapshot's is RestoredConfig then.
	ConfigDiffers bool `json:"configDiffers,omitempty"`
}

// marginPerSecond is more revisions than a cluster can have used in a second, margin the least that is added: a clock may have been set.
const (
	marginPerSecond = 10_000
	margin          = 1_000_000
	// maxClockError is how far in the future a snapshot may be, in time.
	maxClockError = time.Hour
)

// floor returns a revision that no client of a cluster can have seen. A machine that the cluster ran on after the snapshot may be lost
// with its last revision, and a snapshot may have been restored before, so the elapsed time has to bound it.
func floor(saved int64, created, now time.Time, present int64) int64 {
	elapsed := max(0, int64(now.Sub(created)/time.Second))
	return max(saved, present) + margin + elapsed*marginPerSecond
}

// Restore restores a snapshot: a path, or the file name of one in the folder or the bucket. No server may run on the data dir; it may
// be empty, or have the same cluster. The whole snapshot is checked before anything is changed. What is replaced is put aside, not
// removed, after a snapshot of it was saved. Once it has begun to replace files, an interrupted restore is completed by the
// next one, or by the start of the server (Recover).
func (s *Snapshots) Restore(ctx context.Context, from string) (*Restored, error) {
	path, err := s.find(ctx, from)
	if err != nil {
		return nil, err
	}
	m, err := s.check(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be restored: %w. Nothing was changed", path, err)
	}
	if err := datadir.Check(s.o.DataDir); err != nil {
		return nil, err
	}
	lock, err := datadir.Acquire(s.o.DataDir)
	if err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("a server is running on %s: stop it first, for example with `systemctl stop %s`. Nothing was changed", s.o.DataDir, layout.Unit)
		}
		return nil, fmt.Errorf("lock %s: %w. Nothing was changed", s.o.DataDir, err)
	}
	defer lock.Release()
	if _, err := datadir.Claim(s.o.DataDir); err != nil {
		return nil, err
	}
	if _, err := Recover(s.o.DataDir); err != nil {
		return nil, err
	}
	r := &Restored{Metadata: *m, Path: path, ThisNode: s.o.Node}
	if err := s.stage(ctx, r); err != nil {
		return nil, errors.Join(fmt.Errorf("restore %s: %w. Nothing was changed", path, err), os.RemoveAll(staging(s.o.DataDir)))
	}
	if _, err := Recover(s.o.DataDir); err != nil {
		return nil, fmt.Errorf("restore %s: %w. It is not complete: run the same command again", path, err)
	}
	return r, s.restoreConfig(r)
}

// find returns the path of a snapshot. One that is only in the bucket is downloaded into the folder.
func (s *Snapshots) find(ctx context.Context, from string) (string, error) {
	if strings.ContainsRune(from, filepath.Separator) {
		return filepath.Abs(from)
	}
	local := filepath.Join(s.o.Dir, from)
	_, named := parse(from)
	if named {
		if _, err := os.Lstat(local); err == nil {
			return local, nil
		}
	}
	if _, err := os.Lstat(from); err == nil {
		return filepath.Abs(from)
	}
	if named && s.o.Bucket != nil {
		unlock, err := s.lock()
		if err != nil {
			return "", err
		}
		defer unlock()
		return local, s.o.Bucket.download(ctx, from, local)
	}
	return "", fmt.Errorf("there is no snapshot %.300q, neither in %s nor as a file: `polymesh snapshot ls` shows them", from, s.o.Dir)
}

// check checks a whole archive, and whether it fits this machine. It writes nothing.
func (s *Snapshots) check(ctx context.Context, path string) (*Metadata, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	free, err := freeSpace(string(s.o.DataDir))
	if err != nil {
		return nil, err
	}
	m, err := read(ctx, f, s.o.Passphrase, "", free)
	if err != nil {
		return nil, err
	}
	return m, s.fits(m)
}

// freeSpace returns the free bytes on the disk of a folder that may not exist yet.
func freeSpace(dir string) (int64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return int64(st.Bavail) * int64(st.Bsize), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return 0, fmt.Errorf("read the free space of %s: %w", dir, err)
		}
		dir = filepath.Dir(dir)
	}
}

// fits returns an error if a snapshot cannot be restored by this program on this machine.
func (s *Snapshots) fits(m *Metadata) error {
	if platform := runtime.GOOS + "/" + runtime.GOARCH; m.Platform != platform {
		return fmt.Errorf("it is from a server on %.100q, and this machine is %s", m.Platform, platform)
	}
	if !config.ValidNodeName(m.Node) {
		return fmt.Errorf("it was not written by Polymesh: %.100q is not the name of a node", m.Node)
	}
	if m.Datastore != sqlite {
		return fmt.Errorf("it has a datastore of kind %.100q, and this version restores %s", m.Datastore, sqlite)
	}
	for _, program := range []struct{ name, theirs, ours string }{
		{"Kubernetes", m.Kubernetes, kubernetes.Get().GitVersion}, {"Polymesh", m.Version, version.Version},
	} {
		newer, err := isNewer(program.theirs, program.ours)
		if err != nil {
			return fmt.Errorf("it names no version of %s: %w", program.name, err)
		}
		if newer {
			return fmt.Errorf("it is from a newer version, with %s %s, and this one has %s: restore it with that version or a later one", program.name, program.theirs, program.ours)
		}
	}
	if time.Until(m.Created) > maxClockError {
		return fmt.Errorf("it is from %s, and this machine's clock shows %s: set the clock", m.Created.Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
	}
	if !slices.ContainsFunc(m.Files, func(f File) bool { return f.Path == datastoreFolder+"/"+datastore.CopyName }) {
		return errors.New("the datastore is not in it")
	}
	if !slices.ContainsFunc(m.Files, func(f File) bool { return f.Path == "server/tls/"+filepath.Base(datadir.Authority("")) }) {
		return errors.New("the certificate authorities are not in it")
	}
	return nil
}

// sqlite is the kind of datastore that can be restored.
const sqlite = "sqlite"

// isNewer compares versions. A build without one ("dev") is as new as any.
func isNewer(theirs, ours string) (bool, error) {
	b, err := utilversion.ParseSemantic(ours)
	if err != nil || theirs == "dev" {
		return false, nil
	}
	a, err := utilversion.ParseSemantic(theirs)
	if err != nil {
		return false, err
	}
	return b.LessThan(a), nil
}

// stage prepares all that a restore moves into place, and writes the plan of it. Before that plan is on disk, nothing is replaced.
func (s *Snapshots) stage(ctx context.Context, r *Restored) error {
	dir, folder := s.o.DataDir, staging(s.o.DataDir)
	if err := atomicfile.MkdirAll(dir.Server(), 0o700); err != nil {
		return err
	}
	if err := os.RemoveAll(folder); err != nil {
		return fmt.Errorf("remove what an interrupted restore has left: %w", err)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	free, err := freeSpace(folder)
	if err != nil {
		return err
	}
	f, err := open(r.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	// Checked once more: what is restored is what was checked.
	m, err := read(ctx, f, s.o.Passphrase, folder, free)
	if err != nil {
		return err
	}
	if err := s.fits(m); err != nil {
		return err
	}
	r.Metadata = *m
	if err := sameCluster(dir, folder); err != nil {
		return err
	}
	if err := s.saveBefore(ctx, r); err != nil {
		return err
	}
	present, err := datastore.Revision(ctx, dir.Server("db"))
	if err != nil {
		present = 0 // there is none, or it is damaged: the elapsed time is what counts then
	}
	now := time.Now()
	if r.Next, err = datastore.Prepare(ctx, filepath.Join(folder, datastoreFolder), floor(m.Revision, m.Created, now, present)); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(folder, datastoreFolder), filepath.Join(folder, "server", "db")); err != nil {
		return err
	}
	note, err := json.Marshal(note{Snapshot: filepath.Base(r.Path), Node: m.Node, Created: m.Created, Restored: now.UTC()})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(folder, "server", noteName), note, 0o600); err != nil {
		return err
	}
	return s.plan(r, now)
}

// sameCluster returns an error if the data dir is another cluster's than the staged snapshot.
func sameCluster(dir layout.DataDir, folder string) error {
	present, err := os.ReadFile(datadir.Authority(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	staged, err := os.ReadFile(filepath.Join(folder, "server", "tls", filepath.Base(datadir.Authority(dir))))
	if err != nil {
		return err
	}
	if !bytes.Equal(bytes.TrimSpace(present), bytes.TrimSpace(staged)) {
		return fmt.Errorf("%s has another cluster than the snapshot: use another --data-dir, or remove that cluster with `polymesh reset` first", dir)
	}
	return nil
}

// saveBefore saves a snapshot of the present state. A state that cannot be saved may be why it is replaced, so that is no error.
func (s *Snapshots) saveBefore(ctx context.Context, r *Restored) error {
	if _, err := os.Stat(s.o.DataDir.Server("db", datastore.CopyName)); err != nil {
		return nil
	}
	info, err := s.Save(ctx, BeforeRestore)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		r.SaveError = err.Error()
	}
	r.Saved = info
	return nil
}

// RestoredConfig returns the config file of the snapshot that was restored last.
func RestoredConfig(dir layout.DataDir) string { return dir.Server(restoredConfig) }

// restoreConfig writes the config file to this machine if it has none.
func (s *Snapshots) restoreConfig(r *Restored) error {
	if s.o.ConfigFile == "" || !slices.ContainsFunc(r.Files, func(f File) bool { return f.Path == configFile }) {
		return nil
	}
	text, err := os.ReadFile(RestoredConfig(s.o.DataDir))
	if err != nil {
		return err
	}
	present, err := os.ReadFile(s.o.ConfigFile)
	switch {
	case err == nil:
		r.ConfigDiffers = !bytes.Equal(present, text)
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("everything is restored but the config file: %w", err)
	case r.DataDir != string(s.o.DataDir):
		r.ConfigDiffers = true
		return nil
	}
	if err := atomicfile.Write(s.o.ConfigFile, text, 0o600); err != nil {
		return fmt.Errorf("everything is restored but the config file %s: %w", s.o.ConfigFile, err)
	}
	r.ConfigFile = s.o.ConfigFile
	return nil
}
