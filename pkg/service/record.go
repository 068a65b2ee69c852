package service

import (
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

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/payload"
)

// record is what an install has written. It is written before the files are, so that what an interrupted install leaves is
// known as ours too.
type record struct {
	// Files are the installed paths, each with the prints of what install has put there, or was about to.
	Files map[string][]fingerprint `json:"files"`
	// Partial are files that were on their way to one of these paths.
	Partial []string `json:"partial,omitempty"`
	// Role is the service's, and Args are its arguments.
	Role Role     `json:"role,omitempty"`
	Args []string `json:"args,omitempty"`
	// Stale is systemd's invocation ID of a server that was running when its file, unit or environment was changed: it still
	// runs the old ones.
	Stale string `json:"stale,omitempty"`
}

// fingerprint is what lies at a path: "sha256:<hex>" for a file, "link:<target>" for a link, "none", or "other".
type fingerprint string

const (
	none  fingerprint = "none"
	other fingerprint = "other"
)

func fingerprintOf(path string) (fingerprint, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return none, nil
	case err != nil:
		return "", err
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		return linkFingerprint(target), err
	case !info.Mode().IsRegular():
		return other, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return fingerprint("sha256:" + hex.EncodeToString(sum.Sum(nil))), nil
}

func fileFingerprint(content []byte) fingerprint {
	sum := sha256.Sum256(content)
	return fingerprint("sha256:" + hex.EncodeToString(sum[:]))
}

func linkFingerprint(target string) fingerprint { return fingerprint("link:" + target) }

func (r *record) owns(path string) bool { return len(r.Files[path]) > 0 }

// isOurs reports whether what lies at a path is what an install has put there.
func (r *record) isOurs(path string, p fingerprint) bool { return slices.Contains(r.Files[path], p) }

// rootOnly reports whether only root can change a file or folder.
func rootOnly(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid() && info.Mode().Perm()&0o022 == 0
}

// maxRecord bounds what is read of a record, in bytes.
const maxRecord = 1 << 20

func (m *Machine) readRecord() (*record, error) {
	path := m.path(recordFile)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return m.madeByMakeUp()
	}
	if err != nil {
		return nil, fmt.Errorf("read what was installed: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	r := &record{}
	text, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err == nil {
		err = json.Unmarshal(text, r)
	}
	if err != nil || !info.Mode().IsRegular() || !rootOnly(info) {
		return nil, fmt.Errorf("%s does not say what was installed: it is damaged, or other users can write it. Remove it; what lies in %s and %s then counts as your own", path, filepath.Dir(Program), Unit)
	}
	if r.Files == nil {
		r.Files = map[string][]fingerprint{}
	}
	return r, nil
}

// madeByMakeUp reads the list of an earlier version's `make up`, which had no prints in it: what lies there now is taken for
// what it wrote.
func (m *Machine) madeByMakeUp() (*record, error) {
	r := &record{Files: map[string][]fingerprint{}}
	text, err := os.ReadFile(m.path(makeUpList))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was installed: %w", err)
	}
	for path := range strings.Lines(string(text)) {
		path = strings.TrimSpace(path)
		p, err := fingerprintOf(m.path(path))
		if err != nil {
			return nil, err
		}
		switch {
		case path == Program && isPolymesh(m.path(path)), path == Unit && strings.HasPrefix(string(p), "sha256:"), slices.Contains(links, path) && p == linkFingerprint(filepath.Base(Program)):
			r.Files[path] = []fingerprint{p}
		}
	}
	return r, nil
}

const makeUpList = recordDir + "/installed-by-make-up"

func (m *Machine) writeRecord(r *record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := atomicfile.Write(m.path(recordFile), append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("record what is installed: %w", err)
	}
	if err := os.Remove(m.path(makeUpList)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// lock keeps a second install or uninstall from working at the same time.
func (m *Machine) lock() (unlock func(), err error) {
	if err := atomicfile.MkdirAll(m.path(recordDir), 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(m.path(recordDir))
	if err != nil {
		return nil, err
	}
	if info, err := dir.Stat(); err != nil || !rootOnly(info) {
		dir.Close()
		return nil, errors.Join(err, fmt.Errorf("other users can write %s: make it root's own (chown root, chmod 755)", dir.Name()))
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("another `polymesh install` or `polymesh uninstall` is at work: run this again when it has ended (%w)", err)
	}
	return func() { dir.Close() }, nil
}

// removePartial removes what an interrupted install has left on its way.
func (m *Machine) removePartial(r *record) error {
	for _, path := range r.Partial {
		// The record is root's own, and still: only what has the name of such a file goes.
		if !strings.HasPrefix(filepath.Base(path), atomicfile.Prefix) {
			continue
		}
		if err := os.Remove(m.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.Partial = nil
	return nil
}

// isPolymesh reports whether a file is one that was shipped, of whatever version.
func isPolymesh(path string) bool {
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() {
		return false
	}
	p, err := payload.Open(path)
	if err != nil {
		return false
	}
	defer p.Close()
	_, ok := p.Files[payload.Program]
	return ok
}
