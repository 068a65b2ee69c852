package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
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
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
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
	// Others are the nodes of the other members of etcd, which have to join again, with empty data dirs.
	Others []string `json:"otherServers,omitempty"`
}

// change is what a restore does, besides replacing the datastore.
type change struct {
	// before is the name of the snapshot that is saved before, and of the folder for what is replaced.
	before string
	// inPlace is set if that snapshot is the one that is restored: the rest of the data dir stays.
	inPlace bool
	// sqlite is set if the datastore becomes SQLite.
	sqlite bool
	// reset is set if the next start must not do it again.
	reset bool
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
	return s.restore(ctx, from, change{before: BeforeRestore})
}

// MayRestore returns what would keep Restore from beginning, before someone is asked whether it should.
func (s *Snapshots) MayRestore(ctx context.Context, from string) error {
	if _, _, err := s.checked(ctx, from); err != nil {
		return err
	}
	if lock, err := datadir.Look(s.o.DataDir); err == nil && lock.Held {
		return s.runs()
	}
	return s.othersRun(ctx)
}

// runs is the error for a data dir that a server uses.
func (s *Snapshots) runs() error {
	return fmt.Errorf("a server is running on %s: stop it first, for example with `systemctl stop %s`. Nothing was changed", s.o.DataDir, layout.Unit)
}

// checked returns the path of a snapshot of which every part has been checked.
func (s *Snapshots) checked(ctx context.Context, from string) (string, *Metadata, error) {
	path, err := s.find(ctx, from)
	if err != nil {
		return "", nil, err
	}
	m, err := s.check(ctx, path)
	if err != nil {
		return "", nil, fmt.Errorf("%s cannot be restored: %w. Nothing was changed", path, err)
	}
	return path, m, nil
}

// ResetTo is Restore, with the mark of Reset.
func (s *Snapshots) ResetTo(ctx context.Context, from string) (*Restored, error) {
	if err := s.notReset(); err != nil {
		return nil, err
	}
	return s.restore(ctx, from, change{before: BeforeRestore, reset: true})
}

func (s *Snapshots) restore(ctx context.Context, from string, c change) (*Restored, error) {
	path, m, err := s.checked(ctx, from)
	if err != nil {
		return nil, err
	}
	lock, err := s.acquire()
	if err != nil {
		return nil, err
	}
	defer lock.Release()
	if err := s.othersRun(ctx); err != nil {
		return nil, err
	}
	r := &Restored{Metadata: *m, Path: path, ThisNode: s.o.Node}
	if err := s.replace(ctx, r, c); err != nil {
		return nil, err
	}
	// On an empty machine, the first start must not look like an upgrade.
	file := s.o.DataDir.Server(versionName)
	if _, err = os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		err = atomicfile.Write(file, []byte(m.Version), 0o600)
	}
	if err != nil {
		err = fmt.Errorf("note the version that saved the snapshot: %w", err)
	}
	return r, errors.Join(err, s.restoreConfig(r))
}

// Anyway returns the same snapshots, of which one is restored, or the cluster reset, although other servers continue the cluster (RunningError in pkg/controlplane/datastore/etcd).
func (s *Snapshots) Anyway() *Snapshots {
	o := s.o
	o.Anyway = true
	return New(o)
}

// othersRun returns an error if other servers of the cluster in the data dir continue it.
func (s *Snapshots) othersRun(ctx context.Context) error {
	if s.o.Anyway {
		return nil
	}
	err := etcd.OthersRun(ctx, s.o.DataDir.Etcd(), certificate.Store(s.o.DataDir.TLS()))
	var running *etcd.RunningError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &running):
		return fmt.Errorf("%w, and would be a second one next to what is made of this server. To bring this server back, start it as it was, or `polymesh reset` it and let it join again. If the others are to end, stop them first. Nothing was changed", err)
	}
	return fmt.Errorf("%w. Nothing was changed", err)
}

// acquire locks the data dir for a change of its cluster.
func (s *Snapshots) acquire() (*datadir.Lock, error) {
	if err := datadir.Check(s.o.DataDir); err != nil {
		return nil, err
	}
	lock, err := datadir.Acquire(s.o.DataDir)
	if err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, s.runs()
		}
		return nil, fmt.Errorf("lock %s: %w. Nothing was changed", s.o.DataDir, err)
	}
	_, err = datadir.Claim(s.o.DataDir)
	if err == nil {
		_, err = Recover(s.o.DataDir)
	}
	if err != nil {
		lock.Release()
		return nil, err
	}
	return lock, nil
}

// replace replaces the datastore, and more if the change is not in place, by what is in the snapshot r.Path.
func (s *Snapshots) replace(ctx context.Context, r *Restored, c change) error {
	if err := s.stage(ctx, r, c); err != nil {
		return errors.Join(fmt.Errorf("restore %s: %w. Nothing was changed", r.Path, err), os.RemoveAll(staging(s.o.DataDir)))
	}
	if _, err := Recover(s.o.DataDir); err != nil {
		return fmt.Errorf("restore %s: %w. It is not complete: run the same command again", r.Path, err)
	}
	return nil
}

// Reset makes the member of etcd in the data dir, with its data, the only member of a new cluster. It is for a server that is left when a
// majority of the members is lost for good. No server may run on the data dir. It saves a snapshot first. A second call fails until the server
// has started normally, so that a service that resets at each start does not continue forever.
func (s *Snapshots) Reset(ctx context.Context) (*Restored, error) {
	return s.inPlace(ctx, change{before: BeforeClusterReset, reset: true}, func() error {
		if m, err := etcd.ReadMembership(s.o.DataDir.Etcd()); err != nil {
			return err
		} else if m.Removed {
			return errors.New("the other servers have removed this one from the cluster, which they continue: it must not become a cluster of its own")
		}
		return s.notReset()
	})
}

// notReset returns an error if the cluster was reset, and has not started since.
func (s *Snapshots) notReset() error {
	_, err := os.Stat(resetFlag(s.o.DataDir))
	if err == nil {
		return fmt.Errorf("the cluster was reset already: start the server without --cluster-reset. To reset it once more, remove %s first", resetFlag(s.o.DataDir))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// MoveToSQLite moves the cluster from etcd to SQLite. This server has to be the only one, and must not run. It saves a snapshot first.
func (s *Snapshots) MoveToSQLite(ctx context.Context) (*Restored, error) {
	return s.inPlace(ctx, change{before: BeforeDatastoreMove, sqlite: true}, func() error {
		nodes, err := etcd.MemberNodes(s.o.DataDir.Etcd())
		if err != nil {
			return err
		}
		if len(nodes) > 1 {
			return fmt.Errorf("etcd has %d members (%s), and SQLite works on one server only: remove the other servers first", len(nodes), strings.Join(nodes, ", "))
		}
		return nil
	})
}

// inPlace saves a snapshot of a member of etcd, and replaces its data by what is made of that snapshot. check is called first.
func (s *Snapshots) inPlace(ctx context.Context, c change, check func() error) (*Restored, error) {
	c.inPlace = true
	if exists, err := etcd.Exists(s.o.DataDir.Etcd()); err != nil {
		return nil, err
	} else if !exists {
		return nil, fmt.Errorf("there is no member of etcd in %s: this is for a server whose datastore is etcd", s.o.DataDir)
	}
	lock, err := s.acquire()
	if err != nil {
		return nil, err
	}
	defer lock.Release()
	if err := check(); err != nil {
		return nil, fmt.Errorf("%w. Nothing was changed", err)
	}
	if err := s.othersRun(ctx); err != nil {
		return nil, err
	}
	saved, err := s.Save(ctx, c.before)
	if saved == nil {
		return nil, fmt.Errorf("%w. Nothing was changed", err)
	}
	r := &Restored{Path: saved.Path, ThisNode: s.o.Node, Saved: saved}
	if err != nil {
		r.SaveError = err.Error()
	}
	return r, s.replace(ctx, r, c)
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
		prefix, err := s.downloads()
		if err != nil {
			return "", err
		}
		work, err := os.MkdirTemp(s.o.Dir, prefix)
		if err != nil {
			return "", err
		}
		defer os.RemoveAll(work)
		if err := s.o.Bucket.download(ctx, from, filepath.Join(work, from)); err != nil {
			return "", err
		}
		return local, atomicfile.Rename(filepath.Join(work, from), local)
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
	file, known := datastoreFiles[m.Datastore]
	switch own := m.Datastore != datastore.KindOutside; {
	case !known:
		return fmt.Errorf("it has a datastore of kind %.100q, which this version cannot restore", m.Datastore)
	case own && s.o.Outside:
		return errors.New("its datastore was on the server, and --datastore-endpoint sets one outside: remove that setting, or restore that database with its own tools")
	case !own:
		if has, err := hasEntries(s.o.DataDir.Server("db")); err != nil {
			return err
		} else if has {
			return fmt.Errorf("its datastore was outside of the server, and %s has one of its own: use another --data-dir, or remove that cluster with `polymesh reset` first", s.o.DataDir)
		}
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
	if file != "" && !slices.ContainsFunc(m.Files, func(f File) bool { return f.Path == datastoreFolder+"/"+file }) {
		return errors.New("the datastore is not in it")
	}
	if !slices.ContainsFunc(m.Files, func(f File) bool { return f.Path == authorityPath }) {
		return errors.New("the certificate authorities are not in it")
	}
	return nil
}

// datastoreFiles are the kinds of datastore that can be restored, with their file in a snapshot.
var datastoreFiles = map[string]string{sqlite: datastore.CopyName, etcd.Kind: etcd.CopyName, datastore.KindOutside: ""}

// sqlite is the kind of SQLite.
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
func (s *Snapshots) stage(ctx context.Context, r *Restored, c change) error {
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
	for _, node := range m.Members {
		if node != m.Node && node != s.o.Node && config.ValidNodeName(node) {
			r.Others = append(r.Others, node)
		}
	}
	now := time.Now()
	if c.inPlace {
		if err := s.stageDatastore(ctx, r, c, now); err != nil {
			return err
		}
		if err := s.onlyDatastore(); err != nil {
			return err
		}
		return s.plan(r, c, now)
	}
	if err := s.saveBefore(ctx, r); err != nil {
		return err
	}
	if err := s.stageDatastore(ctx, r, c, now); err != nil {
		return err
	}
	note, err := json.Marshal(note{Snapshot: filepath.Base(r.Path), Node: m.Node, Created: m.Created, Restored: now.UTC()})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(filepath.Join(folder, "server", noteName), note, 0o600); err != nil {
		return err
	}
	return s.plan(r, c, now)
}

// stageDatastore turns the datastore of the staged snapshot into one that a server can use.
func (s *Snapshots) stageDatastore(ctx context.Context, r *Restored, c change, now time.Time) (err error) {
	dir, quiet := filepath.Join(staging(s.o.DataDir), datastoreFolder), slog.New(slog.DiscardHandler)
	least := floor(r.Revision, r.Created, now, s.present(ctx))
	switch {
	case r.Datastore == datastore.KindOutside:
		return nil
	case r.Datastore == sqlite:
		r.Next, err = datastore.Prepare(ctx, dir, least)
	case c.sqlite:
		r.Next, err = etcd.ToSQLite(ctx, dir, s.o.DataDir.DatastoreSocket(), least, quiet)
	default:
		r.Next, err = etcd.Prepare(dir, least, quiet)
	}
	if err != nil {
		return err
	}
	if c.reset {
		if err := atomicfile.Write(filepath.Join(dir, resetName), nil, 0o600); err != nil {
			return err
		}
	}
	return os.Rename(dir, filepath.Join(staging(s.o.DataDir), "server", "db"))
}

// present returns the newest revision of the datastore in the data dir; 0 if there is none, or if it is damaged: the elapsed time is what counts then.
func (s *Snapshots) present(ctx context.Context) int64 {
	inSQLite, _ := datastore.Revision(ctx, s.o.DataDir.Server("db"))
	inEtcd, _ := etcd.Revision(s.o.DataDir.Etcd())
	return max(inSQLite, inEtcd)
}

// onlyDatastore removes everything but the datastore from what is staged.
func (s *Snapshots) onlyDatastore() error {
	folder := staging(s.o.DataDir)
	entries, err := os.ReadDir(filepath.Join(folder, "server"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "db" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(folder, "server", e.Name())))
		}
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(folder, configFile)))
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
	if has, err := hasEntries(s.content()); err != nil || !has {
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
