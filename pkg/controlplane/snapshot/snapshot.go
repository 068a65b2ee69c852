// Package snapshot saves a cluster in one file, and restores it from that file on the same machine or an empty one.
//
// A snapshot has everything that a server needs and cannot create again: the datastore, the certificate authorities with
// their keys, the keys of Secrets, tokens, and the config file. It is a tar file, compressed with zstd and optionally encrypted
// with a passphrase (age). It is checked when it is saved and again before it is restored. PersistentVolumes are not in it.
//
// The package owns the folder of snapshots, their names, the component "snapshots", which saves them on a schedule, and the
// steps of a restore, of which an interrupted one is completed by Recover. pkg/server adds the component, pkg/command
// implements `polymesh snapshot`.
package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/version"
)

// Source is the datastore that is saved.
type Source interface {
	// Kind is the kind of datastore. Another kind cannot be restored from its files.
	Kind() string
	// Save writes the datastore into the folder dir, in files of its own choice, and returns its newest revision. Every write that
	// was acknowledged before the call is in it. The files have been checked, and are on disk.
	Save(ctx context.Context, dir string) (revision int64, err error)
}

// Clustered is a Source that is one of several copies, each on a server.
type Clustered interface {
	// Nodes returns the nodes that have one, given the folder into which Save has written.
	Nodes(dir string) ([]string, error)
	// Moving reports whether Save saves another datastore, whose content moves to this one at its next start.
	Moving() bool
}

// Options are where snapshots are kept, and what is saved in them.
type Options struct {
	DataDir layout.DataDir
	// Dir is the folder of the snapshots.
	Dir string
	// Node is the name of the server's node.
	Node      string
	Datastore Source
	// Outside is set if the server is configured to use a datastore outside, so that it would not use a restored one.
	Outside bool
	// ConfigFile is saved if it exists. Settings are the cluster-wide settings that are not the default, as flags.
	ConfigFile string
	Settings   []string
	// Images returns the images that pods use; may be nil. An error leaves them out.
	Images func(ctx context.Context) ([]string, error)
	// Passphrase encrypts new snapshots and opens encrypted ones; empty for none.
	Passphrase string
	// Anyway is set to restore although other servers continue the cluster.
	Anyway bool
	// Bucket also keeps the snapshots in S3; nil for none.
	Bucket *Bucket
}

// Snapshots are the snapshots of a server.
type Snapshots struct{ o Options }

// New returns the snapshots of a server. It accesses nothing yet.
func New(o Options) *Snapshots { return &Snapshots{o} }

// DefaultDir returns the folder of a data dir's snapshots.
func DefaultDir(dataDir layout.DataDir) string { return dataDir.Server("snapshots") }

// Location is where a snapshot is.
type Location string

// The locations.
const (
	Local Location = "local"
	S3    Location = "s3"
)

// Info describes a snapshot.
type Info struct {
	// File is the file's name, which identifies the snapshot in commands.
	File string `json:"file"`
	// Name is what it is for: on-demand, scheduled, before-upgrade, or a user's.
	Name string `json:"name"`
	// Node is the node that saved it; a long name is shortened.
	Node string `json:"node"`
	// Cluster is the id of the cluster that was saved; empty if neither the file's name nor its content, as far as it can be read, says it.
	Cluster  string   `json:"cluster,omitempty"`
	Location Location `json:"location"`
	// Datastore is the kind of datastore, see Source; empty if the snapshot is encrypted or in S3.
	Datastore string `json:"datastore,omitempty"`
	// Path is its path, or its URL in S3.
	Path    string    `json:"path"`
	Created time.Time `json:"created"`
	// Size is in bytes.
	Size      int64 `json:"size"`
	Encrypted bool  `json:"encrypted"`
	// Version and Revision are empty if the snapshot is encrypted or in S3.
	Version  string `json:"version,omitempty"`
	Revision int64  `json:"revision,omitempty"`
	// Problem is why it cannot be read.
	Problem string `json:"problem,omitempty"`
}

// Save saves a snapshot, checks it, and returns it when it is on disk, and in the bucket if there is one. If only the bucket fails, the
// result is the local snapshot with the error.
func (s *Snapshots) Save(ctx context.Context, name string) (*Info, error) {
	// The folder is not created in a data dir without a cluster, which would no longer be taken for an empty one.
	if _, err := os.Stat(s.o.DataDir.Membership()); err == nil {
		return nil, fmt.Errorf("there is no cluster in %s to save: it is an agent's; save it on a server", s.o.DataDir)
	}
	if _, err := os.Stat(s.content()); err != nil {
		return nil, fmt.Errorf("there is no cluster in %s to save: %w", s.o.DataDir, err)
	}
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	info, err := s.save(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("save a snapshot in %s: %w", s.o.Dir, err)
	}
	if s.o.Bucket != nil {
		if err := s.o.Bucket.upload(ctx, info.Path, info.File); err != nil {
			return info, fmt.Errorf("the snapshot is saved as %s, but not in S3: %w", info.Path, err)
		}
	}
	return info, nil
}

// content is the folder that a data dir with a cluster has.
func (s *Snapshots) content() string {
	if s.o.Datastore.Kind() == datastore.KindOutside {
		return s.o.DataDir.TLS()
	}
	return s.o.DataDir.Server("db")
}

// lock creates the folder, excludes other processes that change it, and removes what an interrupted download of this server has left there. A data
// dir that it is in is claimed first, so that it does not look like a folder of something else.
func (s *Snapshots) lock() (unlock func(), err error) {
	if inside, err := filepath.Rel(string(s.o.DataDir), s.o.Dir); err == nil && filepath.IsLocal(inside) {
		if _, err := datadir.Claim(s.o.DataDir); err != nil {
			return nil, err
		}
	}
	if err := atomicfile.MkdirAll(s.o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the folder for snapshots: %w", err)
	}
	info, err := os.Stat(s.o.Dir)
	if err != nil {
		return nil, err
	}
	// The files are private, but who can write here can replace them.
	if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("other users can write to %s, and snapshots contain the keys of the cluster: chmod 0700 it, or choose another folder with --snapshot-dir", s.o.Dir)
	}
	dir, err := os.Open(s.o.Dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("%s is in use: another snapshot is being saved or removed; try again when it is done", s.o.Dir)
	}
	// A killed process leaves these.
	if err := s.removeDownloads(); err != nil {
		dir.Close()
		return nil, err
	}
	return func() { dir.Close() }, nil
}

func (s *Snapshots) save(ctx context.Context, name string) (*Info, error) {
	cluster, err := s.cluster()
	if err != nil {
		return nil, err
	}
	// A killed process leaves these.
	if err := s.removeUnfinished(cluster); err != nil {
		return nil, err
	}
	m := &Metadata{
		Format: format, Name: name, Node: s.o.Node, Created: time.Now().UTC().Truncate(time.Millisecond),
		Version: version.Version, Kubernetes: kubernetes.Get().GitVersion, Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Datastore: s.o.Datastore.Kind(), DataDir: string(s.o.DataDir), Settings: s.o.Settings,
	}
	if s.o.Images != nil {
		limited, cancel := context.WithTimeout(ctx, imagesTimeout)
		if images, err := s.o.Images(limited); err == nil {
			m.Images = listed(images)
		}
		cancel()
	}
	work, err := os.MkdirTemp(s.o.Dir, unfinished(cluster, s.o.Node))
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	temp := filepath.Join(work, datastoreFolder)
	if err := os.Mkdir(temp, 0o700); err != nil {
		return nil, err
	}
	files, err := s.capture(ctx, m, temp)
	if err != nil {
		return nil, err
	}
	if text, err := os.ReadFile(s.o.ConfigFile); err == nil && len(text) <= maxFile {
		files = append(files, source{File: fileOf(configFile, text), content: text})
	} else if err != nil && s.o.ConfigFile != "" && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the config file: %w", err)
	}
	entries, err := os.ReadDir(temp)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		f, err := hashed(datastoreFolder+"/"+e.Name(), filepath.Join(temp, e.Name()))
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	for _, f := range files {
		m.Files = append(m.Files, f.File)
	}
	return s.write(ctx, work, m, files)
}

// captures is how often a capture is tried, because keys or certificates were changed meanwhile.
const captures = 3

// capture saves the datastore into temp, and returns the data dir's files that belong to it. A key of Secrets is added before
// it is used, and removed when no Secret uses it any more, so the keys are only right if they were the same before and after.
func (s *Snapshots) capture(ctx context.Context, m *Metadata, temp string) ([]source, error) {
	for range captures {
		before, err := collect(s.o.DataDir.Server())
		if err != nil {
			return nil, err
		}
		if m.Revision, err = s.o.Datastore.Save(ctx, temp); err != nil {
			return nil, err
		}
		if c, ok := s.o.Datastore.(Clustered); ok && !c.Moving() {
			if m.Members, err = c.Nodes(temp); err != nil {
				return nil, err
			}
		}
		after, err := collect(s.o.DataDir.Server())
		if err != nil {
			return nil, err
		}
		if slices.EqualFunc(before, after, func(a, b source) bool { return a.File == b.File }) {
			return after, nil
		}
		if err := empty(temp); err != nil {
			return nil, err
		}
	}
	return nil, errors.New("keys or certificates in the data dir keep changing: try again later")
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// listed returns the names that a description has room for. Users who create pods choose them, and must not be able to prevent snapshots.
func listed(images []string) []string {
	// The longest reference: 255 bytes of a name, 128 of a tag, and a digest (github.com/distribution/reference).
	images = slices.DeleteFunc(images, func(name string) bool { return len(name) > 512 })
	return images[:min(len(images), maxImages)]
}

// maxImages is the number of images in a description: with the longest names, half of maxMetadata.
const maxImages = 4000

// imagesTimeout limits how long a snapshot waits for the API server, which it does not need.
const imagesTimeout = 10 * time.Second

// write writes the archive in the folder work, and checks it before it gets its name.
func (s *Snapshots) write(ctx context.Context, work string, m *Metadata, files []source) (*Info, error) {
	file := parts{m.Name, nodePart(m.Node), m.Created, m.cluster(), s.o.Passphrase != ""}
	if _, ok := parse(file.String()); !ok {
		return nil, fmt.Errorf("%.300q is not the name of a snapshot", file.String())
	}
	target := filepath.Join(s.o.Dir, file.String())
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s exists already", target)
	}
	made := filepath.Join(work, file.String())
	out, err := atomicfile.Create(made, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Discard()
	if err := write(ctx, out, m, files, s.o.Passphrase); err != nil {
		return nil, err
	}
	if err := out.Sync(); err != nil {
		return nil, err
	}
	if _, err := out.Seek(0, 0); err != nil {
		return nil, err
	}
	if _, err := read(ctx, out, s.o.Passphrase, "", 1<<62); err != nil {
		return nil, fmt.Errorf("the new snapshot was not written as it should be: %w", err)
	}
	if err := out.Commit(); err != nil {
		return nil, err
	}
	if err := atomicfile.Rename(made, target); err != nil {
		return nil, err
	}
	saved, err := os.Stat(target)
	if err != nil {
		return nil, err
	}
	info := file.info(Local, target, saved.Size())
	info.Datastore, info.Version, info.Revision = m.Datastore, m.Version, m.Revision
	return &info, nil
}

// List returns the snapshots, local ones and those in the bucket, newest first. If the bucket does not respond, the result are the
// local ones, with the error.
func (s *Snapshots) List(ctx context.Context) ([]Info, error) {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the snapshots: %w", err)
	}
	all := []Info{}
	for _, e := range entries {
		p, ok := parse(e.Name())
		if !ok || !e.Type().IsRegular() {
			continue
		}
		file, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just been removed
		}
		if err != nil {
			return nil, fmt.Errorf("list the snapshots: %w", err)
		}
		info := p.info(Local, filepath.Join(s.o.Dir, e.Name()), file.Size())
		// To decrypt one costs time and memory, by design.
		if !p.encrypted {
			if m, err := s.describe(info.Path); err != nil {
				info.Problem = err.Error()
			} else {
				info.Cluster, info.Datastore, info.Version, info.Revision = m.cluster(), m.Datastore, m.Version, m.Revision
			}
		}
		all = append(all, info)
	}
	if s.o.Bucket != nil {
		remote, bucketErr := s.o.Bucket.list(ctx)
		all, err = append(all, remote...), bucketErr
	} else {
		err = nil
	}
	slices.SortFunc(all, func(a, b Info) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.File, b.File), cmp.Compare(a.Location, b.Location))
	})
	return all, err
}

// describe reads the description of a local snapshot.
func (s *Snapshots) describe(path string) (*Metadata, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readMetadata(f)
}

// open opens a snapshot, and nothing that only has its name.
func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Pruned is what Prune has done.
type Pruned struct {
	Removed []Info
	// Unknown would have been removed if they were of this cluster, which nothing shows: see Info.Cluster.
	Unknown []Info
}

// Prune removes all but the newest keep snapshots of each name that this node has saved of this cluster, in each location. Those that may be
// of another cluster, which keeps its own in the same place, stay. Names limit it to snapshots with one of them.
func (s *Snapshots) Prune(ctx context.Context, keep int, names ...string) (done Pruned, err error) {
	if keep < 1 {
		return Pruned{}, fmt.Errorf("at least one snapshot has to be kept, not %d", keep)
	}
	if _, err := os.Stat(s.o.Dir); errors.Is(err, fs.ErrNotExist) && s.o.Bucket == nil {
		return Pruned{}, nil
	}
	cluster, err := s.cluster()
	if err != nil {
		return Pruned{}, err
	}
	if cluster == "" {
		return Pruned{}, fmt.Errorf("there is no cluster in %s, so none of the snapshots is its own: `polymesh snapshot delete` removes single ones", s.o.DataDir)
	}
	unlock, err := s.lock()
	if err != nil {
		return Pruned{}, err
	}
	defer unlock()
	all, listErr := s.List(ctx)
	type group struct {
		location Location
		name     string
	}
	own, perhaps := map[group]int{}, map[group]int{}
	failures := []error{listErr}
	for _, info := range all {
		if info.Node != nodePart(s.o.Node) || len(names) > 0 && !slices.Contains(names, info.Name) || info.Cluster != "" && info.Cluster != cluster {
			continue
		}
		g := group{info.Location, info.Name}
		if perhaps[g]++; info.Cluster == "" {
			if perhaps[g] > keep {
				done.Unknown = append(done.Unknown, info)
			}
			continue
		}
		if own[g]++; own[g] <= keep {
			continue
		}
		if err := s.remove(ctx, info); err != nil {
			failures = append(failures, err)
			continue
		}
		done.Removed = append(done.Removed, info)
	}
	return done, errors.Join(failures...)
}

// Delete removes a snapshot, in every location.
func (s *Snapshots) Delete(ctx context.Context, file string) (removed []Info, err error) {
	if _, ok := parse(file); !ok {
		return nil, fmt.Errorf("%.300q is not the name of a snapshot: `polymesh snapshot ls` shows them", file)
	}
	if _, err := os.Stat(s.o.Dir); errors.Is(err, fs.ErrNotExist) && s.o.Bucket == nil {
		return nil, fmt.Errorf("there is no snapshot %s: %w", file, err)
	}
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	all, err := s.List(ctx)
	failures := []error{err}
	for _, info := range all {
		if info.File != file {
			continue
		}
		if err := s.remove(ctx, info); err != nil {
			failures = append(failures, err)
			continue
		}
		removed = append(removed, info)
	}
	if err := errors.Join(failures...); err != nil {
		return removed, err
	}
	if len(removed) == 0 {
		return nil, fmt.Errorf("there is no snapshot %s: `polymesh snapshot ls` shows them", file)
	}
	return removed, nil
}

func (s *Snapshots) remove(ctx context.Context, info Info) error {
	if info.Location == S3 {
		return s.o.Bucket.remove(ctx, info.File)
	}
	if err := os.Remove(info.Path); err != nil {
		return fmt.Errorf("remove a snapshot: %w", err)
	}
	return atomicfile.SyncDir(s.o.Dir)
}
