package snapshot

import (
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

// work makes a folder for an unfinished snapshot of a cluster. If the process is killed, the next snapshot of this cluster removes it; the folder of a
// download that does not show its cluster stays.
func (s *Snapshots) work(cluster string) (string, error) {
	return os.MkdirTemp(s.o.Dir, unfinished(cluster, s.o.Node))
}

// removeUnfinished removes what interrupted saves of this server have left in the folder, which is locked.
func (s *Snapshots) removeUnfinished(cluster string) error {
	if cluster == "" {
		return nil
	}
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), unfinished(cluster, s.o.Node)) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.o.Dir, e.Name())); err != nil {
			return fmt.Errorf("remove an unfinished snapshot: %w", err)
		}
	}
	return nil
}
