package snapshot

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/datadir"
)

// Several clusters may keep their snapshots in one folder, or one bucket. A snapshot is a cluster's if the authority of its API server is in
// it: the beginning of that file's sum is the cluster's id, which new snapshots have in their names. A cluster that was restored has the
// authority, and so the id, of the one that was saved.

// idLength is how many hexadecimal digits a cluster's id has.
const idLength = 12

// authorityPath is the path in an archive of the authority that identifies a cluster, which is datadir.Authority in a data dir.
const authorityPath = "server/tls/server-ca.crt"

// cluster returns the id of the cluster whose files these are; empty if the authority is not one of them.
func (m *Metadata) cluster() string {
	for _, f := range m.Files {
		if f.Path == authorityPath && len(f.SHA256) >= idLength && clusterID.MatchString(f.SHA256[:idLength]) {
			return f.SHA256[:idLength]
		}
	}
	return ""
}

// cluster returns the id of the cluster in the data dir; empty if it has none.
func (s *Snapshots) cluster() (string, error) {
	text, err := os.ReadFile(datadir.Authority(s.o.DataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read which cluster is in %s: %w", s.o.DataDir, err)
	}
	return fileOf(authorityPath, text).SHA256[:idLength], nil
}

// unfinished returns the prefix of the folders in which the server of a node makes snapshots of a cluster.
func unfinished(cluster, node string) string {
	return atomicfile.Prefix + cluster + "_" + nodePart(node) + "_"
}

// machineID is the file with the machine's id (machine-id(5)).
const machineID = "/etc/machine-id"

// downloads returns the prefix of the folders into which this server downloads snapshots. A snapshot need not be of the cluster in the data dir,
// which may be empty, nor show of which one it is: it is the server that is identified, by its machine, data dir and node.
func (s *Snapshots) downloads() (string, error) {
	// A machine without an id is identified by its data dir and node alone. The id itself must not be published (machine-id(5)).
	id, err := os.ReadFile(machineID)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	text, err := json.Marshal([]string{string(id), string(s.o.DataDir), s.o.Node})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte("polymesh snapshot download\n"), text...))
	return atomicfile.Prefix + "download_" + hex.EncodeToString(sum[:8]) + "_", nil
}

// removeDownloads removes what interrupted downloads of this server have left in the folder, which is locked.
func (s *Snapshots) removeDownloads() error {
	prefix, err := s.downloads()
	if err != nil {
		return err
	}
	return s.removeFolders(prefix)
}

// removeUnfinished removes what interrupted saves of this server have left in the folder, which is locked.
func (s *Snapshots) removeUnfinished(cluster string) error {
	if cluster == "" {
		return nil
	}
	return s.removeFolders(unfinished(cluster, s.o.Node))
}

func (s *Snapshots) removeFolders(prefix string) error {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.o.Dir, e.Name())); err != nil {
			return fmt.Errorf("remove an unfinished snapshot: %w", err)
		}
	}
	return nil
}
