// Package datadir says whose a data dir is.
//
// It owns the marker, a file in the data dir with the dir's id, and the lock of a running server. The launcher claims a
// data dir before it unpacks anything there, the server before it starts; `polymesh reset` removes only what the marker,
// or something that bears its id, proves to be a server's.
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

// MarkerName is the file in a data dir that makes it one.
const MarkerName = "polymesh.json"

// Marker is what the file holds.
type Marker struct {
	// ID is the data dir's own: 32 hex digits, made once.
	ID string `json:"id"`
	// Adopted says that an earlier version, which wrote no marker, made the data dir.
	Adopted bool `json:"adopted,omitempty"`
	// Folders are those outside of the data dir that were empty or missing when its server took them into use.
	Folders []string `json:"folders,omitempty"`
	// Kubeconfig is where its server wrote the administrator's kubeconfig last. What lies there has to prove itself.
	Kubeconfig string `json:"kubeconfig,omitempty"`
}

// Entries are what a server makes in its data dir, beside the marker.
func Entries() []string { return []string{"data", "server", "agent", "storage"} }

// maxMarker bounds what is read of a marker, in bytes.
const maxMarker = 64 << 10

var validID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// ForeignError says why a folder is not taken for a data dir.
type ForeignError struct{ Dir, Reason string }

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s is no data dir of Polymesh: %s", e.Dir, e.Reason)
}

// Read returns the marker of a data dir. The error wraps fs.ErrNotExist where there is none.
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
		return nil, &ForeignError{string(dataDir), path + " holds no id: it is damaged, or another program's. If this is a data dir, remove that file and start the server, which writes another"}
	}
	return m, nil
}

// Check reports why a server may not use a folder as its data dir: what would be mixed with its own files is not a
// server's. It changes nothing.
func Check(dataDir layout.DataDir) error {
	_, err := Read(dataDir)
	if errors.Is(err, unix.ENOTDIR) {
		return nil // it holds nothing; that no folder can be made there is preflight's to say
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

// Claim returns the marker of a data dir and makes it, and the folder, where they are missing. A folder that Check
// refuses stays as it is.
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
	// Two first starts may claim at once: the marker that is there first counts for both.
	if err := m.write(dataDir, unix.Link); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("mark %s as a data dir: %w", dataDir, err)
	}
	return Read(dataDir)
}

// Take notes folders outside of the data dir as this data dir's and returns those that hold what someone else made.
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
		// The kubelet of every node of a machine makes its folder for device plugins at the same place.
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
		return nil, fmt.Errorf("note the folders of %s: %w", dataDir, err)
	}
	*m = next
	return foreign, nil
}

// NoteKubeconfig notes where the server writes the administrator's kubeconfig.
func (m *Marker) NoteKubeconfig(dataDir layout.DataDir, path string) error {
	if m.Kubeconfig == path {
		return nil
	}
	next := *m
	next.Kubeconfig = path
	if err := next.write(dataDir, unix.Rename); err != nil {
		return fmt.Errorf("note the kubeconfig of %s: %w", dataDir, err)
	}
	*m = next
	return nil
}

// Owns reports whether a folder is this data dir's: it lies in it, or Take has noted it.
func (m *Marker) Owns(dataDir layout.DataDir, folder string) bool {
	return within(string(dataDir), folder) || slices.Contains(m.Folders, folder)
}

func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// Alias is what network interfaces of this data dir have as their alias (IFLA_IFALIAS).
func (m *Marker) Alias() string { return "polymesh " + m.ID }

// write puts the marker onto the disk and then gives it its name, by link (2) or rename (2).
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

// prepared is what a user may have put into a data dir before the first start, by folder below it.
var prepared = map[string][]string{
	"agent":                        {"images", "etc"},
	"agent/etc":                    {"containerd"},
	"agent/etc/containerd":         {"certs.d"},
	"agent/images":                 nil, // archives of any name
	"agent/etc/containerd/certs.d": nil,
}

// isFresh reports whether a folder has nothing in the places of a server's files, apart from what the documentation tells
// users to prepare there. Files at other places are no matter of ours: a server does not touch them, nor does a reset.
func isFresh(dataDir layout.DataDir) (bool, error) {
	for _, name := range Entries() {
		_, err := os.Lstat(dataDir.Path(name))
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
			continue
		case err != nil:
			return false, fmt.Errorf("look at %s: %w", dataDir, err)
		case name != "agent":
			return false, nil
		}
		for folder, allowed := range prepared {
			entries, err := os.ReadDir(dataDir.Path(folder))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return false, fmt.Errorf("look at %s: %w", dataDir, err)
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

// Earlier reports why a folder without a marker is not a data dir of an earlier version, or one that was restored from a
// backup. What proves one is its payload, of which the folder's name is the hash, or the authority that the server made for
// itself; where there is a data/ or a server/, that very folder has to be proved.
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
				return foreign("%q, which no server makes", filepath.Join(data, name))
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
			return foreign("%s is another program's", Authority(dataDir))
		}
		found = true
	}
	if !found {
		return foreign("neither a payload nor an authority of one")
	}
	return nil
}

// Authority is the certificate by which the API server of a data dir is known (pkg/certificate, ServerCA).
func Authority(dataDir layout.DataDir) string {
	return dataDir.Path("server", "tls", "server-ca.crt")
}
