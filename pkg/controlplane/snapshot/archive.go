package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

const (
	// format is the version of an archive's format. A reader rejects a newer one.
	format = 1
	// metadataName is the first file of an archive.
	metadataName = "metadata.json"
	// datastoreFolder contains the datastore's files in an archive, configFile the server's config file.
	datastoreFolder = "datastore"
	configFile      = "config.yaml"
	// endpointFile is layout.DataDir.DatastoreEndpoint.
	endpointFile = "server/cred/datastore.json"

	// The most that a reader accepts, in bytes and files. Only the datastore is large.
	maxMetadata = 4 << 20
	maxFile     = 4 << 20
	maxFiles    = 1000
)

// Metadata is an archive's description of itself.
type Metadata struct {
	Format int `json:"format"`
	// Name is what the snapshot is for: on-demand, scheduled, before-upgrade, or a user's.
	Name string `json:"name"`
	// Node is the node whose server saved the snapshot.
	Node    string    `json:"node"`
	Created time.Time `json:"created"`
	// Version is the version of Polymesh, Kubernetes the one of its API server.
	Version    string `json:"version"`
	Kubernetes string `json:"kubernetes"`
	// Platform is the operating system and architecture, as in linux/amd64.
	Platform string `json:"platform"`
	// Datastore is the kind of datastore, Revision its newest revision.
	Datastore string `json:"datastore"`
	Revision  int64  `json:"revision"`
	// Members are the nodes of the members of etcd; empty with another datastore.
	Members []string `json:"members,omitempty"`
	// DataDir is where the server had its data. Volumes of local-path are known by paths in it.
	DataDir string `json:"dataDir"`
	// Settings are the cluster-wide settings that were not the default, as flags.
	Settings []string `json:"settings,omitempty"`
	// Images are those that pods used. Empty if the API server did not respond.
	Images []string `json:"images,omitempty"`
	Files  []File   `json:"files"`
}

// File is one file of an archive.
type File struct {
	// Path is relative to the data dir, or below datastore/.
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// The paths that an archive can have.
var (
	clusterPath   = regexp.MustCompile(`^server/((tls|cred)/([A-Za-z0-9][A-Za-z0-9._-]*/){0,2}[A-Za-z0-9][A-Za-z0-9._-]*|([a-z]+-)?token)$`)
	datastorePath = regexp.MustCompile(`^` + datastoreFolder + `/[A-Za-z0-9][A-Za-z0-9._-]*$`)
)

// limit returns the largest size of a file, and whether an archive can contain it.
func limit(name string, free int64) (int64, bool) {
	switch {
	case datastorePath.MatchString(name):
		return free, true
	case name == configFile, clusterPath.MatchString(name) && path.Ext(name) != ".kubeconfig":
		return maxFile, true
	}
	return 0, false
}

// source is a file to be archived.
type source struct {
	File
	path    string
	content []byte // nil if it is read from path
}

// collect returns the files of a data dir that identify its cluster: authorities and other certificates, keys of Secrets, tokens.
// Kubeconfigs and the datastore's endpoint are left out, because a server writes them at each start, and they are of this machine.
func collect(server string) ([]source, error) {
	var found []source
	add := func(file string, entry fs.DirEntry) error {
		rel, err := filepath.Rel(filepath.Dir(server), file)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(rel) // half-written files begin with a dot (pkg/atomicfile), which none of the paths has
		if !entry.Type().IsRegular() {
			return nil
		}
		if _, ok := limit(name, 0); !ok || name == endpointFile {
			return nil
		}
		// These are small, and may be replaced while they are read: the copy is of one moment.
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if len(text) > maxFile {
			return fmt.Errorf("%s has %d bytes, which is too much for such a file", file, len(text))
		}
		found = append(found, source{File: fileOf(name, text), content: text})
		return nil
	}
	for _, folder := range []string{"tls", "cred"} {
		err := filepath.WalkDir(filepath.Join(server, folder), func(file string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || entry.IsDir() {
				return err
			}
			return add(file, entry)
		})
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", filepath.Join(server, folder), err)
		}
	}
	entries, err := os.ReadDir(server)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if err := add(filepath.Join(server, e.Name()), e); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func fileOf(name string, content []byte) File {
	sum := sha256.Sum256(content)
	return File{Path: name, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}
}

// hashed returns a large file, which nothing else changes.
func hashed(name, file string) (source, error) {
	f, err := os.Open(file)
	if err != nil {
		return source{}, err
	}
	defer f.Close()
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return source{}, err
	}
	return source{File{name, size, hex.EncodeToString(sum.Sum(nil))}, file, nil}, nil
}

// write writes an archive.
func write(ctx context.Context, w io.Writer, m *Metadata, files []source, passphrase string) error {
	out, err := compressor(w, passphrase)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if len(text) > maxMetadata {
		return fmt.Errorf("its description has %d bytes, which is too much", len(text))
	}
	t := tar.NewWriter(out)
	for _, f := range append([]source{{File: fileOf(metadataName, text), content: text}}, files...) {
		if err := f.write(ctx, t, m.Created); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return errors.Join(t.Close(), out.Close())
}

func (s source) write(ctx context.Context, t *tar.Writer, created time.Time) error {
	if err := t.WriteHeader(&tar.Header{Name: s.Path, Mode: 0o600, Size: s.Size, ModTime: created, Format: tar.FormatPAX}); err != nil {
		return err
	}
	var content io.Reader = bytes.NewReader(s.content)
	if s.content == nil {
		f, err := os.Open(s.path)
		if err != nil {
			return err
		}
		defer f.Close()
		content = f
	}
	_, err := io.Copy(t, withContext{ctx, content})
	return err
}

// readMetadata reads the description of an archive only. It is not checked against the files.
func readMetadata(r io.Reader) (*Metadata, error) {
	in, err := decompressor(r, "")
	if err != nil {
		return nil, err
	}
	defer in.Close()
	return firstFile(tar.NewReader(in))
}

func firstFile(t *tar.Reader) (*Metadata, error) {
	h, err := t.Next()
	if err != nil {
		return nil, fmt.Errorf("it is not a snapshot, or damaged: %w", err)
	}
	if h.Name != metadataName || h.Typeflag != tar.TypeReg || h.Size > maxMetadata {
		return nil, errors.New("it is not a snapshot: its first file is not " + metadataName)
	}
	text, err := io.ReadAll(t)
	if err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	m := &Metadata{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("it is not a snapshot: %s: %w", metadataName, err)
	}
	if m.Format > format {
		return nil, fmt.Errorf("it has format %d, and this version of Polymesh reads up to %d: use the version that saved it (%s) or a later one", m.Format, format, m.Version)
	}
	if m.Format < 1 {
		return nil, errors.New("it is not a snapshot: its format is missing")
	}
	return m, nil
}

// read checks a whole archive: each file of the description is there once, with its size and sum, and nothing else is. Without a
// folder nothing is written. With one, the files are written into it. free limits the size of the datastore, in bytes.
//
// Archives may come from anywhere. A file has to have one of the known paths and be a regular one, and no more is read than
// the description announces.
func read(ctx context.Context, r io.Reader, passphrase, folder string, free int64) (*Metadata, error) {
	in, err := decompressor(withContext{ctx, r}, passphrase)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	t := tar.NewReader(in)
	m, err := firstFile(t)
	if err != nil {
		return nil, err
	}
	missing, err := m.announced(free)
	if err != nil {
		return nil, err
	}
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("it is damaged: %w", err)
		}
		f, ok := missing[h.Name]
		if !ok || h.Typeflag != tar.TypeReg || h.Size != f.Size {
			return nil, fmt.Errorf("it was not written by Polymesh, or is damaged: it contains %.100q, which its description does not have, or has otherwise", h.Name)
		}
		delete(missing, h.Name)
		if err := extract(t, f, folder); err != nil {
			return nil, fmt.Errorf("%s in it: %w", f.Path, err)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("it is not complete: %s is missing", slices.Sorted(maps.Keys(missing))[0])
	}
	// What follows is the padding of a tar file. Reading it also reads the end of an encrypted archive, without which it is truncated.
	if _, err := io.CopyN(io.Discard, in, maxFile); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("it is damaged after its last file: %w", errors.Join(err, errors.New("more follows")))
	}
	return m, nil
}

// announced checks the description, and returns its files.
func (m *Metadata) announced(free int64) (map[string]File, error) {
	if len(m.Files) > maxFiles {
		return nil, fmt.Errorf("it is not a snapshot: it has %d files", len(m.Files))
	}
	all := map[string]File{}
	for _, f := range m.Files {
		most, ok := limit(f.Path, free)
		if !ok {
			return nil, fmt.Errorf("it was not written by Polymesh: a snapshot cannot contain %.100q", f.Path)
		}
		if f.Size < 0 || f.Size > most {
			if datastorePath.MatchString(f.Path) {
				return nil, fmt.Errorf("the datastore in it has %d MiB, and there is room for %d: free some", f.Size>>20, most>>20)
			}
			return nil, fmt.Errorf("it was not written by Polymesh: %s has %d bytes", f.Path, f.Size)
		}
		if _, twice := all[f.Path]; twice {
			return nil, fmt.Errorf("it was not written by Polymesh: %s is in it twice", f.Path)
		}
		if _, err := hex.DecodeString(f.SHA256); err != nil || len(f.SHA256) != 2*sha256.Size {
			return nil, fmt.Errorf("it was not written by Polymesh: the sum of %s is missing", f.Path)
		}
		if datastorePath.MatchString(f.Path) {
			free -= f.Size
		}
		all[f.Path] = f
	}
	return all, nil
}

// extract checks one file, and writes it if there is a folder.
func extract(content io.Reader, f File, folder string) (err error) {
	sum := sha256.New()
	var out io.Writer = sum
	if folder != "" {
		target := filepath.Join(folder, filepath.FromSlash(f.Path))
		if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
			return err
		}
		file, opened := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, modeOf(f.Path))
		if opened != nil {
			return opened
		}
		defer func() { err = errors.Join(err, file.Sync(), file.Close()) }()
		out = io.MultiWriter(sum, file)
	}
	if _, err := io.Copy(out, content); err != nil {
		return err
	}
	if have := hex.EncodeToString(sum.Sum(nil)); have != f.SHA256 {
		return fmt.Errorf("it is damaged: its sum is %s, want %s", have, f.SHA256)
	}
	return nil
}

// modeOf is the mode of a file in a data dir. Certificates are public (pkg/certificate).
func modeOf(name string) fs.FileMode {
	if path.Ext(name) == ".crt" {
		return 0o644
	}
	return 0o600
}

// withContext is a reader that ends with its context.
type withContext struct {
	ctx context.Context
	io.Reader
}

func (r withContext) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
