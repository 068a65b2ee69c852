// Package datadir determines the owner of a data dir.
//
// It owns the marker, a file in the data dir with the dir's id, and the lock of a running server. The launcher claims a
// data dir before it unpacks anything there, the server before it starts; `polymesh reset` only removes what the marker,
// or its id, proves to be a server's.
package datadir

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// MarkerName is the file that marks a data dir.
const MarkerName = "polymesh.json"

// Marker is the contents of the file.
type Marker struct {
	// ID is unique to the data dir: 32 hex digits, generated once.
	ID string `json:"id"`
	// Adopted is set if the data dir was created by an earlier version, which wrote no marker.
	Adopted bool `json:"adopted,omitempty"`
	// Folders are those outside the data dir that were empty or missing when its server started using them.
	Folders []string `json:"folders,omitempty"`
	// Kubeconfig is where its server last wrote the administrator's kubeconfig. The file there must still be verified.
	Kubeconfig string `json:"kubeconfig,omitempty"`
}

// Entries returns the names that a server creates in its data dir, except the marker.
func Entries() []string { return []string{"data", "server", "agent", "storage", "observe"} }

// maxMarker is the maximum size of a marker that is read, in bytes.
const maxMarker = 64 << 10

var validID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// ForeignError means that a folder is not a data dir.
type ForeignError struct{ Dir, Reason string }

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s is no data dir of Polymesh: %s", e.Dir, e.Reason)
}

// Read returns the marker of a data dir. The error wraps fs.ErrNotExist if there is none.
func Read(dataDir layout.DataDir) (*Marker, error) {
	path := dataDir.Path(MarkerName)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.Mode().IsRegular() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return nil, &ForeignError{string(dataDir), path + " is not a file that only this user can write"}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxMarker))
	if err != nil {
		return nil, err
	}
	m := &Marker{}
	if err := json.Unmarshal(text, m); err != nil || !validID.MatchString(m.ID) {
		return nil, &ForeignError{string(dataDir), path + " contains no id: it is damaged, or another program's. If this is a data dir, remove that file and start the server, which writes a new one"}
	}
	return m, nil
}

// Check returns an error if a server may not use a folder as its data dir, because its files would be mixed with
// others. It changes nothing.
func Check(dataDir layout.DataDir) error {
	_, err := Read(dataDir)
	if errors.Is(err, unix.ENOTDIR) {
		return nil // it contains nothing; preflight checks whether the folder can be created
	}
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fresh, err := isFresh(dataDir)
	if err != nil || fresh {
		return err
	}
	return Earlier(dataDir)
}

// Claim returns the marker of a data dir. It creates it, and the folder, if missing. A folder that Check
// rejects is not changed.
func Claim(dataDir layout.DataDir) (*Marker, error) {
	m, err := Read(dataDir)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	fresh, err := isFresh(dataDir)
	if err != nil {
		return nil, err
	}
	if !fresh {
		if err := Earlier(dataDir); err != nil {
			return nil, err
		}
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(string(dataDir), 0o755); err != nil {
		return nil, err
	}
	m = &Marker{ID: hex.EncodeToString(id), Adopted: !fresh}
	// Two first starts may claim at the same time: the first marker is used by both.
	if err := m.write(dataDir, unix.Link); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("mark %s as a data dir: %w", dataDir, err)
	}
	return Read(dataDir)
}

// Take records folders outside the data dir as this data dir's and returns those with contents of someone else.
func (m *Marker) Take(dataDir layout.DataDir, folders ...string) (foreign []string, err error) {
	next := *m
	for _, folder := range folders {
		if within(string(dataDir), folder) || slices.Contains(next.Folders, folder) {
			continue
		}
		entries, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		// The kubelets of all nodes on a machine use the same folder for device plugins.
		entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "device-plugins" })
		if len(entries) > 0 && !m.Adopted {
			foreign = append(foreign, folder)
			continue
		}
		next.Folders = append(slices.Clone(next.Folders), folder)
	}
	if len(next.Folders) == len(m.Folders) {
		return foreign, nil
	}
	if err := next.write(dataDir, unix.Rename); err != nil {
		return nil, fmt.Errorf("record the folders of %s: %w", dataDir, err)
	}
	*m = next
	return foreign, nil
}

// NoteKubeconfig records where the server writes the administrator's kubeconfig.
func (m *Marker) NoteKubeconfig(dataDir layout.DataDir, path string) error {
	if m.Kubeconfig == path {
		return nil
	}
	next := *m
	next.Kubeconfig = path
	if err := next.write(dataDir, unix.Rename); err != nil {
		return fmt.Errorf("record the kubeconfig of %s: %w", dataDir, err)
	}
	*m = next
	return nil
}

// Keep removes everything but the id from the marker, for a data dir of which a part stays after a reset. What is recorded would
// otherwise be taken for the next server's.
func (m *Marker) Keep(dataDir layout.DataDir) error {
	next := Marker{ID: m.ID}
	if err := next.write(dataDir, unix.Rename); err != nil {
		return fmt.Errorf("keep the marker of %s: %w", dataDir, err)
	}
	*m = next
	return nil
}

// Owns reports whether a folder is this data dir's: it is inside it, or was recorded by Take.
func (m *Marker) Owns(dataDir layout.DataDir, folder string) bool {
	return within(string(dataDir), folder) || slices.Contains(m.Folders, folder)
}

func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// Alias returns the alias of network interfaces of this data dir (IFLA_IFALIAS).
func (m *Marker) Alias() string { return "polymesh " + m.ID }

// write writes the marker to disk and then gives it its name, by link (2) or rename (2).
func (m *Marker) write(dataDir layout.DataDir, name func(from, to string) error) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(string(dataDir), "."+MarkerName+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := name(f.Name(), dataDir.Path(MarkerName)); err != nil {
		return err
	}
	dir, err := os.Open(string(dataDir))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// prepared is what a user may put into a data dir before the first start, by folder below it.
var prepared = map[string][]string{
	"agent":                        {"images", "etc"},
	"agent/etc":                    {"containerd"},
	"agent/etc/containerd":         {"certs.d"},
	"agent/images":                 nil, // archives of any name
	"agent/etc/containerd/certs.d": nil,
}

// isFresh reports whether a folder has no files in a server's places, except those that users may prepare there according to the
// documentation. Other files do not matter: neither a server nor a reset touches them.
func isFresh(dataDir layout.DataDir) (bool, error) {
	for _, name := range Entries() {
		_, err := os.Lstat(dataDir.Path(name))
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
			continue
		case err != nil:
			return false, fmt.Errorf("check %s: %w", dataDir, err)
		case name != "agent":
			return false, nil
		}
		for folder, allowed := range prepared {
			entries, err := os.ReadDir(dataDir.Path(folder))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return false, fmt.Errorf("check %s: %w", dataDir, err)
			}
			for _, e := range entries {
				if allowed != nil && !slices.Contains(allowed, e.Name()) {
					return false, nil
				}
			}
		}
	}
	return true, nil
}

var payloadID = regexp.MustCompile(`^[0-9a-f]{16}$`)

// Earlier returns an error unless a folder without a marker is a data dir of an earlier version, or one restored from a
// backup. The proof is its payload, whose folder is named after its hash, or the authority that the server has created for
// itself; if there is a data/ or a server/, that very folder has to be proved.
func Earlier(dataDir layout.DataDir) error {
	foreign := func(format string, args ...any) error {
		return &ForeignError{string(dataDir), "it has no " + MarkerName + ", and " + fmt.Sprintf(format, args...)}
	}
	data, server := dataDir.Path("data"), dataDir.Path("server")
	found := false
	if _, err := os.Lstat(data); !errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(data)
		if err != nil {
			return foreign("no payload in %s", data)
		}
		proved := false
		for _, e := range entries {
			switch name := e.Name(); {
			case name == "current" || name == "current.new":
			case !payloadID.MatchString(name):
				return foreign("%q, which is not from a server", filepath.Join(data, name))
			default:
				text, err := os.ReadFile(filepath.Join(data, name, "payload.json"))
				sum := sha256.Sum256(text)
				proved = proved || err == nil && hex.EncodeToString(sum[:8]) == name
			}
		}
		if !proved {
			return foreign("no payload in %s", data)
		}
		found = true
	}
	if _, err := os.Lstat(server); !errors.Is(err, fs.ErrNotExist) {
		text, err := os.ReadFile(Authority(dataDir))
		block, _ := pem.Decode(text)
		if err != nil || block == nil {
			return foreign("no authority in %s", Authority(dataDir))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !strings.HasPrefix(cert.Subject.CommonName, "polymesh-server-ca@") || !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
			return foreign("%s is from another program", Authority(dataDir))
		}
		found = true
	}
	if !found {
		return foreign("neither a payload nor an authority")
	}
	return nil
}

// Authority returns the certificate that identifies the API server of a data dir (pkg/certificate, ServerCA).
func Authority(dataDir layout.DataDir) string {
	return dataDir.Path("server", "tls", "server-ca.crt")
}
