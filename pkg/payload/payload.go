// Package payload reads the contents of the shipped file: the program itself, additional programs and the images, as a
// ZIP appended to the launcher. It owns the layout of the unpacked files.
//
// The launcher opens and unpacks it; the running program only needs the paths (Dir).
package payload

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// Manifest is payload.json: the contents of the payload.
type Manifest struct {
	Version string            `json:"version"`
	Files   map[string]string `json:"files"`  // name in the ZIP → "sha256:<hex>" of its content
	Images  []string          `json:"images"` // references of the images in images/
}

// Image returns the reference of the shipped image with this short name, the last part of its repository:
// "registry.polymesh.dev/coredns:1.15.0" is "coredns".
func (m *Manifest) Image(name string) (ref string, err error) {
	for _, candidate := range m.Images {
		repository := candidate[strings.LastIndexByte(candidate, '/')+1:]
		if repository, _, _ = strings.Cut(repository, "@"); strings.SplitN(repository, ":", 2)[0] != name {
			continue
		}
		if ref != "" {
			return "", fmt.Errorf("the shipped images %s and %s are both named %q", ref, candidate, name)
		}
		ref = candidate
	}
	if ref == "" {
		return "", fmt.Errorf("no image %q among the shipped images: the polymesh file is damaged, copy it again", name)
	}
	return ref, nil
}

// Payload is an open shipped file.
type Payload struct {
	Manifest
	// ID identifies the contents: the first 16 hex digits of the manifest's SHA-256.
	ID  string
	zip *zip.ReadCloser
}

const manifestName = "payload.json"

// Program is the name of the program that the launcher runs.
const Program = "bin/polymesh"

// Open reads the payload of the file at path. If there is none, the error explains it.
func Open(path string) (*Payload, error) {
	z, err := zip.OpenReader(path)
	if err != nil {
		return nil, fmt.Errorf("%s carries no payload (was it built with `make`, and copied completely?): %w", path, err)
	}
	z.RegisterDecompressor(zstd.ZipMethodWinZip, zstd.ZipDecompressor(zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1)))
	text, err := fs.ReadFile(z, manifestName)
	if err != nil {
		z.Close()
		return nil, fmt.Errorf("read %s in %s: %w", manifestName, path, err)
	}
	p := &Payload{zip: z}
	if err := json.Unmarshal(text, &p.Manifest); err != nil {
		z.Close()
		return nil, fmt.Errorf("read %s in %s: %w", manifestName, path, err)
	}
	sum := sha256.Sum256(text)
	p.ID = hex.EncodeToString(sum[:8])
	return p, nil
}

// Close closes the file.
func (p *Payload) Close() error { return p.zip.Close() }

// Missing returns the names of the files that are not completely in dir yet, and their size in bytes. A file
// gets its name only when it is complete and on disk, so checking the size is enough. With programOnly only the program
// is checked.
func (p *Payload) Missing(dir Dir, programOnly bool) (names []string, bytes uint64) {
	for _, f := range p.zip.File {
		if strings.HasSuffix(f.Name, "/") || programOnly && f.Name != Program {
			continue
		}
		info, err := os.Stat(dir.Path(f.Name))
		if err == nil && uint64(info.Size()) == f.UncompressedSize64 {
			continue
		}
		names = append(names, f.Name)
		bytes += f.UncompressedSize64
	}
	return names, bytes
}

// Unpack writes the named files to dir and checks each against the manifest. It can be interrupted and called again, also
// by several processes at once: one works, the others wait and find the files.
func (p *Payload) Unpack(dir Dir, names []string) error {
	if len(names) == 0 {
		return nil
	}
	unlock, err := lock(dir, lockWait)
	if err != nil {
		return fmt.Errorf("unpack to %s: %w", dir, err)
	}
	defer unlock()
	if err := removeTemporary(dir); err != nil {
		return fmt.Errorf("remove files of an interrupted start in %s: %w", dir, err)
	}
	missing, _ := p.Missing(dir, false)
	names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !slices.Contains(missing, name) })
	var g errgroup.Group
	g.SetLimit(4)
	for _, name := range names {
		g.Go(func() error {
			if err := p.unpackFile(dir.Path(name), name); err != nil {
				if errors.Is(err, syscall.ENOSPC) {
					return fmt.Errorf("unpack %s: no space left on the disk of %s; free some, or choose another with --data-dir", name, dir)
				}
				return fmt.Errorf("unpack %s to %s: %w", name, dir, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// lockName is a separate file that only the owner of the folder can open: a lock on the folder itself could be held by
// every user who can read it.
const lockName = ".lock"

// The maximum time to wait for another process that unpacks. Unpacking takes seconds, on a slow disk a minute or two.
const (
	lockWait = 10 * time.Minute
	lockPoll = 100 * time.Millisecond
)

// lock locks the folder until unlock is called, or the process exits.
func lock(dir Dir, wait time.Duration) (unlock func(), err error) {
	if err := os.MkdirAll(string(dir), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(string(dir), lockName), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(lockPoll) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err == unix.EWOULDBLOCK && time.Now().After(deadline) {
			err = fmt.Errorf("another process has held %s for %s: stop it (`lslocks` lists it) and try again", f.Name(), wait)
		} else if err == unix.EWOULDBLOCK || err == unix.EINTR {
			continue
		}
		f.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
}

// removeTemporary removes unfinished files of a killed process; the holder of the lock owns them.
func removeTemporary(dir Dir) error {
	return filepath.WalkDir(string(dir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasPrefix(d.Name(), atomicfile.Prefix) {
			return os.Remove(path)
		}
		return err
	})
}

var errDamaged = errors.New("the polymesh file is damaged, copy it again")

func (p *Payload) unpackFile(target, name string) error {
	in, err := p.zip.Open(name)
	if err != nil {
		return err
	}
	defer in.Close()
	mode := fs.FileMode(0o644)
	if strings.HasPrefix(name, "bin/") {
		mode = 0o755
	}
	out, err := atomicfile.Create(target, mode)
	if err != nil {
		return err
	}
	defer out.Discard()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(out, sum), in); err != nil {
		if write := (*fs.PathError)(nil); errors.As(err, &write) {
			return err
		}
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	if want, got := p.Files[name], "sha256:"+hex.EncodeToString(sum.Sum(nil)); name != manifestName && want != got {
		return fmt.Errorf("%w: content is %s, payload.json has %q", errDamaged, got, want)
	}
	return out.Commit()
}

// Dir is a folder with an unpacked payload.
type Dir string

// EnvDir is the environment variable with the folder of the unpacked payload, set by the launcher.
const EnvDir = "POLYMESH_PAYLOAD_DIR"

// EnvFile names for the program the file from which the launcher was run: the one that was shipped.
const EnvFile = "POLYMESH_PAYLOAD_FILE"

// EnvGOGC repeats the GOGC that the launcher has set for an agent, so that the program can tell it from a user's.
const EnvGOGC = "POLYMESH_GOGC"

// Shipped returns the file from which this program was unpacked, if it is still the same.
func Shipped() (path string, err error) {
	path, dir := os.Getenv(EnvFile), os.Getenv(EnvDir)
	if path == "" || dir == "" {
		return "", errors.New("the program was not started by its launcher: run `polymesh`, the file that was shipped")
	}
	p, err := Open(path)
	if err != nil {
		return "", err
	}
	defer p.Close()
	if p.ID != filepath.Base(dir) {
		return "", fmt.Errorf("%s has just been replaced by another version: run this again", path)
	}
	return path, nil
}

// RemoveOld removes from a user's cache the programs of other versions, which nothing else would ever remove: all but the one that was
// unpacked last, because a user who tries a new version may go back. Only a folder with nothing but the program is removed, and not while another
// process unpacks it. A program that runs is not harmed.
func RemoveOld(cache, id string) error {
	entries, err := os.ReadDir(filepath.Dir(string(In(cache, id))))
	if err != nil {
		return err
	}
	type version struct {
		dir      Dir
		unpacked time.Time
	}
	var old []version
	for _, e := range entries {
		dir := In(cache, e.Name())
		if name, err := hex.DecodeString(e.Name()); err != nil || len(name) != 8 || e.Name() == id || !e.IsDir() || !dir.onlyProgram() {
			continue
		}
		if info, err := os.Lstat(dir.Path(Program)); err == nil {
			old = append(old, version{dir, info.ModTime()})
		}
	}
	slices.SortFunc(old, func(a, b version) int { return b.unpacked.Compare(a.unpacked) })
	var failures []error
	for _, v := range old[min(1, len(old)):] {
		unlock, err := lock(v.dir, 0)
		if err != nil {
			continue
		}
		failures = append(failures, os.RemoveAll(string(v.dir)))
		unlock()
	}
	return errors.Join(failures...)
}

// onlyProgram reports whether the folder contains the program alone, as in a user's cache.
func (d Dir) onlyProgram() bool {
	known := []string{".", lockName, filepath.Dir(Program), filepath.FromSlash(Program)}
	return filepath.WalkDir(string(d), func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(string(d), path); err != nil || !slices.Contains(known, rel) {
			return fs.ErrInvalid
		}
		return nil
	}) == nil
}

// In returns the folder for the payload with this id below a data dir.
func In(dataDir, id string) Dir { return Dir(filepath.Join(dataDir, "data", id)) }

// Path returns the path of the file with this name in the payload.
func (d Dir) Path(name string) string { return filepath.Join(string(d), filepath.FromSlash(name)) }

// Bin returns the path of a program.
func (d Dir) Bin(name string) string { return d.Path("bin/" + name) }

// BinDir returns the folder of the programs.
func (d Dir) BinDir() string { return d.Path("bin") }

// CNIDir returns the folder of the CNI plugins.
func (d Dir) CNIDir() string { return d.Path("bin/cni") }

// ImageArchives returns the OCI archives of the shipped images.
func (d Dir) ImageArchives() ([]string, error) {
	return filepath.Glob(d.Path("images/*.tar"))
}

// Manifest reads the unpacked manifest.
func (d Dir) Manifest() (*Manifest, error) {
	text, err := os.ReadFile(d.Path(manifestName))
	if err != nil {
		return nil, fmt.Errorf("read the payload's manifest: %w", err)
	}
	m := &Manifest{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Path(manifestName), err)
	}
	return m, nil
}
